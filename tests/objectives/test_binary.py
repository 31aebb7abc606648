"""Binary adversarial training: gradient, search, curriculum and R1 against re-derivations; critics in runs."""

import copy
import dataclasses
import hashlib
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from torch import nn

import advebm
from advebm import energies, recipes
from advebm.core import config
from advebm.core import rng as seeds
from advebm.core.errors import Diverged, UserError
from advebm.data.negatives import GaussianImages, LowResolution, Mixture, NoiseImages, Patches
from advebm.data.sources import Digits, Unlabelled, find_spec
from advebm.evaluation.evaluate import evaluate_run
from advebm.evaluation.suites import suite
from advebm.metrics.base import Features, Subject
from advebm.metrics.corruption import CorruptionAccuracy
from advebm.metrics.robustness import Accuracy, RobustAccuracy, TargetedAccuracy
from advebm.models.excerpt import Published
from advebm.models.modes import freeze_batch_norms
from advebm.objectives.awp import AWP
from advebm.objectives.base import Batch, Context, r1
from advebm.objectives.binary import BinaryAT, BinaryMLE, BinaryResult
from advebm.objectives.curriculum import Curriculum
from advebm.objectives.dat import DAT, DATResult
from advebm.reporting import figures
from advebm.reporting.build import report
from advebm.runs.engine import Engine
from advebm.runs.recipe import design, resolve
from advebm.runs.run import Run
from advebm.samplers.classifier import TA
from advebm.samplers.critic import Ascent
from advebm.sampling import generate
from advebm.sampling.tune import tune
from advebm.starts import ImagePool
from advebm.training.batches import BatchSource
from advebm.training.loop import train
from advebm.training.validate import validate
from advebm.workflows.sample import draw_set
from tests.helpers import Plain, few_samples, linked
from tests.references import binary as reference

FOUR = Curriculum(steps=4, start=4)
FIXED = BinaryAT(FOUR, step_size=0.3, r1=0.0)


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
    """Eq. 14: minus the gradient of the loss is half of E[(1-σ) ∇f] - E[σ ∇f]; by running statistics in train mode."""
    with torch.no_grad():
        critic[4].bias -= copy.deepcopy(critic).eval()(pair.x).median()  # so that some are right and some are not
    found, loss = step(FIXED, critic, pair)
    quiet = copy.deepcopy(critic).eval()
    expected = reference.ascent_direction(quiet, pair.x, found.outside)
    torch.testing.assert_close([-2 * g for g in gradients(critic, loss.total)], expected, rtol=1e-6, atol=1e-9)
    f = [quiet(x).squeeze(1).detach() for x in (pair.x, found.outside)]
    d = [torch.sigmoid(v) for v in f]
    both = torch.cat([-d[0].log(), -(1 - d[1]).log()])
    assert loss.total.item() == pytest.approx(both.mean().item(), abs=1e-9)  # one mean, as in the authors' code
    right = [(f[0] > 0).double().mean().item(), (f[1] < 0).double().mean().item()]
    assert right[0] != right[1]
    assert loss.terms["accuracy"] == pytest.approx(sum(right) / 2)
    labels = np.r_[np.zeros(6), np.ones(6)]
    assert loss.terms["auroc"] == pytest.approx(roc_auc_score(labels, -torch.cat(f).numpy()))
    assert loss.terms["energy_data"] == pytest.approx(-f[0].mean().item())
    assert loss.terms["energy_negative"] == pytest.approx(-f[1].mean().item())


def test_without_the_annealing_it_is_maximum_likelihood(critic, pair):
    """Section 5.3: eq. 2 with PGD negatives."""
    objective = BinaryMLE(FOUR, step_size=0.3)
    found, loss = step(objective, critic, pair)
    quiet = copy.deepcopy(critic).eval()
    expected = reference.ascent_direction(quiet, pair.x, found.outside, scaled=False)
    torch.testing.assert_close([-2 * g for g in gradients(critic, loss.total)], expected, rtol=1e-6, atol=1e-9)
    assert 2 * loss.total.item() == pytest.approx((quiet(found.outside).mean() - quiet(pair.x).mean()).item())


@pytest.mark.parametrize("method", [BinaryAT, BinaryMLE, DAT])
def test_r1_weighs_against_one_mean_over_data_and_negatives(pair, method):
    """Of f = w·x: ½ (σ(f(x')) x' - σ(-f(x)) x) + r1 w, so an R1 weight of the authors' code is one here.

    DAT's s is the same f if there is one class to speak of, whose cross-entropy is 0.
    """

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-0.2, 0.3, 192, dtype=torch.float64))

        def forward(self, x):
            f = (x.flatten(1) @ self.w)[:, None]
            return torch.cat([f, torch.full_like(f, -1e3)], 1) if method is DAT else f

    line, r1_weight = Line(), 0.3
    batch, y = pair._replace(view=pair.x), torch.zeros(len(pair.x), dtype=torch.int64)
    found = BinaryResult(pair.x, pair.outside, torch.zeros(len(y)), 0)
    if method is DAT:
        batch, found = batch._replace(y=y), DATResult(pair.x, pair.outside)
    objective = method(r1=r1_weight)
    state = objective.init(pair.x, seeds.generator(0))
    total = objective.loss(line, batch, found, state, Context(seeds.generator(0))).total
    w, x, negatives = line.w.detach(), pair.x.flatten(1), pair.outside.flatten(1)
    pull, push = (1 / (1 + torch.exp(x @ w)), 1 / (1 + torch.exp(-negatives @ w)))  # 1 - D(x) and D(x')
    if method is BinaryMLE:
        pull, push = torch.ones_like(pull), torch.ones_like(push)
    expected = ((push[:, None] * negatives).mean(0) - (pull[:, None] * x).mean(0)) / 2 + r1_weight * w
    torch.testing.assert_close(gradients(line, total)[0], expected)


def test_r1_is_half_the_squared_slope(critic, pair):
    """Of w·x it is ‖w‖²/2 with gradient w; of the critic its parameter gradient agrees with finite differences."""
    line = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).double()
    value = r1(lambda x: line(x).squeeze(1), pair.x)
    torch.testing.assert_close(value, line[1].weight.square().sum() / 2)
    torch.testing.assert_close(gradients(line, value)[0], line[1].weight.detach())

    def penalty(net):
        with freeze_batch_norms(net):
            return r1(lambda x: -net(x).squeeze(1), pair.x)

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
        found, model = BinaryResult(data, worst, torch.zeros(len(data)), 0), Cells(f)
        loss = FIXED.loss(model, Batch(data, data), found, FIXED.init(data, seeds.generator(0)), Context(None))
        return -2 * loss.total, model  # of the game, which sums the two means

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
    objective = BinaryAT(Curriculum(steps=6, start=1, gate=gate, window=window, images_per_step=per_step))
    rng = np.random.default_rng(0)
    seen = [64 * i for i in range(150)]
    aurocs = (0.45 + 0.25 * np.sin(np.arange(150) / 9) + 0.2 * rng.random(150)).tolist()
    state, ks, one = objective.init(torch.empty(64, 1), seeds.generator(0)), [], torch.ones(())
    for i, (images, auroc) in enumerate(zip(seen, aurocs, strict=True)):
        objective.curriculum.advance(state, images)
        ks.append(state.steps)
        if i == 70:
            other = objective.init(torch.empty(64, 1), seeds.generator(0))
            other.load_state_dict(state.state_dict())
            state = other
        terms = {"auroc": torch.tensor(auroc), "accuracy": 0 * one, "move": one}
        found = BinaryResult(one, one, one, state.steps)
        objective.after(None, None, found, state, type("L", (), {"terms": terms}), Context(None, images))
    assert ks == reference.growth(seen, aurocs, 1, 6, gate, window, per_step)
    assert len(set(ks)) > 1
    assert ks[0] == 1
    if gate is None:
        assert ks[:13] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]


def test_a_fixed_k_stays(critic, pair):
    state = FIXED.init(pair.x, seeds.generator(0))
    FOUR.advance(state, 10**9)
    assert state.steps == 4


@pytest.mark.parametrize(("accuracy", "move", "warned"), [(1.0, 0.1, True), (1.0, 0.5, False), (0.98, 0.1, False)])
def test_a_critic_that_wins_is_noticed_once(accuracy, move, warned):
    """Figure 2's failure: right on everything, while negatives move by a small part of λK."""
    objective, notes = dataclasses.replace(FIXED, curriculum=Curriculum(steps=4, start=4, window=640)), []
    state = objective.init(torch.empty(64, 1), seeds.generator(0))
    for images in range(0, 3200, 64):
        objective.curriculum.advance(state, images)
        terms = {"auroc": torch.tensor(1.0), "accuracy": torch.tensor(accuracy), "move": torch.tensor(move)}
        found, loss = BinaryResult(None, None, None, state.steps), type("L", (), {"terms": terms})
        objective.after(None, None, found, state, loss, Context(None, images, note=notes.append))
        assert len(notes) == (warned and images >= 640)
    assert all(
        "the critic wins: it is right on 100.0%, and negatives move by 0.1 of 1.2 in 4 steps" in n for n in notes
    )


def test_bad_settings_are_refused():
    for make, message in (
        (lambda: BinaryAT(step_size=0), "step_size must be > 0"),
        (lambda: BinaryAT(r1=-1), "r1 and inside_steps must be >= 0"),
        (lambda: BinaryMLE(radius=0), "radius must be > 0 or none"),
        (lambda: BinaryAT(inside_radius=-1), "inside_radius must be > 0"),
        (lambda: BinaryAT(r1_at="there"), "is one of perturbed, data"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    assert Curriculum(steps=3, start=3, gate=None).steps == 3


def test_batch_norm_is_fixed_and_restored(critic, pair):
    quiet = copy.deepcopy(critic).eval()

    def fail():
        with freeze_batch_norms(critic):
            torch.testing.assert_close(critic(pair.x), quiet(pair.x))
            assert critic.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert critic[1].training
    critic[1].eval()
    with freeze_batch_norms(critic):
        pass
    assert not critic[1].training


# Sources of other images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_patches_are_squares_of_the_photographs(size, channels):
    """Unresized they are found in the photographs, in columns that no other split has."""
    source = Patches(size=16, channels=3, count=60, smallest=16, largest=16, contrast=0.05)
    data, photographs = source.load(), [torch.tensor(p) for p in load_sample_images().images]
    borders = {"train": (0, 448), "val": (448, 512), "test": (512, 640)}
    for name, (low, high) in borders.items():
        split = getattr(data, name)
        for x, y in zip(split.x, split.y.tolist(), strict=True):
            windows = photographs[y][:, low:high].unfold(0, 16, 1).unfold(1, 16, 1)  # (rows, columns, 3, 16, 16)
            corner = (windows[..., 0, 0] == x[:, 0, 0]).all(2)
            assert (windows[corner] == x).flatten(1).all(1).any()
    assert [len(s) for s in data.splits] == [42, 6, 12]
    small = dataclasses.replace(source, size=size, channels=channels, smallest=30, largest=32, contrast=0.1).load()
    assert small.shape == (channels, size, size)
    assert (small.train.float().mean(1).flatten(1).std(1, correction=0) > 0.095).all()  # before it was rounded: 0.1
    again = dataclasses.replace(source, size=size, channels=channels, smallest=30, largest=32, contrast=0.1).load()
    assert torch.equal(small.train.x, again.train.x)
    assert not torch.equal(small.test.x, dataclasses.replace(source, split_seed=1).load().test.x)


def test_noise_images_are_uniform():
    data = NoiseImages(size=16, count=500).load()
    counts = torch.bincount(data.train.x.flatten().long(), minlength=256).double()
    mean = counts.mean()
    assert ((counts - mean).square() / mean).sum() < 255 + 6 * math.sqrt(2 * 255)
    assert [len(s) for s in data.splits] == [500, 50, 100]
    assert data.shape == (1, 16, 16)
    assert not any(torch.equal(x, y) for x in data.train.x for y in data.test.x[:5])


def test_a_mixture_has_equal_shares():
    sources = (NoiseImages(count=100), NoiseImages(count=40, split_seed=1), Digits())
    data, parts = Mixture(sources).load(), [source.load() for source in sources]
    for name in ("train", "val", "test"):
        split, own = getattr(data, name), [getattr(part, name) for part in parts]
        share = min(map(len, own))
        assert split.y.bincount().tolist() == [share] * 3
        for k, part in enumerate(own):
            pixels = {x.numpy().tobytes() for x in part.x}
            taken = [x.numpy().tobytes() for x in split.x[split.y == k]]
            assert set(taken) <= pixels
            assert len(taken) >= len(set(taken)) >= share - 1
    assert data.classes == ("noise", "noise", "digits")


def test_gaussian_images_have_means_and_covariances_of_their_classes():
    digits, data = Digits().load(), GaussianImages(count=6_000).load()
    assert [len(s) for s in data.splits] == [6_000, 600, 1_200]
    assert data.train.y.bincount().tolist() == [600] * 10
    for k in (0, 7):
        real, drawn = (split.float()[split.y == k].flatten(1).double() for split in (digits.train, data.train))
        inner = ((real.mean(0) > 0.25) & (real.mean(0) < 0.75)).nonzero().squeeze(1)  # where few draws are clamped
        assert len(inner) > 10
        spread = real.std(0)[inner]
        assert ((drawn.mean(0) - real.mean(0))[inner].abs() < 0.25 * spread).all()
        correlation = lambda v: torch.corrcoef(v[:, inner].T)
        away = (correlation(real) - correlation(drawn)).abs()
        assert away.mean() < 0.08 < (correlation(real) - torch.eye(len(inner))).abs().mean()
    again, other = GaussianImages(count=6_000).load(), GaussianImages(count=6_000, split_seed=1).load()
    assert torch.equal(data.test.x, again.test.x)
    assert not torch.equal(data.test.x, other.test.x)
    assert find_spec(GaussianImages(count=60)) == ((1, 8, 8), 10, 60, 6)


def test_gaussian_images_of_unlabelled_images_and_of_published_models():
    """One Gaussian without labels; of a model that brings no training images the Gaussians that it brings."""
    data = GaussianImages(Unlabelled(), count=2_000).load()
    everything = Digits().load().train.float()
    assert data.classes == ("unlabelled",)
    assert (data.train.float().mean(0) - everything.mean(0)).abs().max() < 0.1
    published = Published("cifar10-infonce")
    brought = published.load().gaussians.means.double() / 255
    drawn = GaussianImages(published, count=1_000).load().train
    means = torch.stack([drawn.float()[drawn.y == k].mean(0).double() for k in range(10)])
    away = (means[:, None] - brought[None]).flatten(2).norm(dim=2)
    assert torch.equal(away.argmin(1), torch.arange(10))  # each is nearest to its own class


def test_low_resolution_keeps_means_of_blocks():
    digits, data = Digits().load(), LowResolution(factor=4).load()
    for before, after in zip(digits.splits, data.splits, strict=True):
        blocks = before.x.double().unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5))
        assert torch.equal(after.x, blocks.round().to(torch.uint8)[:, :, [0] * 4 + [1] * 4][..., [0] * 4 + [1] * 4])
        assert torch.equal(before.y, after.y)


def test_bad_sources_are_refused():
    for make, message in (
        (lambda: Patches(channels=2), "channels 1 or 3"),
        (lambda: Patches(smallest=9, largest=8), "smallest <= largest"),
        (lambda: Patches(largest=80).load(), "largest must be at most 64, what a split has, got 80"),
        (lambda: Patches(contrast=0.49, smallest=8, largest=8).load(), "too few squares have a contrast of 0.49"),
        (lambda: Patches(contrast=1), "contrast is a deviation"),
        (lambda: Patches(val=0.5, test=0.5), "positive shares"),
        (lambda: Patches(count=5), "too few to split"),
        (lambda: NoiseImages(count=5), "count at least 10"),
        (lambda: GaussianImages(count=5), "count must be at least 10, got 5"),
        (lambda: LowResolution(factor=1), "factor must be at least 2 pixels, got 1"),
        (lambda: LowResolution(factor=3).load(), "blocks of 3 pixels do not fill images of 1 x 8 x 8"),
        (lambda: Mixture((Digits(),)), "at least two sources"),
        (lambda: Mixture((Digits(), NoiseImages(size=9))).load(), r"have one shape, got \(1, 8, 8\) and \(1, 9, 9\)"),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_a_deck_deals_every_image_before_any_comes_again():
    x, like = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1), torch.empty(5, 1, 1, 1, dtype=torch.float64)
    deck, generator = ImagePool(x), torch.Generator().manual_seed(0)
    dealt = (torch.cat([deck(like, None, generator) for _ in range(4)]) * 255).round().flatten().tolist()
    assert sorted(dealt[:7]) == sorted(dealt[7:14]) == list(range(7))
    assert dealt[:7] != dealt[7:14]
    one, two, other = (ImagePool(x)(like, None, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


# In runs --------------------------------------------------------------------------------------------------------------


def short(**options):
    """A critic of digits, in two seconds."""
    pairs = {
        "backbone.width": 8,
        "outside.count": 1000,
        "outside.smallest": 32,
        "outside.largest": 32,
        "objective.curriculum": {"steps": 4, "window": 448, "images_per_step": 512, "gate": 0.9},
        "threat.steps": 2,
        "sampler.steps": 5,
        "train.images": 2560,
        "train.log_every": 256,
        "train.validate_every": 1280,
        "train.validate_with": 100,
        "train.checkpoint_every": 640,
    }
    pairs |= {k.replace("__", "."): v for k, v in options.items()}
    return resolve(recipes.find("digits-binary-at"), list(pairs.items()))


@pytest.fixture(scope="module")
def critic_run(tmp_path_factory):
    return train(short(), tmp_path_factory.mktemp("runs") / "critic", device="cpu")


def test_a_critic_is_trained_and_judged_by_detection(critic_run):
    """One output; K grows; validation is the AUROC on averaged weights, clean and under the threat."""
    recipe, lines = critic_run.recipe, critic_run.history()
    assert critic_run.model()[1].outputs == 1
    ks = [line["train/steps"] for line in lines if "train/steps" in line]
    assert ks[0] < 1
    assert ks == sorted(ks)
    assert ks[-1] == 4
    for line in lines:
        if "train/reach" in line:
            assert line["train/reach"] == pytest.approx(0.3 * line["train/steps"])
            assert line["train/move"] <= line["train/reach"] + 1e-5
    assert any("train/r1" in line for line in lines)
    without = [{k: v for k, v in line.items() if k != "train/r1"} for line in lines]
    wide, narrow = (Image.open(io.BytesIO(figures.moves(history))).width for history in (lines, without))
    assert wide == pytest.approx(narrow * 4 / 3, rel=0.05)
    judged = [line for line in lines if "val/auroc" in line]
    assert [line["images"] for line in judged] == [1280, 2560]
    assert not any("val/accuracy" in line for line in lines)
    model, data, outside = critic_run.model()[0], recipe.data.load(), recipe.outside.load()
    with torch.no_grad():
        inside, other = (-model(split.take(slice(100)).float()).squeeze(1) for split in (data.val, outside.val))
    expected = roc_auc_score(np.r_[np.zeros(100), np.ones(100)], torch.cat([inside, other]).numpy())
    assert judged[-1]["val/auroc"] == pytest.approx(expected)
    assert judged[-1]["val/adversarial_auroc"] < judged[-1]["val/auroc"] or expected == 1
    assert critic_run.checkpoints.path("best").name in ("1280", "2560")


def test_validation_attacks_the_outside_images_only():
    """f(x) = Σ x: each is moved by eps along the diagonal, which raises f by eps √D wherever the box allows it."""
    model, recipe = Plain(lambda x: x.flatten(1).sum(1, keepdim=True)), short(threat__eps=0.4, threat__steps=20)
    data, outside = recipe.data.load(), recipe.outside.load()
    low = dataclasses.replace(outside.val, x=outside.val.x // 2)  # away from the upper side of the box
    scores = validate(model, data, data.val, recipe, low)
    inside, other = (-split.float().flatten(1).sum(1) for split in (data.val, low))
    labels = np.r_[np.zeros(len(inside)), np.ones(len(other))]
    area = lambda shift: roc_auc_score(labels, torch.cat([inside, other - shift]).numpy())
    assert scores["val/auroc"] == pytest.approx(area(0), abs=1e-4)
    assert scores["val/adversarial_auroc"] == pytest.approx(
        area(0.4 * 8), abs=0.01
    )  # random starts end near the diagonal
    assert area(0) - area(0.4 * 8) > 0.03
    with pytest.raises(Diverged, match="energies of validation images are not finite"):
        validate(Plain(lambda x: x.flatten(1).sum(1, keepdim=True) * torch.nan), data, data.val, recipe, low)


def test_a_resumed_run_is_the_same_to_the_bit(critic_run, tmp_path):
    """K, its gate and the weights, from a checkpoint in the middle of a window."""
    cut = train(short(train__images=1280), tmp_path / "cut", device="cpu")
    text = (cut.folder / "config.yaml").read_text()
    (cut.folder / "config.yaml").write_text(text.replace("images: 1280", "images: 2560"))
    state = torch.load(cut.checkpoints.path() / "state" / "stream-0.pt", weights_only=True)
    assert 0 < state["steps"] < 4
    assert len(state["seen"]) == len(state["at"]) > 1
    cut = train(cut.recipe, cut.folder, resume=True, device="cpu")
    one, two = (load_file(r.checkpoints.path() / "model.safetensors") for r in (cut, critic_run))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (
        torch.load(r.checkpoints.path() / "state" / "stream-0.pt", weights_only=True) for r in (cut, critic_run)
    )
    assert torch.equal(one.pop("seen"), two.pop("seen"))
    assert one == two


def test_a_run_of_before_the_loss_was_halved_does_not_go_on(tmp_path):
    """Its recipe still loads, and so do its models."""
    run = train(short(train__images=640), tmp_path / "run", device="cpu")
    (run.folder / "config.yaml").write_text(
        (run.folder / "config.yaml").read_text().replace("images: 640", "images: 1280")
    )
    folder = run.checkpoints.path()
    path = folder / "state" / "stream-0.pt"
    state = torch.load(path, weights_only=True)
    assert state.pop("loss") == "mean"
    torch.save(state, path)
    digests = json.loads((folder / "state" / "sha256.json").read_text())
    digests["state/stream-0.pt"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "state" / "sha256.json").write_text(json.dumps(digests))
    old = Run.open(run.folder)
    assert old.model()[1].outputs == 1
    with pytest.raises(UserError, match="began when the loss of binary-at and binary-mle was twice what it is now"):
        train(old.recipe, old.folder, resume=True, device="cpu")


def test_streams_have_a_k_of_their_own(tmp_path):
    run = train(short(train__streams=2, train__images=640), tmp_path / "run", device="cpu")
    assert {p.name for p in run.checkpoints.path().glob("state/stream*")} == {"stream-0.pt", "stream-1.pt"}


def test_maximum_likelihood_with_these_negatives_diverges(tmp_path):
    """Section 5.3: the energies run away until they overflow, and the loop says so; the logistic loss holds them."""
    options = {
        "objective.curriculum": {"start": 2, "steps": 2},
        "objective.r1": 0.0,
        "optimizer": "sgd",
        "objective.step_size": 0.15,
    }
    options |= {"optimizer.lr": 0.1, "train.clip": "none", "train.ema": 0, "train.rollbacks": 0}
    options |= {"train.images": 64 * 100, "train.validate_every": 10**6, "train.checkpoint_every": 10**6}
    with pytest.raises(Diverged, match="the loss is not finite"):
        train(short(objective="binary-mle", **options), tmp_path / "mle", device="cpu")
    run = train(short(**options), tmp_path / "at", device="cpu")
    assert all(line["train/loss"] < 0.75 for line in run.history() if "train/loss" in line)


def test_a_note_becomes_a_warning_and_an_event(tmp_path, monkeypatch):
    def after(self, model, batch, found, state, loss, ctx):
        if ctx.images == 64:
            ctx.note("the critic wins")

    monkeypatch.setattr(BinaryAT, "after", after)
    with pytest.warns(RuntimeWarning, match="after 128 images the critic wins"):
        run = train(short(train__images=256, train__validate_every=10**6), tmp_path / "run", device="cpu")
    events = [line for line in run.history() if "event" in line]
    assert events == [{"images": 128, "event": "warning", "reason": "the critic wins"}]
    assert "the critic wins" in report(run).read_text()


def test_data_among_the_outside_images_is_noticed(tmp_path):
    own = Digits().load().train.x[:500]
    np.savez(tmp_path / "mixed.npz", x=torch.cat([own, 255 - own])[:, 0].numpy())
    recipe = resolve(recipes.find("digits-binary-at"), [("outside", f"npz:{tmp_path / 'mixed.npz'}")])
    data, known = recipe.data.load(), recipe.outside.load().train.x
    count = sum(bool((own == x).flatten(1).all(1).any()) for x in known)
    with pytest.warns(UserWarning, match=f"{count} of the 700 images of --outside are images of digits itself"):
        BatchSource(recipe, data, Engine("cpu"))
    assert 300 < count < 400


def test_critics_and_classifiers_are_told_apart():
    for overrides, message in (
        ({"sampler": "cs"}, "CS draws from classes, and objective BinaryAT trains a critic.*--sampler ascent"),
        ({"outside": "none"}, "BinaryAT needs outside images; give them with --outside KIND"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(recipes.find("digits-binary-at"), list(overrides.items()))
    recipe = resolve(recipes.find("digits-binary-at"), [("objective", "awp")])
    assert design(recipe, recipe.data.load()).outputs == 1


def test_ascent_goes_up_f(critic, pair):
    ours = Ascent(steps=4, step_size=0.3)(critic, torch.full((6,), -1), pair.outside)
    torch.testing.assert_close(ours, reference.ascent(copy.deepcopy(critic).eval(), pair.outside, 4, 0.3))


@few_samples
def test_samples_of_a_critic(critic_run):
    """From test images outside, without classes; grid, film, quality, detection, report."""
    recipe = critic_run.recipe
    folder = draw_set(critic_run, "ascent", recipe.sampler, 4)
    samples = generate.read_set(folder)
    assert (samples.x.shape, samples.y.unique().tolist()) == ((40, 1, 8, 8), [-1])
    assert samples.manifest["sampler"]["start"] == "outside"
    begun = generate.read_set(draw_set(critic_run, "begin", dataclasses.replace(recipe.sampler, steps=0), 4)).x
    seeds_ = {x.numpy().tobytes() for x in recipe.outside.load().test.x}
    assert {(x * 255).round().to(torch.uint8).numpy().tobytes() for x in begun} <= seeds_
    assert len({x.numpy().tobytes() for x in begun}) == 40
    model = critic_run.model()[0]
    with torch.no_grad():
        assert (model(samples.x) > model(begun)).float().mean() > 0.9
    assert (folder / "grid.png").exists()
    assert (folder / "film.png").exists()
    metrics = [config.build(k, "metric") for k in ({"kind": "ood", "count": 40, "steps": 2, "restarts": 1}, "energies")]
    metrics.append(config.build("sample-quality", "metric"))
    changed = dataclasses.replace(recipe, metrics=tuple(metrics))
    names = [r.name for r in evaluate_run(critic_run, recipe=changed, features="pixels")]
    assert {"AUROC energy vs uniform", "E(x) of samples ascent", "FD (pixels)"} <= set(names)
    assert not any("softmax" in name for name in names)
    names = [r.name for r in evaluate_run(critic_run, recipe=dataclasses.replace(recipe, metrics=metrics[2:]))]
    assert any(name.startswith("FD") for name in names)
    assert not any(name.startswith(("class score", "intended")) for name in names)
    assert "ascent" in report(critic_run).read_text()


def test_seeds_of_a_critic_may_be_those_of_classes(critic_run):
    sampler = dataclasses.replace(critic_run.recipe.sampler, start="class", steps=0)
    drawn = generate.read_set(draw_set(critic_run, "classes", sampler, 3))
    assert drawn.y.tolist() == [k for k in range(10) for _ in range(3)]
    judge = TA(steps=0, start="class")
    y, data = drawn.y, critic_run.recipe.data.load()
    same = generate.generate(critic_run.model()[0], judge, data, y, seed=0).x
    torch.testing.assert_close(drawn.x, generate.to_bytes(same).float() / 255)
    moved = generate.read_set(draw_set(critic_run, "moved", dataclasses.replace(sampler, steps=6), 3))
    with torch.no_grad():
        outputs = [critic_run.model()[0](images.x) for images in (drawn, moved)]
    assert (outputs[1] > outputs[0]).float().mean() > 0.9


def test_tuning_a_critic_begins_from_validation_images(critic_run, tmp_path, monkeypatch):
    begun, real = [], generate.generate_along
    look = lambda *args, outside, **rest: begun.append(outside.test.x) or real(*args, outside=outside, **rest)
    monkeypatch.setattr(generate, "generate_along", look)
    pixels = Features("pixels", lambda x: x.flatten(1))
    samplers = [Ascent(steps=1), Ascent(steps=1, step_size=0.1)]
    tune(linked(critic_run, tmp_path), samplers, pixels, per_class=5)
    outside = critic_run.recipe.outside.load()
    assert len(begun) == 2
    assert all(torch.equal(x, outside.val.x) for x in begun)


def test_what_needs_classes_says_so(critic_run):
    data, threat = critic_run.recipe.data.load(), critic_run.recipe.threat
    subject = Subject(critic_run.model()[0], data, data.test.take(slice(20)), threat)
    for metric in (Accuracy(), RobustAccuracy(), TargetedAccuracy(), CorruptionAccuracy(("jpeg",), (3,))):
        with pytest.raises(UserError, match="accuracy needs a classifier, the model has one output"):
            metric(subject, seeds.generator(0))
    ood = config.build({"kind": "ood", "scores": ["max-softmax"]}, "metric")
    with pytest.raises(UserError, match="need a classifier, the model has one output; use energy or max-logit"):
        ood(subject, seeds.generator(0))
    assert suite("binary-at", threat)


def test_the_energy_of_a_critic_is_minus_f(critic_run):
    model, data = critic_run.model()[0], Digits().load()
    subject = Subject(Plain(lambda x: model(x).squeeze(1)), data, data.test, critic_run.recipe.threat)
    record = config.build("energies", "metric")(subject, seeds.generator(0))[0]
    x = data.test.float()
    with torch.no_grad():
        assert record.value == pytest.approx(-model(x).mean().item(), rel=1e-4)
        assert torch.equal(advebm.energy(model, x), energies.binary(model(x)))


def test_the_python_interface_draws_from_critics(critic_run):
    model, three = critic_run.model()[0], torch.zeros(3, dtype=torch.int64)
    outside = critic_run.recipe.outside.load()
    settings = {"data": "digits", "method": "ascent", "steps": 3}
    x = advebm.sample(model, three, outside=outside, **settings)
    begun = advebm.sample(model, three, outside=outside, **{**settings, "steps": 0})
    with torch.no_grad():
        assert (model(x) > model(begun)).all()
    with pytest.raises(UserError, match="there are none; set start to global or noise"):
        advebm.sample(model, three, **settings)
    other = NoiseImages(size=9).load()
    with pytest.raises(UserError, match=r"the outside images are \(1, 9, 9\), those of digits \(1, 8, 8\)"):
        advebm.sample(model, three, outside=other, **settings)
    with pytest.raises(UserError, match="this needs a classifier; the model has one output"):
        advebm.sample(model, three, data="digits", method="cs")
    ten = Plain(lambda x: x.flatten(1)[:, :10])  # of a classifier it ascends log-sum-exp f
    assert (advebm.sample(ten, three, outside=outside, **settings) - begun).mean() > 0
    assert advebm.sample(model, three, **settings, start="global").shape == (3, 1, 8, 8)
