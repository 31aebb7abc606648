"""The former name of :mod:`advebm.diagnostics.doctor`; once imported, it can be called as the function of that name."""

import sys
from types import ModuleType
from typing import Any

from advebm.diagnostics.doctor import *  # noqa: F403


class _Callable(ModuleType):
    """A module that stands in for the function ``advebm.doctor``, in whose place Python puts it when it is imported."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from advebm.api import doctor

        return doctor(*args, **options)


sys.modules[__name__].__class__ = _Callable
