"""Adversarial training."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.modes import searching
from advebm.objectives.base import Batch, Context, Loss, Stateless
from advebm.objectives.curriculum import Curriculum, CurriculumState
from advebm.objectives.standard import check_smoothing, cross_entropy

ENERGY_STEP = Attack(eps=8 / 255, steps=1, loss="energy")


def with_step(attack: Attack, factor: float) -> Attack:
    """Return the attack with ``step_size = factor * eps``; unchanged if it has a ``step_size`` or eps is 0."""
    return attack if attack.step_size is not None or not attack.eps else replace(attack, step_size=factor * attack.eps)


def check_energy(attack: Attack) -> None:
    """Raise UserError unless the attack's loss is ``energy``, E(x, y)."""
    if attack.loss != "energy":
        raise UserError(f"this method attacks the energy, so attack.loss is energy, got {attack.loss}")


@dataclass(frozen=True)
class AT(Stateless):
    """Cross-entropy at the point of an eps-ball that maximises it, Madry et al. (2018, eq. 2.1), CEM eq. 6.

    Attributes:
        attack: the inner maximisation.
        search_mode: statistics that batch norm uses during the search: ``eval`` (running ones, as in the reference
            code) or ``train`` (those of the batch, without updating the running ones).
        smoothing: share of each label that is spread evenly over all classes in the loss, not in the search.
        images_per_step: number of training images after which the search gets one step more, from 1 to those of
            ``attack``; None: all steps from the beginning.  A ``step_size`` that is set stays the same, so that short
            searches reach less far; one of None is 2.5 eps / K.
    """

    attack: Attack = Attack(steps=7)
    search_mode: Literal["eval", "train"] = "eval"
    smoothing: float = 0.0
    images_per_step: int | None = None

    cites: ClassVar[tuple[str, ...]] = ("madry2018",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_smoothing(self.smoothing)
        if self.images_per_step is not None and (self.images_per_step < 1 or self.attack.steps == 1):
            got = f"{self.images_per_step} and attack.steps {self.attack.steps}"
            raise UserError(f"images_per_step is a number of images >= 1, for a search of several steps, got {got}")

    @property
    def curriculum(self) -> Curriculum | None:
        """How the number of steps K of the search grows; None: it does not."""
        if self.images_per_step is None:
            return None
        return Curriculum(self.attack.steps, start=1, gate=None, images_per_step=self.images_per_step)

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        return None if self.curriculum is None else self.curriculum.init()

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> Tensor:
        attack = self.inner()
        if self.curriculum is not None and isinstance(state, CurriculumState):
            self.curriculum.advance(state, ctx.images)
            attack = replace(attack, steps=state.steps)
        with searching(model, view=ctx.view, training=self.search_mode == "train") as f:
            return attack.raise_loss(f, batch.x, batch.y, ctx.generator)

    def inner(self) -> Attack:
        """Return the attack that :meth:`search` runs; subclasses override it to set a default step size."""
        return self.attack

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: Any, ctx: Context) -> Loss:
        loss = cross_entropy(model, found, batch.y, self.smoothing)
        if isinstance(state, CurriculumState):
            loss.terms["steps"] = loss.total.new_tensor(float(state.steps))
        return loss

    def adversarial(self, batch: Batch, found: Tensor) -> Tensor:
        return found


@dataclass(frozen=True)
class PreJEAT(AT):
    """AT by one step of the energy attack, JEAT algorithm 2: ``x̂`` raises E(x, y), the cross-entropy falls at ``x̂``.

    The step starts from a uniform draw in the ball.  x̂ is clamped to [0, 1], which the paper's algorithm does not do.

    Attributes:
        attack: the energy attack; ``step_size`` None: eps.
        search_mode, smoothing: see :class:`AT`.
    """

    attack: Attack = ENERGY_STEP

    cites: ClassVar[tuple[str, ...]] = ("jeat",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_energy(self.attack)

    def inner(self) -> Attack:
        return with_step(self.attack, 1.0)
