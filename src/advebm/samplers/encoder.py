"""Samplers of encoders, whose energies compare features of images: NP-Langevin, NP-PGD and MaxEnt."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.sources import Data, to_float
from advebm.descent import Energy
from advebm.energies import Logits
from advebm.models.modes import using
from advebm.samplers.base import Sampler, cycle_negatives


@dataclass(frozen=True)
class OfEncoder(Sampler):
    """Base of samplers of an encoder g, by ``f(x, z) = g(x)·z / τ`` of NP-CEM, CEM section 4.2; abstract.

    Labels do not enter the gradient.  ``start: global`` is CEM's unconditional sampling, ``start: class`` its
    conditional sampling, where only the seeds depend on the class.

    Attributes:
        tau: τ; None: that of the recipe's objective, or 0.5 (ACL's) without a recipe.
        cosine: whether features are compared by cosine similarity, as SimCLR and ACL train, or by the plain product, as
            in CEM; None: as in the recipe's objective, or cosine without a recipe.
        branch: branch of dual batch norms: ``clean`` or ``adversarial``; None: the one that the recipe's objective
            attacks, which for ``acl`` is the adversarial one (the robust encoder), or ``adversarial`` without a recipe.
        group: largest number of samples that interact, for samplers whose samples do.  Image i goes to group i modulo
            the number of groups, so that group sizes differ by at most one and the classes of seeds mix.
    """

    start: Literal["class", "global", "noise", "outside", "buffer"] = "global"
    tau: float | None = None
    cosine: bool | None = None
    branch: Literal["clean", "adversarial"] | None = None
    group: int = 100

    conditional: ClassVar[bool] = False
    encoder: ClassVar[bool] = True
    cites: ClassVar[tuple[str, ...]] = ("cem-workshop", "jiang2020")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not self.tau > 0:
            raise UserError(f"tau must be > 0, got {self.tau}; none takes the objective's")
        if self.group < 2:
            raise UserError(f"samples interact in groups of at least 2, got group {self.group}")

    def trained_by(self, objective: Any) -> Sampler:
        """Return a copy with the objective's temperature, ``cosine`` and branch where this sampler's are None."""
        tau = getattr(objective, "temperature", None) if self.tau is None else self.tau
        cosine = getattr(objective, "cosine", None) if self.cosine is None else self.cosine
        return replace(self, tau=tau, cosine=cosine, branch=self.branch or getattr(objective, "branch", None))

    @property
    def alike(self) -> dict[str, Any]:
        """Keyword arguments ``temperature`` and ``cosine`` of the similarity f."""
        return {"temperature": 0.5 if self.tau is None else self.tau, "cosine": self.cosine is not False}

    def __call__(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        with using(model, self.branch or "adversarial"):
            return super().__call__(model, *args, **options)

    def parts(self, count: int, batch: int | None) -> list[slice]:
        """Return one slice per group if samples interact, else as :class:`Sampler`.

        Raises:
            UserError: there is a single sample, or ``batch`` is smaller than a group.
        """
        if not self.coupled:
            return super().parts(count, batch)
        name = type(self).__name__
        if count < 2:
            raise UserError(f"samples of {name} interact, and one is left alone; draw another number of images")
        groups = min(math.ceil(count / self.group), count // 2)
        if batch is not None and batch < (largest := math.ceil(count / groups)):
            raise UserError(
                f"samples of {name} interact in groups of {largest}, and batch {batch} holds no group; "
                "raise --batch, or lower --sampler.group, which draws other samples"
            )
        return [slice(first, None, groups) for first in range(groups)]


@dataclass(frozen=True)
class MaxEnt(OfEncoder):
    """MaxEnt of CEM's slides: raises the entropy of a group's features, descending ``log Σ_{j≠i} exp f(x_i, g(x_j))``.

    The slides name it without a formula.  Here the entropy is estimated from the similarities within a group, and the
    gradient flows through all features.  With ``negatives: batch`` np-langevin moves samples in the opposite direction,
    towards one another.  The workshop paper prints the same numbers for its Langevin, here np-langevin.
    """

    noise: float = 0.01

    own: ClassVar[tuple[str, ...]] = ("noise",)
    cites: ClassVar[tuple[str, ...]] = ("cem-slides", "jiang2020")

    @property
    def coupled(self) -> bool:
        return True

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        return lambda x: energies.crowding(f(x), **self.alike)


@dataclass(frozen=True)
class Contrasting(OfEncoder):
    """Base of samplers whose energy contains negatives ``z_k``, k = 1 … K; abstract.

    Attributes:
        negatives: source of the z_k: features of training images, the same for all samples and steps (``bank``) or
            drawn anew at each step (``data``); or current features of the other samples of the group, without gradient
            (``batch``).
        count: K for ``bank`` and ``data``.
    """

    negatives: Literal["bank", "data", "batch"] = "bank"
    count: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise UserError(f"count must be at least 1, got {self.count}")

    @property
    def coupled(self) -> bool:
        return self.negatives == "batch"

    @property
    def extendable(self) -> bool:
        return super().extendable and self.negatives != "data"  # all draws of negatives come before the first step

    def bank(self, data: Data) -> Tensor | None:
        """Return all training images (``data``), ``count`` of them, always the same ones (``bank``), or None."""
        if self.coupled:
            return None
        if self.count > len(data.train):
            raise UserError(
                f"{type(self).__name__} takes {self.count} negatives from the training images, {data.name} has "
                f"{len(data.train)}; lower --sampler.count"
            )
        if self.negatives == "data":
            return data.train.x
        return data.train.x[rng.fixed_permutation(len(data.train))[: self.count]]

    @torch.no_grad()
    def contrast(
        self, f: Logits, bank: Tensor | None, like: Tensor, generator: torch.Generator | None, batch: int
    ) -> Tensor | None:
        """Return features of the whole bank, (1, K, D), or of a draw without replacement per step, (S, K, D)."""
        if self.coupled:
            return None
        if bank is None:
            raise UserError(f"{type(self).__name__} contrasts samples with images; give what its bank(data) returns")
        sets = [torch.arange(len(bank))]
        if self.negatives == "data":
            if generator is None:
                raise ValueError("negatives are drawn at each step: give a generator")
            draw = lambda: torch.randperm(len(bank), generator=generator, device=generator.device)[: self.count].cpu()
            sets = [draw() for _ in range(self.steps)]
        encode = lambda x: f((to_float(x) if x.dtype == torch.uint8 else x).to(like))
        features = [torch.cat([encode(bank[rows]) for rows in indices.split(batch)]) for indices in sets]
        return torch.stack(features) if features else None

    def density(self, z: Tensor, negatives: Tensor | None) -> Tensor:
        """Return ``-log Σ_k exp f(x, z_k)``, (B,), for ``z (B, D)``; negatives None: the other rows of z, fixed."""
        if negatives is None:
            return -energies.crowding(z, z.detach(), **self.alike)
        return energies.marginal(energies.similarities(z, negatives, **self.alike))


@dataclass(frozen=True)
class NPLangevin(Contrasting):
    """Langevin sampling of NP-CEM, CEM eq. 10: descends ``E(x) = -log Σ_k exp f(x, z_k)``, with noise."""

    noise: float = 0.01

    own: ClassVar[tuple[str, ...]] = ("noise",)

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        sets = cycle_negatives(negatives)
        return lambda x: self.density(f(x), next(sets))


@dataclass(frozen=True)
class NPPGD(Contrasting):
    """The PGD attack on InfoNCE as a sampler, CEM eq. 11: descends ``f(x, z) - log Σ_k exp f(x, z_k)``.

    Like np-langevin it attracts samples to the negatives; the other term repels them from the anchor z, and there is no
    noise.  In training z encodes the image that the attack starts from.  A sampler has no such image (for which reason
    CEM section 4.2 expects little of it) but starts from its seed, so z is g of the seed.  The positive is not among
    the ``z_k``, as in the printed eq. 11.
    """

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        sets = cycle_negatives(negatives)
        with torch.no_grad():
            anchor = f(seeds)

        def energy(x: Tensor) -> Tensor:
            z = f(x)
            return self.density(z, next(sets)) - energies.similarity(z, anchor, **self.alike)

        return energy
