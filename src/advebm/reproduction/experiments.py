"""The experiments by name, and how one is carried out."""

from collections.abc import Callable, Mapping
from pathlib import Path

from advebm.core import files
from advebm.core.errors import UserError, unknown
from advebm.evaluation.compare import Records
from advebm.reporting.build import report
from advebm.reporting.terminal import one_a_line, side_by_side
from advebm.reproduction.applications import digits_applications, jeat_figure4
from advebm.reproduction.binary import binary_at_figures, binary_at_table4, digits_binary_at, digits_hybrids
from advebm.reproduction.study import Options, say
from advebm.reproduction.supervised import cem_claims, digits_supervised, jeat_figure5, jeat_table1
from advebm.reproduction.unsupervised import digits_unsupervised, unsupervised_figures, winners
from advebm.runs.run import Run


def reproduce(name: str, folder: Path, *, seeds: int = 1, quick: bool = False, options: Options = ()) -> Path:
    """Carry an experiment out, or on where it was; what is there already is not done again.

    Args:
        name: of :data:`EXPERIMENTS`.
        folder: gets a run's folder for each recipe and seed, ``results.json`` and ``report.html``.
        seeds: how many training seeds; tables then give mean and deviation over them.
        quick: with the shorter training of :data:`QUICK`; the report says so.
        options: as on the command line of ``train``, for every recipe.

    Returns:
        The report.

    Raises:
        UserError: an unknown name, no quick form, or options that a recipe does not take.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    if seeds < 1:
        raise UserError(f"seeds is at least 1, got {seeds}")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; --out takes a folder for the whole experiment")
    if quick and name not in QUICK:
        raise UserError(f"{name} has no quick form; {', '.join(QUICK)} have")
    if quick:
        name_shown, options = f"{name} --quick: shorter training than the experiment's", [*QUICK[name], *options]
    else:
        name_shown = name
    results, runs = EXPERIMENTS[name](folder, seeds, options)
    files.write_json(folder / "results.json", results)
    (one_a_line if len(results) > 4 else side_by_side)(results)
    for line in CONCLUSIONS[name](results) if name in CONCLUSIONS else ():
        say(line)
    drawn = FIGURES[name](results) if name in FIGURES else {}
    return report(runs[0], beside=runs[1:], out=folder / "report.html", title=name_shown, shown=drawn)


EXPERIMENTS: dict[str, Callable[[Path, int, Options], tuple[dict[str, Records], list[Run]]]] = {
    "digits-supervised": digits_supervised,
    "jeat-table1": jeat_table1,
    "jeat-figure4": jeat_figure4,
    "jeat-figure5": jeat_figure5,
    "cem-claims": cem_claims,
    "digits-binary-at": digits_binary_at,
    "digits-hybrids": digits_hybrids,
    "digits-unsupervised": digits_unsupervised,
    "binary-at-table4": binary_at_table4,
    "digits-applications": digits_applications,
}
FIGURES: dict[str, Callable[[Mapping[str, Records]], dict[str, bytes]]] = {
    "digits-binary-at": binary_at_figures,
    "digits-unsupervised": unsupervised_figures,
}
CONCLUSIONS: dict[str, Callable[[Mapping[str, Records]], list[str]]] = {"digits-unsupervised": winners}
QUICK: dict[str, Options] = {
    "digits-binary-at": [("train.images", 16_000), ("objective.curriculum.window", 400)],
    "digits-hybrids": [("train.images", 12_000)],
    "digits-unsupervised": [("train.images", 12_000)],
    "digits-applications": [("train.images", 12_000)],
}
