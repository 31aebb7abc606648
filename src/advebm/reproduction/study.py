"""What all experiments share: train, draw and measure what is missing, over training seeds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm import recipes
from advebm.attacks.projected import Attack
from advebm.core import console, files
from advebm.core.checks import device
from advebm.core.errors import Diverged, UserError
from advebm.evaluation import compare
from advebm.evaluation.compare import Records, Wanted
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.workflows.sample import draw
from advebm.workflows.train import fit

Measure = Callable[[Mapping[str, Run]], dict[str, Records]]
Options = Sequence[tuple[str, Any]]  # of the command line: what every recipe of the experiment takes over
say = console.screen.print


def carry(recipe: Recipe, folder: Path) -> Run:
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


def drawn(run: Run, recipe: Recipe, per_class: int, name: str | None = None) -> str:
    """Draw a set of samples by the recipe's sampler, unless it is there; its name."""
    name = name or generate.set_name(recipe.sampler)
    if name not in run.samples():
        draw(run, name, recipe.sampler, per_class, seed=recipe.seed, device=device())
    return name


def study(
    folder: Path, seeds: int, entries: Mapping[str, Recipe], measure: Measure, *, per_class: int = 0
) -> tuple[dict[str, Records], list[Run]]:
    """Train recipes by label, draw from them and measure, for each seed; the records, and the first seed's runs."""
    found: list[dict[str, Records]] = []
    first: list[Run] = []
    for seed in range(seeds):
        runs = {}
        for number, (label, entry) in enumerate(entries.items(), 1):
            say(f"[{number}/{len(entries)}] {label}, seed {seed}")
            before = tuple(dataclasses.replace(stage, seed=seed) for stage in entry.before)
            seeded = dataclasses.replace(entry, name=label, seed=seed, before=before)
            runs[label] = carry(seeded, folder / f"seed-{seed}" / label)
            if per_class:
                drawn(runs[label], seeded, per_class)
        found.append(measure(runs))
        first = first or list(runs.values())
    return compare.over_seeds(found), first


def compared(judge: str, threat: Attack) -> Measure:
    """The comparison of all runs, in the features of one of them."""

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        tell = lambda text: say(f"  {text}")
        options: dict[str, Any] = {"features": runs[judge].folder, "device": device(), "progress": tell}
        return compare.compare(list(runs.values()), threat=threat, **options)

    return measure


def measured(run: Run, wanted: Wanted, features: str | Path | None = None) -> Records:
    """The records that metrics give; measured, in sight, unless they are there."""
    tell = lambda name: say(f"  {run.recipe.name}: {name}")
    return compare.measure(run, wanted, features=features, device=device(), progress=tell, bar=console.bar)


def recipe(name: str, options: Options, **changes: Any) -> Recipe:
    """A recipe of the package with changes, then the options of the command line."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return resolve(recipes.find(name), [*pairs, *options])


L2 = {"threat": {"norm": "l2", "eps": 0.9, "steps": 20}}
