"""The base class of all samplers: descent on an energy from a start, with images kept in [0, 1]."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm import energies, starts
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.data.sources import Data
from advebm.descent import (
    Constraint,
    Descent,
    Direction,
    Energy,
    Observer,
    Schedule,
    adam,
    at,
    both,
    box,
    heavy_ball,
    in_parts,
    l2_ball,
    raw,
    sign,
    unit,
)
from advebm.energies import Logits
from advebm.models.modes import SearchView, searching
from advebm.starts import ClassGaussians, ImagePool, Start

LARGE = 1e30  # limit of step sizes and noise, well below the largest float32
DIRECTIONS: dict[str, Direction] = {"unit": unit, "raw": raw, "sign": sign, "adam": adam}


@dataclass(frozen=True)
class Sampler:
    """CEM's protocol (Wang et al., 2021, appendix B): ``x ← Π_{‖x - x_0‖ ≤ β} [x + α g + η ε]``, K times.

    Abstract: each algorithm is an energy, and ``g`` its descent direction.  The papers do not give α, β, η and K; the
    recipes do.

    Attributes:
        steps: K, the number of updates (CEM counts k = 0, …, K, one more); 0 returns the seeds.
        step_size: α, in pixels of [0, 1] with ``unit`` directions, a factor on the gradient with ``raw`` ones.
        radius: β, radius of the l2 ball around the seed; None: no ball.  Images stay in [0, 1] in any case.
        noise: η, standard deviation of the Gaussian noise added at each step.
        direction: ``unit`` (gradients of length 1, as the papers' checkpoints were used), ``raw``, ``sign`` or
            ``adam``.
        momentum: decay of heavy-ball momentum on the direction; 0: none.
        temperature: T in nats: ``η = √(2 α T)``, Langevin dynamics, whose distribution tends to
            ``p(x) ∝ exp(-E(x) / T)`` for small steps; needs raw directions.  None: η is ``noise``.
        step_decay, noise_decay: factors by which α and η have decayed, geometrically, after K steps; 1: no annealing.
            With a temperature η also follows α.
        start: seeds: ``class`` (one Gaussian per class), ``global`` (one Gaussian for all images, without class
            structure), ``noise`` (uniform), ``outside`` (test images of the recipe's outside source) or ``buffer`` (the
            replay chains of the checkpoint).
        fit: the split that Gaussians are fitted on.  CEM and Santurkar et al. used ``test``, a leak: scores measured
            against test images afterwards are too good.
        fit_size: longer edge, in pixels, that images are averaged down to before Gaussians are fitted; the seeds are
            enlarged, as Santurkar et al. do for ImageNet.  None: the images' own size, which takes long for large ones.
        shrinkage: share of white noise in a seed's covariance.
    """

    steps: int = 40
    step_size: float = 0.25
    radius: float | None = None
    noise: float = 0.0
    direction: Literal["unit", "raw", "sign", "adam"] = "unit"
    momentum: float = 0.0
    temperature: float | None = None
    step_decay: float = 1.0
    noise_decay: float = 1.0
    start: Literal["class", "global", "noise", "outside", "buffer"] = "class"
    fit: Literal["train", "test"] = "train"
    fit_size: int | None = None
    shrinkage: float = 0.01

    conditional: ClassVar[bool] = True  # whether the energy depends on a class
    encoder: ClassVar[bool] = False  # whether it samples an encoder rather than logits
    cites: ClassVar[tuple[str, ...]] = ("cem-workshop", "santurkar2019")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 0 or not 0 < self.step_size < LARGE or not 0 <= self.noise < LARGE:
            got = f"{self.steps}, {self.step_size}, {self.noise}"
            raise UserError(f"a sampler takes steps >= 0, finite step_size > 0 and noise >= 0, got {got}")
        if self.radius is not None and not self.radius > 0:
            raise UserError(f"radius must be > 0 or none, got {self.radius}")
        if self.fit_size is not None and self.fit_size < 1:
            raise UserError(f"fit_size must be at least 1 pixel, or none for the images' own size, got {self.fit_size}")
        if not 0 <= self.momentum < 1 or not 0 <= self.shrinkage <= 1:
            got = f"{self.momentum}, {self.shrinkage}"
            raise UserError(f"momentum must lie in [0, 1) and shrinkage must lie in [0, 1], got {got}")
        if not (0 < self.step_decay <= 1 and 0 < self.noise_decay <= 1):
            got = f"{self.step_decay}, {self.noise_decay}"
            raise UserError(f"step_decay and noise_decay are shares in (0, 1], got {got}")
        if self.temperature is not None:
            if not self.temperature >= 0:
                raise UserError(f"temperature must be >= 0 or none, got {self.temperature}")
            if self.direction != "raw" or self.momentum or self.noise:
                raise UserError(
                    "a temperature is of Langevin dynamics: raw directions, no momentum, and no other noise; set "
                    "direction to raw, momentum and noise to 0, or temperature to none"
                )

    def trained_by(self, objective: Any) -> "Sampler":
        """Return a copy whose unset options come from the objective; samplers of logits have none."""
        return self

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """Return the energy that the algorithm descends for classes ``y (B,)``."""
        raise NotImplementedError("Sampler is abstract; use TA, CS, RCS, Langevin or another of its kinds")

    def prepare(self, data: Data, outside: Data | None = None) -> Start:
        """Return the source of seeds: uniform noise, Gaussians fitted on ``data``, or test images of ``outside``.

        Gaussians that the data bring, see :class:`Data`, are taken as they are.

        With ``start: buffer``, ``outside`` holds the replay chains.

        Raises:
            UserError: ``outside`` is missing or of another shape, or ``data`` lacks the labels for class Gaussians or,
                with ``fit: test``, all test images.
        """
        if self.start in ("outside", "buffer"):
            if outside is None:
                what = "outside images" if self.start == "outside" else "a replay buffer"
                raise UserError(f"chains start from {what}, and there are none; set start to global or noise")
            if outside.shape != data.shape:
                raise UserError(f"the {self.start} images are {outside.shape}, those of {data.name} {data.shape}")
            return ImagePool(outside.test.x)
        if self.start == "noise":
            return starts.noise
        split, by_class = data.train if self.fit == "train" else data.test, self.start == "class"
        if by_class and not (data.labelled if self.fit == "train" else split.labelled):
            raise UserError(f"{data.name} has no labels to fit a Gaussian a class on; set start to global or noise")
        if data.gaussians is not None:
            if self.fit == "test":
                raise UserError(f"{data.name} brings Gaussians of training images; set fit to train, or give --data")
            return data.gaussians.start(by_class=by_class, shrinkage=self.shrinkage)
        x = split.x if self.fit_size is None else starts.shrink(split.x, self.fit_size)
        y, classes = (split.y, len(data.classes)) if by_class else (None, 1)
        gaussians = ClassGaussians.fit(x, y, classes=classes, shrinkage=self.shrinkage)
        return gaussians if x is split.x else starts.Enlarged(gaussians, tuple(x.shape[1:]))

    @property
    def coupled(self) -> bool:
        """Whether a sample's energy depends on the other samples of its group; groups do not depend on ``batch``."""
        return False

    @property
    def extendable(self) -> bool:
        """Whether the first k steps of a chain are the chain of k steps, from the same random numbers."""
        return self.step_decay == self.noise_decay == 1

    def bank(self, data: Data) -> Tensor | None:
        """Return the training images used as negatives, of the dtype in ``data``; None: the energy uses none."""
        return None

    def contrast(
        self, f: Logits, bank: Tensor | None, like: Tensor, generator: torch.Generator | None, batch: int
    ) -> Tensor | None:
        """Return features of bank images, (S, K, D) for S steps or (1, K, D) for all steps; None: not used."""
        return None

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        """Return the energy of chains that start from ``seeds``; by default that of their classes."""
        return self.energy(f, y)

    def parts(self, count: int, batch: int | None) -> list[slice]:
        """Split ``count`` images into slices that go through the network together, each at most ``batch`` long."""
        if batch is None or batch >= count:
            return [slice(None)]
        return [slice(first, first + batch) for first in range(0, count, batch)]

    def descent(self) -> Descent:
        constraint: Constraint = box() if self.radius is None else both(l2_ball(self.radius), box())
        size, direction = geometric(self.step_size, self.step_decay), DIRECTIONS[self.direction]
        noise = geometric(self.noise, self.noise_decay)
        if (temperature := self.temperature) is not None:
            decay = geometric(1.0, self.noise_decay)
            noise = lambda share: (2 * at(size, share) * temperature) ** 0.5 * at(decay, share)
        if self.momentum:
            direction = heavy_ball(self.momentum, direction)
        return Descent(self.steps, size, direction, constraint, noise)

    def __call__(
        self,
        model: nn.Module,
        y: Tensor,
        seeds: Tensor,
        *,
        generator: torch.Generator | None = None,
        observe: Observer | None = None,
        batch: int | None = None,
        bank: Tensor | None = None,
        view: SearchView | None = None,
    ) -> Tensor:
        """Draw images (B, C, H, W) in [0, 1] of classes ``y (B,)``, from ``seeds`` of the same shape.

        At most ``batch`` images go through the network at once; the noise does not depend on ``batch``.  ``bank`` is
        what :meth:`bank` returned, ``view`` a faster version of the network.
        """
        with searching(model, view=view) as f:
            parts = self.parts(len(y), batch)
            negatives = self.contrast(f, bank, seeds, generator, batch or len(y))
            part_energies = [self.begun(f, y[part], seeds[part], negatives) for part in parts]
            energy = part_energies[0] if len(parts) == 1 else in_parts(part_energies, parts)
            return self.descent()(energy, seeds, generator=generator, observe=observe)


def geometric(first: float, decay: float) -> float | Schedule:
    """Return a schedule from ``first`` to ``first · decay``: ``first · decay^share`` after a share of the steps."""
    return first if decay == 1 else lambda share: first * decay**share


def marginal(f: Logits) -> Energy:
    """Return ``E(x)`` of a classifier (B, K), or of a critic (B,) or (B, 1), for which it is ``-f(x)``."""
    return lambda x: energies.marginal(f(x).reshape(len(x), -1))


def cycle_negatives(negatives: Tensor | None) -> Iterator[Tensor | None]:
    """Yield the set of negatives of each step, repeated without end; None each time if there are none."""
    return itertools.cycle([None] if negatives is None else negatives)


def joint_or_marginal(f: Logits, x: Tensor, y: Tensor) -> Energy:
    """Return ``E(x, y)`` of a classifier, ``E(x)`` of a critic; outputs for ``x (B, C, H, W)`` tell which it is."""
    if f(x[:1]).numel() == 1:
        return marginal(f)
    return lambda v: energies.joint(f(v), y)
