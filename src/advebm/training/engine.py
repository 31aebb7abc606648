"""Devices and processes, through accelerate.  The only file that knows about it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from advebm.errors import UserError
from advebm.objectives.base import Batch, Context, Loss, Objective


class Step(nn.Module):
    """The loss as a module, so that distributed training wraps it and nothing else: searches run on the bare net."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, found: Any, state: Any, ctx: Context) -> Loss:
        """The objective's loss."""
        return self.objective.loss(self.model, batch, found, state, ctx)


class Gather(torch.autograd.Function):
    """The rows of all processes, whose gradients come back to the process that they are from, summed over all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, accelerator: Accelerator) -> Tensor:  # noqa: D102
        ctx.accelerator, ctx.count = accelerator, len(rows)
        return accelerator.gather(rows.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        total = ctx.accelerator.reduce(gradient.contiguous(), "sum")
        return total[ctx.accelerator.process_index * ctx.count :][: ctx.count], None


class Engine:
    """One process's view of the run.  Precision is left alone: autocast belongs around a network, not a step."""

    def __init__(self, device: str | None = None) -> None:
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.device = self.accelerator.device
        if device not in (None, self.device.type, str(self.device)):
            raise UserError(f"there is no device {device!r} for this process, which has {str(self.device)!r}")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    def wrap(self, model: nn.Module, objective: Objective) -> nn.Module:
        """The loss module, on this process's device, with gradients averaged over processes."""
        return self.accelerator.prepare_model(Step(model, objective))

    def owned(self, streams: int) -> range:
        """The streams that this process works on."""
        if streams % self.world:
            raise UserError(f"{self.world} processes cannot share {streams} streams evenly; set --train.streams")
        share = streams // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    @contextlib.contextmanager
    def accumulating(self, step: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are exchanged between processes only in the last share of a batch."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(step):
            yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        self.accelerator.backward(loss)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes."""
        return value if self.world == 1 else self.accelerator.reduce(value, "mean")

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (N, …) of all processes, as many of each, one's own first; differentiable: (world N, …).

        A mean over processes of losses on gathered rows has the gradient that one process with all rows would have.
        """
        if self.world == 1:
            return rows
        return Gather.apply(rows, self.accelerator).roll(-self.rank * len(rows), 0)

    def any(self, flag: bool) -> bool:
        """Whether a flag is up in any process."""
        return flag if self.world == 1 else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()
