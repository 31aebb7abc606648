"""Conversion between plain data and method objects, and the table of their names.

A method object is a frozen dataclass of plain data (numbers, strings, None, tuples, other method objects), without
functions or tensors.  So :func:`describe` returns its fields, :func:`build` calls its constructor, and each is the
inverse of the other.  Names are used only in YAML files and on the command line.
"""

import dataclasses
import importlib
import math
import re
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, cast

import yaml

from advebm.core.errors import UserError, suggest, unknown_name

# Plain strings, so that listing the names imports no module.  A role is the lower-case name of the protocol or base
# class that annotates such a field.  A class that is not in the table is written "package.module:Class".
KINDS: dict[str, dict[str, str]] = {
    "source": {
        "digits": "advebm.data.sources:Digits",
        "mnist-5k": "advebm.data.sources:Mnist5k",
        "cifar10": "advebm.data.readers:Cifar10",
        "cifar100": "advebm.data.readers:Cifar100",
        "folder": "advebm.data.folders:Folder",
        "npz": "advebm.data.npz:Npz",
        "hf": "advebm.data.readers:HubImages",
        "part": "advebm.data.sources:Part",
        "unlabelled": "advebm.data.sources:Unlabelled",
        "classes": "advebm.data.sources:Classes",
        "patches": "advebm.data.negatives:Patches",
        "noise": "advebm.data.negatives:NoiseImages",
        "gaussians": "advebm.data.negatives:GaussianImages",
        "low-resolution": "advebm.data.negatives:LowResolution",
        "mixture": "advebm.data.negatives:Mixture",
        "published": "advebm.models.excerpt:Published",
    },
    "backbone": {
        "small-conv": "advebm.models.small:SmallConv",
        "resnet": "advebm.models.resnet:ResNet",
        "preact-resnet": "advebm.models.resnet:PreActResNet",
        "wide-resnet": "advebm.models.wide_resnet:WideResNet",
        "stargan": "advebm.models.stargan:StarGAN",
        "timm": "advebm.models.zoo.timm:Timm",
        "transformers": "advebm.models.zoo.transformers:Transformers",
        "robustbench": "advebm.models.zoo.robustbench:RobustBench",
        "own": "advebm.models.factory:Own",
    },
    "objective": {
        "standard": "advebm.objectives.standard:Standard",
        "noise": "advebm.objectives.standard:NoiseInjection",
        "at": "advebm.objectives.at:AT",
        "fast": "advebm.objectives.fast:FAST",
        "n-fgsm": "advebm.objectives.fast:NFGSM",
        "fgsm-ep": "advebm.objectives.fast:FGSMEP",
        "free": "advebm.objectives.free:FREE",
        "trades": "advebm.objectives.trades:TRADES",
        "weat": "advebm.objectives.trades:WEAT",
        "awp": "advebm.objectives.awp:AWP",
        "sam": "advebm.objectives.awp:SAM",
        "cutmix": "advebm.objectives.cutmix:CutMix",
        "rst": "advebm.objectives.rst:RST",
        "oe": "advebm.objectives.outlier:OE",
        "ratio": "advebm.objectives.outlier:RATIO",
        "gat": "advebm.objectives.gat:GAT",
        "dat": "advebm.objectives.dat:DAT",
        "prejeat": "advebm.objectives.at:PreJEAT",
        "jeat": "advebm.objectives.langevin:JEAT",
        "jem": "advebm.objectives.langevin:JEM",
        "mle": "advebm.objectives.langevin:MLE",
        "binary-at": "advebm.objectives.binary:BinaryAT",
        "binary-mle": "advebm.objectives.binary:BinaryMLE",
        "infonce": "advebm.objectives.contrastive:InfoNCE",
        "adversarial-infonce": "advebm.objectives.contrastive:AdversarialInfoNCE",
        "acl": "advebm.objectives.contrastive:ACL",
    },
    "optimizer": {
        "sgd": "advebm.runs.optim:SGD",
        "adam": "advebm.runs.optim:Adam",
        "lars": "advebm.runs.optim:LARS",
        "muon": "advebm.runs.optim:Muon",
        "lookahead": "advebm.runs.optim:Lookahead",
    },
    "schedule": {
        "cosine": "advebm.runs.optim:Cosine",
        "cyclic": "advebm.runs.optim:Cyclic",
        "steps": "advebm.runs.optim:Steps",
    },
    "sampler": {
        "ta": "advebm.samplers.classifier:TA",
        "cs": "advebm.samplers.classifier:CS",
        "rcs": "advebm.samplers.classifier:RCS",
        "langevin": "advebm.samplers.classifier:Langevin",
        "jeat-16": "advebm.samplers.classifier:JEAT16",
        "jeat-17": "advebm.samplers.classifier:JEAT17",
        "sgld": "advebm.samplers.classifier:SGLD",
        "ascent": "advebm.samplers.critic:Ascent",
        "np-langevin": "advebm.samplers.encoder:NPLangevin",
        "np-pgd": "advebm.samplers.encoder:NPPGD",
        "maxent": "advebm.samplers.encoder:MaxEnt",
    },
    "edit": {
        "translate": "advebm.edits.transform:Translate",
        "inpaint": "advebm.edits.restore:Inpaint",
        "paint": "advebm.edits.transform:Paint",
        "denoise": "advebm.edits.restore:Denoise",
        "upsample": "advebm.edits.restore:Upsample",
        "compose": "advebm.edits.transform:Compose",
        "interpolate": "advebm.edits.transform:Interpolate",
        "counterfactual": "advebm.edits.transform:Counterfactual",
    },
    "adversary": {
        "pgd": "advebm.attacks.projected:Attack",
        "apgd": "advebm.attacks.apgd:APGD",
        "fab": "advebm.attacks.fab:FAB",
        "square": "advebm.attacks.square:Square",
        "cw": "advebm.attacks.cw:CW",
        "autoattack": "advebm.attacks.autoattack:AutoAttack",
    },
    "metric": {
        "accuracy": "advebm.metrics.robustness:Accuracy",
        "robust-accuracy": "advebm.metrics.robustness:RobustAccuracy",
        "targeted-accuracy": "advebm.metrics.robustness:TargetedAccuracy",
        "robustness-curve": "advebm.metrics.robustness:RobustnessCurve",
        "sample-quality": "advebm.metrics.quality:SampleQuality",
        "energies": "advebm.metrics.energy:Energies",
        "ood": "advebm.metrics.ood:OutOfDistribution",
        "detectors": "advebm.metrics.detectors:Detectors",
        "calibration": "advebm.metrics.calibration:Calibration",
        "corruption-accuracy": "advebm.metrics.corruption:CorruptionAccuracy",
        "linear-probe": "advebm.metrics.probing:LinearProbe",
        "knn": "advebm.metrics.probing:NearestNeighbours",
        "restoration": "advebm.metrics.restoration:Restoration",
        "counterfactuals": "advebm.metrics.restoration:Counterfactuals",
    },
    "space": {
        "inception": "advebm.metrics.spaces:InceptionFeatures",
        "pixels": "advebm.metrics.spaces:Pixels",
    },
    "score": {
        "energy": "advebm.metrics.ood:EnergyScore",
        "max-softmax": "advebm.metrics.ood:MaxSoftmax",
        "max-logit": "advebm.metrics.ood:MaxLogit",
        "odin": "advebm.metrics.ood:ODIN",
    },
}
KINDS["outlier"] = {  # noises and all sources
    "uniform": "advebm.data.ood_sets:UniformNoise",
    "gaussian": "advebm.data.ood_sets:GaussianNoise",
    "class-gaussian": "advebm.data.ood_sets:ClassGaussianNoise",
    **KINDS["source"],
}


def build(data: Any, role: str, *, where: str = "", foreign: bool = True) -> Any:
    """Construct a method object: ``build({"kind": "at", "attack": {"eps": "8/255"}}, "objective")`` -> ``AT(...)``.

    Args:
        data: a mapping with a ``kind``, or a kind alone.
        role: the key of :data:`KINDS` under which the kind is looked up.
        where: dotted path of the block, for error messages.
        foreign: whether a kind may be ``package.module:Class``, which imports that module.  Use False for
            configurations from other people.

    Raises:
        UserError: an unknown kind or option, or a value of the wrong type.
    """
    where = where or role
    if isinstance(data, str):
        data = short(data, role)
    if not isinstance(data, Mapping):
        raise UserError(f"{where} takes a block of options with a kind, got {data!r}")
    if "kind" not in data:
        raise UserError(f"{where} has no kind; there is {', '.join(sorted(KINDS[role]))}")
    if isinstance(data["kind"], str):
        data = {**short(data["kind"], role), **{k: v for k, v in data.items() if k != "kind"}}
    cls = lookup(role, data["kind"], foreign=foreign)
    if not foreign and getattr(cls, "imports", False):
        raise UserError(f"{where} {data['kind']!r} would import foreign code, which a model from elsewhere may not")
    return construct(cls, {k: v for k, v in data.items() if k != "kind"}, where=where, foreign=foreign)


def short(text: str, role: str) -> dict[str, str]:
    """Expand a kind, or a kind and its first option: ``folder:PATH`` -> ``{"kind": "folder", "path": "PATH"}``."""
    kind, colon, value = text.partition(":")
    return {"kind": kind, first_option(role, kind): value} if colon and kind in KINDS[role] else {"kind": text}


def first_option(role: str, kind: str) -> str:
    """Return the name of a kind's first option, which may be written behind a colon."""
    return next((f.name for f in dataclasses.fields(lookup(role, kind))), "path")


def read_options(text: str, role: str, kind: str) -> dict[str, Any]:
    """Read options such as ``depth=28,widen=10,mean=[0.5,0.5,0.5]``; the first one's name may be left out.

    Raises:
        UserError: the text is not of this form, or a value is no YAML.
    """
    words = [word for word in re.split(r",(?![^\[]*\])", text) if word]
    options = {}
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not equals and position:
            raise UserError(f"{kind}:{text} takes OPTION=VALUE between commas, got {word!r}")
        try:
            options[name if equals else first_option(role, kind)] = yaml.safe_load(value) if equals else word
        except yaml.YAMLError:
            raise UserError(f"{kind}:{text}: {name} takes a number, a word or a list [1,2], got {value!r}") from None
    return options


def describe(thing: Any, hint: Any = None) -> Any:
    """Return an object's plain data, to be stored: the inverse of :func:`build` and :func:`construct`."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        hints = typing.get_type_hints(type(thing))
        plain = {f.name: describe(getattr(thing, f.name), hints[f.name]) for f in dataclasses.fields(thing) if f.init}
        path = f"{type(thing).__module__}:{type(thing).__qualname__}"
        kind = next((kind for kinds in KINDS.values() for kind, target in kinds.items() if target == path), None)
        if hint is not None:  # a field annotated with a concrete class needs no kind
            kind = None if role_of(hint) is None else kind or path
        return plain if kind is None else {"kind": kind, **plain}
    if isinstance(thing, tuple | list):
        inner = typing.get_args(hint)[:1] or (None,)
        return [describe(item, inner[0]) for item in thing]
    return thing


def role_of(hint: Any) -> str | None:
    """Return the key of :data:`KINDS` that an annotation names, else None: ``Objective`` -> ``"objective"``."""
    for part in (hint, *typing.get_args(hint)):
        if (name := getattr(part, "__name__", "").lower()) in KINDS:
            return name
    return None


def lookup(role: str, kind: Any, *, foreign: bool = True) -> type:
    """Return the class of a kind, which is an entry of :data:`KINDS` or ``package.module:Class``."""
    target = KINDS[role].get(kind) if isinstance(kind, str) else None
    if target is None:
        if not (isinstance(kind, str) and ":" in kind):
            raise unknown_name(role, kind, KINDS[role])
        if not foreign:
            raise UserError(f"{role} {kind!r} would import foreign code; only {', '.join(KINDS[role])} may stand here")
        target = kind
    module, _, name = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{role} {kind!r} cannot be imported: {error}") from error
    if not dataclasses.is_dataclass(cls):
        raise UserError(f"{role} {kind!r} is not a dataclass; a method is a frozen dataclass of plain data")
    return cast(type, cls)


def check_choices(thing: Any) -> None:
    """Raise UserError if a field's value is not in its ``Literal`` annotation; to be called in ``__post_init__``."""
    for name, hint in typing.get_type_hints(type(thing)).items():
        if typing.get_origin(hint) is typing.Literal:
            _convert(getattr(thing, name), hint, name, True)


def construct(cls: type, options: Mapping[str, Any], *, where: str = "", foreign: bool = True) -> Any:
    """Call a dataclass with plain data, converted according to its annotations.

    Raises:
        UserError: an unknown or missing option, a value of the wrong type, or a value that ``__post_init__`` refuses.
    """
    where = where or cls.__name__
    if not isinstance(options, Mapping):
        raise UserError(f"{where} takes a block of options, got {options!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in options:
        if key not in fields:
            raise UserError(
                f"{where} has no option {key!r}{suggest(key, fields)}; it takes {', '.join(fields) or 'none'}"
            )
    for name, f in fields.items():
        if name not in options and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} needs {name!r}")
    values = {k: _convert(v, hints[k], f"{where}.{k}", foreign) for k, v in options.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def override(data: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """Return a changed copy: ``override(describe(recipe), "objective.attack.eps", "8/255")``.

    Pass the output of :func:`describe`, not a recipe's text, because it contains every default.  List items are
    addressed by their index, from 0.
    """
    return _override(data, dotted.split("."), value, dotted)


def _override(data: Any, path: list[str], value: Any, dotted: str) -> Any:
    head, *rest = path
    if isinstance(data, list):
        if not head.isdigit() or int(head) >= len(data):
            raise UserError(f"--{dotted}: {head!r} is not an item of a list of {len(data)}; items count from 0")
        changed = _override(data[int(head)], rest, value, dotted) if rest else value
        return [changed if i == int(head) else item for i, item in enumerate(data)]
    if not isinstance(data, Mapping):
        raise UserError(
            f"--{dotted}: there is nothing below {data!r} to set {head!r} in; give the whole block in a --config file"
        )
    if head not in data:
        raise UserError(f"no option --{dotted}: {head!r} is unknown{suggest(head, data)}; there is {', '.join(data)}")
    return {**data, head: _override(data[head], rest, value, dotted) if rest else value}


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``old`` updated with ``new``: blocks of the same kind option by option, others as a whole."""
    merged = {**old, **new}
    for name, block in new.items():
        old_block = old.get(name)
        if isinstance(block, Mapping) and isinstance(old_block, Mapping):
            same_kind = "kind" not in block or block["kind"] == old_block.get("kind")
            merged[name] = {**old_block, **block} if same_kind else block
    return merged


def switch(data: Mapping[str, Any], role: str, kind: str) -> dict[str, Any]:
    """Return a block with another kind: options that both kinds have keep their value, the others are dropped.

    ``switch({"kind": "at", "attack": {"eps": 1}}, "objective", "standard")`` -> ``{"kind": "standard"}``.  If the class
    of an inner block lists ``carried`` options, only those keep their value and the rest become the new kind's
    defaults: another method's attack gets the same radius, but not the same steps.  A kind that wraps another one of
    its role, as ``awp`` wraps ``at``, gets the old block as its inner one.  Options that either kind lists as its
    ``own`` are not kept: a step size for raw gradients does not suit unit gradients.
    """
    block = short(kind, role)
    cls = lookup(role, block["kind"])
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    kinds = (cls, lookup(role, data["kind"])) if "kind" in data else (cls,)
    own = {name for kind in kinds for name in getattr(kind, "own", ())} if len(set(kinds)) == 2 else set()
    if role in fields and data and role not in data:
        return {**block, role: dict(data)}
    options = {}
    for name, value in data.items():
        if name in fields and name != "kind" and name not in own:
            carried = getattr(fields[name].default, "carried", None)
            if isinstance(value, Mapping) and carried:
                defaults = describe(fields[name].default, type(fields[name].default))
                value = defaults | {k: v for k, v in value.items() if k in carried}
            options[name] = value
    return {**options, **block}


def _convert(value: Any, hint: Any, where: str, foreign: bool) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in args:
                return None
            raise UserError(f"{where} may not be empty")
        return _convert(value, next(a for a in args if a is not type(None)), where, foreign)
    if origin is typing.Literal:
        if value is False and "off" in args:
            return "off"  # YAML reads a bare off as False
        if value not in args:
            raise UserError(f"{where} is one of {', '.join(map(str, args))}, got {value!r}{suggest(value, args)}")
        return value
    if origin is tuple:
        if isinstance(value, str) and args[0] is str and not value.startswith("["):
            value = [part.strip() for part in value.split(",") if part.strip()]  # 7 and no may be names
        if isinstance(value, str):
            try:
                value = yaml.safe_load(value if value.startswith("[") else f"[{value}]")
            except yaml.YAMLError:
                raise UserError(f"{where} takes a list such as 1,2,3, got {value!r}") from None
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} takes a list, got {value!r}")
        return tuple(_convert(v, args[0], f"{where}.{i}", foreign) for i, v in enumerate(value))
    if (role := role_of(hint)) is not None:
        is_built = dataclasses.is_dataclass(value) and not isinstance(value, type)
        return value if is_built else build(value, role, where=where, foreign=foreign)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return construct(cast(type, hint), value, where=where, foreign=foreign)
        if not isinstance(value, cast(type, hint)):
            raise UserError(f"{where} takes a block of options, got {value!r}")
        return value
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is bool:
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "false", "no", "off"):
            return value.lower() in ("true", "yes", "on")
        if not isinstance(value, bool):
            raise UserError(f"{where} is true or false, got {value!r}")
        return value
    if hint in (float, int):
        what = "a number or a fraction such as 8/255" if hint is float else "a whole number"
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{where} takes {what}, got {value!r}")
        try:
            number = _fraction(value) if isinstance(value, str) else value
            if not math.isfinite(number) or (hint is int and number != int(number)):
                raise ValueError
            return hint(number)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise UserError(f"{where} takes {what}, got {value!r}") from None
    if hint is str and not isinstance(value, str):
        raise UserError(f"{where} takes text, got {value!r}")
    return value


def _fraction(text: str) -> Fraction:
    """Parse a number or a fraction: attack radii are usually given as ``8/255``, step sizes as ``2.5/255``."""
    above, slash, below = text.partition("/")
    return Fraction(above) / Fraction(below) if slash else Fraction(above)
