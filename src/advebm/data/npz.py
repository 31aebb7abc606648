"""Archives of arrays that numpy's ``savez`` wrote."""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from advebm.core.errors import UserError
from advebm.data.sources import Augmentations, Data, Images
from advebm.data.splits import Parts, Shares, assemble, check_shares, existing_path, split_name

IMAGES, LABELS = ("x", "image", "images", "img", "data"), ("y", "label", "labels", "target", "targets")


CLASSES = ("classes", "class_names", "label_names", "names")  # arrays of the names of classes


@dataclass(frozen=True)
class Npz:
    """An npz archive: ``npz:PATH`` with ``x`` uint8 (N, H, W, C), (N, C, H, W) or (N, H, W) and labels ``y`` (N,).

    Arrays may have other usual names, such as ``image`` and ``label``, ``x_train`` and ``y_train`` or
    ``train_images`` and ``train_labels``.  Those of a split, such as ``x_test`` and ``y_test``, are that split; what is
    missing is cut from the training images.  Without labels the images are unlabelled, for objectives that need none.

    Attributes:
        path: the archive.  Arrays that were saved without compression are never in memory twice.
        val, test: shares kept for validation and test where the archive has no such split.
        split_seed: chooses which ones.
        augment: augmentation of the training images; default: none.
    """

    path: str
    val: float = 0.1
    test: float = 0.2
    split_seed: int = 0
    augment: Augmentations = Augmentations()

    def __post_init__(self) -> None:
        check_shares(self.val, self.test)

    def load(self) -> Data:
        path = existing_path(self.path)
        arrays = _read_arrays(path)
        x, y = _find_arrays(path, arrays, IMAGES), _find_arrays(path, arrays, LABELS)
        classes = next(
            (tuple(map(str, arrays[n].tolist())) for n in arrays if n in CLASSES and arrays[n].ndim == 1), ()
        )
        if "train" not in x:
            held = ", ".join(arrays) or "nothing"
            raise UserError(f"{path} holds {held}; it needs arrays x and y (or {', '.join(IMAGES[1:3])} and label, …)")
        if y and (without := sorted(x.keys() - y.keys())):
            raise UserError(f"{path} has labels, but none for the {' and '.join(without)} images")
        parts: Parts = {}
        for split, array in x.items():
            labels = arrays[y[split]] if y else np.full(arrays[array].shape[:1], -1)
            parts[split] = [_to_images(path, arrays[array], labels)]
            smallest, largest = int(parts[split][0].y.min()), int(parts[split][0].y.max())
            if y and smallest < 0 and not (split != "train" and largest == smallest == -1):
                raise UserError(
                    f"{path}: labels {y[split]} must be >= 0, got {smallest}; leave them out for unlabelled images"
                )
        if len(shapes := {shards[0].shape for shards in parts.values()}) > 1:
            raise UserError(
                f"{path}: the images of all splits have one shape, got {' and '.join(map(str, sorted(shapes)))}"
            )
        return assemble(path.stem, parts, classes, Shares(self.val, self.test, self.split_seed))


def _find_arrays(path: Path, names: Mapping[str, np.ndarray], kinds: tuple[str, ...]) -> dict[str, str]:
    """Return the name of the array of each split: ``train`` also for a name that mentions no split."""
    chosen: dict[str, str] = {}
    for name in names:
        words = name.lower().replace("-", "_").split("_")
        splits = [split for word in words if (split := split_name(word))]
        rest = [word for word in words if split_name(word) is None]
        if len(splits) > 1 or len(rest) != 1 or rest[0] not in kinds:
            continue
        split = splits[0] if splits else "train"
        if split in chosen:
            raise UserError(f"{path} has {chosen[split]} and {name}, which both mean the same; remove one")
        chosen[split] = name
    return chosen


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an archive by name; those that are stored without compression are memory-mapped.

    Raises:
        UserError: the file is no npz archive, or holds other objects than arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy") or "/" in member.filename:
                    continue
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, fortran, dtype = read(file)
                    if dtype.hasobject:
                        if name.lower().partition("_")[0] in (*IMAGES, *LABELS):
                            raise ValueError(f"{name} holds python objects")
                        continue
                    start, size = file.tell(), math.prod(shape)
                    if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1 and size:
                        if start + size * dtype.itemsize != member.file_size:
                            raise ValueError(f"{name} is cut short")
                        while file.read(1 << 24):  # raises for a wrong checksum
                            pass
                        offset = _find_content(path, member) + start
                        arrays[name] = np.memmap(path, dtype, "c", offset, shape, "F" if fortran else "C")
                        continue
                with archive.open(member) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise UserError(f"{path} is not an npz archive of arrays: {type(error).__name__}: {error}") from None
    return arrays


def _find_content(path: Path, member: zipfile.ZipInfo) -> int:
    """Return where in the file the content of an uncompressed member begins, behind its local header."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        lengths = file.read(4)
    return member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _to_images(path: Path, x: np.ndarray, y: np.ndarray) -> Images:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    got, fixes = f"{x.dtype} {x.shape} and {y.dtype} {y.shape}", []
    fixes += ["save x as bytes: (x * 255).round().astype(np.uint8), if it lies in [0, 1]"] * (x.dtype.kind == "f")
    fixes += ["y.astype(int)"] * (y.dtype.kind in "fb") + ["x[..., :3] without alpha"] * (
        x.ndim == 4 and x.shape[3] == 4
    )
    fixes += ["np.moveaxis(x, 3, 0)"] * (x.ndim == 4 and len(y) == x.shape[3] != len(x))
    fix = f"; likely fix: {', '.join(fixes)}" if fixes else ""
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        wanted = "x is uint8 (N, H, W, C), (N, C, H, W) or (N, H, W), y whole numbers (N,)"
        raise UserError(f"{path}: {wanted}; got {got}{fix}")
    if not len(x):
        raise UserError(f"{path}: an array of images is empty")
    if y.max() >= 2**31:
        raise UserError(f"{path}: labels y count classes, got {y.max()}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] in (1, 3) and x.shape[3] in (1, 3):
        raise UserError(f"{path}: it is not clear which axis of x {x.shape} is that of channels")
    elif x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.shape[1] not in (1, 3):
        raise UserError(f"{path}: images have 1 or 3 channels; got {got}{fix}")
    return Images(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))
