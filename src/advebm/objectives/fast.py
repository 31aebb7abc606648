"""Adversarial training by a single step, with a monitor that detects its collapse."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.core.errors import EarlyStop, UserError
from advebm.models.modes import searching
from advebm.objectives.at import AT, with_step
from advebm.objectives.base import Batch, Context, Loss


@dataclass
class CollapseMonitor:
    """State of FAST's monitor: the images seen at the last check, and the robust accuracy measured then."""

    images: int = 0
    accuracy: float = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"images": self.images, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.images, self.accuracy = int(state["images"]), state["accuracy"]


@dataclass(frozen=True)
class FAST(AT):
    """AT by one step of 1.25 eps from a uniform start, in train mode, Wong et al. (2020), as in their code.

    One-step training can collapse within an epoch: the network stays robust to one step but not to several
    ("catastrophic overfitting").  So accuracy under PGD is measured on a training batch at intervals, and a sudden fall
    stops training at the last checkpoint before it.

    Attributes:
        attack: the one-step attack; ``step_size`` None: 1.25 eps.
        search_mode: see :class:`AT`.
        watch_every: number of images between checks; 0: no checks.
        fall: largest fall of the accuracy from one check to the next, as a share.
    """

    attack: Attack = Attack(eps=8 / 255, steps=1)
    search_mode: Literal["eval", "train"] = "train"
    watch_every: int = 10_000
    fall: float = 0.2

    cites: ClassVar[tuple[str, ...]] = ("wong2020",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watch_every < 0 or not 0 < self.fall <= 1:
            raise UserError(f"watch_every must be >= 0 and fall in (0, 1], got {self.watch_every} and {self.fall}")
        if self.attack.steps != 1:
            raise UserError(f"fast is training by one step, got attack.steps {self.attack.steps}; see at for more")

    def inner(self) -> Attack:
        return with_step(self.attack, 1.25)

    def init(self, like: Tensor, generator: torch.Generator) -> CollapseMonitor:
        return CollapseMonitor()

    def after(
        self, model: nn.Module, batch: Batch, found: Tensor, state: CollapseMonitor, loss: Loss, ctx: Context
    ) -> None:
        """Check accuracy under PGD-5 (step eps / 4, as in the code); raise EarlyStop if it fell by over ``fall``."""
        if not self.watch_every or ctx.images - state.images < self.watch_every:
            return
        pgd = replace(self.attack, steps=5, step_size=self.attack.eps / 4)
        with searching(model) as f:
            x_adv = pgd.raise_loss(f, batch.x, batch.y, ctx.generator)
            with torch.no_grad():
                accuracy = ctx.mean((f(x_adv).argmax(1) == batch.y).float().mean()).item()
        previous, state.images, state.accuracy = state.accuracy, ctx.images, accuracy
        if previous - accuracy > self.fall:
            raise EarlyStop(
                f"accuracy under PGD-5 fell from {previous:.0%} to {accuracy:.0%}: catastrophic overfitting"
            )
