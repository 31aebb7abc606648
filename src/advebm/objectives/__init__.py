"""Objectives: what a training step searches for and what it then minimises."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__, "objective", Objective="base", Batch="base", Context="base", Loss="base", Stateless="base"
)
