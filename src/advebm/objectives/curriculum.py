"""A search that gets longer as the model learns to see through it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advebm.errors import UserError


@dataclass
class Level:
    """Where a stream stands in a curriculum: its steps, since when, and the latest AUROCs with their times."""

    steps: int
    since: int = 0  # images seen when the steps took this value
    at: list[int] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def state_dict(self) -> dict[str, int | list[int] | Tensor]:
        """What a checkpoint keeps."""
        seen = torch.stack(self.seen).cpu() if self.seen else torch.empty(0)
        return {"steps": self.steps, "since": self.since, "at": self.at, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a checkpoint's."""
        self.steps, self.since, self.at = state["steps"], state["since"], list(state["at"])
        self.seen = list(state["seen"].unbind())


@dataclass(frozen=True)
class Curriculum:
    """K search steps, one more once data and negatives are told apart: algorithm 2 of Yin et al. (2022).

    As in the authors' code and in that of DAT, the mean AUROC of the latest steps decides.  Each stream climbs by its
    own, so that results do not depend on the number of processes.

    Attributes:
        start: K at first.
        steps: the largest K.
        gate: K grows when the mean AUROC over the window reaches this.
        window: images that the mean is over, of all streams; K stays at least that long.
        images_per_step: K grows after so many images whatever the AUROC; 0 for never.
    """

    start: int = 0
    steps: int = 25
    gate: float = 0.8
    window: int = 1000
    images_per_step: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.steps:
            raise UserError(f"a curriculum starts with 0 to {self.steps} steps, its largest number, got {self.start}")
        if not 0 < self.gate <= 1:
            raise UserError(f"gate is an AUROC in (0, 1], got {self.gate}")
        if self.window < 1 or self.images_per_step < 0:
            got = f"{self.window} and {self.images_per_step}"
            raise UserError(f"window is at least 1 and images_per_step at least 0, got {got}")

    def init(self) -> Level:
        """The first level."""
        return Level(self.start)

    def after(self, level: Level, separation: Tensor, images: int) -> None:
        """Note a step's AUROC (0-d) after ``images``, and move the level on when it is time."""
        if level.steps == self.steps:
            return
        level.at, level.seen = [*level.at, images], [*level.seen, separation.detach()]
        old = sum(images - at >= self.window for at in level.at)
        level.at, level.seen = level.at[old:], level.seen[old:]
        spent = images - level.since
        late = 0 < self.images_per_step <= spent
        if late or (spent >= self.window and self._mean(level) >= self.gate):
            level.steps, level.since = level.steps + 1, images

    @staticmethod
    def _mean(level: Level) -> float:
        latest = level.seen[-1]  # a checkpoint brings the others back on the host
        return torch.stack([reading.to(latest) for reading in level.seen]).mean().item()


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """Probability that an energy of ``outside (M,)`` is above one of ``inside (N,)``, ties counted half; 0-d.

    As :func:`advebm.metrics.ood.auroc`, but on the device; numbers that are not finite are left for the loop to find.
    """
    return (outside.detach()[:, None] - inside.detach()).sign().mean() / 2 + 0.5
