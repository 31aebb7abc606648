"""Check that this machine computes convolutions correctly: each shape that a network uses, against float64.

Libraries choose different kernels for different CPUs and shapes, and one of them may give wrong results, write outside
its memory or never return.  So convolutions run in a separate process, which may crash:
``python -m advebm.diagnostics.kernels``.
"""

import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from queue import Empty, Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from advebm.core.errors import UserError
from advebm.models.precision import usable_precision

COMMAND = (sys.executable, "-m", "advebm.diagnostics.kernels")
REPEATS = 3  # calls for each shape: a kernel that reads stale memory may be right the first time
START_TIMEOUT = 60.0  # seconds for a process to import torch
CALL_TIMEOUT = 8.0  # seconds for one shape, after which its process is killed
FLOP = 4e9  # limit for one forward pass; the batch is made smaller to stay below it
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}  # relative error in norm; correct kernels reach 1e-6 and 0.003


@dataclass(frozen=True)
class Convolution:
    """The arguments of one call of a convolution.

    Attributes:
        input, weight: shapes (B, C, …) and (O, C / groups, …); for a transposed convolution (C, O / groups, …).
        channels_last: whether the input and whether the weight is stored in channels-last order.
        bias: whether there is one.
        stride, padding, dilation, output_padding: one number for each spatial dimension.
        transposed: whether it is a transposed convolution.
        groups: number of channel groups.
        dtype: ``float32`` or ``bfloat16``.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    channels_last: tuple[bool, bool]
    bias: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    dtype: str = "float32"

    def __str__(self) -> str:
        size, kernel = ("x".join(map(str, dims[2:])) for dims in (self.input, self.weight))
        words = [f"{kernel} convolution of {self.input[1]} channels to {self.outputs}, stride {self.stride[0]}"]
        words += [f"{self.groups} groups"] * (self.groups > 1) + ["transposed"] * self.transposed
        words += [f"{self.input[0]} images of {size}", "channels last" if any(self.channels_last) else "plain layout"]
        return ", ".join([*words, self.dtype])

    @property
    def outputs(self) -> int:
        return self.weight[1] * self.groups if self.transposed else self.weight[0]


@dataclass(frozen=True)
class Verdict:
    """The result of checking one convolution.

    Attributes:
        convolution: what was computed.
        errors: of the output, the gradient in the images and the gradient in the weight: ‖result - float64 result‖ /
            ‖float64 result‖, the largest of three calls; empty if the process died or was killed.
        died: how the process ended: ``killed by signal 11``, ``ended with status 1`` or ``never returned in 8 s``.
    """

    convolution: Convolution
    errors: tuple[float, ...] = ()
    died: str = ""

    @property
    def wrong(self) -> bool:
        """Whether an error is NaN or larger than rounding explains, or the process died."""
        return bool(self.died) or not all(e < self.limit for e in self.errors)

    def __str__(self) -> str:
        names = ("output", "gradient of the images", "gradient of the weight")
        off = [f"{name} off by {e:.2g}" for name, e in zip(names, self.errors, strict=False) if not e < self.limit]
        return f"{self.convolution}: {self.died or ', '.join(off) or 'right'}"

    @property
    def limit(self) -> float:
        """The largest relative error that rounding explains."""
        return TOLERANCE[self.convolution.dtype]


# oneDNN 3.12 computes this wrongly on CPUs without AVX-512; no network of this package calls it (docs/cpu.md).
KNOWN_WRONG = Convolution((8, 2, 8, 8), (8, 2, 1, 1), (True, True), False, (2, 2), (0, 0), (1, 1), False, (0, 0), 1)


class _Recorder(TorchDispatchMode):
    """Records every convolution that is called inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: dict[Convolution, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, w, bias, stride, padding, dilation, transposed, output_padding, groups = args
            layout = (_is_channels_last(x), _is_channels_last(w))
            dims = [tuple(v) for v in (stride, padding, dilation, output_padding)]
            shape = (tuple(x.shape), tuple(w.shape), layout, bias is not None, *dims[:3], transposed, dims[3], groups)
            self.convolutions[Convolution(*shape)] = None
        return func(*args, **(kwargs or {}))


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) == x.shape[1]


def convolutions(model: nn.Module, shape: Sequence[int], batch: int, precision: str = "float32") -> list[Convolution]:
    """Return a model's distinct convolutions on ``batch`` images (C, H, W), in float32 and ``precision`` if usable."""
    weight = next(iter(model.parameters()), torch.empty(0))
    with _Recorder() as recorder, torch.no_grad():
        model(torch.rand(batch, *shape, device=weight.device))
    dtypes = dict.fromkeys(("float32", usable_precision(precision, weight.device)))
    return [replace(c, dtype=dtype) for dtype in dtypes for c in recorder.convolutions]


def errors(c: Convolution) -> tuple[float, ...]:
    """Return the errors of one call, see :class:`Verdict`; float64 gets the same inputs, rounded to ``c.dtype``."""
    dtype, generator = getattr(torch, c.dtype), torch.Generator().manual_seed(0)
    flop_per_image = 2 * c.outputs * math.prod(c.weight[1:]) * math.prod(c.input[2:])
    shapes = ((max(1, min(c.input[0], int(FLOP / flop_per_image))), *c.input[1:]), c.weight)
    x, w = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    bias = torch.randn(c.outputs, generator=generator).to(dtype) if c.bias else None
    results: list[list[Tensor]] = []
    upstream: Tensor | None = None
    for kind in (torch.float64, dtype):
        formats = [
            torch.channels_last if last and kind == dtype else torch.contiguous_format for last in c.channels_last
        ]
        leaves = [v.to(kind).clone(memory_format=f).requires_grad_() for v, f in zip((x, w), formats, strict=True)]
        settings = (c.stride, c.padding, c.dilation, c.transposed, c.output_padding, c.groups)
        out = torch.convolution(leaves[0], leaves[1], None if bias is None else bias.to(kind), *settings)
        if upstream is None:
            upstream = torch.randn(out.shape, generator=generator).to(dtype)
        gradients = torch.autograd.grad(out, leaves, torch.empty_like(out).copy_(upstream))
        results.append([v.double() for v in (out.detach(), *gradients)])
    return tuple(((b - a).norm() / a.norm()).item() for a, b in zip(*results, strict=True))


class _Worker:
    def __init__(self) -> None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process: Any = subprocess.Popen(COMMAND, text=True, **pipes)
        self.process = process
        self.lines: Queue[str] = Queue()
        Thread(target=self._listen, daemon=True).start()
        try:
            while (line := self.lines.get(timeout=START_TIMEOUT)) != "ready\n":  # skip what libraries print
                if not line:
                    raise UserError(f"{' '.join(COMMAND)} does not start: {process.communicate()[1][-500:].strip()}")
        except Empty:
            self.close()
            raise UserError(
                f"{' '.join(COMMAND)} is not ready after {START_TIMEOUT:.0f} s; is the machine busy?"
            ) from None

    def _listen(self) -> None:
        for line in self.process.stdout:
            if line.startswith(("ready", "[")):
                self.lines.put(line)
        self.lines.put("")

    def ask(self, c: Convolution, patience: float) -> Verdict | None:
        """Return the verdict on a convolution, or None if it takes longer than ``patience`` seconds."""
        end, calls = time.monotonic() + patience, list[list[float]]()
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(asdict(c)) + "\n")
            self.process.stdin.flush()
        for _ in range(REPEATS + 1):
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                return None
            if not line:
                status = self.process.wait()
                return Verdict(c, died=f"killed by signal {-status}" if status < 0 else f"ended with status {status}")
            calls.append(json.loads(line))
        calls.pop()  # the last line only says that the process is still alive
        return Verdict(c, tuple(max(errors, key=lambda e: (math.isnan(e), e)) for errors in zip(*calls, strict=True)))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def check(
    convolutions: Sequence[Convolution], *, limit: float = 30.0, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Verdict]:
    """Yield a verdict on each convolution until ``limit`` seconds, starting processes included, have passed.

    Raises:
        UserError: the process that computes ends before it is ready, or is not ready after 60 seconds.
    """
    end, worker = time.monotonic() + limit, None
    try:
        for done, c in enumerate(convolutions):
            progress(done)
            if time.monotonic() >= end:
                return
            worker = worker or _Worker()
            left = end - time.monotonic()
            verdict = worker.ask(c, min(CALL_TIMEOUT, left))
            if verdict is None and left < CALL_TIMEOUT:
                return
            verdict = verdict or Verdict(c, died=f"never returned in {CALL_TIMEOUT:.0f} s")
            if verdict.wrong:  # it may have written anywhere in its memory
                worker.close()
                worker = None
            yield verdict
        progress(len(convolutions))
    finally:
        if worker is not None:
            worker.close()


def main() -> None:
    """Read a :class:`Convolution` as JSON from each input line; print the errors of three calls, one a line, and []."""
    print("ready", flush=True)
    for line in sys.stdin:
        plain: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(line).items()}
        for _ in range(REPEATS):
            print(json.dumps(errors(Convolution(**plain))), flush=True)
        list(map(bytes, range(1, 4096)))  # many allocations, which crash if the heap is corrupted
        print("[]", flush=True)


if __name__ == "__main__":
    main()
