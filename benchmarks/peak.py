"""What the machine can do: the rates of a matrix product and of a convolution, as a network's inner loop has them."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d


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
