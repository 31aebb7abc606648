"""Samplers: images drawn from a network read as an energy model."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm import energies, starts
from advebm.config import check_choices
from advebm.data.sources import Data, to_float
from advebm.descent import (
    Constraint,
    Descent,
    Direction,
    Energy,
    Observer,
    Schedule,
    adam,
    at,
    both,
    box,
    heavy_ball,
    in_parts,
    l2_ball,
    raw,
    sign,
    unit,
)
from advebm.energies import Logits
from advebm.errors import UserError
from advebm.modes import searching, using
from advebm.starts import ClassGaussians, Deck, Start

LARGE = 1e30  # beyond any step: twice as much would be infinite in float32 before long
DIRECTIONS: dict[str, Direction] = {"unit": unit, "raw": raw, "sign": sign, "adam": adam}


@dataclass(frozen=True)
class Sampler:
    """CEM's protocol (Wang et al., 2021, appendix B): ``x ← Π_{‖x - x_0‖ ≤ β} [x + α g + η ε]``, K times.

    Abstract: each algorithm is an energy whose descent is ``g``.  The papers do not give α, β, η, K; the recipes do.

    Attributes:
        steps: K, the number of updates (CEM counts k = 0, …, K, one more); 0 leaves the seeds as they are.
        step_size: α, in pixels of [0, 1] with ``unit`` directions, a factor on the gradient with ``raw`` ones.
        radius: β, of the l2 ball around the seed; none for no ball.  Images stay in [0, 1] in any case.
        noise: η, deviation of the Gaussian added at each step.
        direction: ``unit`` (gradients of length 1, as the checkpoints of the papers were used), ``raw``, ``sign`` or
            ``adam``.
        momentum: decay of a heavy ball on the direction; 0 for none.
        temperature: T in nats: ``η = √(2 α T)``, Langevin dynamics, whose law tends to ``p(x) ∝ exp(-E(x) / T)`` for
            small steps; takes raw directions.  None leaves η to ``noise``.
        step_decay, noise_decay: what α and η have shrunk to after K steps, as a share, geometrically; 1 for no
            annealing.  With a temperature η follows α too.
        start: seeds: ``class`` (a Gaussian a class), ``global`` (one Gaussian for all: no class shape), ``noise``
            (uniform), ``outside`` (test images of the recipe's outside source) or ``buffer`` (the replay chains of the
            checkpoint).
        fit: the split that Gaussians are fitted on.  CEM and Santurkar et al. took ``test``, which leaks: what is
            measured against test images afterwards is flattered.
        shrinkage: share of white noise in a seed's covariance.
    """

    steps: int = 40
    step_size: float = 0.25
    radius: float | None = None
    noise: float = 0.0
    direction: Literal["unit", "raw", "sign", "adam"] = "unit"
    momentum: float = 0.0
    temperature: float | None = None
    step_decay: float = 1.0
    noise_decay: float = 1.0
    start: Literal["class", "global", "noise", "outside", "buffer"] = "class"
    fit: Literal["train", "test"] = "train"
    shrinkage: float = 0.01

    conditional: ClassVar[bool] = True  # whether its energy is of a class
    encoder: ClassVar[bool] = False  # whether it draws from an encoder, rather than from logits
    cites: ClassVar[tuple[str, ...]] = ("cem-workshop", "santurkar2019")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 0 or not 0 < self.step_size < LARGE or not 0 <= self.noise < LARGE:
            got = f"{self.steps}, {self.step_size}, {self.noise}"
            raise UserError(f"a sampler takes steps >= 0, finite step_size > 0 and noise >= 0, got {got}")
        if self.radius is not None and not self.radius > 0:
            raise UserError(f"radius is > 0 or none, got {self.radius}")
        if not 0 <= self.momentum < 1 or not 0 <= self.shrinkage <= 1:
            got = f"{self.momentum}, {self.shrinkage}"
            raise UserError(f"momentum lies in [0, 1) and shrinkage lies in [0, 1], got {got}")
        if not (0 < self.step_decay <= 1 and 0 < self.noise_decay <= 1):
            got = f"{self.step_decay}, {self.noise_decay}"
            raise UserError(f"step_decay and noise_decay are shares in (0, 1], got {got}")
        if self.temperature is not None:
            if not self.temperature >= 0:
                raise UserError(f"temperature is >= 0 or none, got {self.temperature}")
            if self.direction != "raw" or self.momentum or self.noise:
                raise UserError(
                    "a temperature is of Langevin dynamics: raw directions, no momentum, and no other noise; set "
                    "direction to raw, momentum and noise to 0, or temperature to none"
                )

    def trained_by(self, objective: Any) -> "Sampler":
        """With what the objective decides, where it is not given: nothing of a sampler of logits."""
        return self

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """What the algorithm descends for classes ``y (B,)``."""
        raise NotImplementedError("Sampler is abstract; use TA, CS, RCS, Langevin or another of its kinds")

    def prepare(self, data: Data, outside: Data | None = None) -> Start:
        """Where chains begin: Gaussians fitted on a split of ``data``, or test images of ``outside``.

        With ``start: buffer`` the replay chains stand in for outside images.
        """
        if self.start in ("outside", "buffer"):
            if outside is None:
                what = "outside images" if self.start == "outside" else "a replay buffer"
                raise UserError(f"chains start from {what}, and there are none; set start to global or noise")
            if outside.shape != data.shape:
                raise UserError(f"the {self.start} images are {outside.shape}, those of {data.name} {data.shape}")
            return Deck(outside.test.x)
        if self.start == "noise":
            return starts.noise
        split = data.train if self.fit == "train" else data.test
        if self.start == "global":
            return ClassGaussians.fit(split.x, shrinkage=self.shrinkage)
        if not split.labelled:
            raise UserError(f"{data.name} has no labels to fit a Gaussian a class on; set start to global or noise")
        return ClassGaussians.fit(split.x, split.y, classes=len(data.classes), shrinkage=self.shrinkage)

    @property
    def coupled(self) -> bool:
        """Whether samples interact, within groups that do not depend on what is computed at once."""
        return False

    def bank(self, data: Data) -> Tensor | None:
        """Training images that samples are contrasted with, as in ``data``; None where the energy looks at none."""
        return None

    def contrast(
        self, f: Logits, bank: Tensor | None, like: Tensor, generator: torch.Generator | None, batch: int
    ) -> Tensor | None:
        """Features of images of the bank, for each step or for all of them: (S or 1, K, D)."""
        return None

    def begun(self, f: Logits, y: Tensor, seeds: Tensor, negatives: Tensor | None) -> Energy:
        """What chains from ``seeds`` descend: the energy of their classes, unless it looks at more than classes."""
        return self.energy(f, y)

    def parts(self, count: int, batch: int | None) -> list[slice]:
        """Which of ``count`` images go through the network together, ``batch`` at most."""
        if batch is None or batch >= count:
            return [slice(None)]
        return [slice(first, first + batch) for first in range(0, count, batch)]

    def descent(self) -> Descent:
        """The search it runs."""
        constraint: Constraint = box() if self.radius is None else both(l2_ball(self.radius), box())
        size, direction = geometric(self.step_size, self.step_decay), DIRECTIONS[self.direction]
        noise = geometric(self.noise, self.noise_decay)
        if (nats := self.temperature) is not None:
            fading = geometric(1.0, self.noise_decay)
            noise = lambda share: (2 * at(size, share) * nats) ** 0.5 * at(fading, share)
        if self.momentum:
            direction = heavy_ball(self.momentum, direction)
        return Descent(self.steps, size, direction, constraint, noise)

    def __call__(
        self,
        model: nn.Module,
        y: Tensor,
        seeds: Tensor,
        *,
        generator: torch.Generator | None = None,
        observe: Observer | None = None,
        batch: int | None = None,
        bank: Tensor | None = None,
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of classes ``y (B,)``, from ``seeds`` of the same shape.

        ``batch`` images at most go through the network at once; noise does not depend on it.  ``bank`` is what
        :meth:`bank` gave.
        """
        with searching(model) as f:
            parts = self.parts(len(y), batch)
            negatives = self.contrast(f, bank, seeds, generator, batch or len(y))
            each = [self.begun(f, y[part], seeds[part], negatives) for part in parts]
            energy = each[0] if len(parts) == 1 else in_parts(each, parts)
            return self.descent()(energy, seeds, generator=generator, observe=observe)


def geometric(first: float, decay: float) -> float | Schedule:
    """``first`` at the beginning, ``first · decay`` at the end, ``first · decay^share`` between."""
    return first if decay == 1 else lambda share: first * decay**share


def marginal(f: Logits) -> Energy:
    """``E(x)`` of a classifier (B, K), or of a critic (B,) or (B, 1), whose log-sum of one term is ``f``."""
    return lambda x: energies.marginal(f(x).reshape(len(x), -1))


@dataclass(frozen=True)
class TA(Sampler):
    """Targeted attack, Santurkar et al. (2019), CEM eq. 7: descends ``E(y|x) = E(x, y) - E(x)``."""

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """``-log p(y|x)``."""
        return lambda x: energies.conditional(f(x), y)


@dataclass(frozen=True)
class CS(Sampler):
    """Conditional sampling, CEM section 4.1, JEAT eq. 17: descends ``E(x, y)``, without TA's pull off ``E(x)``."""

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """``-f_y(x)``."""
        return lambda x: energies.joint(f(x), y)


@dataclass(frozen=True)
class RCS(Sampler):
    """Reinforced conditional sampling: descends ``E(x, y) + λ E(x)``, which adds the pull that TA takes away.

    CEM's slides report it without a formula.  This one is its name read in line with theirs: λ is -1 in TA, 0 in CS.

    Attributes:
        weight: λ; the other attributes are those of :class:`Sampler`.
    """

    weight: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("cem-slides",)

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """``-f_y(x) - λ log Σ_k exp f_k(x)``."""

        def both_energies(x: Tensor) -> Tensor:
            logits = f(x)
            return energies.joint(logits, y) + self.weight * energies.marginal(logits)

        return both_energies


@dataclass(frozen=True)
class Langevin(Sampler):
    """CEM's Langevin sampling: descends ``E(x)`` with noise, by the same protocol; classes come from seeds alone.

    Exact Langevin dynamics is ``direction: raw, noise: 0, temperature: 1``.  A critic can be sampled, too.
    """

    noise: float = 0.01

    conditional: ClassVar[bool] = False
    own: ClassVar[tuple[str, ...]] = ("noise",)

    def energy(self, f: Logits, y: Tensor) -> Energy:
        """``-log Σ_k exp f_k(x)``, whatever ``y``."""
        return marginal(f)


@dataclass(frozen=True)
class Dynamics(Sampler):
    """Langevin dynamics of JEAT: raw steps η/2, which is ``step_size``, and noise √η; it gives neither η nor K.

    Abstract, as :class:`Sampler`.
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

    The settings are JEM's (Grathwohl et al., 2020) on the scale of [0, 1], see
    :class:`advebm.objectives.langevin.SGLD`; far less noise than Langevin dynamics has.
    """

    steps: int = 20
    step_size: float = 0.25
    noise: float = 0.005
    direction: Literal["unit", "raw", "sign", "adam"] = "raw"
    start: Literal["class", "global", "noise", "outside", "buffer"] = "noise"

    own: ClassVar[tuple[str, ...]] = (*Dynamics.own, "start")
    cites: ClassVar[tuple[str, ...]] = ("grathwohl2020",)


@dataclass(frozen=True)
class Ascent(Langevin):
    """Ascent on a critic's f from outside images, Binary-AT eq. 8: descends ``E(x) = -f(x)`` in unit steps.

    The authors take 32 steps of 0.2 from test images of their p0 for CIFAR-10.  Of a classifier, E(x).
    """

    steps: int = 32
    step_size: float = 0.2
    noise: float = 0.0
    start: Literal["class", "global", "noise", "outside", "buffer"] = "outside"

    own: ClassVar[tuple[str, ...]] = ("noise", "start")
    cites: ClassVar[tuple[str, ...]] = ("binary-at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "class":
            raise UserError("a critic has no classes; start from outside, global or noise")


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


def in_turn(negatives: Tensor | None) -> Iterator[Tensor | None]:
    """A set of negatives for each step, over and over; None for ever where there are none."""
    return itertools.cycle([None] if negatives is None else negatives)
