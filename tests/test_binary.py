"""Binary adversarial training: its gradient, search, curriculum and regulariser against re-derivations; critics in runs."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from torch import nn

import advebm
from advebm import config, energies, generation, recipes, seeds
from advebm.data.outside import Mixture, NoiseImages, Patches
from advebm.data.sources import Digits
from advebm.errors import Diverged, UserError
from advebm.evaluation import evaluate_run
from advebm.metrics.robustness import Accuracy, RobustAccuracy, TargetedAccuracy
from advebm.metrics.corruption import CorruptionAccuracy
from advebm.metrics.base import Subject
from advebm.modes import norms_fixed
from advebm.objectives.awp import AWP
from advebm.objectives.base import Batch, Context
from advebm.objectives.binary import BinaryAT, BinaryMLE, Found, r1
from advebm.reporting.build import report
from advebm.samplers import CS, Ascent
from advebm.stages import draw
from advebm.starts import Deck
from advebm.suites import suite
from advebm.training.loop import train, validate
from advebm.training.recipe import design, resolve
from tests.helpers import Plain, few_samples
from tests.references import binary as reference

FIXED = BinaryAT(steps=4, start=4, step_size=0.3, r1=0.0)


@pytest.fixture
def critic():
    """A small critic with batch norm whose statistics are not trivial, in float64 and train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 1)]
        net = nn.Sequential(*layers).double()
    net[1].running_mean.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
    net[1].running_var.fill_(0.5)
    net[4].weight.data *= 4
    return net


@pytest.fixture
def pair(batch, generator):
    """Data and as many other images."""
    return batch._replace(outside=torch.rand(batch.x.shape, generator=generator, dtype=torch.float64))


def step(objective, net, batch, images=0, state=None):
    state, ctx = state or objective.init(batch.x, seeds.generator(0)), Context(seeds.generator(0), images)
    found = objective.search(net, batch, state, ctx)
    return found, objective.loss(net, batch, found, state, ctx)


def gradients(net, total):
    return list(torch.autograd.grad(total, list(net.parameters()), allow_unused=True))


# The method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [FIXED, BinaryAT(), BinaryAT(inside_steps=2, r1=0.1), BinaryMLE(), AWP(FIXED)],
    ids=["fixed", "default", "inside", "mle", "awp"],
)
def test_contract(objective, critic, pair, generator):
    """No trace on the network, not even on batch norm's statistics after the loss; scalars to log."""
    before = copy.deepcopy(critic.state_dict())
    state, ctx = objective.init(pair.x, generator), Context(generator)
    found = objective.search(critic, pair, state, ctx)
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    loss = objective.loss(critic, pair, found, state, ctx)
    loss.total.backward()
    objective.after(critic, pair, found, state, loss, ctx)
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())
    assert all(m.training for m in critic.modules())
    assert all(p.grad is not None for p in critic.parameters())
    assert all(not t.requires_grad and t.ndim == 0 for t in loss.terms.values())
    assert objective.adversarial(pair, found) is None
    assert (objective.outputs, objective.needs) == (1, {"outside"})


@pytest.mark.parametrize("radius", [None, 0.5])
def test_negatives_ascend_f_from_outside_images(critic, pair, radius):
    objective = dataclasses.replace(FIXED, radius=radius, inside_steps=3, inside_radius=0.4)
    found, loss = step(objective, critic, pair)
    quiet = copy.deepcopy(critic).eval()
    outside = reference.ascent(quiet, pair.outside, 4, 0.3, radius=radius)
    torch.testing.assert_close(found.outside, outside)
    torch.testing.assert_close(found.inside, reference.ascent(quiet, pair.x, 3, 0.3, sign=-1.0, radius=0.4))
    assert (quiet(found.outside) > quiet(pair.outside)).all()
    assert (quiet(found.inside) < quiet(pair.x)).all()
    moves = (outside - pair.outside).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(found.move, moves)
    assert (loss.terms["steps"], loss.terms["reach"]) == (4, pytest.approx(1.2))
    assert loss.terms["move"] == pytest.approx(moves.mean().item())


def test_the_data_stays_where_it_is_in_the_paper(critic, pair):
    assert torch.equal(step(FIXED, critic, pair)[0].inside, pair.x)


def test_the_gradient_is_the_self_annealed_one(critic, pair):
    """Eq. 14: minus the gradient of the loss is E[(1-σ) ∇f] - E[σ ∇f]; by running statistics, in train mode too."""
    found, loss = step(FIXED, critic, pair)
    quiet = copy.deepcopy(critic).eval()
    expected = reference.ascent_direction(quiet, pair.x, found.outside)
    torch.testing.assert_close([-g for g in gradients(critic, loss.total)], expected, rtol=1e-6, atol=1e-9)
    f = [quiet(x).squeeze(1).detach() for x in (pair.x, found.outside)]
    d = [torch.sigmoid(v) for v in f]
    assert loss.total.item() == pytest.approx((-d[0].log()).mean().item() - (1 - d[1]).log().mean().item(), abs=1e-9)
    right = ((f[0] > 0).double().mean() + (f[1] < 0).double().mean()) / 2
    assert loss.terms["accuracy"] == pytest.approx(right.item())
    labels = np.r_[np.zeros(6), np.ones(6)]
    assert loss.terms["auroc"] == pytest.approx(roc_auc_score(labels, -torch.cat(f).numpy()))
    assert loss.terms["energy_data"] == pytest.approx(-f[0].mean().item())
    assert loss.terms["energy_negative"] == pytest.approx(-f[1].mean().item())


def test_without_the_annealing_it_is_maximum_likelihood(critic, pair):
    """Section 5.3: eq. 2 with PGD negatives."""
    objective = BinaryMLE(steps=4, start=4, step_size=0.3)
    found, loss = step(objective, critic, pair)
    quiet = copy.deepcopy(critic).eval()
    expected = reference.ascent_direction(quiet, pair.x, found.outside, scaled=False)
    torch.testing.assert_close([-g for g in gradients(critic, loss.total)], expected, rtol=1e-6, atol=1e-9)
    assert loss.total.item() == pytest.approx((quiet(found.outside).mean() - quiet(pair.x).mean()).item())


def test_r1_is_half_the_squared_slope(critic, pair):
    """Of w·x it is ‖w‖²/2 with gradient w; of the critic its parameter gradient agrees with finite differences."""
    line = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).double()
    value = r1(line, pair.x)
    torch.testing.assert_close(value, line[1].weight.square().sum() / 2)
    torch.testing.assert_close(gradients(line, value)[0], line[1].weight.detach())

    def penalty(net):
        with norms_fixed(net):
            return r1(net, pair.x)

    ours, h = gradients(critic, penalty(critic)), 1e-6
    for p, g in zip(critic.parameters(), ours, strict=True):
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
        up, down = (copy.deepcopy(critic) for _ in range(2))
        index = next(i for i, q in enumerate(critic.parameters()) if q is p)
        list(up.parameters())[index].data += h * direction
        list(down.parameters())[index].data -= h * direction
        slope = (penalty(up) - penalty(down)).item() / (2 * h)
        assert slope == pytest.approx(0.0 if g is None else (g * direction).sum().item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("at", ["perturbed", "data"])
def test_where_r1_is_taken(pair, at):
    """f = a‖x‖²/2 has ‖∇f‖² = a²‖x‖², which tells the two places apart."""

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x):
            return (self.a * x.square().flatten(1).sum(1) / 2)[:, None]

    objective = dataclasses.replace(FIXED, inside_steps=2, r1=0.3, r1_at=at)
    found, loss = step(objective, Bowl(), pair)
    x = found.inside if at == "perturbed" else pair.x
    expected = 0.5 * 0.49 * x.square().sum((1, 2, 3)).mean().item()
    assert loss.terms["r1"] == pytest.approx(expected)
    bare = step(dataclasses.replace(objective, r1=0.0), Bowl(), pair)[1]
    assert loss.total.item() == pytest.approx(bare.total.item() + 0.3 * expected)
    assert loss.terms["loss"] == pytest.approx(loss.total.item())


class Cells(nn.Module):
    """A critic with a free value in each of some cells of [0, 1]: every function on a grid."""

    def __init__(self, values):
        super().__init__()
        self.f = nn.Parameter(torch.as_tensor(values, dtype=torch.float64))

    def forward(self, x):
        return self.f[(x.flatten() * len(self.f)).long()][:, None]


def test_the_optimum_of_proposition_1():
    """On a grid: min over p_T is all mass where D is largest; no D does better than -log 4; D = 1/2 on the support
    and less outside reaches it, and stays there where p_T is the data."""
    cells, density = 8, [0, 0, 0.25, 0.5, 0.25, 0, 0, 0]
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    data = torch.cat([centres[k].repeat(int(8 * p)) for k, p in enumerate(density)]).view(-1, 1, 1, 1)

    def value(f, negatives=None):
        worst = centres[f.argmax()].repeat(len(data)).view(-1, 1, 1, 1) if negatives is None else negatives
        found, model = Found(data, worst, torch.zeros(len(data)), 0), Cells(f)
        loss = FIXED.loss(model, Batch(data, data), found, FIXED.init(data, seeds.generator(0)), Context(None))
        return -loss.total, model

    best = torch.where(torch.tensor(density) > 0, 0.0, -3.0)
    assert value(best)[0].item() == pytest.approx(-math.log(4))
    generator = seeds.generator(0)
    for _ in range(300):
        scale = 10 ** (2 * torch.rand(1, generator=generator) - 1.5)
        other = scale * torch.randn(cells, generator=generator, dtype=torch.float64)
        assert value(other)[0].item() < -math.log(4)
        assert value(best + other.where(best == 0, other - other.max().clamp_min(0)))[0].item() < -math.log(4)
    still, model = value(best, negatives=data)
    assert still.item() == pytest.approx(-math.log(4))
    (slope,) = torch.autograd.grad(still, model.f)
    torch.testing.assert_close(slope, torch.zeros_like(slope))
    raised, model = value(best + 0.1, negatives=data)
    (slope,) = torch.autograd.grad(raised, model.f)
    torch.testing.assert_close(slope, torch.tensor(density) * (1 - 2 * torch.sigmoid(best + 0.1).double()))


# The curriculum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "window", "per_step"), [(0.6, 320, None), (0.6, 320, 640), (None, 64, 256), (0.75, 100, 2000)]
)
def test_k_grows_by_the_gate_or_the_clock(gate, window, per_step):
    """Against a re-derivation, with a checkpoint in the middle."""
    objective = BinaryAT(steps=6, start=1, gate=gate, window=window, images_per_step=per_step)
    rng = np.random.default_rng(0)
    seen = [64 * i for i in range(150)]
    aurocs = (0.45 + 0.25 * np.sin(np.arange(150) / 9) + 0.2 * rng.random(150)).tolist()
    state, ks, one = objective.init(torch.empty(64, 1), seeds.generator(0)), [], torch.ones(())
    for i, (images, auroc) in enumerate(zip(seen, aurocs, strict=True)):
        objective.advance(state, images)
        ks.append(state.steps)
        if i == 70:
            other = objective.init(torch.empty(64, 1), seeds.generator(0))
            other.load_state_dict(state.state_dict())
            assert other == state
            state = other
        terms = {"auroc": torch.tensor(auroc), "accuracy": 0 * one, "move": one}
        found = Found(one, one, one, state.steps)
        objective.after(None, None, found, state, type("L", (), {"terms": terms}), Context(None, images))
    assert ks == reference.growth(seen, aurocs, 1, 6, gate, window, per_step)
    assert 1 < len(set(ks)) and ks[0] == 1
    if gate is None:
        assert ks[:13] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]


def test_a_fixed_k_stays(critic, pair):
    state = FIXED.init(pair.x, seeds.generator(0))
    FIXED.advance(state, 10**9)
    assert state.steps == 4


@pytest.mark.parametrize(("accuracy", "move", "warned"), [(1.0, 0.1, True), (1.0, 0.5, False), (0.98, 0.1, False)])
def test_a_critic_that_wins_is_noticed_once(accuracy, move, warned):
    """Figure 2's failure: right on everything, while negatives move by a small part of λK."""
    objective, notes = dataclasses.replace(FIXED, window=640), []
    state = objective.init(torch.empty(64, 1), seeds.generator(0))
    for images in range(0, 3200, 64):
        objective.advance(state, images)
        terms = {"auroc": torch.tensor(1.0), "accuracy": torch.tensor(accuracy), "move": torch.tensor(move)}
        found, loss = Found(None, None, None, state.steps), type("L", (), {"terms": terms})
        objective.after(None, None, found, state, loss, Context(None, images, note=notes.append))
        assert len(notes) == (warned and images >= 640)
    assert all("the critic wins: it is right on 100.0%, and negatives move by 0.1 of 1.2 in 4 steps" in n for n in notes)


def test_bad_settings_are_refused():
    for make, message in (
        (lambda: BinaryAT(steps=3, start=5), "0 <= start <= steps, got 5 and 3"),
        (lambda: BinaryAT(start=-1), "0 <= start"),
        (lambda: BinaryAT(gate=None, images_per_step=None), "K would never grow"),
        (lambda: BinaryAT(gate=1.0), r"gate is an AUROC in \[0, 1\)"),
        (lambda: BinaryAT(window=0), "at least 1 image, got 0"),
        (lambda: BinaryAT(images_per_step=0), "at least 1 image"),
        (lambda: BinaryAT(step_size=0), "step_size is > 0"),
        (lambda: BinaryAT(r1=-1), "r1 and inside_steps are >= 0"),
        (lambda: BinaryMLE(radius=0), "radius is > 0 or none"),
        (lambda: BinaryAT(inside_radius=-1), "inside_radius is > 0"),
        (lambda: BinaryAT(r1_at="there"), "is one of perturbed, data"),
        (lambda: Ascent(start="class"), "a critic has no classes"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    assert BinaryAT(steps=3, start=3, gate=None, images_per_step=None).steps == 3


def test_batch_norm_is_fixed_and_restored(critic, pair):
    quiet = copy.deepcopy(critic).eval()
    with pytest.raises(ZeroDivisionError), norms_fixed(critic):
        torch.testing.assert_close(critic(pair.x), quiet(pair.x))
        assert critic.training
        raise ZeroDivisionError
    assert critic[1].training
    critic[1].eval()
    with norms_fixed(critic):
        pass
    assert not critic[1].training
