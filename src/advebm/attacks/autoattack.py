"""AutoAttack: attacks without parameters to tune, run one after the other, Croce and Hein (2020)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from advebm.attacks.apgd import APGD
from advebm.attacks.base import Adversary, AttackRun, ball_text, check_radius
from advebm.attacks.fab import FAB
from advebm.attacks.square import Square
from advebm.core.config import check_choices


@dataclass(frozen=True)
class AutoAttack(Adversary):
    """AutoAttack, Croce and Hein (2020): each attack sees the points that those before it left standing.

    ``standard`` runs APGD-CE, APGD-T (nine targets), FAB-T (nine targets) and Square with 5,000 queries, as the authors
    and RobustBench do.  ``quick`` stops after APGD-T; for most networks the result is decided by then, and robust
    accuracy under ``quick`` is an upper bound on that under ``standard``.  ``full`` is ``standard`` with five restarts
    of APGD-CE and FAB-T, plus five of APGD-DLR.  ``rand`` runs APGD-CE and APGD-DLR with gradients averaged over 20
    passes, for randomised networks.  With too few classes for a loss (DLR needs three, targeted DLR four) the margin
    replaces it.

    Attributes:
        eps: radius, for pixel values in [0, 1].
        norm: ``linf`` or ``l2``.
        version: ``quick``, ``standard``, ``full`` or ``rand``.
    """

    eps: float = 8 / 255
    norm: Literal["linf", "l2"] = "linf"
    version: Literal["quick", "standard", "full", "rand"] = "standard"

    cites: ClassVar[tuple[str, ...]] = ("croce2020reliable", "croce2020minimally", "andriushchenko2020")

    def __post_init__(self) -> None:
        check_choices(self)
        check_radius(self.eps, self.norm)

    @property
    def name(self) -> str:
        """Return the name used in tables, ``AutoAttack linf 8/255``; it includes any version but ``standard``."""
        version = "" if self.version == "standard" else f" {self.version}"
        return f"AutoAttack{version} {ball_text(self.eps, self.norm)}"

    def attacks(self, classes: int) -> list[Adversary]:
        """Return the attacks on a classifier of ``classes`` classes, in the order in which they run."""
        eps, norm = self.eps, self.norm
        dlr = APGD(eps, norm, loss="dlr" if classes > 2 else "margin")
        targeted = APGD(eps, norm, loss="targeted-dlr" if classes > 3 else "margin")
        match self.version:
            case "quick":
                return [APGD(eps, norm), targeted]
            case "standard":
                return [APGD(eps, norm), targeted, FAB(eps, norm), Square(eps, norm)]
            case "full":
                strong = [APGD(eps, norm, restarts=5), replace(dlr, restarts=5)]
                return [*strong, targeted, FAB(eps, norm, restarts=5), Square(eps, norm)]
            case "rand":
                return [APGD(eps, norm, samples=20), replace(dlr, samples=20)]

    def runs(self, classes: int) -> list[AttackRun]:
        return [run for attack in self.attacks(classes) for run in attack.runs(classes)]
