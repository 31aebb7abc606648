"""The sampler of critics: ascent on the critic's output, as in Binary-AT."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from advebm.samplers.classifier import Langevin


@dataclass(frozen=True)
class Ascent(Langevin):
    """Ascent on a critic's f from outside images, Binary-AT eq. 8: descends ``E(x) = -f(x)`` in unit steps.

    The authors take 32 steps of 0.2 from test images of their p0 for CIFAR-10.  On a classifier it descends E(x).  A
    critic has no classes; with ``start: class`` only the seeds depend on the class.
    """

    steps: int = 32
    step_size: float = 0.2
    noise: float = 0.0
    start: Literal["class", "global", "noise", "outside", "buffer"] = "outside"

    own: ClassVar[tuple[str, ...]] = ("noise", "start")
    cites: ClassVar[tuple[str, ...]] = ("binary-at",)
