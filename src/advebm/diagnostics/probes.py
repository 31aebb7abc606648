"""Probes of a network: input gradients, images reconstructed from features, energies of several sets of images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from advebm.descent import Descent, box, unit, value_and_gradient
from advebm.models.batching import as_images, device_of
from advebm.models.modes import searching
from advebm.models.network import Network
from advebm.samplers.base import joint_or_marginal, marginal


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return ``-∇E(x, y)`` (B, C, H, W), which makes an image more like its class, Tsipras et al. (2019).

    For a critic: ``-∇E(x)``.
    """
    with searching(model) as f:
        return -value_and_gradient(joint_or_marginal(f, x, y), x)[1]


def invert(
    model: Network, target: Tensor, begin: Tensor, *, steps: int = 200, size: float = 0.0125, last: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Reconstruct images from features: minimise ``‖g(x) - g(x*)‖²`` from ``begin``, Engstrom et al. (2019).

    Args:
        model: network with the features g.
        target: images x* (B, C, H, W).
        begin: initial x (B, C, H, W).
        steps: number of descent steps along the normalised gradient.
        size: root mean square over pixels of the first step.
        last: factor by which the step length has shrunk at the end, exponentially.

    Returns:
        x, and its distance to x* in features divided by the initial distance, (B,).
    """
    with searching(model):
        target_features = model.features(target).detach()
        distance = lambda x: (model.features(x) - target_features).square().sum(1)
        length = size * begin[0].numel() ** 0.5
        x = Descent(steps, lambda share: length * last**share, unit, box())(distance, begin)
        with torch.no_grad():
            relative_distance = (distance(x) / distance(begin).clamp_min(1e-12)).sqrt()
    return x, relative_distance


def populations(model: nn.Module, sets: Mapping[str, Tensor], *, batch: int = 500) -> dict[str, Tensor]:
    """Return ``E(x)`` (N,), float64 on the CPU, of each set of images, which are uint8 or floating point."""
    device = device_of(model)
    with searching(model) as f, torch.no_grad():
        energy = marginal(f)
        return {
            name: torch.cat([energy(as_images(part, device)).cpu().double() for part in x.split(batch)])
            for name, x in sets.items()
        }
