"""The doctor finds each planted fault, by its name and nothing else, and is silent on healthy models."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import advebm
from advebm.attacks.projected import Attack
from advebm.doctor import CHECKS, examine, exceeds, title
from advebm.errors import UserError
from advebm.models.network import Normalize
from advebm.modes import searching

DATA = advebm.load_data("digits")
MEAN, STD = DATA.statistics()
X, Y = DATA.test.float()[:300], DATA.test.y[:300]
FAINT = 0.35 + 0.3 * X
THREAT = Attack(eps=0.9, norm="l2", steps=20)


def fit(model, *, eps=0.0, epochs=12):
    """Adam on the cross-entropy of digits, on images moved by an attack of three steps if ``eps`` is positive."""
    x, y = DATA.train.float(), DATA.train.y
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            moved = x[rows]
            if eps:
                with searching(model) as f:
                    attack = Attack(eps=eps * min(1, epoch / 5), norm="l2", steps=3)
                    moved = attack(attack.harm(f, y[rows]), moved, generator) if epoch else moved
            loss = nn.functional.cross_entropy(model.train()(moved), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def network():
    """Convolutions with batch norm on normalised images."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(Normalize(MEAN, STD), *layers, nn.Linear(512, 10))


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


@pytest.fixture(scope="session")
def standard():
    return seeded(lambda: fit(network()))


@pytest.fixture(scope="session")
def adversarial():
    return seeded(lambda: fit(network(), eps=0.9))


@pytest.fixture(scope="session")
def linear():
    return seeded(lambda: fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))))


def look(model, x=X, y=Y, threat=THREAT, seed=0):
    return examine(model, x, y, threat=threat, generator=torch.Generator().manual_seed(seed))


class Around(nn.Module):
    """A network with something before and after it."""

    def __init__(self, net, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Backward(torch.autograd.Function):
    """The identity, whose gradient is another: ``of(gradient, x)``."""

    @staticmethod
    def forward(ctx, x, of):
        ctx.save_for_backward(x)
        ctx.of = of
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.of(gradient, *ctx.saved_tensors), None


def backward(net, of):
    return Around(net, before=lambda x: Backward.apply(x, of))


def untracked(net):
    """Batch norm whose running statistics were never updated, though the weights were trained."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return net


class Counting(Around):
    """Moves a buffer of its own whenever it is asked."""

    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, x):
        self.asked += len(x)
        return self.net(x)


class Adapting(Around):
    """Takes its batch norm's statistics from the batch, in whatever mode."""

    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
        return self.net(x)


@torch.no_grad()
def without_gradient(out):
    return out.clone()


def on_the_grid(gradient, x):
    """The gradient at images of whole bytes, its opposite at all others."""
    whole = ((255 * x).round() / 255 - x).abs().flatten(1).amax(1) < 1e-6
    return torch.where(whole[:, None, None, None], gradient, -gradient)


class Planted(NamedTuple):
    plant: Callable[[nn.Sequential], nn.Module]
    threat: Attack = THREAT
    x: torch.Tensor = X


def faint(net):
    """The network for images of which black and white are 0.35 and 0.65, normalised once, and then once again."""
    x = FAINT
    return Around(net, before=lambda v: ((v - x.mean()) / x.std() - 0.35) / 0.3)


LARGE, SMALL = Attack(eps=0.35), Attack(eps=1 / 255)
PLANTED = {
    "forward": Planted(lambda net: Around(net, before=lambda x: x[:, :, :4])),
    "shape": Planted(lambda net: Around(net, after=lambda out: (out, None))),
    "not-finite": Planted(lambda net: Around(net, after=lambda out: torch.where(out > 12, torch.nan, out))),
    "classes": Planted(lambda net: Around(net, after=lambda out: out[:, :7])),
    "state": Planted(Counting),
    "randomness": Planted(lambda net: Around(net, after=lambda out: out + 0.1 * torch.randn_like(out))),
    "batch": Planted(lambda net: Adapting(copy.deepcopy(net))),
    "modes": Planted(untracked),
    "probabilities": Planted(lambda net: Around(net, after=lambda out: out.softmax(1))),
    "log-probabilities": Planted(lambda net: Around(net, after=lambda out: out.log_softmax(1))),
    "precision": Planted(lambda net: Around(net, after=lambda out: out.half())),
    "normalisation-missing": Planted(lambda net: net[1:]),
    "normalisation-twice": Planted(faint, x=FAINT),
    "range-255": Planted(lambda net: Around(net, before=lambda x: x / 255)),
    "range-symmetric": Planted(lambda net: Around(net, before=lambda x: (x + 1) / 2)),
    "labels-permuted": Planted(lambda net: Around(net, after=lambda out: out[:, [1, 0, *range(2, 10)]])),
    "chance": Planted(lambda net: nn.Sequential(*net[:-1], seeded(lambda: nn.Linear(512, 10)))),
    "no-gradient": Planted(lambda net: Around(net, after=without_gradient)),
    "zero-gradient": Planted(lambda net: Around(net, before=lambda x: (8 * x).round() / 8)),
    "flat-loss": Planted(lambda net: Around(net, after=lambda out: 1e4 * out)),
    "one-step": Planted(lambda net: backward(net, on_the_grid)),
    "weaker-than-noise": Planted(lambda net: backward(net, lambda g, x: -g), LARGE),
    "weaker-than-square": Planted(lambda net: backward(net, lambda g, x: -g)),
    "large-radius": Planted(lambda net: backward(net, lambda g, x: -g), SMALL),
}


def faults(findings):
    return [f.name for f in findings if f.severity == "fault"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(standard, name):
    plant, threat, x = PLANTED[name]
    findings = look(plant(standard).eval(), x, threat=threat)
    assert faults(findings) == [name], findings
