"""What all edits share: the problem, the result, and how both are checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core import checks
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.descent import Constraint, Descent, Direction, Energy, Observer, both, box, l2_ball, per_sample, unit
from advebm.energies import Logits
from advebm.models.batching import as_images, device_of
from advebm.models.modes import searching
from advebm.samplers.base import geometric, marginal


class Edited(NamedTuple):
    """What came of some images, all on the CPU.

    Attributes:
        x: the results (N, C, H, W) in [0, 1].
        begin: where the search began (N, C, H, W): the image itself, or with its hole filled, or enlarged.
        film: the way from there to the result (N, F, C, H, W).
        moments: the steps that the film shows, F of them.
        numbers: (N,) each, float64: ``energy before`` and ``energy after``, what was lowered (nats); ``distance``
            (l2, pixels of [0, 1]) from ``begin``; of a classifier and a class ``confidence before`` and ``after``.
        series: (N, F) each, float64: numbers along the film.
    """

    x: Tensor
    begin: Tensor
    film: Tensor
    moments: list[int]
    numbers: dict[str, Tensor]
    series: dict[str, Tensor]


def join_parts(parts: Sequence[Edited]) -> Edited:
    """Edits of one kind, one after the other."""
    first = parts[0]
    numbers = {name: torch.cat([part.numbers[name] for part in parts]) for name in first.numbers}
    series = {name: torch.cat([part.series[name] for part in parts]) for name in first.series}
    x, begin, film = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "begin", "film"))
    return Edited(x, begin, film, first.moments, numbers, series)


class Problem(NamedTuple):
    """What an edit hands to the loop, besides the network's energy.

    Attributes:
        start: (B, C, H, W) in [0, 1].
        constraint: what results have to obey.
        origin: what the constraint is about.
        fixed: differentiable, the identity on what obeys the constraint: spares steps in directions that it undoes.
        data: a term to be added to the energy.
        share: of the values that may move, (B,) or for all.
    """

    start: Tensor
    constraint: Constraint
    origin: Tensor
    fixed: Callable[[Tensor], Tensor] = lambda x: x
    data: Energy | None = None
    share: Tensor | float = 1.0


@dataclass(frozen=True)
class Edit:
    """Steps ``x ← Π[x - α ∇E / ‖∇E‖]`` from an image; abstract.

    Attributes:
        steps: number of steps.
        step_size: α, pixels of [0, 1], l2; none takes ``stride`` times √D for the D values of an image that may move,
            so that it is a root mean square.
        step_decay: what α has shrunk to at the end, as a share, geometrically.
        radius: of an l2 ball around the image, pixels of [0, 1]; none for no ball.
        energy: what is lowered where a class is given: ``joint`` E(x, y) = -f_y or ``conditional`` E(x, y) - E(x), the
            cross-entropy; without a class it is E(x).
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
            raise UserError(f"steps is >= 0 and step_decay lies in (0, 1], got {self.steps} and {self.step_decay}")
        for name in ("step_size", "radius"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} is > 0 or none, got {value}")

    def pose(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """The problem of some images (B, C, H, W) and, where the edit takes one, a hole (B, 1, H, W)."""
        raise NotImplementedError("Edit is abstract; use Translate, Inpaint or another of its kinds")

    def descent(self, constraint: Constraint, values: Tensor) -> Descent:
        """The search in images of which so many values move, (B,)."""
        size = values.sqrt() * self.stride if self.step_size is None else torch.full_like(values, self.step_size)
        direction: Direction = lambda gradient, memory: per_sample(size, gradient) * unit(gradient, memory)
        return Descent(self.steps, geometric(1.0, self.step_decay), direction, constraint)

    def within(self, *constraints: Constraint) -> Constraint:
        """The ball, where there is one, then the box, then others."""
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
        """Edit some images.

        Args:
            model: classifier ``(B, K)`` or critic ``(B,)`` or ``(B, 1)`` on images in [0, 1].
            x: images (B, C, H, W) in [0, 1], bytes or floating point.
            y: classes (B,) to move to; none for E(x).  A critic has none.
            hole: bool (H, W), (1, H, W) or (B, 1, H, W), true where pixels are to be made, for edits that take one.
            generator: of every draw, on the model's device.
            observe: sees every step, see :class:`advebm.descent.Descent`; raise there to stop.
            frames: pictures of the film, at most steps + 1.
        """
        x, y = taken(x, model), None if y is None else y.to(device_of(model))
        problem = self.pose(x, expand_hole(hole, x), generator)
        with searching(model) as f:
            return self.follow(problem, self.lowered(f, problem.start, y), f, y, observe, frames)

    def lowered(self, f: Logits, x: Tensor, y: Tensor | None) -> Energy:
        """The network's energy for images like ``x`` and classes ``y``."""
        out = outputs(f, x)
        if y is None:
            return marginal(f)
        if out.shape[1] == 1:
            raise UserError("a critic has one energy and no classes; leave the class out")
        if len(y) != len(x) or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < out.shape[1]):
            raise UserError(
                f"there is a class of 0 to {out.shape[1] - 1} for each of {len(x)} images, got {y.tolist()}"
            )
        read = energies.joint if self.energy == "joint" else energies.conditional
        return lambda z: read(f(z), y)

    def follow(
        self,
        problem: Problem,
        energy: Energy,
        f: Logits | None,
        y: Tensor | None,
        observe: Observer | None,
        frames: int,
    ) -> Edited:
        """Run the loop on a problem and look back."""
        start, data = problem.start, problem.data
        total = lambda z: energy(problem.fixed(z)) + (0.0 if data is None else data(z))
        search = self.descent(problem.constraint, start.new_full((len(start),), start[0].numel()) * problem.share)
        wanted = sorted({round(k * search.steps / max(frames - 1, 1)) for k in range(frames)} | {search.steps})
        film: list[Tensor] = []

        def look(k: int, x: Tensor, value: Tensor) -> None:
            if k in wanted:
                film.append(x.cpu())
            if observe is not None:
                observe(k, x, value)

        found = search(total, start, origin=problem.origin, observe=look)
        film.append(found.cpu())
        with torch.no_grad():
            numbers = {"energy before": total(start), "energy after": total(found)}
            numbers["distance"] = length(found - start)
            if f is not None and y is not None:
                numbers["confidence before"], numbers["confidence after"] = (
                    confidence(f, z, y) for z in (start, found)
                )
        told = {name: value.double().cpu() for name, value in numbers.items()}
        return Edited(found.cpu(), start.cpu(), torch.stack(film, 1), wanted, told, {})


def taken(x: Tensor, *models: nn.Module) -> Tensor:
    """Images, bytes or floating point in [0, 1], as floating point where the first model is.

    Anything else is refused, and so are encoders, whose outputs are no logits.
    """
    for model in models:
        checks.no_encoder(model)
    return checks.images(as_images(x, device_of(models[0])))


def outputs(f: Logits, x: Tensor) -> Tensor:
    """(B, K), or (B, 1) of a critic; a network that does not take images of this size says so."""
    try:
        with torch.no_grad():
            return f(x[:1]).reshape(len(x[:1]), -1)
    except RuntimeError as error:
        size = " x ".join(map(str, x.shape[1:]))
        raise UserError(f"the network does not take images of {size}: {' '.join(str(error).split())}") from None


def confidence(f: Logits, x: Tensor, y: Tensor) -> Tensor:
    """``p(y|x)``, (B,)."""
    return (-energies.conditional(f(x), y)).exp()


def length(x: Tensor) -> Tensor:
    """l2, (B,)."""
    return x.flatten(1).norm(dim=1)


def expand_hole(hole: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask for each image, bool (B, 1, H, W)."""
    if hole is None:
        return None
    hole = hole.to(x.device).bool()
    hole = hole.reshape(-1, 1, *hole.shape[-2:])
    if hole.shape[-2:] != x.shape[-2:] or len(hole) not in (1, len(x)):
        got = " x ".join(map(str, hole.shape[-2:]))
        raise UserError(f"the mask is {got}, the images are {x.shape[2]} x {x.shape[3]}; make them the same size")
    share = hole.float().mean((1, 2, 3))
    if not (share > 0).all() or not (share < 1).all():
        what = "empty: there is nothing to fill" if not (share > 0).all() else "full: nothing of the image is known"
        raise UserError(f"the mask is {what}; it is true, or white, where pixels are to be made")
    return hole.expand(len(x), -1, -1, -1)


def box_hole(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> Tensor:
    """A rectangle as a mask (H, W): columns ``left`` to ``right - 1``, rows ``top`` to ``bottom - 1``."""
    height, width = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        got = f"{left},{top},{right},{bottom}"
        raise UserError(f"a box is left,top,right,bottom within {width} x {height} pixels, got {got}")
    hole = torch.zeros(height, width, dtype=torch.bool)
    hole[top:bottom, left:right] = True
    return hole


def hold_outside(start: Tensor, hole: Tensor, constraint: Constraint) -> Problem:
    """The problem of a hole (B, 1, H, W) in an image, of which the rest stays."""
    share = hole.to(start.dtype).mean((1, 2, 3))
    return Problem(start, constraint, start, lambda z: torch.where(hole, z, start), share=share)
