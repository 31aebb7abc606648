"""The key of a record: what it is about, in parts that code can compare; its name is for people.

Keys are read from names and settings, so that ``metrics.json`` has neither changed nor grown.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from advebm.core import config

INCEPTION = "inception"  # the one space in which some quantities have names of their own
NAMES = {"FD": "FID", "KID": "KID", "class score": "IS"}  # what these are called there
IN_FEATURES = ("precision", "recall", "density", "coverage", "intended class", "counterfactual named so", *NAMES)


class Attacked(NamedTuple):
    """An attack that images were under.

    Attributes:
        kind: ``PGD``, ``FGSM``, ``energy attack``, ``C&W-PGD``, ``APGD``, ``FAB``, ``Square``, ``C&W``, ``AutoAttack``;
            ``targeted`` before it where it went towards classes.
        steps: of a run; None where it has no such number.
        text: as tables write it, ``PGD-20 l2 0.75``.
        part: where an attack is a row of attacks, the last of them that was run; None where all were.
    """

    kind: str
    steps: int | None
    text: str
    part: str | None = None


class Key(NamedTuple):
    """What a record is about.

    Attributes:
        quantity: ``accuracy``, ``AUROC``, ``FD``, ``class score``, ``E(x)``, ``PSNR`` and so on.
        attack: that the images were under; None where they were not attacked.
        samples: the set of samples that was measured; None where it was not samples.
        space: the feature space; None where there is none.
        set: the images measured on, where they are not the data's: outliers, corrupted ones, a task of restoration.
        by: what gave the answer, where it was not the model itself: a detection score, a probe, a way to restore.
    """

    quantity: str
    attack: Attacked | None = None
    samples: str | None = None
    space: str | None = None
    set: str | None = None
    by: str | None = None

    @property
    def is_share(self) -> bool:
        """Whether people read it in percent."""
        return self.quantity.startswith(("accuracy", "intended class"))


def label(quantity: str, space: str) -> str:
    """What a quantity is called in a feature space: FID, KID and IS are Inception's, elsewhere the space is named."""
    return NAMES[quantity] if space == INCEPTION and quantity in NAMES else f"{quantity} ({space})"


def key_of(record: Mapping[str, Any]) -> Key:
    """The key of a record, as a metric gives it or as ``metrics.json`` keeps it.

    A record of no form that is known here, such as one of a metric of one's own, has its whole name as the quantity.
    """
    name, settings = record["name"], record["settings"]
    samples, attack = _text(settings.get("samples")), _attacked(name, settings)
    if (measured := _in_features(name)) is not None:
        quantity, space = measured
        return Key(quantity, attack, samples, space)
    outliers, score, way = (_text(settings.get(field)) for field in ("outliers", "score", "way"))
    if outliers and score and f" vs {outliers}" in name:
        return Key(name.partition(" ")[0], attack, samples, set=outliers, by=score)
    if way and name.endswith(f" by {way}"):
        quantity, _, task = name.removesuffix(f" by {way}").partition(" ")
        return Key(quantity, set=task, by=way)
    if "corruption" in settings and name.startswith("accuracy under "):
        return Key("accuracy", set=name.removeprefix("accuracy under "))
    if name.startswith("E(x) of "):
        kind, _, which = (of := name.removeprefix("E(x) of ")).partition(" ")
        return Key("E(x)", samples=which) if kind == "samples" else Key("E(x)", set=of)
    quantity = name
    if attack is not None:
        whole = attack.text + (f", after {attack.part}" if attack.part else "")
        quantity = name.removesuffix(f" under {whole}").removesuffix(f", {whole}")
    if quantity.startswith("accuracy of "):
        return Key("accuracy", attack, samples, by=quantity.removeprefix("accuracy of "))
    return Key(quantity, attack, samples)


def key_of_attack(attack: Any, *, targeted: bool = False) -> Attacked:
    """The key of an attack of :mod:`advebm.attacks`; or of the same towards classes, as ``targeted-accuracy`` does."""
    plain, words = config.describe(attack), "targeted " * targeted
    return Attacked(words + _kind(plain), _steps(plain), words + attack.name)


def matches(key: Key, wanted: Mapping[str, Any]) -> bool:
    """Whether a key is what a table asks for.

    Args:
        key: of a record.
        wanted: ``quantity``; ``attack``, its kind, without which the images were not attacked; ``steps`` of the attack,
            or ``least_steps``; ``set``, whatever scored it, without which it is the model itself on the data's images;
            ``space``, any if it is left out.
    """
    attack = key.attack
    if key.quantity != wanted["quantity"] or (attack and attack.kind) != wanted.get("attack"):
        return False
    if attack is not None and (attack.part is not None or not _many_enough(attack.steps, wanted)):
        return False
    if key.set != wanted.get("set") or (key.set is None and key.by is not None):
        return False
    return wanted.get("space", key.space) == key.space


def first_match(records: Iterable[Mapping[str, Any]], wanted: Iterable[Mapping[str, Any]]) -> Any:
    """The first record that is what a table asks for, the best pattern first; None without any."""
    keyed = [(key_of(record), record) for record in records]
    return next((r for pattern in wanted for k, r in keyed if matches(k, pattern)), None)


def _in_features(name: str) -> tuple[str, str] | None:
    """The quantity and the space of a name that :func:`label` made; records of comparisons have no settings."""
    inception = next((quantity for quantity, shown in NAMES.items() if shown == name), None)
    if inception is not None:
        return inception, INCEPTION
    quantity, _, space = name.partition(" (")
    return (quantity, space.removesuffix(")")) if quantity in IN_FEATURES else None


def _many_enough(steps: int | None, wanted: Mapping[str, Any]) -> bool:
    return wanted.get("steps", steps) == steps and wanted.get("least_steps", 0) <= (steps or 0)


def _text(value: Any) -> str | None:
    """A setting that is text; metrics of one's own may keep anything under these names."""
    return value if isinstance(value, str) else None


def _attacked(name: str, settings: Mapping[str, Any]) -> Attacked | None:
    """From the description of an attack, or from the words of detection's search."""
    plain = settings.get("attack")
    if isinstance(plain, str):  # Auto-PGD on a score
        metric = settings.get("metric")
        return Attacked("APGD", _steps(metric) if isinstance(metric, Mapping) else None, plain)
    if not isinstance(plain, Mapping):
        return None
    text, part = name.partition(" under ")[2], _text(settings.get("part"))
    targeted = "targeted " * bool(settings.get("targeted"))
    return Attacked(targeted + _kind(plain), _steps(plain), text.removesuffix(f", after {part}"), part)


def _steps(plain: Mapping[str, Any]) -> int | None:
    steps = plain.get("steps")
    return steps if isinstance(steps, int) else None


def _kind(plain: Mapping[str, Any]) -> str:
    """The word of an attack's kind; ``other`` of attacks of one's own."""
    words = {"apgd": "APGD", "fab": "FAB", "square": "Square", "cw": "C&W", "autoattack": "AutoAttack"}
    if not (plain.get("kind") == "pgd" or ("kind" not in plain and {"loss", "start"} <= plain.keys())):
        return words.get(str(plain.get("kind")), "other")
    kind = {"energy": "energy attack", "margin": "C&W-PGD"}.get(plain.get("loss", ""), "PGD")
    return "FGSM" if kind == "PGD" and plain.get("start") == "clean" and plain.get("steps") == 1 else kind
