"""Sources that read tables of images: parquet files as on the Hugging Face Hub, the Hub itself, CIFAR's archives."""

import functools
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from advebm.core.config import check_choices
from advebm.core.errors import UserError, unknown_name
from advebm.data import disk
from advebm.data.augment import Augment
from advebm.data.decode import Corrupt, decode
from advebm.data.shard_files import IMAGE_COLUMNS, LABEL_COLUMNS, choose_column, import_optional, parquet_table
from advebm.data.sources import Augmentations, Data, DataSpec, Images
from advebm.data.splits import Parts, Shares, assemble, check_shape, check_shares, existing_path, find_splits
from advebm.data.tables import Table, decode_tables, find_blob
from advebm.starts import shrink

NATURAL = Augmentations(x=Augment(crop=4, flip=True))

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Hub:
    """A data set with the splits ``train`` and ``test`` of the Hugging Face Hub.

    Attributes:
        path: local folder with parquet files ``train-*`` and ``test-*`` as stored on the Hub, or with the unpacked
            original python archive.  None: the folder in the environment variable ``ADVEBM_DATA``, or its sub-folder of
            this name; without that variable the Hub, through the ``datasets`` library.
        val: share of the training images kept for validation.
        split_seed: chooses which ones.
        augment: augmentation of the training images; default: zero-padded crops by 4 pixels, and flips.
        corrupt: whether an image that cannot be read is an error (``refuse``) or left out (``skip``).
        size: edge in pixels that images are averaged down to; None: 32.
    """

    path: str | None = None
    val: float = 0.04
    split_seed: int = 0
    augment: Augmentations = NATURAL
    corrupt: Corrupt = "refuse"
    size: int | None = None

    name: ClassVar[str]
    hub: ClassVar[str]
    classes: ClassVar[int]
    cites: ClassVar[tuple[str, ...]] = ("krizhevsky2009",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_shares(self.val)
        if self.size is not None and not 8 <= self.size <= 32:
            raise UserError(f"size is an edge of 8 to 32 pixels, or none for 32, got {self.size}")

    def outline(self) -> DataSpec:
        """Return the specification of the whole set; a folder may hold fewer images."""
        kept, edge = round(self.val * 50_000), self.size or 32
        return DataSpec((3, edge, edge), self.classes, 50_000 - kept, kept)

    def load(self) -> Data:
        """Return training, validation and test images; files are decoded once, then read from the cache."""
        folder = self._folder()
        classes: tuple[str, ...] = ()
        if folder is None:
            parts, classes = _read_hub(HubImages(self.hub, corrupt=self.corrupt))
        elif any(folder.rglob("*.parquet")):
            parts, classes = _read_parquet(folder, self.corrupt)
        else:
            parts = _read_archive(folder)
        if not classes:
            classes = CIFAR10 if self.name == "cifar10" else tuple(map(str, range(self.classes)))
        data = assemble(self.name, parts, classes, Shares(self.val, 0.2, self.split_seed), fixed=True)
        if self.size is None:
            return data
        train, val, test = (Images(shrink(split.x, self.size), split.y) for split in data.splits)
        return data._replace(train=train, val=val, test=test)

    def _folder(self) -> Path | None:
        if self.path is not None:
            return existing_path(self.path)
        if root := os.environ.get("ADVEBM_DATA"):
            folder = existing_path(root, "the environment variable ADVEBM_DATA names it")
            return folder / self.name if (folder / self.name).is_dir() else folder
        return None


@dataclass(frozen=True)
class Cifar10(_Hub):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 and 10,000 colour images of 32x32, 10 classes."""

    name = "cifar10"
    hub = "uoft-cs/cifar10"
    classes = 10


@dataclass(frozen=True)
class Cifar100(_Hub):
    """CIFAR-100 (Krizhevsky, 2009): 50,000 and 10,000 colour images of 32x32, 100 classes."""

    name = "cifar100"
    hub = "uoft-cs/cifar100"
    classes = 100


@dataclass(frozen=True)
class HubImages:
    """Any image classification set of the Hugging Face Hub: ``hf:NAME``.

    Splits and columns with usual names are recognised.  Splits that the set has are used as they are; what is missing
    is cut from the training images, and validation images without test images are the test split.  A class that no
    training image has is left out.

    Attributes:
        path: its name on the Hub, or a local folder that the ``datasets`` library can load.
        subset: the configuration to load, if the set has several, such as ``cropped_digits`` of SVHN.
        size: edge of the square that images are cut and scaled to; None: keep images, which must all have one size.
        channels: 3 or 1.
        val, split_seed, augment, corrupt: as for ``cifar10``; default: no augmentation.  ``skip`` also leaves out
            images without a label.
        test: share of the training images kept for test, if the set has no other split.
        image_column, label_column: where images and labels are; None: by their type and name.
        train_split, val_split, test_split: names of the splits; None: by their names.
    """

    path: str
    subset: str | None = None
    size: int | None = None
    channels: int = 3
    val: float = 0.04
    split_seed: int = 0
    augment: Augmentations = Augmentations()
    corrupt: Corrupt = "refuse"
    test: float = 0.2
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_shares(self.val, self.test)
        check_shape(self.size, self.channels)

    def outline(self) -> DataSpec:
        """Return the shape; raise UserError if ``size`` is not given."""
        if self.size is None:
            raise UserError(
                f"the size of the images of {self.path!r} is not known beforehand; give it with --data.size"
            )
        return DataSpec((self.channels, self.size, self.size))

    def load(self) -> Data:
        parts, classes = _read_hub(self)
        return assemble(Path(self.path).name, parts, classes, Shares(self.val, self.test, self.split_seed))


# Three layouts: parquet files, the Hub, CIFAR's archives --------------------------------------------------------------


def _read_parquet(folder: Path, corrupt: Corrupt) -> tuple[Parts, tuple[str, ...]]:
    """Return splits and class names of ``train-*.parquet`` and ``test-*.parquet``, anywhere below ``folder``."""
    tables: dict[str, list[Table]] = {}
    classes: tuple[str, ...] = ()
    for split in ("train", "test"):
        shards = sorted(folder.rglob(f"{split}-*.parquet"))
        if not shards:
            raise UserError(f"{folder} has no {split}-*.parquet; it needs training and test images")
        tables[split] = []
        for shard in shards:
            table, names = parquet_table(shard, folder, corrupt)
            classes = classes or names
            tables[split].append(table)
    return decode_tables(str(folder), tables, classes, corrupt)


def _read_hub(source: HubImages) -> tuple[Parts, tuple[str, ...]]:
    """Return splits and class names of a set that the ``datasets`` library loads."""
    datasets = import_optional("datasets")
    try:
        loaded = datasets.load_dataset(source.path, source.subset)
    except Exception as error:  # the hub's client raises many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fix = "" if Path(source.path).exists() else "; give a folder with --data.path or ADVEBM_DATA"
        raise UserError(f"the data set {source.path!r} cannot be loaded ({reason}){fix}") from None
    whole: dict[str, Table] = {}
    rows_of: dict[str, Any] = {}
    classes: tuple[str, ...] = ()
    for split, name in _choose_splits(source, list(loaded)).items():
        rows, where = loaded[name], f"{source.path} {name}"
        kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
        image = choose_column(where, rows.column_names, IMAGE_COLUMNS, source.image_column, "image_column", kinds)
        label = None
        if len(rows.column_names) > 1:
            label = choose_column(where, rows.column_names, LABEL_COLUMNS, source.label_column, "label_column", kinds)
        names = tuple(getattr(rows.features.get(label), "names", None) or ())
        classes = classes or names
        labels = list(rows[label]) if label else [-1] * len(rows)
        if names:  # matched by name: splits may have other orders
            labels = [names[k] if isinstance(k, int) and 0 <= k < len(names) else k for k in labels]
        raw = rows.cast_column(image, datasets.Image(decode=False)) if kinds[image] == "Image" else rows
        settings = (
            source.path,
            source.subset,
            name,
            raw._fingerprint,
            source.channels,
            source.size,
            source.corrupt,
            image,
        )
        key, rows_of[split] = f"hub {' '.join(map(str, settings))}", raw.select_columns([image])
        cells = functools.partial(_read_cells, rows_of[split], 0, len(labels))
        whole[split] = Table(where, cells, labels, functools.partial(tuple, [key.encode()]), key)
    shape = _find_shape(source, whole["train"], rows_of["train"])
    fits = shape is None or disk.fits(sum(len(table.labels) for table in whole.values()), shape)
    tables = {
        split: [table] if fits or shape is None else _cut(table, rows_of[split], disk.chunk(shape))
        for split, table in whole.items()
    }
    return decode_tables(source.path, tables, classes, source.corrupt, source.channels, source.size, shape)


def _read_cells(rows: Any, start: int, stop: int) -> list[Any]:
    return next(iter(rows[start:stop].values()))


def _find_shape(source: HubImages, table: Table, rows: Any) -> tuple[int, ...] | None:
    """Return the shape (C, H, W) of decoded images, by the first that can be read if ``size`` is None, or None."""
    if source.size is not None:
        return source.channels, source.size, source.size
    for cell in _read_cells(rows, 0, 8):
        try:
            blob = find_blob(cell, table.where)
            return tuple(
                decode([blob], [table.where], channels=source.channels, size=None, corrupt="refuse")[0][0].shape
            )
        except UserError:
            continue
    return None


def _cut(table: Table, rows: Any, length: int) -> list[Table]:
    """Return parts of at most ``length`` rows of a table, so that not all of its images are in memory at once."""
    return [
        table._replace(
            images=functools.partial(_read_cells, rows, start, start + length),
            labels=table.labels[start : start + length],
            stamp=f"{table.stamp} {start} {length}",
            first=start,
        )
        for start in range(0, len(table.labels), length)
    ]


def _choose_splits(source: HubImages, names: Sequence[str]) -> dict[str, str]:
    """Return the names of the splits to read, those of the source before those that are recognised."""
    given = {"train": source.train_split, "val": source.val_split, "test": source.test_split}
    for split, name in given.items():
        if name is not None and name not in names:
            raise unknown_name(f"split for --data.{split}_split", name, names)
    splits = find_splits([name for name in names if name not in given.values()], source.path)
    splits |= {split: name for split, name in given.items() if name is not None}
    if "train" not in splits and len(names) == 1:
        splits = {"train": names[0]}
    if "train" not in splits:
        raise UserError(
            f"{source.path} has the splits {', '.join(names)}; say which to train on: --data.train_split NAME"
        )
    return splits


def _read_archive(folder: Path) -> Parts:
    """Read the unpacked files of ``cifar-10-python.tar.gz`` or ``cifar-100-python.tar.gz``."""
    inside = next((folder / n for n in ("cifar-10-batches-py", "cifar-100-python") if (folder / n).is_dir()), folder)
    layouts = (
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        {"train": ["train"], "test": ["test"]},
    )
    for layout in layouts:
        if all((inside / name).is_file() for names in layout.values() for name in names):
            return {split: [_unpickle(inside / name) for name in names] for split, names in layout.items()}
    raise UserError(f"{folder} has neither train-*.parquet nor the files of CIFAR's python archive")


def _unpickle(path: Path) -> Images:
    try:
        with path.open("rb") as file:
            batch = _Arrays(file, encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch.get(b"fine_labels", batch.get(b"labels")), np.int64)
    except Exception as error:  # damaged pickles fail in every way
        raise UserError(f"{path} is not a batch of CIFAR's python archive: {type(error).__name__}: {error}") from None
    return Images(torch.from_numpy(pixels.copy()), torch.from_numpy(labels))


class _Arrays(pickle.Unpickler):
    """Reads numpy arrays and plain values; any other class in the pickle is refused instead of imported and run."""

    allowed: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return self.allowed[name]
