"""Keys of records: what a record measures, in fields that code can compare (a record's name is for people).

A key is parsed from a record's name and settings; ``metrics.json`` does not store it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from advebm.core import config

INCEPTION = "inception"  # the feature space in which some quantities have other names
INCEPTION_NAMES = {"FD": "FID", "KID": "KID", "class score": "IS"}  # quantity -> its name in Inception features
FEATURE_QUANTITIES = (
    "precision",
    "recall",
    "density",
    "coverage",
    "intended class",
    "counterfactual named so",
    *INCEPTION_NAMES,
)


class AttackKey(NamedTuple):
    """The attack that the measured images were under.

    Attributes:
        kind: ``PGD``, ``FGSM``, ``energy attack``, ``C&W-PGD``, ``APGD``, ``FAB``, ``Square``, ``C&W``, ``AutoAttack``;
            ``other`` for a user-defined attack; prefixed by ``targeted`` for a targeted attack.
        steps: steps of each run of the attack.  None: it has no such setting.
        text: name in tables, such as ``PGD-20 l2 0.75``.
        part: for an attack made of several, such as AutoAttack, the last one that was run.  None: all were run.
    """

    kind: str
    steps: int | None
    text: str
    part: str | None = None


class Key(NamedTuple):
    """What a record measures.

    Attributes:
        quantity: ``accuracy``, ``AUROC``, ``FD``, ``class score``, ``E(x)``, ``PSNR`` and so on.
        attack: None: the images were not attacked.
        samples: name of the measured set of samples.  None: not a measurement of samples.
        space: name of the feature space.  None: the quantity needs none.
        set: a set of outliers, a corruption, a restoration task, or (of ``E(x)``) ``test images`` or ``uniform noise``.
        by: detection score, probe or restoration method that gave the answer.  None: the model's own predictions.
    """

    quantity: str
    attack: AttackKey | None = None
    samples: str | None = None
    space: str | None = None
    set: str | None = None
    by: str | None = None

    @property
    def is_share(self) -> bool:
        """Whether tables show the quantity in percent."""
        return self.quantity.startswith(("accuracy", "intended class"))


def label(quantity: str, space: str) -> str:
    """Return a quantity's name in a feature space: FID, KID, IS for Inception, otherwise ending in the space's name."""
    return INCEPTION_NAMES[quantity] if space == INCEPTION and quantity in INCEPTION_NAMES else f"{quantity} ({space})"


def key_of(record: Mapping[str, Any]) -> Key:
    """Return the key of a record given as a dict, as ``metrics.json`` stores it.

    A record of unknown form, such as one of a user-defined metric, has its whole name as the quantity.
    """
    name, settings = record["name"], record["settings"]
    samples, attack = _text(settings.get("samples")), _parse_attack(name, settings)
    if (quantity_and_space := _parse_feature_name(name)) is not None:
        quantity, space = quantity_and_space
        return Key(quantity, attack, samples, space)
    outliers, score, method = (_text(settings.get(field)) for field in ("outliers", "score", "way"))
    if outliers and score and f" vs {outliers}" in name:
        return Key(name.partition(" ")[0], attack, samples, set=outliers, by=score)
    if method and name.endswith(f" by {method}"):
        quantity, _, task = name.removesuffix(f" by {method}").partition(" ")
        return Key(quantity, set=task, by=method)
    if "corruption" in settings and name.startswith("accuracy under "):
        return Key("accuracy", set=name.removeprefix("accuracy under "))
    if name.startswith("E(x) of "):
        images = name.removeprefix("E(x) of ")
        if images.startswith("samples "):
            return Key("E(x)", samples=images.removeprefix("samples "))
        return Key("E(x)", set=images)
    quantity = name
    if attack is not None:
        text = attack.text + (f", after {attack.part}" if attack.part else "")
        quantity = name.removesuffix(f" under {text}").removesuffix(f", {text}")
    if quantity.startswith("accuracy of "):
        return Key("accuracy", attack, samples, by=quantity.removeprefix("accuracy of "))
    return Key(quantity, attack, samples)


def attack_key(attack: Any, *, targeted: bool = False) -> AttackKey:
    """Return the ``attack`` field of a key; ``targeted``: of the targeted version that ``targeted-accuracy`` runs."""
    spec, prefix = config.describe(attack), "targeted " * targeted
    return AttackKey(prefix + _kind(spec), _steps(spec), prefix + attack.name)


def matches(key: Key, wanted: Mapping[str, Any]) -> bool:
    """Return whether a record's key fits a table's pattern.  Records after only a part of an attack never do.

    Args:
        wanted: the pattern, with ``quantity`` and optionally ``attack``, its kind (without it: clean images only);
            ``steps`` or ``least_steps``, the exact or minimum number of attack steps; ``set``, by any score or method
            (without it: keys with neither ``set`` nor ``by``); ``space``, the feature space (without it: any).
    """
    attack = key.attack
    if key.quantity != wanted["quantity"] or (attack and attack.kind) != wanted.get("attack"):
        return False
    if attack is not None and (attack.part is not None or not _steps_fit(attack.steps, wanted)):
        return False
    if key.set != wanted.get("set") or (key.set is None and key.by is not None):
        return False
    return wanted.get("space", key.space) == key.space


def first_match(records: Iterable[Mapping[str, Any]], patterns: Iterable[Mapping[str, Any]]) -> Any:
    """Return the first record that matches the first pattern that any record matches.  None: no match."""
    keyed = [(key_of(record), record) for record in records]
    return next((r for pattern in patterns for k, r in keyed if matches(k, pattern)), None)


def _parse_feature_name(name: str) -> tuple[str, str] | None:
    """Parse quantity and space from a name that :func:`label` made: comparisons of samplers drop the settings."""
    for quantity, inception_name in INCEPTION_NAMES.items():
        if inception_name == name:
            return quantity, INCEPTION
    quantity, _, space = name.partition(" (")
    return (quantity, space.removesuffix(")")) if quantity in FEATURE_QUANTITIES else None


def _steps_fit(steps: int | None, wanted: Mapping[str, Any]) -> bool:
    return wanted.get("steps", steps) == steps and wanted.get("least_steps", 0) <= (steps or 0)


def _text(value: Any) -> str | None:
    """Return a setting if it is text, else None: user-defined metrics may store anything under these names."""
    return value if isinstance(value, str) else None


def _parse_attack(name: str, settings: Mapping[str, Any]) -> AttackKey | None:
    """Return the attack from its stored description, or from the name that detection metrics store instead."""
    spec = settings.get("attack")
    if isinstance(spec, str):  # detection metrics: Auto-PGD on a score
        metric = settings.get("metric")
        return AttackKey("APGD", _steps(metric) if isinstance(metric, Mapping) else None, spec)
    if not isinstance(spec, Mapping):
        return None
    text, part = name.partition(" under ")[2], _text(settings.get("part"))
    targeted = "targeted " * bool(settings.get("targeted"))
    return AttackKey(targeted + _kind(spec), _steps(spec), text.removesuffix(f", after {part}"), part)


def _steps(spec: Mapping[str, Any]) -> int | None:
    steps = spec.get("steps")
    return steps if isinstance(steps, int) else None


def _kind(spec: Mapping[str, Any]) -> str:
    """Return the kind of an attack, without ``targeted``; ``other`` for user-defined attacks."""
    names = {"apgd": "APGD", "fab": "FAB", "square": "Square", "cw": "C&W", "autoattack": "AutoAttack"}
    if not (spec.get("kind") == "pgd" or ("kind" not in spec and {"loss", "start"} <= spec.keys())):
        return names.get(str(spec.get("kind")), "other")
    kind = {"energy": "energy attack", "margin": "C&W-PGD"}.get(spec.get("loss", ""), "PGD")
    return "FGSM" if kind == "PGD" and spec.get("start") == "clean" and spec.get("steps") == 1 else kind
