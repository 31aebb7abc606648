"""Load image classifiers of other code bases: state dicts, recognised and converted by their names.

Equal names do not imply equal functions.  Differences that names and shapes do not show are refused where the file
gives a sign of them (see :func:`load`).  You have to rule out yourself what no file shows: another activation than a
code base's usual one, a normalisation that was kept outside the file or computed from each image, an ε of batch norm
other than 1e-5, other strides, and shortcuts without parameters that put new channels elsewhere than
:class:`advebm.models.resnet.Padding` does.
"""

import math
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from advebm.core import config
from advebm.core.errors import Notice, UserError
from advebm.models.network import Architecture, Backbone, Network
from advebm.models.resnet import LAYOUTS, PreActivated, PreActResNet, ResNet, Variant
from advebm.models.stargan import StarGAN
from advebm.models.wide_resnet import WideResNet

# Keys under which checkpoints keep a state_dict; averaged weights are preferred, as in network.load.
CONTAINERS = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "attacker.", "model.", "net.", "0.", "1.")
UNCHANGED = {"mean": 0.0, "std": 1.0}  # the normalisation that changes nothing
CONSTANTS = {"mean": "mean", "new_mean": "mean", "mu": "mean", "std": "std", "new_std": "std", "sigma": "std"}

Weights = dict[str, Tensor]
Known = ResNet | PreActResNet | WideResNet | StarGAN
Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FUNCTIONS = {"relu": "ReLU", "silu": "SiLU", "leaky_relu": "LeakyReLU"}


@dataclass(frozen=True)
class Layout:
    """The names that a code base gives to the parts of a network, and the names here.

    Attributes:
        title: description for messages.
        block: regular expression of a block's part, with groups for its stage, index in the stage, and name.
        parts: names of a block's parts, theirs -> ours.
        others: all other names, theirs -> ours.
        first: number of the first stage.
        place: our name of a block, with its ``stage`` from 0 and its ``index``.
        variants: what a pre-activation network of these names may compute.
        activations: that of the code base, then those that it has as an option and no file tells.
        norm: kind of the norms.
        constants: normalisation that is kept outside the file, for a number of classes; None: for any.
        source: who normalises and activates so.
        unused: beginnings of the names of entries that the logits do not depend on.
    """

    title: str
    block: str
    parts: Mapping[str, str]
    others: Mapping[str, str]
    first: int = 1
    place: str = "backbone.stages.{stage}.{index}"
    variants: tuple[Variant, ...] = ()
    activations: tuple[str, ...] = ("relu",)
    norm: str = "batch"
    constants: Mapping[int | None, Constants] = field(default_factory=dict)
    source: str = ""
    unused: tuple[str, ...] = ()

    def translate(self, name: str) -> str:
        """Return our name of an entry; unknown names are returned unchanged."""
        part, _, entry = name.rpartition(".")
        if match := re.fullmatch(self.block, part):
            if match[3] in self.parts:
                place = self.place.format(stage=int(match[1]) - self.first, index=match[2])
                return f"{place}.{self.parts[match[3]]}.{entry}"
        elif part in self.others:
            return f"{self.others[part]}.{entry}"
        return name


PLACE = r"backbone\.stages\.(\d+)\.(\d+)\."
FIRST = "backbone.stages.0.0."
LAYER, HEAD = r"layer(\d+)\.(\d+)\.(.+)", {"linear": "head", "fc": "head"}
UNITS = {"conv1": "residual.0", "bn1": "residual.1", "conv2": "residual.3", "bn2": "residual.4"}
PRE = {"bn1": "opening.0", "conv1": "residual.0", "bn2": "residual.1", "conv2": "residual.3"}

MIXED = tuple(Variant(bare=bare, closing=closing) for closing in (True, False) for bare in (False, True))

OURS = Layout("advebm's own names", r"(?!)", {}, {}, variants=MIXED)
WRAPPED = Layout("the module's own names", r"(?!)", {}, {})
RESNET = Layout(
    "the names of public ResNets (conv1, layer1.0.conv1, layer1.0.bn1, …)",
    LAYER,
    {**UNITS, "conv3": "residual.6", "bn3": "residual.7"}
    | {f"{theirs}.{i}": f"shortcut.{i}" for theirs in ("shortcut", "downsample") for i in (0, 1)},
    {"conv1": "backbone.stem.0", "bn1": "backbone.stem.1", **HEAD},
)
PREACT = Layout(
    "the names of public pre-activation ResNets (conv1, layer1.0.bn1, layer1.0.conv1, …, bn)",
    LAYER,
    {**PRE, "shortcut": "shortcut", "shortcut.0": "shortcut", "downsample.0": "shortcut"},
    {"conv1": "backbone.stem", "bn": "backbone.closing.0", "bn1": "backbone.closing.0", **HEAD},
    variants=MIXED,
)
WIDE = Layout(
    "the names of public wide ResNets (conv1, block1.layer.0.bn1, …, bn1, fc)",
    r"block(\d+)\.layer\.(\d+)\.(.+)",
    {**PRE, "convShortcut": "shortcut"},
    {"conv1": "backbone.stem", "bn1": "backbone.closing.0", **HEAD},
    variants=(Variant(),),
    activations=("relu", "silu"),  # InNOutRobustness, and so DAT, has swish as an option
    unused=("sub_block1.",),
)
DEEPMIND = Layout(
    "the names of DeepMind's wide ResNets (init_conv, layer.0.block.0.conv_0, …, batchnorm, logits)",
    r"layer\.(\d+)\.block\.(\d+)\.(.+)",
    {
        "batchnorm_0": "opening.0",
        "conv_0": "residual.0",
        "batchnorm_1": "residual.1",
        "conv_1": "residual.3",
        "shortcut": "shortcut",
    },
    {"init_conv": "backbone.stem", "batchnorm": "backbone.closing.0", "logits": "head"},
    first=0,
    variants=(WideResNet.variants["deepmind"],),
    activations=("silu", "relu"),
    constants={10: CIFAR10, 100: CIFAR100},
    source="all such networks of RobustBench",
)
DEEPMIND_PREACT = replace(
    DEEPMIND,
    title="the names of DeepMind's pre-activation ResNets (conv_2d, layer_0.0.conv_2d_1, …, batchnorm, logits)",
    block=r"layer_(\d+)\.(\d+)\.(.+)",
    parts={
        "batchnorm_0": "opening.0",
        "conv_2d_1": "residual.0",
        "batchnorm_1": "residual.1",
        "conv_2d_2": "residual.3",
        "shortcut": "shortcut",
    },
    others={"conv_2d": "backbone.stem", "batchnorm": "backbone.closing.0", "logits": "head"},
    variants=(PreActResNet.variants["deepmind"],),
)
JEM = Layout(
    "the names of JEM's wide ResNets (f.conv1, f.layer1.0.conv1, …, class_output)",
    r"f\.layer(\d+)\.(\d+)\.(.+)",
    {**PRE, "shortcut.0": "shortcut"},
    {"f.conv1": "backbone.stem", "f.bn1": "backbone.closing.0", "class_output": "head"},
    variants=(WideResNet.variants["jem"],),
    activations=("leaky_relu",),
    norm="none",
    constants={None: ((0.5,) * 3, (0.5,) * 3)},
    source="JEM's code",
    unused=("energy_output.", "f.linear."),
)
STARGAN = Layout(
    "the names of AT-EBMs' StarGAN v2 discriminators (main.0, main.1.conv1, …, linear)",
    r"main\.(\d+)()\.(conv1|conv2|conv1x1)",
    {"conv1": "residual.1", "conv2": "residual.4", "conv1x1": "shortcut"},
    {"main.0": "backbone.stem", **{f"main.{i}": "backbone.closing.1" for i in range(3, 11)}, "linear": "head"},
    place="backbone.stages.{stage}",
    activations=("leaky_relu",),
    norm="none",
    constants={None: IMAGENET},
    source="the code of AT-EBMs",
)
NAMED = (WIDE, DEEPMIND, DEEPMIND_PREACT, JEM, STARGAN)  # their blocks' names are theirs alone
PUBLIC = (RESNET, PREACT, *NAMED)


def read(path: Path) -> Weights:
    """Read the state dict in a file, ``.safetensors`` or else a torch checkpoint; no code in the file is run.

    The state dict may lie in a container (``state_dict``, ``model``, …; averaged weights such as ``ema_state_dict`` are
    preferred).  Prefixes that all entries share, except normalisation constants, are removed: those of DataParallel, of
    a compiled module, of a module in a wrapper or at the end of a Sequential.  The second copy of the network in
    checkpoints of the robustness library is left out.

    Raises:
        UserError: the file is missing or damaged, holds more than tensors, or has no state dict.
    """
    *_, weights = _strip_prefixes(_read_state_dict(path))
    return weights


def load(model: Network, path: Path) -> list[str]:
    """Copy the weights in a file into a network if they give the same function there; else copy nothing.

    Known are our own names, the names inside a user-defined module, and those of public classifiers: ResNet,
    pre-activation ResNet and wide ResNet with batch norm and ReLU, DeepMind's networks with SiLU, JEM's wide ResNet
    without norm and AT-EBMs' discriminator, both with leaky ReLU.  Normalisation constants in the file replace those of
    ``model``.  ``num_batches_tracked`` may be missing.

    Returns:
        The names that keep their initial values: the head's, if the file's head is for another number of classes.

    Raises:
        UserError: what :func:`read` raises; weights that do not fit; weights that fit and give another function: those
            of another variant, as far as names and running statistics tell, norms without running statistics, or a
            model with another activation.
    """
    return _load(model, path, stated=False)


def _load(model: Network, path: Path, *, stated: bool) -> list[str]:
    """Load as :func:`load` does; ``stated``: the user says which activation it is, among those of the code base."""
    expected, readings = model.state_dict(), list(_strip_prefixes(_read_state_dict(path)))
    weights = next((w for w in readings if _is_wrapped(w, expected)), readings[-1])
    layout = _recognise(weights, expected, path)
    renamed, origin = _rename(weights, layout, expected)
    unused = [name for name in renamed if name.startswith(layout.unused)]
    for name in unused:
        del renamed[name]
    _shape_constants(renamed, expected, path)
    if layout in PUBLIC and (reason := _find_missing_part(renamed, layout)):
        raise UserError(f"{path} has {layout.title}, but {reason}")
    fresh = _find_other_head(renamed, expected)
    for name in fresh:
        renamed.pop(name, None)
    _check_fit(model, fresh, renamed, origin, layout, path)
    if layout in PUBLIC and (reason := _find_difference(renamed, model, layout, stated)):
        raise UserError(f"{path} has {layout.title}, but {reason}")
    model.load_state_dict({**expected, **renamed})
    if unused:
        parts = ", ".join(part[:-1] for part in layout.unused if any(name.startswith(part) for name in unused))
        warnings.warn(f"{path}: left out {len(unused)} entries of {parts}, which no output uses", Notice, stacklevel=3)
    return fresh


def _read_state_dict(path: Path) -> Weights:
    """Return the tensors in a file, under the names used there."""
    content = _read_file(path)
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        kind = "an empty dict" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise UserError(f"{path} holds no state_dict, but {kind}")
    if extra := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        known = _join_names(CONTAINERS, 9)
        raise UserError(f"{path} holds no state_dict: {_join_names(extra)} are no tensors, nor one of {known}")
    named = {str(name): value for name, value in content.items()}
    return {name: value for name, value in named.items() if name.rpartition(".")[2] != "n_averaged"}


def _strip_prefixes(weights: Weights) -> Iterator[Weights]:
    """Yield the weights, then again after each removal of a shared prefix; a second copy of the network is dropped."""
    yield weights
    twins = {n: weights.get(n.replace("attacker.model.", "model.")) for n in weights if "attacker.model." in n}
    copies = {name for name, twin in twins.items() if twin is not None and torch.equal(twin, weights[name])}
    weights = {name: value for name, value in weights.items() if name not in copies}
    while prefix := next((p for p in PREFIXES if _is_shared(p, weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        yield weights


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds {match[1]}, which only running code of the file could read; if you trust it, load it "
                "where it comes from and save its state_dict alone"
            ) from None
        raise UserError(f"{path} is damaged or no torch checkpoint") from None
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or cannot be read: {reason}") from None


def _join_names(names: Iterable[str], count: int = 5) -> str:
    """Return the first few of a list, and how many there are, as text."""
    names = list(names)
    return ", ".join(names[:count]) + (f", … ({len(names)} in all)" if len(names) > count else "")


def _constant_of(name: str) -> str | None:
    """Return ``mean`` or ``std`` for the name of a normalisation constant, else None."""
    return CONSTANTS.get(name.rpartition(".")[2])


def _is_shared(prefix: str, weights: Weights) -> bool:
    names = [name for name in weights if not _constant_of(name)]
    return bool(names) and all(name.startswith(prefix) for name in names)


def _is_wrapped(weights: Weights, expected: Weights) -> bool:
    """Return whether the names are those of the module inside a network, and of a normalisation in front of it."""
    inside = {name: f"backbone.{name}" in expected for name in weights}
    return any(inside.values()) and all(found or _constant_of(name) for name, found in inside.items())


def _recognise(weights: Weights, expected: Weights, path: Path) -> Layout:
    """Return the layout, by names or, where two layouts share them, by the order of a block's norm and convolution."""
    if _is_wrapped(weights, expected):
        return WRAPPED
    if any(name.startswith(("backbone.", "head.")) for name in weights):
        return OURS
    if (layout := next((ours for ours in NAMED if any(re.match(ours.block, n) for n in weights)), None)) is not None:
        return layout
    if any(re.match(LAYER, name) for name in weights):
        # a norm before its convolution has as many channels as the convolution has inputs
        norms = {n: v for n, v in weights.items() if re.fullmatch(r"layer\d+\.0\.bn1\.weight", n) and v.ndim}
        convolutions = {name: weights.get(name.replace("bn1", "conv1")) for name in norms}
        before = any(c is not None and c.ndim and len(c) != len(norms[name]) for name, c in convolutions.items())
        return PREACT if before else RESNET
    raise UserError(f"{path} has names that are not known: {_join_names(weights)}")


def _rename(weights: Weights, layout: Layout, expected: Weights) -> tuple[Weights, dict[str, str]]:
    """Return the entries under our names, and the original name of each; constants of a normalisation likewise."""
    renamed: Weights = {}
    origin: dict[str, str] = {}
    for name, value in weights.items():
        ours = f"backbone.{name}" if layout is WRAPPED else layout.translate(name)
        outside = layout in PUBLIC or (layout is WRAPPED and ours not in expected)
        if outside and (constant := _constant_of(name)):
            ours = f"normalise.{constant}"
            if ours in renamed and torch.equal(renamed[ours].flatten(), value.flatten()):
                continue
        ours = name if ours in renamed else ours
        renamed[ours], origin[ours] = value, name
    return renamed, origin


def _shape_constants(renamed: Weights, expected: Weights, path: Path) -> None:
    """Give the normalisation constants, one in all or one per channel, the shape of ours."""
    constants = [name for name in ("normalise.mean", "normalise.std") if name in renamed and name in expected]
    if len(constants) == 1:
        raise UserError(f"{path} has only one of the two constants of a normalisation, {constants[0]}")
    for name in constants:
        value, shape = renamed[name].flatten(), expected[name].shape
        if value.numel() not in (1, shape[1]):
            raise UserError(f"{path} normalises {value.numel()} channels, the model's images have {shape[1]}")
        if not value.isfinite().all() or (name == "normalise.std" and not (value > 0).all()):
            raise UserError(f"{path} cannot normalise by {name.removeprefix('normalise.')} {value.tolist()}")
        renamed[name] = value.view(1, -1, 1, 1).expand(shape)


def _find_other_head(renamed: Weights, expected: Weights) -> list[str]:
    """Return the head's names if it differs in its number of classes and in nothing else, else an empty list."""
    theirs, ours = renamed.get("head.weight"), expected.get("head.weight")
    if theirs is None or ours is None or len(theirs) == len(ours) or theirs.shape[1:] != ours.shape[1:]:
        return []
    return sorted(name for name in expected if name.startswith("head."))


def _check_fit(
    model: nn.Module, fresh: list[str], renamed: Weights, origin: Mapping[str, str], layout: Layout, path: Path
) -> None:
    """Raise a UserError unless names and shapes match, but for missing ``normalise.*`` and ``num_batches_tracked``."""
    expected = {name: value for name, value in model.state_dict().items() if name not in fresh}
    needed = [
        name for name in expected if not name.startswith("normalise.") and not name.endswith("num_batches_tracked")
    ]
    missing = [name for name in needed if name not in renamed]
    unexpected = [origin[name] for name in renamed if name not in expected]
    common = [name for name in renamed if name in expected]
    shapes = [
        f"{origin[name]} {tuple(renamed[name].shape)}, not {tuple(expected[name].shape)}"
        for name in common
        if renamed[name].shape != expected[name].shape
    ]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if not any(lists.values()):
        return
    wrong = "; ".join(f"{kind}: {_join_names(names)}" for kind, names in lists.items() if names)
    theirs, ours = _describe_backbone(renamed, layout.variants), _describe_backbone(expected, _find_variants(model))
    fix = "" if theirs == ours else f"; likely fix: {theirs} (the model is {ours})"
    matched = f"{len(common) - len(shapes)} of {len(renamed)} entries do"
    raise UserError(f"{path}, which has {layout.title}, does not fit the model: {matched}; {wrong}{fix}")


def build(
    path: Path,
    backbone: Backbone | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[Network, Architecture]:
    """Build the network that the weights in a file belong to, load them, and return it in eval mode.

    Known are the public networks of :func:`load`.  Where the file has no normalisation constants, those of its code
    base are taken if it has always the same ones, else images in [0, 1] as they are; a notice says so.

    Args:
        path: the file.
        backbone: the network, if it shall not be recognised; the file is checked against it name by name.
        mean, std: normalisation of each channel, if the file has none; both or neither.

    Raises:
        UserError: what :func:`load` raises, or a network that cannot be recognised.
    """
    *_, weights = _strip_prefixes(_read_state_dict(path))
    layout = _recognise(weights, {}, path)
    renamed, origin = _rename(weights, layout, {})
    head, channels, stated = renamed.get("head.weight"), _count_channels(renamed), backbone is not None
    if layout in PUBLIC and backbone is None and channels:
        backbone = _choose_backbone(renamed, origin, layout, path)
    if backbone is None or head is None or head.ndim != 2 or not channels:
        raise UserError(f"{path} says too little of its network; give the folder of the model, or --init to a recipe")
    given = None if mean is None or std is None else (mean, std)
    if given is None and (mean, std) != (None, None):
        raise UserError(f"mean and std go together, got {mean} and {std}")
    mean, std = _find_constants(renamed, layout, len(head), channels, given, path)
    architecture = Architecture(backbone, len(head), channels, _find_size(backbone, renamed), mean, std)
    model = architecture.build()
    _load(model, path, stated=stated)
    if not stated:
        _tell_assumptions(backbone, layout, path)
    return model.eval(), architecture


def _count_channels(renamed: Weights) -> int:
    """Return the channels of the images, judged by the first convolution or the normalisation; 0 if neither tells."""
    stem = renamed.get("backbone.stem.weight", renamed.get("backbone.stem.0.weight"))
    if stem is not None:
        return stem.shape[1] if stem.ndim == 4 else 0
    return renamed["normalise.mean"].numel() if "normalise.mean" in renamed else 0


def _find_size(backbone: Backbone, renamed: Weights) -> int:
    """Return the size of the images that such networks are for."""
    if isinstance(backbone, StarGAN) and (halvings := _count_halvings(renamed)):
        return 4 * 2**halvings
    return 224 if isinstance(backbone, ResNet) and backbone.stem == "imagenet" else 32


def _find_constants(
    renamed: Weights, layout: Layout, classes: int, channels: int, given: Constants | None, path: Path
) -> Constants:
    """Return the normalisation: of the file, else as given, else of the code base, else the one that changes nothing.

    Raises:
        UserError: it is given twice, or the code base has none for such images.
    """
    mean, std = (renamed.get(f"normalise.{name}") for name in UNCHANGED)
    if mean is not None or std is not None:
        if given is not None:
            raise UserError(f"{path} holds its own normalisation; leave mean and std out")
        return _expand(mean, 0.0, channels), _expand(std, 1.0, channels)
    if given is not None:
        if {len(values) for values in given} - {1, channels}:
            raise UserError(f"mean and std have one value or {channels}, got {given[0]} and {given[1]}")
        return tuple(value * channels if len(value) == 1 else value for value in given)  # type: ignore[return-value]
    if not layout.constants:
        warnings.warn(f"{path} has no normalisation; images in [0, 1] are taken as they are", Notice, stacklevel=3)
        return (0.0,) * channels, (1.0,) * channels
    constants = layout.constants.get(classes, layout.constants.get(None))
    if constants is None or channels != 3:
        raise UserError(
            f"{path} has no normalisation, and what {layout.source} do is not known for {classes} classes and "
            f"{channels} channels; give mean and std"
        )
    mean_text, std_text = (", ".join(f"{value:g}" for value in values) for values in constants)
    warnings.warn(
        f"{path} has no normalisation; as in {layout.source} it is by mean {mean_text} and deviation {std_text}",
        Notice,
        stacklevel=3,
    )
    return constants


def _tell_assumptions(backbone: Backbone, layout: Layout, path: Path) -> None:
    """Warn of what was not in the file and is not the default of other code bases."""
    if layout.activations[0] == "silu":
        text = f"{path} does not say its activation; SiLU is taken, as in {layout.source}"
    elif isinstance(backbone, ResNet) and backbone.shortcut == "padding":
        text = f"{path} has no shortcut weights; half of the new channels of zeros are put before, half behind"
    else:
        return
    warnings.warn(text, Notice, stacklevel=3)


def _expand(value: Tensor | None, default: float, channels: int) -> tuple[float, ...]:
    values = (default,) if value is None else tuple(value.flatten().tolist())
    return values * channels if len(values) == 1 else values


def _choose_backbone(renamed: Weights, origin: Mapping[str, str], layout: Layout, path: Path) -> Backbone | None:
    """Return the backbone that the weights belong to; None if there is none.

    Raises:
        UserError: there are several and the running statistics do not tell which, or they fit none of them.
    """
    backbones = _find_backbones(renamed, layout.variants, layout.activations[0])
    if len(backbones) < 2:
        return backbones[0] if backbones else None
    if reason := _find_missing_part(renamed, layout):
        raise UserError(f"{path} has {layout.title}, but {reason}")
    with torch.device("meta"):
        module, _ = backbones[0].build(_count_channels(renamed), 32)
    parts = {name: value for name, value in renamed.items() if name.startswith("backbone.")}
    _check_fit(nn.ModuleDict({"backbone": module}), [], parts, origin, layout, path)
    variants = {b.variant: b for b in backbones if isinstance(b, PreActResNet)}
    bare = _has_bare_shortcuts(renamed)
    if bare is None:
        raise UserError(
            f"{path} fits preact-resnet of variant {' and '.join(variants)}, and its running statistics do not tell "
            f"which; likely fix: say it, as in preact-resnet:variant={next(iter(variants))}@{path}"
        )
    return next(b for name, b in variants.items() if b.variants[name].bare == bare)


def _find_backbones(weights: Weights, variants: Collection[Variant], activation: str = "relu") -> list[Known]:
    """Return the backbones, of those ``variants``, that weights with our names belong to by names and shapes."""
    options: dict[str, Any] = {"norm": _norm_kind(weights), "activation": activation}
    if halvings := _count_halvings(weights):
        return _find_stargan(weights, halvings, activation)
    places = {match.groups() for name in weights if (match := re.match(PLACE, name))}
    counts = tuple(count for _, count in sorted(Counter(stage for stage, _ in places).items()))
    if (inner := weights.get(f"{FIRST}residual.0.weight")) is None or not inner.ndim:
        return []
    if "backbone.stem.weight" not in weights:
        return _find_resnet(weights, counts, len(inner), options)
    ends = any(name.startswith("backbone.closing.") for name in weights)
    fits = {v for v in variants if v.closing == ends or options["norm"] == "none"}
    depth = next((d for d in (18, 34) if LAYOUTS[d][1] == counts), None)
    if depth is not None:
        names = [name for name, variant in PreActResNet.variants.items() if variant in fits]
        return [PreActResNet(depth, len(inner), variant=name, **options) for name in names]  # type: ignore[arg-type]
    if len(counts) == 3 and len(set(counts)) == 1 and len(inner) >= 16:
        size = 6 * counts[0] + 4, len(inner) // 16
        names = [name for name, variant in WideResNet.variants.items() if variant in fits]
        return [WideResNet(*size, variant=name, **options) for name in names]  # type: ignore[arg-type]
    return []


def _find_resnet(weights: Weights, counts: tuple[int, ...], inner: int, options: dict[str, Any]) -> list[Known]:
    """Return the ResNet with so many blocks a stage and channels inside the first one, if there is one."""
    outputs, stem = weights.get(f"{FIRST}residual.6.weight"), weights.get("backbone.stem.0.weight")
    expansion = 1 if outputs is None else 4
    width = inner if outputs is None or not outputs.ndim else len(outputs) // expansion
    depth = next((d for d, (_, blocks, times) in LAYOUTS.items() if (blocks, times) == (counts, expansion)), None)
    if depth is None or width < 1 or inner % width:
        return []
    if stem is not None and stem.shape[2:] == (7, 7):
        options["stem"] = "imagenet"
    if not any(".shortcut." in name for name in weights):
        options["shortcut"] = "padding"
    return [ResNet(depth, width, widen=inner // width, **options)]


def _count_halvings(weights: Weights) -> int:
    """Return the number of a discriminator's blocks; 0 for other networks."""
    return len({match[1] for name in weights if (match := re.match(r"backbone\.stages\.(\d+)\.residual", name))})


def _find_stargan(weights: Weights, halvings: int, activation: str) -> list[Known]:
    """Return the discriminator with so many blocks, if the weights show its widths."""
    stem, head = weights.get("backbone.stem.weight"), weights.get("head.weight")
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 2 or len(stem) > head.shape[1]:
        return []
    usual = len(stem) == min(2**14 // (4 * 2**halvings), head.shape[1])
    return [StarGAN(head.shape[1], None if usual else len(stem), activation)]  # type: ignore[arg-type]


def _find_variants(model: nn.Module) -> set[Variant]:
    """Return what a model's pre-activation blocks compute."""
    return {m.variant for m in model.modules() if isinstance(m, PreActivated)}


def _describe_backbone(weights: Weights, variants: Collection[Variant]) -> str:
    """Return the backbone that weights with our names belong to, as command-line options."""
    if not (backbones := _find_backbones(weights, variants)):
        return "a network of another kind"
    options = config.describe(backbones[0])
    usual: dict[str, Any] = {"width": None, "stem": "cifar", "shortcut": "projection"}
    usual |= {} if isinstance(backbones[0], WideResNet) else {"widen": 1}
    names = [n for n in ("depth", "width", "widen", "norm", "stem", "shortcut") if n in options]
    texts = {name: options[name] for name in names if name not in usual or options[name] != usual[name]}
    found = [backbone.variant for backbone in backbones if isinstance(backbone, PreActResNet | WideResNet)]
    if found and "standard" not in found:
        texts["variant"] = "|".join(found)
    return " ".join([f"--backbone {options['kind']}", *(f"--backbone.{name} {text}" for name, text in texts.items())])


def _norm_kind(weights: Weights) -> str:
    """Return the kind of the norms, judged by the names."""
    if any(".branches." in name for name in weights):
        return "dual"
    if any(name.endswith(".running_mean") for name in weights):
        return "batch"
    return "group" if "backbone.stages.0.0.residual.1.weight" in weights else "none"


def _find_missing_part(renamed: Weights, layout: Layout) -> str | None:
    """Return what keeps a network with foreign names from being one of ours, or None."""
    if "head.weight" in renamed and "head.bias" not in renamed:
        return "no biases in its head: such heads take normalised features, ours takes them as they are"
    if layout.norm == "batch" and _norm_kind(renamed) in ("group", "none"):
        return "no running statistics of batch norm: what its norms do instead is not in the file"
    if layout.norm == "none" and _norm_kind(renamed) != "none":
        return "norms: of such networks only the one without norm is known"
    return None


def _find_difference(renamed: Weights, model: nn.Module, layout: Layout, stated: bool) -> str | None:
    """Return how a network that fits by names and shapes computes another function, or None."""
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, nn.ReLU | nn.SiLU | nn.LeakyReLU)}
    known = layout.activations if stated else layout.activations[:1]
    if kinds not in [{FUNCTIONS[name]} for name in known]:
        theirs, ours = " or ".join(FUNCTIONS[name] for name in known), ", ".join(sorted(kinds))
        fix = f"--backbone.activation {known[0]}"
        return f"such networks compute with {theirs}, the model with {ours}; likely fix: {fix}"
    variants = _find_variants(model)
    if not variants <= set(layout.variants):
        names = [n for kind in (PreActResNet, WideResNet) for n, v in kind.variants.items() if v in layout.variants]
        return (
            "such networks pad, stride or shorten otherwise than the model; likely fix: --backbone.variant "
            f"{' or '.join(dict.fromkeys(names))}"
        )
    bare = _has_bare_shortcuts(renamed) if layout is PREACT else None
    if bare is None or bare in {variant.bare for variant in variants}:
        return None
    words = {True: "bare", False: "activated"}
    names = [n for n, v in PreActResNet.variants.items() if v in {variant._replace(bare=bare) for variant in variants}]
    fix = f"; likely fix: --backbone.variant {names[0]}" if "backbone.stages.3.0.residual.0.weight" in renamed else ""
    return (
        f"by its running means its shortcuts take a block's {words[bare]} input, the model's its {words[not bare]} "
        f"one{fix}"
    )


def _has_bare_shortcuts(w: Weights) -> bool | None:
    """Return whether running means show that shortcuts take a block's bare input, or activated; None: neither.

    Both kinds have the same names and shapes.  But the running mean of the norm after a block is the mean of its
    residual plus the shortcut's weights times the mean of the shortcut's input.  The mean after an activation is
    predicted as if the norm's output were normal.  In a trained network the errors of the two kinds differ by an order
    of magnitude; the factor of 3 spares a network whose statistics have hardly changed, which tell nothing.  Without a
    closing norm the last block shows nothing.
    """
    places = sorted({(int(match[1]), int(match[2])) for name in w if (match := re.match(PLACE, name))})
    blocks = [f"backbone.stages.{stage}.{index}." for stage, index in places]
    after = [*(f"{block}opening.0" for block in blocks[1:]), "backbone.closing.0"]
    bare = activated = 0.0
    for block, following in zip(blocks, after, strict=True):
        if (shortcut := w.get(f"{block}shortcut.weight")) is None or f"{following}.running_mean" not in w:
            continue
        matrix, mean = shortcut.double()[:, :, 0, 0], w[f"{block}opening.0.running_mean"].double()
        residual = w[f"{block}residual.3.weight"].double().sum((2, 3)) @ _mean_activation(w, f"{block}residual.1")
        shortcut_mean = w[f"{following}.running_mean"].double() - residual
        scale = w[f"{following}.running_var"].double()
        bare += ((shortcut_mean - matrix @ mean).square() / scale).mean().item()
        activated_mean = matrix @ _mean_activation(w, f"{block}opening.0")
        activated += ((shortcut_mean - activated_mean).square() / scale).mean().item()
    if 3 * bare < activated:
        return True
    return False if 3 * activated < bare else None


def _mean_activation(w: Weights, norm: str) -> Tensor:
    """Return ``E relu(n)`` per channel; the norm's bias and weight are the normal n's mean and standard deviation."""
    mean, deviation = w[f"{norm}.bias"].double(), w[f"{norm}.weight"].double().abs().clamp_min(1e-12)
    z = mean / deviation
    return mean * torch.special.ndtr(z) + deviation * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
