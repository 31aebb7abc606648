"""Adversarial training by one step, and the watch on its failure."""

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
class Watch:
    """What FAST remembers: when it last looked, and the robust accuracy it saw then."""

    images: int = 0
    accuracy: float = 0.0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"images": self.images, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with a checkpoint's."""
        self.images, self.accuracy = int(state["images"]), state["accuracy"]


@dataclass(frozen=True)
class FAST(AT):
    """AT by one step of 1.25 eps from a uniform start, in train mode, Wong et al. (2020), as in their code.

    One-step training can collapse within an epoch: robust to one step, not at all to several ("catastrophic
    overfitting").  So PGD accuracy on a training batch is looked at now and then, and a sudden fall stops training
    at the last checkpoint before it.

    Attributes:
        attack: of one step; a ``step_size`` of none is 1.25 eps here.
        search_mode: as for ``at``.
        watch_every: images between looks; 0 for none.
        fall: how far the accuracy may fall from one look to the next.
    """

    attack: Attack = Attack(eps=8 / 255, steps=1)
    search_mode: Literal["eval", "train"] = "train"
    watch_every: int = 10_000
    fall: float = 0.2

    cites: ClassVar[tuple[str, ...]] = ("wong2020",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watch_every < 0 or not 0 < self.fall <= 1:
            raise UserError(f"watch_every is >= 0 and fall in (0, 1], got {self.watch_every} and {self.fall}")
        if self.attack.steps != 1:
            raise UserError(f"fast is training by one step, got attack.steps {self.attack.steps}; see at for more")

    def inner(self) -> Attack:
        """The attack, with its step."""
        return with_step(self.attack, 1.25)

    def init(self, like: Tensor, generator: torch.Generator) -> Watch:
        """Nothing seen yet."""
        return Watch()

    def after(self, model: nn.Module, batch: Batch, found: Tensor, state: Watch, loss: Loss, ctx: Context) -> None:
        """Look at the batch under PGD-5 with steps of a quarter of eps, as the code does, when it is time."""
        if not self.watch_every or ctx.images - state.images < self.watch_every:
            return
        pgd = replace(self.attack, steps=5, step_size=self.attack.eps / 4)
        with searching(model) as f:
            moved = pgd.raise_loss(f, batch.x, batch.y, ctx.generator)
            with torch.no_grad():
                accuracy = ctx.mean((f(moved).argmax(1) == batch.y).float().mean()).item()
        previous, state.images, state.accuracy = state.accuracy, ctx.images, accuracy
        if previous - accuracy > self.fall:
            raise EarlyStop(
                f"accuracy under PGD-5 fell from {previous:.0%} to {accuracy:.0%}: catastrophic overfitting"
            )
