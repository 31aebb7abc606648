"""Devices and multi-process communication.  Only this file and ``tracking`` import accelerate."""

import contextlib
import datetime
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from advebm.core import checks, processes
from advebm.core.errors import Lost, UserError

Thing = TypeVar("Thing")

TIMEOUT = datetime.timedelta(hours=2)  # timeout for a process that does not answer


def close_connections() -> None:
    """Close the connections to other processes, and so end the threads of gloo that serve them.

    Such a thread may still free a tensor of the last communication.  If Python is shutting down by then, it cannot, and
    aborts the process.  Call this only where all processes end together: it may wait for ones that have failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Gather(torch.autograd.Function):
    """Differentiable gather; gradients of a row are summed over all processes, in the process it came from."""

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
    """The device of this process, and its communication with the other processes of the run.

    Mixed precision is not handled here, as autocast wraps the network rather than the whole step.
    """

    def __init__(self, device: str | None = None) -> None:
        timeout, distributed = InitProcessGroupKwargs(timeout=TIMEOUT), processes.rank_and_world()[1] > 1
        cpu = device == "cpu" or (distributed and not torch.cuda.is_available())  # accelerate does not detect this
        if distributed:
            processes.check_restarts()
            # Its functions keep the process group of the time of its import as a default, even when the group is
            # destroyed, so it is imported while there is none.
            importlib.import_module("torch.distributed.nn.functional")
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[timeout])
        self.device = self.accelerator.device if distributed else torch.device(checks.device(device))
        if distributed and device not in (None, self.device.type, str(self.device)):
            raise UserError(f"there is no device {device!r} for this process, which has {str(self.device)!r}")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process

    def owned(self, streams: int) -> range:
        """Return the streams of this process; raise ``UserError`` if they cannot be shared evenly."""
        if streams % self.world:
            raise UserError(
                f"{self.world} processes cannot share {streams} streams evenly; set --train.streams {self.world}, or a "
                "multiple of it"
            )
        share = streams // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Wrap communication between processes, and raise :class:`Lost` if one of them has ended."""
        try:
            yield
        except RuntimeError as error:  # backends raise no more specific type
            if self.world == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).partition(". ")[0]
            raise Lost(f"another process of this job has ended ({reason})") from error

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """Reduce over processes; ``how`` is ``sum`` or ``mean``."""
        with self.together():
            return self.accelerator.reduce(value, how)

    def mean(self, value: Tensor) -> Tensor:
        return value if self.world == 1 else self.reduce(value, "mean")

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor in place by its mean over processes, in a single communication."""
        if self.world == 1 or not tensors:
            return
        means = self.mean(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def begin_sum(self, value: Tensor) -> Callable[[], None]:
        """Begin to add up a tensor over processes, in place; call what is returned to wait for the sum."""
        with self.together():
            work = torch.distributed.all_reduce(value, async_op=True)

        def wait() -> None:
            with self.together():
                work.wait()

        return wait

    @torch.no_grad()
    def broadcast(self, model: nn.Module) -> None:
        """Copy the weights and buffers of the main process to all others."""
        if self.world == 1:
            return
        for value in model.state_dict().values():
            with self.together():
                value.copy_(broadcast(value.clone()))

    def gather(self, rows: Tensor) -> Tensor:
        """Gather rows (N, …) from all processes as (world N, …), this process's rows first; differentiable.

        N must be equal in all processes.  The mean over processes of losses on gathered rows has the same gradient as
        the loss of a single process with all rows.
        """
        if self.world == 1:
            return rows
        return Gather.apply(rows, self).roll(-self.rank * len(rows), 0)

    def all_gather(self, thing: Thing) -> list[Thing]:
        """Gather a small picklable object from each process, in the order of ranks."""
        if self.world == 1:
            return [thing]
        with self.together():
            return gather_object([thing])

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return flag if self.world == 1 else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        with self.together():
            self.accelerator.wait_for_everyone()
