"""The base class of all edits, the problem that an edit poses, and its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core import checks, notebook
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.data import pictures
from advebm.descent import Constraint, Descent, Direction, Energy, Observer, both, box, l2_ball, per_sample, unit
from advebm.energies import Logits
from advebm.models.batching import as_images, device_of
from advebm.models.modes import searching
from advebm.samplers.base import geometric, marginal


class Edited(NamedTuple):
    """The results of an edit of N images, all on the CPU.

    Attributes:
        x: the edited images (N, C, H, W) in [0, 1].
        begin: the start of the search (N, C, H, W): the image itself, or with its hole filled, or enlarged.
        film: F images from ``begin`` to the result (N, F, C, H, W).
        frame_steps: the F step numbers that the film shows.
        numbers: (N,) each, float64: ``energy before`` and ``energy after``, the minimised energy (nats); ``distance``
            (l2, pixels of [0, 1]) from ``begin``; given a class, ``confidence before`` and ``confidence after``.
        series: (N, F) each, float64: values along the film, if the edit has any.
    """

    x: Tensor
    begin: Tensor
    film: Tensor
    frame_steps: list[int]
    numbers: dict[str, Tensor]
    series: dict[str, Tensor]

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {value.mean():.3g}" for name, value in self.numbers.items() if len(value))
        return f"Edited: {len(self.x):,} images of {pictures.size_text(self.x.shape[1:])}; means: {means}"

    def _repr_html_(self) -> str:
        """Return the first ten images as they were at the start of the search, and below them as they became."""
        pairs = torch.stack([self.begin[:10], self.x[:10]]) if self.begin.shape == self.x.shape else self.x[None, :10]
        shown = pictures.encode_png(pictures.grid(pairs)) if len(self.x) else b""
        return notebook.line(self) + (notebook.picture(shown, "start of the search, and result") if shown else "")


def join_parts(parts: Sequence[Edited]) -> Edited:
    """Concatenate results of the same edit; ``frame_steps`` are those of the first."""
    first = parts[0]
    numbers = {name: torch.cat([part.numbers[name] for part in parts]) for name in first.numbers}
    series = {name: torch.cat([part.series[name] for part in parts]) for name in first.series}
    x, begin, film = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "begin", "film"))
    return Edited(x, begin, film, first.frame_steps, numbers, series)


class Problem(NamedTuple):
    """What an edit passes to the descent, besides the network's energy.

    Attributes:
        start: first iterate (B, C, H, W) in [0, 1].
        constraint: projection after each step.
        origin: reference image of the constraint: its ball's centre, its known pixels, or the image whose block means
            it keeps.
        fixed: differentiable map applied before the network's energy, the identity on images that satisfy the
            constraint; it removes the part of the gradient that the constraint would cancel.
        fidelity: term added to the energy; None: no term.
        share: share of an image's values that may change, (B,) or one number for all images.
    """

    start: Tensor
    constraint: Constraint
    origin: Tensor
    fixed: Callable[[Tensor], Tensor] = lambda x: x
    fidelity: Energy | None = None
    share: Tensor | float = 1.0


@dataclass(frozen=True)
class Edit:
    """Base class of edits: steps ``x ← Π[x - α ∇E / ‖∇E‖]`` from an image; abstract.

    Attributes:
        steps: number of steps.
        step_size: α, l2 length of a step in pixels of [0, 1]; None: ``stride`` times √D for the D values of an image
            that may change, so that ``stride`` is the root mean square of their changes.
        step_decay: factor by which α has decayed, geometrically, at the end.
        radius: radius of an l2 ball around the image, pixels of [0, 1]; None: no ball.
        energy: the energy to lower if a class is given: ``joint`` E(x, y) = -f_y or ``conditional`` E(x, y) - E(x), the
            cross-entropy.  Without a class it is E(x).
    """

    steps: int = 40
    step_size: float | None = None
    step_decay: float = 1.0
    radius: float | None = None
    energy: Literal["joint", "conditional"] = "joint"

    stride: ClassVar[float] = 0.005
    cites: ClassVar[tuple[str, ...]] = ("santurkar2019",)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 0 or not 0 < self.step_decay <= 1:
            got = f"{self.steps} and {self.step_decay}"
            raise UserError(f"steps must be >= 0 and step_decay must lie in (0, 1], got {got}")
        for name in ("step_size", "radius"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be > 0 or none, got {value}")

    def make_problem(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """Return the problem for images (B, C, H, W) and, if the edit takes one, a hole (B, 1, H, W), bool."""
        raise NotImplementedError("Edit is abstract; use Translate, Inpaint or another of its kinds")

    def descent(self, constraint: Constraint, values: Tensor) -> Descent:
        """Return the descent; ``values`` (B,) is the number of values of each image that may change."""
        return self._unit_descent(values.sqrt() * self.stride, constraint)

    def _unit_descent(self, size: Tensor, constraint: Constraint) -> Descent:
        """Return a descent by unit gradients times ``step_size``, or times ``size`` (B,) if that is None."""
        size = size if self.step_size is None else torch.full_like(size, self.step_size)
        direction: Direction = lambda gradient, memory: per_sample(size, gradient) * unit(gradient, memory)
        return Descent(self.steps, geometric(1.0, self.step_decay), direction, constraint)

    def within(self, *constraints: Constraint) -> Constraint:
        """Return the projection onto the ball (if ``radius`` is set), then onto [0, 1], then ``constraints``."""
        return both(*([] if self.radius is None else [l2_ball(self.radius)]), box(), *constraints)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        *,
        hole: Tensor | None = None,
        generator: torch.Generator | None = None,
        observe: Observer | None = None,
        frames: int = 7,
    ) -> Edited:
        """Edit images.

        Args:
            model: classifier ``(B, K)`` or critic ``(B,)`` or ``(B, 1)`` on images in [0, 1].
            x: images (B, C, H, W), uint8, or floating point in [0, 1].
            y: target classes (B,); None: lower E(x).  A critic takes no classes.
            hole: bool (H, W), (1, H, W) or (B, 1, H, W), true where pixels are to be filled, for edits that take one.
            generator: random generator on the model's device.
            observe: called at every step, see :class:`advebm.descent.Descent`; it may raise to stop the edit.
            frames: number of film images, at most steps + 1; the start and the result are always among them.
        """
        x, y = prepare_images(x, model), None if y is None else y.to(device_of(model))
        problem = self.make_problem(x, expand_hole(hole, x), generator)
        with searching(model) as f:
            return self.run_descent(problem, self.target_energy(f, problem.start, y), f, y, observe, frames)

    def target_energy(self, f: Logits, x: Tensor, y: Tensor | None) -> Energy:
        """Return the network's energy for classes ``y (B,)``, or E(x) for None.

        Raises:
            UserError: classes for a critic, or classes that do not fit the images ``x`` or the outputs.
        """
        classes = outputs(f, x).shape[1]
        if y is None:
            return marginal(f)
        if classes == 1:
            raise UserError("a critic has one energy and no classes; leave the class out")
        if len(y) != len(x) or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes):
            raise UserError(f"there is a class of 0 to {classes - 1} for each of {len(x)} images, got {y.tolist()}")
        class_energy = energies.joint if self.energy == "joint" else energies.conditional
        return lambda z: class_energy(f(z), y)

    def run_descent(
        self,
        problem: Problem,
        energy: Energy,
        f: Logits | None,
        y: Tensor | None,
        observe: Observer | None,
        frames: int,
    ) -> Edited:
        """Run the descent on a problem, and return its result, film and numbers."""
        start, fidelity = problem.start, problem.fidelity
        total = lambda z: energy(problem.fixed(z)) + (0.0 if fidelity is None else fidelity(z))
        search = self.descent(problem.constraint, start.new_full((len(start),), start[0].numel()) * problem.share)
        frame_steps = sorted({round(k * search.steps / max(frames - 1, 1)) for k in range(frames)} | {search.steps})
        film: list[Tensor] = []

        def record(k: int, x: Tensor, value: Tensor) -> None:
            if k in frame_steps:
                film.append(x.cpu())
            if observe is not None:
                observe(k, x, value)

        x = search(total, start, origin=problem.origin, observe=record)
        film.append(x.cpu())
        with torch.no_grad():
            numbers = {"energy before": total(start), "energy after": total(x), "distance": l2_norm(x - start)}
            if f is not None and y is not None:
                numbers |= {"confidence before": confidence(f, start, y), "confidence after": confidence(f, x, y)}
        return Edited(x.cpu(), start.cpu(), torch.stack(film, 1), frame_steps, to_cpu(numbers), {})


def to_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values as float64 on the CPU."""
    return {name: value.cpu().double() for name, value in values.items()}


def prepare_images(x: Tensor, *models: nn.Module) -> Tensor:
    """Return the images, uint8 or floating point in [0, 1], as floating point on the first model's device.

    Other images raise an error, and so do encoders, whose outputs are not logits.
    """
    for model in models:
        checks.no_encoder(model)
    return checks.images(as_images(x, device_of(models[0])))


def outputs(f: Logits, x: Tensor) -> Tensor:
    """Return the outputs for the first image, (1, K), or (1, 1) of a critic; UserError if its size does not fit."""
    try:
        with torch.no_grad():
            return f(x[:1]).reshape(len(x[:1]), -1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        size = " x ".join(map(str, x.shape[1:]))
        raise UserError(f"the network does not take images of {size}: {' '.join(str(error).split())}") from None


def confidence(f: Logits, x: Tensor, y: Tensor) -> Tensor:
    """Return the probability ``p(y|x)`` in [0, 1] that the classifier ``f`` gives each image's class ``y``, (B,)."""
    return (-energies.conditional(f(x), y)).exp()


def l2_norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def expand_hole(hole: Tensor | None, x: Tensor) -> Tensor | None:
    """Return one mask per image, bool (B, 1, H, W); raise UserError if its size differs or it is empty or full."""
    if hole is None:
        return None
    hole = hole.to(x.device).bool().reshape(-1, 1, *hole.shape[-2:])
    if len(hole) not in (1, len(x)):
        raise UserError(f"there are {len(hole)} masks for {len(x)} images; give one, or one for each image")
    if hole.shape[-2:] != x.shape[-2:]:
        got = " x ".join(map(str, hole.shape[-2:]))
        raise UserError(f"the mask is {got}, the images are {x.shape[2]} x {x.shape[3]}; make them the same size")
    share = hole.float().mean((1, 2, 3))
    if not (share > 0).all() or not (share < 1).all():
        what = "empty: there is nothing to fill" if not (share > 0).all() else "full: nothing of the image is known"
        raise UserError(f"the mask is {what}; it is true, or white, where pixels are to be made")
    return hole.expand(len(x), -1, -1, -1)


def box_hole(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> Tensor:
    """Return a bool mask (H, W), true in columns ``left`` to ``right - 1`` of rows ``top`` to ``bottom - 1``."""
    height, width = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        got = f"{left},{top},{right},{bottom}"
        raise UserError(f"a box is left,top,right,bottom within {width} x {height} pixels, got {got}")
    hole = torch.zeros(height, width, dtype=torch.bool)
    hole[top:bottom, left:right] = True
    return hole


def hold_outside(start: Tensor, hole: Tensor, constraint: Constraint) -> Problem:
    """Return the problem in which only the pixels of a hole (B, 1, H, W) change."""
    share = hole.to(start.dtype).mean((1, 2, 3))
    return Problem(start, constraint, start, lambda z: torch.where(hole, z, start), share=share)
