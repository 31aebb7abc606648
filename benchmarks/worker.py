"""One side of a row in a process of its own: ``python -m benchmarks.worker SETTING``, driven over its pipes.

It prepares, says ``{"flops": ...}``, takes a turn for every line it reads, says ``{"seconds": ...}``, and at the end of
its input says what can be said of the result and how much memory it had at most.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import torch

from advebm.core.allocator import tune_cpu_allocator
from benchmarks.tasks import LONG, TASKS, Setting


def main(text: str) -> None:
    """Serve until the input ends."""
    warnings.simplefilter("ignore")
    setting = Setting(**json.loads(text))
    if setting.tuned:
        tune_cpu_allocator()
    if setting.threads:
        torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    contest = TASKS[setting.task](setting)
    if setting.task not in LONG:
        contest.turn()  # caches, compilers and clocks are warm now
    say({"flops": contest.flops, "work": contest.work})
    for _ in sys.stdin:
        begun = time.perf_counter()
        contest.turn()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        say({"seconds": time.perf_counter() - begun})
    say({"quality": contest.quality(), "peak_mib": peak_mib()})


def peak_mib() -> float:
    """The most memory this process has had; ``getrusage`` would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc").is_dir() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), float("nan"))


def say(what: dict[str, object]) -> None:
    """A line for the driver; whatever the peers print goes elsewhere."""
    print("@" + json.dumps(what), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
