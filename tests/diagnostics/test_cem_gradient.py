"""The likelihood's gradient and its parts: CEM section 3, term by term, closed forms, and the AT loss."""

import copy

import pytest
import torch
from torch import nn

from advebm.attacks.projected import Attack
from advebm.core import rng
from advebm.core.errors import UserError
from advebm.diagnostics import cem_gradient
from advebm.diagnostics.cem_gradient import draw_langevin_negatives, split_likelihood_gradient
from advebm.objectives.at import AT
from advebm.objectives.base import Context
from tests.helpers import Plain
from tests.references import objectives as reference


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.fixture
def moved(batch):
    """Images away from the data, which do not stay in [0, 1]."""
    return batch.x + 0.3 * torch.randn(batch.x.shape, generator=rng.generator(0), dtype=torch.float64)


@pytest.mark.parametrize("at_once", [500, 4])
def test_parts_and_sum_are_the_papers(net, batch, moved, monkeypatch, at_once):
    """Each is the paper's sum over images and classes, with as many images at once as fit; running statistics count."""
    monkeypatch.setattr(cem_gradient, "batch_size_for", lambda shape, model: at_once)
    net(batch.x)  # moves the running statistics off their start
    ours = split_likelihood_gradient(net, batch.x, batch.y, moved)
    net.eval()
    close(ours.consistency, flat(reference.cem_consistency(net, batch.x, moved, batch.y)))
    close(ours.contrastive, flat(reference.cem_contrastive(net, moved, batch.y)))
    close(ours.total, flat(reference.cem_likelihood(net, batch.x, batch.y, moved)))
    assert min(ours.consistency.norm(), ours.contrastive.norm()) > 0.01


def test_the_sum_is_the_gradient_of_the_likelihood(net, batch, moved):
    """One backward pass of mean f_y(x) - mean log Σ_k exp f_k(x̂), whatever negative goes with whatever label."""
    net.eval()
    likelihood = -reference.joint_energy(net, batch.x, batch.y).mean() + reference.marginal_energy(net, moved).mean()
    whole = flat(reference.parameter_gradient(net, likelihood))
    for order in (torch.arange(6), torch.tensor([3, 0, 5, 1, 2, 4])):
        close(split_likelihood_gradient(net, batch.x, batch.y, moved[order]).total, whole)


def test_linear_classifiers_have_closed_forms(batch, moved):
    weights = torch.randn(5, 3 * 64, generator=rng.generator(1), dtype=torch.float64)
    linear = nn.Linear(3 * 64, 5, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(weights)
    ours = split_likelihood_gradient(nn.Sequential(nn.Flatten(), linear), batch.x, batch.y, moved)
    contrastive, consistency, likelihood = reference.log_linear(weights, batch.x, moved, batch.y)
    close(ours.contrastive, contrastive.flatten())
    close(ours.consistency, consistency.flatten())
    close(ours.total, likelihood.flatten())


def test_the_contrastive_part_is_what_adversarial_training_descends(net, batch):
    net.eval()
    objective, ctx = AT(Attack(eps=0.1, steps=3)), Context(rng.generator(0))
    x_adv = objective.search(net, batch, None, ctx)
    loss = objective.loss(net, batch, x_adv, None, ctx).total
    ours = split_likelihood_gradient(net, batch.x, batch.y, x_adv)
    close(ours.contrastive, -flat(reference.parameter_gradient(net, loss)))


def test_with_data_for_negatives_it_is_standard_training(net, batch):
    """The consistency part vanishes, and the contrastive one is the gradient of cross-entropy: CEM section 3.1."""
    ours = split_likelihood_gradient(net, batch.x, batch.y, batch.x)
    loss = nn.functional.cross_entropy(net.eval()(batch.x), batch.y)
    close(ours.total, -flat(reference.parameter_gradient(net, loss)))
    assert not ours.consistency.any()


def test_the_model_stays_as_it_is_and_frozen_weights_are_left_out(net, batch, moved):
    whole = split_likelihood_gradient(net, batch.x, batch.y, moved).total
    before = copy.deepcopy(net.state_dict())
    net[0].requires_grad_(False)
    net.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        ours = split_likelihood_gradient(Plain(net), batch.x, batch.y, moved).total
    frozen = sum(p.numel() for p in net[0].parameters())
    close(ours, torch.cat([torch.zeros(2, dtype=torch.float64), whole[frozen:]]))
    del net.unused
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": torch.rand(5, 3, 8, 8)}, r"one shape .* got \(6, 3, 8, 8\) and \(5, 3, 8, 8\)"),
        ({"x": torch.rand(0, 3, 8, 8), "negatives": torch.rand(0, 3, 8, 8)}, "B at least 1"),
        ({"y": torch.arange(5)}, r"labels are a tensor \(6,\)"),
        ({"y": torch.full((6,), 5)}, "labels must lie in 0 to 4"),
        ({"model": nn.Flatten()}, "no weights that require a gradient"),
        ({"model": nn.Conv2d(3, 5, 8, dtype=torch.float64)}, "a classifier returns logits"),
    ],
)
def test_what_does_not_fit_is_refused(net, batch, moved, change, message):
    with pytest.raises(UserError, match=message):
        split_likelihood_gradient(**{"model": net, "x": batch.x, "y": batch.y, "negatives": moved, **change})


def test_langevin_negatives_have_the_stationary_moments(generator):
    """Two equal logits -½ c ‖x - μ‖²: mean μ, and variance 1 / (c (1 - αc/2)) for steps of α."""
    model = Plain(lambda x: -(x - 0.3).square().flatten(1).sum(1)[:, None].expand(-1, 2))  # c = 2
    like = torch.zeros(5000, 1, 2, 2, dtype=torch.float64)
    x = draw_langevin_negatives(model, like, steps=60, step_size=0.1, generator=generator)
    assert x.shape == like.shape
    assert x.dtype == like.dtype
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.var().item() == pytest.approx(1 / 1.8, rel=0.04)
    start = draw_langevin_negatives(model, like, steps=0, step_size=0.1, generator=generator)
    assert 0 <= start.min() < 0.01 < 0.99 < start.max() < 1
    with pytest.raises(UserError, match="step_size must be > 0, got 0"):
        draw_langevin_negatives(model, like, steps=1, step_size=0.0, generator=generator)
