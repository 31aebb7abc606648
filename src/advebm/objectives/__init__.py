"""Objectives: what each training step searches for, and the loss it then minimises."""

from advebm.core.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__, "objective", Objective="base", Batch="base", Context="base", Loss="base", Stateless="base"
)
