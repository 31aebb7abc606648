"""Steps of experiments: train, draw and measure what is missing, choose a number of sampling steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm import recipes
from advebm.attacks.projected import Attack
from advebm.core import config, console, files
from advebm.core.checks import device
from advebm.core.errors import Diverged, UserError
from advebm.evaluation import compare, evaluate
from advebm.evaluation.compare import Records, Wanted
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.sampling.step_curve import Chains, Point, best_point
from advebm.workflows.sample import draw_set
from advebm.workflows.train import fit

say = console.screen.print
L2 = {"threat": {"norm": "l2", "eps": 0.9, "steps": 20}}  # of digits


def find_recipe(name: str, options: Sequence[tuple[str, Any]], **changes: Any) -> Recipe:
    """A recipe of the package with changes, then the options of the command line; ``__`` in a change is a dot."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return resolve(recipes.find(name), [*pairs, *options])


def train_or_resume(recipe: Recipe, folder: Path) -> Run:
    """Train a recipe in a folder: from the beginning, from where it was, or not at all."""
    if not (folder / "config.yaml").is_file():
        return _fit(recipe, folder)
    run = Run.open(folder)
    if dataclasses.replace(run.recipe, init=None) != dataclasses.replace(recipe, init=None):
        raise UserError(f"{folder} holds a run of another recipe; choose another --out")
    return run if run.finished or (folder / "diverged").exists() else _fit(recipe, folder, resume=True)


def _fit(recipe: Recipe, folder: Path, *, resume: bool = False) -> Run:
    """Train; what diverges for good stays as it was at its last checkpoint, and is a result as well."""
    try:
        return fit(recipe, folder, resume=resume)
    except Diverged as failure:
        say(f"  {recipe.name}: {failure}")
        files.write(folder / "diverged", str(failure))
        return Run.open(folder)


def draw_if_missing(run: Run, recipe: Recipe, per_class: int, name: str | None = None) -> str:
    """Draw a set of samples by the recipe's sampler, unless it is there; its name."""
    name = name or generate.set_name(recipe.sampler)
    if name not in run.samples():
        draw_set(run, name, recipe.sampler, per_class, seed=recipe.seed, device=device())
    return name


def measure_missing(run: Run, wanted: Wanted, features: str | Path | None = None) -> Records:
    """The records that metrics give; measured, behind a progress bar, unless they are there."""
    tell = lambda name: say(f"  {run.recipe.name}: {name}")
    return compare.measure(run, wanted, features=features, device=device(), progress=tell, bar=console.bar)


def compare_all(runs: Mapping[str, Run], judge: str, threat: Attack) -> dict[str, Records]:
    """The comparison of all runs under a threat, in the features of the one that is called ``judge``."""
    tell = lambda text: say(f"  {text}")
    options: dict[str, Any] = {"features": runs[judge].folder, "device": device(), "progress": tell}
    return compare.compare(list(runs.values()), threat=threat, **options)


def measure_steps(run: Run, recipe: Recipe, judge: Run, chains: Chains, name: str = "") -> list[Point]:
    """What the samples of a run are worth after each number of steps; measured unless it is there, under the name."""
    about = {"chains": config.describe(chains), "sampler": config.describe(recipe.sampler)}
    about |= {"features": str(compare.feature_weights(judge.folder)), "checkpoint": run.checkpoints.path().name}
    file = run.folder / f"chains-{chains.split}{name}.json"
    known = files.read_json(file, default={})
    if {k: known.get(k) for k in about} != about:
        say(f"  {recipe.name}: samples after {', '.join(map(str, chains.steps))} steps")
        outside = recipe.outside.load() if recipe.outside is not None else None
        space = evaluate.find_space(judge.folder).load(device())
        points = chains(run.model()[0].to(device()), recipe.sampler, recipe.data.load(), space, outside=outside)
        known = {**about, "points": [point._asdict() for point in points]}
        files.write_json(file, known)
    return [Point(**point) for point in known["points"]]


def with_best_steps(run: Run, recipe: Recipe, judge: Run, chains: Chains | None = None, name: str = "") -> Recipe:
    """The recipe with as many steps of sampling as validation images like best."""
    steps = best_point(measure_steps(run, recipe, judge, chains or Chains(), name)).steps
    return dataclasses.replace(recipe, sampler=dataclasses.replace(recipe.sampler, steps=steps))
