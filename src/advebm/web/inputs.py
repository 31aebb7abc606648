"""Check what visitors send: no input is trusted or executed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advebm.core.errors import UserError
from advebm.data.decode import GREY, open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # taken from visitors: few decoders, none of which decodes to open
MAX_FILE_BYTES = 10_000_000  # limit of an uploaded file
MAX_PIXELS = 20_000_000  # limit of an uploaded picture, checked before decoding
MAX_LAYERS = 4  # limit of brushed layers; the page itself uses one
MAX_LAYER_PIXELS = 4_000_000  # limit of pixels of a brushed layer, checked before decoding
MAX_LAYER_BYTES = 2_000_000
MIN_COVERAGE = 0.3  # share of a pixel that the brush must cover


def parse_number(value: Any, what: str, low: float, high: float) -> float:
    """Return ``value`` as a float; raise UserError if it is no number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{what} is a number from {low:g} to {high:g}, got {value!r}")
    if not low <= value <= high:  # also NaN
        raise UserError(f"{what} lies between {low:g} and {high:g}, got {value:g}")
    return float(value)


def parse_integer(value: Any, what: str, low: int, high: int) -> int:
    """Return ``value`` as an int; raise UserError if it is no whole number from ``low`` to ``high``."""
    number = parse_number(value, what, low, high)
    if number != int(number):
        raise UserError(f"{what} is a whole number, got {value:g}")
    return int(number)


def read_image(path: str | Path, shape: Sequence[int]) -> tuple[Tensor, str]:
    """Return an uploaded picture as an image (C, H, W) in [0, 1] of that shape, and a note on how it was changed.

    Raises:
        UserError: the file or picture is too large, of an unsupported format, or damaged.
    """
    if (size := Path(path).stat().st_size) > MAX_FILE_BYTES:
        raise UserError(f"the file has {size / 1e6:.1f} MB; at most {MAX_FILE_BYTES / 1e6:.0f} MB are taken")
    content, changes = Path(path).read_bytes(), []
    wide, high, grey = _read_header(content)
    if wide * high > MAX_PIXELS:
        raise UserError(
            f"the picture has more than {MAX_PIXELS / 1e6:.0f} megapixels, the most that are taken; scale it down"
        )
    x = open_image(content, shape, fit=True, name="the picture", formats=FORMATS)
    if grey != (shape[0] == 1):
        changes.append("grey, so all channels are alike" if grey else "colours made grey")
    if (high, wide) != tuple(shape[1:]):
        crop = "" if wide == high else ", its middle square"
        changes.append(f"{wide} x {high} pixels{crop} scaled to {shape[2]} x {shape[1]}")
    return x, "; ".join(changes) or "taken as it is"


def _read_header(content: bytes) -> tuple[int, int, bool]:
    """Return width, height and whether a picture is grey, without decoding it; zeros if it cannot be read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            return picture.width, picture.height, picture.mode in GREY
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return 2 * MAX_PIXELS, 1, False
    except (OSError, SyntaxError, ValueError, EOFError):
        return 0, 0, False


def read_layers(parts: Sequence[bytes | Path]) -> list[Image.Image]:
    """Return the brushed layers that a browser sent, as RGBA pictures.

    Raises:
        UserError: there are too many, or one is too large, of an unsupported format, or damaged.
    """
    if len(parts) > MAX_LAYERS:
        raise UserError(f"at most {MAX_LAYERS} brushed layers are taken, got {len(parts)}; clear them and brush again")
    layers = []
    for part in parts:
        content = part if isinstance(part, bytes) else part.read_bytes()
        wide, high, _ = _read_header(content)
        if wide * high > MAX_LAYER_PIXELS:
            raise UserError("a brushed layer is too large; clear it and brush again")
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                layers.append(picture.convert("RGBA"))
        except (OSError, SyntaxError, ValueError, EOFError):
            raise UserError("a brushed layer cannot be read; clear it and brush again") from None
    return layers


def to_tensor(picture: Image.Image) -> Tensor:
    """Return a picture (grey, RGB or RGBA) as (C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def read_strokes(layers: Sequence[Image.Image], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what was brushed over an image of ``shape``: colours (C, H, W) in [0, 1], and a bool mask (1, H, W).

    Raises:
        UserError: a layer has other proportions than the image.
    """
    channels, height, width = shape
    paint, coverage = torch.zeros(channels, height, width), torch.zeros(1, height, width)
    for layer in layers:
        if abs(layer.width * height - layer.height * width) > 2 * (height + width):
            sizes = f"{layer.width} x {layer.height} pixels, the image {width} x {height}"
            raise UserError(f"the brushed layer has {sizes}; clear it and brush again")
        rgba = to_tensor(layer.convert("RGBA").convert("RGBa").resize((width, height), Image.Resampling.BOX))
        colour, alpha = rgba[:3], rgba[3:]
        if channels != 3:
            colour = (colour * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, True)
        paint = colour + (1 - alpha) * paint
        coverage = alpha + (1 - alpha) * coverage
    brushed = coverage >= MIN_COVERAGE
    return torch.where(brushed, paint / coverage.clamp_min(1e-6), paint).clamp(0, 1), brushed
