"""Adversarial training."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.modes import searching
from advebm.objectives.base import Batch, Context, Loss, Stateless
from advebm.objectives.standard import cross_entropy

ENERGY_STEP = Attack(eps=8 / 255, steps=1, loss="energy")


def with_step(attack: Attack, factor: float) -> Attack:
    """An attack whose step is ``factor`` times eps, unless it has one of its own."""
    return attack if attack.step_size is not None or not attack.eps else replace(attack, step_size=factor * attack.eps)


def check_energy(attack: Attack) -> None:
    """Refuse an attack on anything but E(x, y)."""
    if attack.loss != "energy":
        raise UserError(f"this method attacks the energy, so attack.loss is energy, got {attack.loss}")


@dataclass(frozen=True)
class AT(Stateless):
    """Cross-entropy at the point of an eps-ball that maximises it, Madry et al. (2018, eq. 2.1), CEM eq. 6.

    Attributes:
        attack: the inner maximisation.
        search_mode: batch norm during the search: ``eval`` (running statistics, as the reference code does) or
            ``train`` (the batch's, moving nothing).
    """

    attack: Attack = Attack(steps=7)
    search_mode: Literal["eval", "train"] = "eval"

    cites: ClassVar[tuple[str, ...]] = ("madry2018",)

    def __post_init__(self) -> None:
        check_choices(self)

    def search(self, model: nn.Module, batch: Batch, state: None, ctx: Context) -> Tensor:
        """Adversarial images (B, C, H, W)."""
        attack = self.inner()
        with searching(model, view=ctx.view, training=self.search_mode == "train") as f:
            return attack.raise_loss(f, batch.x, batch.y, ctx.generator)

    def inner(self) -> Attack:
        """The attack that is run."""
        return self.attack

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: None, ctx: Context) -> Loss:
        """``CE(x̂, y)``."""
        return cross_entropy(model, found, batch.y)

    def adversarial(self, batch: Batch, found: Tensor) -> Tensor:
        """The images that the search moved."""
        return found


@dataclass(frozen=True)
class PreJEAT(AT):
    """AT by one step of the energy attack, JEAT algorithm 2: ``x̂`` raises E(x, y), the cross-entropy falls at ``x̂``.

    From a uniform start.  The algorithm does not clamp x̂ to [0, 1]; here it is.

    Attributes:
        attack: the energy attack; a ``step_size`` of none is eps here.
        search_mode: as for ``at``.
    """

    attack: Attack = ENERGY_STEP

    cites: ClassVar[tuple[str, ...]] = ("jeat",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_energy(self.attack)

    def inner(self) -> Attack:
        """The attack, with its step."""
        return with_step(self.attack, 1.0)
