"""The order of training images, as a pure function of the number of images seen."""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from advebm.core import rng
from advebm.data import disk
from advebm.data.augment import Augment
from advebm.data.sources import Images, to_float


class Origin(NamedTuple):
    """Where the pixels of B augmented images come from.

    Attributes:
        images: position of each image in the training split, int64 (B,).
        pixels: position of each pixel in its image, counted in rows; -1 where it was not in it; int64 (B, H, W).
        total: number of images in the split.
    """

    images: Tensor
    pixels: Tensor
    total: int

    @classmethod
    def of_whole(cls, x: Tensor) -> "Origin":
        """Return that of images (B, C, H, W) which are all there are, each as it is."""
        pixels = torch.arange(x.shape[2] * x.shape[3], device=x.device).view(1, *x.shape[2:]).expand(len(x), -1, -1)
        return cls(torch.arange(len(x), device=x.device), pixels, len(x))


@dataclass
class Loader:
    """Shuffled batches of training images, shared out to streams and augmented on the device.

    The order is endless: each epoch is a new permutation that depends only on (seed, role, epoch), and every stream
    reads its own share of each batch.  So a resumed run needs no state but the number of images seen.

    Attributes:
        images: the training split, as uint8; moved to ``device`` once, or batch by batch if it is mapped from disk.
        seed: the run's seed.
        batch: number of images per step over all streams.
        streams: number of equal shares that a batch is cut into.
        augment: one augmentation per view of the images; a call returns all views.
        role: names the purpose of the images, such as ``extra``; each role has its own order.
    """

    images: Images
    seed: int
    batch: int
    streams: int
    augment: tuple[Augment, ...]
    device: torch.device | str = "cpu"
    role: str = ""
    _epoch: tuple[int, Tensor] = field(default=(-1, torch.empty(0)), repr=False)

    def __post_init__(self) -> None:
        if disk.fits(len(self.images), self.images.shape):
            self.images = Images(self.images.x.to(self.device), self.images.y.to(self.device))

    def __call__(self, seen: int, stream: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """Return the views, float32 (B/streams, C, H, W) in [0, 1] each, and the labels, after ``seen`` images."""
        index, turned = self._next(seen, stream)
        batch = self.images.take(index)
        x, y = batch.x.to(self.device), batch.y.to(self.device)  # those from disk; the others are there
        views = [a(to_float(x), generator, turned) if a.alternate else a(to_float(x), generator) for a in self.augment]
        return views, y

    def trace(self, seen: int, stream: int, generator: torch.Generator) -> Origin:
        """Return where the pixels of the first view come from that a call with these arguments returns."""
        index, turned = self._next(seen, stream)
        shown = torch.empty(len(index), *self.images.shape, device=self.device)
        augment = self.augment[0]
        pixels = augment.trace(shown, generator, turned if augment.alternate else None)
        return Origin(index.to(self.device), pixels, len(self.images))

    def _next(self, seen: int, stream: int) -> tuple[Tensor, Tensor | None]:
        """Return the positions of a stream's images and, if augmentation alternates, which of them are mirrored."""
        share = self.batch // self.streams
        start = seen + stream * share
        pieces = self._pieces(start, start + share)
        index = torch.cat([self._positions(e, lo, hi) for e, lo, hi in pieces])
        if not any(augment.alternate for augment in self.augment):
            return index, None
        epoch = torch.cat([torch.full((hi - lo,), e) for e, lo, hi in pieces])
        return index, ((self._sides[index] + epoch.to(index.device)) % 2).bool().to(self.device)

    @functools.cached_property
    def _sides(self) -> Tensor:
        """Which images the first epoch mirrors if augmentation alternates: 0 or 1 for each, int64 (N,)."""
        sides = torch.randint(2, (len(self.images),), generator=rng.generator(self.seed, "sides", self.role))
        return sides.to(self.images.x.device)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the global positions start … stop as (epoch, from, to)."""
        size, pieces = len(self.images), []
        while start < stop:
            epoch, offset = divmod(start, size)
            end = min(stop - epoch * size, size)
            pieces.append((epoch, offset, end))
            start = epoch * size + end
        return pieces

    def _positions(self, epoch: int, start: int, stop: int) -> Tensor:
        if self._epoch[0] != epoch:
            keys = ("order", self.role) if self.role else ("order",)
            order = torch.randperm(len(self.images), generator=rng.generator(self.seed, *keys, epoch))
            self._epoch = (epoch, order.to(self.images.x.device))  # once an epoch: each copy makes the host wait
        return self._epoch[1][start:stop]
