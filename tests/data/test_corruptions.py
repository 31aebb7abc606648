import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, gaussian_blur, pixelate
from advebm.data.sources import Data, Digits, Images
from advebm.metrics.base import Subject
from advebm.metrics.corruption import CorruptionAccuracy


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(channels, size, count=8):
    """Colour fields with edges, as photographs have."""
    coarse = torch.rand(count, channels, 4, 4, generator=g(3))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


IMAGES = {
    "digits": Digits().load().test.float()[:64],
    "colour": smooth(3, 32),
    "grey, not square": smooth(1, 40)[:, :, :, :28],
}


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("kind", IMAGES)
def test_distance_grows_with_severity(name, kind):
    x = IMAGES[kind]
    found = [corrupt(x, name, severity, g()) for severity in SEVERITIES]
    assert all(out.shape == x.shape and out.dtype == x.dtype for out in found)
    assert all(out.min() >= 0 and out.max() <= 1 for out in found)
    distances = [(out - x).square().mean().item() for out in found]
    assert distances[0] > 0
    assert distances == sorted(distances)
    assert len(set(distances)) == 5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_generator_decides(name):
    x = IMAGES["colour"]
    assert torch.equal(corrupt(x, name, 3, g(1)), corrupt(x, name, 3, g(1)))
    assert torch.equal(corrupt(x, name, 3, g(1)), corrupt(x, name, 3, g(2))) != name.endswith("noise")


FLAT = torch.full((40, 3, 32, 32), 0.5)


@pytest.mark.parametrize("severity", [1, 3])
def test_noises_have_the_deviation_they_name(severity):
    parameter = lambda name: CORRUPTIONS[name][1][severity - 1]
    gaussian = corrupt(FLAT, "gaussian-noise", severity, g())
    assert gaussian.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert gaussian.std().item() == pytest.approx(parameter("gaussian-noise"), rel=0.02)
    shot = corrupt(FLAT, "shot-noise", severity, g())  # a Poisson number of λ photons, over λ / mean
    assert shot.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert shot.std().item() == pytest.approx(math.sqrt(0.5 / parameter("shot-noise")), rel=0.02)
    impulse = corrupt(FLAT, "impulse-noise", severity, g())
    for value in (0.0, 1.0):
        assert (impulse == value).float().mean().item() == pytest.approx(parameter("impulse-noise") / 2, rel=0.07)
    assert set(impulse.unique().tolist()) == {0.0, 0.5, 1.0}


def test_contrast_and_brightness_in_closed_form():
    x = IMAGES["colour"]
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", 2, g()), (mean + 0.5 * (x - mean)).clamp(0, 1))
    torch.testing.assert_close(corrupt(x, "brightness", 3, g()), (x + 0.3).clamp(0, 1))


def test_blur_is_a_normalised_gaussian():
    """A point becomes the density of a Gaussian of that deviation; a flat image stays; edges do not darken."""
    point = torch.zeros(1, 2, 41, 41, dtype=torch.float64)
    point[0, 1, 20, 20] = 1
    blurred = gaussian_blur(point, 2.5 / 41, g())
    at = torch.arange(41.0, dtype=torch.float64) - 20
    density = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * 2.5**2)) / (2 * math.pi * 2.5**2)
    torch.testing.assert_close(blurred[0, 1], density, atol=1e-5, rtol=0)
    assert not blurred[0, 0].any()
    torch.testing.assert_close(gaussian_blur(FLAT, 0.07, g()), FLAT)
    slope = (blurred[0, 1] * at**2).sum()
    assert slope.item() == pytest.approx(2.5**2, rel=1e-2)


def test_pixelate_averages_blocks():
    x = torch.rand(2, 3, 8, 8, generator=g())
    blocks = x.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(pixelate(x, 0.5, g()), blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    row = torch.tensor([0.0, 3.0, 6.0]).expand(1, 1, 3, 3)  # two cells of one and a half pixels: 1 and 5
    torch.testing.assert_close(pixelate(row, 0.67, g()), torch.tensor([1.0, 3.0, 5.0]).expand(1, 1, 3, 3))
    torch.testing.assert_close(pixelate(x, 0.01, g()), x.mean((2, 3), keepdim=True).expand_as(x))


@pytest.mark.parametrize(("kind", "mode"), [("digits", "L"), ("colour", "RGB")])
def test_jpeg_is_pillows(kind, mode):
    x = IMAGES[kind][:4]
    ours = corrupt(x, "jpeg", 4, g())
    for image, found in zip(x, ours, strict=True):
        pixels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, format="JPEG", quality=CORRUPTIONS["jpeg"][1][3])
        decoded = Image.open(buffer)
        assert decoded.mode == mode
        expected = np.asarray(decoded, dtype=np.float32).reshape(pixels.shape) / 255
        np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-7)


MISTAKES = [
    ("gausian-noise", 1, "did you mean 'gaussian-noise'"),
    ("jpeg", 6, "whole number from 1 to 5, got 6"),
    ("jpeg", 0, "whole number from 1 to 5, got 0"),
]


@pytest.mark.parametrize(("name", "severity", "message"), MISTAKES)
def test_what_is_not_there_is_refused(name, severity, message):
    with pytest.raises(UserError, match=message):
        corrupt(FLAT, name, severity, g())
    with pytest.raises(UserError, match=message):
        CorruptionAccuracy((name,), (severity,))


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(UserError, match="1 or 3 channels, got 4"):
        corrupt(torch.rand(2, 4, 8, 8), "jpeg", 1, g())
    with pytest.raises(UserError, match="name at least one each"):
        CorruptionAccuracy(severities=())


class Brightness(nn.Module):
    """Two classes, dark and bright."""

    def forward(self, x):
        s = x.flatten(1).mean(1) - 0.5
        return torch.stack([-s, s], 1)


def test_accuracy_under_corruptions_by_hand():
    """Brightness 3 adds 0.3: of the dark images the one at 0.1 alone stays dark.  Contrast leaves means as they are."""
    x = torch.tensor([25, 60, 100, 200], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    split = Images(x, torch.tensor([0, 0, 0, 1]))
    data = Data("grey", ("dark", "bright"), split, split, split)
    subject = Subject(Brightness(), data, split, Attack(), batch=3)
    metric = CorruptionAccuracy(("brightness", "contrast"), (3,))
    records = {r.name: r for r in metric(subject, g())}
    assert records["accuracy under brightness 3"].value == 0.5
    assert records["accuracy under contrast 3"].value == 1
    mean = records["accuracy under corruptions"]
    shares = np.array([1, 0.5, 0.5, 1])  # 60 and 100 pass the middle
    assert (mean.value, mean.error) == pytest.approx((0.75, shares.std(ddof=1) / 2))
    assert mean.settings["parameters"] == "advebm"
    bare = Images(x, torch.full((4,), -1))
    with pytest.raises(UserError, match="accuracy needs labels"):
        metric(subject._replace(split=bare), g())


def test_a_corruption_is_the_same_whichever_others_are_measured():
    data = Digits().load()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    model[1].weight.data = torch.eye(64)[[27, 36]]  # two pixels, which noise changes
    split = Images(data.test.x, model(data.test.float()).argmax(1))
    subject = Subject(model, data, split, Attack())
    some = CorruptionAccuracy(("jpeg", "gaussian-noise"), (1, 5))(subject, g(4))
    one = CorruptionAccuracy(("gaussian-noise",), (5,))(subject, g(4))
    assert one[0] == some[3]
    assert len(some) == 5
