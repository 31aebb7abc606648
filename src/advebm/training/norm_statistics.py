"""Update batch-norm statistics over the streams of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Statistics:
    """The buffers of a network (mainly batch-norm running statistics) during a batch that is split into streams.

    Every stream starts from the same values, and at the end the mean of their changes is applied.  So the statistics
    are updated once per batch, and do not depend on the number of processes.

    Args:
        model: the network; None, for a single stream, does nothing.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.buffers = [] if model is None else [v for v in model.buffers() if v.dtype != torch.bool]
        self.before = [value.clone() for value in self.buffers]
        self.changes = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in self.buffers]
        self.streams = 0

    @torch.no_grad()
    def next(self) -> None:
        """Record the changes made by a finished stream, and restore the values from before it."""
        self.streams += 1
        for value, before, change in zip(self.buffers, self.before, self.changes, strict=True):
            change += value - before
            value.copy_(before)

    @torch.no_grad()
    def settle(self, average: Callable[[list[Tensor]], None] = lambda values: None) -> None:
        """Apply the mean change; ``average`` replaces tensors in place by their means over processes."""
        for change in self.changes:
            change /= self.streams
        average(self.changes)
        for value, before, change in zip(self.buffers, self.before, self.changes, strict=True):
            value.copy_(before + change)
