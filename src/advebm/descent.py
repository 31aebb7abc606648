"""The inner loop of attacks and samplers: lower an input's energy within a constraint set, with optional noise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
Differentiate = Callable[[Energy, Tensor], tuple[Tensor, Tensor]]  # E, x (B, ...) -> E(x) (B,), gradient like x

_faster: ContextVar[tuple[torch.Size, Differentiate] | None] = ContextVar("_faster", default=None)


@dataclass(frozen=True)
class Descent:
    """``x ← constraint(x - size · direction(∇E(x)) + noise · ε, origin)``, ``steps`` times.

    CEM's sampling protocol (Wang et al., 2021, appendix B) and the projected gradient descent of Madry et al. (2018)
    are both of this form, with different energies, starts, directions and constraints.

    Attributes:
        steps: number of gradient evaluations; 0 returns the start.
        size: step length for pixels in [0, 1] (with ``raw`` a factor on the gradient); a number, or a function of the
            share of steps done.
        direction: :func:`sign`, :func:`unit`, :func:`raw`, :func:`capped`, :func:`adam` or :func:`heavy_ball`.
        constraint: :func:`free`, :class:`box`, :class:`linf_ball`, :class:`l2_ball`, :class:`hold`, :class:`means`, or
            several in :class:`both`.
        noise: standard deviation of the Gaussian noise added at each step; a number or a function, as for ``size``.
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
        """Return the last iterate, detached, of the shape and type of ``start``; ``origin`` defaults to the start.

        ``observe(k, x, energy)`` is called at the ``steps`` points where a gradient is taken.  The last iterate is not
        one of them: to find the best point, evaluate that one as well.
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
    """Return ``E(x) (B,)`` and ``∂ΣE/∂x``, of the shape of ``x``, both detached.  Never changes ``parameter.grad``."""
    shape, faster = _faster.get() or (None, differentiate)
    fits = shape is not None and x.shape[1:] == shape[1:] and len(x) % shape[0] == 0
    return faster(energy, x) if fits else differentiate(energy, x)


@contextmanager
def differentiating(faster: tuple[torch.Size, Differentiate] | None) -> Iterator[None]:
    """Let :func:`value_and_gradient` call a compiled :func:`differentiate`; None: no other than that one.

    It is called for batches of its shape, or of a multiple of its images, such as both views that ACL attacks at once.
    All others would be compiled anew, for each number of images.
    """
    token = _faster.set(faster)
    try:
        yield
    finally:
        _faster.reset(token)


def differentiate(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`value_and_gradient` does, computed by torch as it is."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = energy(x)
        if value.shape != x.shape[:1]:
            raise UserError(
                f"an energy must return one value per sample, shape {tuple(x.shape[:1])}; "
                f"got {tuple(value.shape)} (did you call .mean()?)"
            )
        return value.detach(), gradient_of(value, x)


def gradient_of(value: Tensor, x: Tensor) -> Tensor:
    """Return ``∂Σ value / ∂x``.

    Raises:
        UserError: the values do not depend on ``x`` as far as autograd knows, as under ``torch.no_grad()``.
    """
    gradient = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise UserError(
            "the model's outputs have no gradient with respect to the images: its forward runs under torch.no_grad(), "
            "detaches, is quantised, or computes outside torch; remove that"
        )
    return gradient


def in_parts(energies: Sequence[Energy], parts: Sequence[slice]) -> Energy:
    """Return a batch's energy, computed part by part from one energy per part to limit the network's memory.

    Values and first derivatives are exact; second derivatives are not supported.
    """

    def energy(x: Tensor) -> Tensor:
        value, gradient = x.new_empty(len(x)), torch.empty_like(x)
        for part_energy, part in zip(energies, parts, strict=True):
            value[part], gradient[part] = value_and_gradient(part_energy, x[part])
        return value + ((x - x.detach()) * gradient).flatten(1).sum(1)  # adds 0, whose gradient is ``gradient``

    return energy


def at(value: float | Schedule, share: float) -> float:
    return value(share) if callable(value) else value


# Directions ----------------------------------------------------------------------------------------------------------


def raw(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Return the gradient itself, as Langevin dynamics needs it."""
    return gradient


def capped(limit: float) -> Direction:
    """Return a direction: the gradient with every component cut to ``[-limit, limit]``."""
    return lambda gradient, memory: gradient.clamp(-limit, limit)


def sign(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Return the direction of steepest descent in linf."""
    return gradient.sign()


def unit(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Return each sample's gradient divided by its l2 norm: steepest descent in l2."""
    return gradient / per_sample(gradient.flatten(1).norm(dim=1), gradient).clamp_min(1e-12)


def adam(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """Return Adam's direction (Kingma and Ba, 2015) with its usual constants 0.9, 0.999 and 1e-8."""
    zero = torch.zeros(())
    first = 0.1 * gradient + 0.9 * memory.get("first", zero)
    second = 0.001 * gradient.square() + 0.999 * memory.get("second", zero)
    count = memory.get("count", zero) + 1
    memory |= {"first": first, "second": second, "count": count}
    k = count.item()
    return first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)


def heavy_ball(decay: float, of: Direction = unit) -> Direction:
    """Return a direction with momentum, ``v ← decay · v + of(gradient)``; default: of unit gradients."""

    def direction(gradient: Tensor, memory: dict[str, Tensor]) -> Tensor:
        step = of(gradient, memory)
        memory["velocity"] = decay * memory["velocity"] + step if "velocity" in memory else step
        return memory["velocity"]

    return direction


# Constraints ---------------------------------------------------------------------------------------------------------


def free(x: Tensor, origin: Tensor) -> Tensor:
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
    """Nearest point within Euclidean distance ``radius`` of the origin; one radius, or (B,), one per sample."""

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
    """Nearest image in [0, 1] whose means over blocks of ``factor`` x ``factor`` pixels equal those of the origin.

    It is ``clamp(x + t)`` with one offset t per block and channel, the Lagrange multiplier of its mean, found by
    bisection: the means agree within 1e-6 in float32.  The origin must lie in [0, 1].
    """

    factor: int

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        target_means = avg_pool2d(origin, self.factor)
        low, high = -max_pool2d(x, self.factor), 1 + max_pool2d(-x, self.factor)  # all pixels 0, all pixels 1
        for _ in range(40):
            middle = (low + high) / 2
            dark = avg_pool2d((x + repeat_pixels(middle, self.factor)).clamp(0, 1), self.factor) < target_means
            low, high = torch.where(dark, middle, low), torch.where(dark, high, middle)
        return (x + repeat_pixels((low + high) / 2, self.factor)).clamp(0, 1)


def repeat_pixels(x: Tensor, factor: int) -> Tensor:
    """Repeat every pixel as a block: (B, C, h, w) -> (B, C, factor h, factor w)."""
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


@dataclass(frozen=True, init=False)
class both:
    """Several constraints, left to right.  A ball followed by a box satisfies both, as the origin lies in the box."""

    parts: tuple[Constraint, ...]

    def __init__(self, *parts: Constraint) -> None:
        object.__setattr__(self, "parts", parts)

    def __call__(self, x: Tensor, origin: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x, origin)
        return x


def lengths(x: Tensor, norm: str) -> Tensor:
    """Return each sample's linf or l2 norm, (B,)."""
    return x.flatten(1).abs().amax(1) if norm == "linf" else x.flatten(1).norm(dim=1)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` to ``(B, 1, ..., 1)``, to broadcast over ``like``."""
    return value.reshape(-1, *[1] * (like.ndim - 1))
