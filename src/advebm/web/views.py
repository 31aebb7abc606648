"""Tensors as pictures that are large enough to be looked at, and figures."""

import io
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from advebm.data import pictures
from advebm.reporting.figures import STYLE, png
from advebm.sampling.generate import to_bytes

EDGE = 320  # of a single image on the page, about
_drawing = threading.Lock()  # pyplot's state is one for all threads


def enlarge(x: Tensor, edge: int = EDGE) -> Image.Image:
    """An image (C, H, W) in [0, 1], its pixels as squares."""
    pixels = to_bytes(x.cpu()).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    scale = max(1, round(edge / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def image_sheet(x: Tensor, columns: int = 10, width: int = 720) -> Image.Image:
    """Images (N, C, H, W) in rows."""
    columns = min(columns, len(x))
    rows = pictures.rows_by_class(x.cpu(), torch.full((len(x),), -1), math.ceil(len(x) / columns), columns)
    return pictures.grid(rows, tile=width // max(columns, 5))


def film_sheet(x: Tensor, width: int = 720) -> Image.Image:
    """Moments of chains (N, moments, C, H, W), a row a chain."""
    return pictures.grid(x.cpu(), tile=width // max(x.shape[1], 5))


def difference(before: Tensor, after: Tensor) -> tuple[Image.Image, float]:
    """What was added to an image (C, H, W), grey where nothing was, and by how much that is amplified."""
    change = (after - before).cpu()
    factor = 0.5 / max(change.abs().max().item(), 1e-3)
    return enlarge((0.5 + factor * change).clamp(0, 1)), factor


@contextmanager
def figure(
    columns: int = 1, size: tuple[float, float] = (5.2, 3.2), **style: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure to draw on, alone: by one thread at a time."""
    looks: Any = {**STYLE, **style}
    with _drawing, plt.rc_context(looks):
        drawn, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
        try:
            yield drawn, list(axes.flat)
        finally:
            plt.close(drawn)


@contextmanager
def alone() -> Iterator[None]:
    """For drawing functions of the package, which use pyplot."""
    with _drawing:
        yield


def to_picture(drawn: Figure | bytes) -> Image.Image:
    """What was drawn, as an image."""
    return Image.open(io.BytesIO(png(drawn) if isinstance(drawn, Figure) else drawn)).convert("RGB")


def descents(energies: Tensor, label: str) -> Image.Image:
    """Energies (steps, B) along chains: each, and their mean."""
    with figure() as (drawn, (axis,)):
        for one in energies.T[:20]:
            axis.plot(one, color="#0f6fc6", alpha=0.25, lw=0.8)
        axis.plot(energies.mean(1), color="#0f6fc6", lw=2, label="mean")
        axis.set(xlabel="step", ylabel="nats", title=label)
        return to_picture(drawn)


def beside(names: Sequence[str], before: Tensor, after: Tensor, title: str) -> Image.Image:
    """Probabilities (K,) before and after, of the classes that matter in either."""
    shown = (before + after).argsort(descending=True)[:8].sort().values
    with figure() as (drawn, (axis,)):
        place = np.arange(len(shown))
        axis.bar(place - 0.2, before[shown].numpy(), 0.4, label="before")
        axis.bar(place + 0.2, after[shown].numpy(), 0.4, label="after")
        axis.set_xticks(place, [names[k] for k in shown.tolist()], rotation=30 if max(map(len, names)) > 3 else 0)
        axis.set(ylim=(0, 1.02), title=title)
        axis.legend(frameon=False)
        return to_picture(drawn)
