"""Page and picture of a leaderboard."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from advebm.attacks.base import ball_text
from advebm.core import files
from advebm.evaluation.leaderboard import OUTLIERS, TIMED, Leaderboard, Row
from advebm.reporting.figures import STYLE, png, show_images
from advebm.reporting.records import markdown
from advebm.sampling import generate

COLUMNS = 10  # classes that the picture shows a sample of, at most
BEST, OTHER = "#0f6fc6", "#6b7280"


def write(board: Leaderboard) -> None:
    """Write ``leaderboard.json``, ``leaderboard.md`` and, if a model has both numbers, ``leaderboard.png``."""
    picture = draw(board)
    if picture is not None:
        files.write(board.folder / "leaderboard.png", picture)
    files.write(board.folder / "leaderboard.md", page(board, pictured=picture is not None))
    files.write_json(board.folder / "leaderboard.json", board.describe())


def page(board: Leaderboard, *, pictured: bool) -> str:
    """Return the table, the picture, and how all of it was measured, in Markdown."""
    protocol, (data, trained, tested), here = board.protocol, board.images, board.environment
    attacked = min(protocol.images or tested, tested)
    which = "all" if attacked == tested else f"{attacked:,} (the same for every model)"
    sets = ", ".join(noise.name for noise in OUTLIERS)
    sampler, threat = protocol.sampler, ball_text(protocol.attack.eps, protocol.attack.norm)
    drawn = f"{generate.set_name(sampler).rpartition('-')[0]}, {sampler.steps} steps of {sampler.step_size:g}"
    lines = [
        f"- {data}: {tested:,} test images; clean accuracy on all, robust accuracy on {which}, under "
        f"{protocol.attack.name}, whatever a model was trained for.",
        f"- Samples: about {protocol.samples:,}, by {drawn}, from the same starts ({sampler.start}) for every model.",
        f"- FD (lower is better) and class score: in the features of `{protocol.features}`, FD from the {trained:,} "
        "training images. FD depends on judge and number: compare within this table.",
        f"- AUROC: E(x) tells up to {protocol.detection.count:,} test images from as many of {sets} noise; the lowest "
        "of these.",
        f"- s / {TIMED} drawn: seconds on {here['device']}, {here['threads']} thread(s).",
        f"- ± one standard error over images. Threat {threat}, tier `{protocol.tier}`, seed {protocol.seed}.",
        f"- {here['system']}, {here['cores']} cores, torch {here['torch']}, advebm {here['advebm']}, "
        f"{here['started'][:10]}.",
    ]
    picture = "![FD against robust accuracy](leaderboard.png)\n\n" if pictured else ""
    return f"# Leaderboard\n\n{markdown(*board.table())}\n\n{picture}## Protocol\n\n" + "\n".join(lines) + "\n"


def draw(board: Leaderboard) -> bytes | None:
    """Plot FD against robust accuracy, and show a sample of each class of each model; None if no model has both.

    Models that no other one beats in both are blue and joined by a line.
    """
    rows = [row for row in board.rows if {"robust", "FD"} <= row.numbers.keys()]
    if not rows:
        return None
    points = {row.title: (100 * row.numbers["robust"]["value"], row.numbers["FD"]["value"]) for row in rows}
    errors = {row.title: (100 * row.numbers["robust"]["error"], row.numbers["FD"]["error"]) for row in rows}
    best = undominated(points)
    with plt.rc_context(STYLE):
        size = (11.5, max(4.2, 0.9 + 0.5 * len(rows)))
        figure, (axis, beside) = plt.subplots(1, 2, figsize=size, width_ratios=(1, 1.05), layout="constrained")
        front = sorted(points[title] for title in best)
        axis.plot(*zip(*front, strict=True), color=BEST, lw=1, alpha=0.4, zorder=1)
        for title, (x, y) in points.items():
            color = BEST if title in best else OTHER
            dx, dy = (1.96 * error for error in errors[title])
            axis.errorbar(x, y, dy, dx, color=color, elinewidth=0.8, alpha=0.5, zorder=2)
            axis.plot(x, y, "o", ms=6.5, color=color, mec="white", mew=0.8, zorder=3)
        space = next(row.numbers["FD"] for row in rows)["name"].removeprefix("FD").strip(" ()")
        axis.set(xlabel=f"robust accuracy, % ({board.protocol.attack.name}), higher is better →")
        axis.set(ylabel=f"← lower is better, FD to real images ({space})")
        axis.set_title(f"Robust and generative: {len(rows)} models of {board.images[0]}", loc="left")
        axis.margins(0.16)
        _show_samples(beside, rows, best)
        figure.canvas.draw()
        label_points(axis, points, best)
        return png(figure, tight=False)


def undominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the titles of points (x, y) such that no other point has x at least as high and y at least as low."""
    beats = lambda p, q: p != q and p[0] >= q[0] and p[1] <= q[1]
    return [title for title, q in points.items() if not any(beats(p, q) for p in points.values())]


def label_points(axis: Axes, points: Mapping[str, tuple[float, float]], best: Sequence[str] = ()) -> list[Annotation]:
    """Write each title near its point, clear of other titles and points as far as there is room; return the texts."""
    pixel = axis.figure.dpi / 72
    frame = axis.get_window_extent()
    centres = {title: axis.transData.transform(point) for title, point in points.items()}
    taken = [Bbox.from_extents(*(c - 5 * pixel), *(c + 5 * pixel)) for c in centres.values()]
    directions = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    texts = []
    for title, point in points.items():
        text = axis.annotate(title, point, textcoords="offset points", fontsize=8, zorder=4)
        text.set_color(BEST if title in best else "#374151")
        options = []
        for distance, (right, up) in product((8, 16, 28, 42, 60), directions):
            _put(text, right, up, distance)
            box = text.get_window_extent()
            outside = box.width * box.height - _shared(box, frame)
            options.append((sum(_shared(box, other) for other in taken) + 2 * outside, distance, right, up))
        _, distance, right, up = min(options, key=lambda option: option[:2])
        _put(text, right, up, distance)
        if distance > 16:
            away = np.array([right, up]) * distance * pixel
            ends = axis.transData.inverted().transform([centres[title], centres[title] + 0.9 * away])
            axis.plot(*ends.T, color="#9ca3af", lw=0.6, zorder=1, scalex=False, scaley=False)
        taken.append(text.get_window_extent())
        texts.append(text)
    return texts


def _put(text: Annotation, right: int, up: int, distance: float) -> None:
    text.set_position((right * distance, up * distance))
    text.set(ha={1: "left", 0: "center", -1: "right"}[right], va={1: "bottom", 0: "center", -1: "top"}[up])


def _shared(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height


def _show_samples(axis: Axes, rows: Sequence[Row], best: Sequence[str]) -> None:
    """Show the first sample of each of the first classes, a line for each model."""
    lines = []
    for row in rows:
        assert row.samples is not None
        x, y, _ = generate.read_set(row.samples)
        firsts = [int((y == k).nonzero()[0]) for k in y.unique()[:COLUMNS]]
        lines.append(x[firsts] if len(firsts) > 1 else x[:COLUMNS])
    tiles = torch.stack(lines)
    show_images(axis, tiles, "The first sample of each class, not selected")
    height = axis.get_ylim()[0] / len(rows)
    axis.set_yticks([(i + 0.5) * height for i in range(len(rows))], [row.title for row in rows])
    axis.tick_params(length=0)
    axis.grid(False)
    axis.set_anchor("N")
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(BEST if row.title in best else "#374151")
