"""FAB: search for the nearest point across the decision boundary, Croce and Hein (2020)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advebm.attacks.base import Adversary, AttackRun, ball_text, check_radius, margin, runner_up_class
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.descent import lengths, per_sample, value_and_gradient
from advebm.energies import Logits
from advebm.starts import random_direction

FARTHEST = 0.1  # alpha_max of the paper: largest weight of the step that starts at the image itself
OVERSHOOT = 1.05  # eta of the paper: factor on each step to the boundary
BACK = 0.9  # beta of the paper: share of the distance from the image that is kept after a crossing


@dataclass(frozen=True)
class FAB(Adversary):
    """The targeted fast adaptive boundary attack, Croce and Hein (2020), within a radius.

    It steps to the linearised boundary between the label and one other class and stays near the image; it stops at a
    point that is misclassified within ``eps``.

    Attributes:
        eps: radius, for pixel values in [0, 1].
        norm: ``linf`` or ``l2``: the distance to be minimised.
        steps: gradient evaluations per run.
        targets: number of most likely wrong classes that it aims at in turn, capped at the number of wrong classes.
        restarts: runs for each target; all but the first start at a random point, ``eps / 2`` away before clipping.
    """

    eps: float = 8 / 255
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 100
    targets: int = 9
    restarts: int = 1

    cites: ClassVar[tuple[str, ...]] = ("croce2020minimally",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_radius(self.eps, self.norm)
        if min(self.steps, self.targets, self.restarts) < 1:
            counts = f"{self.steps}, {self.targets} and {self.restarts}"
            raise UserError(f"steps, targets and restarts must be at least 1, got {counts}")

    @property
    def label(self) -> str:
        """Return the name without the ball, such as ``FAB-T``."""
        return "FAB-T" + (f" x {self.restarts}" if self.restarts > 1 else "")

    @property
    def name(self) -> str:
        """Return the name used in tables, such as ``FAB-T 100 linf 8/255``."""
        return f"{self.label} {self.steps} {ball_text(self.eps, self.norm)}"

    def runs(self, classes: int) -> list[AttackRun]:
        return [
            AttackRun(self.label, partial(self._search, goal, start), 2 * self.steps + 1)
            for goal in range(1, min(self.targets, classes - 1) + 1)
            for start in range(self.restarts)
        ]

    def _search(self, goal: int, start: int, f: Logits, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return misclassified points within ``eps`` where the run found them, else the images themselves."""
        target, x_adv = runner_up_class(f, x, y, goal), x.clone()
        rows, point = torch.arange(len(x), device=x.device), x
        if start:
            point = (x + self.eps / 2 * random_direction(x, self.norm, generator)).clamp(0, 1)

        def margins(rows: Tensor, z: Tensor) -> Tensor:
            return margin(f(z), y[rows], target[rows])

        for _ in range(self.steps):
            origin = x[rows]
            gap, normal = value_and_gradient(partial(margins, rows), point)
            moves = onto_plane(
                torch.cat([point, origin]).flatten(1),
                normal.flatten(1).repeat(2, 1),
                torch.cat([-gap, -gap + (normal * (point - origin)).flatten(1).sum(1)]),
                self.norm,
            )
            move, origin_move = (part.view_as(point) for part in moves.chunk(2))
            near, far = (per_sample(lengths(v, self.norm).clamp_min(1e-8), point) for v in (move, origin_move))
            share = (near / (near + far)).clamp_max(FARTHEST)
            point = (1 - share) * (point + OVERSHOOT * move) + share * (origin + OVERSHOOT * origin_move)
            point = point.clamp(0, 1)
            with torch.no_grad():
                crossed = f(point).argmax(1) != y[rows]
            done = crossed & (lengths(point - origin, self.norm) <= self.eps)
            x_adv[rows[done]] = point[done]
            point = torch.where(per_sample(crossed, point), origin + BACK * (point - origin), point)[~done]
            rows = rows[~done]
            if len(rows) == 0:
                break
        return x_adv


def onto_plane(x: Tensor, w: Tensor, gap: Tensor, norm: str) -> Tensor:
    """Return the shortest move (B, D) with ``w · move = gap`` that keeps ``x (B, D)`` in [0, 1]; ``gap`` is (B,).

    Every coordinate moves by ``min(λ r, room)`` with one λ per row, and r = 1 for linf, abs(w) for l2.  The resulting
    ``w · move`` is concave and piecewise linear in λ, so Newton's method from 0 finds λ in finitely many steps and
    never overshoots, without sorting.  If the plane misses the box, the move ends in the corner nearest to it.
    """
    room = torch.where(w * gap[:, None] > 0, 1 - x, x)
    weight, distance = w.abs(), gap.abs()
    rate = torch.ones_like(w) if norm == "linf" else weight
    factor, steps = torch.zeros_like(gap), weight * rate
    for _ in range(x.shape[1] + 1):
        scaled = factor[:, None] * rate
        missing = distance - (weight * torch.minimum(scaled, room)).sum(1)
        slope = (steps * (scaled < room)).sum(1)
        increase = torch.where(slope > 0, missing / slope, torch.inf)  # no coordinate can move: go to the corner
        unfinished = (missing > 1e-6 * distance) & torch.isfinite(factor)
        if not unfinished.any():
            break
        factor = torch.where(unfinished, factor + increase, factor)
    size = torch.where(rate > 0, torch.minimum(factor[:, None] * rate.clamp_min(1e-30), room), 0)
    return size * w.sign() * gap.sign()[:, None]
