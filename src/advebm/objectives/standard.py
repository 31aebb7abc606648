"""Standard training, and training on noisy images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core.errors import UserError
from advebm.core.rng import randn
from advebm.objectives.base import Batch, Context, Loss, Stateless, accuracy


def smoothed(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy (B,) to labels of which a share is spread over all classes, Szegedy et al. (2016).

    It is ``(1 - s) E(x, y) + s mean_k E(x, k) - E(x)`` with s = ``smoothing``, in nats.
    """
    if not smoothing:
        return energies.conditional(logits, y)
    return (1 - smoothing) * energies.joint(logits, y) - smoothing * logits.mean(1) - energies.marginal(logits)


def check_smoothing(smoothing: float) -> None:
    """Raise UserError unless it is a share of the labels below 1."""
    if not 0 <= smoothing < 1:
        raise UserError(
            f"smoothing is the share of a label that is spread over all classes, in [0, 1), got {smoothing}"
        )


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, smoothing: float = 0.0) -> Loss:
    """Return the mean of ``E(x, y) - E(x)`` over a batch, or of its :func:`smoothed` form.

    The terms to log are both energies and the accuracy.
    """
    logits = model(x)
    total = smoothed(logits, y, smoothing).mean()
    with torch.no_grad():
        terms = {
            "loss": total.detach(),
            "accuracy": accuracy(logits, y),
            "energy_joint": energies.joint(logits, y).mean(),
            "energy_marginal": energies.marginal(logits).mean(),
        }
    return Loss(total, terms)


@dataclass(frozen=True)
class Standard(Stateless):
    """Cross-entropy on the images themselves: P-CEM whose negatives are data, CEM section 3.1.

    Attributes:
        smoothing: share of each label that is spread evenly over all classes, Szegedy et al. (2016).
    """

    smoothing: float = 0.0

    cites: ClassVar[tuple[str, ...]] = ("cem-workshop",)

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)

    def search(self, model: nn.Module, batch: Batch, state: None, ctx: Context) -> Tensor:
        return batch.x

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: None, ctx: Context) -> Loss:
        return cross_entropy(model, found, batch.y, self.smoothing)


@dataclass(frozen=True)
class NoiseInjection(Stateless):
    """Cross-entropy on ``x + δ``, ``δ ~ N(0, std² I)``, JEAT section 3.2.

    The paper writes N(0, 24/255) without saying whether that is the variance; here it is the standard deviation.  Read
    as variances, its three values are deviations of 0.177, 0.251 and 0.307.  The noisy image is not clamped.

    Attributes:
        std: standard deviation of the noise in pixels of [0, 1]; the paper uses 8, 16 and 24/255.
    """

    std: float = 24 / 255

    cites: ClassVar[tuple[str, ...]] = ("jeat",)

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise UserError(f"std is a deviation >= 0 in pixels of [0, 1], got {self.std}")

    def search(self, model: nn.Module, batch: Batch, state: None, ctx: Context) -> Tensor:
        return batch.x + self.std * randn(batch.x, ctx.generator)

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: None, ctx: Context) -> Loss:
        return cross_entropy(model, found, batch.y)
