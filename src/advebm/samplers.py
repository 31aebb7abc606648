"""Samplers: images drawn from a network read as an energy model."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm import energies, starts
from advebm.config import check_choices
from advebm.data.sources import Data
from advebm.descent import Constraint, Descent, Energy, Observer, both, box, l2_ball, raw, sign, unit
from advebm.energies import Logits
from advebm.errors import UserError
from advebm.modes import searching
from advebm.starts import ClassGaussians, Deck, Start

DIRECTIONS = {"unit": unit, "raw": raw, "sign": sign}


@dataclass(frozen=True)
class Sampler:
    """CEM's protocol (Wang et al., 2021, appendix B): ``x ← Π_{‖x - x_0‖ ≤ β} [x + α g + η ε]``, K times.

    Abstract: each algorithm is an energy whose descent is ``g``.  The papers do not give α, β, η, K; the recipes do.

    Attributes:
        steps: K, the number of updates (CEM counts k = 0, …, K, one more).
        step_size: α, in pixels of [0, 1] with ``unit`` directions.
        radius: β, of the l2 ball around the seed; none for no ball.  Images stay in [0, 1] in any case.
        noise: η, deviation of the Gaussian added at each step.
        direction: ``unit`` (gradients of length 1, as the checkpoints of the papers were used), ``raw`` or ``sign``.
        start: seeds: ``class`` (a Gaussian a class), ``global`` (one Gaussian for all: no class shape), ``noise``
            (uniform) or ``outside`` (test images of the recipe's outside source).  Gaussians are fitted on the training
            split; CEM took the test split, which leaks.
        shrinkage: share of white noise in a seed's covariance.
    """

    steps: int = 40
    step_size: float = 0.25
    radius: float | None = None
    noise: float = 0.0
    direction: Literal["unit", "raw", "sign"] = "unit"
    start: Literal["class", "global", "noise", "outside"] = "class"
    shrinkage: float = 0.01

    conditional: ClassVar[bool] = True  # whether it is asked for classes
    cites: ClassVar[tuple[str, ...]] = ("cem-workshop", "santurkar2019")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 0 or not self.step_size > 0 or not self.noise >= 0:
            got = f"{self.steps}, {self.step_size}, {self.noise}"
            raise UserError(f"a sampler takes steps >= 0, step_size > 0 and noise >= 0, got {got}")
        if self.radius is not None and not self.radius > 0:
            raise UserError(f"radius is > 0 or none, got {self.radius}")
        if not 0 <= self.shrinkage <= 1:
            raise UserError(f"shrinkage lies in [0, 1], got {self.shrinkage}")

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """What the algorithm descends for classes ``y (B,)``."""
        raise NotImplementedError("Sampler is abstract; use TA, CS or Ascent")

    def prepare(self, data: Data, outside: Data | None = None) -> Start:
        """Where chains begin: Gaussians fitted on the training split, or test images of ``outside``."""
        if self.start == "outside":
            if outside is None:
                raise UserError("chains start from outside images, and there are none; set start to global or noise")
            if outside.shape != data.shape:
                raise UserError(f"the outside images are {outside.shape}, those of {data.name} {data.shape}")
            return Deck(outside.test.x)
        if self.start == "noise":
            return starts.noise
        x, y = data.train.x, data.train.y
        if self.start == "global":
            return ClassGaussians.fit(x, shrinkage=self.shrinkage)
        return ClassGaussians.fit(x, y, classes=len(data.classes), shrinkage=self.shrinkage)

    def descent(self) -> Descent:
        """The search it runs."""
        constraint: Constraint = box() if self.radius is None else both(l2_ball(self.radius), box())
        return Descent(self.steps, self.step_size, DIRECTIONS[self.direction], constraint, self.noise)

    def __call__(
        self,
        model: nn.Module,
        y: Tensor,
        seeds: Tensor,
        *,
        generator: torch.Generator | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of classes ``y (B,)``, from ``seeds`` of the same shape."""
        with searching(model) as f:
            return self.descent()(self.energy(f, y), seeds, generator=generator, observe=observe)


@dataclass(frozen=True)
class TA(Sampler):
    """Targeted attack, Santurkar et al. (2019), CEM eq. 7: descends ``E(y|x) = E(x, y) - E(x)``."""

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """``-log p(y|x)``."""
        return lambda x: energies.conditional(f(x), y)


@dataclass(frozen=True)
class CS(Sampler):
    """Conditional sampling, CEM section 4.1, JEAT eq. 17: descends ``E(x, y)``, without TA's pull off ``E(x)``."""

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """``-f_y(x)``."""
        return lambda x: energies.joint(f(x), y)


@dataclass(frozen=True)
class Ascent(Sampler):
    """Ascent on a critic's f from outside images, Binary-AT eq. 8: descends ``E(x) = -f(x)`` in unit steps.

    The authors take 32 steps of 0.2 from test images of their p0 for CIFAR-10.  There are no classes.
    """

    steps: int = 32
    step_size: float = 0.2
    start: Literal["class", "global", "noise", "outside"] = "outside"

    conditional: ClassVar[bool] = False
    cites: ClassVar[tuple[str, ...]] = ("binary-at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "class":
            raise UserError("a critic has no classes; start from outside, global or noise")

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """``-f(x)``, whatever ``y``."""
        return lambda x: energies.binary(f(x))
