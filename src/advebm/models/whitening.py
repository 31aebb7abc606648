"""First convolutions that whiten patches of images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from advebm.core.errors import UserError
from advebm.models.network import Network

IMAGES = 5_000  # images that the covariance is estimated from in the code of Jordan (2024)
VALUES = 2**27  # pixels times channels of these images, at most
PATCH_VALUES = 2**23  # of the patches that are in memory at once
FLOOR = 5e-4  # added to each variance, as there


def enough(shape: Sequence[int]) -> int:
    """Return how many images of a shape (C, H, W) the covariance of their patches is estimated from."""
    return max(1, min(IMAGES, VALUES // math.prod(shape)))


@torch.no_grad()
def whiten_first_convolution(model: Network, x: Tensor) -> None:
    """Set the first convolution's filters to those that whiten patches of images, Jordan (2024, section 3.2).

    A filter is a principal component of the normalised patches divided by its standard deviation, so that outputs are
    uncorrelated and have a variance of about 1, less where the component's own is as small as FLOOR.  Filters come in
    pairs of opposite sign, those of the largest variance first: 3x3 patches of colour images have 27, which take 54
    channels.  Fewer channels leave the weakest components out, more keep their own weights.  There the filters stay
    fixed; here they are trained like all other weights.

    Args:
        model: begins with a convolution of one group.
        x: training images (N, C, H, W) in [0, 1].

    Raises:
        UserError: the backbone does not begin with such a convolution.
    """
    conv = next((m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None or conv.groups != 1 or conv.in_channels != x.shape[1]:
        raise UserError("train.whiten needs a backbone that begins with a convolution of all channels of the image")
    components, variances = principal_patches(model.normalise(x), conv.kernel_size)
    filters = (components / (variances + FLOOR).sqrt()[:, None]).view(-1, *conv.weight.shape[1:])
    pairs = filters[: conv.out_channels // 2]
    conv.weight[: 2 * len(pairs)] = torch.cat([pairs, -pairs]).to(conv.weight)


def principal_patches(x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return principal components (d, d), in rows, and variances (d,) of patches of ``x (N, C, H, W)``, largest first.

    ``kernel`` is their height and width, and d = C x height x width.
    """
    size = x.shape[1] * kernel[0] * kernel[1]
    count, total, products = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for part in x.split(max(1, PATCH_VALUES // (size * x.shape[2] * x.shape[3]))):
        patches = unfold(part, tuple(kernel)).transpose(1, 2).reshape(-1, size).double()
        count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
    return vectors.T.flip(0), variances.flip(0)
