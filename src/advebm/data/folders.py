"""Folders of image files, with a sub-folder for each class, and those again in sub-folders for each split or not."""

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advebm.core.config import check_choices
from advebm.core.errors import Notice, UserError, suggest
from advebm.data import disk
from advebm.data.cache import cached
from advebm.data.decode import Corrupt, decode, readable_formats, readable_suffixes
from advebm.data.shard_files import find_shard_files, read_shard_files
from advebm.data.sources import UNLABELLED, Augmentations, Data, DataSpec, Images
from advebm.data.splits import (
    Parts,
    Shares,
    assemble,
    check_shape,
    check_shares,
    existing_path,
    find_splits,
    list_some,
)
from advebm.data.tables import Encoded, make_shards

JUNK = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}  # made by file managers and archivers


@dataclass(frozen=True)
class Folder:
    """A folder with a sub-folder of images for each class: ``folder:PATH``.

    If it has sub-folders with the usual names of splits (``train``, ``val`` or ``valid``, ``test``, …) that hold the
    classes, these are the splits; what is missing is cut from ``train``, and with ``val`` but no ``test``, as in
    ImageNet's layout, ``val`` is the test split.  Else images are split here.  Images without sub-folders are
    unlabelled, for objectives that need no labels.

    Without image files the folder may hold shards: parquet as on the Hub, or tar as webdataset writes it, see
    :func:`advebm.data.shard_files.read_shard_files`.  A set that memory does not hold is decoded to the cache folder.

    Attributes:
        path: the folder.
        size: edge of the square that the middle of each image is cut and scaled to.
        channels: 3 for colour, 1 for grey; images are converted.
        val, test: shares kept for validation and test where the folder has no such split.
        split_seed: chooses which ones.
        augment: augmentation of the training images; default: none.
        corrupt: whether an image that cannot be read, or a class without images, is an error (``refuse``) or left out
            (``skip``).
    """

    path: str
    size: int = 32
    channels: int = 3
    val: float = 0.1
    test: float = 0.2
    split_seed: int = 0
    augment: Augmentations = Augmentations()
    corrupt: Corrupt = "refuse"

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("folder takes a path: folder:PATH, or --data.path PATH")
        check_choices(self)
        check_shares(self.val, self.test)
        check_shape(self.size, self.channels)

    def outline(self) -> DataSpec:
        """Return the shape and, if the folder exists, the number of classes."""
        root = Path(self.path).expanduser()
        if root.is_dir() and _shards(root):
            return DataSpec((self.channels, self.size, self.size))
        classes = self._classes(_find_split_folders(root).get("train", root)) if root.is_dir() else None
        return DataSpec((self.channels, self.size, self.size), None if classes is None else len(classes))

    def load(self) -> Data:
        root = existing_path(self.path)
        if not root.is_dir():
            raise UserError(f"{root} is a file; a folder of images is meant, or npz:PATH for an archive of arrays")
        shares = Shares(self.val, self.test, self.split_seed)
        if shards := _shards(root):
            parts, names = read_shard_files(root, shards, size=self.size, channels=self.channels, corrupt=self.corrupt)
            return assemble(root.resolve().name, parts, names, shares)
        name, splits = root.resolve().name, _find_split_folders(root) or {"train": root}
        classes = self._classes(splits["train"])
        for split in ("val", "test"):
            if split in splits and classes != UNLABELLED and not _sub_folders(splits[split]):
                warnings.warn(f"{splits[split]} has no sub-folders of classes; left out", stacklevel=2)
                del splits[split]
        for split, folder in splits.items():
            others = [p.name for p in _sub_folders(folder) if p.name not in classes and list_pictures(p)]
            if others and classes != UNLABELLED:
                hint = suggest(others[0], classes)
                raise UserError(f"{root}: {split} has the classes {list_some(others)}, which train has not{hint}")
        _report_splits(root, splits)
        _report_other_files(root)
        stray = sum(len(_pictures_in(folder)) for folder in splits.values()) if classes != UNLABELLED else 0
        if stray:
            warnings.warn(f"{root}: {stray} images outside the folders of classes: left out", stacklevel=2)
        if classes == UNLABELLED:
            warnings.warn(f"{root}: images without folders of classes are read without labels", Notice, stacklevel=2)
        return assemble(name, self._read(splits, classes), classes, shares)

    def _classes(self, root: Path) -> tuple[str, ...]:
        """Return the names of the classes in a split's folder, sorted; raise UserError for fewer than two."""
        names = tuple(p.name for p in _sub_folders(root))
        if not names and list_pictures(root):
            return UNLABELLED
        if len(names) < 2:
            got = f"only {names[0]}" if names else "none"
            inside = next((p for p in _sub_folders(root) if len(_sub_folders(p)) > 1), None)
            fix = f"; is {inside} meant?" if inside else ""
            raise UserError(f"{root} needs a sub-folder of images for each of at least 2 classes, it has {got}{fix}")
        inverted = [name for name in names if len(find_splits([p.name for p in _sub_folders(root / name)], root)) > 1]
        if inverted:
            raise UserError(
                f"{root / inverted[0]} holds splits, which have to be around the classes: {root}/train/{inverted[0]}, …"
            )
        empty = [name for name in names if not list_pictures(root / name)]
        if empty and self.corrupt == "refuse":
            what = ", ".join(str(root / name) for name in empty[:3])
            raise UserError(
                f"{what} holds no image ({', '.join(readable_formats())}); remove it, or leave such classes out with "
                "--data.corrupt skip"
            )
        return names

    def _read(self, splits: dict[str, Path], classes: Sequence[str]) -> Parts:
        labelled = {split: self._list_labelled(folder, classes) for split, folder in splits.items()}
        shape = (self.channels, self.size, self.size)
        if disk.fits(sum(map(len, labelled.values())), shape):
            return {split: [self._decode(splits[split], rows)] for split, rows in labelled.items()}
        parts: Parts = {}
        for split, rows in labelled.items():
            pieces = [rows[i : i + disk.chunk(shape)] for i in range(0, len(rows), disk.chunk(shape))]
            encoded = [_encoded(splits[split], piece) for piece in pieces]
            parts[split] = [*make_shards(encoded, shape=shape, size=self.size, corrupt=self.corrupt)]
        return parts

    def _list_labelled(self, root: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
        """Return the image files of a split, with the numbers of their classes or -1."""
        if classes == UNLABELLED:
            labelled = [(path, -1) for path in list_pictures(root)]
        else:
            there = [(k, root / name) for k, name in enumerate(classes) if (root / name).is_dir()]
            labelled = [(path, k) for k, folder in there for path in list_pictures(folder)]
        if not labelled:
            raise UserError(f"{root} holds no image")
        return labelled

    def _decode(self, root: Path, labelled: Sequence[tuple[Path, int]]) -> Images:
        """Return the images of a split in memory; decoded once and then read from the cache."""
        paths, names = [p for p, _ in labelled], [str(p.relative_to(root)) for p, _ in labelled]

        def make() -> dict[str, Tensor]:
            x, kept = decode(paths, names, channels=self.channels, size=self.size, corrupt=self.corrupt)
            return {"x": x, "y": torch.tensor([k for _, k in labelled])[kept]}

        settings = f"{self.size} {self.channels} {self.corrupt} {names} {[k for _, k in labelled]}"
        decoded = cached(itertools.chain([settings.encode()], (p.read_bytes() for p in paths)), make)
        return Images(decoded["x"], decoded["y"])


def _shards(root: Path) -> list[Path]:
    """Return the files of a folder that holds its images in parquet or tar files; none if it has image files."""
    found = find_shard_files(root)
    return [] if found and list_pictures(root) else found


def _encoded(root: Path, labelled: Sequence[tuple[Path, int]]) -> Encoded:
    paths = [path for path, _ in labelled]
    names = [str(path.relative_to(root)) for path in paths]
    return Encoded(functools.partial(list, paths), names, [k for _, k in labelled], disk.stamp(paths, root))


def _sub_folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not _is_junk(p))


def _is_junk(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in JUNK


def _find_split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits, ``train`` among them, or an empty dict if sub-folders are classes.

    Sub-folders with the names of splits are splits if all sub-folders have such names, or if that of ``train`` has
    sub-folders, too.

    Raises:
        UserError: two names stand for one split, or there is no ``train`` beside the others.
    """
    folders = _sub_folders(root)
    splits = find_splits([p.name for p in folders], root)
    only_splits = len(splits) == len(folders) > 0
    if only_splits and "train" not in splits:
        raise UserError(f"{root} has {' and '.join(splits.values())}, but no train; name the training images so")
    if "train" not in splits or not (only_splits or _sub_folders(root / splits["train"])):
        return {}
    if others := [p.name for p in folders if p.name not in splits.values()]:
        warnings.warn(f"{root}: {list_some(others)} beside the splits: left out", stacklevel=3)
    return {split: _enter(root / splits[split]) for split in ("train", "val", "test") if split in splits}


def _enter(folder: Path) -> Path:
    """Return the one folder of the same name inside a folder, as some archives have it, or else the folder."""
    inside = _sub_folders(folder)
    return inside[0] if len(inside) == 1 and inside[0].name == folder.name else folder


def _report_splits(root: Path, splits: dict[str, Path]) -> None:
    """Say in a line which folder is read as which split, and what is cut from the training images."""
    if splits["train"] == root:
        return
    used = {"test" if split == "val" and "test" not in splits else split: p.name for split, p in splits.items()}
    cut = [split for split in ("val", "test") if split not in used]
    text = ", ".join(f"{folder} as {split}" for split, folder in used.items())
    ending = f"; {' and '.join(cut)} cut from {splits['train'].name}" if cut else ""
    warnings.warn(f"{root}: read {text}{ending}", Notice, stacklevel=3)


def _report_other_files(root: Path) -> None:
    """Say how many files of which kinds are not read."""
    kinds = Counter(
        "link to nothing" if not path.exists() else path.suffix.lower() or "no suffix"
        for path in _walk(root)
        if path.suffix.lower() not in readable_suffixes() or not path.is_file()
    )
    if kinds:
        text = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        hint = "; pip install pillow-heif reads .heic" if kinds.keys() & {".heic", ".heif"} else ""
        warnings.warn(f"{root}: files that are not read as images: {text}{hint}", Notice, stacklevel=3)


def _walk(folder: Path) -> list[Path]:
    """Return every file below a folder that is not junk, sorted; links to a folder around them are not followed."""
    files: list[Path] = []
    here = folder.resolve()
    for path in folder.iterdir():
        if _is_junk(path) or (path.is_symlink() and path.resolve() in (here, *here.parents)):
            continue
        files += _walk(path) if path.is_dir() else [path]
    return sorted(files)


def _pictures_in(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in readable_suffixes() and p.is_file() and not _is_junk(p)]


def list_pictures(folder: Path) -> list[Path]:
    """Return every image file below a folder, recognised by its suffix, sorted; without hidden files and junk."""
    return [p for p in _walk(folder) if p.suffix.lower() in readable_suffixes() and p.is_file()]


def read_folder(folder: Path, classes: Sequence[str], shape: tuple[int, ...]) -> Images:
    """Read a folder's images of ``shape (C, H, W)``, as they are, with the labels of their class sub-folders.

    If there are no images in class sub-folders, all images below the folder are read, with the label -1.

    Raises:
        UserError: no image, one that cannot be read, or images of another size.
    """
    root = existing_path(str(folder))
    parts = [root / name for name in classes]
    labelled = [(p, k) for k, part in enumerate(parts) if part.is_dir() for p in list_pictures(part)]
    labelled = labelled or [(p, -1) for p in list_pictures(root)]
    if not labelled:
        raise UserError(f"{root} holds no image ({', '.join(readable_formats())})")
    paths = [p for p, _ in labelled]
    x, _ = decode(paths, [str(p.relative_to(root)) for p in paths], channels=shape[0], size=None, corrupt="refuse")
    if tuple(x.shape[1:]) != shape:
        size = "x".join(map(str, x.shape[2:]))
        raise UserError(f"the images in {root} are {size}, those of the data {shape[1]}x{shape[2]}; resize them first")
    return Images(x, torch.tensor([k for _, k in labelled]))
