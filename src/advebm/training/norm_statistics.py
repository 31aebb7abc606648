"""Running statistics of batch norms over the streams of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Statistics:
    """The buffers of a network, running statistics above all, over a batch that comes in streams.

    Each stream begins with what the batch began with, and the mean of their moves stays, whoever worked on which: so
    the statistics move once a batch, and do not depend on the number of processes.

    Args:
        model: the network; None, where there is one stream, leaves everything as it comes.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.buffers = [] if model is None else [v for v in model.buffers() if v.dtype != torch.bool]
        self.before = [value.clone() for value in self.buffers]
        self.moves = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in self.buffers]
        self.streams = 0

    @torch.no_grad()
    def next(self) -> None:
        """A stream is through: keep its moves, and begin again."""
        self.streams += 1
        for value, before, move in zip(self.buffers, self.before, self.moves, strict=True):
            move += value - before
            value.copy_(before)

    @torch.no_grad()
    def settle(self, average: Callable[[list[Tensor]], None] = lambda values: None) -> None:
        """Make the mean move; ``average`` puts the means over processes in the place of values."""
        for move in self.moves:
            move /= self.streams
        average(self.moves)
        for value, before, move in zip(self.buffers, self.before, self.moves, strict=True):
            value.copy_(before + move)
