"""Common corruptions of a batch of images, at five severities.

Kinds and names follow Hendrycks and Dietterich (2019), parameters and code are our own: accuracies here are not
comparable with those on CIFAR-10-C or ImageNet-C.  Grey and colour images of any size are accepted; blur widths and
pixel sizes scale with the image.  Only JPEG rounds to uint8.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, pad

from advebm.core.errors import UserError, unknown_name
from advebm.core.rng import rand, randn

# images (B, C, H, W) in [0, 1], the parameter of a severity, generator -> same shape, values may leave [0, 1]
Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def gaussian_noise(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add white noise of standard deviation ``std``."""
    return x + std * randn(x, generator)


def shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Add the Poisson noise of a sensor that counts ``photons`` where a pixel is 1."""
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set a random ``share`` of the values to 0 or 1, with equal probability."""
    drawn = rand(x, generator)
    return torch.where(drawn < share, (drawn < share / 2).to(x.dtype), x)


def gaussian_blur(x: Tensor, width: float, generator: torch.Generator) -> Tensor:
    """Blur with a Gaussian of deviation ``width`` times the shorter edge, cut at 4 deviations; edges are repeated."""
    std = width * min(x.shape[2:])
    reach = max(1, round(4 * std))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype) / std) ** 2)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    padded = pad(x, [reach] * 4, mode="replicate")
    return conv2d(conv2d(padded, weights, groups=x.shape[1]), weights.mT, groups=x.shape[1])


def contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Scale differences from each image's mean, channel by channel, by ``factor``."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


def brightness(x: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    return x + shift


def pixelate(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Average by area over larger pixels, ``share`` times as many along each edge, and resize back."""
    rows, columns = (_blocks(edge, max(1, round(edge * share))).to(x) for edge in x.shape[2:])
    return rows @ x @ columns.T


def _blocks(edge: int, cells: int) -> Tensor:
    """Return the matrix (edge, edge) that averages pixels over equal cells and back, weighted by shared area."""
    fine, coarse = torch.arange(edge + 1) / edge, torch.arange(cells + 1)[:, None] / cells
    shared = (torch.minimum(coarse[1:], fine[1:]) - torch.maximum(coarse[:-1], fine[:-1])).clamp_min(0)
    return edge * cells * shared.T @ shared


def jpeg(x: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    """Compress with Pillow's JPEG at this quality, with its chroma subsampling, and decompress."""
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(buffer, "JPEG", quality=int(quality))
        decoded.append(np.asarray(Image.open(buffer)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(x) / 255


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian-noise": (gaussian_noise, (0.04, 0.08, 0.12, 0.18, 0.26)),
    "shot-noise": (shot_noise, (200, 80, 40, 20, 10)),
    "impulse-noise": (impulse_noise, (0.02, 0.04, 0.08, 0.14, 0.2)),
    "gaussian-blur": (gaussian_blur, (0.015, 0.025, 0.035, 0.05, 0.07)),
    "contrast": (contrast, (0.7, 0.5, 0.35, 0.2, 0.1)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "pixelate": (pixelate, (0.8, 0.6, 0.45, 0.35, 0.25)),
    "jpeg": (jpeg, (60, 40, 25, 15, 8)),
}
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(x: Tensor, name: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupt images (B, C, H, W) in [0, 1], grey or RGB -> the same shape, clamped to [0, 1].

    Args:
        x: images, on the generator's device.
        name: a key of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        generator: used by the noises; other corruptions draw nothing.
    """
    check(name, severity)
    if x.shape[1] not in (1, 3):
        raise UserError(f"corruptions take grey or RGB images, 1 or 3 channels, got {x.shape[1]}")
    function, parameters = CORRUPTIONS[name]
    return function(x, parameters[severity - 1], generator).clamp(0, 1)


def check(name: str, severity: int) -> None:
    """Raise UserError for an unknown corruption or severity."""
    if name not in CORRUPTIONS:
        raise unknown_name("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"a severity is a whole number from 1 to 5, got {severity}")
