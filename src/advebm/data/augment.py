"""Augmentation of a whole batch on its device, with a generator."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.data import simclr
from advebm.data.autoaugment import autoaugment

GREY = 0.5  # fill value of a cut-out square: the middle of the range, whatever the data's mean


@dataclass(frozen=True)
class Augment:
    """Random crops, horizontal flips, colour changes, a policy and a cut-out square, drawn for each image.

    They are applied in this order: that of Cubuk et al. (2019) for CIFAR (crop and flip, the policy, then cutout, so
    that no later operation moves or recolours the square), and that of SimCLR, whose settings on CIFAR-10 are ``scale:
    0.08, flip: true, jitter: 0.5, grey: 0.2`` (no blur).

    Attributes:
        crop: pixels of zero padding on each side, which is also the largest shift; 0 leaves images in place.
        scale: smallest share of the area that a random box keeps; the box, with sides of 3:4 to 4:3, is then enlarged
            to the whole size; 1: no box.
        flip: whether to mirror each image with probability 1/2.
        jitter: strength of colour changes, applied to 80 % of the images (Chen et al., 2020).  At 1: ± 80 % in
            brightness, contrast and saturation and ± 1/5 of a turn in hue, in random order; grey images only change in
            brightness and contrast.
        grey: share of images that are converted to grey.
        policy: ``autoaugment`` is the policy found on CIFAR-10 (Cubuk et al., 2019), for grey and RGB images.
        cutout: edge in pixels of one grey square (DeVries and Taylor, 2017) around a pixel drawn uniformly, so that it
            may extend beyond the border; 0: none.
    """

    crop: int = 0
    scale: float = 1.0
    flip: bool = False
    jitter: float = 0.0
    grey: float = 0.0
    policy: Literal["none", "autoaugment"] = "none"
    cutout: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.crop < 0:
            raise UserError(f"crop is a number of pixels >= 0, got {self.crop}")
        if not 0 < self.scale <= 1 or not 0 <= self.grey <= 1 or not self.jitter >= 0:
            got = f"{self.scale}, {self.grey} and {self.jitter}"
            raise UserError(f"scale is a share in (0, 1], grey one in [0, 1] and jitter a strength >= 0, got {got}")
        if self.jitter > 2.5:
            raise UserError(f"jitter must be at most 2.5, half a turn of the hue either way, got {self.jitter}")
        if self.cutout < 0:
            raise UserError(f"cutout is a number of pixels >= 0, got {self.cutout}")

    @property
    def cites(self) -> tuple[str, ...]:
        """Return the keys of ``citations.bib`` for the options in use."""
        named = {"cubuk2019": self.policy == "autoaugment", "devries2017": self.cutout > 0}
        named["chen2020"] = self.scale < 1 or self.jitter > 0 or self.grey > 0
        return tuple(key for key, used in named.items() if used)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``(B, C, H, W)`` in [0, 1] -> same shape and type; colours and policy round to multiples of 1/255."""
        count, _, height, width = x.shape
        if self.crop:
            top, left = (self._draw(2 * self.crop + 1, count, x, generator) for _ in range(2))
            rows = top[:, None] + torch.arange(height, device=x.device)
            columns = left[:, None] + torch.arange(width, device=x.device)
            batch = torch.arange(count, device=x.device)[:, None, None]
            padded = pad(x, [self.crop] * 4)
            x = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.scale < 1:
            x = simclr.resized_crop(x, simclr.draw_crops(x, self.scale, generator))
        if self.flip:
            mirrored = self._draw(2, count, x, generator).bool()
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if self.jitter or self.grey:
            x = simclr.augment(x, self.jitter, self.grey, generator)
        if self.policy == "autoaugment":
            x = autoaugment(x, generator)
        if self.cutout:
            rows, columns = (self._stretch(self._draw(size, count, x, generator), size) for size in (height, width))
            x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], GREY)
        return x.contiguous()

    def _stretch(self, centre: Tensor, size: int) -> Tensor:
        """Return which of ``size`` rows or columns the square covers; ``centre (B,)`` -> bool (B, size)."""
        offset = torch.arange(size, device=centre.device) - centre[:, None] + self.cutout // 2
        return (offset >= 0) & (offset < self.cutout)

    @staticmethod
    def _draw(below: int, count: int, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(below, (count,), generator=generator, device=x.device)
