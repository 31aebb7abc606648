"""Page and picture of a sweep."""

import shlex
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from advebm.attacks.base import ball_text
from advebm.reporting.figures import STYLE, PlainLogFormatter, png
from advebm.reporting.pages import write_page
from advebm.training.hardware import TERA
from advebm.training.sweep import LOGGED, Row, Sweep, options_text, value_text

BEST, OTHER, FAILED = "#0f6fc6", "#6b7280", "#b91c1c"
MEANINGS = {
    "val/robust_accuracy": "accuracy under the threat",
    "val/accuracy": "accuracy",
    "val/adversarial_auroc": "AUROC, outside images attacked",
    "val/auroc": "AUROC of outside images",
    "val/robust_contrastive_accuracy": "contrastive accuracy under the threat",
    "val/contrastive_accuracy": "contrastive accuracy",
    "val/fd": "FD of samples, lower is better",
}
NOTE = (
    "The best of several is partly luck: its score here is too high on average. Measure it on test images, and compare "
    "it with others at several seeds."
)


def write(sweep: Sweep) -> None:
    """Write ``sweep.json``, ``sweep.md`` and, once there is a score, ``sweep.png``."""
    lines, advice = legend(sweep), advise(sweep)
    write_page(sweep, "Sweep", draw(sweep), shows="scores of all trials", lines=lines, advice=advice)


def legend(sweep: Sweep) -> list[str]:
    """Return lines that say what the columns of the table are."""
    recipe, seeds = sweep.rows[0].trials[0].recipe, len(sweep.rows[0].trials)
    names = [name for by in LOGGED for name in _names(sweep, by)]
    counts = sorted({row.count for row in sweep.rows})
    scored = "; ".join(f"{by}: {MEANINGS[name]}" for by in LOGGED for name in names if name in LOGGED[by])
    lines = [
        f"{recipe.name}, {' or '.join(f'{n:,}' for n in counts)} validation images, threat "
        f"{ball_text(recipe.threat.eps, recipe.threat.norm)}, PGD-{recipe.threat.steps}. {scored}.",
        "± one standard error over these images"
        + (f"; means of {seeds} seeds, sd their standard deviation." if seeds > 1 else "; one seed."),
        "TFLOP: of training, without validation; seconds: of a trial, one thread on the CPU.",
    ]
    if any(len(row.options) < len(sweep.varied) for row in sweep.rows):
        lines.append("An empty cell: as in the recipe.")
    if sweep.budget is not None:
        lines.append(f"Every trial of the last round trains for at most {sweep.budget:.3g} FLOP.")
    if any(row.rung for row in sweep.rows):
        lines.append("Successive halving: compare trials of one number of images; the longest are above.")
    return lines


def advise(sweep: Sweep) -> str:
    """Return, in Markdown, what to do with the best combination; nothing as long as there is none."""
    row = sweep.rows[0]
    if len(row.values(sweep.by)) < len(row.trials):
        return ""
    folder, config = (shlex.quote(str(path)) for path in (row.trials[0].folder, row.trials[0].folder / "config.yaml"))
    longer = f"advebm train --config {config} --train.images N   # longer"
    return f"{NOTE}\n\n```\nadvebm evaluate {folder}\n{longer}\n```"


def draw(sweep: Sweep) -> bytes | None:
    """Plot the score of each trial against the values of each option and, if they differ, its FLOP; None without any.

    Dots are trials of the last round, rings those of earlier rounds of successive halving.  The best combination is
    blue, and the band around its mean is 1.96 standard errors over validation images: dots within it may be as good.
    The line joins the best mean of each value.
    """
    rows = [row for row in sweep.rows if row.values(sweep.by)]
    if not rows:
        return None
    last = max(row.rung for row in rows)
    flops = [row.flops for row in rows if row.rung == last and row.flops is not None]
    options = [name for name in sweep.varied if len({str(row.options.get(name)) for row in sweep.rows}) > 1]
    panels = [
        *options,
        *([None] if max(flops, default=0) > 1.02 * min(flops, default=0) or last or not options else []),
    ]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            down,
            across,
            figsize=(1.4 + 2.7 * across, 0.6 + 2.9 * down),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, name in zip(axes.flat, panels, strict=False):
            _show_best(axis, sweep)
            if name is None:
                _against_flops(axis, sweep, rows, last)
            else:
                _against_values(axis, sweep, name, last)
        for line in axes:
            line[0].set_ylabel(_label(sweep))
        best = {short: rows[0].options[name] for name, short in sweep.varied.items() if name in rows[0].options}
        figure.suptitle(f"Best: {options_text(best)}", x=0.01, ha="left", fontsize=10, color=BEST)
        band = "; band: the best ± 1.96 standard errors" if rows[0].error(sweep.by) is not None else ""
        figure.supxlabel(
            f"a dot is a trial{', a ring one of an earlier round' * (last > 0)}{band}",
            x=0.01,
            ha="left",
            fontsize=8,
            color=OTHER,
        )
        return png(figure, tight=False)


def _names(sweep: Sweep, by: str) -> list[str]:
    """Return what is logged of a kind of score."""
    results = [result for row in sweep.rows for result in row.results.values()]
    return [name for name in LOGGED[by] if any(name in result.scores for result in results)]


def _scale(sweep: Sweep) -> int:
    return 100 if all(name.endswith("accuracy") for name in _names(sweep, sweep.by)) else 1


def _label(sweep: Sweep) -> str:
    name = _names(sweep, sweep.by)[0]
    return f"{MEANINGS[name]}{', %' * (_scale(sweep) == 100)}\n(validation images)"


def _show_best(axis: Axes, sweep: Sweep) -> None:
    """Show the mean of the best combination, and 1.96 standard errors around it."""
    row, scale = sweep.rows[0], _scale(sweep)
    if not (values := row.values(sweep.by)):
        return
    mean, error = statistics.fmean(values), row.error(sweep.by)
    axis.axhline(scale * mean, color=BEST, lw=0.8, alpha=0.5, zorder=1)
    if error:
        axis.axhspan(
            scale * (mean - 1.96 * error), scale * (mean + 1.96 * error), color=BEST, alpha=0.08, lw=0, zorder=0
        )


def _dots(axis: Axes, sweep: Sweep, row: Row, x: float, last: int) -> None:
    """Show the trials of a combination, one dot a seed; a cross at the bottom if a seed has no score but a fault."""
    best = row is sweep.rows[0]
    style: dict[str, Any] = {"color": BEST if best else OTHER, "zorder": 4 if best else 3, "ls": ""}
    style |= {"marker": "o", "ms": 8 if best else 6.5, "alpha": 1 if best else 0.75}
    style |= {"mec": "white", "mew": 0.8} if row.rung == last else {"mfc": "none", "mew": 0.9, "ms": 4, "alpha": 0.6}
    values = [_scale(sweep) * value for value in row.values(sweep.by)]
    axis.plot([x] * len(values), values, **style)
    if row.faults:
        bottom = axis.get_xaxis_transform()
        axis.plot(x, 0.03, "x", color=FAILED, ms=6, mew=1.5, transform=bottom, clip_on=False, zorder=5)


def _against_values(axis: Axes, sweep: Sweep, name: str, last: int) -> None:
    value_of = lambda row: value_text(row.options.get(name, "recipe's"))
    places = {value: place for place, value in enumerate(_in_order(map(value_of, sweep.rows)))}
    tops: dict[int, float] = {}
    for row in sweep.rows:
        place = places[value_of(row)]
        _dots(axis, sweep, row, place, last)
        if row.rung == last and len(found := row.values(sweep.by)) == len(row.trials):
            mean, better = _scale(sweep) * statistics.fmean(found), min if sweep.by == "fd" else max
            tops[place] = better(mean, tops.get(place, mean))
    axis.plot(sorted(tops), [tops[place] for place in sorted(tops)], color=OTHER, lw=0.8, alpha=0.5, zorder=2)
    texts = [_label_of(text, places) for text in places]
    slanted = sum(map(len, texts)) > 26
    axis.set_xticks(range(len(texts)), texts, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axis.set_xlim(-0.5, len(texts) - 0.5)
    axis.set_xlabel(sweep.varied[name])
    axis.grid(visible=False, axis="x")


def _label_of(value: str, others: Iterable[str]) -> str:
    """Shorten a long value to what comes before its options, if no other value begins so."""
    kind = value.partition(",")[0]
    if kind != value and sum(other.partition(",")[0] == kind for other in others) == 1:
        return f"{kind} …"
    return value if len(value) <= 14 else f"{value[:12]} …"


def _in_order(values: Iterable[str]) -> list[str]:
    """Return the different values: numbers by size, then all others by name."""

    def place(value: str) -> tuple[int, float, str]:
        above, slash, below = value.partition("/")
        try:
            return 0, float(above) / float(below) if slash else float(above), ""
        except ValueError:
            return 1, 0.0, value

    return sorted(set(values), key=place)


def _against_flops(axis: Axes, sweep: Sweep, rows: Sequence[Row], last: int) -> None:
    known = {id(row): row.flops / TERA for row in rows if row.flops is not None}
    if known and max(known.values()) > 3 * min(known.values()):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(PlainLogFormatter())
        axis.xaxis.set_minor_formatter(PlainLogFormatter(minor_thresholds=(1.5, 0.5)))
    for row in rows:
        if id(row) in known:
            _dots(axis, sweep, row, known[id(row)], last)
    axis.margins(x=0.12)
    axis.set_xlabel("TFLOP of training")
