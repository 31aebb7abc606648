"""Carry out an experiment by name, on digits or CIFAR-10, or a table of the papers."""

from collections.abc import Callable, Mapping
from pathlib import Path

from advebm.core import files
from advebm.core.errors import UserError, unknown_name
from advebm.papers import inventory
from advebm.reporting.build import report
from advebm.reporting.terminal import print_runs, print_side_by_side
from advebm.reproduction import tables
from advebm.reproduction.applications import digits_applications, jeat_figure4
from advebm.reproduction.binary import binary_at_stability, digits_binary_at, digits_hybrids
from advebm.reproduction.experiment import Experiment, Options, carry_out
from advebm.reproduction.scales import SCALES
from advebm.reproduction.study import say
from advebm.reproduction.supervised import cem_claims, cem_gradients, digits_supervised, jeat_figure5
from advebm.reproduction.unsupervised import digits_unsupervised

EXPERIMENTS: dict[str, Callable[[Path, Options], Experiment]] = {
    "digits-supervised": digits_supervised,
    "jeat-figure4": jeat_figure4,
    "jeat-figure5": jeat_figure5,
    "cem-claims": cem_claims,
    "cem-gradients": cem_gradients,
    "digits-binary-at": digits_binary_at,
    "binary-at-stability": binary_at_stability,
    "digits-hybrids": digits_hybrids,
    "digits-unsupervised": digits_unsupervised,
    "digits-applications": digits_applications,
}
QUICK: dict[str, Options] = {
    "binary-at-stability": [("train.images", 4_800)],
    "digits-binary-at": [("train.images", 16_000), ("objective.curriculum.window", 400)],
    "digits-hybrids": [("train.images", 12_000)],
    "digits-unsupervised": [("train.images", 12_000)],
    "digits-applications": [("train.images", 12_000)],
    "cem-gradients": [("train.images", 16_384)],
}


def reproduce(
    name: str,
    folder: Path | None = None,
    *,
    scale: str | None = None,
    seeds: int = 1,
    quick: bool = False,
    options: Options = (),
    given: Mapping[str, str] | None = None,
) -> Path:
    """Carry out an experiment or a table; skip what an earlier call has already done in ``folder``.

    Args:
        name: an experiment of :data:`EXPERIMENTS` or, with ``scale``, a table of :func:`inventory.tables`.
        folder: receives a run for each recipe and seed, ``results.json``, ``report.html`` and, for a table, what
            :func:`advebm.reproduction.tables.write_table` writes.  None: ``runs/NAME``, ``runs/NAME-quick`` or, of a
            table, ``runs/NAME-SCALE``.
        scale: a table's scale, of :data:`advebm.reproduction.scales.SCALES`; None: ``name`` is an experiment.
        seeds: number of training seeds; several give means and standard deviations.
        quick: whether to train for less, as :data:`QUICK` says; the report's title states it.
        options: options of ``train``, applied to every recipe.
        given: references to trained models by the label of the run that they stand for, such as ``at``.

    Returns:
        The path of the report, or of a table's ``NAME-SCALE.json``.

    Raises:
        UserError: the name or scale is unknown, ``seeds`` is below 1, there is no quick form, ``folder`` is a run, a
            recipe does not take the options, or a given model does not fit.
    """
    check_name(name, scale, quick)
    folder = folder or _default_folder(name, scale, quick)
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    if (folder / "config.yaml").exists():
        whole = "experiment" if scale is None else "table"
        raise UserError(f"{folder} is a run; --out takes a folder for the whole {whole}")
    if scale is not None:
        say(f"{name}, scale {scale}: {SCALES[scale].about}")
        experiment = tables.at_scale(name, scale, folder, options)
    else:
        experiment = EXPERIMENTS[name](folder, [*(QUICK[name] if quick else ()), *options])
    results, runs = carry_out(experiment, folder, seeds, given)
    files.write_json(folder / "results.json", results)
    if scale is not None:
        return tables.write_table(name, scale, folder, results, runs, seeds=seeds, options=options, given=given)
    (print_runs if len(results) > 4 else print_side_by_side)(results)
    conclusions = experiment.conclude(results)
    for line in conclusions:
        say(line)
    title = f"{name} --quick: shorter training than the experiment's" if quick else name
    pngs = experiment.figures(results)
    return report(
        runs[0],
        beside=runs[1:],
        out=folder / "report.html",
        title=title,
        shown=pngs,
        sentence=" ".join(conclusions) or None,
    )


def _default_folder(name: str, scale: str | None, quick: bool) -> Path:
    if scale is not None:
        return Path("runs") / f"{inventory.find_table(name).runs or name}-{scale}"  # tables of the same runs share them
    return Path("runs") / f"{name}{'-quick' * quick}"


def check_name(name: str, scale: str | None, quick: bool) -> None:
    """Raise UserError if there is no such experiment, or no table at that scale, or no quick form of it."""
    if scale is not None:
        if quick:
            raise UserError("--quick is of experiments; a table has --scale alone")
        table = inventory.find_table(name)
        if scale not in SCALES:
            raise unknown_name("scale", scale, SCALES)
        table.images(scale)
        return
    if name in inventory.tables():
        scales = ", ".join(inventory.tables()[name].scales)
        raise UserError(f"{name} is a table; say how large with --scale, one of {scales}")
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, EXPERIMENTS)
    if quick and name not in QUICK:
        raise UserError(f"{name} has no quick form; {', '.join(QUICK)} have")
