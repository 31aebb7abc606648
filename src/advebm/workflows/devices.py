"""Choose the device that a command computes on, and announce it before the command's own output."""

from advebm.core import checks, console, processes
from advebm.runs.engine import Engine
from advebm.training.hardware import describe_device


def choose_device(name: str | None = None) -> str:
    """Announce and return the device of that name; default: the best one available."""
    device = checks.device(name)
    console.computing_on(describe_device(device))
    return device


def join_team(name: str | None = None) -> tuple[processes.Team, str]:
    """Return the processes that share the command, and the device of this process."""
    if processes.rank_and_world()[1] == 1:
        return processes.ALONE, choose_device(name)
    engine = Engine(name)
    return engine, str(engine.device)
