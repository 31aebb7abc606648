"""Training that keeps predictions similar within a ball around each image: TRADES and WEAT."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from advebm import energies
from advebm.attacks.projected import Attack
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.modes import searching
from advebm.objectives.base import Batch, Context, Loss, Stateless, accuracy
from advebm.objectives.standard import check_smoothing, smoothed

INNER = Attack(eps=0.031, steps=10, step_size=0.007, start="gaussian", spread=0.001)


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """Return ``KL(p ‖ q)`` of each image, log-probabilities ``clean`` of p, ``moved`` of q: (B, K) -> (B,), nats."""
    return kl_div(moved, clean, reduction="none", log_target=True).sum(1)


@dataclass(frozen=True)
class TRADES(Stateless):
    """``CE(x, y) + β KL(p(x) ‖ p(x̂))``, x̂ maximising the same KL: Zhang et al. (2019), as in their code.

    CEM (section 3) writes the KL the other way round; this is the direction of the authors' code.  Gradients flow
    through both sides.  The target of the search, p(x), is computed once per batch.

    Attributes:
        attack: the search for x̂; its ``loss`` is not used.  Radius, steps and start are those of the code for linf.
        beta: weight of the KL, 1/λ in the paper.
        smoothing: share of each label that is spread evenly over all classes in the cross-entropy.
    """

    attack: Attack = INNER
    beta: float = 6.0
    smoothing: float = 0.0

    cites: ClassVar[tuple[str, ...]] = ("zhang2019", "madry2018")

    def __post_init__(self) -> None:
        check_choices(self)
        check_smoothing(self.smoothing)
        if not self.beta >= 0:
            raise UserError(f"beta is a weight >= 0, got {self.beta}")
        if self.attack.start == "clean":
            raise UserError("at the image itself the KL is flat; the attack's start is gaussian or uniform")

    def search(self, model: nn.Module, batch: Batch, state: None, ctx: Context) -> Tensor:
        with searching(model, view=ctx.view) as f:
            with torch.no_grad():
                target = log_softmax(f(batch.x), 1)
            return self.attack.minimize(lambda x: -divergence(target, log_softmax(f(x), 1)), batch.x, ctx.generator)

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: None, ctx: Context) -> Loss:
        clean, adversarial = model(batch.x), model(found)
        return self._total(clean, adversarial, smoothed(clean, batch.y, self.smoothing), batch.y)

    def adversarial(self, batch: Batch, found: Tensor) -> Tensor:
        return found

    def _total(self, clean: Tensor, adversarial: Tensor, first: Tensor, y: Tensor) -> Loss:
        gap = divergence(log_softmax(clean, 1), log_softmax(adversarial, 1))
        total = (self._weights(clean.detach()) * (first + self.beta * gap)).mean()
        with torch.no_grad():
            terms = {
                "loss": total.detach(),
                "kl": gap.mean(),
                "accuracy": accuracy(adversarial, y),
                "clean_accuracy": accuracy(clean, y),
                "energy_joint": energies.joint(adversarial, y).mean(),
                "energy_marginal": energies.marginal(adversarial).mean(),
            }
        return Loss(total, terms)

    def _weights(self, clean: Tensor) -> Tensor:
        return torch.ones_like(clean[:, 0])


@dataclass(frozen=True)
class WEAT(TRADES):
    """TRADES with less weight on images of low energy: ``1 / log(1 + exp |E(x)|)``, Mirza et al. (2024).

    The weights are computed from the energies of the clean images, without gradient and without normalisation.

    Attributes:
        attack, beta, smoothing: see :class:`TRADES`.
        on: images that the cross-entropy is taken at: ``clean`` (their WEAT_nat) or ``adversarial`` (WEAT_adv, whose
            code has 7 as one default of beta and 6 as another).
    """

    on: Literal["clean", "adversarial"] = "clean"

    cites: ClassVar[tuple[str, ...]] = ("mirza2024", "zhang2019", "madry2018")

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: None, ctx: Context) -> Loss:
        clean, adversarial = model(batch.x), model(found)
        first = smoothed(clean if self.on == "clean" else adversarial, batch.y, self.smoothing)
        return self._total(clean, adversarial, first, batch.y)

    def _weights(self, clean: Tensor) -> Tensor:
        return 1 / torch.nn.functional.softplus(energies.marginal(clean).abs())
