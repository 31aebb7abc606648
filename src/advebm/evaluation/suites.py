"""Suites: the metrics that a paper or benchmark reports, in three tiers of length."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.cw import CW
from advebm.attacks.projected import Attack
from advebm.core.errors import unknown_name
from advebm.metrics.base import Metric
from advebm.metrics.calibration import Calibration
from advebm.metrics.corruption import CorruptionAccuracy
from advebm.metrics.detectors import Detectors
from advebm.metrics.energy import Energies
from advebm.metrics.ood import OutOfDistribution
from advebm.metrics.quality import SampleQuality
from advebm.metrics.robustness import Accuracy, RobustAccuracy, TargetedAccuracy

Tier = Literal["quick", "standard", "full"]


@dataclass(frozen=True)
class Extent:
    """The sizes that determine how long a suite takes.

    Attributes:
        version: version of AutoAttack.
        images: number of images to attack.  None: all.
        outliers: number of images of each set, and of the data, for detection metrics.
        restarts: restarts of PGD and the energy attack in ``jeat``, and of the worst case of detection.
    """

    version: Literal["quick", "standard", "full"]
    images: int | None
    outliers: int
    restarts: int


TIERS: Mapping[str, Extent] = MappingProxyType(
    {
        "quick": Extent("quick", 512, 256, 1),
        "standard": Extent("standard", None, 1024, 5),
        "full": Extent("full", None, 1024, 10),
    }
)


def robustbench(threat: Attack, extent: Extent) -> tuple[Metric, ...]:
    """Return clean and AutoAttack accuracy, as the RobustBench leaderboard reports them."""
    return Accuracy(), _robust_accuracy(AutoAttack(threat.eps, threat.norm, extent.version), extent)


def jeat(threat: Attack, extent: Extent) -> tuple[Metric, ...]:
    """Return PGD-50, energy attack, C&W with c = 0.2, AutoAttack and sample quality, JEAT section 4.1.

    Clean accuracy and energies are added.
    """
    pgd = replace(threat, loss="cross-entropy", steps=50, step_size=threat.eps / 4 or None, restarts=extent.restarts)
    cw = RobustAccuracy(CW(c=0.2), images=extent.images)  # C&W has no restarts
    attacks = (_robust_accuracy(pgd, extent), _robust_accuracy(replace(pgd, loss="energy"), extent), cw)
    clean, auto = robustbench(threat, extent)
    return (clean, *attacks, auto, SampleQuality(), Energies())


def cem(threat: Attack, extent: Extent) -> tuple[Metric, ...]:
    """Return clean accuracy, the threat untargeted and targeted, sample quality and energies, CEM section 4."""
    return (
        Accuracy(),
        _robust_accuracy(threat, extent),
        TargetedAccuracy(images=extent.images),
        SampleQuality(),
        Energies(),
    )


def binary_at(threat: Attack, extent: Extent) -> tuple[Metric, ...]:
    """Return sample quality, and detection, clean and in the worst case, as Binary-AT reports them."""
    return SampleQuality(), OutOfDistribution(count=extent.outliers, restarts=extent.restarts)


def everything(threat: Attack, extent: Extent) -> tuple[Metric, ...]:
    """Return the metrics of all other suites, detectors, calibration and accuracy under corruptions."""
    metrics = (*jeat(threat, extent), *cem(threat, extent), *binary_at(threat, extent))
    return (*dict.fromkeys(metrics), Detectors(count=extent.outliers), Calibration(), CorruptionAccuracy())


SUITES: Mapping[str, Callable[[Attack, Extent], tuple[Metric, ...]]] = MappingProxyType(
    {"robustbench": robustbench, "jeat": jeat, "cem": cem, "binary-at": binary_at, "all": everything}
)


def suite(name: str, threat: Attack, tier: str = "standard") -> tuple[Metric, ...]:
    """Return the metrics of a suite.

    Args:
        name: ``robustbench``, ``jeat``, ``cem``, ``binary-at`` or ``all``.
        threat: threat model; gives the ball of the attacks.
        tier: ``quick`` (512 images, AutoAttack's first two attacks), ``standard``, or ``full`` (more restarts).
    """
    if name not in SUITES:
        raise unknown_name("suite", name, SUITES)
    if tier not in TIERS:
        raise unknown_name("tier", tier, TIERS)
    return SUITES[name](threat, TIERS[tier])


def _robust_accuracy(attack: Attack | AutoAttack, extent: Extent) -> RobustAccuracy:
    return RobustAccuracy(attack, images=extent.images)
