"""The attack of Carlini and Wagner (2017): the smallest l2 change that causes misclassification, without a radius."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advebm.attacks.base import Adversary, AttackRun, margin
from advebm.core.errors import UserError
from advebm.descent import gradient_of, per_sample
from advebm.energies import Logits


@dataclass(frozen=True)
class CW(Adversary):
    """Carlini and Wagner's l2 attack (2017): Adam on ``‖x' - x‖² + c max(f_y - max_{k≠y} f_k, -κ)``, x' in (0, 1).

    It minimises the distance and has no radius: accuracy under it is the share of images for which it finds no
    misclassified point at all, and falls as ``c`` grows.  Never compare it with accuracy within a ball.

    Attributes:
        c: weight of misclassification relative to distance.
        kappa: margin in logits by which the other class has to win.
        steps: steps of Adam for each ``c``; the authors take 10,000.
        rate: learning rate of Adam.
        searches: number of values of ``c`` tried for each image, by bisection from ``c``; the authors take 9.
    """

    c: float = 1.0
    kappa: float = 0.0
    steps: int = 50
    rate: float = 0.01
    searches: int = 1

    eps: ClassVar[float] = math.inf
    norm: ClassVar[str] = "l2"
    cites: ClassVar[tuple[str, ...]] = ("carlini2017",)

    def __post_init__(self) -> None:
        if not (self.c > 0 and self.rate > 0 and self.kappa >= 0):
            raise UserError(f"c and rate must be > 0 and kappa >= 0, got {self.c}, {self.rate} and {self.kappa}")
        if min(self.steps, self.searches) < 1:
            raise UserError(f"steps and searches must be at least 1, got {self.steps} and {self.searches}")

    @property
    def name(self) -> str:
        """Return the name used in tables, such as ``C&W-50 l2 c=0.2``."""
        times = f" x {self.searches}" if self.searches > 1 else ""
        kappa = f" kappa={self.kappa:g}" if self.kappa else ""
        return f"C&W-{self.steps}{times} l2 c={self.c:g}{kappa}"

    def runs(self, classes: int) -> list[AttackRun]:
        """Return a single run, since each value of ``c`` depends on the result of the one before."""
        return [AttackRun("C&W", self._search, self.searches * self.steps)]

    def _search(self, f: Logits, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return the nearest misclassified points found; the images themselves where there were none."""
        nearest, distance = x.clone(), x.new_full((len(x),), torch.inf)
        c, low, high = x.new_full((len(x),), self.c), x.new_zeros(len(x)), x.new_full((len(x),), torch.inf)
        for _ in range(self.searches):
            crossed = self._descend(f, x, y, c, nearest, distance)
            low, high = torch.where(crossed, low, c), torch.where(crossed, c, high)
            c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
        return nearest

    def _descend(self, f: Logits, x: Tensor, y: Tensor, c: Tensor, nearest: Tensor, distance: Tensor) -> Tensor:
        """Run Adam; update ``nearest`` and ``distance`` in place; return which images reached the margin, bool (B,)."""
        free = torch.atanh((2 * x - 1).clamp(-1 + 1e-6, 1 - 1e-6)).requires_grad_()
        adam, crossed = torch.optim.Adam([free], lr=self.rate), torch.zeros_like(y, dtype=torch.bool)
        for _ in range(self.steps):
            with torch.enable_grad():
                x_adv = (free.tanh() + 1) / 2
                squared = (x_adv - x).square().flatten(1).sum(1)
                ahead = margin(f(x_adv), y)
                loss = squared + c * (-ahead).clamp_min(-self.kappa)
            free.grad = gradient_of(loss, free)
            with torch.no_grad():
                reached = (ahead > 0) & (ahead >= self.kappa)
                better = reached & (squared < distance)
                nearest.copy_(torch.where(per_sample(better, x), x_adv, nearest))
                distance.copy_(torch.where(better, squared, distance))
                crossed |= reached
            adam.step()
        return crossed
