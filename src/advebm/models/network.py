"""Network = normalise + backbone + head; an architecture is plain data, a published model is a folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

import advebm
from advebm.core import checks, config, files
from advebm.core.errors import UserError
from advebm.core.rng import derive_seed
from advebm.models import hub
from advebm.models.layers import Staged, avoid_wrong_gradient
from advebm.models.modes import DualBatchNorm1d, searching


class Backbone(Protocol):
    """A frozen dataclass of hyperparameters that builds a module ``(B, C, H, W) -> (B, features)``."""

    def build(self, channels: int, size: int) -> tuple[nn.Module, int | None]:
        """Return the module for ``size`` x ``size`` images, and its number of features; None: it returns logits."""


class Normalize(nn.Module):
    """Compute ``(x - mean) / std`` per channel; the first layer, so that everything outside sees images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise UserError(f"normalisation takes a mean and a positive deviation a channel, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` in [0, 1] to the same shape, with mean 0 and standard deviation 1 on the data."""
        if self.mean.shape[1] not in (1, x.shape[1]):
            raise UserError(f"the model normalises {self.mean.shape[1]} channels, the images have {x.shape[1]}")
        return (x - self.mean) / self.std


Head = Literal["simclr", "acl"]


class Projection(nn.Sequential):
    """The head of an encoder, from representations (B, W) to g(x) (B, D).

    ``simclr`` is linear, ReLU, linear, Chen et al. (2020).  ``acl`` has three linear layers, a batch norm after each
    and ReLU between, as in the code of Jiang et al. (2020), where all are as wide as the representations; ``dual``
    gives its batch norms two branches.
    """

    def __init__(self, width: int, hidden: int, outputs: int, kind: Head = "simclr", *, dual: bool = False) -> None:
        if kind == "simclr":
            super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
            return
        norm = DualBatchNorm1d if dual else nn.BatchNorm1d
        first = [nn.Linear(width, hidden), norm(hidden), nn.ReLU()]
        second = [nn.Linear(hidden, hidden, bias=False), norm(hidden), nn.ReLU()]
        super().__init__(*first, *second, nn.Linear(hidden, outputs, bias=False), norm(outputs))


class Network(nn.Module):
    """Map ``x (B, C, H, W)`` in [0, 1] to logits ``(B, K)``, or to the projection g(x) ``(B, D)`` of an encoder.

    ``precision`` is the type that autocast computes in, in the backbone only: images, their gradients, the head and the
    logits stay float32.  A wrapped module is all backbone, so its logits are rounded to that type.  It is a setting at
    run time, not part of the weights; loaded networks are in float32.
    """

    precision: torch.dtype = torch.float32
    threat: Any = None  # the threat model that is known of a loaded network, an ``Attack``
    origin: Any = None  # what a loaded network was found by, a ``Reference``, which knows its data and sampler

    def __init__(self, normalise: nn.Module, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.normalise, self.backbone, self.head = normalise, backbone, head

    def __repr__(self) -> str:
        """Return a line for people; ``print(model.backbone)`` shows the layers."""
        count = sum(p.numel() for p in self.parameters())
        outputs = getattr(self.head, "out_features", None)
        kind = "encoder" if self.encoder else "critic" if outputs == 1 else "classifier"
        classes = f" of {outputs} classes" if kind == "classifier" and outputs else ""
        name = f" {self.origin.text}" if self.origin is not None else ""
        threat = f", threat {self.threat.name}" if self.threat is not None else ""
        return f"Network{name}: {type(self.backbone).__name__}, {kind}{classes}, {count:,} parameters{threat}"

    @property
    def encoder(self) -> bool:
        """Return whether the outputs are a projection g(x), to be compared with others, rather than logits."""
        return isinstance(self.head, Projection)

    def forward(self, x: Tensor) -> Tensor:
        if self.precision == torch.float32:
            return self.head(self.features(x))
        with torch.autocast(x.device.type, self.precision):
            features = self.features(x)
        return self.head(features.float())

    @property
    def foreign(self) -> bool:
        """Return whether the backbone is somebody's own module, whose inputs and outputs are adapted to ours."""
        return isinstance(self.head, nn.Identity)

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the head, ``(B, W)``; for an encoder the representation before the projection."""
        x = self.normalise(x)
        return call_foreign(self.backbone, x) if self.foreign else self.backbone(x)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the backbone's stages, ``(B, C_i, H_i, W_i)``, before a closing norm and the pooling.

        Raises:
            UserError: the backbone has no stages.
        """
        if not isinstance(self.backbone, Staged):
            raise UserError("the backbone has no stages; resnet, preact-resnet and wide-resnet have")
        return self.backbone.feature_maps(self.normalise(x))


def call_foreign(module: nn.Module, x: Tensor, kind: torch.dtype | None = None) -> Tensor:
    """Return the logits (B, K) of a module that was not written for this package, in the type of ``x``.

    Images are passed in the type ``kind``, by default that of its weights, and in the default memory layout.  Logits
    are the output itself, its attribute or entry ``logits``, the only matrix of a tuple or list, or the only tensor of
    a mapping.

    Raises:
        UserError: logits cannot be found in the output.
    """
    out = module(x.contiguous().to(kind or type_of(module, x.dtype)))
    logits = out if isinstance(out, Tensor) else find_logits(out)
    if not logits.dtype.is_floating_point:
        raise UserError(f"the model returns {logits.dtype}, such as numbers of classes; return logits (B, K)")
    return logits.to(x.dtype)


def type_of(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the floating-point type of a module's first weights; ``default`` if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def find_logits(out: Any) -> Tensor:
    """Return the logits in what a module returned: in ``.logits``, ``["logits"]``, a tuple or the only tensor."""
    inside = getattr(out, "logits", None)
    if inside is None and isinstance(out, Mapping):
        inside = out.get("logits")
        tensors = [value for value in out.values() if isinstance(value, Tensor)]
        inside = tensors[0] if inside is None and len(tensors) == 1 else inside
    elif inside is None and isinstance(out, tuple | list):
        tensors = [value for value in out if isinstance(value, Tensor) and value.ndim == 2]
        if len(tensors) > 1:
            shapes = ", ".join(str(tuple(value.shape)) for value in tensors)
            raise UserError(
                f"the model returns several matrices, {shapes}; return the logits alone, or name them .logits"
            )
        inside = tensors[0] if tensors else None
    if not isinstance(inside, Tensor):
        keys = f" with {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
        raise UserError(
            f"the model returns a {type(out).__name__}{keys}, in which logits are not found; return a tensor (B, K) "
            "or an object with logits"
        )
    return inside


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All that is needed to build a network again, except its weights.

    Attributes:
        backbone: the feature extractor.
        outputs: number of logits (the classes, or 1 for a critic), or the dimension of an encoder's g(x).
        channels, size: channels and height of the images.
        mean, std: normalisation of each channel.
        hidden: width of an encoder's :class:`Projection`; None: a linear head.
        width: width of the images; None: they are square.
        head: kind of an encoder's :class:`Projection`; its batch norms are dual if those of the backbone are.
    """

    backbone: Backbone
    outputs: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hidden: int | None = None
    width: int | None = None
    head: Head = "simclr"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the images."""
        return self.channels, self.size, self.width or self.size

    def __post_init__(self) -> None:
        config.check_choices(self)
        if min(self.outputs, self.channels, self.size) < 1 or len(self.mean) != self.channels:
            raise UserError(
                f"outputs, channels and size must be at least 1 and there is a mean a channel, got "
                f"{self.outputs}, {self.channels}, {self.size} and {len(self.mean)} means"
            )
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, or none for a linear head, got {self.hidden}")

    def build(self, seed: int = 0) -> Network:
        """Build a network with new weights that depend on ``seed`` alone; the global random state does not change."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "weights"))
            backbone, width = self.backbone.build(self.channels, self.size)
            avoid_wrong_gradient(backbone)
            if width is None and self.hidden is not None:
                raise UserError("an encoder takes a backbone with features, and this one has outputs of its own")
            model = Network(Normalize(self.mean, self.std), backbone, self._build_head(width))
            if width is None or self.width is not None:
                self._check_outputs(model)
            return model

    def _build_head(self, width: int | None) -> nn.Module:
        if width is None:
            return nn.Identity()
        if self.hidden is None:
            return nn.Linear(width, self.outputs)
        dual = getattr(self.backbone, "norm", None) == "dual"
        return Projection(width, self.hidden, self.outputs, self.head, dual=dual)

    def _check_outputs(self, model: Network) -> None:
        """Raise a UserError if the network gives other than ``outputs`` numbers on grey images."""
        with searching(model) as f, torch.no_grad():
            got = tuple(checks.outputs(f, torch.full((2, *self.shape), 0.5), "the network").shape)
        if got not in ((2, self.outputs), (2,) if self.outputs == 1 else ()):
            raise UserError(f"the network returns {got} for 2 images, there have to be {self.outputs} logits an image")


TAGS = ["energy-based-model", "adversarial-training"]
CARD = """---
{metadata}
---

# {title}

{summary}

```python
import advebm

model = advebm.load("{own}PATH OF THIS FOLDER")
{example} images (B, {channels}, {height}, {width}) in [0, 1]
```

Backbone `{backbone}`{needs}, {parameters:,} parameters, {outputs} outputs. `config.json` holds
the architecture and what is known of the training; written by advebm {version}.
{more}"""

Weights = Literal["float32", "float16", "bfloat16"]


def save(
    folder: Path,
    model: Network,
    architecture: Architecture,
    *,
    title: str = "model",
    summary: str = "",
    more: str = "",
    metadata: str = "",
    weights: Weights | None = None,
    ema: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model.safetensors`` (and ``ema.safetensors``), ``config.json`` and the card ``README.md`` to ``folder``.

    ``extra`` is put into ``config.json`` beside the architecture: training set, threat model, numbers.  The card shows
    ``summary`` at its top and ``more`` at its end; ``metadata``, YAML for the Hub, goes before it.  ``weights`` is the
    type in which matrices and filters are stored; None: as they are.  Biases, scales and statistics, which are few,
    always stay as they are.
    """
    description = config.describe(architecture)
    large = {name for name, p in model.named_parameters() if p.ndim > 1}
    for name, state in (("model", model.state_dict()), ("ema", ema)):
        if state is not None:
            tensors = {k: v.detach().clone().contiguous() for k, v in state.items()}
            stored = {k: v.to(getattr(torch, weights)) if weights and k in large else v for k, v in tensors.items()}
            if lost := [k for k in large if tensors[k].isfinite().all() and not stored[k].isfinite().all()]:
                raise UserError(f"{lost[0]} is too large for {weights}; bfloat16 and float32 hold it")
            files.write(folder / f"{name}.safetensors", safetensors.save(stored))
    configuration = {"advebm": advebm.__version__, "architecture": description, **(extra or {})}
    files.write_json(folder / "config.json", configuration)
    example = "energy = advebm.energy(model, images)  # (B,), low on data;"
    own = getattr(architecture.backbone, "path", None)
    kind, library = description["backbone"]["kind"], description["backbone"].get("name")
    if architecture.hidden is not None:
        example = "features, projection = model.features(images), model(images)  # (B, W) and g(x), (B, D);"
    card = CARD.format(
        metadata=metadata.strip() or f"library_name: advebm\ntags: [{', '.join(TAGS)}]",
        example=example,
        own=f"{own}@" if own else "",
        title=title,
        summary=summary,
        more=more and f"\n{more}\n",
        backbone=f"{kind}:{library}" if library else kind,
        needs=f", which needs `pip install {kind}`" if library else "",
        parameters=sum(p.numel() for p in model.parameters()),
        version=advebm.__version__,
        channels=architecture.channels,
        height=architecture.shape[1],
        width=architecture.shape[2],
        outputs=architecture.outputs,
    )
    files.write(folder / "README.md", card)


def load(folder: Path, *, ema: bool = True, foreign: bool = False) -> tuple[Network, Architecture]:
    """Load a folder that :func:`save` wrote; return the network, in eval mode, and its architecture.

    ``ema`` prefers averaged weights if the folder has them.  ``foreign`` allows a backbone ``package.module:Class``,
    whose module is imported; use it only for your own folders.

    Raises:
        UserError: a file is missing, damaged or of another kind.
    """
    architecture = read_architecture(folder, foreign=foreign)
    name = "ema.safetensors" if ema and (folder / "ema.safetensors").exists() else "model.safetensors"
    model = architecture.build()
    load_weights(model, folder / name)
    return model.eval(), architecture


def load_model(where: str | Path) -> Network:
    """Load the network of a published model, or of a run folder's latest checkpoint; see :func:`locate`.

    Raises:
        UserError: nothing is there, or a file is damaged.
    """
    path, foreign = locate(where)
    return load(path, foreign=foreign)[0]


def locate(where: str | Path) -> tuple[Path, bool]:
    """Return the folder with a model's weights, and whether it belongs to a run, which may name code to import.

    ``where`` is a published model (a folder, one of the package or ``hf:USER/NAME``), or a run.
    """
    name = str(where).removeprefix("hf:")
    path = hub.pull(name) if name != str(where) else Path(where)
    if not path.exists():
        path = hub.bundled_models().get(name, path)
    if (path / "config.json").is_file():
        return path, False
    pointer = path / "checkpoints" / "LATEST"
    if not pointer.is_file():
        raise UserError(f"there is no run or model at {path}")
    return pointer.parent / pointer.read_text().strip(), True


def read_architecture(folder: Path, *, foreign: bool = False) -> Architecture:
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text())["architecture"]
    except FileNotFoundError:
        raise UserError(f"no model at {folder}: config.json is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    backbone = description.get("backbone") if isinstance(description, Mapping) else None
    if not foreign and isinstance(backbone, Mapping) and backbone.get("kind") == "own":
        own = backbone.get("path")
        raise UserError(
            f"{folder} holds the weights of somebody's own module, {own}, which is imported only when it is named: "
            f"load it as {own}@{folder} where that can be imported"
        )
    return config.construct(Architecture, description, where=str(path), foreign=foreign)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``model``; every name and shape has to match."""
    try:
        weights = safetensors.load_file(path)
    except FileNotFoundError:
        raise UserError(f"no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model: {' '.join(str(error).split())}") from None


def transfer(source: nn.Module, target: nn.Module) -> list[str]:
    """Copy the weights of one network into another; a head for another number of classes stays as it is.

    Return the names that were not copied.

    Raises:
        UserError: something else differs; then nothing is copied.
    """
    source_state, target_state = source.state_dict(), target.state_dict()
    colour = {1: "grey", 3: "colour"}
    channels, expected = (len(state["normalise.mean"].flatten()) for state in (target_state, source_state))
    if channels != expected:
        raise UserError(
            f"the images have {channels} channels ({colour.get(channels, 'other')}), the weights belong to a network "
            f"of {expected} ({colour.get(expected, 'other')}); --data.channels converts images where it is an option"
        )
    fits = {name: v for name, v in source_state.items() if name in target_state and target_state[name].shape == v.shape}
    different = sorted((source_state.keys() | target_state.keys()) - fits.keys())
    if others := [name for name in different if not name.startswith("head.")]:
        shown = ", ".join(others[:5]) + ", …" * (len(others) > 5)
        raise UserError(f"the weights belong to another network: {len(others)} entries differ ({shown})")
    target.load_state_dict({**target_state, **fits})
    return different
