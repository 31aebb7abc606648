"""Edits that change an image: translate, paint, compose, interpolate, counterfactual."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.descent import Constraint, Descent, Direction, both, box, hold, l2_ball, per_sample
from advebm.edits.base import Edit, Edited, Problem, confidence, hold_outside, l2_norm, outputs, prepare_images, to_cpu
from advebm.models.modes import searching


@dataclass(frozen=True)
class Translate(Edit):
    """An image of one kind made into one of another, Yin et al. (2022), figure 7: descent on the other's energy.

    The other kind is a class of a classifier, or the data that a critic was trained on; the network need not know the
    image's own kind.  The number of steps sets how far the image moves.

    Attributes:
        amount: factor on ``steps``: 0 leaves the image as it is, 1 takes all steps, 2 twice as many.
    """

    amount: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("binary-at", "santurkar2019")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.amount >= 0:
            raise UserError(f"amount must be >= 0, got {self.amount}")

    def make_problem(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        return Problem(x, self.within(), x)

    def descent(self, constraint: Constraint, values: Tensor) -> Descent:
        return replace(super().descent(constraint, values), steps=round(self.amount * self.steps))


@dataclass(frozen=True)
class Paint(Edit):
    """A sketch, or an image with strokes painted over, made real: descent from it, near it, by the class it shall be.

    With a hole, the mask of painted pixels, only these change; the others stay exactly as they are.
    """

    energy: Literal["joint", "conditional"] = "conditional"

    def make_problem(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        if hole is None:
            return Problem(x, self.within(), x)
        return hold_outside(x, hole, self.within(hold(~hole)))


@dataclass(frozen=True)
class Compose(Edit):
    """Images of low ``Σ w_i E_i``, of several networks or classes, Du et al. (2020): w > 0 asks for, w < 0 refuses.

    Energies of different networks have different scales, which the weights have to compensate.  Use the conditional
    energy for a class with negative weight: E(x, y) has no upper bound.

    Attributes:
        weights: w_i; None: 1 each.
    """

    weights: tuple[float, ...] | None = None
    energy: Literal["joint", "conditional"] = "conditional"

    cites: ClassVar[tuple[str, ...]] = ("binary-at", "du2020")

    def make_problem(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        return Problem(x, self.within(), x)

    def __call__(  # type: ignore[override]
        self, models: Sequence[nn.Module], x: Tensor, classes: Sequence[int | None], **options: Any
    ) -> Edited:
        """Edit seeds ``x (B, C, H, W)``; each network has a class, or None for its E(x).

        ``options`` are ``observe`` and ``frames``, see :class:`Edit`.
        """
        weights = (1.0,) * len(models) if self.weights is None else self.weights
        if not models or not len(models) == len(classes) == len(weights):
            got = f"{len(models)}, {len(classes)} and {len(weights)}"
            raise UserError(f"a composition takes as many models as classes and weights, got {got}")
        x = prepare_images(x, *models)
        problem, observe, frames = self.make_problem(x, None, None), options.get("observe"), options.get("frames", 7)
        with ExitStack() as stack:
            parts = []
            for model, k in zip(models, classes, strict=True):
                y = None if k is None else torch.full((len(x),), k, device=x.device)
                parts.append(self.target_energy(stack.enter_context(searching(model)), x, y))
            energy = lambda z: torch.stack([w * part(z) for w, part in zip(weights, parts, strict=True)]).sum(0)
            return self.run_descent(problem, energy, None, None, observe, frames)


@dataclass(frozen=True)
class Interpolate(Edit):
    """Images on the way from each image to the next, moved to low energy; the given ones stay as they are.

    With held ends, the step at position t in [0, 1] of the way has a factor sin(πt), so that images near the ends do
    not jump.

    Attributes:
        count: number of images from one image to the next, both included.
        way: ``spherical`` around mid grey, which keeps the contrast, or ``linear``.
        ends: ``held`` fixed, or ``moved`` like the other images.
    """

    count: int = 9
    way: Literal["spherical", "linear"] = "spherical"
    ends: Literal["held", "moved"] = "held"

    stride: ClassVar[float] = 0.002
    cites: ClassVar[tuple[str, ...]] = ("binary-at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 2:
            raise UserError(f"an interpolation has at least its 2 ends, got count {self.count}")

    def descent(self, constraint: Constraint, values: Tensor) -> Descent:
        search = super().descent(constraint, values)
        if self.ends == "moved":
            return search
        share = (math.pi * torch.linspace(0, 1, self.count)).sin().repeat(len(values) // self.count).to(values)
        direction: Direction = lambda gradient, memory: per_sample(share, gradient) * search.direction(gradient, memory)
        return replace(search, direction=direction)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None = None, **options: Any) -> Edited:
        """Interpolate images (B, C, H, W); results are ((B - 1) · count, C, H, W), one way after another.

        With classes ``y (B,)`` the energy is ``(1 - t) E_a + t E_b``, from the class of one image to that of the next.
        ``options`` are ``observe`` and ``frames``, see :class:`Edit`.
        """
        if len(x) < 2:
            raise UserError(f"an interpolation takes at least 2 images, got {len(x)}")
        x = prepare_images(x, model)
        t = torch.linspace(0, 1, self.count, dtype=x.dtype, device=x.device).repeat(len(x) - 1)
        first, second = x[:-1].repeat_interleave(self.count, 0), x[1:].repeat_interleave(self.count, 0)
        path = spherical(first, second, t) if self.way == "spherical" else torch.lerp(first, second, per_sample(t, x))
        path = torch.where(per_sample(t == 0, x), first, torch.where(per_sample(t == 1, x), second, path.clamp(0, 1)))
        end = per_sample((t == 0) | (t == 1), x) & (self.ends == "held")
        problem = Problem(path, self.within(hold(end)), path)
        with searching(model) as f:
            energy = self.target_energy(f, path, None)
            if y is not None:
                y = y.to(x.device)
                a, b = (self.target_energy(f, path, ends.repeat_interleave(self.count)) for ends in (y[:-1], y[1:]))
                energy = lambda z: (1 - t) * a(z) + t * b(z)
            return self.run_descent(problem, energy, f, None, options.get("observe"), options.get("frames", 7))


def spherical(a: Tensor, b: Tensor, t: Tensor, centre: float = 0.5) -> Tensor:
    """Interpolate spherically from ``a`` (t = 0) to ``b`` (t = 1), both (B, C, H, W), t (B,): Shoemake (1985).

    The direction from ``centre`` turns at constant speed, and the distance from it is linear in t.  Ends in the same or
    opposite directions are interpolated linearly.
    """
    u, v, share = (a - centre).flatten(1), (b - centre).flatten(1), t[:, None]
    first, second = (z.norm(dim=1, keepdim=True) for z in (u, v))
    angle = ((u * v).sum(1, keepdim=True) / (first * second).clamp_min(1e-12)).clamp(-1, 1).arccos()
    sine = angle.sin().clamp_min(1e-12)
    direction = ((1 - share) * angle).sin() / sine * u / first.clamp_min(1e-12)
    direction = direction + (share * angle).sin() / sine * v / second.clamp_min(1e-12)
    turns = (angle.sin() > 1e-4) & (first > 0) & (second > 0)
    offset = torch.where(turns, torch.lerp(first, second, share) * direction, torch.lerp(u, v, share))
    return centre + offset.view_as(a)


@dataclass(frozen=True)
class Counterfactual(Edit):
    """The nearest image that is taken for another class, with ``p(y|x)`` of at least ``level``, within a ball.

    As in RATIO (Augustin et al., 2020), it descends the cross-entropy of the class in l2 balls; here the radius is
    found by bisection for each image, between the largest that failed and the smallest distance that succeeded.
    Distances are upper bounds, as another search might find a nearer image.

    Attributes:
        steps: number of steps of each search, of length ``2.5 r / steps`` in a ball of radius r unless ``step_size`` is
            set.
        radius: radius of the largest ball, which comes first; None: 0.25 √D, a root mean square of 0.25.
        level: ``p(y|x)`` that counts as reached.
        searches: number of balls, the largest included.
    """

    energy: Literal["joint", "conditional"] = "conditional"
    level: float = 0.8
    searches: int = 8

    cites: ClassVar[tuple[str, ...]] = ("augustin2020",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.level < 1 or self.searches < 1:
            got = f"{self.level} and {self.searches}"
            raise UserError(f"level must lie in (0, 1) and searches must be at least 1, got {got}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None = None, **options: Any) -> Edited:
        """Find counterfactuals for classes ``y (B,)``; None: the second most likely class of each image.

        An image with ``p(y|x)`` of at least ``level`` stays as it is.  ``numbers`` also hold ``reached``, 1 or 0, and
        ``from`` and ``to``, the classes.  The film is a straight line from the image to the result, ``frame_steps`` are
        hundredths of the way, and ``series`` hold ``confidence`` in the new class, ``confidence in the old class`` and
        ``distance``.

        Raises:
            UserError: the network is a critic.
        """
        x, frames = prepare_images(x, model), max(options.get("frames", 7), 2)
        with searching(model) as f, torch.no_grad():
            if outputs(f, x).shape[1] < 2:
                raise UserError("a counterfactual takes a classifier; a critic has no classes")
            top = f(x).topk(2, 1).indices
            y = top[:, 1] if y is None else y.to(x.device)
            energy = self.target_energy(f, x, y)

            def search(radius: Tensor) -> Tensor:
                descent = self._unit_descent(2.5 * radius / max(self.steps, 1), both(l2_ball(radius), box()))
                return descent(energy, x, observe=options.get("observe"))

            high = x.new_full((len(x),), 0.25 * x[0].numel() ** 0.5 if self.radius is None else self.radius)
            there = confidence(f, x, y) >= self.level
            best = torch.where(per_sample(there, x), x, search(high))
            reached = confidence(f, best, y) >= self.level
            low, high = torch.zeros_like(high), l2_norm(best - x)
            for _ in range(self.searches - 1):
                radius = (low + high) / 2
                candidate = search(radius)
                hit = reached & ~there & (confidence(f, candidate, y) >= self.level)
                best = torch.where(per_sample(hit, x), candidate, best)
                low, high = torch.where(hit, low, radius), torch.where(hit, l2_norm(candidate - x), high)
            shares = torch.linspace(0, 1, frames, dtype=x.dtype, device=x.device).tolist()
            film = torch.stack([torch.lerp(x, best, share) for share in shares], 1)
            film_confidence = lambda label: torch.stack([confidence(f, z, label) for z in film.unbind(1)], 1)
            target, distance = film_confidence(y), (film - x[:, None]).flatten(2).norm(dim=2)
            series = {"confidence": target, "confidence in the old class": film_confidence(top[:, 0])}
            series["distance"] = distance
            numbers = {"energy before": energy(x), "energy after": energy(best), "distance": distance[:, -1]}
            numbers |= {"confidence before": target[:, 0], "confidence after": target[:, -1]}
            numbers |= {"reached": reached, "from": top[:, 0], "to": y}
        frame_steps = [round(100 * share) for share in shares]
        return Edited(best.cpu(), x.cpu(), film.cpu(), frame_steps, to_cpu(numbers), to_cpu(series))
