"""Images on a device, as many at a time as their size allows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advebm.data.sources import to_float


def batch_size_for(shape: Sequence[int]) -> int:
    """How many images of ``shape (C, H, W)`` go through a network at once: 500 of up to 32 x 32 pixels, else fewer."""
    return min(500, max(1, 500 * 32 * 32 // (shape[1] * shape[2])))


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU if it has none."""
    return next((v.device for v in model.state_dict().values()), torch.device("cpu"))


def as_images(x: Tensor, device: torch.device) -> Tensor:
    """Images, bytes or floating point in [0, 1], as floating point on a device."""
    x = x.to(device)
    return to_float(x) if x.dtype == torch.uint8 else x
