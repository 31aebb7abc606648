"""Energies trained against samples of the model: maximum likelihood, JEM, JEAT."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies, starts
from advebm.attacks.projected import Attack
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.core.rng import randn
from advebm.descent import Descent, Energy, box, capped, free, raw
from advebm.models.modes import freeze_batch_norms, searching
from advebm.objectives.at import ENERGY_STEP, check_energy, with_step
from advebm.objectives.base import Batch, Context, Loss, Stateless
from advebm.starts import ReplayBuffer


@dataclass(frozen=True)
class SGLD:
    """Negatives by ``x ← x - step_size ∇E(x) + noise ε``, from chains kept between training steps or from new ones.

    The defaults are JEM's (Grathwohl et al., 2020), whose step 1 and noise 0.01 are for images in [-1, 1]: in [0, 1]
    the same chain has a quarter of the step and half of the noise.  Exact Langevin dynamics requires
    ``noise² = 2 step_size``; all methods of this family use far less noise.

    Attributes:
        steps: K, the number of updates of a chain in each training step.
        step_size: factor on the gradient, in pixels² per nat, pixels in [0, 1].
        noise: standard deviation in pixels of [0, 1].
        buffer: number of chains in each stream's replay buffer; 0: new chains every time (short-run).
        restart: probability that a chain starts anew.
        clamp: whether chains are clamped to [0, 1]; in SADA-JEM they are, in JEM they are not.
        start: what new chains start from: uniform ``noise``, or ``outside`` images.  JEM++ (Yang and Ji, 2021) and
            SADA-JEM (Yang et al., 2023) start from the class Gaussians of the data: ``outside: {kind: gaussians,
            source: cifar10}``.
        limit: largest change of a pixel in a step, without the noise, in pixels of [0, 1]; None: no limit.  0.5 with
            the step of 0.25 and ``clamp`` is SADA-JEM's step, x + clamp(∇f(x), -1, 1) in [-1, 1].
    """

    steps: int = 20
    step_size: float = 0.25
    noise: float = 0.005
    buffer: int = 10_000
    restart: float = 0.05
    clamp: bool = False
    start: Literal["noise", "outside"] = "noise"
    limit: float | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 1 or self.buffer < 0 or not 0 <= self.restart <= 1:
            got = f"{self.steps}, {self.buffer}, {self.restart}"
            raise UserError(f"steps must be at least 1, buffer at least 0 and restart in [0, 1], got {got}")
        if not (self.step_size > 0 and self.noise >= 0):
            raise UserError(f"step_size must be > 0 and noise >= 0, got {self.step_size} and {self.noise}")
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"limit must be > 0 or none, got {self.limit}")

    def init(self, like: Tensor, generator: torch.Generator) -> ReplayBuffer | None:
        if not self.buffer:
            return None
        if self.buffer < len(like):
            raise UserError(f"a buffer of {self.buffer} chains is smaller than the {len(like)} images of a step")
        shape = tuple(like.shape[1:])
        if self.start == "outside":
            return ReplayBuffer.empty(self.buffer, shape)
        return ReplayBuffer.uniform(self.buffer, shape, generator)

    def __call__(
        self, energy: Energy, batch: Batch, state: ReplayBuffer | None, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor]:
        """Return buffer slots (None without a buffer) and negatives, as many as the batch has images."""
        x, slots, new = batch.x, None, batch.outside if self.start == "outside" else None
        if state is not None:
            slots, chains = state.draw(len(x), self.restart, generator, new)
            start = chains.to(x)
        else:
            start = starts.noise(x, None, generator) if new is None else new
        direction = raw if self.limit is None else capped(self.limit / self.step_size)
        descent = Descent(self.steps, self.step_size, direction, box() if self.clamp else free, self.noise)
        return slots, descent(energy, start, generator=generator)


class ChainResult(NamedTuple):
    """Data, negatives, the buffer slots to store the negatives in, and attacked images if there are any."""

    positive: Tensor
    negative: Tensor
    slots: Tensor | None
    adversarial: Tensor | None = None


def contrast(positive: Tensor, negative: Tensor, energy_l2: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``mean E⁺ - mean E⁻ + energy_l2 (mean E⁺² + mean E⁻²)``, and both mean energies to log."""
    total = positive.mean() - negative.mean()
    if energy_l2:
        total = total + energy_l2 * (positive.square().mean() + negative.square().mean())
    terms = {"energy_data": positive.mean(), "energy_negative": negative.mean()}
    return total, {name: value.detach() for name, value in terms.items()}


@dataclass(frozen=True)
class _Sampled(Stateless):
    """Base of the three methods: a replay buffer, noisy data, and negatives by SGLD.

    Attributes:
        negatives: the sampler of negatives.
        data_noise: standard deviation of Gaussian noise on the data in pixels of [0, 1]; JEM's 0.03 for [-1, 1] is
            0.015 here.
        energy_l2: weight of the squared energies in the loss (Du and Mordatch, 2019), which keeps energies near zero;
            the papers have none, and with weight 0 the energies drift until training diverges.
        search_mode: statistics that batch norm uses while chains move: ``eval`` (running ones) or ``train`` (those of
            the chains, as in SADA-JEM, whose code also updates the running ones by them).
        freeze_norms: whether batch norm keeps the running statistics that it has and uses them throughout, as in
            ``dat``: for networks that were trained before.  Otherwise the statistics become those of data and negatives
            together, with which data are told apart less well.
    """

    negatives: SGLD = SGLD()
    data_noise: float = 0.015
    energy_l2: float = 0.0
    search_mode: Literal["eval", "train"] = "eval"
    freeze_norms: bool = False

    labelled: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        outside = {"outside"} if self.negatives.start == "outside" else set()
        return frozenset({"labels"} if self.labelled else ()) | outside

    def __post_init__(self) -> None:
        check_choices(self)
        if not (self.data_noise >= 0 and self.energy_l2 >= 0):
            raise UserError(f"data_noise and energy_l2 must be >= 0, got {self.data_noise} and {self.energy_l2}")
        if self.freeze_norms and self.search_mode == "train":
            raise UserError("freeze_norms keeps running statistics: set it to false, or search_mode to eval")

    def init(self, like: Tensor, generator: torch.Generator) -> ReplayBuffer | None:
        return self.negatives.init(like, generator)

    def search(self, model: nn.Module, batch: Batch, state: ReplayBuffer | None, ctx: Context) -> ChainResult:
        positive = self.data(batch)
        if self.data_noise:
            positive = positive + self.data_noise * randn(positive, ctx.generator)
        with searching(model, view=ctx.view, training=self.search_mode == "train") as f:
            slots, negative = self.negatives(lambda x: energies.marginal(f(x)), batch, state, ctx.generator)
        return ChainResult(positive, negative, slots)

    def loss(
        self, model: nn.Module, batch: Batch, found: ChainResult, state: ReplayBuffer | None, ctx: Context
    ) -> Loss:
        with freeze_batch_norms(model) if self.freeze_norms else nullcontext():
            return self.compute_loss(model, batch, found)

    def compute_loss(self, model: nn.Module, batch: Batch, found: ChainResult) -> Loss:
        """Return the loss, of the network in the mode that it is in."""
        raise NotImplementedError

    def data(self, batch: Batch) -> Tensor:
        """Return the images whose energy is lowered, before noise is added."""
        return batch.x

    def after(
        self, model: nn.Module, batch: Batch, found: ChainResult, state: ReplayBuffer | None, loss: Loss, ctx: Context
    ) -> None:
        if state is not None and found.slots is not None:
            state.put(found.slots, found.negative)

    def adversarial(self, batch: Batch, found: ChainResult) -> Tensor | None:
        return found.adversarial


@dataclass(frozen=True)
class MLE(_Sampled):
    """``E(x⁺) - E(x⁻)``, the gradient of maximum likelihood, JEAT eq. 6, CEM eq. 15; labels are not used.

    With a buffer the chains are persistent; without one they are short-run (Nijkamp et al., 2019).
    """

    labelled: ClassVar[bool] = False
    cites: ClassVar[tuple[str, ...]] = ("nijkamp2019",)

    def compute_loss(self, model: nn.Module, batch: Batch, found: ChainResult) -> Loss:
        positive, negative = (energies.marginal(model(x)) for x in (found.positive, found.negative))
        total, terms = contrast(positive, negative, self.energy_l2)
        return Loss(total, {"loss": total.detach(), **terms})


@dataclass(frozen=True)
class JEM(_Sampled):
    """``CE(x, y) + weight (E(x⁺) - E(x⁻))``: -log p(y|x) - log p(x), Grathwohl et al. (2020), as in their code.

    The code draws x⁺ independently of the labelled x; here both are the batch, which has the same expectation.

    Attributes:
        negatives, data_noise, energy_l2, search_mode, freeze_norms: see :class:`MLE`.
        weight: weight of -log p(x).
        positives: data x⁺ of -log p(x): ``same``, the images of the cross-entropy, or ``view``, another augmentation of
            them, ``data.augment.view``; the cross-entropy is then taken without noise.  SADA-JEM augments for the
            cross-entropy alone, ``data: {augment: {view: {}}}``.
    """

    weight: float = 1.0
    positives: Literal["same", "view"] = "same"

    cites: ClassVar[tuple[str, ...]] = ("grathwohl2020",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0:
            raise UserError(f"weight must be >= 0, got {self.weight}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return super().needs | ({"view"} if self.positives == "view" else set())

    def data(self, batch: Batch) -> Tensor:
        if self.positives == "same":
            return batch.x
        assert batch.view is not None
        return batch.view

    def compute_loss(self, model: nn.Module, batch: Batch, found: ChainResult) -> Loss:
        """Return the sum of both terms; the cross-entropy is taken at the noisy images, or at those of the batch."""
        logits, negative = model(found.positive), energies.marginal(model(found.negative))
        likelihood, terms = contrast(energies.marginal(logits), negative, self.energy_l2)
        if self.positives == "view":
            logits = model(batch.x)
        total = energies.conditional(logits, batch.y).mean() + self.weight * likelihood
        accuracy = (logits.argmax(1) == batch.y).float().mean()
        return Loss(total, {"loss": total.detach(), "accuracy": accuracy, **terms})


@dataclass(frozen=True)
class JEAT(_Sampled):
    """``[E(x̂, y) - E(x̂)] + [E(x̂) - E(x̃)]``: -log p(x̂, y) with x̂ from the energy attack, JEAT algorithm 1, eq. 19.

    The terms ``E(x̂)`` cancel: the joint energy is lowered at adversarial images, the marginal energy raised at samples.
    (Eq. 20 and 23 print the sample's term with the wrong sign; the algorithm has it right.)  The paper does not give
    the number and size of steps and the size of the buffer (JEM's here), whether x̂ is clamped to [0, 1] (it is here),
    or the mode of batch norm.

    Attributes:
        negatives, energy_l2, search_mode, freeze_norms: see :class:`MLE`.
        data_noise: see :class:`MLE`; 0, as the paper mentions none.
        attack: one energy-FGSM step from a uniform start, eq. 18; ``step_size`` None: eps.
    """

    data_noise: float = 0.0
    attack: Attack = ENERGY_STEP

    cites: ClassVar[tuple[str, ...]] = ("jeat",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_energy(self.attack)

    def search(self, model: nn.Module, batch: Batch, state: ReplayBuffer | None, ctx: Context) -> ChainResult:
        """Return adversarial images of the (noisy) data, clamped to [0, 1] before the attack, and negatives."""
        chains = super().search(model, batch, state, ctx)
        attack = with_step(self.attack, 1.0)
        with searching(model, view=ctx.view) as f:
            x_adv = attack.raise_loss(f, chains.positive.clamp(0, 1), batch.y, ctx.generator)
        return chains._replace(positive=x_adv, adversarial=x_adv)

    def compute_loss(self, model: nn.Module, batch: Batch, found: ChainResult) -> Loss:
        logits, negative = model(found.positive), energies.marginal(model(found.negative))
        likelihood, terms = contrast(energies.marginal(logits), negative, self.energy_l2)
        total = energies.conditional(logits, batch.y).mean() + likelihood
        with torch.no_grad():
            terms["energy_joint"] = energies.joint(logits, batch.y).mean()
            terms["accuracy"] = (logits.argmax(1) == batch.y).float().mean()
        return Loss(total, {"loss": total.detach(), **terms})
