"""CPU threads: how many torch computes with, and how long idle ones spin before they sleep."""

import os
import sys

from advebm.core.errors import UserError

# Iterations that an idle thread of GNU OpenMP spins before it sleeps.  With the default of 300,000, two threads on two
# busy cores slow each other down; results/notes/speed.md has measurements.
SPINS = "50000"


def bound_waiting() -> None:
    """Let idle threads sleep soon and free their core, unless the environment already sets how long they spin.

    Call it before torch is imported, which reads this setting once; afterwards it does nothing.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def count_cores() -> int:
    """Return how many cores of the CPU this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_user_count: list[int] = []  # the count that the user chose, if any


def use_threads(count: int) -> None:
    """Compute with ``count`` threads from now on, in this process and those that it starts."""
    if count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    import torch

    _user_count[:] = [count]
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def take_over_threads(count: int | None) -> str:
    """Use the thread count of an earlier session (None: unknown), unless :func:`use_threads` was called.

    The number of threads affects rounding, because it determines the order of sums.  Return a warning if there are too
    few cores, else the empty string.
    """
    import torch

    cores = count_cores()
    if count is None or _user_count or count == torch.get_num_threads():
        return ""
    if count > cores:
        return f"it was begun with {count} threads, and there are {cores} cores: results will differ by rounding"
    torch.set_num_threads(count)
    return ""
