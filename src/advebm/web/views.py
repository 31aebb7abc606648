"""Turn tensors into pictures that are large enough for the page, and into figures."""

import base64
import html
import io
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from advebm.data import pictures
from advebm.reporting.figures import STYLE, png
from advebm.sampling.generate import to_bytes

EDGE = 320  # approximate edge of a single image on the page, in pixels
LOSSLESS = 64  # largest edge of an image that tiles show without loss
CSS = """
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 10px 8px; }
.tiles figure { margin: 0; }
.tiles img { display: block; width: 100%; border-radius: 4px; image-rendering: pixelated; }
.tiles figcaption { margin-top: 2px; font-size: 13px; line-height: 1.3; text-align: center; overflow-wrap: anywhere; }
.numbers { overflow-x: auto; }
.numbers table { width: 100%; margin: 0; border-collapse: collapse; }
.numbers :is(table, tr, th, td) { border: 0 !important; text-align: left; }
.numbers :is(th, td) { padding: 6px 12px 6px 0 !important; border-bottom: 1px solid #8884 !important; }
@media (min-width: 900px) { .tiles { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); } }
"""
PYPLOT_LOCK = threading.Lock()  # all threads share pyplot's state


def enlarge(x: Tensor, edge: int = EDGE) -> Image.Image:
    """Enlarge an image (C, H, W) in [0, 1], with pixels as squares, to an edge of about ``edge``."""
    picture = pictures.to_picture(to_bytes(x.cpu()))
    scale = max(1, round(edge / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def tiles(x: Tensor, captions: Sequence[str]) -> str:
    """Return HTML that shows images (N, C, H, W) side by side, as many in a row as fit, each above its caption.

    An empty caption takes no place.  :data:`CSS` is the style.
    """
    parts = []
    for image, caption in zip(to_bytes(x.cpu()), captions, strict=True):
        words = html.escape(caption)
        below = f"<figcaption>{words}</figcaption>" if words else ""
        parts.append(f'<figure><img src="{_data_address(image)}" alt="{words or "image"}">{below}</figure>')
    return f'<div class="tiles">{"".join(parts)}</div>'


def _data_address(image: Tensor) -> str:
    """Return a ``data:`` address of an image, uint8 (C, H, W): PNG, or JPEG where that saves much."""
    picture, buffer = pictures.to_picture(image), io.BytesIO()
    kind = "PNG" if max(picture.size) <= LOSSLESS else "JPEG"
    picture.save(buffer, kind, quality=92)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts as HTML."""
    line = lambda cells, kind: f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
    body = "".join(line(cells, "td") for cells in rows)
    return f'<div class="numbers"><table>{line(head, "th")}{body}</table></div>'


def short(value: float) -> str:
    """Return a number with 3 digits; 0 for what is smaller than a thousandth."""
    return f"{value:.3g}" if abs(value) >= 1e-3 else "0"


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
