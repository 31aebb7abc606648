"""How fast a machine computes: what it reaches in matrix products and convolutions, or what its maker says."""

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


def find_machine(name: str) -> Machine:
    """A machine by name, as its maker says: ``a100``, ``h100``, ``h200`` or ``rtx4090``.

    Raises:
        UserError: another name.
    """
    if name not in PUBLISHED:
        raise unknown_name("machine", name, PUBLISHED)
    return PUBLISHED[name]


def describe_device(device: str) -> str:
    """A device of this machine in a few words: ``cpu, 2 threads``."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}"


def report(device: str) -> str:
    """What a device of this machine is and how fast it multiplies, for people."""
    words = [describe_device(device)]
    if torch.device(device).type == "cpu":
        words.append(f"vectors {torch.backends.cpu.get_cpu_capability()}")
    lines = [f"{', '.join(words)}, torch {torch.__version__}"]
    for kind in dict.fromkeys(("float32", usable_precision("bfloat16", torch.device(device)))):
        found = rates(getattr(torch, kind), device, repeats=1)
        lines.append(
            f"{kind}: {found['gemm'] / TERA:.3g} TFLOP/s in products, {found['conv'] / TERA:.3g} in convolutions"
        )
    if len(lines) < 3:
        lines.append("bfloat16: not multiplied by this device; float32 is used in its place")
    return "\n".join(lines)


def rates(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> dict[str, float]:
    """FLOP a second, medians: ``gemm`` 2048 x 2048, ``conv`` 3x3 with 256 channels on 64 maps of 8 x 8."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(64, 256, 8, 8, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return {
        "gemm": 2 * 2048**3 / seconds(lambda: a @ b, device, repeats),
        "conv": 2 * 64 * 64 * 256 * 256 * 9 / seconds(lambda: conv2d(x, w, padding=1), device, repeats),
    }


def seconds(compute: Callable[[], object], device: str, repeats: int = 3) -> float:
    """That a call takes on a device, the median over ``repeats`` after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        compute()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])
