"""``python -m benchmarks.exchange [TURNS]``: what averaging gradients over two processes costs, beside torch's DDP.

Two processes of gloo with a thread each. A loss of one forward and one backward pass, in turn without an exchange, with
one exchange after it, by :class:`advebm.training.gradient_exchange.GradientExchange` and by DistributedDataParallel,
which both exchange during the backward pass; the exchange alone; and a search of seven steps, which exchanges nothing.
Medians of the slower process, and the bytes that went through the loopback device, both processes together.
"""

import copy
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from advebm.attacks.projected import Attack
from advebm.models.modes import searching
from advebm.models.network import Architecture
from advebm.models.resnet import ResNet
from advebm.models.wide_resnet import WideResNet
from advebm.runs.engine import Engine, close_connections
from advebm.training.gradient_exchange import GradientExchange

NETWORKS = {"ResNet-18": (ResNet(18), 16), "WRN-34-10": (WideResNet(34, 10), 4)}  # and images in each process
STEPS = 7  # of the search
ALONE, SEARCH = "one exchange alone", f"search of {STEPS} steps"
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


class Measured(NamedTuple):
    """What one turn of a side took."""

    seconds: float
    mebibytes: float


def sides(model: nn.Module, x: torch.Tensor, y: torch.Tensor, engine: Engine) -> dict[str, Callable[[], None]]:
    """Return what is measured, by name."""

    def learn(network: nn.Module, backward: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> None:
        network.zero_grad(set_to_none=True)
        backward(cross_entropy(network(x), y))

    def average() -> None:
        engine.average([p.grad for p in model.parameters() if p.grad is not None])

    def search() -> None:
        with searching(model) as f:
            Attack(eps=8 / 255, steps=STEPS).raise_loss(f, x, y, torch.Generator().manual_seed(0))

    ours, whole = copy.deepcopy(model), DistributedDataParallel(copy.deepcopy(model))
    exchange = GradientExchange(ours.parameters(), engine)
    static = DistributedDataParallel(copy.deepcopy(model), static_graph=True, gradient_as_bucket_view=True)
    return {
        "loss, no exchange": lambda: learn(model),
        "loss, then one exchange": lambda: (learn(model), average())[0],
        "loss, ours": lambda: learn(ours, exchange.backward),
        "loss, DDP": lambda: learn(whole),
        "loss, DDP with a static graph and views": lambda: learn(static),
        ALONE: average,
        SEARCH: search,
    }


def measure(side: Callable[[], None], engine: Engine) -> Measured:
    """Return the seconds of the slower process, and all bytes sent, of one turn."""
    engine.barrier()
    sent, begun = _sent(), time.perf_counter()
    side()
    seconds = time.perf_counter() - begun
    engine.barrier()
    return Measured(max(engine.all_gather(seconds)), (_sent() - sent) / 2**20)


def _sent() -> int:
    return int(LOOPBACK.read_text()) if LOOPBACK.exists() else 0


def work(turns: int) -> None:
    """Measure and print, as one of two processes."""
    torch.set_num_threads(1)
    engine = Engine("cpu")
    for name in NETWORKS:
        contend(name, turns, engine)
        gc.collect()  # DistributedDataParallel, which hangs if it outlives the connections
    close_connections()


def contend(name: str, turns: int, engine: Engine) -> None:
    """Measure and print a network's sides in turn."""
    backbone, images = NETWORKS[name]
    model = Architecture(backbone, 10, 3, 32, (0.5,) * 3, (0.25,) * 3).build().train()
    x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % 10
    contest = sides(model, x, y, engine)
    found: dict[str, list[Measured]] = {who: [] for who in contest}
    for turn in range(turns + 1):
        for who, side in contest.items():
            measured = measure(side, engine)
            if turn:  # the first warms up
                found[who].append(measured)
    if engine.main:
        show(name, images, sum(p.numel() for p in model.parameters()), found)


def show(name: str, images: int, parameters: int, found: dict[str, list[Measured]]) -> None:
    """Print a network's numbers."""
    seconds = {who: statistics.median(turn.seconds for turn in turns) for who, turns in found.items()}
    bare, alone = seconds["loss, no exchange"], seconds[ALONE]
    print(f"{name}, {images} images a process, {parameters / 1e6:.1f} million parameters of {parameters >> 18} MiB")
    for who, turns in found.items():
        sent = statistics.median(turn.mebibytes for turn in turns)
        spread = f"{min(t.seconds for t in turns):.3f} to {max(t.seconds for t in turns):.3f}"
        hidden = (
            f", {1 - (seconds[who] - bare) / alone:.0%} of the exchange hidden"
            if who.startswith(("loss, ours", "loss, DDP"))
            else ""
        )
        print(f"  {who:48}{seconds[who]:8.3f} s ({spread}), {sent:6.1f} MiB{hidden}")
    step = bare + alone + seconds[SEARCH]
    print(f"  the exchange is {alone / step:.1%} of a step of adversarial training by {STEPS} steps", flush=True)


def main() -> None:
    """Begin the two processes, unless this is one of them."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    if "LOCAL_RANK" in os.environ:
        work(turns)
        return
    about = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(f"{about}, 2 processes of 1 thread, medians of {turns} turns (least to most)", flush=True)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.exchange"]
    subprocess.run([sys.executable, *words, str(turns)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
