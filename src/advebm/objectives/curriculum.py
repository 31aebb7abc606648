"""A search that gets longer as the model learns to see through it."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advebm.core.errors import UserError


@dataclass
class Level:
    """Where a stream stands in a curriculum: its steps, since when, and the latest readings with their times."""

    steps: int
    largest: int
    since: int = 0  # images seen when the steps took this value
    at: list[int] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)  # (R,) each, the AUROC first
    warned: bool = False  # of a critic that wins

    def note(self, readings: Tensor, images: int) -> None:
        """Remember a step's readings (R,), the AUROC first, taken after ``images``."""
        self.at, self.seen = [*self.at, images], [*self.seen, readings.detach()]

    def mean(self) -> list[float]:
        """Of each of the latest readings."""
        latest = self.seen[-1]  # a checkpoint brings the others back on the host
        return torch.stack([readings.to(latest) for readings in self.seen]).mean(0).tolist()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        seen = torch.stack(self.seen).cpu() if self.seen else torch.empty(0)
        return {"steps": self.steps, "since": self.since, "at": self.at, "seen": seen, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a checkpoint's."""
        self.steps, self.since, self.at, self.warned = (state[name] for name in ("steps", "since", "at", "warned"))
        self.seen = list(state["seen"].unbind())


@dataclass(frozen=True)
class Curriculum:
    """K search steps, one more once data and negatives are told apart: algorithm 2 of Yin et al. (2022).

    As in the authors' code and in that of DAT, the mean AUROC of the latest steps decides.  Each stream climbs by its
    own, so that results do not depend on the number of processes.

    Attributes:
        steps: the largest K.
        start: K at first; as large as ``steps``, K is fixed.
        gate: K grows when the mean AUROC over the window exceeds this; none for no gate.
        window: images that the mean is over, of all streams; K stays at least that long.
        images_per_step: K grows after so many images whatever the AUROC; none for the gate alone.
    """

    steps: int = 25
    start: int = 0
    gate: float | None = 0.8
    window: int = 1000
    images_per_step: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.steps:
            raise UserError(f"K grows from start to steps, 0 <= start <= steps, got {self.start} and {self.steps}")
        if self.start < self.steps and self.gate is None and self.images_per_step is None:
            raise UserError("K would never grow: give gate or images_per_step, or set start to steps")
        if self.gate is not None and not 0 <= self.gate < 1:
            raise UserError(f"gate is an AUROC in [0, 1) or none, got {self.gate}")
        if self.window < 1 or (self.images_per_step is not None and self.images_per_step < 1):
            raise UserError(
                f"window and images_per_step are at least 1 image, got {self.window} and {self.images_per_step}"
            )

    def init(self) -> Level:
        """The first level."""
        return Level(self.start, self.steps)

    def advance(self, level: Level, images: int) -> None:
        """Before a step: forget what is older than the window, and move the level on when it is time."""
        old = sum(images - at > self.window for at in level.at)
        level.at, level.seen = level.at[old:], level.seen[old:]
        if level.steps == self.steps:
            return
        spent = images - level.since
        won = self.gate is not None and spent >= self.window and bool(level.seen) and level.mean()[0] > self.gate
        late = self.images_per_step is not None and spent >= self.images_per_step
        if won or late:
            level.steps, level.since = level.steps + 1, images

    def means(self, images: int, batch: int) -> tuple[float, float]:
        """The least and the most that K can be on average over ``images``, whole steps of ``batch`` of them."""
        stays = (self.images_per_step, None if self.gate is None else self.window)
        late, won = (math.inf if stay is None else math.ceil(stay / batch) * batch for stay in stays)

        def mean(stay: float) -> float:
            climbs = range(1, self.steps - self.start + 1)
            return self.start + sum(max(images - climb * stay, 0) for climb in climbs) / images

        return mean(late), mean(min(late, won))


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """Probability that an energy of ``outside (M,)`` is above one of ``inside (N,)``, ties counted half; 0-d.

    As :func:`advebm.metrics.ood.auroc`, but on the device; numbers that are not finite are left for the loop to find.
    """
    return (outside.detach()[:, None] - inside.detach()).sign().mean() / 2 + 0.5
