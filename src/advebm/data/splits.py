"""From what a source holds to training, validation and test images: the usual names, and what is missing."""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advebm.core.errors import UserError
from advebm.data.disk import Shard
from advebm.data.sources import UNLABELLED, Data, Images, gather, partition

NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst", "eval"),
}  # what people call the splits, in any case

Parts = dict[str, list[Images | Shard]]  # the shards of each split


AROUND = {"set", "data", "dataset", "images", "imgs", "img", "split", "seg", "folder"}  # words beside, as in train_set


def split_name(text: str) -> str | None:
    """Return ``train``, ``val`` or ``test`` for a usual name of that split, such as ``Valid`` or ``train_set``."""
    words = [word for word in re.split(r"[^a-z]+", text.lower()) if word and word not in AROUND]
    if len(words) != 1:
        return None
    return next((split for split, names in NAMES.items() if words[0] in names), None)


def find_splits(names: Iterable[str], where: object) -> dict[str, str]:
    """Return which of ``names`` is which split, such as ``{"train": "Train", "val": "validation"}``.

    Raises:
        UserError: two names stand for one split.
    """
    splits: dict[str, str] = {}
    for name in names:
        if (split := split_name(name)) is None:
            continue
        if split in splits:
            raise UserError(f"{where} has {splits[split]} and {name}, which both mean {split}; rename or remove one")
        splits[split] = name
    return splits


class Shares(NamedTuple):
    """The shares of a set that are cut off for validation and test where the source has no such split."""

    val: float
    test: float
    seed: int


def assemble(name: str, parts: Parts, classes: Sequence[str], shares: Shares, *, fixed: bool = False) -> Data:
    """Return the data of a source that has training images and perhaps others.

    Splits that the source has are used as they are.  With validation but no test images, as in ImageNet's layout, the
    validation images become the test images.  What is missing then is cut from the training images.

    Args:
        name: of the data, also in messages.
        parts: shards of ``train`` and, if there are any, of ``val`` and ``test``; labels count from 0, and images with
            the label -1 have none.  The lists are emptied.
        classes: names of the classes; empty: the labels themselves.
        shares: what is cut off, where it has to be.
        fixed: whether all ``classes`` stay, also those that no training image has.

    Raises:
        UserError: images of several shapes, fewer than two classes, labels without a name, a split with labels that the
            training images have not, or images too few to be split.
    """
    shapes = sorted({shard.shape for shards in parts.values() for shard in shards})
    if len(shapes) > 1:
        raise UserError(f"{name}: the images of all splits have one shape, got {' and '.join(map(str, shapes))}")
    labels = {split: torch.cat([shard.y for shard in shards]) for split, shards in parts.items()}
    if not bool((labels["train"] < 0).all()):
        for split in [split for split, y in labels.items() if bool((y < 0).all())]:  # the test images of a competition
            warnings.warn(f"{name}: the {split} images have no labels; left out", stacklevel=3)
            del parts[split], labels[split]
    named, kept = _choose_classes(name, labels, classes, fixed)
    if named != UNLABELLED:
        there = torch.tensor(kept)
        for shards in parts.values():
            shards[:] = [replace(shard, y=torch.searchsorted(there, shard.y)) for shard in shards]
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    if "test" not in parts:
        test, val, train = partition(parts["train"], len(named), (shares.test, shares.val), shares.seed)
        return Data(name, named, train, val, test)
    test = _join(parts["test"])
    if "val" in parts:
        return Data(name, named, _join(parts["train"]), _join(parts["val"]), test)
    val, train = partition(parts["train"], len(named), (shares.val,), shares.seed)
    return Data(name, named, train, val, test)


def _join(shards: list[Images | Shard]) -> Images:
    return gather(shards, torch.arange(sum(map(len, shards))))[0]


def _choose_classes(
    name: str, labels: dict[str, Tensor], classes: Sequence[str], fixed: bool
) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the classes that training images have, and their labels in ascending order."""
    y = labels["train"]
    if bool((y < 0).all()):
        return UNLABELLED, []
    for split, values in labels.items():
        if without := int((values < 0).sum()):
            raise UserError(f"{name}: {without} of {len(values)} {split} images have no label (or -1)")
    kept = list(range(len(classes))) if fixed else y.unique().tolist()
    largest = max(int(values.max()) for values in labels.values())
    if classes and largest >= len(classes):
        raise UserError(f"{name} has labels up to {largest}, but {len(classes)} class names")
    name_of = lambda k: classes[k] if classes else str(k)
    if len(kept) < 2:
        raise UserError(
            f"all training images of {name} are of the class {name_of(kept[0])}; a classifier needs at least 2"
        )
    if classes and (empty := [n for k, n in enumerate(classes) if k not in set(kept)]):
        warnings.warn(f"{name}: classes without training images are left out: {list_some(empty)}", stacklevel=4)
    for split, values in labels.items():
        if unknown := sorted(set(values.unique().tolist()) - set(kept)):
            raise UserError(
                f"{name} has {split} images of {list_some([name_of(k) for k in unknown])}, but no such training images"
            )
        if not fixed and (missing := [name_of(k) for k in sorted(set(kept) - set(values.unique().tolist()))]):
            warnings.warn(f"{name}: there are no {split} images of {list_some(missing)}", stacklevel=4)
    return tuple(name_of(k) for k in kept), kept


def number_labels(
    values: Sequence[Any], where: object, known: Sequence[str] = ()
) -> tuple[list[int | None], tuple[str, ...]]:
    """Return the numbers of labels as they stand in a table, None where there is none, and the names of their classes.

    Whole numbers stay what they are, with ``known`` as their names.  Texts are numbered in the order of ``known``, or
    else alphabetically.

    Raises:
        UserError: labels of another kind, such as lists, or texts mixed with numbers.
    """
    none = lambda value: value is None or value != value or value == "" or value == -1  # NaN stands for none, too
    there = [value for value in values if not none(value)]
    if there and all(isinstance(value, str) for value in there):
        names = tuple(known) or tuple(sorted(set(there)))
        index = {name: number for number, name in enumerate(names)}
        if unknown := sorted(set(there) - set(names)):
            raise UserError(f"{where} has labels without a class: {list_some(unknown)}")
        return [None if none(value) else index[value] for value in values], names
    wrong = next((v for v in there if not isinstance(v, int | float) or v != int(v)), None)
    if wrong is not None:
        raise UserError(f"{where}: a label is a whole number or a text, got {wrong!r}")
    return [None if none(value) else int(value) for value in values], tuple(known)


def list_some(names: Sequence[str], count: int = 5) -> str:
    """Return the first few names, and how many there are if these are not all."""
    return ", ".join(names[:count]) + (f", … ({len(names)} in all)" if len(names) > count else "")


def existing_path(path: str, why: str = "") -> Path:
    """Return ``path`` with ``~`` resolved; raise UserError if nothing is there."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"there is no data at {path}{f' ({why})' if why else ''}; give it with --data.path")
    return folder


def check_shares(*shares: float) -> None:
    """Raise UserError unless every share lies in (0, 1)."""
    for share in shares:
        if not 0 < share < 1:
            raise UserError(f"val and test are shares in (0, 1), got {share}")


def check_shape(size: int | None, channels: int) -> None:
    """Raise UserError unless ``channels`` is 1 or 3 and ``size``, if given, at least 1 pixel."""
    if channels not in (1, 3) or (size is not None and size < 1):
        raise UserError(f"channels is 1 or 3 and size at least 1 pixel, got {channels} and {size}")
