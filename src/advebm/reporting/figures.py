"""Figures of a report as PNG bytes, drawn from training histories and evaluation records."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from advebm.data import pictures
from advebm.metrics.keys import Key, key_of

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogFormatter, MultipleLocator, ScalarFormatter

History = Sequence[Mapping[str, Any]]
Records = Iterable[Mapping[str, Any]]

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.limits": (-9, 9),  # plain numbers on ticks, no powers of ten
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.25,
    "axes.prop_cycle": plt.cycler(color=["#0f6fc6", "#d9730d", "#2e8b57", "#a23b72", "#6b7280", "#c2a300"]),
}


def series(history: History, name: str) -> tuple[list[float], list[float]]:
    """Return numbers of images seen and the values of quantity ``name`` there."""
    points = [(line["images"], line[name]) for line in history if name in line]
    return [p[0] for p in points], [p[1] for p in points]


def _format_images_axis(axis: Axes, title: str) -> None:
    """Set the title and the x axis of a plot against images seen, with ticks such as 200k."""
    axis.set(xlabel="images seen", title=title)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


class PlainLogFormatter(LogFormatter):
    """Ticks of a logarithmic axis as plain numbers: 0.5, not 5 x 10^-1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def curves(history: History) -> bytes | None:
    """Plot loss, accuracies and energies against images seen; None if nothing was recorded."""
    panels = {
        "loss": {"train/loss": "objective"},
        "accuracy": {
            "train/accuracy": "training inputs",
            "val/accuracy": "validation, clean",
            "val/robust_accuracy": "validation, attacked",
            "val/auroc": "validation, AUROC",
            "val/adversarial_auroc": "validation, AUROC, attacked",
            "train/contrastive_accuracy": "training views",
            "val/contrastive_accuracy": "validation, clean",
            "val/robust_contrastive_accuracy": "validation, attacked",
        },
        "energy of training inputs (nats)": {
            "train/energy_joint": "E(x, y)",
            "train/energy_marginal": "E(x)",
            "train/energy_data": "E of data",
            "train/energy_negative": "E of negatives",
        },
        "FD of samples": {"val/fd": "to validation images"},
    }
    drawn = {title: [(label, n, *series(history, n)) for n, label in lines.items()] for title, lines in panels.items()}
    drawn = {title: kept for title, lines in drawn.items() if (kept := [line for line in lines if line[2]])}
    if not drawn:
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(drawn), figsize=(11 / 3 * len(drawn), 3), squeeze=False)
        for axis, (title, lines) in zip(axes.flat, drawn.items(), strict=True):
            for label, name, x, y in lines:
                axis.plot(x, y, label=label, marker="." if name.startswith("val") else None)
            _format_images_axis(axis, title)
            axis.legend(frameon=False)
            if title == "loss" and min(lines[0][3]) > 0:  # that of an energy may be negative
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(PlainLogFormatter())
                axis.yaxis.set_minor_formatter(PlainLogFormatter(minor_thresholds=(1.5, 0.5)))
            elif title == "accuracy":
                axis.set_ylim(0, 1.02)
        return png(figure)


def robustness(runs: Mapping[str, Records], threat: Mapping[str, Any]) -> bytes | None:
    """Plot accuracy against the attack's radius, one line for each run; None if no run was measured at two radii.

    ``threat`` is the attack of the threat model, as plain settings; records of attacks that differ from it in more than
    radius and step size are left out.  Clean accuracy is radius 0, and bars are 1.96 standard errors.
    """
    family = lambda attack: {k: v for k, v in attack.items() if k not in ("eps", "step_size")}
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.2, 3.2))
        for name, records in runs.items():
            points = {}
            for r in records:
                attack = r["settings"].get("attack", {**threat, "eps": 0.0})
                is_accuracy = key_of(r)._replace(attack=None) == Key("accuracy") and not r["settings"].get("targeted")
                if is_accuracy and family(attack) == family(threat):
                    points[attack["eps"]] = (r["value"], r["error"])
            if len(points) > 1:
                x = sorted(points)
                values, errors = [points[eps][0] for eps in x], [1.96 * points[eps][1] for eps in x]
                axis.errorbar(x, values, errors, label=name, marker=".", capsize=2)
        if not axis.has_data():
            plt.close(figure)
            return None
        axis.axvline(threat["eps"], color="#999999", lw=0.8, ls="--")
        axis.annotate("threat", (threat["eps"], 0.98), rotation=90, fontsize=7, color="#777777", ha="right", va="top")
        unit = ", in 1/255" if threat["norm"] == "linf" else ""
        axis.set(xlabel=f"{threat['norm']} radius of the attack{unit}", ylabel="accuracy", ylim=(0, 1.02))
        axis.set_xlim(0, None)
        if unit:
            step = next(2**k for k in range(9) if 255 * axis.get_xlim()[1] <= 8 * 2**k)
            axis.xaxis.set_major_locator(MultipleLocator(step / 255))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda eps, pos: f"{255 * eps:g}"))
        axis.legend(frameon=False)
        return png(figure)


def shifts(history: History, epoch: int) -> bytes | None:
    """Plot energy changes by the attack and by the update, JEAT eq. 15 and figure 3; None if none were recorded.

    Each point is the mean over the recorded batches of one epoch of ``epoch`` images; bars are the standard deviation
    over images.
    """
    lines = [line for line in history if "shift/attack_joint" in line]
    if not lines:
        return None
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["images"] - 1) // epoch, []).append(line)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(11, 3))
        for axis, (energy, label) in zip(axes, (("joint", "E(x, y)"), ("marginal", "E(x)")), strict=True):
            for change, symbol in (("attack", "Δx"), ("update", "Δθ")):
                name, centres, widths = f"shift/{change}_{energy}", [], []
                for group in groups.values():
                    centre = sum(line[name] for line in group) / len(group)
                    spread = sum(line[f"{name}_sd"] ** 2 + (line[name] - centre) ** 2 for line in group) / len(group)
                    centres.append(centre)
                    widths.append(spread**0.5)
                x = [e + 0.5 for e in groups]
                axis.errorbar(x, centres, widths, label=f"{symbol} {label}", marker=".", capsize=2, lw=1)
            axis.axhline(0, color="#999999", lw=0.8)
            axis.set(xlabel="epoch", ylabel="nats", title=f"change of {label} by attack (Δx) and update (Δθ)")
            axis.legend(frameon=False)
        return png(figure)


def moves(history: History) -> bytes | None:
    """Plot how far negatives move and could move, the critic's accuracy and gradient; None if this was not recorded.

    Binary-AT figure 2: when the critic wins, its accuracy is 1 and the negatives stop moving.
    """
    if not any("train/move" in line for line in history):
        return None
    panels = {
        "l2 move of negatives (pixels of [0, 1])": {"train/move": "mean move", "train/reach": "λK"},
        "critic": {"train/accuracy": "accuracy", "train/auroc": "AUROC against negatives"},
        "steps K": {"train/steps": "K"},
    }
    if any("train/r1" in line for line in history):
        panels["R1: ½ mean ‖∇f‖²"] = {"train/r1": "R1"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(11 / 3 * len(panels), 3))
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for name, label in lines.items():
                axis.plot(*series(history, name), label=label)
            _format_images_axis(axis, title)
            axis.legend(frameon=False)
        axes[1].set_ylim(0, 1.02)
        return png(figure)


def lines(
    groups: Mapping[str, Mapping[float, tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    *,
    log: bool = False,
    yscale: str = "linear",
) -> bytes:
    """Plot one line for each group of {x: (value, error)}, with bars of 1.96 errors; ``log``: x on a log2 axis."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.2, 3.2))
        for label, points in groups.items():
            x = sorted(points)
            values, errors = [points[k][0] for k in x], [1.96 * points[k][1] for k in x]
            axis.errorbar(x, values, errors, label=label, marker=".", capsize=2)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
        if log:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(ScalarFormatter())
        if any(groups):
            axis.legend(frameon=False, fontsize=7)
        return png(figure)


def bars(values: Mapping[str, tuple[float, float]], ylabel: str) -> bytes:
    """Plot one bar for each name, with an error bar of 1.96 errors."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(max(5.2, 0.6 * len(values)), 3.2))
        for number, (value, error) in enumerate(values.values()):
            axis.bar(number, value, yerr=1.96 * error, capsize=2, color="#0f6fc6")
        axis.set_xticks(range(len(values)), values, rotation=20, ha="right", fontsize=7)
        axis.set(ylabel=ylabel)
        return png(figure)


def energies(records: Records) -> bytes | None:
    """Plot histograms of E(x), one below the other, the first one in grey behind the others; None if there are none."""
    histograms = [r for r in records if r["series"].get("edges")]
    if not histograms:
        return None
    first = histograms[0]["series"]
    with plt.rc_context(STYLE):
        size = (5.2, 0.5 + 0.75 * len(histograms))
        figure, axes = plt.subplots(len(histograms), 1, figsize=size, sharex=True, squeeze=False)
        for number, (axis, r) in enumerate(zip(axes.flat, histograms, strict=True)):
            if number:
                axis.stairs(_scaled(first), first["edges"], fill=True, color="#d5dae1")
            axis.stairs(_scaled(r["series"]), r["series"]["edges"], fill=number == 0, lw=1.4)
            axis.set(yticks=[], ylim=(0, 1.1))
            axis.spines["left"].set_visible(False)
            axis.set_title(r["name"].removeprefix("E(x) of "), loc="left", fontsize=8, pad=2)
        axes[-1, 0].set_xlabel("E(x) in nats, lower = more like the training images")
        return png(figure)


def _scaled(series: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the heights of a histogram, the highest as 1."""
    highest = max(series["density"])
    return [height / highest for height in series["density"]]


def reliability(records: Records) -> bytes | None:
    """Plot accuracy against confidence, and the share of predictions in each bin; None without such records."""
    chosen = [r for r in records if key_of(r).quantity.startswith("ECE") and r["series"]]
    if not chosen:
        return None
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.2, 3.2))
        axis.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls="--")
        for r, label in zip(chosen, ("as trained", "temperature scaled"), strict=False):
            s, width = r["series"], 1 / r["settings"]["bins"]
            (line,) = axis.plot(s["confidence"], s["accuracy"], lw=0.8, label=f"{label}, ECE {r['value']:.3f}")
            axis.scatter(s["confidence"], s["accuracy"], [4 + 60 * share for share in s["share"]], line.get_color())
            axis.bar(s["lower"], s["share"], width, align="edge", color=line.get_color(), alpha=0.2)
        axis.set(xlabel="confidence", ylabel="accuracy; bars: share", xlim=(0, 1), ylim=(0, 1.02), title="calibration")
        axis.legend(frameon=False, fontsize=7)
        return png(figure)


def detection(records: Records) -> bytes | None:
    """Plot histograms of scores of test images and of outliers, clean and attacked; None without such records.

    There is a row for each set of outliers and a column for each score; with one score the sets are side by side.
    """
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for r in records:
        if (key := key_of(r)).quantity == "AUROC" and key.set is not None and r["series"]:
            panels.setdefault((r["settings"]["outliers"], r["settings"]["score"]), []).append(r)
    if not panels:
        return None
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    places = [(row, column) for row in rows for column in columns]
    across = len(columns) if len(columns) > 1 else min(3, len(rows))
    down = -(-len(places) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(down, across, figsize=(4.2 * across, 2.6 * down), squeeze=False)
        for axis in axes.flat[len(places) :]:
            axis.remove()
        for axis, panel in zip(axes.flat, places, strict=False):
            for i, r in enumerate(panels.get(panel, [])):
                s, label = r["series"], r["settings"].get("attack", panel[0])
                if i == 0:
                    axis.stairs(s["inside"], s["score"], label="test images", lw=1.4)
                axis.stairs(s["outside"], s["score"], label=f"{label}: AUROC {r['value']:.3f}", lw=1.4)
            axis.set(title=f"{panel[1]} · {panel[0]}", xlabel="score (high = out of distribution)", ylabel="density")
            axis.margins(y=0.4)  # for the legend
            axis.legend(frameon=False, fontsize=7, loc="upper left")
        return png(figure)


def grids(panels: Mapping[str, Tensor], texts: Mapping[str, Sequence[str]]) -> bytes:
    """Show grids of images (rows, columns, C, H, W) side by side, each below its name and above some lines of text."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        height = max(3 * rows.shape[0] / rows.shape[1] for rows in panels.values())
        height += 0.4 + 0.19 * max(map(len, texts.values()))
        figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), height), squeeze=False)
        for axis, (name, rows) in zip(axes.flat, panels.items(), strict=True):
            show_images(axis, rows, name)
            axis.set_xlabel("\n".join(texts[name]))
        return png(figure)


def show_images(axis: Axes, rows: Tensor, title: str = "") -> None:
    """Show images (rows, columns, C, H, W) without ticks and frame."""
    axis.imshow(np.asarray(pictures.grid(rows)), cmap="gray", vmin=0, vmax=255, interpolation="none")
    axis.set(xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)


def responses(curves: Mapping[str, Sequence[tuple[Any, float, float]]], name: str) -> bytes:
    """Plot best and median result of a search against each varied setting, from points (setting, best, median)."""
    with plt.rc_context(STYLE):
        count = max(1, len(curves))
        figure, axes = plt.subplots(1, count, figsize=(1.5 + 2.4 * count, 3.1), squeeze=False, sharey=True)
        for axis, (setting, points) in zip(axes.flat, curves.items(), strict=False):
            ticks = range(len(points))
            axis.plot(ticks, [best for _, best, _ in points], marker="o", label="best")
            axis.plot(ticks, [median for _, _, median in points], marker=".", ls="--", label="median")
            axis.set_xticks(ticks, ["none" if v is None else f"{v:g}" for v, _, _ in points])
            axis.set(xlabel=setting)
        axes[0, 0].set_ylabel(name.split(" ")[0])
        figure.suptitle(name)
        if curves:
            axes[0, 0].legend(frameon=False)
        return png(figure)


def png(figure: Figure, *, tight: bool = True) -> bytes:
    """Return a figure as the bytes of a PNG file and close it.  ``tight``: off if the figure sets its own layout."""
    buffer = io.BytesIO()
    if tight:
        figure.tight_layout()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()
