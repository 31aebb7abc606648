"""Train recipes from nothing, one after the other with the whole machine, and measure them on test images."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm import recipes
from advebm.core import console, files
from advebm.core.errors import UserError
from advebm.evaluation import compare
from advebm.evaluation.leaderboard import default_features, is_judge
from advebm.evaluation.speedrun import (
    QUALITIES,
    SAMPLERS,
    Entry,
    Speedrun,
    accuracies,
    find_tier,
    group_by_recipe,
)
from advebm.metrics.keys import Key
from advebm.metrics.quality import SampleQuality
from advebm.reporting import speedrun as pages
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run, environment
from advebm.training.cost import estimates
from advebm.workflows.devices import choose_device
from advebm.workflows.leaderboard import FAULTS
from advebm.workflows.sample import draw_set, is_drawn
from advebm.workflows.train import find_recipe, fit, train_or_resume

Overrides = Iterable[tuple[str, Any]]
ON_CPU = ("cifar10-at-20min", "cifar10-at-linf-20min")
ON_GPU = ("cifar10-speedrun-45", "cifar10-speedrun-48", "cifar10-speedrun-50")


def run_recipes(
    sources: Sequence[str],
    overrides: Overrides = (),
    *,
    out: Path,
    seeds: int = 1,
    tier: str = "standard",
    features: str | None = None,
    device: str | None = None,
) -> Speedrun:
    """Train each recipe with each seed in ``OUT/runs``, measure all on test images, and write a table and curves.

    Nothing that is finished is done again, so the same call goes on after any interruption.

    Args:
        sources: names of recipes, or folders of runs that were trained before; runs of one recipe are seeds of it.
            Empty: the recipes for this device, ``ON_CPU`` or ``ON_GPU``.
        overrides: options of all recipes, such as ``("data.path", DIR)``.
        out: folder of the runs, ``speedrun.json``, ``speedrun.md`` and ``speedrun.png``.
        seeds: number of seeds of each recipe.
        tier: how much is measured, see :data:`advebm.evaluation.speedrun.TIERS`.
        features: judge of the samples; None: the one that the package brings for the data, or else pixels.
        device: None: the best one available.

    Raises:
        UserError: an unknown recipe, option or tier, a folder that holds no finished run, or one with other runs; the
            same recipe and seed twice, or several data sets.
        Interrupted: Ctrl-C; what is trained and measured is saved.
    """
    find_tier(tier)
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, got {seeds}")
    device, overrides = choose_device(device), list(overrides)
    sources = sources or (ON_CPU if device == "cpu" else ON_GPU)
    given = [open_trained(where, overrides) for where in sources if where not in recipes.names()]
    named = [where for where in sources if where in recipes.names()]
    planned = [find_recipe(name, overrides, seed=seed) for name in named for seed in range(seeds)]
    group_by_recipe(given)  # refuses one seed twice, before the training
    to_read = {recipe.data for recipe in planned}  # once for all seeds
    if len(sets := {run.data.name for run in given} | {source.load().name for source in to_read}) > 1:
        raise UserError(f"a speed-run has one data set, and these have {' and '.join(sorted(sets))}")
    train = functools.partial(fit, device=device)
    with files.locked(out / ".lock", f"another speed-run is at work in {out}"):
        trained = []
        for number, recipe in enumerate(planned, 1):
            console.say(f"{recipe.name}, seed {recipe.seed}: training {number} of {len(planned)}")
            trained.append(train_or_resume(recipe, out / "runs" / f"{recipe.name}-seed-{recipe.seed}", train))
        groups = group_by_recipe(given + trained)
        entries = [Entry(runs[0].recipe, runs, stage_flops(runs[0].recipe)) for runs in groups]
        found = Speedrun(entries, tier, environment(torch.device(device)), out)
        pages.write(found)
        for entry in entries:
            for run in entry.runs:
                try:
                    entry.records[run.recipe.seed] = measure(run, tier, features, device)
                except FAULTS as error:
                    entry.faults[run.recipe.seed] = str(error)
                pages.write(found)
    return found


def open_trained(where: str, overrides: Overrides) -> Run:
    """Open a run that has ended; ``overrides`` may say where its images are.

    Raises:
        UserError: there is no run, or its training has not ended.
    """
    if not (Path(where) / "config.yaml").is_file():
        raise UserError(f"{where} is neither a recipe of the package nor a run's folder; see advebm list recipe")
    run = Run.open(Path(where)).with_images_at(overrides)
    if not (run.finished or run.stopped_early or run.diverged):
        raise UserError(f"the run {where} is not finished: advebm train --resume {where}")
    return run


def stage_flops(recipe: Recipe) -> list[float]:
    """Return the FLOP of training each stage, or nothing if counting fails, as it may for networks of users."""
    try:
        return [stage.training[1] for stage in estimates(recipe)]
    except Exception as error:
        console.say(f"{recipe.name}: its FLOP cannot be counted: {error}")
        return []


def measure(run: Run, tier: str, features: str | None, device: str) -> compare.Records:
    """Measure what the run does not hold yet; return its accuracies and, of the samples, :data:`QUALITIES`."""
    judge, samples = features or default_features(run.data), find_tier(tier).samples
    if samples and is_judge(run, judge):  # said now, not after the attacks
        raise UserError("it is the judge, so its samples are not judged; give --features")
    shown: dict[str, Any] = {"device": device, "bar": console.bar}
    shown["progress"] = lambda name: console.say(f"{run.recipe.name}, seed {run.recipe.seed}: {name}")
    records = compare.measure(run, accuracies(tier, run.recipe.threat), sets=(), **shown)
    for sampler in SAMPLERS if samples else ():
        name = f"speedrun-{type(sampler).__name__.lower()}"
        plan: dict[str, Any] = {"name": name, "sampler": sampler, "per_class": max(1, samples // len(run.data.classes))}
        if not is_drawn(run, **plan, device=device):
            draw_set(run, **plan, device=device)
        fd = Key("FD", samples=name, space=compare.space_name(judge))
        (found,) = compare.measure(run, {fd: SampleQuality()}, features=judge, sets=(name,), **shown)
        records += compare.records_beside(run, found, QUALITIES)
    return records
