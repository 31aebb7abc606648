"""The processes that share the work of a command, and how they exchange values."""

import multiprocessing
import os
import threading
from typing import Protocol, TypeVar

from advebm.core.errors import UserError

Thing = TypeVar("Thing")


class Team(Protocol):
    """Processes that execute the same steps together, such as :class:`advebm.runs.engine.Engine`."""

    rank: int
    world: int
    main: bool

    def all_gather(self, thing: Thing) -> list[Thing]:
        """Return every process's value, in the order of ranks; each process waits for all others."""


class Alone:
    """The team of a run without distribution: this process alone, so that gathering returns its own value."""

    rank, world, main = 0, 1, True

    def all_gather(self, thing: Thing) -> list[Thing]:
        return [thing]


ALONE = Alone()


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as set by ``torchrun``; without it 0 and 1."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def may_restart() -> bool:
    """Return whether torchrun may begin this command again, or has done so (``--max-restarts``).

    All processes of a job agree on it, whereas each node counts only the restarts that it began itself.
    """
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def check_restarts() -> None:
    """Raise ``UserError`` if torchrun is to restart processes and would let them read addresses of earlier ones.

    Those are left in its store (PyTorch's issue 135712), so that restarted processes hang, or cannot connect.
    """
    if may_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts would hang at the first restart: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment, and give it --standalone (one machine) or --rdzv-backend c10d (several)"
        )


def launch_command(world: int) -> str:
    """Return the command that starts ``world`` processes: ``advebm``, or ``torchrun … -m advebm``."""
    if world == 1:
        return "advebm"
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = world // local_world if rank_and_world()[1] == world else 1
    options = f"--nproc-per-node {world // nodes}"
    return f"torchrun {f'--nnodes {nodes} ' if nodes > 1 else ''}{options} -m advebm"


def end_with_parent() -> None:
    """Make this process end at once when the one that started it ends, even if that is killed."""

    def follow() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
