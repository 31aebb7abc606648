"""Page and learning curves of a speed-run."""

from collections.abc import Iterator

from matplotlib import pyplot as plt

from advebm.attacks.base import ball_text
from advebm.evaluation.speedrun import Entry, Speedrun
from advebm.reporting.figures import STYLE, png
from advebm.reporting.pages import write_page
from advebm.training.cost import images_in_whole_batches
from advebm.training.hardware import TERA

COLORS = ("#0f6fc6", "#d97706", "#059669", "#7c3aed", "#dc2626", "#6b7280")


def write(found: Speedrun) -> None:
    """Write ``speedrun.json``, ``speedrun.md`` and, if there are validations, ``speedrun.png``."""
    shows = "robust accuracy against FLOP of training"
    write_page(found, "Speed-run", draw(found), shows=shows, lines=legend(found))


def legend(found: Speedrun) -> list[str]:
    """Return lines that say what the columns of the table are."""
    seeds = max(len(entry.runs) for entry in found.entries)
    threats = dict.fromkeys(ball_text(e.recipe.threat.eps, e.recipe.threat.norm) for e in found.entries)
    lines = [
        f"{found.entries[0].runs[0].data.name}, test images; threat {', '.join(threats)}.",
        "TFLOP: of training, without validation. seconds: of training with its validations, on "
        + "; ".join(dict.fromkeys(m for entry in found.entries for m in entry.machines))
        + ".",
        "± one standard error over images"
        + ("; means of the seeds, sd their standard deviation." if seeds > 1 else "."),
    ]
    if any(quality for entry in found.entries for quality in entry.columns() if quality.samples):
        lines.append("FD (lower is better), class score, intended class and recall: of samples by the named sampler.")
    return lines


def draw(found: Speedrun) -> bytes | None:
    """Plot validated accuracy against FLOP of training, a line for each run; None if no run has two validations."""
    curves = [(i, curve) for i, entry in enumerate(found.entries) for curve in learning_curves(entry)]
    if not any(len(curve) > 1 for _, curve in curves):
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for axis, which, title in ((axes[0], 1, "under the threat"), (axes[1], 2, "clean")):
            named = set()
            for i, curve in curves:
                label = found.titles[i] if i not in named else None
                named.add(i)
                values = [100 * point[which] for point in curve]
                costs = [point[0] / TERA for point in curve]
                axis.plot(costs, values, "o-", ms=3.5, lw=1.3, color=COLORS[i % len(COLORS)], label=label)
            axis.set(xlabel="FLOP of training so far, 10¹²", ylabel="accuracy, %")
            axis.locator_params(axis="x", nbins=5)  # labels of short trainings are long
            axis.set_title(f"Validation images, {title}", loc="left")
        axes[0].legend(frameon=False, fontsize=8)
        return png(figure, tight=False)


def learning_curves(entry: Entry) -> Iterator[list[tuple[float, float, float]]]:
    """Yield (FLOP so far, robust accuracy, accuracy) at each validation of the last stage of each run.

    FLOP are spread evenly over the images of the stage, also where a search grows.
    """
    if not entry.stages or not entry.recipe.train.images:
        return
    before, share = sum(entry.stages[:-1]), entry.stages[-1] / images_in_whole_batches(entry.recipe)
    for run in entry.runs:
        lines = [line for line in run.history() if "val/robust_accuracy" in line and "val/accuracy" in line]
        yield [(before + share * line["images"], line["val/robust_accuracy"], line["val/accuracy"]) for line in lines]
