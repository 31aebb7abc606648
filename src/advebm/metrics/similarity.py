"""Distances between images, and the nearest training images."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from advebm.core.errors import UserError
from advebm.data.sources import to_float

Distances = Callable[[Tensor, Tensor], Tensor]  # (A, C, H, W) and (B, C, H, W) in [0, 1] -> (A, B), low = near


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances (A, B) in pixels of [0, 1]."""
    return torch.cdist(a.flatten(1), b.flatten(1))


def ssim(a: Tensor, b: Tensor, *, sigma: float = 1.5, width: int = 11) -> Tensor:
    """Return the structural similarity (A, B) of every pair, in [-1, 1], Wang et al. (2004).

    The mean is over channels and all positions of a Gaussian window inside the image; ``K_1 = 0.01``, ``K_2 = 0.03``.
    Images smaller than the window use the largest odd window that fits.
    """
    size = min(width, *a.shape[2:])
    size -= 1 - size % 2
    if a.shape[1:] != b.shape[1:]:
        raise UserError(f"images to compare have one shape, got {tuple(a.shape[1:])} and {tuple(b.shape[1:])}")
    offsets = torch.arange(size, dtype=a.dtype, device=a.device) - size // 2
    gaussian = torch.exp(-(offsets**2) / (2 * sigma**2))
    window = gaussian / gaussian.sum()

    def smooth(x: Tensor) -> Tensor:
        single = x.reshape(-1, 1, *x.shape[2:])
        smoothed = conv2d(conv2d(single, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return smoothed.view(len(x), x.shape[1], *smoothed.shape[2:])

    mean_b, square_b = smooth(b), smooth(b * b)
    variance_b = square_b - mean_b**2
    rows = []
    for image in a:
        x = image[None]
        mean_a = smooth(x)
        variance_a = smooth(x * x) - mean_a**2
        covariance = smooth(x * b) - mean_a * mean_b
        same_mean = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        same_shape = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
        rows.append((same_mean * same_shape).flatten(1).mean(1))
    return torch.stack(rows)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR (B,) of images ``a`` and ``b``, (B, C, H, W) in [0, 1], in decibels; inf if equal."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def paired_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return :func:`ssim` (B,) of each image in ``a`` with the one at the same position in ``b``."""
    return torch.cat([ssim(x[None], y[None]).squeeze(0) for x, y in zip(a, b, strict=True)])


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """Return ``1 - SSIM``, so that low means near, (A, B)."""
    return 1 - ssim(a, b)


class Near(NamedTuple):
    """Indices and distances of the nearest images, each (B, k), nearest first."""

    which: Tensor
    distance: Tensor


def nearest(x: Tensor, others: Tensor, k: int, distances: Distances = l2, *, block: int = 4096) -> Near:
    """Find the ``k`` nearest of ``others (N, C, H, W)``, uint8 or floating point, to each of ``x``, in blocks."""
    if not 1 <= k <= len(others):
        raise UserError(f"there are {len(others)} images to be near to, asked for {k}")
    best = Near(torch.empty(len(x), 0, dtype=torch.int64), torch.empty(len(x), 0))
    for indices, part in zip(torch.arange(len(others)).split(block), others.split(block), strict=True):
        images = to_float(part) if part.dtype == torch.uint8 else part
        index = torch.cat([best.which, indices.expand(len(x), -1)], 1)
        distance = torch.cat([best.distance, distances(x, images)], 1)
        order = distance.argsort(stable=True, dim=1)[:, :k]
        best = Near(index.gather(1, order), distance.gather(1, order))
    return best


def copies(generated: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Measure whether a model copies training images, from distances (N,) and (M,) to the nearest training image.

    Returns the share of generated images that are closer to a training image than the 1 % quantile of held-out real
    images (0.01 is expected for real images), and the ratio of the medians (below 1: closer than real images).
    """
    threshold = held_out.double().quantile(0.01)
    share = (generated.double() < threshold).double().mean().item()
    return share, (generated.double().median() / held_out.double().median()).item()
