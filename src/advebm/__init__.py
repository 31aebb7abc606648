"""advebm: adversarially trained energy-based models.

The functions in ``__all__`` are imported on first use, so that ``import advebm`` is quick.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Attack",
    "attack",
    "compare",
    "diagnose",
    "doctor",
    "draw_set",
    "edit",
    "energy",
    "evaluate",
    "export",
    "grid",
    "leaderboard",
    "load",
    "load_data",
    "load_recipe",
    "open_run",
    "probe",
    "push",
    "report",
    "reproduce",
    "sample",
    "sweep",
    "train",
    "tune",
    "tune_cpu_allocator",
    "wrap",
]

if TYPE_CHECKING:
    from advebm.api import (
        Attack,
        attack,
        compare,
        diagnose,
        doctor,
        draw_set,
        edit,
        energy,
        evaluate,
        export,
        grid,
        leaderboard,
        load,
        load_data,
        load_recipe,
        open_run,
        probe,
        push,
        report,
        reproduce,
        sample,
        sweep,
        train,
        tune,
        tune_cpu_allocator,
        wrap,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'advebm' has no attribute {name!r}; there is {', '.join(__all__)}")
    from advebm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
