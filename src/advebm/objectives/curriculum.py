"""A curriculum for the number of search steps: K grows as the model learns to tell data from negatives."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advebm.core.errors import UserError


@dataclass
class CurriculumState:
    """State of a stream's curriculum: K, since when, and the readings within the window with their times."""

    steps: int
    largest: int
    since: int = 0  # images seen when ``steps`` took its present value
    at: list[int] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)  # (R,) each, the AUROC first, on the CPU
    warned: bool = False  # whether the warning that the critic has won was given

    def note(self, readings: Tensor, images: int) -> None:
        """Record a step's readings (R,), the AUROC first; ``images`` is the number seen before the step.

        The host waits for them here, after the step was queued, rather than where the next one begins.
        """
        self.at, self.seen = [*self.at, images], [*self.seen, readings.detach().cpu()]

    def mean(self) -> list[float]:
        """Return the mean of each reading over the recorded steps, R numbers."""
        return torch.stack(self.seen).mean(0).tolist()

    def state_dict(self) -> dict[str, Any]:
        seen = torch.stack(self.seen) if self.seen else torch.empty(0)
        return {"steps": self.steps, "since": self.since, "at": self.at, "seen": seen, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.since, self.at, self.warned = (state[name] for name in ("steps", "since", "at", "warned"))
        self.seen = list(state["seen"].unbind())


@dataclass(frozen=True)
class Curriculum:
    """K search steps, one more once data and negatives are told apart: algorithm 2 of Yin et al. (2022).

    As in the authors' code and in that of DAT, the mean AUROC over recent steps decides.  Each stream has its own K and
    uses its own AUROC, so that results do not depend on the number of processes.

    Attributes:
        steps: the largest K.
        start: the first K; if equal to ``steps``, K is fixed.
        gate: K grows when the mean AUROC over the window exceeds this; None: no gate.
        window: length of the window in training images of all streams; the gate opens only after as many at one K.
        images_per_step: number of images at one K after which K grows whatever the AUROC; None: the gate alone
            decides.
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
            got = f"{self.window} and {self.images_per_step}"
            raise UserError(f"window and images_per_step must be at least 1 image, got {got}")

    def init(self) -> CurriculumState:
        return CurriculumState(self.start, self.steps)

    def advance(self, level: CurriculumState, images: int) -> None:
        """Drop readings older than the window, and raise K by one if it is due; call before each step."""
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
        """Return the smallest and largest possible mean of K over ``images`` images in batches of ``batch``."""
        stays = (self.images_per_step, None if self.gate is None else self.window)
        late, won = (math.inf if stay is None else math.ceil(stay / batch) * batch for stay in stays)

        def mean(stay: float) -> float:
            climbs = range(1, self.steps - self.start + 1)
            return self.start + sum(max(images - climb * stay, 0) for climb in climbs) / images

        return mean(late), mean(min(late, won))


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """Return the probability that an energy of ``outside (M,)`` is above one of ``inside (N,)``, ties half; 0-d.

    Like :func:`advebm.metrics.ood.auroc`, but on the device, and without a check for values that are not finite.
    """
    return (outside.detach()[:, None] - inside.detach()).sign().mean() / 2 + 0.5
