"""Load image classifiers of other code bases: state dicts, recognised and converted by their names.

Equal names do not imply equal functions.  Differences that names and shapes do not show are refused where the file
gives a sign of them (see :func:`load`).  You have to rule out yourself what no file shows: an activation other than
ReLU, a normalisation that was kept outside the file or computed from each image, an ε of batch norm other than 1e-5.
"""

import math
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from advebm.core import config
from advebm.core.errors import Notice, UserError
from advebm.models.network import Architecture, Network
from advebm.models.resnet import LAYOUTS, PreActResNet, ResNet
from advebm.models.wide_resnet import WideResNet

# Keys under which checkpoints keep a state_dict; averaged weights are preferred, as in network.load.
CONTAINERS = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "attacker.", "model.", "net.", "0.", "1.")
UNCHANGED = {"mean": 0.0, "std": 1.0}  # the normalisation that changes nothing
CONSTANTS = {"mean": "mean", "new_mean": "mean", "mu": "mean", "std": "std", "new_std": "std", "sigma": "std"}

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """The names that a code base gives to the parts of a network, and the names here.

    Attributes:
        title: description for messages.
        block: regular expression of a block's part, with groups for its stage (from 1), index in the stage, and name.
        parts: names of a block's parts, theirs -> ours.
        others: all other names, theirs -> ours.
    """

    title: str
    block: str
    parts: Mapping[str, str]
    others: Mapping[str, str]

    def translate(self, name: str) -> str:
        """Return our name of an entry; unknown names are returned unchanged."""
        part, _, entry = name.rpartition(".")
        if match := re.fullmatch(self.block, part):
            if match[3] in self.parts:
                return f"backbone.stages.{int(match[1]) - 1}.{match[2]}.{self.parts[match[3]]}.{entry}"
        elif part in self.others:
            return f"{self.others[part]}.{entry}"
        return name


PLACE = r"backbone\.stages\.(\d+)\.(\d+)\."
LAYER, HEAD = r"layer(\d+)\.(\d+)\.(.+)", {"linear": "head", "fc": "head"}
UNITS = {"conv1": "residual.0", "bn1": "residual.1", "conv2": "residual.3", "bn2": "residual.4"}
PRE = {"bn1": "opening.0", "conv1": "residual.0", "bn2": "residual.1", "conv2": "residual.3"}

OURS = Layout("advebm's own names", r"(?!)", {}, {})
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
)
WIDE = Layout(
    "the names of public wide ResNets (conv1, block1.layer.0.bn1, …, bn1, fc)",
    r"block(\d+)\.layer\.(\d+)\.(.+)",
    {**PRE, "convShortcut": "shortcut"},
    {"conv1": "backbone.stem", "bn1": "backbone.closing.0", **HEAD},
)
PUBLIC = (RESNET, PREACT, WIDE)


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

    Known are our own names, the names inside a user-defined module, and those of three public families of CIFAR
    classifiers with batch norm and ReLU: ResNet, pre-activation ResNet and wide ResNet.  Normalisation constants in the
    file replace those of ``model``.  ``num_batches_tracked`` may be missing.

    Returns:
        The names that keep their initial values: the head's, if the file's head is for another number of classes.

    Raises:
        UserError: what :func:`read` raises; weights that do not fit; weights that fit and give another function: a
            pre-activation network without closing norm, or whose shortcuts take the bare input, norms without running
            statistics, or a model whose activation is not ReLU.
    """
    expected, readings = model.state_dict(), list(_strip_prefixes(_read_state_dict(path)))
    weights = next((w for w in readings if _is_wrapped(w, expected)), readings[-1])
    layout = _recognise(weights, expected, path)
    renamed, origin = _rename(weights, layout)
    unused = [name for name in renamed if layout is WIDE and name.startswith("sub_block1.")]
    for name in unused:
        del renamed[name]
    _shape_constants(renamed, expected, path)
    if layout in PUBLIC and (reason := _find_missing_part(renamed)):
        raise UserError(f"{path} has {layout.title}, but {reason}")
    fresh = _find_other_head(renamed, expected)
    for name in fresh:
        renamed.pop(name, None)
    needed = {name: value for name, value in expected.items() if name not in fresh}
    _check_fit(needed, renamed, origin, f"{path}, which has {layout.title},")
    if layout in PUBLIC and (reason := _find_difference(renamed, model, layout)):
        raise UserError(f"{path} has {layout.title}, but {reason}")
    model.load_state_dict({**expected, **renamed})
    if unused:
        warnings.warn(f"{path}: left out {len(unused)} entries of sub_block1, which no output uses", stacklevel=2)
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
    return {str(name): value for name, value in content.items() if name != "n_averaged"}


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
    """Return whether the names are those of the module inside a network."""
    return all(f"backbone.{name}" in expected for name in weights)


def _recognise(weights: Weights, expected: Weights, path: Path) -> Layout:
    """Return the layout, by names or, where two layouts share them, by the order of a block's norm and convolution."""
    if _is_wrapped(weights, expected):
        return WRAPPED
    if any(name.startswith(("backbone.", "head.")) for name in weights):
        return OURS
    if any(re.match(WIDE.block, name) for name in weights):
        return WIDE
    if any(re.match(LAYER, name) for name in weights):
        # a norm before its convolution has as many channels as the convolution has inputs
        norms = {n: v for n, v in weights.items() if re.fullmatch(r"layer\d+\.0\.bn1\.weight", n) and v.ndim}
        convolutions = {name: weights.get(name.replace("bn1", "conv1")) for name in norms}
        before = any(c is not None and c.ndim and len(c) != len(norms[name]) for name, c in convolutions.items())
        return PREACT if before else RESNET
    if "init_conv.weight" in weights or "conv_2d.weight" in weights:
        raise UserError(f"{path} is a DeepMind network, whose strided convolutions pad one side only; none here does")
    raise UserError(f"{path} has names that are not known: {_join_names(weights)}")


def _rename(weights: Weights, layout: Layout) -> tuple[Weights, dict[str, str]]:
    """Return the entries under our names, and the original name of each; public layouts' constants are renamed, too."""
    renamed: Weights = {}
    origin: dict[str, str] = {}
    for name, value in weights.items():
        ours = f"backbone.{name}" if layout is WRAPPED else layout.translate(name)
        if layout in PUBLIC and (constant := _constant_of(name)):
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


def _check_fit(expected: Weights, renamed: Weights, origin: Mapping[str, str], what: str) -> None:
    """Raise a UserError unless names and shapes match, but for missing ``normalise.*`` and ``num_batches_tracked``."""
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
    theirs, ours = _describe_backbone(renamed), _describe_backbone(expected)
    fix = "" if theirs == ours else f"; likely fix: {theirs} (the model is {ours})"
    matched = f"{len(common) - len(shapes)} of {len(renamed)} entries do"
    raise UserError(f"{what} does not fit the model: {matched}; {wrong}{fix}")


def build(path: Path) -> tuple[Network, Architecture]:
    """Build the network that the weights in a file belong to, load them, and return it in eval mode.

    Known are the three public families of :func:`load`.  Where the file has no normalisation constants, images in
    [0, 1] are taken as they are.

    Raises:
        UserError: what :func:`load` raises, or a network that cannot be recognised.
    """
    *_, weights = _strip_prefixes(_read_state_dict(path))
    layout = _recognise(weights, {}, path)
    renamed, _ = _rename(weights, layout)
    backbone, head, stem = _find_backbone(renamed), renamed.get("head.weight"), _find_stem(renamed)
    if layout not in PUBLIC or backbone is None or head is None or stem is None or head.ndim != 2:
        raise UserError(f"{path} says too little of its network; give the folder of the model, or --init to a recipe")
    if "normalise.mean" not in renamed:
        warnings.warn(f"{path} has no normalisation; images in [0, 1] are taken as they are", Notice, stacklevel=2)
    channels = stem.shape[1]
    mean, std = (_expand(renamed.get(f"normalise.{name}"), value, channels) for name, value in UNCHANGED.items())
    architecture = Architecture(backbone, len(head), channels, 32, mean, std)
    model = architecture.build()
    load(model, path)
    return model.eval(), architecture


def _find_stem(renamed: Weights) -> Tensor | None:
    stem = renamed.get("backbone.stem.weight", renamed.get("backbone.stem.0.weight"))
    return stem if stem is not None and stem.ndim == 4 else None


def _expand(value: Tensor | None, default: float, channels: int) -> tuple[float, ...]:
    values = (default,) if value is None else tuple(value.flatten().tolist())
    return values * channels if len(values) == 1 else values


def _find_backbone(weights: Weights) -> ResNet | PreActResNet | WideResNet | None:
    """Return the backbone that weights with our names belong to, with ReLU; None if there is none of its layout."""
    places = {match.groups() for name in weights if (match := re.match(PLACE, name))}
    counts = tuple(count for _, count in sorted(Counter(stage for stage, _ in places).items()))
    first = "backbone.stages.0.0."
    if (inner := weights.get(first + "residual.0.weight")) is None or not inner.ndim:
        return None
    width, expansion = len(inner), 4 if first + "residual.6.weight" in weights else 1
    depth = next((d for d, (_, blocks, times) in LAYOUTS.items() if (blocks, times) == (counts, expansion)), None)
    options: dict[str, Any] = {"norm": _norm_kind(weights), "activation": "relu"}
    if "backbone.stem.weight" not in weights:
        return None if depth is None else ResNet(depth, width, **options)
    if counts == (2, 2, 2, 2):
        return PreActResNet(width, **options)
    if len(counts) == 3 and len(set(counts)) == 1 and width >= 16:
        return WideResNet(6 * counts[0] + 4, width // 16, **options)
    return None


def _describe_backbone(weights: Weights) -> str:
    """Return the backbone that weights with our names belong to, as command-line options."""
    if (backbone := _find_backbone(weights)) is None:
        return "a network of another kind"
    options = config.describe(backbone)
    names = [name for name in ("depth", "width", "widen", "norm") if name in options]
    return " ".join([f"--backbone {options['kind']}", *(f"--backbone.{name} {options[name]}" for name in names)])


def _norm_kind(weights: Weights) -> str:
    """Return the kind of the norms, judged by the names."""
    if any(".branches." in name for name in weights):
        return "dual"
    if any(name.endswith(".running_mean") for name in weights):
        return "batch"
    return "group" if "backbone.stages.0.0.residual.1.weight" in weights else "none"


def _find_missing_part(renamed: Weights) -> str | None:
    """Return what keeps a network with foreign names from being one of ours, or None."""
    if "backbone.stem.weight" in renamed and not any(name.startswith("backbone.closing.") for name in renamed):
        return "no norm after the last block: it pools what the blocks add up to, ours a norm and an activation of it"
    if "head.weight" in renamed and "head.bias" not in renamed:
        return "no biases in its head: such heads take normalised features, ours takes them as they are"
    if _norm_kind(renamed) in ("group", "none"):
        return "no running statistics of batch norm: what its norms do instead is not in the file"
    return None


def _find_difference(renamed: Weights, model: nn.Module, layout: Layout) -> str | None:
    """Return how a network that fits by names and shapes computes another function, or None."""
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, nn.ReLU | nn.SiLU | nn.LeakyReLU)}
    if kinds != {"ReLU"}:
        theirs, ours = "such networks compute with ReLU", ", ".join(sorted(kinds))
        return f"{theirs}, the model with {ours}; likely fix: --backbone.activation relu"
    if layout is PREACT and _has_bare_shortcuts(renamed):
        return (
            "by its running means its shortcuts take a block's bare input, as in some code bases; "
            "ours take the activated input, as in He et al. (2016b)"
        )
    return None


def _has_bare_shortcuts(w: Weights) -> bool:
    """Return whether running means show that shortcuts take a block's bare input, not its activated input.

    Both kinds have the same names and shapes.  But the running mean of the norm after a block is the mean of its
    residual plus the shortcut's weights times the mean of the shortcut's input.  The mean after an activation is
    predicted as if the norm's output were normal.  In a trained network the errors of the two kinds differ by an order
    of magnitude; the factor of 3 spares a network whose statistics have hardly changed, which tell nothing.
    """
    places = sorted({(int(match[1]), int(match[2])) for name in w if (match := re.match(PLACE, name))})
    blocks = [f"backbone.stages.{stage}.{index}." for stage, index in places]
    after = [*(f"{block}opening.0" for block in blocks[1:]), "backbone.closing.0"]
    bare = activated = 0.0
    for block, following in zip(blocks, after, strict=True):
        if (shortcut := w.get(f"{block}shortcut.weight")) is None:
            continue
        matrix, mean = shortcut.double()[:, :, 0, 0], w[f"{block}opening.0.running_mean"].double()
        residual = w[f"{block}residual.3.weight"].double().sum((2, 3)) @ _mean_activation(w, f"{block}residual.1")
        shortcut_mean = w[f"{following}.running_mean"].double() - residual
        scale = w[f"{following}.running_var"].double()
        bare += ((shortcut_mean - matrix @ mean).square() / scale).mean().item()
        activated_mean = matrix @ _mean_activation(w, f"{block}opening.0")
        activated += ((shortcut_mean - activated_mean).square() / scale).mean().item()
    return 3 * bare < activated


def _mean_activation(w: Weights, norm: str) -> Tensor:
    """Return ``E relu(n)`` per channel; the norm's bias and weight are the normal n's mean and standard deviation."""
    mean, deviation = w[f"{norm}.bias"].double(), w[f"{norm}.weight"].double().abs().clamp_min(1e-12)
    z = mean / deviation
    return mean * torch.special.ndtr(z) + deviation * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
