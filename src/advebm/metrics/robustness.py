"""Accuracy, clean and under attack."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from advebm.attacks.base import Adversary
from advebm.attacks.projected import Attack, Targeted
from advebm.core import config, rng
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.metrics.base import Record, Subject, proportion
from advebm.metrics.verdicts import Verdicts, find_verdicts
from advebm.models.precision import Precision, precision_label


def measure_accuracy(
    subject: Subject, attack: Adversary | None, generator: torch.Generator
) -> tuple[float, float, int]:
    """Return accuracy on the subject's split, under attack if one is given, its standard error and the image count."""
    return proportion(attack_split(subject, Attack(eps=0.0) if attack is None else attack, generator).standing())


def check_image_count(images: int | None) -> None:
    """Raise UserError if ``images`` is below 1.  None is allowed and means all images."""
    if images is not None and images < 1:
        raise UserError(f"images must be at least 1, or none for all, got {images}")


def random_subset(subject: Subject, images: int | None) -> Subject:
    """Limit the subject to ``images`` random images of its split, the same ones at every call.  None: all."""
    if images is None or images >= len(subject.split):
        return subject
    rows = rng.fixed_permutation(len(subject.split))[:images]
    return subject._replace(split=subject.split.take(rows.sort().values))


def attack_split(
    subject: Subject, attack: Adversary, generator: torch.Generator, precision: Precision = "float32"
) -> Verdicts:
    subject.check_labelled()
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    split = subject.split
    options: dict[str, Any] = {"batch": subject.batch, "folder": subject.folder, "team": subject.team}
    options |= {"seed": seed, "precision": precision}
    with subject.bar(attack.name if attack.eps > 0 else "accuracy", len(split)) as tell:
        return find_verdicts(subject.model, split.x, split.y, attack, tell=tell, **options)


@dataclass(frozen=True)
class Accuracy:
    """Share of clean images that are classified as labelled."""

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        return [Record("accuracy", *measure_accuracy(subject, None, generator))]


@dataclass(frozen=True)
class RobustAccuracy:
    """Share of images that stay right under an attack of the threat model.

    The result is only an upper bound on the accuracy against a perfect attacker, loose for projected gradient descent,
    close for AutoAttack.  An image counts as right only if every run of the attack fails on it.

    Attributes:
        attack: the attack.  None: the recipe's ``threat``.
        precision: of the attack's search, ``float32`` or ``bfloat16``; its result is always judged in float32.
        images: number of images of the split, drawn at random, always the same ones.  None: all.
    """

    attack: Adversary | None = None
    precision: Precision = "float32"
    images: int | None = None

    cites: ClassVar[tuple[str, ...]] = ("madry2018",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_image_count(self.images)

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return ``accuracy under`` the attack; for an attack made of several, also after each but the last."""
        attack = self.attack or subject.threat
        verdicts = attack_split(random_subset(subject, self.images), attack, generator, self.precision)
        label = precision_label(self.precision, subject.device)
        settings: dict[str, Any] = {"attack": config.describe(attack), "precision": label}
        settings |= {"fast": verdicts.fast, "images": self.images}
        records = [_record(f"accuracy under {attack.name}", verdicts.standing(), settings)]
        for count, part in enumerate(verdicts.attacks[:-1], 1):
            name = f"accuracy under {attack.name}, after {part}"
            records.append(_record(name, verdicts.standing(count), {**settings, "part": part}))
        return records


@dataclass(frozen=True)
class TargetedAccuracy:
    """Share of images that stay right under an attack towards a random other class, CEM section 4.1.

    A targeted attack descends ``E(x, t) - E(x)``, so it also raises E(x), which the untargeted attack lowers.

    Attributes:
        attack: the attack.  None: the recipe's ``threat``.
        images: as for ``robust-accuracy``.
    """

    attack: Attack | None = None
    images: int | None = None

    cites: ClassVar[tuple[str, ...]] = ("cem-workshop", "madry2018")

    def __post_init__(self) -> None:
        check_image_count(self.images)

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        attack = self.attack or subject.threat
        verdicts = attack_split(random_subset(subject, self.images), Targeted(attack), generator)
        settings = {"attack": config.describe(attack), "targeted": True, "fast": verdicts.fast, "images": self.images}
        return [_record(f"accuracy under targeted {attack.name}", verdicts.standing(), settings)]


@dataclass(frozen=True)
class RobustnessCurve:
    """Robust accuracy over several radii, with the threat's norm and steps.

    Attributes:
        factors: radii as multiples of the threat's eps; 1 would repeat ``robust-accuracy``.
    """

    factors: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) < 0:
            raise UserError(f"factors are multiples >= 0 of the threat's eps, got {self.factors}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        records = []
        for attack in dict.fromkeys(_scale(subject.threat, factor) for factor in self.factors):
            verdicts = attack_split(subject, attack, generator)
            settings = {"attack": config.describe(attack), "fast": verdicts.fast}
            records.append(_record(f"accuracy under {attack.name}", verdicts.standing(), settings))
        return records


def _scale(attack: Attack, factor: float) -> Attack:
    """Multiply radius and step size (if given) by a factor; linf radii are capped at 1, a ball of all images."""
    eps = attack.eps * factor if attack.norm == "l2" else min(attack.eps * factor, 1.0)
    step = None if attack.step_size is None else attack.step_size * factor
    return replace(attack, eps=eps, step_size=step or None)


def _record(name: str, hits: Tensor, settings: Mapping[str, Any]) -> Record:
    return Record(name, *proportion(hits), {**settings, "interval": wilson(hits)})


def wilson(hits: Tensor, z: float = 1.96) -> list[float]:
    """Return the interval of Wilson (1927) for a share, 95 % by default; it stays within [0, 1] even at 0 or 1."""
    p, _, n = proportion(hits)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]
