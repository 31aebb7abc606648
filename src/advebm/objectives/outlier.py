"""Classifiers trained to be uncertain on images outside the data: Outlier Exposure and RATIO."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.models.modes import searching
from advebm.objectives.base import Batch, Context, Loss, Stateless, accuracy
from advebm.objectives.curriculum import auroc

INSIDE = Attack(eps=0.5, norm="l2", steps=10, step_size=0.1, start="clean", momentum=0.9)
OUTSIDE = Attack(eps=1.0, norm="l2", steps=20, step_size=0.1, start="clean", momentum=0.9)


class Pair(NamedTuple):
    """Images of the data and outside images, (B, C, H, W) each."""

    inside: Tensor
    outside: Tensor


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Return ``-1/K Σ_k log p(k|x)``, cross-entropy to the uniform law; (B, K) -> (B,), nats, at least log K."""
    return -logits.log_softmax(1).mean(1)


def doubt(logits: Tensor) -> Tensor:
    """Return ``-log max_k p(k|x)``, an energy, low where the classifier is confident; (B, K) -> (B,), nats."""
    return -logits.log_softmax(1).amax(1)


def exposure(model: nn.Module, pair: Pair, y: Tensor, weight: float, scale: float = 1.0) -> Loss:
    """Return ``scale (CE(x, y) + weight CE(uniform, p(·|x_out)))``, with means over each set, in one forward pass."""
    inside, outside = model(torch.cat(pair)).split([len(pair.inside), len(pair.outside)])
    unsure = uniform_cross_entropy(outside).mean()
    total = scale * (energies.conditional(inside, y).mean() + weight * unsure)
    with torch.no_grad():
        terms = {
            "loss": total.detach(),
            "uniform": unsure.detach(),
            "accuracy": accuracy(inside, y),
            "energy_joint": energies.joint(inside, y).mean(),
            "energy_marginal": energies.marginal(inside).mean(),
            "energy_outside": energies.marginal(outside).mean(),
            "auroc": auroc(doubt(inside), doubt(outside)),
        }
    return Loss(total, terms)


@dataclass(frozen=True)
class OE(Stateless):
    """``CE(x, y) + weight CE(uniform, p(·|x_out))``: Outlier Exposure, Hendrycks et al. (2019), as in their code.

    In their code a batch has twice as many outside images as data; here it has equal numbers.

    Attributes:
        weight: weight of the outside images; the paper uses 0.5 for images.
    """

    weight: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "outside"})
    cites: ClassVar[tuple[str, ...]] = ("hendrycks2019outlier",)

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise UserError(f"weight must be >= 0, got {self.weight}")

    def search(self, model: nn.Module, batch: Batch, state: None, ctx: Context) -> Pair:
        assert batch.outside is not None
        return Pair(batch.x, batch.outside)

    def loss(self, model: nn.Module, batch: Batch, found: Pair, state: None, ctx: Context) -> Loss:
        return exposure(model, found, batch.y, self.weight)


@dataclass(frozen=True)
class RATIO(Stateless):
    """``½ CE(x̂, y) + ½ weight CE(uniform, p(·|x̂_out))``: robustness on both sides, Augustin et al. (2020).

    x̂ raises the cross-entropy in a ball around the data, x̂_out the confidence ``max_k p(k|x)`` in a larger ball around
    the outside images.  The authors' code can keep the best iterate of a search; here the last one is used.

    Attributes:
        attack: the search for x̂; radius, steps and momentum on unit gradients are those of the code for CIFAR-10.
        outside_attack: the search for x̂_out, with twice the radius and steps; its ``loss`` is not used.
        weight: λ, the weight of the outside images.
    """

    attack: Attack = INSIDE
    outside_attack: Attack = OUTSIDE
    weight: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "outside"})
    cites: ClassVar[tuple[str, ...]] = ("augustin2020",)

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise UserError(f"weight must be >= 0, got {self.weight}")

    def search(self, model: nn.Module, batch: Batch, state: None, ctx: Context) -> Pair:
        assert batch.outside is not None
        with searching(model, view=ctx.view) as f:
            inside = self.attack.raise_loss(f, batch.x, batch.y, ctx.generator)
            return Pair(inside, self.outside_attack.minimize(lambda x: doubt(f(x)), batch.outside, ctx.generator))

    def loss(self, model: nn.Module, batch: Batch, found: Pair, state: None, ctx: Context) -> Loss:
        return exposure(model, found, batch.y, self.weight, scale=0.5)

    def adversarial(self, batch: Batch, found: Pair) -> Tensor:
        return found.inside
