"""First convolutions that whiten patches of images."""

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from advebm.core.errors import UserError
from advebm.models.network import Network

IMAGES = 5_000  # images that the covariance is estimated from in the code of Jordan (2024)
FLOOR = 5e-4  # added to each variance, as there


@torch.no_grad()
def whiten_first_convolution(model: Network, x: Tensor) -> None:
    """Set the first convolution's filters to those that whiten patches of images, Jordan (2024, section 3.2).

    A filter is a principal component of the normalised patches divided by its standard deviation, so that its output
    has variance 1 and outputs are uncorrelated.  Filters come in pairs of opposite sign, those of the largest variance
    first; a convolution with more channels than these keeps the rest as it is.  There the filters stay fixed; here they
    are trained like all other weights.

    Args:
        model: begins with a convolution of one group.
        x: training images (N, C, H, W) in [0, 1].

    Raises:
        UserError: the backbone does not begin with such a convolution.
    """
    conv = next((m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None or conv.groups != 1 or conv.in_channels != x.shape[1]:
        raise UserError("init whitened needs a backbone that begins with a convolution of all channels of the image")
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
    for part in x.split(250):
        patches = unfold(part, tuple(kernel)).transpose(1, 2).reshape(-1, size).double()
        count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
    mean = total / count
    variances, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
    return vectors.T.flip(0), variances.flip(0)
