"""Augmentation of a whole batch on its device, with a generator."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.data import simclr
from advebm.data.autoaugment import autoaugment, color_shape

GREY = 0.5  # fill value of a cut-out square: the middle of the range, whatever the data's mean
ERASED_AREA = (0.02, 0.33)  # share of the area that an erased box covers, as in Zhong et al. (2020)
ERASED_RATIO = (0.3, 10 / 3)  # its height divided by its width


def take(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return pixels of ``x (B, C, H, W)`` at rows (B, h) and columns (B, w) of each image, (B, C, h, w)."""
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def covered(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return which of ``size`` rows or columns a box covers that begins at ``start (B,)``; bool (B, size)."""
    offset = torch.arange(size, device=start.device) - start[:, None]
    return (offset >= 0) & (offset < length[:, None])


@dataclass(frozen=True)
class Augment:
    """Random crops, horizontal flips, colour changes, a policy and a box that is cut out, drawn for each image.

    They are applied in this order: that of Cubuk et al. (2019) for CIFAR (crop and flip, the policy, then cutout, so
    that no later operation moves or recolours the square), and that of SimCLR, whose settings on CIFAR-10 are ``scale:
    0.08, flip: true, jitter: 0.5, grey: 0.2`` (no blur).  IDBH of Li and Spratling (2023), made for adversarial
    training, is about ``cropshift: 10, flip: true, policy: color-shape, erase: 0.5`` (weak) or ``erase: 1`` (strong).

    Attributes:
        crop: pixels of zero padding on each side, which is also the largest shift; 0 leaves images in place.
        cropshift: largest number of rows and columns, together, that an image loses; what is left moves to a random
            place on black (Li and Spratling, 2023).
        scale: smallest share of the area that a random box keeps; the box, with sides of 3:4 to 4:3, is then enlarged
            to the whole size; 1: no box.
        flip: whether to mirror each image with probability 1/2.
        alternate: whether training mirrors each image in every other epoch instead, half of them in the first one
            (Jordan, 2024), so that two epochs in a row show both sides.  Other views of it are mirrored alike.
        jitter: strength of colour changes, applied to 80 % of the images (Chen et al., 2020).  At 1: ± 80 % in
            brightness, contrast and saturation and ± 1/5 of a turn in hue, in random order; grey images only change in
            brightness and contrast.
        grey: share of images that are converted to grey.
        policy: ``autoaugment`` is the policy found on CIFAR-10 (Cubuk et al., 2019), ``color-shape`` one random change
            of colours or shape (Li and Spratling, 2023); both are for grey and RGB images.
        cutout: edge in pixels of one grey square (DeVries and Taylor, 2017) around a pixel drawn uniformly, so that it
            may extend beyond the border; 0: none.
        erase: share of images in which one random box, 2 to 33 % of the area, becomes black (Zhong et al., 2020).
    """

    crop: int = 0
    cropshift: int = 0
    scale: float = 1.0
    flip: bool = False
    alternate: bool = False
    jitter: float = 0.0
    grey: float = 0.0
    policy: Literal["none", "autoaugment", "color-shape"] = "none"
    cutout: int = 0
    erase: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.crop < 0 or self.cropshift < 0:
            raise UserError(f"crop and cropshift are numbers of pixels >= 0, got {self.crop} and {self.cropshift}")
        if not 0 < self.scale <= 1 or not 0 <= self.grey <= 1 or not self.jitter >= 0:
            got = f"{self.scale}, {self.grey} and {self.jitter}"
            raise UserError(f"scale is a share in (0, 1], grey one in [0, 1] and jitter a strength >= 0, got {got}")
        if self.jitter > 2.5:
            raise UserError(f"jitter must be at most 2.5, half a turn of the hue either way, got {self.jitter}")
        if self.cutout < 0 or not 0 <= self.erase <= 1:
            got = f"{self.cutout} and {self.erase}"
            raise UserError(f"cutout is a number of pixels >= 0 and erase a share in [0, 1], got {got}")
        if self.alternate and not self.flip:
            raise UserError("alternate says when images are mirrored; set flip to true as well")

    @property
    def cites(self) -> tuple[str, ...]:
        """Return the keys of ``citations.bib`` for the options in use."""
        named = {"cubuk2019": self.policy == "autoaugment", "devries2017": self.cutout > 0}
        named |= {"li2023": self.cropshift > 0 or self.policy == "color-shape", "zhong2020": self.erase > 0}
        named["jordan2024airbench"] = self.alternate
        named["chen2020"] = self.scale < 1 or self.jitter > 0 or self.grey > 0
        return tuple(key for key, used in named.items() if used)

    def trace(self, x: Tensor, generator: torch.Generator, mirrored: Tensor | None = None) -> Tensor:
        """Return which pixel of its image each pixel of the augmented ones is, for the same generator and ``mirrored``.

        Crops, cropshift and mirror images are followed; a policy, which may shear or rotate, is not.  Pixels are
        counted in rows, -1 is what was not in the image: ``(B, C, H, W)`` -> int64 (B, H, W).

        Raises:
            UserError: ``scale`` is below 1, which mixes pixels.
        """
        if self.scale < 1:
            raise UserError(
                f"pixels cannot be followed through boxes that are enlarged; set scale to 1, got {self.scale}"
            )
        moves = Augment(crop=self.crop, cropshift=self.cropshift, flip=self.flip)
        count, _, height, width = x.shape
        numbers = torch.arange(1.0, height * width + 1, device=x.device).view(1, 1, height, width)
        return moves(numbers.expand(count, -1, -1, -1), generator, mirrored)[:, 0].long() - 1

    def __call__(self, x: Tensor, generator: torch.Generator, mirrored: Tensor | None = None) -> Tensor:
        """Augment ``(B, C, H, W)`` in [0, 1] -> same shape and type; colours and policy round to multiples of 1/255.

        ``mirrored``, bool (B,), says which images ``flip`` mirrors; None: drawn.
        """
        count, _, height, width = x.shape
        if self.crop:
            top, left = (self._draw(2 * self.crop + 1, count, x, generator) for _ in range(2))
            rows = top[:, None] + torch.arange(height, device=x.device)
            columns = left[:, None] + torch.arange(width, device=x.device)
            x = take(pad(x, [self.crop] * 4), rows, columns)
        if self.cropshift:
            x = self._cropshift(x, generator)
        if self.scale < 1:
            x = simclr.resized_crop(x, simclr.draw_crops(x, self.scale, generator))
        if self.flip:
            if mirrored is None:
                mirrored = self._draw(2, count, x, generator).bool()
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if self.jitter or self.grey:
            x = simclr.augment(x, self.jitter, self.grey, generator)
        if self.policy != "none":
            x = (autoaugment if self.policy == "autoaugment" else color_shape)(x, generator)
        if self.cutout:
            starts = (self._draw(size, count, x, generator) - self.cutout // 2 for size in (height, width))
            edge = torch.full((count,), self.cutout, device=x.device)
            rows, columns = (covered(start, edge, s) for start, s in zip(starts, (height, width), strict=True))
            x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], GREY)
        if self.erase:
            x = self._erase(x, generator)
        return x.contiguous()

    def _cropshift(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Cut rows and columns off each image, at random edges, and move the rest to a random place on black."""
        count, sizes = len(x), x.shape[2:]
        total = self._draw(self.cropshift + 1, count, x, generator)
        rows = self._at_most(total, generator)
        source, kept = [], []
        for lost, size in zip((rows, total - rows), sizes, strict=True):
            lost = lost.clamp(max=size - 1)
            cut, place = self._at_most(lost, generator), self._at_most(lost, generator)
            position = torch.arange(size, device=x.device) - place[:, None]  # within the part that is kept
            kept.append(covered(place, size - lost, size))
            source.append((position + cut[:, None]).clamp(0, size - 1))
        return take(x, *source) * (kept[0][:, :, None] & kept[1][:, None, :])[:, None]

    def _erase(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Blacken a box of random area, shape and place in a share ``erase`` of the images; edges are cut to theirs."""
        height, width = x.shape[2:]
        chance, area, ratio, top, left = torch.rand(5, len(x), generator=generator, device=x.device)
        area = (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area) * height * width
        ratio = (math.log(ERASED_RATIO[0]) + math.log(ERASED_RATIO[1] / ERASED_RATIO[0]) * ratio).exp()
        inside = []
        for length, size, place in (((area * ratio).sqrt(), height, top), ((area / ratio).sqrt(), width, left)):
            edge = length.round().clamp(1, size)
            inside.append(covered((place * (size - edge + 1)).floor(), edge, size))
        box = inside[0][:, :, None] & inside[1][:, None, :] & (chance < self.erase)[:, None, None]
        return x.masked_fill(box[:, None], 0.0)

    @staticmethod
    def _at_most(limit: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one of 0 … ``limit`` for each image, int64 (B,)."""
        share = torch.rand(len(limit), generator=generator, device=limit.device)
        return (share * (limit + 1)).long().minimum(limit)

    @staticmethod
    def _draw(below: int, count: int, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(below, (count,), generator=generator, device=x.device)
