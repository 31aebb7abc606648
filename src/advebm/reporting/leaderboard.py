"""Page and picture of a leaderboard."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from advebm.attacks.base import ball_text
from advebm.data import pictures
from advebm.evaluation.leaderboard import OUTLIERS, TIMED, Leaderboard, Row
from advebm.reporting.figures import STYLE, png, show_images
from advebm.reporting.pages import write_page
from advebm.sampling import generate

COLUMNS = 10  # classes that the picture shows a sample of, at most
BEST, OTHER, DARK = "#0f6fc6", "#6b7280", "#374151"
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))  # from a point to its title


def write(board: Leaderboard) -> None:
    """Write ``leaderboard.json``, ``leaderboard.md`` and, if a model has both numbers, ``leaderboard.png``."""
    write_page(board, "Leaderboard", draw(board), shows="FD against robust accuracy", lines=legend(board))


def legend(board: Leaderboard) -> list[str]:
    """Return lines that say how it was measured."""
    protocol, here = board.protocol, board.environment
    trained, tested = len(board.data.train), len(board.data.test)
    attacked = min(protocol.images or tested, tested)
    which = "all" if attacked == tested else f"{attacked:,} (the same for every model)"
    sets = ", ".join(noise.name for noise in OUTLIERS)
    sampler, threat = protocol.sampler, ball_text(protocol.attack.eps, protocol.attack.norm)
    drawn = f"{generate.set_name(sampler).rpartition('-')[0]}, {sampler.steps} steps of {sampler.step_size:g}"
    return [
        f"{board.data.name}: {tested:,} test images; clean accuracy on all, robust accuracy on {which}, under "
        f"{protocol.attack.name}, whatever a model was trained for.",
        f"Samples: about {protocol.samples:,}, by {drawn}, from the same starts ({sampler.start}) for every model.",
        f"FD (lower is better) and class score: in the features of `{protocol.features}`, FD from the {trained:,} "
        "training images. FD depends on judge and number: compare within this table.",
        f"AUROC: E(x) tells up to {protocol.detection.count:,} test images from as many of {sets} noise; the lowest "
        "of these.",
        f"s / {TIMED} drawn: seconds on {here['device']}, {here['threads']} thread(s).",
        f"± one standard error over images. Threat {threat}, tier `{protocol.tier}`, seed {protocol.seed}.",
    ]


def draw(board: Leaderboard) -> bytes | None:
    """Plot FD against robust accuracy, and show a sample of each class of each model; None if no model has both.

    Models that no other one beats in both are blue and joined by a line.  Bars are 1.96 standard errors.
    """
    rows = [row for row in board.rows if {"robust", "FD"} <= row.numbers.keys()]
    if not rows:
        return None
    points = {row.title: (100 * row.numbers["robust"]["value"], row.numbers["FD"]["value"]) for row in rows}
    bars = {row.title: (196 * row.numbers["robust"]["error"], 1.96 * row.numbers["FD"]["error"]) for row in rows}
    best = undominated(points)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11.5, max(4.4, 0.9 + 0.5 * len(rows))), layout="constrained")
        halves = figure.add_gridspec(1, 2, width_ratios=(1, 1.1), wspace=0.04)
        axis = figure.add_subplot(halves[0])
        axis.plot(*zip(*sorted(points[title] for title in best), strict=True), color=BEST, lw=1, alpha=0.35, zorder=1)
        for title, (x, y) in points.items():
            color, (dx, dy) = BEST if title in best else OTHER, bars[title]
            axis.errorbar(x, y, dy, dx, color=color, elinewidth=0.8, alpha=0.4, zorder=2)
            axis.plot(x, y, "o", ms=7, color=color, mec="white", mew=0.8, zorder=3)
        judge = board.protocol.features.rpartition("/")[2]
        axis.set(xlabel=f"robust accuracy, % ({board.protocol.attack.name}): higher is better →")
        axis.set(ylabel=f"FD of samples (judge: {judge})\n← lower is better")
        axis.set_title(f"{len(rows)} models of {board.data.name}: robust and generative", loc="left")
        axis.margins(0.16)
        axis.set(xlim=(max(axis.get_xlim()[0], -4), axis.get_xlim()[1]), ylim=(max(axis.get_ylim()[0], 0), None))
        _show_samples(figure, halves[1], rows, best, board.data.classes)
        figure.canvas.draw()
        figure.set_layout_engine("none")
        label_points(axis, points, bars, best)
        return png(figure, tight=False)


def undominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the titles of points (x, y) such that no other point has x at least as high and y at least as low."""
    beats = lambda p, q: p != q and p[0] >= q[0] and p[1] <= q[1]
    return [title for title, q in points.items() if not any(beats(p, q) for p in points.values())]


def label_points(
    axis: Axes,
    points: Mapping[str, tuple[float, float]],
    bars: Mapping[str, tuple[float, float]],
    best: Sequence[str] = (),
) -> list[Annotation]:
    """Write each title near its point, clear of other titles, points and error bars as far as there is room.

    Args:
        axis: plot, whose limits must not change any more.
        points: (x, y) by title.
        bars: half the lengths of the error bars in x and y.
        best: titles to be written in blue.
    """
    pixel, frame = axis.figure.dpi / 72, axis.get_window_extent()
    place = lambda x, y: axis.transData.transform((x, y))
    taken = []
    for title, (x, y) in points.items():
        (dx, dy), centre = bars[title], place(x, y)
        corners = [(centre - 5 * pixel, centre + 5 * pixel)]
        corners += [(place(x - dx, y) - 1, place(x + dx, y) + 1), (place(x, y - dy) - 1, place(x, y + dy) + 1)]
        taken += [Bbox([low, high]) for low, high in corners]
    texts: list[Annotation] = []
    for title, point in points.items():
        text = axis.annotate(title, point, (0, 0), textcoords="offset points", fontsize=8, zorder=4)
        text.set(color=BEST if title in best else DARK, path_effects=[withStroke(linewidth=2, foreground="white")])
        options = []
        for distance, (right, up) in product((6, 12, 20, 32, 48, 64), DIRECTIONS):
            _put(text, right, up, distance)
            box = text.get_window_extent()
            outside = box.width * box.height - _shared(box, frame)
            options.append((sum(_shared(box, other) for other in taken) + 2 * outside, distance, right, up))
        _, distance, right, up = min(options, key=lambda option: option[:2])
        _put(text, right, up, distance)
        if distance > 12:
            end = place(*point) + 0.9 * distance * pixel * np.array([right, up])
            line = axis.transData.inverted().transform([place(*point), end])
            axis.plot(*line.T, color=OTHER, lw=0.6, alpha=0.6, zorder=1, scalex=False, scaley=False)
        taken.append(text.get_window_extent())
        texts.append(text)
    return texts


def _put(text: Annotation, right: int, up: int, distance: float) -> None:
    text.set_position((right * distance, up * distance))
    text.set(ha={1: "left", 0: "center", -1: "right"}[right], va={1: "bottom", 0: "center", -1: "top"}[up])


def _shared(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height


def _show_samples(
    figure: Figure, place: SubplotSpec, rows: Sequence[Row], best: Sequence[str], classes: Sequence[str]
) -> None:
    """Show the first samples of each of the first classes; of few models more than one."""
    lines = max(1, 9 // len(rows))
    axes = place.subgridspec(len(rows), 1, hspace=0.03).subplots(squeeze=False)[:, 0]
    for axis, row in zip(axes, rows, strict=True):
        assert row.samples is not None
        x, y, _ = generate.read_set(row.samples)
        by_class = pictures.rows_by_class(x, y, min(COLUMNS, len(classes)), lines)
        show_images(axis, by_class.transpose(0, 1))
        axis.set_ylabel(
            row.title, rotation=0, ha="right", va="center", fontsize=8, color=BEST if row.title in best else DARK
        )
        axis.grid(False)
    names = classes[:COLUMNS]
    width = (axes[0].get_xlim()[1] + 0.5) / len(names)
    axes[0].set_xticks([(i + 0.3) * width for i in range(len(names))], names, fontsize=7, rotation=25, ha="left")
    axes[0].tick_params(top=False, bottom=False, labeltop=True, labelbottom=False, pad=1)
    axes[0].set_title(f"The first {lines if lines > 1 else 'sample'} of each class, not selected", loc="left")
