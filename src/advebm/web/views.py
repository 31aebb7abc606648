"""Turn tensors into pictures that are large enough for the page, and into figures."""

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

EDGE = 320  # approximate edge of a single image on the page, in pixels
PYPLOT_LOCK = threading.Lock()  # all threads share pyplot's state


def enlarge(x: Tensor, edge: int = EDGE) -> Image.Image:
    """Enlarge an image (C, H, W) in [0, 1], with pixels as squares, to an edge of about ``edge``."""
    picture = pictures.to_picture(to_bytes(x.cpu()))
    scale = max(1, round(edge / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def image_sheet(x: Tensor, columns: int = 10, width: int = 720) -> Image.Image:
    """Arrange images (N, C, H, W) in rows."""
    columns = min(columns, len(x))
    rows = pictures.rows_by_class(x.cpu(), torch.full((len(x),), -1), math.ceil(len(x) / columns), columns)
    return pictures.grid(rows, tile=width // max(columns, 5))


def film_sheet(x: Tensor, width: int = 720) -> Image.Image:
    """Arrange frames of chains (N, frames, C, H, W), a row per chain."""
    return pictures.grid(x.cpu(), tile=width // max(x.shape[1], 5))


def difference(before: Tensor, after: Tensor) -> tuple[Image.Image, float]:
    """Return the change of an image (C, H, W), grey for no change, and the factor by which it is amplified."""
    change = (after - before).cpu()
    factor = 0.5 / max(change.abs().max().item(), 1e-3)
    return enlarge((0.5 + factor * change).clamp(0, 1)), factor


@contextmanager
def figure(size: tuple[float, float] = (5.2, 3.2), **style: Any) -> Iterator[tuple[Figure, Axes]]:
    """Provide a figure and its axes to one thread at a time."""
    settings: Any = {**STYLE, **style}
    with PYPLOT_LOCK, plt.rc_context(settings):
        panel, axis = plt.subplots(figsize=size)
        try:
            yield panel, axis
        finally:
            plt.close(panel)


def to_picture(source: Figure | bytes) -> Image.Image:
    """Convert a figure, or a picture's encoded bytes, to an RGB image."""
    return Image.open(io.BytesIO(png(source) if isinstance(source, Figure) else source)).convert("RGB")


def descents(energies: Tensor, label: str) -> Image.Image:
    """Plot energies (steps, B) along chains: the first 20, and the mean of all."""
    with figure() as (panel, axis):
        for chain in energies.T[:20]:
            axis.plot(chain, color="#0f6fc6", alpha=0.25, lw=0.8)
        axis.plot(energies.mean(1), color="#0f6fc6", lw=2, label="mean")
        axis.set(xlabel="step", ylabel="nats", title=label)
        return to_picture(panel)


def beside(names: Sequence[str], before: Tensor, after: Tensor, title: str) -> Image.Image:
    """Plot probabilities (K,) before and after, of the 8 classes with the largest sum of both."""
    largest = (before + after).argsort(descending=True)[:8].sort().values
    with figure() as (panel, axis):
        position = np.arange(len(largest))
        axis.bar(position - 0.2, before[largest].numpy(), 0.4, label="before")
        axis.bar(position + 0.2, after[largest].numpy(), 0.4, label="after")
        axis.set_xticks(position, [names[k] for k in largest.tolist()], rotation=30 if max(map(len, names)) > 3 else 0)
        axis.set(ylim=(0, 1.02), title=title)
        axis.legend(frameon=False)
        return to_picture(panel)
