"""``python -m benchmarks.layouts [TURNS]``: an attack's gradient in float32, by memory layout, folding and compiling.

In turn, medians, and the share of this CPU's speed in float32 convolutions.  To compute as a CPU without AVX-512 does:
``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=FOLDER python -m benchmarks.layouts``, with a
cache of its own, as torch's does not tell these settings apart.
"""

import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core.allocator import tune_cpu_allocator
from advebm.descent import differentiate
from advebm.models.inference import Backend, View
from advebm.models.modes import searching
from advebm.models.network import Architecture
from advebm.models.resnet import ResNet
from advebm.training.cost import FlopCounter
from advebm.training.hardware import rates

BATCH = 128
NETWORKS = {"ResNet-8, width 16": ResNet(8, 16), "ResNet-18, width 24": ResNet(18, 24)}
LAYOUTS = {"channels last": torch.channels_last, "plain": torch.contiguous_format}
WAYS = {"off": Backend(fold=False), "fold": Backend(), "compile": Backend(compiled=True)}


def sides(model: nn.Module, x: Tensor, y: Tensor) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Return functions that compute the gradient of the cross-entropy, by way and layout."""
    found: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for layout, kind in LAYOUTS.items():
        moved = copy.deepcopy(model).to(memory_format=kind)  # type: ignore[call-overload]
        for way, backend in WAYS.items():
            view = View(moved, backend)
            if backend.compiled:
                view.speed_up(x.shape)
            compute = view.compute if backend.compiled else differentiate
            energy = lambda z, view=view: -energies.conditional(view(z), y)
            found[way, layout] = lambda compute=compute, energy=energy: compute(energy, x)[1]
    return found


def main() -> None:
    """Measure and print every network."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    tune_cpu_allocator()
    generator = torch.Generator().manual_seed(0)
    peak = max(rates(torch.float32, "cpu", repeats=3).values())
    about = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {about}, {time.strftime('%Y-%m-%d')}")
    print(f"float32: {peak / 1e9:.0f} GFLOP/s in large products; medians of {turns} turns, batches of {BATCH}")
    x = torch.rand(BATCH, 3, 32, 32, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    for name, backbone in NETWORKS.items():
        model = Architecture(backbone, 10, 3, 32, (0.5,) * 3, (0.25,) * 3).build().eval()
        with searching(model):
            contest, times = sides(model, x, y), dict[tuple[str, str], list[float]]()
            with FlopCounter() as counter:
                reference = contest["off", "channels last"]()
            for turn in range(turns + 1):
                for who, side in contest.items():
                    begun = time.perf_counter()
                    gradient = side()
                    if turn:
                        times.setdefault(who, []).append(time.perf_counter() - begun)
                    error = ((gradient - reference).norm() / reference.norm()).item()
                    assert error < 0.01, f"{name}, {who}, turn {turn}: the gradient differs by {error:.2g}"
        base = statistics.median(times["off", "channels last"])
        print(name)
        for (way, layout), values in times.items():
            median = statistics.median(values)
            share = counter.flops / median / peak
            print(
                f"  {way:8}{layout:14}{1e3 * median:7.1f} ms, {base / median:.2f} x, {share:.0%} of that speed",
                flush=True,
            )


if __name__ == "__main__":
    main()
