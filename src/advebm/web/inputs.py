"""What people hand in, checked: nothing of it is trusted, and nothing of it is run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from advebm.errors import UserError

BYTES = 10_000_000  # of an uploaded file
PIXELS = 20_000_000  # of an uploaded picture, looked at before it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PAINTED = 0.3  # share of a pixel that the brush has to cover


def number(value: Any, what: str, low: float, high: float) -> float:
    """A number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{what} is a number from {low:g} to {high:g}, got {value!r}")
    if not low <= value <= high:
        raise UserError(f"{what} lies between {low:g} and {high:g}, got {value:g}")
    return float(value)


def whole(value: Any, what: str, low: int, high: int) -> int:
    """A whole number within bounds."""
    found = number(value, what, low, high)
    if found != int(found):
        raise UserError(f"{what} is a whole number, got {value:g}")
    return int(found)


def image(path: str | Path, shape: Sequence[int]) -> tuple[Tensor, str]:
    """An uploaded picture as an image (C, H, W) in [0, 1] for a model of that shape, and what was done to it.

    Raises:
        UserError: a file or a picture that is too large, of another format, or damaged.
    """
    path, done = Path(path), []
    if (size := path.stat().st_size) > BYTES:
        raise UserError(f"the file has {size / 1e6:.1f} MB; at most {BYTES / 1e6:.0f} MB are taken")
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if (count := opened.width * opened.height) > PIXELS:
                raise _too_large(count)
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(None) from None
    except UnidentifiedImageError:
        raise UserError(f"the file is no picture that can be read; {', '.join(FORMATS)} can") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"the picture is damaged ({type(error).__name__}); save it again as PNG") from None
    channels, height, width = shape
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        done.append("white behind what is transparent")
    grey = picture.mode in ("1", "L", "I", "I;16", "F", "LA")
    if picture.mode in ("I", "I;16", "F"):
        picture = _levels(picture)
    if channels == 3 and grey:
        done.append("grey, so all three channels are alike")
    if channels == 1 and not grey:
        done.append("colours made grey")
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (width, height):
        was, cut = f"{picture.width} x {picture.height} pixels", _middle(picture)
        done.append(f"{was}{', its middle square' * (cut.size != picture.size)} scaled to {width} x {height}")
        picture = cut.resize(
            (width, height), Image.Resampling.BOX if min(cut.size) > width else Image.Resampling.BICUBIC
        )
    return tensor(picture), "; ".join(done) or "taken as it is"


def tensor(picture: Image.Image) -> Tensor:
    """A grey or RGB picture as (C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def brushed(layers: Sequence[Image.Image], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What was brushed over an image of a shape: colours (C, H, W) in [0, 1], and where, bool (1, H, W).

    Raises:
        UserError: layers of other proportions than the image.
    """
    channels, height, width = shape
    paint, where = torch.zeros(channels, height, width), torch.zeros(1, height, width)
    for layer in layers:
        if abs(layer.width * height - layer.height * width) > 2 * (height + width):
            size = f"{layer.width} x {layer.height}"
            raise UserError(
                f"the brushed layer has {size} pixels, the image {width} x {height}; clear it and brush again"
            )
        rgba = tensor(layer.convert("RGBA").convert("RGBa").resize((width, height), Image.Resampling.BOX))
        alpha = rgba[3:]
        colour = (
            rgba[:3] if channels == 3 else (rgba[:3] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, True)
        )
        paint = colour + (1 - alpha) * paint
        where = alpha + (1 - alpha) * where
    over = where >= PAINTED
    return torch.where(over, paint / where.clamp_min(1e-6), paint).clamp(0, 1), over


def _middle(picture: Image.Image) -> Image.Image:
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    return picture.crop((left, top, left + edge, top + edge))


def _levels(picture: Image.Image) -> Image.Image:
    """More than 256 levels of grey, scaled to 256 by their range."""
    values = np.asarray(picture, dtype=np.float64)
    span = max(float(np.ptp(values)), 1e-12)
    return Image.fromarray(((values - values.min()) / span * 255).round().astype(np.uint8))


def _too_large(count: int | None) -> UserError:
    size = "" if count is None else f" of {count / 1e6:.0f} megapixels"
    return UserError(f"the picture{size} is too large; at most {PIXELS / 1e6:.0f} megapixels are taken: scale it down")
