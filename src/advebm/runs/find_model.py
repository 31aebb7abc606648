"""Find a model by its reference: a run, a checkpoint, a published model, a library's network, weights or a module."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from advebm.attacks.projected import Attack
from advebm.core import config, files
from advebm.core.errors import UserError
from advebm.models import hub, network, public_weights
from advebm.models.excerpt import Published, has_excerpt
from advebm.models.factory import Own
from advebm.models.network import Architecture, Network, Normalize
from advebm.models.zoo.base import Pretrained
from advebm.runs.recipe import Normalisation, Recipe
from advebm.runs.recipe import read as read_recipe
from advebm.runs.run import Run

WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
ALLOWED = (
    "a run, a checkpoint, a model's folder, a weight file, a model of the package{bundled}, hf:USER/NAME, timm:NAME, "
    "robustbench:NAME, NETWORK:OPTION=VALUE,…@FILE, PACKAGE.MODULE:FACTORY, or PACKAGE.MODULE:FACTORY@WEIGHTS"
)
LIBRARIES = ("timm", "robustbench", "transformers")  # modules of advebm.models.zoo


@dataclass(frozen=True)
class Reference:
    """What a reference to a model stands for.

    Attributes:
        text: the reference as it was given.
        kind: ``run``, ``checkpoint`` (of a run), ``model`` (published by this package), ``pretrained`` (a network and
            weights of others) or ``module``.
        path: the folder or file; of a module the folder or file with its weights, if one is given.
        pretrained: of that kind, what loads it.
        module: ``PACKAGE.MODULE:FACTORY`` of a module.
        averaged: whether averaged weights are preferred, if the folder has some.
    """

    text: str
    kind: Literal["run", "checkpoint", "model", "pretrained", "module"]
    path: Path | None = None
    pretrained: Pretrained | None = None
    module: str | None = None
    averaged: bool = True

    @property
    def title(self) -> str:
        """Return a short name for folders and messages."""
        if self.module:
            return self.module.rpartition(":")[2]
        if self.text.startswith("hf:") or self.path is None:
            return re.split("[/:]", self.text)[-1]
        return self.path.stem if self.path.is_file() else self.path.resolve().name

    @property
    def address(self) -> str:
        """Return what names the model's folder: the folder itself, or as it was given for others."""
        return str(self.folder) if Path(self.text).exists() else self.text

    def load(self, checkpoint: str = "latest") -> Network:
        """Load the network, in eval mode, on the CPU; ``checkpoint`` is that of a run."""
        if self.kind == "run":
            return Run.open(self.folder).model(checkpoint)[0]
        if self.pretrained is not None:
            return self.pretrained.load()[0]
        if self.kind == "module":
            model = Network(Normalize((0.0,), (1.0,)), Own(str(self.module)).make(), nn.Identity())
            if self.path is not None:
                load_module_weights(model, self.path)
            return model.eval()
        return network.load(self.folder, ema=self.averaged, foreign=self.kind == "checkpoint")[0]

    def architecture(self, checkpoint: str = "latest") -> Architecture | None:
        """Return the architecture; None of a module, which says nothing of its images."""
        if self.kind == "module":
            return None
        if self.pretrained is not None:
            return self.pretrained.load()[1]
        folder = Run.open(self.folder).checkpoints.path(checkpoint) if self.kind == "run" else self.folder
        return network.read_architecture(folder, foreign=self.kind != "model")

    def options(self) -> Mapping[str, Any]:
        """Return the options of the recipe that the model was trained by, as far as they are known."""
        if self.kind in ("run", "checkpoint"):
            return config.describe(Run.open(self._run_folder).recipe)
        if self.kind == "model":
            about = files.read_json(self.folder / "config.json", default={})
            given = {k: about[k] for k in ("data", "threat") if k in about} | dict(about.get("options") or {})
            options = {name: read(given[name]) for name, read in SAFE.items() if given.get(name) is not None}
            if has_excerpt(self.folder):
                options["data"] = config.describe(Published(self.address))
            return options
        return {} if self.pretrained is None else self.pretrained.options

    def threat(self) -> Attack | None:
        """Return the threat model that the model was trained for or evaluated under, if it is known."""
        try:
            if self.kind in ("run", "checkpoint"):  # not the whole recipe, whose objective may be gone
                options = read_recipe(self._run_folder / "config.yaml").get("threat")
            else:
                options = self.options().get("threat")
            return None if options is None else _build_threat(options)
        except UserError:
            return None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that a model of this package was trained on; empty: unknown."""
        if self.kind not in ("run", "checkpoint", "model"):
            return ()
        folder = Run.open(self.folder).checkpoints.path() if self.kind == "run" else self.folder
        names = files.read_json(folder / "config.json", default={}).get("classes")
        return tuple(map(str, names)) if isinstance(names, list) else ()

    @property
    def _run_folder(self) -> Path:
        return self.folder if self.kind == "run" else self.folder.resolve().parents[1]

    @property
    def folder(self) -> Path:
        """Return the folder or file, which everything but a module has."""
        assert self.path is not None
        return self.path


def _build_threat(options: Any) -> Attack:
    if not isinstance(options, Mapping):
        raise UserError(f"a threat is a block of options, got {options!r}")
    plain = {k: v for k, v in options.items() if k != "kind"}
    threat: Attack = config.construct(Attack, plain, where="threat", foreign=False)
    return threat


def _checked(role: str) -> Callable[[Any], Any]:
    """Return a function that returns options of a role as they are, but raises if they would import code."""
    return lambda options: config.describe(config.build(options, role, foreign=False))


NEED_PATH = ("folder", "npz", "hf")  # sources that are nothing without one


def _read_source(options: Any) -> Any:
    """Return options of a source; a path that publishing has left out, and the source needs, is called DIR."""
    if isinstance(options, Mapping) and options.get("kind") in NEED_PATH and options.get("path", "") is None:
        options = {**options, "path": "DIR"}
    return _checked("source")(options)


# What is taken from a published model, whose options may be anybody's: nothing that imports code.
SAFE: dict[str, Callable[[Any], Any]] = {
    "data": _read_source,
    "sampler": _checked("sampler"),
    "threat": lambda options: config.describe(_build_threat(options), Attack),
    "metrics": lambda options: [_checked("metric")(metric) for metric in options],
}


def find_model(where: str | Path, *, checkpoint: str = "latest") -> Network:
    """Load the network that a reference stands for, see :func:`find_reference`, in eval mode.

    A user-defined module receives images in [0, 1] and normalises them itself.  The network's ``threat`` is the threat
    model that is known of it, or None, and its ``origin`` the :class:`Reference`.

    Raises:
        UserError: nothing is found, a file is damaged, or the factory fails.
    """
    reference = find_reference(where)
    model = reference.load(checkpoint)
    model.threat = reference.threat()
    model.origin = reference
    return model


def find_reference(where: str | Path) -> Reference:
    """Return what ``where`` stands for, by the first of :data:`RESOLVERS` that knows it.

    Raises:
        UserError: none does.
    """
    text = str(where)
    for resolver in RESOLVERS:
        try:
            if (reference := resolver(text)) is not None:
                return reference
        except OSError as error:  # a name that is too long, a folder that may not be read
            raise UserError(f"{text[:80]} cannot be read: {error.strerror}") from None
    models = ", ".join(sorted(hub.bundled_models()))
    near = Path(text).parent if Path(text).parent.is_dir() else Path()
    runs = sorted(p.parent.name for p in near.glob("*/config.yaml"))
    hint = f"; in {near} there is {', '.join(runs)}" if runs else ""
    raise UserError(
        f"there is no run or model at {text}{hint}; given can be {ALLOWED.format(bundled=models and f' ({models})')}"
    )


def trained_threat(recipe: Recipe) -> Attack | None:
    """Return the attack that a recipe trains with, or of a run that trains nothing what is known of its model."""
    if recipe.train.images == 0 and recipe.init is not None:
        try:
            return find_reference(recipe.init).threat()
        except UserError:  # the model has moved since
            return None
    objective: Any = recipe.objective
    while objective is not None:
        if isinstance(attack := getattr(objective, "attack", None), Attack):
            return attack
        objective = getattr(objective, "objective", None)
    return None


def is_factory(where: str | Path) -> bool:
    """Return whether a reference is ``PACKAGE.MODULE:FACTORY``, which imports code, rather than files."""
    prefix, colon, _ = str(where).partition(":")
    known = prefix == "hf" or prefix in config.KINDS["backbone"]
    return bool(colon) and not known and not Path(where).exists()


def _resolve_run(text: str) -> Reference | None:
    return Reference(text, "run", Path(text)) if (Path(text) / "config.yaml").is_file() else None


def _resolve_folder(text: str) -> Reference | None:
    path = Path(text)
    if not (path / "config.json").is_file():
        return None
    if (library := find_library(files.read_json(path / "config.json", default={}))) is not None:
        return Reference(text, "pretrained", path, library.find_published(path))
    in_run = path.resolve().parent.name == "checkpoints" and (path.resolve().parents[1] / "config.yaml").is_file()
    return Reference(text, "checkpoint" if in_run else "model", path)


def _resolve_file(text: str) -> Reference | None:
    path = Path(text)
    if path.name in ("model.safetensors", "ema.safetensors") and (path.parent / "config.json").is_file():
        folder = _resolve_folder(str(path.parent))
        return folder and replace(folder, text=text, averaged=path.name == "ema.safetensors")
    if path.suffix in WEIGHT_FILES and not path.is_file() and not is_factory(text):
        raise UserError(f"there is no weight file at {text}")
    load = partial(public_weights.build, path)
    return Reference(text, "pretrained", path, Pretrained(load)) if path.is_file() else None


def _resolve_bundled(text: str) -> Reference | None:
    folder = hub.bundled_models().get(text)
    return None if folder is None else Reference(text, "model", folder)


def _resolve_hub(text: str) -> Reference | None:
    if not text.startswith("hf:"):
        return None
    name = text.removeprefix("hf:")
    if (library := find_library(hub.read_configuration(name))) is not None:
        return Reference(text, "pretrained", pretrained=library.find_published(name))
    return Reference(text, "model", hub.pull(name))


def find_library(configuration: Any) -> Any:
    """Return the module of :mod:`advebm.models.zoo` whose library wrote a ``config.json``; None: this package did."""
    if not isinstance(configuration, Mapping):
        return None
    if isinstance(configuration.get("model_type"), str):
        return import_module("advebm.models.zoo.transformers")
    if isinstance(configuration.get("architecture"), str):
        return import_module("advebm.models.zoo.timm")
    return None


def _resolve_network(text: str) -> Reference | None:
    """Resolve ``NETWORK:OPTION=VALUE,…@FILE`` and, without a file, a library's ``LIBRARY:NAME,OPTION=VALUE,…``."""
    kind, _, rest = text.partition(":")
    if kind not in config.KINDS["backbone"] or kind == "own" or Path(text).exists():
        return None
    words, at, file = rest.partition("@")
    path = Path(file) if at else None
    if path is not None and not path.is_file():
        raise UserError(f"there is no weight file at {file}, which {text} names")
    options = config.read_options(words, "backbone", kind)
    if kind in LIBRARIES:
        pretrained = import_module(f"advebm.models.zoo.{kind}").find(options, path)
        return Reference(text, "pretrained", path, pretrained)
    if path is None:
        raise UserError(f"{text} is a network without weights; give a file of them: {text}@FILE")
    constants: dict[str, Any] = {name: options.pop(name) for name in ("mean", "std") if name in options}
    normalise = config.construct(Normalisation, constants, where=text)
    backbone = config.build({**options, "kind": kind}, "backbone", where=text, foreign=False)
    load = partial(public_weights.build, path, backbone, normalise.mean, normalise.std)
    return Reference(text, "pretrained", path, Pretrained(load))


def _resolve_module(text: str) -> Reference | None:
    if not is_factory(text):
        return None
    module, at, weights = text.partition("@")
    if at and not Path(weights).exists():
        raise UserError(f"there are no weights at {weights}, which {text} names")
    return Reference(text, "module", Path(weights) if at else None, module=module)


# In this order, as a folder of that name comes before a model of the package.  A resolver returns None for what it does
# not know, and raises UserError for what it knows and cannot find.
RESOLVERS: tuple[Callable[[str], Reference | None], ...] = (
    _resolve_run,
    _resolve_folder,
    _resolve_hub,
    _resolve_network,
    _resolve_bundled,
    _resolve_file,
    _resolve_module,
)


def load_module_weights(model: Network, path: Path) -> None:
    """Load the weights of a user-defined module: an exported folder, a run, a checkpoint, or a state dict in a file.

    A folder brings its normalisation, too.
    """
    if path.is_file():
        public_weights.load(model, path)
        return
    folder = weights_folder(path)
    if (constants := read_constants(folder)) is not None:
        model.normalise = Normalize(*constants)
    averaged = folder / "ema.safetensors"
    network.load_weights(model, averaged if averaged.is_file() else folder / "model.safetensors")


def weights_folder(path: Path) -> Path:
    """Return the folder with the weights of a run's latest checkpoint, or else the folder itself."""
    return Run.open(path).checkpoints.path() if (path / "config.yaml").is_file() else path


def read_constants(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation of the normalisation in ``config.json``; None if there is no such file.

    Nothing else of the architecture is constructed, since it may name code.
    """
    if not (folder / "config.json").is_file():
        return None
    try:
        architecture = files.read_json(folder / "config.json")["architecture"]
        mean, std = (tuple(float(value) for value in architecture[name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / 'config.json'} is damaged: it has no normalisation") from None
    return mean, std


def digest(model: nn.Module) -> str:
    """Return a short hash of a model's weights and buffers."""
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        state.update(name.encode())
        state.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:10]
