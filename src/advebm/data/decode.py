"""Encoded images -> one uint8 tensor: in parallel, once, cached under the hash of their content."""

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from advebm import files
from advebm.errors import UserError

Corrupt = Literal["refuse", "skip"]
SHOWN = 3  # names of bad images in a message


def decode(
    blobs: Sequence[bytes | Path], names: Sequence[str], *, channels: int, size: int | None, corrupt: Corrupt
) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (M, C, H, W) of the good images, and their positions (M,) among all.

    Args:
        blobs: encoded images, or files that hold one.
        names: what to call them in messages.
        channels: 3 or 1; images of another mode are converted.
        size: edge of the square that the middle of each image is cut and scaled to; None keeps images as they are,
            which then have to be square and of one size.
        corrupt: whether images that cannot be read are an error or left out with a warning.
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
    """uint8 (C, H, W) of one picture, cut to its middle square and scaled if ``size`` is given."""
    picture = picture.convert("RGB" if channels == 3 else "L")
    if size is not None and picture.size != (size, size):
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        middle = picture.crop((left, top, left + edge, top + edge))
        picture = middle.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def cached(content: Iterable[bytes], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` returns, kept on disk under the hash of ``content`` and read from there the next time.

    The folder is ``ADVEBM_CACHE``, else ``advebm`` in the user's cache folder.  A cache that cannot be written is done
    without, with a warning; one that is damaged is made anew.
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
        warnings.warn(f"decoded images are not cached: {files.unwritable(path, OSError(str(error)))}", stacklevel=2)
    return made


def cache_folder() -> Path:
    """Where decoded images are kept."""
    chosen = os.environ.get("ADVEBM_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "advebm"
