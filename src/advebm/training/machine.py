"""How fast a machine computes: what it reaches in a matrix product, or what its maker says."""

import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from advebm.errors import UserError, unknown

TERA, GB = 10**12, 10**9


class Machine(NamedTuple):
    """A device's peak rates and what training is assumed to reach of them.

    Attributes:
        name: for people.
        rates: FLOP a second by precision, ``float32`` and ``bfloat16``, dense.
        share: of the peak that training is assumed to reach.
        memory: bytes; none where nobody said.
    """

    name: str
    rates: Mapping[str, float]
    share: float
    memory: int | None = None

    def hours(self, flops: float, precision: str) -> float:
        """That so many FLOP take.

        Raises:
            UserError: a precision whose rate is not known.
        """
        if precision not in self.rates:
            raise UserError(f"no rate of {precision} is known, only of {' and '.join(self.rates)}; leave it out here")
        return flops / (self.share * self.rates[precision]) / 3600


def _published(name: str, float32: float, bfloat16: float, memory: int) -> Machine:
    return Machine(name, {"float32": float32 * TERA, "bfloat16": bfloat16 * TERA}, 0.25, memory * GB)


# Dense rates of NVIDIA's data sheets of the A100, H100 and H200 with SXM, and of its Ada white paper for the RTX 4090;
# float32 is TF32 on tensor cores, in which torch computes convolutions unless it is told otherwise.  A quarter of the
# peak is this package's assumption for networks of CIFAR's sizes, not a measurement.
PUBLISHED: Mapping[str, Machine] = MappingProxyType(
    {
        "a100": _published("A100", 156, 312, 80),
        "h100": _published("H100", 494.7, 989.4, 80),
        "h200": _published("H200", 494.7, 989.4, 141),
        "rtx4090": _published("RTX 4090", 82.6, 165.2, 24),
    }
)


def find(name: str) -> Machine:
    """A machine by name: ``a100``, ``h100``, ``h200`` or ``rtx4090`` as published; ``cpu`` or ``cuda``, measured here.

    Raises:
        UserError: another name.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name not in ("cpu", "cuda"):
        raise unknown("machine", name, ["cpu", "cuda", *PUBLISHED])
    found = {kind: max(rates(getattr(torch, kind), name, repeats=1).values()) for kind in ("float32", "bfloat16")}
    if name == "cpu":
        return Machine(f"this CPU, {torch.get_num_threads()} threads", found, 0.5)
    about = torch.cuda.get_device_properties(0)
    return Machine(about.name, found, 0.5, about.total_memory)


def rates(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> dict[str, float]:
    """FLOP a second, medians: ``gemm`` 2048 x 2048, ``conv`` 3x3 with 256 channels on 64 maps of 8 x 8."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(64, 256, 8, 8, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return {
        "gemm": 2 * 2048**3 / _seconds(lambda: a @ b, device, repeats),
        "conv": 2 * 64 * 64 * 256 * 256 * 9 / _seconds(lambda: conv2d(x, w, padding=1), device, repeats),
    }


def _seconds(compute: Callable[[], Tensor], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        for _ in range(5):
            compute()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / 5)
    return statistics.median(times[2:])
