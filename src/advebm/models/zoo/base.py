"""What networks of other libraries have in common: resizing, the classifier, and weights that a library knows."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import interpolate

from advebm.core.errors import UserError
from advebm.models import public_weights
from advebm.models.network import Architecture, Network, Normalize, find_logits


@dataclass(frozen=True)
class Pretrained:
    """A network of a library together with its weights.

    Attributes:
        make: makes the network, in eval mode on the CPU, and its architecture, whose ``size`` may be any.
        options: what is known of the recipe that trained it: ``data``, ``threat``.
    """

    make: Callable[[], tuple[Network, Architecture]]
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _made(self) -> tuple[Network, Architecture]:
        return self.make()

    def load(self) -> tuple[Network, Architecture]:
        """Return a copy of the network, which is read once, and its architecture."""
        network, architecture = self._made
        return copy.deepcopy(network), architecture


@fx.wrap
def resize(x: Tensor, size: int, crop: float) -> Tensor:
    """Return images ``(B, C, H, W)`` as ``(B, C, size, size)``, differentiably, by bicubic interpolation.

    Larger images are reduced so that their shorter side is ``size / crop``, of which the centre is kept, as libraries
    evaluate their classifiers.  Smaller ones are enlarged as a whole.
    """
    height, width = x.shape[2:]
    if (height, width) == (size, size):
        return x
    if min(height, width) < size:
        return interpolate(x, (size, size), mode="bicubic", antialias=True)
    scale = int(size / crop) / min(height, width)
    height, width = (max(size, round(length * scale)) for length in (height, width))
    if (height, width) != tuple(x.shape[2:]):
        x = interpolate(x, (height, width), mode="bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return x[:, :, top : top + size, left : left + size]


@fx.wrap
def take_logits(out: Any) -> Tensor:
    """Return a library's output, or the logits within it."""
    return out if isinstance(out, Tensor) else find_logits(out)


class Resized(nn.Module):
    """A library's network on images of any size: ``(B, C, H, W)`` -> features or logits ``(B, W)``.

    Attributes:
        size: height and width that images are resized to, see :func:`resize`; None: they are taken as they are.
        crop: share of the shorter side that is kept of larger images.
    """

    def __init__(self, net: nn.Module, size: int | None, crop: float = 1.0) -> None:
        super().__init__()
        self.net, self.size, self.crop = net, size, crop

    def forward(self, x: Tensor) -> Tensor:
        return take_logits(self.net(x if self.size is None else resize(x, self.size, self.crop)))


def check_size(size: int | None, crop: float) -> None:
    """Raise UserError for a size that no image has, or a share outside (0, 1]."""
    if size is not None and size < 1:
        raise UserError(f"size must be at least 1 pixel, or none for images as they are, got {size}")
    if not 0 < crop <= 1:
        raise UserError(f"crop is the share of an image's side that is kept, in (0, 1], got {crop}")


def need(package: str, what: str) -> Any:
    """Import a library, or raise a UserError that says how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what one library says of another is no concern of the user's
            return import_module(package)
    except ModuleNotFoundError as error:
        library, missing = package.partition(".")[0], str(error.name)
        if missing != library:
            raise UserError(f"{what} needs {library}, which needs {missing}: pip install {missing}") from None
        raise UserError(f"{what} needs {library}, which is not installed: pip install {library}") from None
    except Exception as error:  # a library that was made for another torch raises anything
        raise UserError(f"{what} needs {package}, which cannot be imported here: {one_line(error)}") from error


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn what a library raises into a one-line UserError: ``what`` and the library's own message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # no connection, a damaged file, a version that lacks something, …
        raise UserError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of text."""
    return " ".join(str(error).split()) or type(error).__name__


def load_file(module: nn.Module, path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> Normalize:
    """Load the state dict in a file into a library's classifier; return the normalisation, which the file may bring.

    Raises:
        UserError: what :func:`advebm.models.public_weights.load` raises.
    """
    network = Network(Normalize(mean, std), module, nn.Identity())
    public_weights.load(network, path)
    assert isinstance(network.normalise, Normalize)
    return network.normalise


def assemble(
    backbone: Any, module: nn.Module, head: nn.Linear | None, normalise: Normalize, channels: int, size: int
) -> tuple[Network, Architecture]:
    """Return a loaded network in eval mode, and its architecture.

    Args:
        backbone: the dataclass that builds such modules.
        module: images -> features, or logits if there is no head.
        head: features -> logits.
        normalise: first layer.
        channels, size: of the images.
    """
    network = Network(normalise, module, nn.Identity() if head is None else head).eval()
    with torch.no_grad():
        outputs = int(network(torch.full((1, channels, size, size), 0.5)).shape[-1])
    mean, std = (tuple(value.flatten().tolist()) for value in (normalise.mean, normalise.std))
    mean, std = (value * channels if len(value) == 1 else value for value in (mean, std))
    return network, Architecture(backbone, outputs, channels, size, mean, std)
