"""Images that are not from the data, to train critics and others against: p0 of binary adversarial training."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data import pictures
from advebm.data.ood_sets import fit_shape
from advebm.data.sources import Augmentations, Data, DataSpec, Derived, Images, Source, find_spec, gather, to_float
from advebm.descent import repeat_pixels

TRIES, ROUND = 30, 4096  # draws before giving up the search for contrast, and fewest squares per draw


@dataclass(frozen=True)
class Patches:
    """Random squares of scikit-learn's two photographs, resized: real images, offline.

    The splits are cut from different columns of the photographs, so they share no pixel.  The label is the photograph's
    index.

    Attributes:
        size: edge of the images in pixels.
        channels: 1 for grey, 3 for colour.
        count: total number of images.
        smallest, largest: limits of the squares' edges before resizing; edges are drawn uniformly.
        contrast: least standard deviation of an image's grey levels in [0, 1]; flatter squares are drawn again, because
            a search without noise moves all flat squares to the same image.
        val, test: shares of the columns, and of the images, kept for validation and test.
        split_seed: seed for drawing the squares.
        augment: augmentation of these images when they are used for training.
    """

    size: int = 8
    channels: int = 1
    count: int = 10_000
    smallest: int = 8
    largest: int = 64
    contrast: float = 0.1
    val: float = 0.1
    test: float = 0.2
    split_seed: int = 0
    augment: Augmentations = Augmentations()

    cites: ClassVar[tuple[str, ...]] = ("pedregosa2011",)

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3) or not 1 <= self.smallest <= self.largest:
            got = f"{self.size}, {self.channels}, {self.smallest} and {self.largest}"
            raise UserError(f"size must be at least 1, channels 1 or 3, 1 <= smallest <= largest, got {got}")
        if not 0 <= self.contrast < 0.5:
            raise UserError(f"contrast is a deviation in [0, 0.5), got {self.contrast}")
        if not (self.val > 0 and self.test > 0 and self.val + self.test < 1):
            raise UserError(f"val and test are positive shares that leave some, got {self.val} and {self.test}")
        if min(self.count * self.val, self.count * self.test) < 1:
            raise UserError(f"{self.count} images are too few to split into {self.val} and {self.test}")

    def load(self) -> Data:
        """Return 7,000 training, 1,000 validation and 2,000 test images by default."""
        from sklearn.datasets import load_sample_images

        photographs = torch.from_numpy(np.stack(load_sample_images().images)).movedim(3, 1)  # (2, 3, 427, 640)
        shares, width, splits = (1 - self.val - self.test, self.val, self.test), photographs.shape[3], []
        for number, (name, share) in enumerate(zip(("train", "val", "test"), shares, strict=True)):
            left = round(sum(shares[:number]) * width)
            columns = photographs[..., left : left + round(share * width)]
            splits.append(self._cut(columns, round(share * self.count), rng.generator(self.split_seed, name)))
        train, val, test = splits
        return Data("patches", ("china", "flower"), train, val, test)

    def _cut(self, photographs: Tensor, count: int, generator: torch.Generator) -> Images:
        """Return ``count`` random squares of photographs (P, 3, H, W), as uint8."""
        height, width = photographs.shape[2:]
        if self.largest > min(height, width):
            raise UserError(f"largest must be at most {min(height, width)}, what a split has, got {self.largest}")
        kept: list[Images] = []
        drawn = max(count, ROUND)
        for _ in range(TRIES):
            y = torch.randint(len(photographs), (drawn,), generator=generator)
            edges = torch.randint(self.smallest, self.largest + 1, (drawn,), generator=generator)
            across, down = torch.rand(2, drawn, generator=generator)
            x = torch.empty(drawn, self.channels, self.size, self.size)
            for edge in edges.unique().tolist():
                at = (edges == edge).nonzero().squeeze(1)
                rows = (down[at] * (height - edge + 1)).long()[:, None] + torch.arange(edge)
                columns = (across[at] * (width - edge + 1)).long()[:, None] + torch.arange(edge)
                squares = photographs.movedim(1, 3)[y[at, None, None], rows[:, :, None], columns[:, None, :]]
                x[at] = fit_shape(to_float(squares.movedim(3, 1)), (self.channels, self.size, self.size))
            varied = x.mean(1).flatten(1).std(1, correction=0) >= self.contrast  # of grey levels, not across channels
            kept.append(Images((x[varied] * 255).round().to(torch.uint8), y[varied]))
            if sum(map(len, kept)) >= count:
                return Images(torch.cat([k.x for k in kept])[:count], torch.cat([k.y for k in kept])[:count])
        raise UserError(f"too few squares have a contrast of {self.contrast}; give a lower one or larger squares")


@dataclass(frozen=True)
class NoiseImages:
    """Images of uniform noise, drawn once: the p0 that is least like images.

    Attributes:
        size: edge of the images in pixels.
        channels: 1 for grey, 3 for colour.
        count: number of training images; validation has a tenth as many, test a fifth.
        split_seed: seed of the noise.
        augment: augmentation of these images when they are used for training.
    """

    size: int = 8
    channels: int = 1
    count: int = 10_000
    split_seed: int = 0
    augment: Augmentations = Augmentations()

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3) or self.count < 10:
            got = f"{self.size}, {self.channels} and {self.count}"
            raise UserError(f"size must be at least 1, channels 1 or 3 and count at least 10, got {got}")

    def load(self) -> Data:
        """Return 10,000 training, 1,000 validation and 2,000 test images by default."""
        splits = []
        for name, count in (("train", self.count), ("val", self.count // 10), ("test", self.count // 5)):
            generator = rng.generator(self.split_seed, "noise images", name)
            shape = (count, self.channels, self.size, self.size)
            x = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            splits.append(Images(x, torch.zeros(count, dtype=torch.long)))
        train, val, test = splits
        return Data("noise", ("noise",), train, val, test)


@dataclass(frozen=True)
class GaussianImages(Derived):
    """Draws from a Gaussian for each class of another source: its colours and large shapes, without details.

    They are the seeds that classifiers are drawn from, :class:`advebm.starts.ClassGaussians`, fitted to the source's
    training images for all three splits.  The label is the class.  Images without labels have one Gaussian.

    Attributes:
        source: the other source; its augmentation, if it has any, moves the drawn images, too.
        count: number of training images, as many of each class; validation has a tenth as many, test a fifth.
        split_seed: seed of the draws.
    """

    count: int = 10_000
    split_seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 10:
            raise UserError(f"count must be at least 10, got {self.count}")

    def outline(self) -> DataSpec:
        """Return the source's specification, with as many images as are drawn."""
        return find_spec(self.source)._replace(train=self.count, val=self.count // 10)

    def load(self) -> Data:
        data = self.source.load()
        start, splits = data.gaussian_seeds(), []
        for name, count in (("train", self.count), ("val", self.count // 10), ("test", self.count // 5)):
            generator = rng.generator(self.split_seed, "gaussian images", name)
            y = torch.arange(count) * len(data.classes) // count
            seeds = [start(torch.empty(len(part), *data.shape), part, generator) for part in y.split(500)]
            splits.append(Images((torch.cat(seeds) * 255).round().to(torch.uint8), y))
        train, val, test = splits
        return Data(f"Gaussians of {data.name}", data.classes, train, val, test)


@dataclass(frozen=True)
class LowResolution(Derived):
    """Another source's images without their details: each block of pixels has the mean of the block.

    Attributes:
        source: the other source; splits and labels are its own.
        factor: edge of a block in pixels, which divides the edges of the images.
    """

    factor: int = 4

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise UserError(f"factor must be at least 2 pixels, got {self.factor}")

    def outline(self) -> DataSpec:
        return find_spec(self.source)

    def load(self) -> Data:
        data = self.source.load()
        if any(edge % self.factor for edge in data.shape[1:]):
            raise UserError(f"blocks of {self.factor} pixels do not fill images of {pictures.size_text(data.shape)}")
        train, val, test = (replace(part, x=self._coarse(part.x), key="") for part in data.splits)
        return Data(f"{data.name} in low resolution", data.classes, train, val, test)

    def _coarse(self, x: Tensor) -> Tensor:
        parts = [avg_pool2d(part.float(), self.factor).round().to(torch.uint8) for part in x.split(500)]
        return repeat_pixels(torch.cat(parts), self.factor)


@dataclass(frozen=True)
class Mixture:
    """Several sources of one shape in equal shares: as many images of each as the smallest has, split by split.

    The label is the index of the source.

    Attributes:
        sources: at least two, such as ``patches,noise``.
        split_seed: chooses which images of a larger source are used.
        augment: augmentation of all images; those of the sources are ignored.
    """

    sources: tuple[Source, ...] = (Patches(), NoiseImages())
    split_seed: int = 0
    augment: Augmentations = Augmentations()

    def __post_init__(self) -> None:
        if len(self.sources) < 2:
            raise UserError("a mixture takes at least two sources, such as patches,noise")

    def load(self) -> Data:
        parts = [source.load() for source in self.sources]
        if len(shapes := {data.shape for data in parts}) > 1:
            raise UserError(f"images of a mixture have one shape, got {' and '.join(map(str, sorted(shapes)))}")
        names = tuple(data.name for data in parts)
        train, val, test = (
            self._mix([getattr(data, name) for data in parts], name) for name in ("train", "val", "test")
        )
        return Data("+".join(names), names, train, val, test)

    def _mix(self, parts: list[Images], name: str) -> Images:
        share, start, chosen = min(map(len, parts)), 0, []
        for number, part in enumerate(parts):
            order = torch.randperm(len(part), generator=rng.generator(self.split_seed, "mixture", name, number))
            chosen.append(start + order[:share].sort().values)
            start += len(part)
        (mixed,) = gather([*parts], torch.cat(chosen))
        return replace(mixed, y=torch.arange(len(parts)).repeat_interleave(share))
