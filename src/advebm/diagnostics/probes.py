"""What the network sees: input gradients, images from features, energies of kinds of images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from advebm.descent import Descent, box, unit, value_and_gradient
from advebm.models.batching import as_images, device_of
from advebm.models.modes import searching
from advebm.models.network import Network
from advebm.samplers.base import joint_or_marginal, marginal


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``-∇E(x, y)``, what would make each image more like its class, Tsipras et al. (2019); (B, C, H, W).

    Of a critic ``-∇E(x)``.
    """
    with searching(model) as f:
        return -value_and_gradient(joint_or_marginal(f, x, y), x)[1]


def invert(
    model: Network, target: Tensor, begin: Tensor, *, steps: int = 200, size: float = 0.0125, last: float = 0.05
) -> tuple[Tensor, Tensor]:
    """Images from features: descends ``‖g(x) - g(x*)‖²`` from ``begin``, Engstrom et al. (2019).

    Args:
        model: whose features g are.
        target: x* (B, C, H, W).
        begin: where x begins.
        steps: of unit direction, each of a root mean square of ``size``, which shrinks to a share ``last`` of itself.
        size, last: see there.

    Returns:
        x, and how much of the distance to x* in features is left, (B,), as a share of that at the beginning.
    """
    with searching(model):
        wanted = model.features(target).detach()
        distance = lambda x: (model.features(x) - wanted).square().sum(1)
        length = size * begin[0].numel() ** 0.5
        x = Descent(steps, lambda share: length * last**share, unit, box())(distance, begin)
        with torch.no_grad():
            left = (distance(x) / distance(begin).clamp_min(1e-12)).sqrt()
    return x, left


def populations(model: nn.Module, sets: Mapping[str, Tensor], *, batch: int = 500) -> dict[str, Tensor]:
    """``E(x)`` (N,) float64 of each set of images, bytes or floating point."""
    device = device_of(model)
    with searching(model) as f, torch.no_grad():
        energy = marginal(f)
        return {
            name: torch.cat([energy(as_images(part, device)).double().cpu() for part in x.split(batch)])
            for name, x in sets.items()
        }
