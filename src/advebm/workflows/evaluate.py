"""Measure runs and models, with progress bars."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from advebm.attacks.base import ball_text
from advebm.attacks.projected import Attack
from advebm.core import config, console
from advebm.core.errors import UserError
from advebm.data.folders import read_folder
from advebm.evaluation import evaluate
from advebm.evaluation.suites import suite
from advebm.metrics.base import Record, SampleSet
from advebm.metrics.robustness import RobustAccuracy
from advebm.runs.find_model import trained_threat
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.workflows.devices import join_team


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
) -> list[Record]:
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


def threat_text(threat: Attack, trained: Attack | None) -> str:
    """Return the threat model that a number is measured under, and how it relates to what the model was trained for."""
    ours = ball_text(threat.eps, threat.norm)
    if trained is None:
        return f"{ours}; none is known of the training: set --threat.norm and --threat.eps"
    theirs = ball_text(trained.eps, trained.norm)
    return f"{ours}, as in training" if ours == theirs else f"{ours}; the model was trained for {theirs}"


def import_samples(run: Run, folder: Path) -> str:
    """Import the images of a folder as a sample set of a run; return its name, which is the folder's."""
    data, name = run.data, folder.resolve().name
    images = read_folder(folder, data.classes, data.shape)
    about = {"images": str(folder.resolve())}
    if name in run.samples() and generate.read_set(run.samples()[name]).manifest.get("images") != about["images"]:
        raise UserError(f"{run.folder} has samples called {name} already; rename {folder}")
    generate.write_set(run.folder / "samples" / name, SampleSet(images.float(), images.y, about), len(data.classes))
    return name
