"""Two-dimensional densities with exact sampling and closed forms, to compare learnt energies with."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from advebm.core.errors import unknown_name


class Density(Protocol):
    """A distribution of points (N, 2)."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` points, (count, 2) float32."""

    def log_density(self, x: Tensor) -> Tensor:
        """Return the normalised ``log p(x)`` in nats.  (N, 2) -> (N,)."""


@dataclass(frozen=True)
class Mixture:
    """Mixture of isotropic Gaussians with equal weights; with many means on a curve, a blurred curve.

    Attributes:
        means: K points.
        spread: standard deviation of each Gaussian.
    """

    means: tuple[tuple[float, float], ...]
    spread: float

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        component = torch.randint(len(self.means), (count,), generator=generator)
        return torch.tensor(self.means)[component] + self.spread * torch.randn(count, 2, generator=generator)

    def log_density(self, x: Tensor) -> Tensor:
        offset = (x[:, None] - x.new_tensor(self.means)) / self.spread
        return (_log_normal(offset).sum(2) - 2 * math.log(self.spread)).logsumexp(1) - math.log(len(self.means))


@dataclass(frozen=True)
class Pinwheel:
    """Arms of equal weight: Gaussians, rotated about the origin by an angle that grows with the radius.

    A rotation by an angle that depends only on the radius preserves area, so the density at a point is that of the
    straight arms at the point rotated back.

    Attributes:
        arms: number of arms.
        reach: mean distance from the origin along an arm.
        along, across: standard deviations along and across an arm.
        twist: rotation in radians per unit of radius.
    """

    arms: int = 4
    reach: float = 2.2
    along: float = 0.5
    across: float = 0.25
    twist: float = 0.6

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        arm = torch.randint(self.arms, (count,), generator=generator)
        along, across = torch.randn(2, count, generator=generator)
        straight = torch.stack([self.reach + self.along * along, self.across * across], 1)
        return _rotate(straight, 2 * math.pi * arm / self.arms + self.twist * straight.norm(dim=1))

    def log_density(self, x: Tensor) -> Tensor:
        parts = []
        for arm in range(self.arms):
            along, across = _rotate(x, -2 * math.pi * arm / self.arms - self.twist * x.norm(dim=1)).unbind(1)
            parts.append(_log_normal((along - self.reach) / self.along) + _log_normal(across / self.across))
        return torch.stack(parts).logsumexp(0) - math.log(self.arms * self.along * self.across)


def _log_normal(z: Tensor) -> Tensor:
    """Return the log-density of the standard normal distribution, elementwise."""
    return -0.5 * (z.square() + math.log(2 * math.pi))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate points (N, 2) about the origin, each by its angle (N,) in radians."""
    (x1, x2), cos, sin = x.unbind(1), angle.cos(), angle.sin()
    return torch.stack([cos * x1 - sin * x2, sin * x1 + cos * x2], 1)


def _circle(count: int, radius: float) -> tuple[tuple[float, float], ...]:
    angles = [2 * math.pi * k / count for k in range(count)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


def _moons() -> tuple[tuple[float, float], ...]:
    from sklearn.datasets import make_moons

    return tuple((1.7 * (x - 0.5), 1.7 * (y - 0.25)) for x, y in make_moons(200, shuffle=False)[0].tolist())


DENSITIES: dict[str, Callable[[], Density]] = {
    "gaussian": lambda: Mixture(((0.0, 0.0),), 0.6),
    "eight-gaussians": lambda: Mixture(_circle(8, 2.2), 0.25),
    "rings": lambda: Mixture(_circle(100, 1.0) + _circle(100, 2.6), 0.25),
    "moons": lambda: Mixture(_moons(), 0.25),
    "pinwheel": Pinwheel,
}


def find_density(name: str) -> Density:
    if name not in DENSITIES:
        raise unknown_name("density", name, DENSITIES)
    return DENSITIES[name]()
