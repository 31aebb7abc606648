"""The gradient of a classifier's log-likelihood in its weights, and its two parts, CEM section 3.

A classifier with logits f is the energy model ``p(x, y) ∝ exp f_y(x)`` (P-CEM, CEM eq. 2).  Raising its likelihood on
data (x, y) takes negatives x̂, images drawn from the model: adversarial images, or samples of Langevin dynamics.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies, starts
from advebm.core import checks
from advebm.core.errors import UserError
from advebm.descent import Descent, free, raw
from advebm.models.batching import batch_size_for
from advebm.models.modes import searching


class LikelihoodGradient(NamedTuple):
    """Gradient of the mean log-likelihood of P-CEM in the weights; a step along it raises the likelihood.

    Attributes:
        consistency: mean of ``∇f_y(x) - ∇f_y(x̂)`` (P,), in the order of ``model.parameters()``; what adversarial
            training leaves out.  CEM prints ``f_ŷ`` in the second term, with which the parts do not add up.
        contrastive: mean of ``∇f_y(x̂) - Σ_k p(k|x̂) ∇f_k(x̂)`` (P,), which is ``∇ log p(y|x̂)``, CEM eq. 16: minus the
            gradient of adversarial training's loss where the negatives are its adversarial images.
    """

    consistency: Tensor
    contrastive: Tensor

    @property
    def total(self) -> Tensor:
        """Return the whole gradient (P,): mean of ``∇f_y(x)`` minus mean of ``∇ log Σ_k exp f_k(x̂)``."""
        return self.consistency + self.contrastive


def split_likelihood_gradient(model: nn.Module, x: Tensor, y: Tensor, negatives: Tensor) -> LikelihoodGradient:
    """Return both parts of the likelihood's gradient in those weights of a classifier that require a gradient.

    The model is computed in eval mode, so that its outputs for an image depend on that image alone; it does not change.

    Args:
        model: maps images (B, C, H, W) to logits (B, K).
        x, y: images (B, C, H, W) of the data, and their labels, int64 (B,).
        negatives: the images x̂ (B, C, H, W).  Negative i goes with label i: for adversarial images their own label;
            for samples of the model, which have none, any pairing gives the same total.

    Raises:
        UserError: the shapes or labels do not fit, the model does not return logits, or has no weights to train.
    """
    if not len(x) or x.shape != negatives.shape:
        got = f"{tuple(x.shape)} and {tuple(negatives.shape)}"
        raise UserError(f"images and negatives must have one shape (B, C, H, W) with B at least 1, got {got}")
    network = copy.deepcopy(model).eval()
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if not weights:
        raise UserError("the model has no weights that require a gradient; call model.requires_grad_()")
    size = sum(weight.numel() for weight in weights)
    consistency, contrastive = (torch.zeros(size, dtype=weights[0].dtype, device=x.device) for _ in range(2))
    for part in torch.arange(len(x), device=x.device).split(batch_size_for(x.shape[1:], network)):
        with torch.enable_grad():
            at_data, at_negatives = (checks.logits(network(images[part]), len(part)) for images in (x, negatives))
            label = checks.labels(y, len(x), at_data.shape[1])[part]
            moved = energies.joint(at_negatives, label)
            consistency += _gradient(moved - energies.joint(at_data, label), weights) / len(x)
            contrastive += _gradient(energies.marginal(at_negatives) - moved, weights) / len(x)
    return LikelihoodGradient(consistency, contrastive)


def _gradient(values: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """Return the gradient (P,) of the sum of the values in the weights, zeros where these have no part in it."""
    found = torch.autograd.grad(values.sum(), weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def draw_langevin_negatives(
    model: nn.Module, like: Tensor, *, steps: int, step_size: float, generator: torch.Generator
) -> Tensor:
    """Return negatives by ``x̂ ← x̂ - α ∇E(x̂) + √(2α) ε`` from uniform noise, the Langevin dynamics of CEM section 3.

    ``E(x) = -log Σ_k exp f_k(x)``.  The images, shaped like ``like`` (B, C, H, W), are not clamped to [0, 1].

    Args:
        model: maps images (B, C, H, W) to logits (B, K); used in eval mode.
        like: images whose number, shape, type and device the negatives have.
        steps: number of updates.
        step_size: α, in pixels² per nat, pixels in [0, 1].
        generator: source of the starts and of the noise ε.
    """
    if not step_size > 0:
        raise UserError(f"step_size must be > 0, got {step_size}")
    descent = Descent(steps, step_size, raw, free, (2 * step_size) ** 0.5)
    with searching(model) as f:
        return descent(lambda x: energies.marginal(f(x)), starts.noise(like, None, generator), generator=generator)
