"""Samplers of encoders, from features of images: NP-Langevin, NP-PGD and MaxEnt."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core.errors import UserError
from advebm.data.sources import Data, to_float
from advebm.descent import Energy
from advebm.energies import Logits
from advebm.models.modes import using
from advebm.samplers.base import Sampler, in_turn


@dataclass(frozen=True)
class OfEncoder(Sampler):
    """Samplers of an encoder g, by ``f(x, z) = g(x)·z / τ`` of NP-CEM, CEM section 4.2.  Abstract, as :class:`Sampler`.

    Labels never enter the gradient.  ``start: global`` is CEM's unconditional sampling, ``start: class`` its
    conditional one: by the seeds alone.

    Attributes:
        tau: τ; none takes that of the recipe's objective; 0.5, ACL's, where there is no recipe.
        cosine: whether features are compared by direction, as SimCLR and ACL train, or by the plain product, as CEM
            writes; none does as the recipe's objective, and compares directions where there is no recipe.
        branch: of dual batch norms, as ACL trains: that of ``clean`` or that of ``adversarial`` images.
        group: samples that interact, at most, where samples do.  A chunk of samples is dealt into equal groups, as one
            deals cards, so that the classes of its seeds mix.
    """

    start: Literal["class", "global", "noise", "outside", "buffer"] = "global"
    tau: float | None = None
    cosine: bool | None = None
    branch: Literal["clean", "adversarial"] = "clean"
    group: int = 100

    conditional: ClassVar[bool] = False
    encoder: ClassVar[bool] = True
    cites: ClassVar[tuple[str, ...]] = ("cem-workshop", "jiang2020")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not self.tau > 0:
            raise UserError(f"tau is > 0, got {self.tau}; none takes the objective's")
        if self.group < 2:
            raise UserError(f"samples interact in groups of at least 2, got group {self.group}")

    def trained_by(self, objective: Any) -> Sampler:
        """With the temperature and the cosine of the objective, where none are given."""
        tau = getattr(objective, "temperature", None) if self.tau is None else self.tau
        return replace(self, tau=tau, cosine=getattr(objective, "cosine", None) if self.cosine is None else self.cosine)

    @property
    def alike(self) -> dict[str, Any]:
        """How f compares features."""
        return {"temperature": 0.5 if self.tau is None else self.tau, "cosine": self.cosine is not False}

    def __call__(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        """As every sampler, on its branch."""
        with using(model, self.branch):
            return super().__call__(model, *args, **options)

    def parts(self, count: int, batch: int | None) -> list[slice]:
        """The groups, where samples interact: never less at once."""
        if not self.coupled:
            return super().parts(count, batch)
        if count < 2:
            kind = type(self).__name__
            raise UserError(f"samples of {kind} interact, and one is left alone; draw another number of images")
        groups = min(-(-count // self.group), count // 2)
        if batch is not None and batch < (largest := -(-count // groups)):
            raise UserError(
                f"samples of {type(self).__name__} interact in groups of {largest}, and batch {batch} holds no group; "
                "raise --batch, or lower --sampler.group, which draws other samples"
            )
        return [slice(first, None, groups) for first in range(groups)]


@dataclass(frozen=True)
class MaxEnt(OfEncoder):
    """MaxEnt of CEM's slides: raises the entropy of a group's features, descending ``log Σ_{j≠i} exp f(x_i, g(x_j))``.

    The slides name it without a formula.  This one estimates the entropy by the similarities of a batch, of which it
    follows the whole gradient.  With ``negatives: batch`` np-langevin pulls each sample the other way.  The workshop
    paper prints the same numbers for its Langevin, np-langevin here.
    """

    noise: float = 0.01

    own: ClassVar[tuple[str, ...]] = ("noise",)
    cites: ClassVar[tuple[str, ...]] = ("cem-slides", "jiang2020")

    @property
    def coupled(self) -> bool:
        """Always."""
        return True

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        """``log Σ_{j≠i} exp f(x_i, g(x_j))``, whatever ``y`` and the seeds."""
        return lambda x: energies.crowding(f(x), **self.alike)


@dataclass(frozen=True)
class Contrasting(OfEncoder):
    """Samplers by negatives ``z_k``, k = 1 … K.  Abstract, as :class:`Sampler`.

    Attributes:
        negatives: features of training images, the same for all samples and steps (``bank``) or others at each step
            (``data``); or features of the other samples of the group as they are at that step (``batch``), through
            which no gradient passes.
        count: K, of training images.
    """

    negatives: Literal["bank", "data", "batch"] = "bank"
    count: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise UserError(f"count is at least 1, got {self.count}")

    @property
    def coupled(self) -> bool:
        """Whether negatives are the other samples."""
        return self.negatives == "batch"

    def bank(self, data: Data) -> Tensor | None:
        """All training images, or for a bank ``count`` of them, always the same ones."""
        if self.coupled:
            return None
        if self.count > len(data.train):
            raise UserError(
                f"{type(self).__name__} takes {self.count} negatives from the training images, {data.name} has "
                f"{len(data.train)}; lower --sampler.count"
            )
        if self.negatives == "data":
            return data.train.x
        return data.train.x[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: self.count]]

    @torch.no_grad()
    def contrast(
        self, f: Logits, bank: Tensor | None, like: Tensor, generator: torch.Generator | None, batch: int
    ) -> Tensor | None:
        """Features of the whole bank, (1, K, D), or of a draw without replacement for each step, (S, K, D)."""
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
        found = [torch.cat([encode(bank[rows]) for rows in chosen.split(batch)]) for chosen in sets]
        return torch.stack(found) if found else None

    def density(self, z: Tensor, negatives: Tensor | None) -> Tensor:
        """``-log Σ_k exp f(x, z_k)`` for features ``z (B, D)``, (B,); without negatives, of the others in z."""
        if negatives is None:
            return -energies.crowding(z, z.detach(), **self.alike)
        return energies.marginal(energies.similarities(z, negatives, **self.alike))


@dataclass(frozen=True)
class NPLangevin(Contrasting):
    """Langevin sampling of NP-CEM, CEM eq. 10: descends ``E(x) = -log Σ_k exp f(x, z_k)``, with noise."""

    noise: float = 0.01

    own: ClassVar[tuple[str, ...]] = ("noise",)

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        """``-log Σ_k exp f(x, z_k)``, whatever ``y`` and the seeds."""
        sets = in_turn(negatives)
        return lambda x: self.density(f(x), next(sets))


@dataclass(frozen=True)
class NPPGD(Contrasting):
    """The PGD attack on InfoNCE as a sampler, CEM eq. 11: descends ``f(x, z) - log Σ_k exp f(x, z_k)``.

    Of np-langevin it keeps the pull towards the negatives; the other term pushes off the anchor z, and there is no
    noise.  In training z is the representation of the image that the attack starts from.  A sampler has no such image
    (CEM section 4.2 expects little of it for that); what it starts from is its seed, so z is g of the seed.  The
    positive is not among the ``z_k``, as eq. 11 is printed.
    """

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        """``-log Σ_k exp f(x, z_k) + f(x, g(seed))``, whatever ``y``."""
        sets = in_turn(negatives)
        with torch.no_grad():
            anchor = f(seeds)

        def energy(x: Tensor) -> Tensor:
            z = f(x)
            alike = -energies.similarity(z, anchor, **self.alike)
            return self.density(z, next(sets)) + alike

        return energy
