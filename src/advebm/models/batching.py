"""The batch size, device and floating-point conversion of images that go through a network."""

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from advebm.data.sources import to_float
from advebm.models.modes import searching

SHARE = 0.25  # of a device's memory that the activations of a batch may take


def batch_size_for(shape: Sequence[int], model: nn.Module | None = None) -> int:
    """Return how many images of ``shape (C, H, W)`` to compute at once: 500 of up to 32 x 32 pixels, fewer larger ones.

    With a model, fewer still if the activations that a gradient with respect to so many images stores would take more
    than a quarter of the device's memory; what one image takes is found by trial.  The number depends on the size of
    the memory, not on what is free at the moment, so that an interrupted computation continues with the same batches.
    """
    most = min(500, max(1, 500 * 32 * 32 // (shape[1] * shape[2])))
    if model is None:
        return most
    memory, used = memory_of(device_of(model)), bytes_per_image(model, shape)
    return max(1, min(most, int(SHARE * memory / used))) if used else most


def memory_of(device: torch.device) -> int:
    """Return the size of a device's memory in bytes; where torch does not tell, that of the host."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps" and torch.mps.is_available():
        return torch.mps.recommended_max_memory()
    return int(psutil.virtual_memory().total)


def bytes_per_image(model: nn.Module, shape: Sequence[int]) -> int:
    """Return the bytes of activations that the gradient with respect to one image (C, H, W) stores; 0 if unknown."""
    weights = {value.untyped_storage().data_ptr() for value in model.state_dict(keep_vars=True).values()}
    stored: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return value

    def keep(value: Any) -> Any:
        return value

    x = torch.full((1, *shape), 0.5, device=device_of(model), requires_grad=True)
    with searching(model) as f, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, keep):
        try:
            out = f(x)
        except Exception:  # what keeps a model from taking one image is told where it is used
            return 0
    del out
    return sum(stored.values())


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights; the CPU if it has none."""
    return next((v.device for v in model.state_dict().values()), torch.device("cpu"))


def as_images(x: Tensor, device: torch.device) -> Tensor:
    """Return images, uint8 or floating point in [0, 1], as floating point in [0, 1] on a device."""
    x = x.to(device)
    return to_float(x) if x.dtype == torch.uint8 else x
