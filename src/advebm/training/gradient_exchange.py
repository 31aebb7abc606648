"""The mean of gradients over processes, exchanged while the backward pass still computes others."""

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.runs.engine import Engine

BUCKET = 25 * 2**20  # bytes of gradients that are exchanged together, as torch's DistributedDataParallel does


class GradientExchange:
    """Computes gradients of a loss, and averages them over processes.

    Unlike :class:`torch.nn.parallel.DistributedDataParallel` it does not wrap the network.  So a loss may call the
    network any number of times, and leave parameters unused, others in each process.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], engine: Engine) -> None:
        self.parameters, self.engine = list(parameters), engine
        self.buckets: list[list[nn.Parameter]] = []
        self.numbers: dict[int, int] = {}  # id of a parameter -> its bucket
        self.hooked = set[int]()
        self.missing: list[set[int]] | None = None  # ids of parameters without their gradient; None: no exchange
        self.sent: list[tuple[Tensor, list[Tensor], Callable[[], None]]] = []

    def backward(self, loss: Tensor, *, exchange: bool = True) -> None:
        """Add the gradients of a scalar loss to those that are there, and then average all over processes.

        All processes have to call this together.  A gradient that is None in every process stays None.

        Args:
            exchange: False to average later, at the next call: this is one of several losses that a process adds up.
        """
        if self.engine.world == 1 or not exchange:
            loss.backward()
            return
        self._group()
        self.sent, self.missing = [], [set(map(id, bucket)) for bucket in self.buckets]
        try:
            loss.backward()
        finally:
            self.missing = None
        while len(self.sent) < len(self.buckets):
            self._send()
        self._receive()

    def _group(self) -> None:
        """Divide the parameters that are trained now into buckets, unless they are those of the last time."""
        trained = [p for p in reversed(self.parameters) if p.requires_grad]  # about the order of the backward pass
        if [id(p) for p in trained] == list(self.numbers):
            return
        self.buckets, size = [], BUCKET
        for p in trained:
            if size >= BUCKET or p.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.numel() * p.element_size()
            if id(p) not in self.hooked:
                self.hooked.add(id(p))
                p.register_post_accumulate_grad_hook(self._note)
        self.numbers = {id(p): number for number, bucket in enumerate(self.buckets) for p in bucket}

    def _note(self, p: Tensor) -> None:
        """Note that a parameter has its gradient; send the buckets that are complete, in their order."""
        if self.missing is None:
            return
        number = self.numbers[id(p)]
        if id(p) not in self.missing[number]:
            raise UserError(
                "a gradient was computed in two parts, which cannot be exchanged during the backward pass; "
                "torch.utils.checkpoint does so: set its use_reentrant to False"
            )
        self.missing[number].remove(id(p))
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Begin to add up the gradients of the next bucket, and in how many processes each of them is there."""
        bucket = self.buckets[len(self.sent)]
        values = bucket[0].new_ones(sum(p.numel() for p in bucket) + len(bucket))
        views = _views(values, bucket)
        for number, (view, p) in enumerate(zip(views, bucket, strict=True)):
            if p.grad is None:
                values[number - len(bucket)] = 0
                view.zero_()
            else:
                view.copy_(p.grad)
        self.sent.append((values, views, self.engine.begin_sum(values)))

    @torch.no_grad()
    def _receive(self) -> None:
        """Wait for all buckets, and let the gradients be the means, in the memory that was exchanged."""
        counts = []
        for bucket, (values, _, wait) in zip(self.buckets, self.sent, strict=True):
            wait()
            counts.append(values[-len(bucket) :].clone())
            values.div_(self.engine.world)
        parameters = chain.from_iterable(self.buckets)
        views = chain.from_iterable(views for _, views, _ in self.sent)
        for p, view, count in zip(parameters, views, torch.cat(counts).tolist(), strict=True):
            p.grad = view if count else None
        self.sent = []


def _views(values: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return consecutive parts of a vector as tensors of the parameters' shapes and memory formats."""
    views, offset = list[Tensor](), 0
    for p in parameters:
        strides = torch.empty_like(p, device="meta").stride()  # dense, also where those of the parameter are not
        views.append(values.as_strided(p.shape, strides, offset))
        offset += p.numel()
    return views
