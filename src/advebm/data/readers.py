"""Sources that read files: the Hub's parquet layout, CIFAR's original archives, folders of images, npz archives."""

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.data.augment import Augment
from advebm.data.decode import Corrupt, cached, decode
from advebm.data.sources import UNLABELLED, Augmentations, Data, DataSpec, Images, gather, partition

NATURAL = Augmentations(x=Augment(crop=4, flip=True))
IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "fine_label", "labels")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}

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
    """

    path: str | None = None
    val: float = 0.04
    split_seed: int = 0
    augment: Augmentations = NATURAL
    corrupt: Corrupt = "refuse"

    name: ClassVar[str]
    hub: ClassVar[str]
    classes: ClassVar[int]
    cites: ClassVar[tuple[str, ...]] = ("krizhevsky2009",)

    def __post_init__(self) -> None:
        check_choices(self)
        _check_share(self.val)

    def outline(self) -> DataSpec:
        """Return the specification of the whole set; a folder may hold fewer images."""
        kept = round(self.val * 50_000)
        return DataSpec((3, 32, 32), self.classes, 50_000 - kept, kept)

    def load(self) -> Data:
        """Return training, validation and test images; files are decoded once, then read from the cache."""
        folder = self._folder()
        if folder is None:
            parts, classes = _from_hub(self.hub, self.corrupt)
        elif any(folder.rglob("*.parquet")):
            parts, classes = _from_parquet(folder, self.corrupt)
        else:
            parts, classes = _from_archive(folder), ()
        return _with_validation(self.name, classes, parts, self.val, self.split_seed)

    def _folder(self) -> Path | None:
        if self.path is not None:
            return _existing(self.path)
        if root := os.environ.get("ADVEBM_DATA"):
            folder = _existing(root, "the environment variable ADVEBM_DATA names it")
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
    """Any image classification set of the Hub with splits ``train`` and ``test`` (or ``validation``): ``hf:NAME``.

    Attributes:
        path: its name on the Hub, or a local folder that the ``datasets`` library can load.
        subset: the configuration to load, if the set has several, such as ``cropped_digits`` of SVHN.
        size: edge of the square that images are cut and scaled to; None: keep images, which must all have one size.
        channels: 3 or 1.
        val, split_seed, augment, corrupt: as for ``cifar10``; default: no augmentation.
    """

    path: str
    subset: str | None = None
    size: int | None = None
    channels: int = 3
    val: float = 0.04
    split_seed: int = 0
    augment: Augmentations = Augmentations()
    corrupt: Corrupt = "refuse"

    def __post_init__(self) -> None:
        check_choices(self)
        _check_share(self.val)
        _check_shape(self.size, self.channels)

    def outline(self) -> DataSpec:
        """Return the shape; raise UserError if ``size`` is not given."""
        if self.size is None:
            raise UserError(
                f"the size of the images of {self.path!r} is not known beforehand; give it with --data.size"
            )
        return DataSpec((self.channels, self.size, self.size))

    def load(self) -> Data:
        parts, classes = _from_hub(self.path, self.corrupt, subset=self.subset, channels=self.channels, size=self.size)
        return _with_validation(Path(self.path).name, classes, parts, self.val, self.split_seed)


@dataclass(frozen=True)
class Folder:
    """A folder with a sub-folder of images for each class: ``folder:PATH``.

    If it has sub-folders ``train`` and ``test`` that hold the classes, these are the splits; else images are split
    here.  Images without sub-folders are unlabelled, for objectives that need no labels.

    Attributes:
        path: the folder.
        size: edge of the square that the middle of each image is cut and scaled to.
        channels: 3 for colour, 1 for grey; images are converted.
        val, test: shares kept for validation and test; with ``train`` and ``test`` given, ``val`` is a share of
            ``train``.
        split_seed: chooses which ones.
        augment: augmentation of the training images; default: none.
        corrupt: whether an image that cannot be read is an error (``refuse``) or left out (``skip``).
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
        check_choices(self)
        _check_share(self.val)
        _check_share(self.test)
        _check_shape(self.size, self.channels)

    def outline(self) -> DataSpec:
        """Return the shape and, if the folder exists, the number of classes."""
        root = Path(self.path).expanduser()
        root = root / "train" if (root / "train").is_dir() and (root / "test").is_dir() else root
        return DataSpec((self.channels, self.size, self.size), len(_class_names(root)) if root.is_dir() else None)

    def load(self) -> Data:
        root = _existing(self.path)
        name = root.resolve().name
        if (root / "train").is_dir() and (root / "test").is_dir():
            classes = _class_names(root / "train")
            if (other := _class_names(root / "test")) != classes:
                raise UserError(f"{root}: train has the classes {', '.join(classes)}, test {', '.join(other)}")
            parts = {split: [self._read(root / split, classes)] for split in ("train", "test")}
            return _with_validation(name, classes, parts, self.val, self.split_seed)
        classes = _class_names(root)
        everything = self._read(root, classes)
        test, val, train = partition([everything], len(classes), (self.test, self.val), self.split_seed)
        return Data(name, classes, train, val, test)

    def _read(self, root: Path, classes: Sequence[str]) -> Images:
        found = [(path, k) for k, name in enumerate(classes) for path in picture_files(root / name)]
        if classes == UNLABELLED:
            found = [(path, -1) for path in picture_files(root)]
        settings = f"{self.size} {self.channels} {self.corrupt} {[str(p.relative_to(root)) for p, _ in found]}"

        def make() -> dict[str, Tensor]:
            paths, names = [p for p, _ in found], [str(p.relative_to(root)) for p, _ in found]
            x, kept = decode(paths, names, channels=self.channels, size=self.size, corrupt=self.corrupt)
            return {"x": x, "y": torch.tensor([k for _, k in found])[kept]}

        return Images(**cached((settings.encode(), *(p.read_bytes() for p, _ in found)), make))


@dataclass(frozen=True)
class Npz:
    """An npz archive: ``npz:PATH`` with ``x`` uint8 (N, H, W, C), (N, C, H, W) or (N, H, W) and labels ``y`` (N,).

    If it has ``x_test`` and ``y_test``, these are the test split; else images are split here.  Without ``y`` the images
    are unlabelled, for objectives that need no labels.

    Attributes:
        path: the archive.
        val, test: shares kept for validation and test; with a test split given, ``val`` is a share of ``x``.
        split_seed: chooses which ones.
        augment: augmentation of the training images; default: none.
    """

    path: str
    val: float = 0.1
    test: float = 0.2
    split_seed: int = 0
    augment: Augmentations = Augmentations()

    def __post_init__(self) -> None:
        _check_share(self.val)
        _check_share(self.test)

    def load(self) -> Data:
        path = _existing(self.path)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # numpy, zipfile and zlib each raise their own
            raise UserError(f"{path} is not an npz archive of arrays: {type(error).__name__}: {error}") from None
        if "x" not in arrays:
            raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}; it needs arrays x and y")
        unlabelled = "y" not in arrays
        if unlabelled:
            arrays = {"x": arrays["x"], "y": np.full(arrays["x"].shape[:1], -1)}
        first = self._images(path, arrays["x"], arrays["y"])
        if not unlabelled and int(first.y.min()) < 0:
            raise UserError(
                f"{path}: labels y must be >= 0, got {int(first.y.min())}; leave y out for unlabelled images"
            )
        if not int(first.y.max()):
            raise UserError(f"{path}: all labels y are 0; a classifier needs at least 2 classes")
        classes = UNLABELLED if unlabelled else tuple(str(k) for k in range(int(first.y.max()) + 1))
        if "x_test" in arrays and "y_test" in arrays:
            parts = {"train": [first], "test": [self._images(path, arrays["x_test"], arrays["y_test"])]}
            return _with_validation(path.stem, classes, parts, self.val, self.split_seed)
        test, val, train = partition([first], len(classes), (self.test, self.val), self.split_seed)
        return Data(path.stem, classes, train, val, test)

    @staticmethod
    def _images(path: Path, x: np.ndarray, y: np.ndarray) -> Images:
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            got = f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"
            raise UserError(
                f"{path}: x is uint8 (N, H, W, C), (N, C, H, W) or (N, H, W), y whole numbers (N,); got {got}"
            )
        if x.ndim == 3:
            x = x[:, None]
        elif x.shape[1] not in (1, 3):
            x = x.transpose(0, 3, 1, 2)
        if x.shape[1] not in (1, 3):
            raise UserError(f"{path}: images have 1 or 3 channels, got an x of shape {x.shape}")
        return Images(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64)))


# Three layouts: parquet files, the Hub, CIFAR's archives --------------------------------------------------------------


Parts = dict[str, list[Images]]  # the shards of each split


def _from_parquet(folder: Path, corrupt: Corrupt) -> tuple[Parts, tuple[str, ...]]:
    """Return splits and class names of ``train-*.parquet`` and ``test-*.parquet``, anywhere below ``folder``."""
    parquet = _optional("pyarrow.parquet")
    parts: Parts = {}
    classes: tuple[str, ...] = ()
    for split in ("train", "test"):
        shards = sorted(folder.rglob(f"{split}-*.parquet"))
        if not shards:
            raise UserError(f"{folder} has no {split}-*.parquet; it needs training and test images")
        parts[split] = []
        for shard in shards:
            try:
                schema = parquet.read_schema(shard)
            except Exception as error:  # pyarrow raises many kinds
                raise UserError(f"{shard} is not parquet: {' '.join(str(error).split())[:200]}") from None
            image, label = (_column(shard, schema.names, wanted) for wanted in (IMAGE_COLUMNS, LABEL_COLUMNS))
            classes = classes or _names_in(schema.metadata or {}, label)
            make = _reader(parquet, shard, image, label, corrupt)
            parts[split].append(Images(**cached((f"parquet {corrupt}".encode(), shard.read_bytes()), make)))
    return parts, classes


def _reader(parquet: Any, shard: Path, image: str, label: str, corrupt: Corrupt) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        table = parquet.read_table(shard, columns=[image, label])
        blobs = [cell["bytes"] if isinstance(cell, dict) else cell for cell in table[image].to_pylist()]
        names = [f"{shard.name} row {i}" for i in range(len(blobs))]
        x, kept = decode([blob or b"" for blob in blobs], names, channels=3, size=None, corrupt=corrupt)
        return {"x": x, "y": torch.tensor(table[label].to_pylist(), dtype=torch.int64)[kept]}

    return make


def _from_hub(
    name: str, corrupt: Corrupt, *, subset: str | None = None, channels: int = 3, size: int | None = None
) -> tuple[Parts, tuple[str, ...]]:
    datasets = _optional("datasets")
    try:
        found = datasets.load_dataset(name, subset)
    except Exception as error:  # the hub's client raises many kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"the data set {name!r} cannot be loaded ({reason}); give a folder with --data.path") from None
    test = next((split for split in ("test", "validation") if split in found), None)
    if "train" not in found or test is None:
        raise UserError(f"{name} has the splits {', '.join(found)}; it needs train and test (or validation)")
    parts: Parts = {}
    classes: tuple[str, ...] = ()
    for split, part in (("train", found["train"]), ("test", found[test])):
        image, label = (_column(name, part.column_names, wanted) for wanted in (IMAGE_COLUMNS, LABEL_COLUMNS))
        classes = classes or tuple(getattr(part.features[label], "names", None) or ())
        raw = part.cast_column(image, datasets.Image(decode=False))

        def make(raw: Any = raw, image: str = image, label: str = label, split: str = split) -> dict[str, Tensor]:
            blobs = [cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]) for cell in raw[image]]
            names = [f"{name} {split} {i}" for i in range(len(blobs))]
            x, kept = decode(blobs, names, channels=channels, size=size, corrupt=corrupt)
            return {"x": x, "y": torch.tensor(list(raw[label]), dtype=torch.int64)[kept]}

        content = f"hub {name} {subset} {split} {part._fingerprint} {channels} {size} {corrupt}".encode()
        parts[split] = [Images(**cached((content,), make))]
    return parts, classes


def _from_archive(folder: Path) -> Parts:
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


# Small parts ----------------------------------------------------------------------------------------------------------


def _with_validation(name: str, classes: Sequence[str], parts: Parts, val: float, seed: int) -> Data:
    y = torch.cat([shard.y for shards in parts.values() for shard in shards])
    count = int(y.max()) + 1
    named = tuple(classes) or (CIFAR10 if name == "cifar10" else tuple(str(k) for k in range(count)))
    if named != UNLABELLED:
        if count > len(named):
            raise UserError(f"{name} has labels up to {count - 1}, but {len(named)} class names")
        if count < 2:
            raise UserError(f"all images of {name} have the label 0; a classifier needs at least 2 classes")
        if int(y.min()) < 0:
            raise UserError(f"{name} has images without a label (label -1)")
    validation, training = partition(parts["train"], len(named), (val,), seed)
    (test,) = gather(parts["test"], torch.arange(sum(map(len, parts["test"]))))
    return Data(name, named, training, validation, test)


def _class_names(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names and picture_files(root):
        return UNLABELLED
    if len(names) < 2:
        got = f"only {names[0]}" if names else "none"
        raise UserError(f"{root} needs a sub-folder of images for each of at least 2 classes, it has {got}")
    for name in names:
        if not picture_files(root / name):
            raise UserError(f"{root / name} holds no image ({', '.join(sorted(SUFFIXES))})")
    return names


def read_folder(folder: Path, classes: Sequence[str], shape: tuple[int, ...]) -> Images:
    """Read a folder's images of ``shape (C, H, W)``, as they are, with the labels of their class sub-folders.

    If there are no images in class sub-folders, all images below the folder are read, with the label -1.

    Raises:
        UserError: no image, one that cannot be read, or images of another size.
    """
    root = _existing(str(folder))
    parts = [root / name for name in classes]
    labelled = any(part.is_dir() for part in parts)
    found = [(p, k) for k, part in enumerate(parts) for p in picture_files(part)] if labelled else []
    found = found or [(p, -1) for p in picture_files(root)]
    if not found:
        raise UserError(f"{root} holds no image ({', '.join(sorted(SUFFIXES))})")
    paths = [p for p, _ in found]
    names = [str(p.relative_to(root)) for p in paths]
    x, _ = decode(paths, names, channels=shape[0], size=None, corrupt="refuse")
    if tuple(x.shape[1:]) != shape:
        size = "x".join(map(str, x.shape[2:]))
        raise UserError(f"the images in {root} are {size}, those of the data {shape[1]}x{shape[2]}; resize them first")
    return Images(x, torch.tensor([k for _, k in found]))


def picture_files(folder: Path) -> list[Path]:
    """Return every image file below a folder, recognised by its suffix, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _column(where: object, there: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in there:
            return name
    raise UserError(f"{where} has the columns {', '.join(there)}; it needs one of {', '.join(wanted)}")


def _names_in(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names in the metadata of the Hub's parquet files, if any."""
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _existing(path: str, why: str = "") -> Path:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"there is no data at {path}{f' ({why})' if why else ''}; give it with --data.path")
    return folder


def _optional(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this data needs {module.split('.')[0]}: pip install 'advebm[data]'") from None


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise UserError(f"val and test are shares in (0, 1), got {share}")


def _check_shape(size: int | None, channels: int) -> None:
    if channels not in (1, 3) or (size is not None and size < 1):
        raise UserError(f"channels is 1 or 3 and size at least 1 pixel, got {channels} and {size}")
