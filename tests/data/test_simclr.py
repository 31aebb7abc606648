"""SimCLR's augmentations against Pillow, image by image; the draws re-derived."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from advebm.core import citations, config, rng
from advebm.core.errors import UserError
from advebm.data import simclr
from advebm.data.augment import Augment
from advebm.data.simclr import Colours, Crops
from tests.data.test_augment import pictures


def as_image(x):
    """Bytes (C, H, W) for Pillow."""
    array = x.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if len(x) == 1 else array)


def as_bytes(image, like):
    return torch.from_numpy(np.array(image)).view(*like.shape[1:], len(like)).permute(2, 0, 1)


def with_pillow(x, operation, magnitude):
    """One image, bytes (C, H, W)."""
    image = as_image(x)
    if operation < 3:
        kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
        return as_bytes(kind(image).enhance(magnitude), x)
    if len(x) == 1:
        return x
    h, s, v = (np.array(band) for band in image.convert("HSV").split())
    turned = ((h.astype(int) + int(magnitude * 255)) % 256).astype(np.uint8)
    return as_bytes(Image.merge("HSV", [Image.fromarray(b) for b in (turned, s, v)]).convert("RGB"), x)


# Crops ----------------------------------------------------------------------------------------------------------------

BOXES = [(0, 0, 32, 32), (0, 0, 7, 9), (25, 23, 7, 9), (3, 11, 20, 15), (10, 0, 1, 32), (31, 31, 1, 1)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_crop_is_cut_out_and_enlarged_as_pillow_does(channels):
    """In floating point to rounding; Pillow's bytes, rounded after either axis, are within one level."""
    x = pictures((channels, 32, 32))
    for top, left, height, width in BOXES:
        box = Crops(*(torch.full((len(x),), v) for v in (top, left, height, width)))
        ours = simclr.resized_crop(x.double() / 255, box) * 255
        for image, found in zip(x, ours, strict=True):
            for channel, made in zip(image, found, strict=True):
                cut = Image.fromarray(channel.numpy().astype(np.float32)).crop((left, top, left + width, top + height))
                theirs = torch.from_numpy(np.array(cut.resize((32, 32), Image.Resampling.BILINEAR)))
                torch.testing.assert_close(made.float(), theirs, rtol=1e-5, atol=1e-3)
            cut = as_image(image).crop((left, top, left + width, top + height))
            theirs = as_bytes(cut.resize((32, 32), Image.Resampling.BILINEAR), image)
            assert (found - theirs).abs().max() <= 1


def test_the_whole_box_changes_nothing():
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(simclr.resized_crop(x, Crops(*(torch.full((2,), v) for v in (0, 0, 8, 8)))), x)


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_boxes_are_drawn_evenly_and_lie_within(scale):
    x = torch.zeros(20_000, 1, 32, 32)
    crops = simclr.draw_crops(x, scale, rng.generator(0))
    area, ratio = crops.height * crops.width / 1024, crops.width / crops.height
    assert (crops.top >= 0).all()
    assert (crops.top + crops.height <= 32).all()
    assert (crops.left >= 0).all()
    assert (crops.left + crops.width <= 32).all()
    assert crops.top.max() > 8
    assert crops.left.min() == 0
    assert area.min() > scale * 0.85
    assert area.max() == 1  # sides are rounded
    small = area < 0.7  # larger boxes fit less often
    assert area[small].mean() == pytest.approx((scale + 0.7) / 2, abs=0.01)
    assert ratio[small].log().mean().abs() < 0.01
    assert ratio[small].log().std() == pytest.approx(math.log(4 / 3) / math.sqrt(3), rel=0.05)
    free = crops.height < 24
    place = crops.top[free] / (32 - crops.height[free])
    assert place.mean() == pytest.approx(0.5, abs=0.01)
    assert (place == 1).any()
    assert (place == 0).any()


def test_where_no_box_fits_the_image_stays_whole():
    crops = simclr.draw_crops(torch.zeros(50, 1, 4, 30), 1.0, rng.generator(0))
    assert (crops.height == 4).all()
    assert (crops.width == 30).all()
    assert (crops.top == 0).all()


# Colours --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 32, 32)], ids=str)
def test_hues_turn_as_pillows_do(shape):
    x, turns = pictures(shape), (-0.5, -0.1, -0.004, -0.003, 0.0, 0.003, 0.07, 0.1, 0.5)
    for turn in turns:
        ours = simclr.hue(x, torch.full((len(x),), turn, dtype=torch.float64))
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, torch.stack([with_pillow(image, 3, turn) for image in x])), turn


def test_every_colour_turns_as_pillows_do():
    """A sixteenth of all 16.8 million, at five turns."""
    grid = torch.arange(0, 256, 1, dtype=torch.uint8)
    r, g, b = torch.meshgrid(grid[::3], grid[::3], grid[1::2], indexing="ij")
    x = torch.stack([r, g, b]).flatten(1)[:, : 1000 * 900].reshape(3, 1000, -1)
    for turn in (0.0, 0.1, -0.2, 0.37, -0.5):
        ours = simclr.hue(x[None], torch.tensor([turn], dtype=torch.float64))[0]
        assert torch.equal(ours, with_pillow(x, 3, turn)), turn


def test_a_hue_is_that_of_the_colour_wheel():
    """Pure colours by the standard library's own conversion, to the coarseness of bytes."""
    for turn in (0.1, 1 / 3, -0.25):
        for hue in np.linspace(0, 1, 13):
            x = torch.tensor([round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.8, 0.9)], dtype=torch.uint8)
            made = simclr.hue(x.view(1, 3, 1, 1), torch.tensor([turn], dtype=torch.float64)).flatten().tolist()
            wanted = [255 * v for v in colorsys.hsv_to_rgb((hue + turn) % 1, 0.8, 0.9)]
            assert max(abs(a - b) for a, b in zip(made, wanted, strict=True)) < 12


def test_greyed_images_are_pillows_and_the_others_stay():
    x = pictures((3, 32, 32))
    chosen = torch.arange(len(x)) % 2 == 0
    made = simclr.greyed(x, chosen)
    for image, found, grey in zip(x, made, chosen, strict=True):
        theirs = torch.from_numpy(np.array(as_image(image).convert("L"))).expand(3, -1, -1)
        assert torch.equal(found, theirs if grey else image)
    plain = pictures((1, 8, 8))
    assert torch.equal(simclr.greyed(plain, chosen), plain)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plan_is_followed_image_by_image(channels):
    """Every order of the four operations, with its own magnitudes, applied or not."""
    x = pictures((channels, 8, 8))[:8].repeat(12, 1, 1, 1)
    draw = rng.generator(0)
    colours = simclr.draw_colours(len(x), 0.5, draw)
    ours = simclr.recolour(x, colours)
    for i, image in enumerate(x):
        wanted = image
        for operation in colours.order[i].tolist() if colours.applied[i] else []:
            wanted = with_pillow(wanted, operation, colours.magnitude[i, operation].item())
        assert torch.equal(ours[i], wanted), i
    assert len({tuple(row) for row in colours.order.tolist()}) > 20
    assert not torch.equal(ours, x)


@pytest.mark.parametrize(("strength", "spans"), [(0.5, (0.6, 1.4, 0.1)), (2.0, (0.0, 2.6, 0.4))])
def test_strengths_are_those_of_simclr(strength, spans):
    low, high, turn = spans
    colours = simclr.draw_colours(20_000, strength, rng.generator(1))
    factors, turns = colours.magnitude[:, :3], colours.magnitude[:, 3]
    for values, start, end in ((factors, low, high), (turns, -turn, turn)):
        width = end - start
        assert values.min() == pytest.approx(start, abs=0.001 * width)
        assert (values >= start).all()
        assert values.max() == pytest.approx(end, abs=0.001 * width)
        assert (values <= end).all()
        assert values.mean() == pytest.approx((start + end) / 2, abs=0.01 * width)
    assert colours.applied.double().mean() == pytest.approx(0.8, abs=0.01)
    assert colours.order.double().mean(0).sub(1.5).abs().max() < 0.03
    assert isinstance(colours, Colours)


# The dataclass --------------------------------------------------------------------------------------------------------


def test_parts_come_in_simclrs_order():
    """Crop, flip, colours, grey, with the numbers of one generator."""
    x = pictures((3, 32, 32)).float() / 255
    made = Augment(scale=0.2, flip=True, jitter=0.5, grey=0.3)(x, rng.generator(5))
    draw = rng.generator(5)
    wanted = simclr.resized_crop(x, simclr.draw_crops(x, 0.2, draw))
    mirrored = torch.randint(2, (len(x),), generator=draw).bool()
    wanted = torch.where(mirrored[:, None, None, None], wanted.flip(3), wanted)
    wanted = simclr.augment(wanted, 0.5, 0.3, draw)
    assert torch.equal(made, wanted)
    assert made.dtype == x.dtype
    assert made.min() >= 0
    assert made.max() <= 1


def test_grey_alone_and_jitter_alone():
    x = pictures((3, 32, 32)).float()[4:8].repeat(500, 1, 1, 1) / 255
    grey = Augment(grey=0.2)(x, rng.generator(0))
    without = (grey == grey[:, :1]).flatten(1).all(1)
    assert without.double().mean() == pytest.approx(0.2, abs=0.03)
    assert torch.allclose(grey[~without], x[~without])
    jittered = Augment(jitter=0.5)(x, rng.generator(0))
    assert (jittered - x).abs().flatten(1).amax(1).gt(0.01).double().mean() == pytest.approx(0.8, abs=0.03)


def test_an_image_does_not_depend_on_its_neighbours():
    """What is drawn is drawn for each image; what is done is done to it alone."""
    x = pictures((3, 32, 32))
    colours = simclr.draw_colours(len(x), 1.0, rng.generator(2))
    whole = simclr.recolour(x, colours)
    for i in range(len(x)):
        alone = simclr.recolour(x[i : i + 1], Colours(*(part[i : i + 1] for part in colours)))
        assert torch.equal(alone[0], whole[i])


def test_settings():
    for bad in ({"scale": 0.0}, {"scale": 1.5}, {"grey": 1.1}, {"jitter": -0.1}):
        with pytest.raises(UserError, match=r"scale is a share in \(0, 1\], grey one in \[0, 1\] and jitter"):
            Augment(**bad)
    with pytest.raises(UserError, match=r"jitter must be at most 2.5"):
        Augment(jitter=3.0)
    with pytest.raises(UserError, match="grey or RGB images"):
        Augment(jitter=0.5)(torch.rand(2, 2, 8, 8), rng.generator(0))
    assert citations.keys(Augment(scale=0.5)) == ["chen2020"] == citations.keys(Augment(grey=0.2))
    thing = Augment(scale=0.1, flip=True, jitter=0.5, grey=0.2)
    assert config.construct(Augment, config.describe(thing)) == thing
