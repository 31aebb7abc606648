"""Decoding of image files to one uint8 tensor, in parallel."""

import contextlib
import functools
import importlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from advebm.core import console
from advebm.core.errors import Notice, UserError

Corrupt = Literal["refuse", "skip"]
Progress = Callable[[int], None]  # called with the number of images done
SHOWN = 3  # number of bad images that a message names
# Formats that are read.  Pillow knows more, of which some run programs; AVIF and HEIF depend on how it was built and on
# the package pillow-heif.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "TGA")
LARGEST = 50_000_000  # pixels of a user's image, at most
LARGEST_IN_SET = 179_000_000  # pixels of an image of a set, at most
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "F")  # modes without colour
READER = b"3"  # changes whenever the same file gives other pixels, so that no old cache is read


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return those of ``FORMATS`` that this machine reads; HEIF needs the package pillow-heif."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes, such as ``.png``, of the formats that this machine reads."""
    formats = readable_formats()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(known | {".jfif", ".jpe", ".pnm"})


def decode(
    blobs: Sequence[bytes | Path],
    names: Sequence[str],
    *,
    channels: int,
    size: int | None,
    corrupt: Corrupt,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the readable images as uint8 (M, C, H, W), and their indices (M,) in ``blobs``.

    Each image is read as :func:`open_image` reads it: upright, in sRGB, over white, with 8 bits a channel.

    Args:
        blobs: encoded images, or paths of image files; an empty one cannot be read.
        names: names of the images in messages.
        channels: 3 or 1; images of another mode are converted.
        size: edge of the square that the middle of each image is cut and scaled to; None keeps images as they are,
            which must then all have the same size.
        corrupt: whether unreadable images are an error or left out with a warning; it is an error if all are
            unreadable.
        progress: called with the number of images done; None: lines with an estimate, where it takes seconds.
    """
    if not blobs:
        raise UserError("there are no images")

    def read(item: tuple[bytes | Path, str]) -> tuple[np.ndarray | str, set[str]]:
        try:
            with _opened(item[0], item[1], LARGEST_IN_SET) as (picture, remarks):
                return _pixels(_over(picture, "white"), channels, size), remarks
        except UserError as error:
            return str(error), set()

    pixels: np.ndarray | None = None
    kept: list[int] = []
    bad: list[str] = []
    remarked: Counter[str] = Counter()
    report = console.lines("images decoded", len(blobs)) if progress is None else contextlib.nullcontext(progress)
    with report as tell, _no_warnings_of_pillow(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for position, (result, remarks) in enumerate(pool.map(read, zip(blobs, names, strict=True))):
            tell(position + 1)
            remarked.update(remarks)
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
        what = f"{len(bad)} of {len(blobs)} images cannot be read: {'; '.join(bad[:SHOWN])}{'; …' * (len(bad) > SHOWN)}"
        if corrupt == "refuse" or pixels is None:
            raise UserError(f"{what}; leave such images out with --data.corrupt skip")
        warnings.warn(f"{what}; left out", stacklevel=2)
    for remark, count in remarked.items():
        warnings.warn(f"{count} of {len(blobs)} images: {remark}", Notice, stacklevel=2)
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


def open_image(
    source: bytes | Path,
    shape: Sequence[int],
    *,
    fit: bool = False,
    name: str = "the image",
    formats: tuple[str, ...] | None = None,
) -> Tensor:
    """Load a user's image as a model's input, float32 (C, H, W) in [0, 1].

    The image is rotated as its EXIF data say, converted to sRGB by its colour profile, and to 8 bits from 16 bits or
    floating point; transparent areas become white, and of an animation the first frame is used.

    Args:
        source: an encoded image, or the path of an image file, which is then its name in messages.
        shape: (C, H, W) of the model's images.
        fit: cut an image of another size to its middle square and scale it, and convert between grey and colour.
        name: the name in messages.
        formats: those that are read; None: all of :func:`readable_formats`.

    Raises:
        UserError: not an image, a damaged one, over 50 million pixels, or 32-bit pixels without a known white; without
            ``fit`` also another size or colour (a colour file that contains only greys is accepted as grey).
    """
    channels, height, width = shape
    if fit and height != width:
        raise UserError(
            f"images are cut to squares, and the model takes {width} x {height}; cut them and leave out fit"
        )
    name = name if isinstance(source, bytes) else str(source)
    with _opened(source, name, LARGEST, formats) as (picture, remarks):
        grey = picture.mode in GREY
        picture = _over(picture, "white")
        if not fit:
            _check_size(name, picture, (width, height))
            if grey != (channels == 1) and not _colourless(picture, channels):
                kinds = {1: "grey", 3: "colour"}
                raise UserError(
                    f"{name} is {'grey' if grey else 'in colour'}, the model takes {kinds[channels]} images; "
                    "convert it, or have it fitted (--fit)"
                )
        pixels = _pixels(picture, channels, width if fit else None)
    for remark in sorted(remarks):
        warnings.warn(f"{name}: {remark}", Notice, stacklevel=2)
    return torch.from_numpy(pixels.copy()).float() / 255


def open_mask(source: bytes | Path, size: tuple[int, int], *, fit: bool = False, name: str = "the mask") -> Tensor:
    """Load a user's mask as bool (H, W): true where its grey level is above 127; transparent areas are false.

    ``size`` is (H, W); with ``fit`` a mask of another size is cut to its middle square and scaled.
    """
    name = name if isinstance(source, bytes) else str(source)
    with _opened(source, name, LARGEST) as (picture, _):
        if not fit:
            _check_size(name, picture, (size[1], size[0]))
        pixels = _pixels(_over(picture, "black"), 1, size[1] if fit else None)
    return torch.from_numpy(pixels[0] > 127)


@contextlib.contextmanager
def _no_warnings_of_pillow() -> Iterator[None]:
    """Ignore warnings of large or slightly damaged files; not to be entered in threads, which share the filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _opened(
    source: bytes | Path, name: str, largest: int, formats: tuple[str, ...] | None = None
) -> Iterator[tuple[Image.Image, set[str]]]:
    """Yield the first frame, upright, in sRGB, with 8 bits a channel, and remarks; every failure is a UserError."""
    remarks: set[str] = set()
    if source == b"":
        raise UserError(f"{name} is empty")
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()  # Pillow maps some files wrongly
        with Image.open(io.BytesIO(content), formats=formats or readable_formats()) as picture:
            if (count := picture.width * picture.height) > largest:
                raise UserError(f"{name} has {count:,} pixels, the most is {largest:,}; make it smaller")
            if getattr(picture, "is_animated", False) and picture.format != "MPO":  # phones' photos are MPO
                remarks.add("an animation or a file of several pages, of which the first is used")
            picture.load()
            if picture.format == "PNG":
                _scale_key(picture, depth=content[24])
            profile = picture.info.get("icc_profile")
            levels = _in_bytes(picture, name)
            upright = ImageOps.exif_transpose(levels) if levels is picture else _turn(levels, picture)
            yield (_in_srgb(upright, profile, remarks) if profile else upright), remarks
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"there is no {name}") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder, not an image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {largest:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image of a kind that is read here; is it whole?") from None
    except Exception as error:  # damaged files can raise anything
        raise UserError(f"{name} is not an image that can be read ({type(error).__name__}); is it whole?") from None


def _scale_key(picture: Image.Image, depth: int) -> None:
    """Bring the colour that stands for transparency in a PNG file of ``depth`` bits to the 8 bits of its pixels."""
    key = picture.info.get("transparency")
    if isinstance(key, tuple) and depth == 16:
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and picture.mode == "L" and depth in (2, 4):
        picture.info["transparency"] = key * 255 // (2**depth - 1)


def _turn(picture: Image.Image, original: Image.Image) -> Image.Image:
    """Return the picture turned upright, as the EXIF data of the original say."""
    picture.info["exif"] = original.getexif().tobytes()
    return ImageOps.exif_transpose(picture)


def _in_bytes(picture: Image.Image, name: str) -> Image.Image:
    """Return a picture of more than 8 bits or floating-point pixels with 8 bits; black stays black and white white.

    Raises:
        UserError: the value of white is not known: of 32-bit whole numbers, signed ones, or floating point outside
            [0, 1].
    """
    tags = getattr(picture, "tag_v2", {})  # of TIFF: 258 bits, 262 whether 0 is white, 339 kind of numbers
    bits, kind = (tags.get(tag, (default,)) for tag, default in ((258, 16), (339, 1)))
    bits, kind = (value[0] if isinstance(value, tuple) else value for value in (bits, kind))
    if kind == 2:
        raise UserError(f"{name} has signed pixels: which value is white? save it with 8 or 16 bits, unsigned")
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "F":
        white = 1.0
        if not (values.min() >= 0 and values.max() <= 1):
            raise UserError(f"{name} has floating-point pixels outside [0, 1]: which is white? save it with 8 bits")
    elif picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM"):
        white = 2.0 ** (bits if picture.format == "TIFF" else 16) - 1
    else:
        raise UserError(f"{name} has 32-bit pixels: which value is white? save it with 8 or 16 bits")
    values = white - values if tags.get(262) == 0 else values
    grey = Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))
    if isinstance(key := picture.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(picture: Image.Image, profile: bytes, remarks: set[str]) -> Image.Image:
    """Return the picture converted from the colours of its ICC profile to sRGB; transparency stays."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        description = ImageCms.getProfileDescription(given).lower()
        if "srgb" in description and "linear" not in description:
            return picture
        modes = {"RGB": ("RGB", "RGBA", "P", "PA"), "GRAY": ("L", "LA"), "CMYK": ("CMYK",)}
        space = given.profile.xcolor_space.strip()
        if picture.mode not in modes.get(space, ()):
            return picture
        alpha = picture.convert("RGBA").getchannel("A") if has_alpha(picture) else None
        if space == "GRAY":
            opaque = picture.convert("L")
        else:
            opaque = picture if space == "CMYK" else picture.convert("RGBA").convert("RGB")
        converted = ImageCms.profileToProfile(opaque, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        remarks.add("a colour profile that cannot be read; taken as sRGB")
        return picture
    assert converted is not None
    converted = converted.convert("L") if space == "GRAY" else converted
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def has_alpha(picture: Image.Image) -> bool:
    """Return whether parts of a picture can be transparent, by an alpha channel or by a colour that stands for it."""
    return "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info


def _over(picture: Image.Image, background: str) -> Image.Image:
    """Return the picture with its transparent areas laid over a background of one colour."""
    if not has_alpha(picture):
        return picture
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)


def _check_size(name: str, picture: Image.Image, wanted: tuple[int, int]) -> None:
    if picture.size != wanted:
        got, asked = (" x ".join(map(str, size)) for size in (picture.size, wanted))
        raise UserError(f"{name} has {got} pixels, there have to be {asked}; resize it, or have it fitted (--fit)")


def _colourless(picture: Image.Image, channels: int) -> bool:
    """Return whether grey is wanted and a colour picture contains only greys."""
    bands = np.asarray(picture.convert("RGB"))
    return channels == 1 and bool((bands == bands[..., :1]).all())
