"""One side of a row in a process of its own: ``python -m benchmarks.worker SETTING``, driven over its pipes.

It prepares, says ``{"flops": ...}``, takes a turn for every line it reads, says ``{"seconds": ...}``, and at the end of
its input says what can be said of the result and how much memory it had at most.
"""

import json
import resource
import sys
import time
import warnings

import torch

from advebm.allocator import tune_cpu_allocator
from benchmarks.tasks import TASKS, Setting


def main(text: str) -> None:
    """Serve until the input ends."""
    warnings.simplefilter("ignore")
    setting = Setting(**json.loads(text))
    if setting.tuned:
        tune_cpu_allocator()
    torch.manual_seed(0)
    contest = TASKS[setting.task](setting)
    contest.turn()  # caches, compilers and clocks are warm now
    say({"flops": contest.flops, "work": contest.work})
    for _ in sys.stdin:
        begun = time.perf_counter()
        contest.turn()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        say({"seconds": time.perf_counter() - begun})
    say({"quality": contest.quality(), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def say(what: dict[str, object]) -> None:
    """A line for the driver; whatever the peers print goes elsewhere."""
    print("@" + json.dumps(what), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
