"""Threads of the CPU: how many torch computes with, and how long idle ones wait for work before they sleep."""

import os
import sys

from advebm.core.errors import UserError

# Turns that an idle thread of GNU's OpenMP waits in, awake, before it sleeps.  By its own 300,000 two threads on two
# busy cores take each other's time; docs/speed.md has what was measured.
SPINS = "50000"


def bound_waiting() -> None:
    """Let threads without work sleep soon, so that other processes have the core; unless the environment says how long.

    Call it before torch is imported, which reads this once.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


_given: list[int] = []  # by the user


def use_threads(count: int) -> None:
    """Compute with so many threads from now on, in this process and those that it starts."""
    if count < 1:
        raise UserError(f"--threads is at least 1, got {count}")
    import torch

    _given[:] = [count]
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def take_over_threads(count: int | None) -> str:
    """Compute with the threads of an earlier session, where they are known, unless :func:`use_threads` said how many.

    Sums are rounded in the order that threads add them.  Returns what keeps this from being so, or the empty string.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count is None or _given or count == torch.get_num_threads():
        return ""
    if count > cores:
        return f"it was begun with {count} threads, and there are {cores} cores: results will differ by rounding"
    torch.set_num_threads(count)
    return ""
