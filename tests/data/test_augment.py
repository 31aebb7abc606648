"""The operations and the policy against Pillow, image by image; cutout and the draws re-derived."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from advebm.core import citations, rng
from advebm.core.errors import UserError
from advebm.data import autoaugment
from advebm.data.augment import Augment
from advebm.data.autoaugment import OPERATIONS, POLICY, Plan

SHAPES = [(1, 8, 8), (3, 8, 8), (1, 32, 32), (3, 32, 32), (3, 20, 25), (1, 25, 20), (3, 2, 5)]


def affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=grey(image))


def grey(image):
    return (128, 128, 128) if image.mode == "RGB" else 128


PILLOW = {
    "ShearX": lambda image, m: affine(1, m, 0, 0, 1, 0)(image),
    "ShearY": lambda image, m: affine(1, 0, 0, m, 1, 0)(image),
    "TranslateX": lambda image, m: affine(1, 0, m * image.width, 0, 1, 0)(image),
    "TranslateY": lambda image, m: affine(1, 0, 0, 0, 1, m * image.height)(image),
    "Rotate": lambda image, m: image.rotate(m, fillcolor=grey(image)),
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Solarize": lambda image, m: ImageOps.solarize(image, m),
    "Posterize": lambda image, m: ImageOps.posterize(image, round(m)),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(m),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(m),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(m),
}


def magnitude(name, level, sign):
    """As the paper's grid has it, written down a second time."""
    if name.startswith("Shear"):
        return sign * np.linspace(0, 0.3, 10)[level]
    if name.startswith("Translate"):
        return sign * np.linspace(0, 150 / 331, 10)[level]
    if name == "Rotate":
        return sign * np.linspace(0, 30, 10)[level]
    if name == "Posterize":
        return [8, 8, 7, 7, 6, 6, 5, 5, 4, 4][level]
    if name == "Solarize":
        return np.linspace(256, 0, 10)[level]
    if name in ("Contrast", "Color", "Brightness", "Sharpness"):
        return 1 + sign * np.linspace(0, 0.9, 10)[level]
    return 0.0


def with_pillow(x, operations):
    """One image, bytes (C, H, W), through (name, magnitude) one after the other."""
    array = x.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if len(x) == 1 else array)
    for name, m in operations:
        image = PILLOW[name](image, m)
    return torch.from_numpy(np.array(image)).view(*x.shape[1:], len(x)).permute(2, 0, 1)


def pictures(shape):
    """Noise, pieces of a photograph at several scales, and the flat ones with special cases; bytes (N, C, H, W)."""
    channels, height, width = shape
    draw = torch.Generator().manual_seed(0)
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[:channels]
    noise = [torch.randint(low, high, shape, generator=draw) for low, high in ((0, 256), (0, 256), (100, 108), (0, 2))]
    pieces = [photo[:, at::step, at::step][:, :height, :width] for at, step in ((0, 10), (90, 1), (180, 2), (130, 7))]
    colour = torch.tensor([77, 0, 255])[:channels, None, None]
    flat = [torch.full(shape, level) for level in (0, 128, 255)] + [colour.expand(shape)]
    one_off = torch.full(shape, 200)
    one_off[:, height // 2, width // 2] = 20
    ramp = torch.arange(height * width).view(1, height, width).expand(shape) * 255 // (height * width - 1)
    return torch.stack([p.to(torch.uint8) for p in (*noise, *pieces, *flat, one_off, ramp)])


def test_the_flat_pictures_are_special_and_the_others_are_not():
    x = pictures((3, 32, 32))
    assert x.flatten(2).amax(2).ne(x.flatten(2).amin(2)).all(1).sum() == 10
    assert x[4:8].float().flatten(1).std(1).gt(10).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_pillow(name, shape):
    """Every picture with every magnitude of the grid and some between, all in one call."""
    draw = np.random.default_rng(0)
    grid = [magnitude(name, level, sign) for level in range(10) for sign in (-1, 1)]
    between = draw.uniform(min(grid), max(grid), 6) if name != "Posterize" else [1, 2, 3]
    x = pictures(shape)
    pairs = list(itertools.product(range(len(x)), [*grid, *between]))
    chosen = torch.tensor([i for i, _ in pairs])
    ours = OPERATIONS[name].function(x[chosen], torch.tensor([m for _, m in pairs], dtype=torch.float64))
    theirs = torch.stack([with_pillow(x[i], [(name, m)]) for i, m in pairs])
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, theirs)


def test_operations_do_something_and_color_leaves_grey_images_alone():
    for channels in (1, 3):
        x = pictures((channels, 32, 32))[:8]
        for name, operation in OPERATIONS.items():
            m = torch.full((8,), magnitude(name, 8, 1), dtype=torch.float64)
            assert torch.equal(operation.function(x, m), x) == (name == "Color" and channels == 1), name


def every_plan():
    """All sub-policies with every choice of what is applied and in which direction: 400 images."""
    rows = list(itertools.product(range(25), (False, True), (False, True), (-1, 1), (-1, 1)))
    sub, first, second, left, right = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Plan(sub, torch.stack((first, second), 1), torch.stack((left, right), 1).double())


def pick(plan, index):
    return Plan(*(numbers[index] for numbers in plan))


def planned(x, plan):
    """Bytes through a plan with Pillow, image by image."""
    done = []
    for image, sub, applied, signs in zip(x, plan.sub.tolist(), plan.applied.tolist(), plan.sign.tolist(), strict=True):
        steps = zip(POLICY[sub], applied, signs, strict=True)
        done.append(with_pillow(image, [(n, magnitude(n, level, sign)) for (n, _, level), on, sign in steps if on]))
    return torch.stack(done)


def test_the_policy_is_the_published_one():
    """The table of Cubuk et al. (2019) in short: a letter for the operation, tenths of its probability, its level."""
    letters = dict(zip(PILLOW, "UVXYRAIESPCKBH", strict=True))
    published = """
        I17C26 R72X39 H81H93 V58Y79 A58E92  V27P37 K43B67 H39B79 E65E51 C67H65  K77X58 E37A48 Y43H26 B96K28 S52I03
        E20A60 E28E64 K99E66 A84S28 B13K70  S45A93 Y99Y79 A92S83 E88I13 Y79A91
    """
    assert ["".join(f"{letters[n]}{10 * p:.0f}{m}" for n, p, m in pair) for pair in POLICY] == published.split()
    assert len(POLICY) == 25
    assert set(PILLOW) == set(OPERATIONS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_plan_is_followed_as_with_pillow(shape):
    plan, library = every_plan(), pictures(shape)
    x = library[torch.randint(len(library), (len(plan.sub),), generator=torch.Generator().manual_seed(1))]
    out = autoaugment.apply_plan(x.float() / 255, plan)
    assert torch.equal(out, planned(x, plan).float() / 255)


def test_a_drawn_plan_is_the_whole_of_the_randomness():
    x = pictures((3, 32, 32)).repeat(8, 1, 1, 1)
    out = autoaugment.autoaugment(x.float() / 255, torch.Generator().manual_seed(3))
    plan = autoaugment.draw_plan(len(x), torch.Generator().manual_seed(3))
    assert torch.equal(out, planned(x, plan).float() / 255)
    assert (out * 255 != x).flatten(1).any(1).float().mean() > 0.4


def test_an_image_depends_on_its_own_numbers_alone():
    plan, library = every_plan(), pictures((3, 32, 32)).float() / 255
    x = library[torch.arange(400) % len(library)]
    before = x.clone()
    together = autoaugment.apply_plan(x, plan)
    assert torch.equal(x, before)
    for i in range(0, 400, 7):
        assert torch.equal(autoaugment.apply_plan(x[i : i + 1], pick(plan, slice(i, i + 1))), together[i : i + 1])
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(autoaugment.apply_plan(x[order], pick(plan, order)), together[order])


def test_images_are_rounded_to_bytes_once():
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    plan = Plan(torch.zeros(4, dtype=torch.long), torch.zeros(4, 2, dtype=torch.bool), torch.ones(4, 2))
    out = autoaugment.apply_plan(x, plan)
    assert out.dtype == x.dtype
    assert torch.equal(out, (x * 255).round() / 255)


def test_what_is_drawn_has_the_probabilities_of_the_policy():
    count = 100_000
    plan = autoaugment.draw_plan(count, torch.Generator().manual_seed(0))
    members = plan.sub.bincount(minlength=25)
    assert ((members - count / 25).abs() < 5 * (count / 25) ** 0.5).all()
    for sub, pair in enumerate(POLICY):
        p = torch.tensor([p for _, p, _ in pair], dtype=torch.float64)
        mine = plan.sub == sub
        tolerance = 5 * (p * (1 - p) / members[sub]).sqrt()
        assert ((plan.applied[mine].double().mean(0) - p).abs() <= tolerance).all(), pair
        both = plan.applied[mine].all(1).double().mean()
        assert (both - p.prod()).abs() <= 5 * (p.prod() * (1 - p.prod()) / members[sub]).sqrt(), pair
        assert (plan.sign[mine].mean(0).abs() < 5 / members[sub] ** 0.5).all()
    assert plan.sign.unique().tolist() == [-1, 1]
    assert plan.sign.prod(1).mean().abs() < 5 / count**0.5
    for on in (True, False):
        chosen = plan.sign[plan.applied == on]
        assert chosen.mean().abs() < 5 / len(chosen) ** 0.5


def test_the_generator_decides_and_nothing_else():
    state = torch.random.get_rng_state()
    draw = lambda seed: autoaugment.draw_plan(50, rng.generator(seed))
    for a, b in zip(draw(0), draw(0), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(draw(0), draw(1), strict=True):
        assert not torch.equal(a, b)
    x = torch.rand(20, 3, 8, 8, generator=rng.generator(2))
    whole = Augment(crop=1, flip=True, policy="autoaugment", cutout=3)
    assert torch.equal(whole(x, rng.generator(0)), whole(x, rng.generator(0)))
    assert not torch.equal(whole(x, rng.generator(0)), whole(x, rng.generator(1)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_policy_and_cutout_everything_is_as_before_they_came():
    """Crop and flip re-derived from draws in the order top, left, mirrored; and nothing else is drawn."""
    x = torch.rand(64, 3, 9, 7, generator=rng.generator(0))
    used, mine = rng.generator(1), rng.generator(1)
    out = Augment(crop=2, flip=True)(x, used)
    top, left, mirrored = (torch.randint(below, (64,), generator=mine).tolist() for below in (5, 5, 2))
    for before, after, i, j, flip in zip(x, out, top, left, mirrored, strict=True):
        padded = torch.zeros(3, 13, 11)
        padded[:, 2:11, 2:9] = before
        expected = padded[:, i : i + 9, j : j + 7]
        assert torch.equal(after, expected.flip(2) if flip else expected)
    assert torch.equal(used.get_state(), mine.get_state())
    untouched = rng.generator(1)
    assert torch.equal(Augment()(x, untouched), x)
    assert torch.equal(untouched.get_state(), rng.generator(1).get_state())


def test_crop_flip_policy_and_cutout_come_in_this_order():
    x = pictures((3, 32, 32)).repeat(3, 1, 1, 1).float() / 255
    used, mine = rng.generator(0), rng.generator(0)
    out = Augment(crop=4, flip=True, policy="autoaugment", cutout=9)(x, used)
    for step in (Augment(crop=4), Augment(flip=True), autoaugment.autoaugment, Augment(cutout=9)):
        x = step(x, mine)
    assert torch.equal(out, x)
    assert out.is_contiguous()
    assert torch.equal(used.get_state(), mine.get_state())


@pytest.mark.parametrize("edge", [1, 2, 3, 4, 16, 100])
def test_cutout_is_one_grey_square_around_a_pixel(edge):
    x = torch.rand(300, 2, 6, 9, generator=rng.generator(0))
    used, mine = rng.generator(1), rng.generator(1)
    out = Augment(cutout=edge)(x, used)
    rows, columns = (torch.randint(size, (300,), generator=mine).tolist() for size in (6, 9))
    for before, after, i, j in zip(x, out, rows, columns, strict=True):
        expected = before.clone()
        top, left = i - edge // 2, j - edge // 2
        expected[:, max(top, 0) : top + edge, max(left, 0) : left + edge] = 0.5
        assert torch.equal(after, expected)
        assert (after[:, i, j] == 0.5).all()
    assert torch.equal(used.get_state(), mine.get_state())
    assert set(zip(rows, columns, strict=True)) == set(itertools.product(range(6), range(9)))


def test_what_cannot_be_augmented_is_refused():
    with pytest.raises(UserError, match="policy is one of none, autoaugment, color-shape, got 'autoaugmnt'"):
        Augment(policy="autoaugmnt")
    with pytest.raises(UserError, match=r"cutout is a number of pixels >= 0 .*, got -1"):
        Augment(cutout=-1)
    with pytest.raises(UserError, match="1 or 3 channels, got 2"):
        Augment(policy="autoaugment")(torch.rand(1, 2, 8, 8), torch.Generator())


def test_only_what_is_switched_on_is_cited():
    assert citations.keys(Augment(crop=4, flip=True)) == []
    assert citations.keys(Augment(policy="autoaugment")) == ["cubuk2019"]
    assert citations.keys(Augment(policy="autoaugment", cutout=8)) == ["cubuk2019", "devries2017"]
    assert citations.bibtex(Augment(policy="autoaugment", cutout=8)).count("@") == 2


# Cropshift, color-shape, erasing --------------------------------------------------------------------------------------


def test_cropshift_keeps_a_rectangle_and_moves_it_on_black():
    """A picture of unique values above 0 shows where each pixel went: one offset an image, black elsewhere."""
    height, width, most = 9, 12, 5
    picture = (1 + torch.arange(height * width).view(1, 1, height, width)) / 200
    moved = Augment(cropshift=most)(picture.expand(4000, -1, -1, -1), rng.generator(0))
    losses, offsets = set(), set()
    for image in moved[:, 0]:
        rows, columns = image.nonzero().T
        box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box > 0).all()  # no holes
        origin = round(box[0, 0].item() * 200) - 1
        top, left = divmod(origin, width)
        torch.testing.assert_close(box, picture[0, 0, top : top + box.shape[0], left : left + box.shape[1]])
        losses.add((height - box.shape[0], width - box.shape[1]))
        offsets.add((rows.min().item() - top, columns.min().item() - left))
    assert losses == {(i, j) for i in range(most + 1) for j in range(most + 1 - i)}
    assert {dy for dy, _ in offsets} == {dx for _, dx in offsets} == set(range(-most, most + 1))


def test_as_much_is_lost_on_average_as_in_the_paper():
    """The total is uniform in 0 … 10, and its rows uniform in 0 … total: 5 of them, 2.5 rows and 2.5 columns."""
    black = Augment(cropshift=10)(torch.ones(20_000, 1, 32, 32), rng.generator(1))[:, 0] == 0
    rows, columns = (black.all(dim).sum(1).double() for dim in (2, 1))
    assert abs(rows.mean() - 2.5) < 0.1
    assert abs(columns.mean() - 2.5) < 0.1
    total = rows + columns
    assert abs((total == 0).double().mean() - 1 / 11) < 0.01
    assert abs((total == 10).double().mean() - 1 / 11) < 0.01


def test_a_small_image_keeps_a_pixel():
    assert (Augment(cropshift=20)(torch.ones(500, 1, 3, 4), rng.generator(0)).flatten(1).sum(1) >= 1).all()


def test_each_change_of_color_shape_is_one_of_pillow(monkeypatch):
    """Every image is what Pillow makes of one of the eight changes; all are drawn, with magnitudes of their range."""
    photo = pictures((3, 32, 32))[4]
    names = {
        "Color": (0.1, 1.9), "Brightness": (0.5, 1.9), "Contrast": (0.5, 1.9), "Sharpness": (0.1, 1.9),
        "AutoContrast": (0, 0), "Equalize": (0, 0), "ShearX": (0.05, 0.15), "ShearY": (0.05, 0.15), "Rotate": (1, 11),
    }  # fmt: skip
    calls = {name: [] for name in names}
    table = []
    for change in autoaugment.COLOR_SHAPE:
        name = next(name for name, operation in OPERATIONS.items() if operation.function is change.function)

        def spy(pixels, magnitude, name=name, function=change.function):
            calls[name].append((pixels.clone(), magnitude.clone()))
            return function(pixels, magnitude)

        table.append(change._replace(function=spy))
    monkeypatch.setattr(autoaugment, "COLOR_SHAPE", tuple(table))
    changed = autoaugment.color_shape(photo.expand(400, -1, -1, -1) / 255, rng.generator(3))
    counts = {name: sum(len(m) for _, m in calls[name]) for name in names}
    slots = {name: change.slots for name, change in zip(names, table, strict=True)}
    kinds = [slots.pop("ShearX") + slots.pop("ShearY"), *slots.values()]
    assert kinds == [2] * 8  # equally likely, a shear in either direction
    assert sum(counts.values()) == 400
    assert all(25 <= counts[name] <= 80 for name in names if not name.startswith("Shear"))
    assert counts["ShearX"] > 8
    assert counts["ShearY"] > 8
    for name, (low, high) in names.items():
        size = torch.cat([m for _, m in calls[name]])
        assert (low <= size.abs()).all()
        assert (size.abs() <= high).all()
        assert (size < 0).any() == (name in ("ShearX", "ShearY", "Rotate"))
        if high:
            assert size.abs().max() - size.abs().min() > 0.7 * (high - low)
    expected = {
        with_pillow(photo, [(name, m)]).numpy().tobytes()
        for name in names for _, sizes in calls[name] for m in sizes.tolist()
    }  # fmt: skip
    assert {image.numpy().tobytes() for image in (changed * 255).round().to(torch.uint8)} <= expected


def test_erased_boxes_have_the_published_area_and_shape():
    kept = Augment(erase=0.5)(torch.ones(6000, 3, 32, 40), rng.generator(0))
    gone = kept[:, 0] == 0
    assert (gone == (kept[:, 2] == 0)).all()
    touched = gone.flatten(1).any(1)
    assert abs(touched.double().mean() - 0.5) < 0.03
    heights, widths = gone.any(2).sum(1)[touched], gone.any(1).sum(1)[touched]
    assert (heights * widths == gone.flatten(1).sum(1)[touched]).all()  # a whole rectangle
    area = (heights * widths) / (32 * 40)
    assert area.min() < 0.03
    assert 0.29 < area.max() < 0.36
    assert abs(area.mean() - 0.172) < 0.01
    ratio = heights / widths
    assert ratio.min() >= 0.25
    assert ratio.max() <= 3.9
    assert abs(ratio.log().mean()) < 0.06
    first = gone.any(2).int().argmax(1)[touched]
    assert first.min() == 0
    assert (first + heights).max() == 32
    assert (Augment(erase=1)(torch.ones(50, 1, 8, 8), rng.generator(0)).flatten(1).amin(1) == 0).all()


@pytest.mark.parametrize("options", [{"cropshift": -1}, {"erase": 1.5}, {"alternate": True}])
def test_other_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match=r"cropshift|erase|flip"):
        Augment(**options)
