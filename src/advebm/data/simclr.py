"""The augmentations of SimCLR (Chen et al., 2020) for a whole batch on its device: crops, colours, grey.

Random numbers are first drawn for every image, and then applied.  Colour operations work on uint8 and reproduce Pillow
exactly, except for rounding on a device that has no float64; crops are resampled in floating point, where Pillow rounds
to uint8 twice.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from advebm.core.errors import UserError
from advebm.core.floats import widen, widest
from advebm.core.rng import rand
from advebm.data.autoaugment import brightness, color, contrast, group_by_operation, luma

TRIES = 10  # draws of a crop, of which the first that fits is used
RATIO = 4 / 3  # largest ratio of a crop's sides
CHANCE = 0.8  # probability that an image's colours are changed
STRENGTHS = (0.8, 0.8, 0.8, 0.2)  # of brightness, contrast, saturation and hue at strength 1


class Crops(NamedTuple):
    """Crop boxes in pixels, int64 (B,) each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def draw_crops(x: Tensor, scale: float, generator: torch.Generator) -> Crops:
    """Draw a box per image of ``x (B, C, H, W)``: share of the area in [``scale``, 1], ratio of sides in [3/4, 4/3].

    Both are uniform, the ratio in its logarithm; if none of ten draws fits into the image, the box is the whole image.
    """
    count, (height, width) = len(x), x.shape[2:]
    uniform = lambda *shape: torch.rand(*shape, generator=generator, device=x.device, dtype=widest(x.device))
    area = height * width * (scale + (1 - scale) * uniform(count, TRIES))
    ratio = ((2 * uniform(count, TRIES) - 1) * math.log(RATIO)).exp()
    rows, columns = ((area * r).sqrt().round().long() for r in (1 / ratio, ratio))
    fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    first = fits.int().argmax(1, keepdim=True)
    rows, columns = (
        torch.where(fits.any(1), side.gather(1, first).squeeze(1), whole)
        for side, whole in ((rows, height), (columns, width))
    )
    top, left = ((uniform(count) * (whole - side + 1)).long() for side, whole in ((rows, height), (columns, width)))
    return Crops(top, left, rows, columns)


def resized_crop(x: Tensor, crops: Crops) -> Tensor:
    """Enlarge each box to the whole size, bilinearly.  ``x (B, C, H, W)`` -> the same shape.

    Pixels are squares around their centres; only those in the box have weight.
    """
    rows = _enlarge(crops.top, crops.height, x.shape[2]).to(x)
    columns = _enlarge(crops.left, crops.width, x.shape[3]).to(x)
    return rows[:, None] @ x @ columns[:, None].mT


def _enlarge(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return the weights (B, size, size) that resample the pixels ``start … start + length`` to ``size`` pixels."""
    pixel = torch.arange(size, device=start.device)
    start, length = start[:, None, None], length[:, None, None]
    centre = start + (pixel[:, None] + 0.5) * (length / size)
    weights = (1 - (pixel + 0.5 - centre).abs()).clamp(min=0) * ((pixel >= start) & (pixel < start + length))
    return weights / weights.sum(2, keepdim=True)


class Colours(NamedTuple):
    """The random colour changes of B images.

    Attributes:
        applied: bool (B,), whether an image is changed.
        order: int64 (B, 4), a permutation of the operations for each image.
        magnitude: (B, 4), factors of brightness, contrast and saturation, and the hue's shift in turns.
    """

    applied: Tensor
    order: Tensor
    magnitude: Tensor


def draw_colours(count: int, strength: float, generator: torch.Generator) -> Colours:
    """Draw factors in ``1 ± 0.8 strength`` (>= 0), hue shifts in ``± 0.2 strength`` and orders, for 8 in 10 images."""
    device, kind = generator.device, widest(generator.device)
    uniform = lambda *shape: torch.rand(*shape, generator=generator, device=device, dtype=kind)
    middle, span = _colour_ranges(device, kind)
    span = strength * span
    low = torch.where(middle > 0, (middle - span).clamp(min=0), -span)
    magnitude = low + (middle + span - low) * uniform(count, 4)
    return Colours(uniform(count) < CHANCE, uniform(count, 4).argsort(1), magnitude)


@functools.cache  # a copy to the device makes the host wait
def _colour_ranges(device: torch.device, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the middle and the half-width, at strength 1, of each operation's magnitudes, (4,) each."""
    middle, span = (torch.tensor(v, dtype=kind, device=device) for v in ((1, 1, 1, 0), STRENGTHS))
    return middle, span


def recolour(pixels: Tensor, colours: Colours) -> Tensor:
    """Change the colours of uint8 (B, C, H, W) -> the same; grey images only change in brightness and contrast."""
    pixels, operations = pixels.clone(), (brightness, contrast, color, hue)
    chosen = torch.where(colours.applied[:, None], colours.order, len(operations))
    for groups in group_by_operation(chosen, len(operations)):
        for number, (function, members) in enumerate(zip(operations, groups, strict=True)):
            if len(members):
                pixels[members] = function(pixels[members], colours.magnitude[members, number])
    return pixels


def hue(x: Tensor, magnitude: Tensor) -> Tensor:
    """Shift the hue by ``magnitude`` (B,) of a whole turn, in steps of 1/255, truncated; a grey image stays."""
    if x.shape[1] == 1:
        return x
    h, s, v = _hsv(x)
    return _rgb((h + (magnitude * 255).trunc().long()[:, None, None]) % 256, s, v)


def _hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation and value as integers in 0 … 255, (B, H, W) each, truncated as in Pillow."""
    red, green, blue = x.long().unbind(1)
    top, bottom = x.long().amax(1), x.long().amin(1)
    span = (top - bottom).clamp(min=1).float()
    r, g, b = (widen((top - channel).float() / span) for channel in (red, green, blue))
    sector = widen(torch.where(red == top, b - g, torch.where(green == top, 2 + r - b, 4 + g - r)).float())
    h = (widen(((sector / 6 + 1) % 1).float()) * 255).long()
    s = (widen((top - bottom).float() / top.clamp(min=1).float()) * 255).long()
    return torch.where(top > bottom, h, 0), torch.where(top > bottom, s, 0), top


def _rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Return uint8 (B, 3, H, W) for hue, saturation and value, rounded as in Pillow."""
    turn = widen(h.float() * 6 / 255)
    share, sector = widen(s.float()) / 255, turn.floor()
    inside = turn - sector
    p, q, t = ((v * (1 - share * part) + 0.5).floor().long() for part in (torch.ones_like(inside), inside, 1 - inside))
    cases = ((v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q))
    which = (sector.long() % 6)[:, None]
    made = torch.stack([torch.stack(case, 1) for case in cases], 0).gather(0, which.expand(-1, 3, -1, -1)[None])[0]
    return made.to(torch.uint8)


def greyed(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Return uint8 (B, C, H, W) with the ``chosen`` (B,) images converted to grey."""
    return torch.where(chosen[:, None, None, None], luma(pixels).to(torch.uint8), pixels)


def augment(x: Tensor, jitter: float, grey: float, generator: torch.Generator) -> Tensor:
    """Change colours, then convert a share ``grey`` of images to grey: (B, C, H, W) in [0, 1] -> the same, in 1/255.

    Raises:
        UserError: images that are neither grey nor RGB.
    """
    if x.shape[1] not in (1, 3):
        raise UserError(f"jitter and grey take grey or RGB images, 1 or 3 channels, got {x.shape[1]}")
    pixels = (x * 255).round().to(torch.uint8)
    if jitter:
        pixels = recolour(pixels, draw_colours(len(x), jitter, generator))
    if grey:
        pixels = greyed(pixels, rand(x[:, 0, 0, 0], generator) < grey)
    return pixels.to(x.dtype) / 255
