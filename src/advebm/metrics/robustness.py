"""Accuracy, clean and under attack."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from advebm import config, energies
from advebm.attacks.projected import Attack
from advebm.descent import Energy
from advebm.energies import Logits
from advebm.errors import UserError
from advebm.metrics.base import Record, Subject, proportion
from advebm.modes import searching


@torch.no_grad()
def correct(f: Logits, x: Tensor, y: Tensor) -> Tensor:
    """Which images are classified as labelled, bool (B,)."""
    return f(x).argmax(1) == y


def survives(f: Logits, x: Tensor, y: Tensor, attack: Attack, generator: torch.Generator) -> Tensor:
    """Which images are classified right, and still so after every restart of the attack, bool (B,).

    The clean image lies in the ball, so it counts as an attack too; images already broken are not attacked again.
    """
    standing = correct(f, x, y)
    once = replace(attack, restarts=1)
    for _ in range(attack.restarts if attack.eps > 0 else 0):
        left = standing.nonzero().squeeze(1)
        if len(left) == 0:
            break
        found = once(once.harm(f, y[left]), x[left], generator)
        standing[left] = correct(f, found, y[left])
    return standing


def measure(subject: Subject, attack: Attack | None, generator: torch.Generator) -> tuple[float, float, int]:
    """Share of the subject's split that is right (under attack, if there is one), with its error and count."""
    if not subject.split.labelled:
        raise UserError(f"accuracy needs labels, {subject.data.name} has none; choose --metrics without it")
    with searching(subject.model) as f:
        hits = [
            correct(f, x, y) if attack is None else survives(f, x, y, attack, generator) for x, y in subject.batches()
        ]
    return proportion(torch.cat(hits))


@dataclass(frozen=True)
class Accuracy:
    """Share of clean images that are classified as labelled."""

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """One record, ``accuracy``."""
        return [Record("accuracy", *measure(subject, None, generator))]


@dataclass(frozen=True)
class RobustAccuracy:
    """Share of images that stay right under an attack of the threat model.

    Projected gradient descent bounds the accuracy against a perfect attacker only from above.

    Attributes:
        attack: the attack; none takes the recipe's ``threat``.
    """

    attack: Attack | None = None

    cites: ClassVar[tuple[str, ...]] = ("madry2018",)

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """One record, ``accuracy under`` the attack."""
        return [_record(subject, self.attack or subject.threat, generator)]


@dataclass(frozen=True)
class TargetedAccuracy:
    """Share of images that stay right under an attack towards a random other class, CEM section 4.1.

    A targeted attack descends ``E(x, t) - E(x)``, so it also raises E(x), which the untargeted one lowers.

    Attributes:
        attack: the attack; none takes the recipe's ``threat``.
    """

    attack: Attack | None = None

    cites: ClassVar[tuple[str, ...]] = ("cem-workshop", "madry2018")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """One record, ``accuracy under targeted`` and the attack."""
        attack, classes, hits = self.attack or subject.threat, len(subject.data.classes), []
        with searching(subject.model) as f:
            for x, y in subject.batches():
                step = torch.randint(1, classes, y.shape, generator=generator, device=y.device)
                moved = attack(self._towards(f, (y + step) % classes), x, generator)
                hits.append(correct(f, x, y) & correct(f, moved, y))
        settings: dict[str, Any] = {"attack": config.describe(attack), "targeted": True}
        return [Record(f"accuracy under targeted {attack.name}", *proportion(torch.cat(hits)), settings)]

    @staticmethod
    def _towards(f: Logits, goal: Tensor) -> Energy:
        return lambda x: energies.conditional(f(x), goal)


@dataclass(frozen=True)
class RobustnessCurve:
    """Robust accuracy over several radii, with the threat's norm and steps.

    Attributes:
        factors: radii as multiples of the threat's eps; 1 is what ``robust-accuracy`` measures.
    """

    factors: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) < 0:
            raise UserError(f"factors are multiples >= 0 of the threat's eps, got {self.factors}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """A record a radius."""
        attacks = [_scaled(subject.threat, factor) for factor in self.factors]
        return [_record(subject, attack, generator) for attack in dict.fromkeys(attacks)]


def _scaled(attack: Attack, factor: float) -> Attack:
    """Another radius, in linf at most 1, where the ball holds every image; a step given in pixels grows with it."""
    eps = attack.eps * factor if attack.norm == "l2" else min(attack.eps * factor, 1.0)
    step = None if attack.step_size is None else attack.step_size * factor
    return replace(attack, eps=eps, step_size=step or None)


def _record(subject: Subject, attack: Attack, generator: torch.Generator) -> Record:
    settings: dict[str, Any] = {"attack": config.describe(attack)}
    return Record(f"accuracy under {attack.name}", *measure(subject, attack, generator), settings)
