"""Networks of many classes on images that are neither small nor square."""

import pytest
import torch
from torch import nn

import advebm
from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.sources import Data, Images
from advebm.diagnostics import landscape
from advebm.edits.restore import Denoise, Inpaint, Upsample
from advebm.edits.transform import Counterfactual, Interpolate, Paint, Translate
from advebm.metrics.distances import Moments
from advebm.models.zoo.base import Resized
from advebm.samplers.classifier import CS, RCS, TA, Langevin

SHAPE, CLASSES = (3, 60, 84), 1000


@pytest.fixture(scope="module")
def model():
    """Classes of 1,000 by patches of 16 x 16 pixels, on images that are made 32 x 32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patches = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.GELU(), nn.Flatten(), nn.Linear(32, CLASSES))
    return advebm.wrap(Resized(patches, 32, 0.8), mean=0.5, std=0.25)


@pytest.fixture(scope="module")
def data():
    generator = rng.generator(0)
    x = (torch.rand(40, *SHAPE, generator=generator) * 255).to(torch.uint8)
    splits = [Images(x, torch.arange(40) % 2 * 999) for _ in range(3)]
    return Data("patches", tuple(f"class {k}" for k in range(CLASSES)), *splits)


@pytest.mark.parametrize("sampler", [TA, CS, RCS, Langevin])
@pytest.mark.parametrize("start", ["class", "global"])
def test_samplers(sampler, start, model, data):
    """Fitted on the two classes that have images, each energy of a sample's class falls."""
    two = Data("two", ("a", "b"), *(Images(part.x, part.y // 999) for part in data.splits))
    chosen = sampler(steps=5, start=start, fit_size=20)
    y = torch.tensor([0, 1, 1])
    seeds = chosen.prepare(two)(torch.empty(3, *SHAPE), y, rng.generator(1))
    images = chosen(model, y, seeds, generator=rng.generator(2))
    assert images.shape == (3, *SHAPE)
    if sampler is CS:
        assert (advebm.energy(model, images, y) < advebm.energy(model, seeds, y)).all()


@pytest.mark.parametrize("edit", [Inpaint(), Denoise(), Upsample(), Paint(), Translate(), Counterfactual()])
def test_edits(edit, model, data):
    x = data.test.x[:2].float() / 255
    hole = torch.zeros(1, *SHAPE[1:], dtype=torch.bool)
    hole[:, 20:40, 10:50] = True
    edited = edit(model, x, torch.tensor([998, 999]), hole=hole, generator=rng.generator(0))
    scale = edit.factor if isinstance(edit, Upsample) else 1
    assert edited.x.shape == (2, 3, scale * SHAPE[1], scale * SHAPE[2])


def test_interpolation(model, data):
    edited = Interpolate()(model, data.test.x[:2].float() / 255, torch.tensor([998, 999]))
    assert edited.x.shape[1:] == SHAPE


def test_attacks_and_energies(model, data):
    x, y = data.test.x[:3].float() / 255, torch.tensor([0, 998, 999])
    found = advebm.attack(model, x, y, eps=0.5, norm="l2", steps=3)
    assert ((found - x).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all()
    assert (advebm.energy(model, found, y) > advebm.energy(model, x, y)).any()


def test_principal_components_of_images_with_many_pixels(generator):
    """A thousand times more pixels than images, whose covariance would take 72 GB."""
    x = torch.randn(30, 3, 180, 180, generator=generator)
    axis = torch.nn.functional.normalize(torch.randn(3 * 180 * 180, generator=generator), dim=0)
    x = 0.01 * x + torch.linspace(-9, 9, 30).view(-1, 1, 1, 1) * axis.view(3, 180, 180)
    first, second = landscape.directions("pca", x[:1], lambda v: v.sum(), generator, images=x)
    assert (first.flatten() @ axis).abs() > 0.99
    assert (first * second).sum().abs() < 1e-4
    torch.testing.assert_close(torch.stack([first.norm(), second.norm()]), torch.ones(2))


def test_covariances_that_no_memory_holds_are_refused():
    with pytest.raises(UserError, match="a covariance of 20,000 features takes too much memory"):
        Moments.of(torch.zeros(2, 20_000))
