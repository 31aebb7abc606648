"""The whitening first layer against the definition of whitening."""

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

import advebm
from advebm.core.errors import UserError
from advebm.models import whitening
from advebm.models.network import Architecture
from advebm.models.resnet import ResNet
from advebm.models.whitening import enough, principal_patches, whiten_first_convolution


@pytest.fixture
def images(generator):
    """Smooth noise of two correlated channels."""
    noise = torch.rand(60, 2, 14, 14, generator=generator)
    smooth = nn.functional.avg_pool2d(noise, 3, 1)
    return torch.cat([smooth[:, :1], smooth[:, :1] / 2 + smooth[:, 1:] / 2], 1)


def network(width, *, channels=2):
    half = (0.5,) * channels
    return Architecture(ResNet(8, width), 3, channels, 12, half, half).build()


def test_outputs_on_patches_are_uncorrelated_with_variance_one(images):
    model = network(36)
    before = model.backbone.stem[0].weight.detach().clone()
    whiten_first_convolution(model, images)
    weight = model.backbone.stem[0].weight.detach().flatten(1)
    assert torch.equal(weight[18:], -weight[:18])  # all 2 x 3 x 3 components, each with its negative
    patches = unfold(model.normalise(images), 3).transpose(1, 2).reshape(-1, 18)
    covariance = torch.cov((patches.double() @ weight[:18].double().T).T, correction=0)
    variances = torch.linalg.eigvalsh(torch.cov(patches.double().T, correction=0)).flip(0)
    expected = torch.diag(variances / (variances + 5e-4))
    torch.testing.assert_close(covariance, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(before, model.backbone.stem[0].weight)


def test_narrow_layers_take_the_largest_components_and_wide_ones_keep_their_rest(images):
    narrow, wide = network(6), network(40)
    rest = wide.backbone.stem[0].weight[36:].detach().clone()
    whiten_first_convolution(narrow, images)
    whiten_first_convolution(wide, images)
    torch.testing.assert_close(narrow.backbone.stem[0].weight[:3], wide.backbone.stem[0].weight[:3])
    torch.testing.assert_close(narrow.backbone.stem[0].weight[3:], -narrow.backbone.stem[0].weight[:3])
    assert torch.equal(wide.backbone.stem[0].weight[36:], rest)


def test_a_run_begins_with_it(tmp_path):
    options = {"train.images": 0, "backbone.width": 18, "train.ema": 0}
    runs = []
    for whiten in (False, True):
        recipe = advebm.load_recipe("digits-at", {**options, "train.whiten": whiten})
        runs.append(advebm.train(recipe, folder=tmp_path / str(whiten), device="cpu"))
    plain, whitened = (next(advebm.load(run).parameters()).detach() for run in runs)
    assert torch.equal(whitened[:9], -whitened[9:])
    assert not torch.equal(plain[:9], -plain[9:])


def test_large_images_take_few_and_pieces_add_up(images, monkeypatch):
    assert enough((3, 32, 32)) == 5_000
    assert enough((3, 512, 512)) * 3 * 512 * 512 <= 2**27
    whole = principal_patches(images, (3, 3))
    monkeypatch.setattr(whitening, "PATCH_VALUES", 7 * 18 * 12 * 12)
    for one, two in zip(whole, principal_patches(images, (3, 3)), strict=True):
        torch.testing.assert_close(one.abs(), two.abs())  # directions have no sign


def test_a_network_without_such_a_layer_is_refused(images):
    with pytest.raises(UserError, match="begins with a convolution of all channels"):
        whiten_first_convolution(network(8, channels=3), images)
