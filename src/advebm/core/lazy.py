"""Names that a folder offers from its modules, which are imported when a name is first asked for."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from advebm.core.config import KINDS


def exports(
    package: str, /, *roles: str, **names: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, whose import stays quick.

    Args:
        package: its name.
        roles: of :data:`advebm.core.config.KINDS`, whose classes that lie in the package are offered.
        names: others, and the module of the package that each is in.
    """
    targets = [target.partition(":")[::2] for role in roles for target in KINDS[role].values()]
    where = {name: module for module, name in targets if module.startswith(f"{package}.")}
    where |= {name: f"{package}.{module}" for name, module in names.items()}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; there is {', '.join(sorted(where))}")
        return getattr(import_module(where[name]), name)

    return get, lambda: sorted(where), sorted(where)
