"""Energies trained against samples of the model: maximum likelihood, JEM, JEAT."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies, starts
from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.core.rng import randn
from advebm.descent import Descent, box, free, raw
from advebm.models.modes import searching
from advebm.objectives.at import ENERGY_STEP, check_energy, with_step
from advebm.objectives.base import Batch, Context, Loss, Stateless
from advebm.starts import ReplayBuffer


@dataclass(frozen=True)
class SGLD:
    """Negatives ``x ← x - step_size ∇E(x) + noise ε`` from chains that outlive the step, or from noise each time.

    The defaults are JEM's (Grathwohl et al., 2020), whose step 1 and noise 0.01 are for images in [-1, 1]: in [0, 1]
    the same chain has a quarter of the step and half of the noise.  Exact Langevin dynamics would tie them,
    ``noise² = 2 step_size``; every method of this family uses far less noise.

    Attributes:
        steps: K.
        step_size: factor on the gradient, in pixels² of [0, 1] a nat.
        noise: standard deviation in pixels of [0, 1].
        buffer: chains of the replay buffer, for each stream; 0 starts from noise every time (short-run).
        restart: probability that a chain begins afresh from uniform noise.
        clamp: whether chains stay in [0, 1]; the papers let them leave it.
    """

    steps: int = 20
    step_size: float = 0.25
    noise: float = 0.005
    buffer: int = 10_000
    restart: float = 0.05
    clamp: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.buffer < 0 or not 0 <= self.restart <= 1:
            got = f"{self.steps}, {self.buffer}, {self.restart}"
            raise UserError(f"steps is at least 1, buffer at least 0 and restart in [0, 1], got {got}")
        if not (self.step_size > 0 and self.noise >= 0):
            raise UserError(f"step_size is > 0 and noise >= 0, got {self.step_size} and {self.noise}")

    def init(self, like: Tensor, generator: torch.Generator) -> ReplayBuffer | None:
        """Chains of uniform noise."""
        if not self.buffer:
            return None
        if self.buffer < len(like):
            raise UserError(f"a buffer of {self.buffer} chains is smaller than the {len(like)} images of a step")
        return ReplayBuffer.uniform(self.buffer, tuple(like.shape[1:]), generator)

    def __call__(
        self, energy: Callable[[Tensor], Tensor], like: Tensor, state: ReplayBuffer | None, generator: torch.Generator
    ) -> tuple[Tensor | None, Tensor]:
        """The slots in the buffer and where their chains have got to, as many as ``like`` has images."""
        if state is None:
            slots, start = None, starts.noise(like, None, generator)
        else:
            slots, chains = state.draw(len(like), self.restart, generator)
            start = chains.to(like)
        descent = Descent(self.steps, self.step_size, raw, box() if self.clamp else free, self.noise)
        return slots, descent(energy, start, generator=generator)


class ChainResult(NamedTuple):
    """What a step looks at: data, negatives, and the slots that the negatives go back to."""

    positive: Tensor
    negative: Tensor
    slots: Tensor | None
    adversarial: Tensor | None = None


def contrast(positive: Tensor, negative: Tensor, energy_l2: float) -> tuple[Tensor, dict[str, Tensor]]:
    """``mean E⁺ - mean E⁻``, plus ``energy_l2 (mean E⁺² + mean E⁻²)`` that keeps energies near zero; and logs."""
    total = positive.mean() - negative.mean()
    if energy_l2:
        total = total + energy_l2 * (positive.square().mean() + negative.square().mean())
    terms = {"energy_data": positive.mean(), "energy_negative": negative.mean()}
    return total, {name: value.detach() for name, value in terms.items()}


@dataclass(frozen=True)
class _Sampled(Stateless):
    """Attributes that the three methods share.

    Attributes:
        negatives: how the model is sampled.
        data_noise: deviation of Gaussian noise on the data in pixels of [0, 1]; JEM's 0.03 for [-1, 1] is 0.015 here.
        energy_l2: weight of the squared energies in the loss (Du and Mordatch, 2019); the papers have none, and with
            none the energies drift until training diverges.
    """

    negatives: SGLD = SGLD()
    data_noise: float = 0.015
    energy_l2: float = 0.0

    def __post_init__(self) -> None:
        if not (self.data_noise >= 0 and self.energy_l2 >= 0):
            raise UserError(f"data_noise and energy_l2 are >= 0, got {self.data_noise} and {self.energy_l2}")

    def init(self, like: Tensor, generator: torch.Generator) -> ReplayBuffer | None:
        """The replay buffer of a stream."""
        return self.negatives.init(like, generator)

    def search(self, model: nn.Module, batch: Batch, state: ReplayBuffer | None, ctx: Context) -> ChainResult:
        """Noisy data, and negatives in eval mode."""
        positive = batch.x + self.data_noise * randn(batch.x, ctx.generator) if self.data_noise else batch.x
        with searching(model, view=ctx.view) as f:
            slots, negative = self.negatives(lambda x: energies.marginal(f(x)), batch.x, state, ctx.generator)
        return ChainResult(positive, negative, slots)

    def after(
        self,
        model: nn.Module,
        batch: Batch,
        found: ChainResult,
        state: ReplayBuffer | None,
        loss: Loss,
        ctx: Context,
    ) -> None:
        """The chains go on from here."""
        if state is not None and found.slots is not None:
            state.put(found.slots, found.negative)

    def adversarial(self, batch: Batch, found: ChainResult) -> Tensor | None:
        """The attacked images, if there are any."""
        return found.adversarial


@dataclass(frozen=True)
class MLE(_Sampled):
    """``E(x⁺) - E(x⁻)``, the gradient of maximum likelihood, JEAT eq. 6, CEM eq. 15; labels are not used.

    With a buffer the chains are persistent; without, short-run (Nijkamp et al., 2019).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    cites: ClassVar[tuple[str, ...]] = ("nijkamp2019",)

    def loss(
        self, model: nn.Module, batch: Batch, found: ChainResult, state: ReplayBuffer | None, ctx: Context
    ) -> Loss:
        """The difference of mean energies."""
        positive, negative = (energies.marginal(model(x)) for x in (found.positive, found.negative))
        total, terms = contrast(positive, negative, self.energy_l2)
        return Loss(total, {"loss": total.detach(), **terms})


@dataclass(frozen=True)
class JEM(_Sampled):
    """``CE(x, y) + weight (E(x⁺) - E(x⁻))``: -log p(y|x) - log p(x), Grathwohl et al. (2020), as in their code.

    The code draws x⁺ apart from the labelled x; here both are the batch, which has the same expectation.

    Attributes:
        negatives, data_noise, energy_l2: as for ``mle``.
        weight: of -log p(x).
    """

    weight: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("grathwohl2020",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight >= 0:
            raise UserError(f"weight is >= 0, got {self.weight}")

    def loss(
        self, model: nn.Module, batch: Batch, found: ChainResult, state: ReplayBuffer | None, ctx: Context
    ) -> Loss:
        """The sum of both terms."""
        logits, negative = model(found.positive), energies.marginal(model(found.negative))
        likelihood, terms = contrast(energies.marginal(logits), negative, self.energy_l2)
        total = energies.conditional(logits, batch.y).mean() + self.weight * likelihood
        accuracy = (logits.argmax(1) == batch.y).float().mean()
        return Loss(total, {"loss": total.detach(), "accuracy": accuracy, **terms})


@dataclass(frozen=True)
class JEAT(_Sampled):
    """``[E(x̂, y) - E(x̂)] + [E(x̂) - E(x̃)]``: -log p(x̂, y) with x̂ from the energy attack, JEAT algorithm 1, eq. 19.

    The terms ``E(x̂)`` cancel: the joint energy is lowered at adversarial images, the marginal one raised at samples.
    (Eq. 20 and 23 print the sample's term with the wrong sign; the algorithm has it right.)  Not given in the paper:
    steps, step and size of the buffer (JEM's here), whether x̂ is clamped to [0, 1] (it is here), batch norm.

    Attributes:
        negatives, data_noise, energy_l2: as for ``mle``; the paper mentions no noise on the data, so there is none.
        attack: one energy-FGSM step from a uniform start, eq. 18; a ``step_size`` of none is eps here.
    """

    data_noise: float = 0.0
    attack: Attack = ENERGY_STEP

    cites: ClassVar[tuple[str, ...]] = ("jeat",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_energy(self.attack)

    def search(self, model: nn.Module, batch: Batch, state: ReplayBuffer | None, ctx: Context) -> ChainResult:
        """Adversarial images from the (noisy) data, and negatives."""
        found = super().search(model, batch, state, ctx)
        attack = with_step(self.attack, 1.0)
        with searching(model, view=ctx.view) as f:
            moved = attack.raise_loss(f, found.positive.clamp(0, 1), batch.y, ctx.generator)
        return found._replace(positive=moved, adversarial=moved)

    def loss(
        self, model: nn.Module, batch: Batch, found: ChainResult, state: ReplayBuffer | None, ctx: Context
    ) -> Loss:
        """The sum as the algorithm writes it."""
        logits, negative = model(found.positive), energies.marginal(model(found.negative))
        likelihood, terms = contrast(energies.marginal(logits), negative, self.energy_l2)
        total = energies.conditional(logits, batch.y).mean() + likelihood
        with torch.no_grad():
            terms["energy_joint"] = energies.joint(logits, batch.y).mean()
            terms["accuracy"] = (logits.argmax(1) == batch.y).float().mean()
        return Loss(total, {"loss": total.detach(), **terms})
