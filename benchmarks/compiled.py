"""``python -m benchmarks.compiled [TURNS]``: a search of seven PGD steps, by how much of it is one compiled function.

Nothing; the network; network, energy and gradient, as ``--fast compile`` has it; and the whole search, its steps
unrolled. In turn, with the seconds that compiling took, nothing of which is cached. Medians, the least and the most.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor import config

from advebm.attacks.projected import Attack
from advebm.core.allocator import tune_cpu_allocator
from advebm.descent import differentiate, differentiating
from advebm.models.inference import BACKENDS, BackendName, View, compile_gradients, make_view
from advebm.models.modes import searching
from advebm.models.network import Architecture
from advebm.models.precision import multiplies_bfloat16
from advebm.models.resnet import ResNet

STEPS = 7
NETWORKS = {"ResNet-8, width 16, batch 64": (ResNet(8, width=16), 64), "ResNet-18, batch 16": (ResNet(18), 16)}
ATTACK = Attack(eps=8 / 255, steps=STEPS, start="clean")


def sides(view: View, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the searches, by name."""
    descent, gradients, network = ATTACK.descent(), compile_gradients(), torch.compile(view, dynamic=False)

    def search(f: Callable[[Tensor], Tensor]) -> Tensor:
        return ATTACK.minimize(ATTACK.negative_loss(f, y), x, None)

    def one_function_a_step() -> Tensor:
        with differentiating((x.shape, gradients)):
            return search(view)

    def unrolled(start: Tensor, labels: Tensor) -> Tensor:
        z, energy = start, ATTACK.negative_loss(view, labels)
        for _ in range(STEPS):
            z = descent.constraint(z - 2.5 * ATTACK.eps / STEPS * differentiate(energy, z)[1].sign(), start)
        return z

    whole = torch._dynamo.config.patch(trace_autograd_ops=True)(torch.compile(unrolled, dynamic=False))
    return {
        "nothing": lambda: search(view),
        "the network": lambda: search(network),
        "network, energy and gradient": one_function_a_step,
        f"all {STEPS} steps": lambda: whole(x, y),
    }


def measure(name: str, way: BackendName, turns: int) -> None:
    """Measure and print the sides of a network."""
    backbone, batch = NETWORKS[name]
    model = Architecture(backbone, 10, 3, 32, (0.5,) * 3, (0.25,) * 3).build().eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator)
    view = make_view(model, x, BACKENDS[way], loud=True)
    assert isinstance(view, View)
    with searching(model):
        contest, first, times = sides(view, x, y), {}, dict[str, list[float]]()
        for turn in range(turns + 1):
            for who, side in contest.items():
                begun = time.perf_counter()
                side()
                seconds = time.perf_counter() - begun
                if turn:
                    times.setdefault(who, []).append(seconds)
                else:
                    first[who] = seconds
        away = {who: (side() - contest["nothing"]()).abs().max().item() for who, side in contest.items()}
    print(f"{name}, {way}")
    base = statistics.median(times["nothing"])
    for who, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.3f} to {max(values):.3f}"
        about = f"first call {first[who]:.1f} s, at most {away[who] * 255:.2g}/255 away"
        print(f"  {who:32}{median:7.3f} s ({spread}), {base / median:.2f} x, {about}", flush=True)


def main() -> None:
    """Measure every network in float32, and in bfloat16 where this CPU multiplies in it."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    tune_cpu_allocator()
    config.force_disable_caches = True
    about = f"{platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {about}, PGD-{STEPS}, medians of {turns} turns")
    ways: tuple[BackendName, ...] = ("fold", "bf16") if multiplies_bfloat16(torch.device("cpu")) else ("fold",)
    for name in NETWORKS:
        for way in ways:
            measure(name, way, turns)


if __name__ == "__main__":
    main()
