"""Lazy imports: names that a package exports from modules that are imported when a name is first used."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from advebm.core.config import KINDS


def exports(
    package: str, /, *roles: str, **names: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package, so that importing it stays fast.

    Args:
        package: the package's name.
        roles: keys of :data:`advebm.core.config.KINDS`, whose classes that are defined in the package are exported.
        names: further names, each with the module of the package that defines it.
    """
    targets = [target.partition(":")[::2] for role in roles for target in KINDS[role].values()]
    modules = {name: module for module, name in targets if module.startswith(f"{package}.")}
    modules |= {name: f"{package}.{module}" for name, module in names.items()}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; there is {', '.join(sorted(modules))}")
        return getattr(import_module(modules[name]), name)

    return get, lambda: sorted(modules), sorted(modules)
