"""The one inner loop: move an input downhill, inside a set, with optional noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from advebm.core.errors import UserError
from advebm.core.rng import randn

Energy = Callable[[Tensor], Tensor]  # x (B, ...) -> (B,), to be lowered
Direction = Callable[[Tensor, dict[str, Tensor]], Tensor]  # gradient, per-call memory -> direction
Constraint = Callable[[Tensor, Tensor], Tensor]  # x, origin -> nearest allowed x
Observer = Callable[[int, Tensor, Tensor], None]  # step, x (B, ...), energy (B,)
Schedule = Callable[[float], float]  # share of the steps done, in [0, 1) -> value


@dataclass(frozen=True)
class Descent:
    """``x ← constraint(x - size · direction(∇E(x)) + noise · ε, origin)``, ``steps`` times.

    CEM's sampling protocol (Wang et al., 2021, appendix B) and the projected gradient descent of Madry et al. (2018)
    are both this, with other energies, starts, directions and constraints.

    Attributes:
        steps: number of gradient evaluations; 0 returns the start.
        size: step length in pixels of [0, 1] (with ``raw``: a factor on the gradient); a number or a function of the
            share of steps done.
        direction: :func:`sign`, :func:`unit`, :func:`raw`, :func:`adam` or :func:`heavy_ball`.
        constraint: :func:`free`, :class:`box`, :class:`linf_ball`, :class:`l2_ball`, :class:`hold`, :class:`means`, or
            several in :class:`both`.
        noise: standard deviation of the Gaussian added at each step; a number or a function as for ``size``.
    """

    steps: int
    size: float | Schedule
    direction: Direction
    constraint: Constraint
    noise: float | Schedule = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"steps must be >= 0, got {self.steps}")

    def __call__(
        self,
        energy: Energy,
        start: Tensor,
        *,
        origin: Tensor | None = None,
        generator: torch.Generator | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """The last iterate, detached, of the shape and type of ``start``; ``origin`` defaults to the start.

        ``observe(k, x, energy)`` sees the ``steps`` points at which a gradient was taken, so not the last iterate:
        whoever wants the best of all evaluates that one once more.
        """
        origin = start.detach() if origin is None else origin.detach()
        x, memory = start.detach(), dict[str, Tensor]()
        for k in range(self.steps):
            value, gradient = value_and_gradient(energy, x)
            if observe is not None:
                observe(k, x, value)
            x = x - at(self.size, k / self.steps) * self.direction(gradient, memory)
            if noise := at(self.noise, k / self.steps):
                x = x + noise * randn(x, generator)
            x = self.constraint(x, origin)
        return x


def value_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """``E(x) (B,)`` and ``∂ΣE/∂x`` of the shape of ``x``, both detached.  Never touches ``parameter.grad``."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = energy(x)
        if value.shape != x.shape[:1]:
            raise UserError(
                f"an energy must return one value per sample, shape {tuple(x.shape[:1])}; "
                f"got {tuple(value.shape)} (did you call .mean()?)"
            )
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def in_parts(energies: Sequence[Energy], parts: Sequence[slice]) -> Energy:
    """An energy of a batch from one for each part of its images: the network holds one part at a time.

    Values and gradients are those of the parts; no second derivative passes.
    """

    def energy(x: Tensor) -> Tensor:
        value, gradient = x.new_empty(len(x)), torch.empty_like(x)
        for own, part in zip(energies, parts, strict=True):
            value[part], gradient[part] = value_and_gradient(own, x[part])
        return value + ((x - x.detach()) * gradient).flatten(1).sum(1)  # adds 0, with that gradient

    return energy


def at(value: float | Schedule, share: float) -> float:
    """A number as it is, a schedule at ``share`` of its way."""
    return value(share) if callable(value) else value


# Directions ----------------------------------------------------------------------------------------------------------


def raw(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """The gradient itself, as Langevin dynamics wants it."""
    return gradient


def sign(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Steepest descent in linf."""
    return gradient.sign()


def unit(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Steepest descent in l2: the gradient of each sample, divided by its length."""
    return gradient / per_sample(gradient.flatten(1).norm(dim=1), gradient).clamp_min(1e-12)


def adam(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Adam's direction (Kingma and Ba, 2015) with its usual constants 0.9, 0.999 and 1e-8."""
    first, second = 0.1 * gradient, 0.001 * gradient.square()
    count = memory["count"] + 1 if memory else torch.ones(())
    if memory:
        first, second = first + 0.9 * memory["first"], second + 0.999 * memory["second"]
    memory |= {"first": first, "second": second, "count": count}
    k = count.item()
    return first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)


def heavy_ball(decay: float, of: Direction = unit) -> Direction:
    """Momentum on another direction: ``v ← decay · v + d``; by default on unit gradients."""

    def direction(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
        step = of(gradient, memory)
        memory["velocity"] = decay * memory["velocity"] + step if "velocity" in memory else step
        return memory["velocity"]

    return direction


# Constraints ---------------------------------------------------------------------------------------------------------


def free(x: Tensor, origin: Tensor) -> Tensor:
    """Everywhere."""
    return x


@dataclass(frozen=True)
class box:
    """Nearest point with every pixel in ``[low, high]``."""

    low: float = 0.0
    high: float = 1.0

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)


@dataclass(frozen=True)
class linf_ball:
    """Nearest point within ``radius`` of the origin in every pixel."""

    radius: float

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        return origin + (x - origin).clamp(-self.radius, self.radius)


@dataclass(frozen=True)
class l2_ball:
    """Nearest point within Euclidean distance ``radius`` of the origin; one for all, or (B,), one for each."""

    radius: float | Tensor

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        offset = x - origin
        length = offset.flatten(1).norm(dim=1).clamp_min(1e-12)
        return origin + offset * per_sample((self.radius / length).clamp(max=1.0), x)


@dataclass(frozen=True)
class hold:
    """The origin where ``mask`` is true (the known pixels of inpainting), ``x`` elsewhere."""

    mask: Tensor

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        return torch.where(self.mask, origin, x)


@dataclass(frozen=True)
class means:
    """Nearest image in [0, 1] whose means over blocks of ``factor`` x ``factor`` pixels are those of the origin.

    That is ``clamp(x + t)`` with one t a block and channel, the multiplier of its mean, found by halving an interval:
    means hold within 1e-6 in float32.  The origin lies in [0, 1].
    """

    factor: int

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        wanted = avg_pool2d(origin, self.factor)
        low, high = -max_pool2d(x, self.factor), 1 + max_pool2d(-x, self.factor)  # all black, all white
        for _ in range(40):
            middle = (low + high) / 2
            dark = avg_pool2d((x + repeat_pixels(middle, self.factor)).clamp(0, 1), self.factor) < wanted
            low, high = torch.where(dark, middle, low), torch.where(dark, high, middle)
        return (x + repeat_pixels((low + high) / 2, self.factor)).clamp(0, 1)


def repeat_pixels(x: Tensor, factor: int) -> Tensor:
    """Every pixel as a block: (B, C, h, w) -> (B, C, factor h, factor w)."""
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


@dataclass(frozen=True, init=False)
class both:
    """Several constraints, left to right.  Ball then box stays in both, as the origin lies in the box."""

    parts: tuple[Constraint, ...]

    def __init__(self, *parts: Constraint) -> None:
        object.__setattr__(self, "parts", parts)

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x, origin)
        return x


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` -> ``(B, 1, ..., 1)``, to broadcast over ``like``."""
    return value.reshape(-1, *[1] * (like.ndim - 1))
