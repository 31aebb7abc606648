"""Measure runs and models, with progress bars."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from advebm.attacks.base import ball_text
from advebm.attacks.projected import Attack
from advebm.core import config, console, files, notebook
from advebm.core.errors import UserError
from advebm.data import pictures
from advebm.data.folders import read_folder
from advebm.evaluation import compare, evaluate
from advebm.evaluation.suites import suite
from advebm.metrics.base import Records, SampleSet
from advebm.metrics.robustness import RobustAccuracy
from advebm.reporting.build import report
from advebm.reporting.records import pivot
from advebm.runs.find_model import trained_threat
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.workflows.devices import choose_device, join_team


def measure(
    run: Run,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    suite_name: str | None = None,
    tier: str = "standard",
    samples: Sequence[Path] = (),
    features: str | Path | None = None,
    checkpoint: str = "latest",
    seed: int = 0,
    device: str | None = None,
) -> Records:
    """Measure a run and its samples; return the records and append them to the run's ``metrics.json``.

    Args:
        run: trained run.
        overrides: options ``threat`` and ``metrics`` that replace the recipe's.
        suite_name: suite whose metrics replace the recipe's.
        tier: tier of the suite.
        samples: folders of images to judge as additional sample sets.
        features, checkpoint, seed, device: as for :func:`advebm.evaluation.evaluate.evaluate_run`.
    """
    recipe = resolve(config.describe(run.recipe), overrides)
    if suite_name:
        recipe = dataclasses.replace(recipe, metrics=suite(suite_name, recipe.threat, tier))
    team, device = join_team(device)
    for folder in samples if team.main else ():
        import_samples(run, folder)
    team.all_gather(None)  # wait until the samples are imported
    options: dict[str, Any] = {"features": features, "checkpoint": checkpoint, "seed": seed, "device": device}

    def progress(name: str) -> None:
        if name == RobustAccuracy.__name__:
            name += f" under {threat_text(recipe.threat, trained_threat(run.recipe))}"
        console.say(name)

    return evaluate.evaluate_run(run, recipe=recipe, team=team, **options, progress=progress, bar=console.bar)


class Comparison(NamedTuple):
    """Several runs, measured alike.

    Attributes:
        records: the records of each run, as ``metrics.json`` keeps them, by the run's title.
        report: path of the report.
    """

    records: dict[str, list[dict[str, Any]]]
    report: Path

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(self.records)}: {self.report}"

    def _repr_html_(self) -> str:
        return notebook.line(self) + notebook.table(*pivot(self.records).quantities_down())


def compare_runs(
    runs: Sequence[Run],
    threat: Attack | None = None,
    *,
    features: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
    replace: bool = False,
) -> Comparison:
    """Measure runs by :func:`advebm.evaluation.compare.compare` and write one report.

    Args:
        runs: trained runs on the same images.
        threat: threat model for all runs; None: the first run's.
        features, seed, device: as for :func:`measure`.
        out: file of the report; None: ``comparison.html``, ``comparison-2.html`` …
        replace: whether to replace the file if it is there.

    Raises:
        UserError: the runs have different test images, or ``out`` is there already.
    """
    path = files.new_path(out or Path("comparison.html"), named=out is not None, replace=replace)
    options: dict[str, Any] = {"features": features, "seed": seed, "device": choose_device(device)}
    records = compare.compare(runs, threat=threat, **options, progress=console.say, bar=console.bar)
    return Comparison(records, report(runs[0], beside=runs[1:], out=path, compared=records))


def threat_text(threat: Attack, trained: Attack | None) -> str:
    """Return the threat model that a number is measured under, and how it relates to what the model was trained for."""
    ours = ball_text(threat.eps, threat.norm)
    if trained is None:
        return f"{ours}; none is known of the training: set --threat.norm and --threat.eps"
    theirs = ball_text(trained.eps, trained.norm)
    return f"{ours}, as in training" if ours == theirs else f"{ours}; the model was trained for {theirs}"


def import_samples(run: Run, folder: Path) -> str:
    """Copy images into a run as one of its sample sets; return its name, which is the folder's.

    Args:
        run: the run.
        folder: a set that ``sample`` drew, from this or another run, or pictures as :func:`read_folder` takes them.

    Raises:
        UserError: the run has another set of that name, or the images are not of the size or classes of the run's data.
    """
    data, name, origin = run.data, folder.resolve().name, str(folder.resolve())
    if (kept := run.samples().get(name)) is not None:
        if str(kept.resolve()) == origin:
            return name
        if generate.read_set(kept).manifest.get("images") != origin:
            raise UserError(f"{run.folder} has samples called {name} already; rename {folder}")
    if (folder / "images.npz").exists():
        drawn = generate.read_set(folder)
        if drawn.x.shape[1:] != data.shape:
            what = pictures.size_text(tuple(drawn.x.shape[1:]))
            raise UserError(f"{folder} holds images of {what}, {data.name} has {pictures.size_text(data.shape)}")
        if (largest := int(drawn.y.max())) >= len(data.classes):
            what = f"{folder} holds images of class {largest}"
            raise UserError(f"{what}, and the {len(data.classes)} classes of {data.name} begin with 0")
        samples = drawn._replace(manifest={**drawn.manifest, "images": origin})
    else:
        images = read_folder(folder, data.classes, data.shape)
        samples = SampleSet(images.float(), images.y, {"images": origin})
    generate.write_set(run.folder / "samples" / name, samples, len(data.classes))
    return name
