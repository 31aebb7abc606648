"""What a command computes on, which it says before its first line."""

from advebm.core import checks, console, processes
from advebm.runs.engine import Engine
from advebm.training.hardware import describe_device


def choose_device(name: str | None = None) -> str:
    """The device of that name, or the best there is."""
    device = checks.device(name)
    console.computing_on(describe_device(device))
    return device


def join_team(name: str | None = None) -> tuple[processes.Team, str]:
    """The processes that share the command, and the device of this one."""
    if processes.rank_and_world()[1] == 1:
        return processes.ALONE, choose_device(name)
    engine = Engine(name)
    return engine, str(engine.device)
