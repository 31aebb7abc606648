"""Speed of a machine, as measured on matrix products and convolutions, or from the data sheet."""

import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch.nn.functional import conv2d

from advebm.core.errors import UserError, unknown_name
from advebm.models.precision import usable_precision

TERA, GB = 10**12, 10**9


class Machine(NamedTuple):
    """The speed of a device, and the share of it that training is assumed to reach."""

    name: str
    rates: Mapping[str, float]  # FLOP per second by precision, such as ``float32``; for dense matrices
    share: float
    memory: int | None = None  # in bytes; None if unknown

    def hours(self, flops: float, precision: str) -> float:
        """Return the hours that ``flops`` take; raise ``UserError`` if the rate of the precision is unknown."""
        if precision not in self.rates:
            raise UserError(f"no rate of {precision} is known, only of {' and '.join(self.rates)}; leave it out here")
        return flops / (self.share * self.rates[precision]) / 3600


# Dense rates from NVIDIA's data sheets of the A100, H100 and H200 (SXM), and its Ada white paper for the RTX 4090.
# float32 stands for TF32 on tensor cores, which torch uses for convolutions by default; bfloat16 is twice as fast.  The
# share of a quarter of the peak is this package's assumption for networks of the size used on CIFAR, not a measurement.
RATES = (("A100", 156, 80), ("H100", 494.7, 80), ("H200", 494.7, 141), ("RTX 4090", 82.6, 24))  # TFLOP/s, GB
PUBLISHED: Mapping[str, Machine] = MappingProxyType(
    {
        name.lower().replace(" ", ""): Machine(name, {"float32": r * TERA, "bfloat16": 2 * r * TERA}, 0.25, memory * GB)
        for name, r, memory in RATES
    }
)


def find_machine(name: str) -> Machine:
    """Return the data-sheet rates of ``a100``, ``h100``, ``h200`` or ``rtx4090``; else raise ``UserError``."""
    if name not in PUBLISHED:
        raise unknown_name("machine", name, PUBLISHED)
    return PUBLISHED[name]


def describe_device(device: str) -> str:
    """Return a short description of a local device, such as ``cpu, 2 threads``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type != "cpu":
        return device
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}"


def report(device: str) -> str:
    """Measure a local device, and return a readable report of its type and speed."""
    vectors = f", vectors {torch.backends.cpu.get_cpu_capability()}" if torch.device(device).type == "cpu" else ""
    lines = [f"{describe_device(device)}{vectors}, torch {torch.__version__}"]
    for kind in dict.fromkeys(("float32", usable_precision("bfloat16", torch.device(device)))):
        gemm, conv = (rate / TERA for rate in rates(getattr(torch, kind), device, repeats=1).values())
        lines.append(f"{kind}: {gemm:.3g} TFLOP/s in products, {conv:.3g} in convolutions")
    if len(lines) < 3:
        lines.append("bfloat16: not multiplied by this device; float32 is used in its place")
    return "\n".join(lines)


def rates(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> dict[str, float]:
    """Measure FLOP per second (median): ``gemm`` 2048 x 2048, ``conv`` 3 x 3 with 256 filters on (64, 256, 8, 8)."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(64, 256, 8, 8, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return {
        "gemm": 2 * 2048**3 / seconds(lambda: a @ b, device, repeats),
        "conv": 2 * 64 * 64 * 256 * 256 * 9 / seconds(lambda: conv2d(x, w, padding=1), device, repeats),
    }


def seconds(compute: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Return the median time of a call in seconds over ``repeats``, after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        compute()
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
