"""The processes that share the work of a command: who they are, and what they tell one another."""

import os
from typing import Protocol, TypeVar

Thing = TypeVar("Thing")


class Team(Protocol):
    """Processes that do the same in step; :class:`advebm.runs.engine.Engine` is one."""

    rank: int
    world: int
    main: bool

    def all_gather(self, thing: Thing) -> list[Thing]:
        """What each process gives, in the order of ranks; every process waits for all."""
        ...


class Alone:
    """A process on its own."""

    rank, world, main = 0, 1, True

    def all_gather(self, thing: Thing) -> list[Thing]:
        """What it gives."""
        return [thing]


ALONE = Alone()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are, as ``torchrun`` says; without it 0 and 1."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def launch_command(world: int) -> str:
    """What starts so many processes: ``advebm``, or ``torchrun … -m advebm``."""
    if world == 1:
        return "advebm"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = world // here if rank_and_world()[1] == world else 1
    each = f"--nproc-per-node {world // nodes}"
    return f"torchrun {f'--nnodes {nodes} {each}' if nodes > 1 else each} -m advebm"
