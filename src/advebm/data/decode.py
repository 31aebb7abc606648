"""Decoding of image files to one uint8 tensor: in parallel, once, cached under the hash of their content."""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from advebm.core import files
from advebm.core.errors import UserError

Corrupt = Literal["refuse", "skip"]
SHOWN = 3  # number of bad images that a message names
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # accepted from users; some others run programs
LARGEST = 50_000_000  # pixels of a user's image, at most
GREY = ("1", "L", "LA", "La")  # modes without colour


def decode(
    blobs: Sequence[bytes | Path], names: Sequence[str], *, channels: int, size: int | None, corrupt: Corrupt
) -> tuple[Tensor, Tensor]:
    """Return the readable images as uint8 (M, C, H, W), and their indices (M,) in ``blobs``.

    Args:
        blobs: encoded images, or paths of image files.
        names: names of the images in messages.
        channels: 3 or 1; images of another mode are converted.
        size: edge of the square that the middle of each image is cut and scaled to; None keeps images as they are,
            which must then all have the same size.
        corrupt: whether unreadable images are an error or left out with a warning; it is an error if all are
            unreadable.
    """
    if not blobs:
        raise UserError("there are no images")

    def read(item: tuple[bytes | Path, str]) -> np.ndarray | str:
        blob, name = item
        try:
            with Image.open(io.BytesIO(blob) if isinstance(blob, bytes) else blob) as picture:
                return _pixels(picture, channels, size)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            return f"{name} ({type(error).__name__})"

    pixels: np.ndarray | None = None
    kept: list[int] = []
    bad: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for position, result in enumerate(pool.map(read, zip(blobs, names, strict=True))):
            if isinstance(result, str):
                bad.append(result)
                continue
            if pixels is None:
                pixels = np.empty((len(blobs), *result.shape), np.uint8)
            if result.shape != pixels.shape[1:]:
                raise UserError(
                    f"{names[position]} has {result.shape[2]} x {result.shape[1]} pixels, the images before it "
                    f"{pixels.shape[3]} x {pixels.shape[2]}; give one size with --data.size"
                )
            pixels[len(kept)] = result
            kept.append(position)
    if bad:
        what = f"{len(bad)} of {len(blobs)} images cannot be read: {', '.join(bad[:SHOWN])}{', …' * (len(bad) > SHOWN)}"
        if corrupt == "refuse" or pixels is None:
            raise UserError(f"{what}; leave such images out with --data.corrupt skip")
        warnings.warn(f"{what}; left out", stacklevel=2)
    assert pixels is not None
    return torch.from_numpy(pixels[: len(kept)]), torch.tensor(kept)


def _pixels(picture: Image.Image, channels: int, size: int | None) -> np.ndarray:
    """Return one picture as uint8 (C, H, W), cut to its middle square and scaled if ``size`` is given."""
    picture = picture.convert("RGB" if channels == 3 else "L")
    if size is not None and picture.size != (size, size):
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        middle = picture.crop((left, top, left + edge, top + edge))
        picture = middle.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def open_image(source: bytes | Path, shape: Sequence[int], *, fit: bool = False, name: str = "the image") -> Tensor:
    """Load a user's image as a model's input, float32 (C, H, W) in [0, 1].

    The image is rotated as its EXIF data say, transparent areas become white, and of an animation the first frame is
    used.

    Args:
        source: an encoded image, or the path of an image file, which is then its name in messages.
        shape: (C, H, W) of the model's images.
        fit: cut an image of another size to its middle square and scale it, and convert between grey and colour.
        name: the name in messages.

    Raises:
        UserError: not an image, a damaged one, over 50 million pixels or 8 bits per channel; without ``fit`` also
            another size or colour (a colour file that contains only greys is accepted as grey).
    """
    channels, height, width = shape
    with _opened(source, name) as (picture, name):
        grey = picture.mode in GREY
        if "A" in picture.getbands() or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        if not fit:
            _check_size(name, picture, (width, height))
            if grey != (channels == 1) and not _colourless(picture, channels):
                kinds = {1: "grey", 3: "colour"}
                raise UserError(
                    f"{name} is {'grey' if grey else 'in colour'}, the model takes {kinds[channels]} images; "
                    "convert it, or have it fitted (--fit)"
                )
        pixels = _pixels(picture, channels, width if fit else None)
    return torch.from_numpy(pixels.copy()).float() / 255


def open_mask(source: bytes | Path, size: tuple[int, int], *, fit: bool = False, name: str = "the mask") -> Tensor:
    """Load a user's mask as bool (H, W): true where its grey level is above 127; transparent areas are false.

    ``size`` is (H, W); with ``fit`` a mask of another size is cut to its middle square and scaled.
    """
    with _opened(source, name) as (picture, name):
        if not fit:
            _check_size(name, picture, (size[1], size[0]))
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer)
        pixels = _pixels(picture, 1, size[1] if fit else None)
    return torch.from_numpy(pixels[0] > 127)


@contextlib.contextmanager
def _opened(source: bytes | Path, name: str) -> Iterator[tuple[Image.Image, str]]:
    """Yield the first frame, decoded and upright, and its name; every failure is raised as UserError."""
    name = name if isinstance(source, bytes) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # LARGEST is the limit
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        with picture:
            if (count := picture.width * picture.height) > LARGEST:
                raise UserError(f"{name} has {count:,} pixels, the most is {LARGEST:,}; make it smaller")
            if picture.mode.startswith(("I", "F")):
                raise UserError(f"{name} has more than 8 bits a channel (mode {picture.mode}); save it with 8")
            picture.load()
            yield ImageOps.exif_transpose(picture), name
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no {name}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {LARGEST:,} pixels; make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{name} is not an image that can be read ({type(error).__name__}); is it whole?") from None


def _check_size(name: str, picture: Image.Image, wanted: tuple[int, int]) -> None:
    if picture.size != wanted:
        got, asked = (" x ".join(map(str, size)) for size in (picture.size, wanted))
        raise UserError(f"{name} has {got} pixels, there have to be {asked}; resize it, or have it fitted (--fit)")


def _colourless(picture: Image.Image, channels: int) -> bool:
    """Return whether grey is wanted and a colour picture contains only greys."""
    bands = np.asarray(picture.convert("RGB"))
    return channels == 1 and bool((bands == bands[..., :1]).all())


def cached(content: Iterable[bytes], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the result of ``make``, cached on disk under the hash of ``content``.

    The folder is ``ADVEBM_CACHE``, else ``advebm`` in the user's cache folder.  If the cache cannot be written, a
    warning is given; a damaged cache file is replaced.
    """
    digest = hashlib.sha256()
    for piece in content:
        digest.update(hashlib.sha256(piece).digest())
    path = cache_folder() / f"{digest.hexdigest()[:32]}.safetensors"
    try:
        return safetensors.load_file(path)
    except (OSError, SafetensorError):
        made = {name: value.contiguous() for name, value in make().items()}
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.save_file(made, draft)
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        warnings.warn(f"decoded images are not cached: {files.as_user_error(path, OSError(str(error)))}", stacklevel=2)
    return made


def cache_folder() -> Path:
    chosen = os.environ.get("ADVEBM_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advebm"
