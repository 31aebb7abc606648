import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import advebm
from advebm import energies, recipes
from advebm.core import config
from advebm.core.errors import UserError
from advebm.data.sources import Images
from advebm.descent import value_and_gradient
from advebm.runs.recipe import resolve
from advebm.samplers.base import Sampler
from advebm.samplers.classifier import CS, JEAT16, JEAT17, RCS, SGLD, TA, Langevin
from advebm.sampling import generate
from advebm.workflows.sample import choose_sampler
from tests.helpers import Plain
from tests.references import attacks as reference


@pytest.fixture(scope="module")
def digits():
    return advebm.load_data("digits")


@pytest.mark.parametrize("method", [TA, CS])
def test_agrees_with_the_paper_re_derived(net, batch, method):
    sampler = method(steps=5, step_size=0.2)
    ours = sampler(net, batch.y, batch.x)
    theirs = reference.sample(net.eval(), batch.x, batch.y, 0.2, 5, subtract_marginal=method is TA)
    torch.testing.assert_close(ours, theirs)


def test_ta_is_cs_minus_the_pull_of_the_marginal(net, batch):
    """∇E(y|x) = ∇E(x, y) - ∇E(x): the bias that CS drops."""
    net.eval()
    gradient = lambda energy: value_and_gradient(energy, batch.x)[1]
    ta, cs = (gradient(sampler.energy(net, batch.y)) for sampler in (TA(), CS()))
    pull = gradient(lambda x: energies.marginal(net(x)))
    torch.testing.assert_close(ta, cs - pull)
    assert pull.norm() > 0.1 * cs.norm()


def test_every_sampler_is_cs_plus_a_share_of_the_marginal_pull(net, batch):
    """CS + λ ∇E(x): λ = -1 for TA and JEAT's equation 16, 0 for CS and equation 17, any for RCS; no CS for Langevin."""
    net.eval()
    gradient = lambda energy: value_and_gradient(energy, batch.x)[1]
    joint = gradient(lambda x: -net(x)[torch.arange(6), batch.y])
    pull = gradient(lambda x: -net(x).exp().sum(1).log())
    shares = {TA(): -1, JEAT16(): -1, CS(): 0, JEAT17(): 0, RCS(): 1, RCS(weight=0.3): 0.3, RCS(weight=-1): -1}
    for sampler, share in shares.items():
        torch.testing.assert_close(gradient(sampler.energy(net, batch.y)), joint + share * pull)
    for sampler in (Langevin(), SGLD()):
        torch.testing.assert_close(gradient(sampler.energy(net, batch.y)), pull)
        assert not sampler.conditional


class TestLangevin:
    """Logits -‖x - μ_k‖² / 2 s²: E(x, y) is of N(μ_y, s²), E(x) of their mixture, in one dimension inside the box."""

    MEANS, S = (0.44, 0.56), 0.04

    @pytest.fixture
    def model(self):
        means = torch.tensor(self.MEANS, dtype=torch.float64)
        return Plain(lambda x: -((x.flatten(1) - means) ** 2) / (2 * self.S**2))

    def settle(self, model, sampler, y=0, count=10_000):
        begin = torch.full((count, 1, 1, 1), 0.35, dtype=torch.float64)
        labels = torch.full((count,), y)
        return sampler(model, labels, begin, generator=torch.Generator().manual_seed(0)).flatten()

    def check(self, x, mean, variance, fourth):
        """Mean and variance within 4 standard errors; ``fourth`` is the central moment that the second error needs."""
        assert abs(x.mean().item() - mean) < 4 * math.sqrt(variance / len(x))
        assert abs(x.var().item() - variance) < 4 * math.sqrt((fourth - variance**2) / len(x))

    @pytest.mark.parametrize("temperature", [1.0, 0.25])
    @pytest.mark.parametrize("y", [0, 1])
    def test_of_the_joint_energy_reaches_the_gaussian_of_the_class(self, model, y, temperature):
        h = self.S**2 / 10
        x = self.settle(model, JEAT17(steps=150, step_size=h, temperature=temperature), y)
        variance = temperature * 2 * h / (1 - (1 - h / self.S**2) ** 2)  # of the chain AR(1)
        self.check(x, self.MEANS[y], variance, 3 * variance**2)

    def test_of_the_marginal_energy_reaches_the_mixture(self, model):
        sampler = Langevin(steps=600, step_size=self.S**2 / 40, direction="raw", temperature=1.0, noise=0.0)
        x, half = self.settle(model, sampler), (self.MEANS[1] - self.MEANS[0]) / 2
        variance = self.S**2 + half**2
        fourth = 3 * self.S**4 + 6 * self.S**2 * half**2 + half**4
        self.check(x, 0.5, variance, fourth)
        assert abs((x > 0.5).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(len(x))

    def test_of_the_conditional_energy_leaves_the_data(self, model):
        """-log p(y|x) falls for ever away from the other class: TA's samples pass the mean of their own."""
        x = self.settle(model, JEAT16(steps=2000, step_size=self.S**2 / 2), 0, 1000)
        assert x.mean().item() < self.MEANS[0] - 2 * self.S

    def test_temperature_zero_is_gradient_descent(self, model):
        x = self.settle(model, JEAT17(steps=100, step_size=self.S**2 / 4, temperature=0.0), 1, 3)
        torch.testing.assert_close(x, torch.full_like(x, self.MEANS[1]))


def test_one_step_of_sgld(net, batch):
    net.eval()
    gradient = value_and_gradient(lambda x: -net(x).exp().sum(1).log(), batch.x)[1]
    noise = torch.randn(batch.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    sampler = SGLD(steps=1, step_size=0.2, noise=0.03)
    found = sampler(net, batch.y, batch.x, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, (batch.x - 0.2 * gradient + 0.03 * noise).clamp(0, 1))


@pytest.mark.parametrize("kind", ["cs", "rcs", "langevin", "np-langevin"])
def test_raw_steps_at_temperature_one_are_the_printed_update(net, batch, kind):
    """CEM section 3, 4.1 and eq. 10: x + α ∇log p + √(2α) ε, in pixels of [0, 1]; nothing else moves or scales it."""
    net.eval()
    alpha, bank = 2e-4, batch.view
    log_p = {
        "cs": lambda x: net(x)[torch.arange(6), batch.y],
        "rcs": lambda x: net(x)[torch.arange(6), batch.y] + net(x).exp().sum(1).log(),
        "langevin": lambda x: net(x).exp().sum(1).log(),
        "np-langevin": lambda x: (net(x) @ net(bank).detach().T).exp().sum(1).log(),
    }[kind]
    options = {"steps": 3, "step_size": alpha, "direction": "raw", "temperature": 1, "noise": 0.0}
    if kind == "np-langevin":
        options |= {"count": 6, "cosine": False, "tau": 1.0}
    start = 0.25 + batch.x / 2  # far from the sides of [0, 1], which the printed update does not know
    sampler = config.build({"kind": kind, **options}, "sampler")
    ours = sampler(net, batch.y, start, generator=torch.Generator().manual_seed(5), bank=bank)
    generator, x = torch.Generator().manual_seed(5), start
    for _ in range(3):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_p(x).sum(), x)
        x = x + alpha * gradient + (2 * alpha) ** 0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    torch.testing.assert_close(ours, x.detach(), rtol=0, atol=1e-12)
    assert (alpha * gradient).abs().max() > 1e-6  # so that the drift is seen


def walk(sampler, count=4000, slope=1):
    """Mean and deviation of each step on a slope, far from the box."""
    model = Plain(lambda x: torch.stack([-slope * x.sum((1, 2, 3)), 0 * x.sum((1, 2, 3))], 1))
    path = []
    begin = torch.full((count, 1, 1, 1), 0.5, dtype=torch.float64)
    end = sampler(
        model,
        torch.zeros(count, dtype=torch.int64),
        begin,
        generator=torch.Generator().manual_seed(0),
        observe=lambda k, x, value: path.append(x),
    )
    moves = [b - a for a, b in itertools.pairwise([*path, end])]
    return [m.mean().item() for m in moves], [m.std().item() for m in moves]


def test_step_and_noise_are_annealed_geometrically():
    means, _ = walk(CS(steps=4, step_size=0.01, step_decay=1 / 16, direction="raw"), 2)
    assert means == pytest.approx([-0.01, -0.005, -0.0025, -0.00125])
    _, deviations = walk(CS(steps=4, step_size=1e-9, noise=0.01, noise_decay=1 / 16, direction="raw"))
    assert deviations == pytest.approx([0.01, 0.005, 0.0025, 0.00125], rel=0.05)
    hot = CS(steps=2, step_size=1e-4, step_decay=1 / 16, noise_decay=1 / 4, temperature=0.5, direction="raw")
    _, deviations = walk(hot)  # √(2 α_k T) with α = 1e-4, 1e-4 / 4, and half of it at the second step
    assert deviations == pytest.approx([0.01, 0.0025], rel=0.05)


def test_momentum_and_adam():
    means, _ = walk(CS(steps=3, step_size=0.01, momentum=0.5, direction="raw"), 2, slope=2)
    assert means == pytest.approx([-0.02, -0.03, -0.035])
    means, _ = walk(CS(steps=3, step_size=0.01, direction="adam"), 2)
    assert means == pytest.approx([-0.01] * 3)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 9])
def test_the_compute_batch_changes_rounding_only(net, batch, batch_size):
    sampler = RCS(steps=4, step_size=0.1, noise=0.05, radius=0.5)
    draw = lambda **options: sampler(net, batch.y, batch.x, generator=torch.Generator().manual_seed(1), **options)
    torch.testing.assert_close(draw(batch=batch_size), draw(), rtol=0, atol=1e-12)


def test_gaussians_are_fitted_on_the_split_that_was_asked_for(digits):
    like, y = torch.empty(4000, 1, 8, 8), torch.full((4000,), 3)
    dark = digits._replace(test=Images(digits.test.x // 3, digits.test.y))
    for fit, split in (("train", dark.train), ("test", dark.test)):
        x = CS(fit=fit).prepare(dark)(like, y, torch.Generator().manual_seed(0))
        expected = split.float()[split.y == 3].mean(0)
        assert (x.mean(0) - expected).abs().mean() < 0.02  # the clamp lifts dark pixels a little


def test_a_buffer_or_outside_images_are_dealt_from(digits):
    other = digits._replace(name="chains")
    for start in ("buffer", "outside"):
        x = Langevin(start=start).prepare(digits, other)(torch.empty(5, 1, 8, 8), None, torch.Generator())
        assert all((x[i] * 255 == digits.test.x.float()).flatten(1).all(1).any() for i in range(5))
        with pytest.raises(UserError, match="there are none"):
            Langevin(start=start).prepare(digits)


def test_seeds_that_cannot_be_drawn_are_named(digits):
    blank = digits._replace(
        train=Images(torch.where(digits.train.y.view(-1, 1, 1, 1) == 7, 9, digits.train.x), digits.train.y)
    )
    with pytest.raises(UserError, match="images of class 7 are all the same"):
        CS().prepare(blank)
    unlabelled = digits._replace(train=Images(digits.train.x, torch.full_like(digits.train.y, -1)))
    with pytest.raises(UserError, match="digits has no labels to fit a Gaussian a class on; set start to global"):
        Langevin().prepare(unlabelled)
    assert Langevin(start="global").prepare(unlabelled)(torch.empty(2, 1, 8, 8), None, None).shape == (2, 1, 8, 8)


def test_another_method_keeps_what_means_the_same():
    cs = config.describe(CS(steps=7, step_size=0.1, start="global", noise=0.0))
    switched = lambda kind, plain=cs: config.build(config.switch(plain, "sampler", kind), "sampler")
    assert switched("rcs") == RCS(steps=7, step_size=0.1, start="global")
    assert switched("langevin") == Langevin(steps=7, step_size=0.1, start="global")  # with its own noise
    assert switched("jeat-17") == JEAT17(start="global")
    assert switched("sgld") == SGLD()
    assert switched("cs", config.describe(JEAT17(radius=2.0))) == CS(radius=2.0)
    assert switched("cs") == CS(steps=7, step_size=0.1, start="global")


CHAINS = SGLD(steps=10, step_size=3.0, noise=0.0, start="outside")
OF_CLASSES = replace(CHAINS, start="class")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("cifar10-jem-30min", {}, OF_CLASSES),
        ("cifar10-jeat-30min", {}, OF_CLASSES),  # with the white noise of training, which its CS does without
        ("cifar10-jem-30min", {"data.path": "some/where"}, OF_CLASSES),
        ("cifar10-jem-30min", {"outside": "patches"}, CHAINS),
        ("cifar10-jem-30min", {"outside": {"kind": "gaussians", "source": "cifar100"}}, CHAINS),
        ("cifar10-jem-30min", {"objective": "mle"}, CHAINS),
        ("digits-short-run-mle", {}, SGLD(steps=40, step_size=0.1, noise=0.01)),
        # whose chains go on from one training step to the next
        ("digits-jem", {"objective.negatives.steps": 7}, SGLD(step_size=0.1, noise=0.01)),
        ("digits-at", {}, SGLD()),
    ],
)
def test_sgld_draws_by_the_chains_of_training(name, changes, expected):
    recipe = resolve(recipes.find(name), changes.items())
    assert recipe.with_sampler("sgld").sampler == choose_sampler(SimpleNamespace(recipe=recipe), "sgld") == expected
    own = recipe.with_sampler("sgld", [("sampler.step_size", 7.0)])
    assert own.sampler == replace(expected, step_size=7.0)
    assert own.with_sampler("sgld").sampler == own.sampler
    assert recipe.with_sampler("cs").sampler.step_size == recipe.sampler.step_size


@pytest.mark.parametrize(
    "sampler", [TA(steps=10, step_size=0.1), CS(steps=10, step_size=0.1)], ids=lambda s: type(s).__name__
)
def test_samples_are_what_was_asked_for(net, batch, sampler):
    found = sampler(net, batch.y, batch.x)
    net.eval()
    assert (energies.joint(net(found), batch.y) < energies.joint(net(batch.x), batch.y)).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_ball_noise_and_direction_are_used(net, batch):
    base = CS(steps=5, step_size=0.5)
    free = base(net, batch.y, batch.x)
    held = CS(steps=5, step_size=0.5, radius=0.3)(net, batch.y, batch.x)
    assert (held - batch.x).flatten(1).norm(dim=1).max() <= 0.3 + 1e-9
    assert (free - batch.x).flatten(1).norm(dim=1).min() > 0.3
    noisy = CS(steps=1, step_size=1e-9, noise=0.01)(net, batch.y, batch.x, generator=torch.Generator().manual_seed(0))
    inside = (batch.x > 0.05) & (batch.x < 0.95)
    assert (noisy - batch.x)[inside].std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.allclose(CS(steps=5, direction="raw")(net, batch.y, batch.x), CS(steps=5)(net, batch.y, batch.x))


def test_sampling_leaves_no_trace(net, batch):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    CS(steps=3)(net, batch.y, batch.x)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_global_seeds_carry_no_class_and_class_seeds_do(digits):
    y = torch.arange(10).repeat_interleave(50)
    like = torch.empty(len(y), 1, 8, 8)
    means = torch.stack([digits.train.float()[digits.train.y == k].mean(0) for k in range(10)])

    def nearest(start):
        x = CS(start=start).prepare(digits)(like, y, torch.Generator().manual_seed(0))
        return (torch.cdist(x.flatten(1), means.flatten(1)).argmin(1) == y).float().mean().item()

    assert nearest("class") > 0.9
    assert nearest("global") < 0.2
    assert nearest("noise") < 0.2


def test_the_same_seed_gives_the_same_images_whatever_comes_after(net, digits):
    model = advebm.load_recipe("digits-at").backbone.build(1, 8)
    network = torch.nn.Sequential(model[0], torch.nn.Linear(model[1], 10))
    y = torch.arange(10).repeat(60)
    sampler = CS(steps=2, noise=0.01)
    all_of_them = generate.generate(network, sampler, digits, y, seed=3).x
    first_chunk = generate.generate(network, sampler, digits, y[: generate.CHUNK], seed=3).x
    assert torch.equal(all_of_them[: generate.CHUNK], first_chunk)
    assert not torch.equal(generate.generate(network, sampler, digits, y[:10], seed=4).x, all_of_them[:10])
    last = all_of_them[generate.CHUNK :]
    assert not torch.equal(generate.generate(network, sampler, digits, y[generate.CHUNK :], seed=3).x, last)


def test_a_film_begins_at_the_seed_and_ends_at_the_sample(digits):
    model = advebm.load_recipe("digits-at").backbone.build(1, 8)
    network = torch.nn.Sequential(model[0], torch.nn.Linear(model[1], 10))
    frames, steps = generate.draw_trajectory(network, CS(steps=6), digits, frames=4)
    assert steps == [0, 2, 4, 6]
    assert frames.shape == (10, 4, 1, 8, 8)
    still, _ = generate.draw_trajectory(network, CS(steps=0), digits)
    assert torch.equal(frames[:, 0], still[:, 0])
    for steps, frame in ((2, 1), (6, 3)):
        again = CS(steps=steps)(network, torch.arange(10), frames[:, 0])
        torch.testing.assert_close(again, frames[:, frame])


MISTAKES = [
    {"steps": -1},
    {"step_size": 0},
    {"noise": -1},
    {"radius": 0},
    {"momentum": 1},
    {"step_decay": 0},
    {"noise_decay": 1.5},
    {"fit": "val"},
    {"temperature": -1, "direction": "raw"},
    {"temperature": 1},
    {"temperature": 1, "direction": "raw", "noise": 0.1},
    {"temperature": 1, "direction": "raw", "momentum": 0.1},
]


@pytest.mark.parametrize("options", MISTAKES, ids=str)
def test_bad_samplers_are_refused(options):
    with pytest.raises(UserError):
        CS(**options)


def test_the_base_class_has_no_energy(net, batch):
    with pytest.raises(NotImplementedError):
        Sampler()(net, batch.y, batch.x)
