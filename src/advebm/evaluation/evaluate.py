"""Evaluation of a subject or a run by metrics; records of a run are appended to its ``metrics.json``."""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from advebm.core import files, rng
from advebm.core.errors import UserError
from advebm.core.processes import ALONE, Team
from advebm.metrics.base import Bar, Metric, Record, Records, Subject, no_bar
from advebm.models.batching import batch_size_for
from advebm.models.precision import float32
from advebm.runs.find_space import feature_space, find_space
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.sampling import generate

OWN_FEATURES = "own features"  # name of the feature space of the run's own model


def evaluate(
    subject: Subject,
    metrics: Iterable[Metric],
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> Records:
    """Return the records of several metrics.  Each has its own random generator, so their order does not matter."""
    records = Records()
    for metric in metrics:
        name = type(metric).__name__
        if getattr(subject.model, "encoder", False) and not getattr(metric, "encoders", False):
            fix = "choose --metrics linear-probe,knn,sample-quality, or make a classifier of it by advebm probe"
            raise UserError(f"{name} reads logits, and the model is an encoder; {fix}")
        progress(name)
        with float32():
            records += metric(subject, rng.generator(seed, "evaluate", name, device=subject.device))
    return records


def evaluate_run(
    run: Run,
    *,
    recipe: Recipe | None = None,
    features: str | Path | None = None,
    checkpoint: str = "latest",
    seed: int = 0,
    device: str = "cpu",
    sets: Collection[str] | None = None,
    progress: Callable[[str], None] = lambda name: None,
    bar: Bar = no_bar,
    team: Team = ALONE,
) -> Records:
    """Evaluate a checkpoint and the samples of a run, append the records to its ``metrics.json``, and return them.

    Args:
        recipe: gives threat model and metrics; default: the run's own.
        features: feature space of sample quality, as :func:`find_space` reads it.  None: the features of the run's own
            model; records are then named ``own features``, and the results favour the model's own samples.
        checkpoint: ``latest``, ``best`` or a number of training images.
        sets: names of the sets of samples to evaluate.  None: all.
        progress: called with the name of each metric.
        bar: progress bar of attacks; an interrupted attack resumes from the run's folder ``verdicts``.
        team: processes that all call this function: they divide the images of attacks among them and each compute
            everything else; the main process writes the records.
    """
    recipe = recipe or run.recipe
    run.records()  # fail now, not after minutes, if the file is damaged
    path = run.checkpoints.path(checkpoint)
    model = run.model(path.name)[0].to(device)
    data = run.data
    chosen = {name: folder for name, folder in run.samples().items() if sets is None or name in sets}
    samples = {name: generate.read_set(folder) for name, folder in chosen.items()}
    chosen_space = None if features is None else find_space(features)
    space = feature_space(OWN_FEATURES, model) if chosen_space is None else chosen_space.load(device)
    options: dict[str, Any] = {"folder": run.folder / "verdicts", "bar": bar}
    options["batch"] = batch_size_for(data.shape, model)
    subject = Subject(model, data, data.test, recipe.threat, samples, space, team=team, **options)
    for name, sample_set in samples.items():
        if (origin := sample_set.manifest.get("checkpoint", path.name)) != path.name:
            warnings.warn(f"samples {name} were drawn from checkpoint {origin}, not {path.name}", stacklevel=2)
    own = (f"{run.folder.resolve()}@{path.name}", str(path.resolve()))
    records = Records()
    for metric in recipe.metrics:
        new: list[Record] = evaluate(subject, [metric], seed=seed, progress=progress)
        about = {"checkpoint": path.name, "split": "test", "seed": seed, "time": files.timestamp()}
        judge = None if chosen_space is None else chosen_space.judge
        if judge in own:  # the model under its own name, which favours its samples like OWN_FEATURES
            new = [
                dataclasses.replace(r, settings={**r.settings, "own_features": True}) if "space" in r.settings else r
                for r in new
            ]
        weights = {"judge": judge}
        if team.main:
            run.append([{**dataclasses.asdict(r), **about, **(weights if "space" in r.settings else {})} for r in new])
        records += new
    return records


def newest_records(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last record of each name, set of samples, attack and image count, in order of first appearance."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in records:
        identity = (record["name"], *(str(record["settings"].get(k)) for k in ("samples", "attack", "images")))
        newest[identity] = record
    return list(newest.values())
