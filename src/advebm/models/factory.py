"""A user-defined module, named ``PACKAGE.MODULE:FACTORY``, as a backbone."""

import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

from torch import nn

from advebm.core.errors import UserError


@dataclass(frozen=True)
class Own:
    """Your own torch module, ``own:PACKAGE.MODULE:FACTORY``: a complete classifier, trained or not.

    The factory takes no arguments.  It returns a module that maps normalised images (B, C, H, W) to logits (B, K),
    which are also used as features.

    Attributes:
        path: ``package.module:factory``, from the installed packages or the current folder.
    """

    path: str

    imports: ClassVar[bool] = True  # imports code, so not allowed in the configuration of somebody else's model

    def __post_init__(self) -> None:
        if ":" not in self.path:
            raise UserError(f"a module of your own is package.module:factory, got {self.path!r}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, None]:
        """Return the factory's module, and None because it needs no head."""
        return self.make(), None

    def make(self) -> nn.Module:
        """Call the factory and return its module.

        Raises:
            UserError: the name cannot be imported, or the factory takes arguments, fails or returns no torch module.
        """
        module_name, _, name = self.path.partition(":")
        try:
            factory = getattr(import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{self.path!r} cannot be imported: {error}") from error
        try:
            inspect.signature(factory).bind()
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path} is called without arguments: {error}") from None
        try:
            module = factory()
        except Exception as error:  # user code may raise anything
            raise UserError(f"{self.path} fails: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.path} returns a {type(module).__name__}, not a torch module")
        return module
