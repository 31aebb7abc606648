"""The widest floating point of a device, for what float32 would round too much."""

import torch
from torch import Tensor

NO_FLOAT64 = {"mps"}  # types of devices without float64: Apple's GPUs


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float64, or in float32 on a device that has no float64."""
    return x.to(widest(x.device))
