"""Steps of experiments: train, draw and measure what is missing, choose the number of sampling steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm import recipes
from advebm.attacks.projected import Attack
from advebm.core import config, console, files
from advebm.core.checks import device
from advebm.core.errors import Diverged, UserError
from advebm.evaluation import compare
from advebm.evaluation.compare import Records, Wanted
from advebm.runs.find_space import find_space
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.sampling.step_curve import Chains, CurvePoint, best_point
from advebm.workflows.sample import draw_set
from advebm.workflows.train import fit

say = console.screen.print
DIGITS_L2 = {"threat": {"norm": "l2", "eps": 0.9, "steps": 20}}  # for digits


def find_recipe(name: str, options: Sequence[tuple[str, Any]], **changes: Any) -> Recipe:
    """Return a recipe with changes, then ``options``, applied; ``__`` in the name of a change means a dot."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return resolve(recipes.find(name), [*pairs, *options])


def train_or_resume(recipe: Recipe, folder: Path) -> Run:
    """Train a recipe in a folder, or resume its run there, or return that run if it is finished or has diverged."""
    if not (folder / "config.yaml").is_file():
        return _fit(recipe, folder)
    run = Run.open(folder)
    if dataclasses.replace(run.recipe, init=None) != dataclasses.replace(recipe, init=None):
        raise UserError(f"{folder} holds a run of another recipe; choose another --out")
    return run if run.finished or (folder / "diverged").exists() else _fit(recipe, folder, resume=True)


def _fit(recipe: Recipe, folder: Path, *, resume: bool = False) -> Run:
    """Train; a run that diverges for good is kept at its last checkpoint and counts as a result."""
    try:
        return fit(recipe, folder, resume=resume)
    except Diverged as failure:
        say(f"  {recipe.name}: {failure}")
        files.write(folder / "diverged", str(failure))
        return Run.open(folder)


def draw_if_missing(run: Run, recipe: Recipe, per_class: int, name: str | None = None) -> str:
    """Draw a set of samples by the recipe's sampler unless it exists; return its name."""
    name = name or generate.set_name(recipe.sampler)
    if name not in run.samples():
        draw_set(run, name, recipe.sampler, per_class, seed=recipe.seed, device=device())
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


def measure_steps(run: Run, recipe: Recipe, judge: Run, chains: Chains, name: str = "") -> list[CurvePoint]:
    """Return the quality of a run's samples after each number of steps; kept in ``chains-SPLIT + name.json``."""
    about = {"chains": config.describe(chains), "sampler": config.describe(recipe.sampler)}
    about |= {"features": str(compare.feature_weights(judge.folder)), "checkpoint": run.checkpoints.path().name}
    file = run.folder / f"chains-{chains.split}{name}.json"
    saved = files.read_json(file, default={})
    if {k: saved.get(k) for k in about} != about:
        say(f"  {recipe.name}: samples after {', '.join(map(str, chains.steps))} steps")
        outside = recipe.outside.load() if recipe.outside is not None else None
        space = find_space(judge.folder).load(device())
        points = chains(run.model()[0].to(device()), recipe.sampler, run.data, space, outside=outside)
        saved = {**about, "points": [point._asdict() for point in points]}
        files.write_json(file, saved)
    return [CurvePoint(**point) for point in saved["points"]]


def with_best_steps(run: Run, recipe: Recipe, judge: Run, chains: Chains | None = None, name: str = "") -> Recipe:
    """Return the recipe with the number of sampling steps of least KID to the images of ``chains`` (validation)."""
    steps = best_point(measure_steps(run, recipe, judge, chains or Chains(), name)).steps
    return dataclasses.replace(recipe, sampler=dataclasses.replace(recipe.sampler, steps=steps))
