"""Networks of timm, the PyTorch image models of Hugging Face."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from advebm.core import config, files
from advebm.core.errors import UserError, suggest
from advebm.models import hub, public_weights
from advebm.models.network import Architecture, Network, Normalize
from advebm.models.zoo.base import Pretrained, Resized, assemble, check_size, library_errors, load_file, need

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Timm:
    """A network of timm up to its pooled features, such as ``convnext_atto.d2_in1k``; needs ``pip install timm``.

    Batch norm, layer norm and all other layers are the library's.  Weights begin as the library draws them;
    ``--init timm:NAME`` starts from its pretrained ones.

    Attributes:
        name: as ``timm.list_models()`` prints it; what follows a dot names pretrained weights.
        size: height and width in pixels that images are resized to before the network, through which gradients go
            back to the images; None: images are taken as they are.
        crop: share of the shorter side that is kept of images larger than ``size``.
    """

    name: str
    size: int | None = None
    crop: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("wightman2019",)

    def __post_init__(self) -> None:
        check_size(self.size, self.crop)

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``."""
        module, head = split(create(self, channels, size), (channels, *[self.size or size] * 2))
        return Resized(module, self.size, self.crop), head.in_features


def find(options: Mapping[str, Any], weights: Path | None) -> Pretrained:
    """Return a network with weights from a file or, by default, with those that timm knows, which are downloaded once.

    Args:
        options: those of :class:`Timm`; unless they set ``size``, images are resized to that of the pretrained weights.
        weights: a file with the state dict of the whole classifier.

    Raises:
        UserError: timm is not installed, or an option or the name is unknown to it.
    """
    backbone = config.construct(Timm, options, where=f"timm:{options.get('name', '')}")
    configuration = find_configuration(backbone.name)
    if "size" not in options:
        backbone = replace(backbone, size=configuration.input_size[-1], crop=configuration.crop_pct)
    return Pretrained(partial(_load, backbone, configuration, weights))


def find_published(where: str | Path) -> Pretrained:
    """Return a network that timm has written into a folder or published as ``USER/NAME`` on the Hub.

    Raises:
        UserError: something is missing, or its options are not those of the network in this version of timm.
    """
    folder = where if isinstance(where, Path) else hub.pull_files(where, ["config.json", WEIGHTS])
    about, weights = files.read_json(folder / "config.json"), folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{folder} has no {WEIGHTS}, the weights of its {about['architecture']}")
    if about.get("model_args"):
        given = ", ".join(map(str, about["model_args"])) if isinstance(about["model_args"], Mapping) else "model_args"
        raise UserError(f"{where} changes options of {about['architecture']} ({given}), which are not taken here")
    backbone, own = Timm(about["architecture"]), about.get("pretrained_cfg") or about  # older files have one level
    if not isinstance(own, Mapping):
        raise UserError(f"{folder / 'config.json'} is damaged: its pretrained_cfg is {own!r}")
    configuration, names = find_configuration(backbone.name), [field.name for field in dataclasses.fields(Inputs)]
    known = {name: own.get(name, getattr(configuration, name)) for name in names}
    inputs = config.construct(Inputs, known, where=str(folder / "config.json"))
    configuration = dataclasses.replace(configuration, **vars(inputs))
    backbone = replace(backbone, size=configuration.input_size[-1], crop=configuration.crop_pct)
    return Pretrained(partial(_load, backbone, configuration, weights))


@dataclass(frozen=True)
class Inputs:
    """What timm writes of a network's inputs: normalisation, shape (C, H, W), and the share that a crop keeps."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, ...]
    crop_pct: float

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise UserError(f"input_size is channels, height and width, got {list(self.input_size)}")
        check_size(self.input_size[-1], self.crop_pct)


def find_configuration(name: str) -> Any:
    """Return timm's ``pretrained_cfg`` of a network: size, mean and standard deviation of its inputs.

    Raises:
        UserError: timm is not installed, or has no network of this name.
    """
    timm = need("timm", f"timm:{name}")
    architecture, _, tag = name.partition(".")
    if ":" in name or not timm.is_model(architecture):
        near = suggest(architecture, timm.list_models())
        raise UserError(f"timm has no model {name!r}{near}; see timm.list_models()")
    if tag and name not in timm.list_models(pretrained=True):
        known = [weights for weights in timm.list_models(pretrained=True) if weights.startswith(f"{architecture}.")]
        raise UserError(f"timm has no weights {name!r}; there is {', '.join(known) or 'none'}")
    return timm.get_pretrained_cfg(name)


def create(backbone: Timm, channels: int, size: int, **options: Any) -> nn.Module:
    """Return timm's classifier for images of ``size`` pixels, or of those that the backbone resizes to."""
    configuration = find_configuration(backbone.name)
    if configuration.fixed_input_size:
        options["img_size"] = backbone.size or size
    pixels = f"{channels} x {backbone.size or size} x {backbone.size or size}"
    with library_errors(f"timm cannot make {backbone.name} for images of {pixels}"):
        module: nn.Module = need("timm", "").create_model(backbone.name, in_chans=channels, **options)
    return module


def split(module: Any, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Linear]:
    """Return a classifier of timm, for images of a shape (C, H, W), without its last layer, and that layer.

    Raises:
        UserError: it takes no such images, or the logits are not what the last layer returns, as where those of a
            second one are added.
    """
    place, _, name = name_of_head(module).rpartition(".")
    head: nn.Linear = module.get_submodule(f"{place}.{name}".lstrip("."))
    x, training = torch.linspace(-1, 1, math.prod(shape)).view(1, *shape), module.training
    module.eval()
    with torch.no_grad():
        pixels = " x ".join(map(str, shape))
        with library_errors(f"{type(module).__name__} of timm takes no images of {pixels}"):
            logits = module(x)
        setattr(module.get_submodule(place), name, nn.Identity())  # reset_classifier may take more away than the layer
        try:
            same = torch.allclose(head(module(x)), logits, rtol=1e-4, equal_nan=True)
        except RuntimeError:  # features and logits have been added
            same = False
    if not same:
        raise UserError(f"{type(module).__name__} of timm computes its logits by more than one last layer")
    return module.train(training), head


def name_of_head(module: Any) -> str:
    """Return the name of the layer from features to logits.

    Raises:
        UserError: there is not one linear layer.
    """
    head = module.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(module).__name__} of timm has no linear layer from features to logits")
    return next(name for name, part in module.named_modules() if part is head)


def _load(backbone: Timm, configuration: Any, weights: Path | None) -> tuple[Network, Architecture]:
    channels, size = configuration.input_size[0], backbone.size or configuration.input_size[-1]
    normalise = Normalize(tuple(configuration.mean), tuple(configuration.std))
    if weights is None:
        if not configuration.has_weights:
            raise UserError(f"timm has no weights of {backbone.name}; give a file: timm:{backbone.name}@FILE")
        module = create(backbone, channels, size, pretrained=True)
    else:
        last, state = name_of_head(create(backbone, channels, size)), public_weights.read(weights)
        if f"{last}.weight" not in state or state[f"{last}.weight"].ndim != 2:
            raise UserError(f"{weights} has no matrix {last}.weight, so it does not fit {backbone.name} of timm")
        module = create(backbone, channels, size, num_classes=len(state[f"{last}.weight"]))
        normalise = load_file(module, weights, configuration.mean, configuration.std)
    module, head = split(module, (channels, size, size))
    return assemble(backbone, Resized(module, backbone.size, backbone.crop), head, normalise, channels, size)
