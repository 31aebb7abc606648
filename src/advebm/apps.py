"""Edits of images: a descent on a network's energy from an image that is given, within what has to be kept of it.

Each edit is a start, a constraint and sometimes a data term for the one loop of :mod:`advebm.descent`.  Santurkar et
al. (2019) edit with a robust classifier's loss, Yin et al. (2022) with a critic; either's energy does here.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, pad

from advebm import checks, energies
from advebm.config import check_choices
from advebm.descent import (
    Constraint,
    Descent,
    Direction,
    Energy,
    Observer,
    both,
    box,
    hold,
    l2_ball,
    means,
    per_sample,
    raw,
    repeated,
    unit,
)
from advebm.energies import Logits
from advebm.errors import UserError
from advebm.metrics.base import as_images, device_of
from advebm.metrics.ood import EnergyScore, Score
from advebm.modes import searching
from advebm.samplers import geometric, marginal
from advebm.seeds import rand


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


def joined(parts: Sequence[Edited]) -> Edited:
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
        problem = self.pose(x, spread(hole, x), generator)
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


def spread(hole: Tensor | None, x: Tensor) -> Tensor | None:
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


# The edits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Translate(Edit):
    """An image of one kind made into one of another, Yin et al. (2022), figure 7: descent on the other's energy.

    The other kind is a class of a classifier, or whatever a critic was trained on; the image's own kind need not be
    known to it.  How far it goes is how many steps are taken.

    Attributes:
        amount: share of ``steps`` that is taken: 0 leaves the image as it is, 1 is all of it, 2 twice as much.
    """

    amount: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("binary-at", "santurkar2019")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.amount >= 0:
            raise UserError(f"amount is >= 0, got {self.amount}")

    def pose(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """From the image, in the box."""
        return Problem(x, self.within(), x)

    def descent(self, constraint: Constraint, values: Tensor) -> Descent:
        """With ``amount`` of the steps."""
        return replace(super().descent(constraint, values), steps=round(self.amount * self.steps))


@dataclass(frozen=True)
class Inpaint(Edit):
    """A hole filled so that the whole has low energy; known pixels stay as they are, to the bit.

    Attributes:
        fill: what the hole begins with: ``smooth`` (each pixel the mean of its neighbours), ``mean`` (of the known
            pixels, a value a channel) or ``noise`` (uniform).
    """

    fill: Literal["smooth", "mean", "noise"] = "smooth"

    stride: ClassVar[float] = 0.003

    def pose(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """From the filled image, with known pixels held."""
        if hole is None:
            raise UserError("inpainting takes a hole: a mask, true or white where pixels are to be made")
        known = ~hole
        average = (x * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
        filling = rand(x, generator) if self.fill == "noise" else average.expand_as(x)
        start = torch.where(hole, filling, x)
        if self.fill == "smooth":
            start = smooth(start, hole)
        return held(start, hole, self.within(hold(known)))


def held(start: Tensor, hole: Tensor, constraint: Constraint) -> Problem:
    """The problem of a hole (B, 1, H, W) in an image, of which the rest stays."""
    share = hole.to(start.dtype).mean((1, 2, 3))
    return Problem(start, constraint, start, lambda z: torch.where(hole, z, start), share=share)


def smooth(x: Tensor, hole: Tensor) -> Tensor:
    """Filled from the means of known pixels at half the size, and so on, then each pixel the mean of its 4 neighbours.

    The last by 50 sweeps, near the harmonic filling.
    """
    if not hole.any():
        return x
    half = (-(-x.shape[2] // 2), -(-x.shape[3] // 2))
    share = adaptive_avg_pool2d((~hole).to(x.dtype), half)
    coarse = smooth(adaptive_avg_pool2d(x * ~hole, half) / share.clamp_min(1e-12), share == 0)
    x = torch.where(hole, interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False), x)
    for _ in range(50):
        near = pad(x, (1, 1, 1, 1), mode="replicate")
        mean = (near[..., :-2, 1:-1] + near[..., 2:, 1:-1] + near[..., 1:-1, :-2] + near[..., 1:-1, 2:]) / 4
        x = torch.where(hole, mean, x)
    return x


@dataclass(frozen=True)
class Paint(Edit):
    """A sketch, or an image with strokes painted over, made real: descent from it, near it, by the class it shall be.

    With a hole, that is where it was painted, only these pixels move and the others stay as they are, to the bit.
    """

    energy: Literal["joint", "conditional"] = "conditional"

    def pose(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """From the image as painted."""
        if hole is None:
            return Problem(x, self.within(), x)
        return held(x, hole, self.within(hold(~hole)))


@dataclass(frozen=True)
class Denoise(Edit):
    """Noise taken out: by ``gaussian`` noise of deviation σ, the x of least ``λ E(x) + ‖x - b‖² / 2σ²`` for an image b.

    Steps of σ²/2 lead to where ``x = b - λ σ² ∇E(x)``, with the gradient at x: for λ = 1 and the energy of clean images
    the most likely x given b.  The posterior mean (Miyasawa, 1961) is another image, ``b - σ² ∇E(b)`` with the energy
    of noisy ones.  ``salt-and-pepper`` noise leaves most pixels as they were: those that are black or white in all
    channels, and off the median of the 3 x 3 pixels around by more than ``off``, are made anew from that median by
    unit steps, the others held.

    Attributes:
        noise: which.
        sigma: σ, pixels of [0, 1]; of gaussian noise.
        prior: λ; 0 leaves the image as it is.
        off: as above; of salt and pepper.
    """

    steps: int = 20
    noise: Literal["gaussian", "salt-and-pepper"] = "gaussian"
    sigma: float = 0.1
    prior: float = 4.0
    off: float = 0.2

    cites: ClassVar[tuple[str, ...]] = ("binary-at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0 or not self.prior >= 0 or not 0 <= self.off < 1:
            got = f"{self.sigma}, {self.prior} and {self.off}"
            raise UserError(f"sigma is > 0, prior >= 0 and off lies in [0, 1), got {got}")

    def pose(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """From the noisy image."""
        if self.noise == "gaussian":
            data: Energy = lambda z: (z - x).square().flatten(1).sum(1) / (2 * self.sigma**2)
            return Problem(x, self.within(), x, data=data)
        near = median(x)
        extreme = ((x == 0) | (x == 1)).all(1, keepdim=True) & ((x - near).abs().amax(1, keepdim=True) > self.off)
        start = torch.where(extreme, near, x)
        return held(start, extreme, self.within(hold(~extreme)))

    def lowered(self, f: Logits, x: Tensor, y: Tensor | None) -> Energy:
        """λ times the energy."""
        energy = super().lowered(f, x, y)
        return lambda z: self.prior * energy(z)

    def descent(self, constraint: Constraint, values: Tensor) -> Descent:
        """Raw steps where there is a data term."""
        if self.noise == "gaussian":
            size = self.step_size or self.sigma**2 / 2
            return Descent(self.steps, geometric(size, self.step_decay), raw, constraint)
        return super().descent(constraint, values)


def median(x: Tensor) -> Tensor:
    """Of the 3 x 3 pixels around each, channel by channel."""
    count, channels, height, width = x.shape
    near = pad(x, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    return near.reshape(count, channels, height, width, 9).median(-1).values


@dataclass(frozen=True)
class Upsample(Edit):
    """A larger image of low energy whose means over blocks are the small image, within 1e-6.

    Attributes:
        factor: edge of a block.
    """

    factor: int = 2

    stride: ClassVar[float] = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 2:
            raise UserError(f"factor is at least 2, got {self.factor}")

    def pose(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """From the bicubic enlargement, as near as it obeys the constraint."""
        blocks = repeated(x, self.factor)
        keep = means(self.factor)
        start = keep(interpolate(x, scale_factor=self.factor, mode="bicubic", align_corners=False), blocks)
        fixed = lambda z: z + repeated(x - avg_pool2d(z, self.factor), self.factor)
        return Problem(start, self.within(keep), blocks, fixed, share=1 - 1 / self.factor**2)


@dataclass(frozen=True)
class Compose(Edit):
    """Images of low ``Σ w_i E_i``, of several networks or classes, Du et al. (2020): w > 0 asks for, w < 0 refuses.

    Energies of different networks have different scales; weights have to make up for that.  Of a class that is refused
    the conditional energy is the one to take: E(x, y) has no ceiling.

    Attributes:
        weights: w_i; none for 1 each.
    """

    weights: tuple[float, ...] | None = None
    energy: Literal["joint", "conditional"] = "conditional"

    cites: ClassVar[tuple[str, ...]] = ("binary-at", "du2020")

    def pose(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        """From the seeds."""
        return Problem(x, self.within(), x)

    def __call__(  # type: ignore[override]
        self,
        models: Sequence[nn.Module],
        x: Tensor,
        classes: Sequence[int | None],
        **options: Any,
    ) -> Edited:
        """Move seeds ``x (B, C, H, W)``; each network has a class, or none for its E(x)."""
        weights = (1.0,) * len(models) if self.weights is None else self.weights
        if not models or not len(models) == len(classes) == len(weights):
            got = f"{len(models)}, {len(classes)} and {len(weights)}"
            raise UserError(f"a composition takes as many models as classes and weights, got {got}")
        x = taken(x, *models)
        problem, observe, frames = self.pose(x, None, None), options.get("observe"), options.get("frames", 7)
        with ExitStack() as stack:
            parts = []
            for model, k in zip(models, classes, strict=True):
                y = None if k is None else torch.full((len(x),), k, device=x.device)
                parts.append(self.lowered(stack.enter_context(searching(model)), x, y))
            energy = lambda z: torch.stack([w * part(z) for w, part in zip(weights, parts, strict=True)]).sum(0)
            return self.follow(problem, energy, None, None, observe, frames)


@dataclass(frozen=True)
class Interpolate(Edit):
    """Images on the way from each image to the next, moved to low energy; the given ones stay as they are.

    At t of a way between images that are held steps are sin(πt) as long, so that nothing leaps next to the ends.

    Attributes:
        count: images of a way, both ends among them.
        way: ``spherical``, about mid grey, which keeps the contrast, or ``linear``.
        ends: ``held``, or ``moved`` where they are seeds like all others.
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
        """With steps by the place on the way."""
        search = super().descent(constraint, values)
        if self.ends == "moved":
            return search
        share = (math.pi * torch.linspace(0, 1, self.count)).sin().repeat(len(values) // self.count).to(values)
        direction: Direction = lambda gradient, memory: per_sample(share, gradient) * search.direction(gradient, memory)
        return replace(search, direction=direction)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None = None, **options: Any) -> Edited:
        """Of images (B, C, H, W), ((B - 1) · count, C, H, W): way after way.

        With classes ``y (B,)`` what is lowered goes from the energy of one class to that of the next.
        """
        if len(x) < 2:
            raise UserError(f"an interpolation takes at least 2 images, got {len(x)}")
        x = taken(x, model)
        t = torch.linspace(0, 1, self.count, dtype=x.dtype, device=x.device).repeat(len(x) - 1)
        first, second = x[:-1].repeat_interleave(self.count, 0), x[1:].repeat_interleave(self.count, 0)
        path = spherical(first, second, t) if self.way == "spherical" else torch.lerp(first, second, per_sample(t, x))
        path = torch.where(per_sample(t == 0, x), first, torch.where(per_sample(t == 1, x), second, path.clamp(0, 1)))
        end = per_sample((t == 0) | (t == 1), x) & (self.ends == "held")
        problem = Problem(path, self.within(hold(end)), path)
        with searching(model) as f:
            energy = self.lowered(f, path, None)
            if y is not None:
                ends = [
                    y.to(x.device)[part].repeat_interleave(self.count) for part in (slice(None, -1), slice(1, None))
                ]
                a, b = (self.lowered(f, path, goal) for goal in ends)
                energy = lambda z: (1 - t) * a(z) + t * b(z)
            return self.follow(problem, energy, f, None, options.get("observe"), options.get("frames", 7))


def spherical(a: Tensor, b: Tensor, t: Tensor, centre: float = 0.5) -> Tensor:
    """From ``a`` at t = 0 to ``b`` at 1, (B, C, H, W), t (B,): directions from ``centre`` turn evenly (Shoemake, 1985).

    Distances from ``centre`` go evenly, too.  Where the ends have one direction or opposite ones the way is straight.
    """
    u, v, share = (a - centre).flatten(1), (b - centre).flatten(1), t[:, None]
    first, second = (z.norm(dim=1, keepdim=True) for z in (u, v))
    angle = ((u * v).sum(1, keepdim=True) / (first * second).clamp_min(1e-12)).clamp(-1, 1).arccos()
    sine = angle.sin().clamp_min(1e-12)
    turned = ((1 - share) * angle).sin() / sine * u / first.clamp_min(1e-12)
    turned = turned + (share * angle).sin() / sine * v / second.clamp_min(1e-12)
    turns = (angle.sin() > 1e-4) & (first > 0) & (second > 0)
    way = torch.where(turns, torch.lerp(first, second, share) * turned, torch.lerp(u, v, share))
    return centre + way.view_as(a)


@dataclass(frozen=True)
class Counterfactual(Edit):
    """The nearest image that is taken for another class, with ``p(y|x)`` of at least ``level``, within a ball.

    As in RATIO (Augustin et al., 2020), descent on the cross-entropy of the class in l2 balls; here the radius is
    halved between the largest that failed and the smallest that succeeded, for each image.  Distances are upper
    bounds, as another search might find something nearer.

    Attributes:
        steps: of each search, of length ``2.5 r / steps`` in a ball of radius r unless ``step_size`` says otherwise.
        radius: of the largest ball; none takes 0.25 √D, a root mean square of 0.25.
        level: ``p(y|x)`` that counts as reached.
        searches: number of balls.
    """

    energy: Literal["joint", "conditional"] = "conditional"
    level: float = 0.8
    searches: int = 8

    cites: ClassVar[tuple[str, ...]] = ("augustin2020",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.level < 1 or self.searches < 1:
            raise UserError(f"level lies in (0, 1) and searches is at least 1, got {self.level} and {self.searches}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None = None, **options: Any) -> Edited:
        """Counterfactuals of images for classes ``y (B,)``; without, of the second most likely class of each.

        ``numbers`` also hold ``reached``, 1 or 0, and ``from`` and ``to``, the classes; an image that is of its class
        already stays.  The film goes straight from image to result in hundredths, its ``series`` hold ``confidence`` in
        the new class, ``confidence in the old class`` and ``distance``.
        """
        x, frames = taken(x, model), max(options.get("frames", 7), 2)
        with searching(model) as f, torch.no_grad():
            if outputs(f, x).shape[1] < 2:
                raise UserError("a counterfactual takes a classifier; a critic has no classes")
            top = f(x).topk(2, 1).indices
            y = top[:, 1] if y is None else y.to(x.device)
            energy = self.lowered(f, x, y)
            search = lambda radius: self._within(radius)(energy, x, observe=options.get("observe"))
            high = x.new_full((len(x),), 0.25 * x[0].numel() ** 0.5 if self.radius is None else self.radius)
            there = confidence(f, x, y) >= self.level
            best = torch.where(per_sample(there, x), x, search(high))
            reached = confidence(f, best, y) >= self.level
            low, high = torch.zeros_like(high), length(best - x)
            for _ in range(self.searches - 1):
                radius = (low + high) / 2
                found = search(radius)
                hit = reached & ~there & (confidence(f, found, y) >= self.level)
                best = torch.where(per_sample(hit, x), found, best)
                low, high = torch.where(hit, low, radius), torch.where(hit, length(found - x), high)
            way = torch.linspace(0, 1, frames, dtype=x.dtype, device=x.device)
            film = torch.stack([torch.lerp(x, best, share) for share in way.tolist()], 1)
            along = lambda goal: torch.stack([confidence(f, z, goal) for z in film.unbind(1)], 1)
            series = {"confidence": along(y), "confidence in the old class": along(top[:, 0])}
            series["distance"] = (film - x[:, None]).flatten(2).norm(dim=2)
            numbers = {"energy before": energy(x), "energy after": energy(best), "distance": series["distance"][:, -1]}
            numbers |= {
                "confidence before": series["confidence"][:, 0],
                "confidence after": series["confidence"][:, -1],
            }
            numbers |= {"reached": reached, "from": top[:, 0], "to": y}
        told, shown = ({k: v.double().cpu() for k, v in named.items()} for named in (numbers, series))
        moments = [round(100 * share) for share in way.tolist()]
        return Edited(best.cpu(), x.cpu(), film.cpu(), moments, told, shown)

    def _within(self, radius: Tensor) -> Descent:
        """In a ball for each image."""
        size = 2.5 * radius / max(self.steps, 1) if self.step_size is None else torch.full_like(radius, self.step_size)
        direction: Direction = lambda gradient, memory: per_sample(size, gradient) * unit(gradient, memory)
        return Descent(self.steps, geometric(1.0, self.step_decay), direction, both(l2_ball(radius), box()))


# How unusual an image is ----------------------------------------------------------------------------------------------


class Unusual(NamedTuple):
    """Scores (B,), high where an image looks less like the data, and the share of known images that score lower."""

    score: Tensor
    share: Tensor


def unusual(model: nn.Module, x: Tensor, known: Tensor, score: Score | None = None, *, batch: int = 500) -> Unusual:
    """How unusual images ``x`` are beside ``known (N, C, H, W)``, of the data but not trained on; by energy."""
    checks.no_encoder(model)
    device, score = device_of(model), score or EnergyScore()
    with searching(model) as f:
        outputs(f, as_images(x[:1], device))
        ours, theirs = (
            torch.cat([score(f, as_images(part, device)).detach().cpu() for part in images.split(batch)])
            for images in (x, known)
        )
    share = torch.searchsorted(theirs.sort().values, ours).double() / len(theirs)
    return Unusual(ours, share)
