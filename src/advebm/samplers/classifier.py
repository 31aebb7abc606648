"""Samplers of classifiers: TA, CS, RCS, Langevin dynamics, those of JEAT, and SGLD."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from advebm import energies
from advebm.descent import Energy
from advebm.energies import Logits
from advebm.samplers.base import Sampler, marginal


@dataclass(frozen=True)
class TA(Sampler):
    """Targeted attack, Santurkar et al. (2019), CEM eq. 7: descends ``E(y|x) = E(x, y) - E(x)``."""

    def energy(self, f: Logits, y: Tensor) -> Energy:
        return lambda x: energies.conditional(f(x), y)


@dataclass(frozen=True)
class CS(Sampler):
    """Conditional sampling, CEM section 4.1, JEAT eq. 17: descends ``E(x, y)``, without TA's pull off ``E(x)``."""

    def energy(self, f: Logits, y: Tensor) -> Energy:
        return lambda x: energies.joint(f(x), y)


@dataclass(frozen=True)
class RCS(Sampler):
    """Reinforced conditional sampling: descends ``E(x, y) + λ E(x)``, which adds the pull that TA takes away.

    CEM's slides report it without a formula; this one is inferred from the name.  TA has λ = -1, CS has λ = 0.

    Attributes:
        weight: λ.  The other attributes are those of :class:`Sampler`.
    """

    weight: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("cem-slides",)

    def energy(self, f: Logits, y: Tensor) -> Energy:
        def weighted_sum(x: Tensor) -> Tensor:
            logits = f(x)
            return energies.joint(logits, y) + self.weight * energies.marginal(logits)

        return weighted_sum


@dataclass(frozen=True)
class Langevin(Sampler):
    """CEM's Langevin sampling: descends ``E(x)`` with noise, by the same protocol; classes come from seeds alone.

    Exact Langevin dynamics is ``direction: raw, noise: 0, temperature: 1``.  Critics can be sampled as well.
    """

    noise: float = 0.01

    conditional: ClassVar[bool] = False
    own: ClassVar[tuple[str, ...]] = ("noise",)

    def energy(self, f: Logits, y: Tensor) -> Energy:
        return marginal(f)


@dataclass(frozen=True)
class Dynamics(Sampler):
    """Langevin dynamics of JEAT: raw steps of η/2 (``step_size``) and noise √η; the paper gives neither η nor K.

    Abstract, like :class:`Sampler`.
    """

    steps: int = 100
    step_size: float = 1e-4
    direction: Literal["unit", "raw", "sign", "adam"] = "raw"
    temperature: float | None = 1.0

    own: ClassVar[tuple[str, ...]] = ("steps", "step_size", "noise", "direction", "momentum", "temperature")
    cites: ClassVar[tuple[str, ...]] = ("jeat",)


@dataclass(frozen=True)
class JEAT16(Dynamics, TA):
    """JEAT eq. 16: ``x ← x - η/2 ∇(E(x, y) - E(x)) + √η ε``: TA's energy by Langevin dynamics."""


@dataclass(frozen=True)
class JEAT17(Dynamics, CS):
    """JEAT eq. 17: ``x ← x - η/2 ∇E(x, y) + √η ε``: Langevin dynamics on the joint energy."""


@dataclass(frozen=True)
class SGLD(Langevin):
    """``x ← x - α ∇E(x) + η ε`` from noise, or with ``start: buffer`` from the chains of training.

    The settings are those of JEM (Grathwohl et al., 2020) converted to images in [0, 1], see
    :class:`advebm.objectives.langevin.SGLD`; the noise is far smaller than in Langevin dynamics.
    """

    steps: int = 20
    step_size: float = 0.25
    noise: float = 0.005
    direction: Literal["unit", "raw", "sign", "adam"] = "raw"
    start: Literal["class", "global", "noise", "outside", "buffer"] = "noise"

    own: ClassVar[tuple[str, ...]] = (*Dynamics.own, "start")
    cites: ClassVar[tuple[str, ...]] = ("grathwohl2020",)
