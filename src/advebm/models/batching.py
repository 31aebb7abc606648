"""The batch size, device and floating-point conversion of images that go through a network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advebm.data.sources import to_float


def batch_size_for(shape: Sequence[int]) -> int:
    """Return how many images of ``shape (C, H, W)`` to compute at once: 500 of up to 32 x 32 pixels, else fewer."""
    return min(500, max(1, 500 * 32 * 32 // (shape[1] * shape[2])))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights; the CPU if it has none."""
    return next((v.device for v in model.state_dict().values()), torch.device("cpu"))


def as_images(x: Tensor, device: torch.device) -> Tensor:
    """Return images, uint8 or floating point in [0, 1], as floating point in [0, 1] on a device."""
    x = x.to(device)
    return to_float(x) if x.dtype == torch.uint8 else x
