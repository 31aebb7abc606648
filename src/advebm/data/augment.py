"""Augmentation of a whole batch on its device, with a generator."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from advebm.errors import UserError


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding, and horizontal flip, drawn for each image.

    Attributes:
        crop: pixels of padding on each side, which is also the largest shift; 0 leaves images in place.
        flip: whether half of the images are mirrored.
    """

    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise UserError(f"crop is a number of pixels >= 0, got {self.crop}")

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """``(B, C, H, W)`` -> the same shape and type."""
        count, _, height, width = x.shape
        if self.crop:
            top, left = (self._draw(2 * self.crop + 1, count, x, generator) for _ in range(2))
            rows = top[:, None] + torch.arange(height, device=x.device)
            columns = left[:, None] + torch.arange(width, device=x.device)
            batch = torch.arange(count, device=x.device)[:, None, None]
            padded = pad(x, [self.crop] * 4)
            x = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.flip:
            mirrored = self._draw(2, count, x, generator).bool()
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return x.contiguous()

    @staticmethod
    def _draw(below: int, count: int, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(below, (count,), generator=generator, device=x.device)
