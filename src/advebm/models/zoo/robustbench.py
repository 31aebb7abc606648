"""Networks of RobustBench's model zoo."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from advebm.core import config, console
from advebm.core.config import check_choices
from advebm.core.errors import UserError, suggest
from advebm.data.cache import cache_folder
from advebm.models.network import Architecture, Network, Normalize
from advebm.models.zoo.base import Pretrained, Resized, assemble, check_size, library_errors, load_file, need

RADII = {("cifar10", "Linf"): 8 / 255, ("cifar100", "Linf"): 8 / 255, ("imagenet", "Linf"): 4 / 255}
RADII |= {("cifar10", "L2"): 0.5, ("cifar100", "L2"): 0.5}


@dataclass(frozen=True)
class RobustBench:
    """A classifier of RobustBench's model zoo, such as ``Wang2023Better_WRN-28-10``; needs the package robustbench.

    The zoo's networks normalise their images themselves.  Weights begin as the library draws them;
    ``--init robustbench:NAME`` starts from the published ones.

    Attributes:
        name: as in the zoo's tables.
        dataset: ``cifar10``, ``cifar100`` or ``imagenet``.
        threat: the part of the zoo, ``Linf``, ``L2`` or ``corruptions``.
        size: height and width in pixels that images are resized to before the network; None: they are taken as they
            are.
        crop: share of the shorter side that is kept of images larger than ``size``.
    """

    name: str
    dataset: Literal["cifar10", "cifar100", "imagenet"] = "cifar10"
    threat: Literal["Linf", "L2", "corruptions"] = "Linf"
    size: int | None = None
    crop: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("croce2021",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_size(self.size, self.crop)

    def build(self, channels: int, size: int) -> tuple[nn.Module, None]:
        """Return the module ``(B, 3, size, size) -> (B, K)``, and None because it needs no head."""
        if channels != 3:
            raise UserError(f"RobustBench's networks take images of 3 channels, got {channels}")
        entry = _parts()[self.dataset, self.threat].get(self.name)
        if entry is None:
            raise _unknown(self.name)
        with library_errors(f"RobustBench cannot make {self.name}"):
            return Resized(entry["model"](), self.size, self.crop), None

    @property
    def place(self) -> str:
        """Return the name with its part of the zoo."""
        return f"{self.dataset}/{self.threat}/{self.name}"


def _parts() -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the zoo's tables of models, by data set and threat."""
    if find_spec("autoattack") is None and find_spec("pyautoattack") is not None:
        sys.modules["autoattack"] = import_module("pyautoattack")  # PyPI's name of what robustbench imports
    zoo = need("robustbench.model_zoo.models", "robustbench:NAME")
    tables = zoo.model_dicts.items()
    return {(data.value, threat.value): part for data, parts in tables for threat, part in parts.items()}


def _unknown(name: str) -> UserError:
    names = {model for part in _parts().values() for model in part}
    return UserError(f"RobustBench has no model {name!r}{suggest(name, names)}; its page lists {len(names)}")


def find(options: Mapping[str, Any], weights: Path | None) -> Pretrained:
    """Return a network with the zoo's weights, which are downloaded once, or with those in a file.

    Args:
        options: those of :class:`RobustBench`; the name may be ``DATASET/THREAT/NAME``, and has to be where several
            parts of the zoo have a model of this name.
        weights: a file with the state dict, as the zoo has it.

    Raises:
        UserError: robustbench is not installed, or the name is unknown or stands for several models.
    """
    options = dict(options)
    *place, name = str(options.get("name", "")).split("/")
    given = dict(zip(("dataset", "threat"), place, strict=False)) | {k: v for k, v in options.items() if k != "name"}
    found = [part for part, models in _parts().items() if name in models]
    fits = [part for part in found if part == (given.get("dataset", part[0]), given.get("threat", part[1]))]
    if not found:
        raise _unknown(name)
    if len(fits) != 1:
        there = ", ".join("/".join((*part, name)) for part in found)
        raise UserError(f"robustbench:{'/'.join([*place, name])} stands for {len(fits)} models; there is {there}")
    (dataset, threat) = part = fits[0]
    backbone: RobustBench = config.construct(
        RobustBench, given | {"name": name, "dataset": dataset, "threat": threat}, where=f"robustbench:{name}"
    )
    if "size" not in options:
        backbone = replace(backbone, **_input_size(_parts()[part][name].get("preprocessing"), dataset))
    known: dict[str, Any] = {"data": {"kind": dataset}} if dataset.startswith("cifar") else {}
    if part in RADII:
        known["threat"] = {"norm": threat.lower(), "eps": RADII[part]}
    return Pretrained(partial(_load, backbone, weights), known)


def _input_size(preprocessing: Any, dataset: str) -> dict[str, Any]:
    """Return the options of a preprocessing such as ``Res256Crop224``."""
    lengths = [int(length) for length in re.findall(r"\d+", str(preprocessing or ""))]
    if dataset != "imagenet":
        return {}
    if not lengths:
        return {"size": 224, "crop": 0.875}
    return {"size": lengths[-1], "crop": lengths[-1] / lengths[0]}


def _load(backbone: RobustBench, weights: Path | None) -> tuple[Network, Architecture]:
    library, size = need("robustbench.utils", f"robustbench:{backbone.name}"), backbone.size or 32
    normalise = Normalize((0.0,), (1.0,))
    if weights is not None:
        resized, _ = backbone.build(3, size)
        module = resized.get_submodule("net")
        load_file(module, weights, (0.0,), (1.0,))
    else:
        folder = cache_folder() / "robustbench"
        console.say(f"RobustBench's weights of {backbone.place} are kept in {folder}")
        with library_errors(f"RobustBench cannot make {backbone.name}"):
            module = library.load_model(backbone.name, folder, backbone.dataset, backbone.threat)
    return assemble(backbone, Resized(module, backbone.size, backbone.crop), None, normalise, 3, size)
