"""A user-defined module, named ``PACKAGE.MODULE:FACTORY``, as a backbone."""

import inspect
import sys
import sysconfig
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import nn

from advebm.core.errors import UserError


@dataclass(frozen=True)
class Own:
    """Your own torch module, ``own:PACKAGE.MODULE:FACTORY``: a complete classifier, trained or not.

    The factory takes no arguments.  It returns a module that maps normalised images (B, C, H, W) to logits (B, K),
    which are also used as features.

    Attributes:
        path: ``package.module:factory``, from the installed packages or the current folder.
        root: folder that the module is imported from where it is not found otherwise, so that a run can be loaded from
            any folder; None: none.
    """

    path: str
    root: str | None = None

    imports: ClassVar[bool] = True  # imports code, so not allowed in the configuration of somebody else's model

    def __post_init__(self) -> None:
        if ":" not in self.path:
            raise UserError(f"a module of your own is package.module:factory, got {self.path!r}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, None]:
        """Return the factory's module, and None because it needs no head."""
        return self.make(), None

    def _import(self, name: str) -> ModuleType:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            if self.root is None or not Path(self.root).is_absolute():
                raise
            sys.path.append(self.root)
            return import_module(name)

    def make(self) -> nn.Module:
        """Call the factory and return its module.

        Raises:
            UserError: the name cannot be imported, or the factory takes arguments, fails or returns no torch module.
        """
        module_name, _, name = self.path.partition(":")
        try:
            factory = getattr(self._import(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            hint = f"; is {module_name.removesuffix('.py')}:{name} meant?" if module_name.endswith(".py") else ""
            raise UserError(f"{self.path!r} cannot be imported: {error}{hint}") from error
        try:
            inspect.signature(factory).bind()
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path} is called without arguments: {error}") from None
        try:
            module = factory()
        except (Exception, SystemExit) as error:  # user code may raise anything
            raise UserError(f"{self.path} fails: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.path} returns a {type(module).__name__}, not a torch module")
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"{self.path} returns a scripted module, which cannot be copied; return the module itself")
        return module


def find_root(path: str) -> str | None:
    """Return the folder that ``package.module:factory`` is imported from; None if it is installed or not found."""
    top = path.partition(":")[0].partition(".")[0]
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return None
    origin = Path(spec.origin).resolve()
    root = origin.parents[1] if spec.submodule_search_locations else origin.parent
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    return None if any(place == root or place in root.parents for place in installed) else str(root)
