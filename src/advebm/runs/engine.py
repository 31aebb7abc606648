"""Devices and processes, through accelerate.  The only file that knows about it."""

import contextlib
import datetime
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from advebm.core import processes
from advebm.core.errors import Lost, UserError

Thing = TypeVar("Thing")

PATIENCE = datetime.timedelta(hours=2)  # before a process that does not answer is given up


def close_connections() -> None:
    """Close the connections to other processes: those that are open when a process ends may end it with an error.

    Only where all has gone well: it may wait for processes that have failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Gather(torch.autograd.Function):
    """The rows of all processes, whose gradients come back to the process that they are from, summed over all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, engine: "Engine") -> Tensor:
        ctx.engine, ctx.count = engine, len(rows)
        with engine.together():
            return engine.accelerator.gather(rows.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = ctx.engine.reduce(gradient.contiguous(), "sum")
        return total[ctx.engine.rank * ctx.count :][: ctx.count], None


class Engine:
    """One process's view of the run.  Precision is left alone: autocast belongs around a network, not a step.

    Gradients are exchanged once a step, after the streams of a process: next to the search, which exchanges nothing,
    that is little, and the loss may call the network as often and in whatever way it likes.
    """

    def __init__(self, device: str | None = None) -> None:
        patient, several = InitProcessGroupKwargs(timeout=PATIENCE), processes.rank_and_world()[1] > 1
        cpu = device == "cpu" or (several and not torch.cuda.is_available())  # which accelerate does not conclude
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patient])
        self.device = self.accelerator.device
        if device not in (None, self.device.type, str(self.device)):
            raise UserError(f"there is no device {device!r} for this process, which has {str(self.device)!r}")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    def owned(self, streams: int) -> range:
        """The streams that this process works on."""
        if streams % self.world:
            raise UserError(
                f"{self.world} processes cannot share {streams} streams evenly; set --train.streams {self.world}, or a "
                "multiple of it"
            )
        share = streams // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what needs every process: raises :class:`Lost` where one is gone."""
        try:
            yield
        except RuntimeError as error:  # of the backend; they have no type in common
            if self.world == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            why = re.sub(r"^\[\S+\] ", "", str(error).strip()).partition(". ")[0]
            raise Lost(f"another process of this job has ended ({why})") from error

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """``sum`` or ``mean`` over processes."""
        with self.together():
            return self.accelerator.reduce(value, how)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes."""
        return value if self.world == 1 else self.reduce(value, "mean")

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over processes in the place of each, in one exchange."""
        if self.world == 1 or not tensors:
            return
        means = self.mean(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients of the mean over processes of their losses; a parameter without any in every process has none."""
        if self.world == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.average([*(p.grad for p in parameters if p.grad is not None), used])
        for p, share in zip(parameters, used.tolist(), strict=True):
            p.grad = p.grad if share else None

    @torch.no_grad()
    def broadcast(self, model: nn.Module) -> None:
        """The weights and buffers of the main process, in all."""
        if self.world == 1:
            return
        for value in model.state_dict().values():
            with self.together():
                value.copy_(broadcast(value.clone()))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (N, …) of all processes, as many of each, one's own first; differentiable: (world N, …).

        A mean over processes of losses on gathered rows has the gradient that one process with all rows would have.
        """
        if self.world == 1:
            return rows
        return Gather.apply(rows, self).roll(-self.rank * len(rows), 0)

    def all_gather(self, thing: Thing) -> list[Thing]:
        """What each process gives, in the order of ranks: small things of Python."""
        if self.world == 1:
            return [thing]
        with self.together():
            return gather_object([thing])

    def any(self, flag: bool) -> bool:
        """Whether a flag is up in any process."""
        return flag if self.world == 1 else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        with self.together():
            self.accelerator.wait_for_everyone()
