"""Steps of experiments: train, draw and measure what is missing, choose the settings of samplers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm import recipes
from advebm.attacks.projected import Attack
from advebm.core import config, console
from advebm.core.checks import device
from advebm.evaluation import compare
from advebm.evaluation.compare import Records, Wanted
from advebm.models.inference import BackendName
from advebm.models.precision import usable_precision
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.sampling import generate
from advebm.sampling.tune import settings_grid
from advebm.workflows import train as workflow
from advebm.workflows.sample import draw_set, is_drawn, search_settings
from advebm.workflows.train import fit

say = console.screen.print
DIGITS_L2 = {"threat": {"norm": "l2", "eps": 0.9, "steps": 20}}  # for digits


def find_recipe(name: str, options: Sequence[tuple[str, Any]], **changes: Any) -> Recipe:
    """Return a recipe with changes, then ``options``, applied; ``__`` in the name of a change means a dot."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return resolve(recipes.find(name), [*pairs, *options])


def train_or_resume(recipe: Recipe, folder: Path) -> Run:
    """Do :func:`advebm.workflows.train.train_or_resume`, and say if the run has diverged."""
    run = workflow.train_or_resume(recipe, folder, fit)
    if run.diverged:
        say(f"  {recipe.name}: {run.diverged}")
    return run


def draw_if_missing(run: Run, recipe: Recipe, per_class: int, name: str | None = None) -> str:
    """Draw a set of samples by the recipe's sampler and seed unless that very set exists; return its name."""
    name = name or generate.set_name(recipe.sampler)
    options: dict[str, Any] = {"seed": recipe.seed, "device": device(), "backend": _backend(run)}
    if not is_drawn(run, name, recipe.sampler, per_class, **options):
        draw_set(run, name, recipe.sampler, per_class, **options)
    return name


def measure_missing(run: Run, wanted: Wanted, features: str | Path | None = None) -> Records:
    """Return the wanted records; measure those that the run does not have."""
    progress = lambda name: say(f"  {run.recipe.name}: {name}")
    return compare.measure(run, wanted, features=features, device=device(), progress=progress, bar=console.bar)


def compare_all(runs: Mapping[str, Run], judge_title: str, threat: Attack) -> dict[str, Records]:
    """Return the comparison of all runs under a threat, in the features of ``runs[judge_title]``."""
    progress = lambda text: say(f"  {text}")
    options: dict[str, Any] = {"features": runs[judge_title].folder, "device": device(), "progress": progress}
    return compare.compare(list(runs.values()), threat=threat, **options)


FACTORS = (0.5, 1.0, 2.0)  # step sizes that are tried, relative to that of the sampler
NOISES, BALLS = (0.0, 0.01), (None, 2.0)  # in pixels of [0, 1], and radii from the seed
STEPS = (4, 8, 16, 32)
COMMON_STEPS = 16  # samplers are also compared at this number of steps


def tune(run: Run, sampler: Sampler, features: str | Path, count: int = 250) -> dict[str, Sampler]:
    """Search step size, noise, ball and steps of a sampler for the lowest FD of ``count`` samples to validation images.

    The grid is the same for every sampler, relative to its step size, which methods of unit steps share.

    Returns:
        The best settings, under ``best``, and the best of :data:`COMMON_STEPS` steps, under ``common``.
    """
    values: dict[str, Sequence[Any]] = {"radius": BALLS, "steps": STEPS, "noise": sorted({*NOISES, sampler.noise})}
    values["step_size"] = [factor * sampler.step_size for factor in FACTORS]
    per_class = max(2, count // max(1, len(run.data.classes)))
    say(f"  {run.recipe.name}: settings of {generate.set_name(sampler)}")
    grid = settings_grid(sampler, values)
    options: dict[str, Any] = {"per_class": per_class, "device": device(), "backend": _backend(run)}
    trials, _ = search_settings(run, grid, features=features, by="FD", **options)
    common = next(trial for trial in trials if trial["sampler"]["steps"] == COMMON_STEPS)
    return {name: config.build(t["sampler"], "sampler") for name, t in (("best", trials[0]), ("common", common))}


def _backend(run: Run) -> BackendName:
    """Return how samples are computed: as the recipe trains, in bfloat16 where the device multiplies in it."""
    is_bfloat16 = usable_precision(run.recipe.train.precision, torch.device(device())) == "bfloat16"
    return "bf16" if is_bfloat16 else "auto"
