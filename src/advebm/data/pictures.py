"""Grids of small images as PNG, and animations as GIF."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from advebm.core import files, notebook

GAP = 1  # pixels between tiles, before enlarging
GAP_GREY = 0.45  # grey level of the gaps


def grid(rows: Tensor, *, tile: int = 64) -> Image.Image:
    """Draw ``rows (R, N, C, H, W)`` in [0, 1] as R rows of N tiles, each enlarged to about ``tile`` pixels.

    Tiles are enlarged by a whole factor without smoothing, so pixels stay square and sharp.
    """
    row_count, column_count, channels, h, w = rows.shape
    canvas = torch.full((row_count * (h + GAP) + GAP, column_count * (w + GAP) + GAP, channels), GAP_GREY)
    for r in range(row_count):
        for n in range(column_count):
            top, left = GAP + r * (h + GAP), GAP + n * (w + GAP)
            canvas[top : top + h, left : left + w] = rows[r, n].permute(1, 2, 0)
    pixels = (canvas * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    scale = max(1, round(tile / max(h, w)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def rows_by_class(x: Tensor, y: Tensor, classes: int, columns: int = 10) -> Tensor:
    """Return the first ``columns`` images of each class, (classes, columns, C, H, W) in [0, 1]; missing ones are white.

    ``x`` is floating point in [0, 1] or uint8.  Unlabelled images, all y < 0, fill the rows in their order.
    """
    if len(y) and int(y.max()) < 0:
        y = torch.arange(len(y)) // columns
    scale = 255 if x.dtype == torch.uint8 else 1
    rows = torch.ones(classes, columns, *x.shape[1:])
    for k in range(classes):
        members = x[y == k][:columns]
        rows[k, : len(members)] = members.float() / scale
    return rows


def sheet(x: Tensor, columns: int = 10, *, tile: int = 64) -> Image.Image:
    """Draw images (N, C, H, W), uint8 or floating point in [0, 1], in rows of ``columns``, each about ``tile`` wide."""
    columns = max(1, min(columns, len(x)))
    rows = rows_by_class(x, torch.full((len(x),), -1), -(-len(x) // columns), columns)
    return grid(rows, tile=tile)


def preview(x: Tensor, y: Tensor, about: str) -> str:
    """Return HTML with ``about`` and the first ten images of each of the first ten classes; unlabelled: the first 50.

    ``x`` is uint8 or floating point (N, C, H, W), ``y`` int64 (N,); of images on disk only those shown are read.
    """
    if not len(x):
        return notebook.line(about)
    labels = y.unique().tolist()[:10]
    of_class = [(y == k).nonzero().squeeze(1)[: 50 if k < 0 else 10] for k in labels]
    shown = sheet(torch.cat([x[index] for index in of_class])) if -1 in labels else _class_rows(x, of_class)
    return notebook.line(about) + notebook.picture(encode_png(shown), about)


def _class_rows(x: Tensor, of_class: Sequence[Tensor]) -> Image.Image:
    """Draw a row of images for each class, with the numbers of its images."""
    numbers = torch.cat([torch.full((len(index),), k) for k, index in enumerate(of_class)])
    longest = max(map(len, of_class))
    return grid(rows_by_class(torch.cat([x[i] for i in of_class]), numbers, len(of_class), longest), tile=48)


def size_text(shape: Sequence[int]) -> str:
    """Return the shape (C, H, W) of an image as people write it: ``3 x 32 x 32``."""
    return " x ".join(map(str, shape))


def to_picture(x: Tensor) -> Image.Image:
    """Convert one image, uint8 (C, H, W), to a picture of the same size."""
    pixels = x.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if len(x) == 1 else pixels)


def encode_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def stack_pngs(parts: Sequence[bytes]) -> bytes:
    """Stack PNG files vertically into one."""
    drawn = [Image.open(io.BytesIO(part)).convert("RGB") for part in parts]
    canvas = Image.new("RGB", (max(p.width for p in drawn), sum(p.height for p in drawn)), "white")
    top = 0
    for part in drawn:
        canvas.paste(part, ((canvas.width - part.width) // 2, top))
        top += part.height
    return encode_png(canvas)


def encode_gif(frames: Sequence[Image.Image], milliseconds: int = 120) -> bytes:
    """Return a GIF file of an endless animation that pauses on its last frame for two seconds."""
    buffer = io.BytesIO()
    times = [milliseconds] * (len(frames) - 1) + [2_000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=list(frames[1:]), duration=times, loop=0)
    return buffer.getvalue()


def animate(film: Tensor, *, tile: int = 40) -> bytes:
    """Return a GIF file with F frames of ``film (N, F, C, H, W)`` in [0, 1], which shows N images side by side."""
    return encode_gif([grid(frame[None], tile=tile) for frame in film.unbind(1)])


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG file in one step."""
    files.write(path, encode_png(picture))
