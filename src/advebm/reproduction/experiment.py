"""Experiments: recipes that are trained for each seed, and measurements of the trained runs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm.core import config
from advebm.core.errors import UserError
from advebm.evaluation import compare
from advebm.evaluation.compare import Records
from advebm.reproduction.study import draw_if_missing, say, train_or_resume
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run, share_images
from advebm.workflows.adopt import adopt

Results = dict[str, Records]  # by title, such as a method or a table row
Measure = Callable[[Mapping[str, Run]], Results]
Options = Sequence[tuple[str, Any]]  # of the command line, applied to every recipe of the experiment


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Recipes to train and how to measure their runs.

    Attributes:
        recipes: recipes by the label of their runs.
        measure: maps the trained runs of one seed, by label, to records by title; skips what is already measured.
        per_class: images of each class to draw from every run before measuring; 0: none.
        prepare: called once at the beginning, trains what the recipes need: a teacher, a judge.
        figures: maps results to PNG figures by title, for the report.
        conclude: maps results to lines to print.
    """

    recipes: Mapping[str, Recipe]
    measure: Measure
    per_class: int = 0
    prepare: Callable[[], object] = lambda: None
    figures: Callable[[Results], dict[str, bytes]] = lambda results: {}
    conclude: Callable[[Results], list[str]] = lambda results: []


def wrap(reference: str, recipe: Recipe, folder: Path) -> Run:
    """Return a run around a trained model, with a recipe's data, threat, sampler, precision and seed.

    See :func:`advebm.workflows.adopt.adopt`.
    """
    plain = config.describe(recipe)
    own = [(name, plain[name]) for name in ("name", "data", "threat", "sampler", "seed")]
    return adopt(reference, folder, [*own, ("train.precision", recipe.train.precision)])


def carry_out(
    experiment: Experiment, folder: Path, seeds: int, given: Mapping[str, str] | None = None
) -> tuple[Results, list[Run]]:
    """Train the recipes, draw from them and measure, for each seed; return the records and the first seed's runs.

    With several seeds the records hold means over seeds, with standard deviations as errors.

    Args:
        experiment: the experiment.
        folder: receives the runs.
        seeds: number of training seeds.
        given: references to trained models by the label of the recipe that they stand for, which is then not trained.
    """
    given = given or {}
    if unknown := given.keys() - experiment.recipes.keys():
        raise UserError(f"there is no {sorted(unknown)[0]!r} to stand for; there is {', '.join(experiment.recipes)}")
    experiment.prepare()
    results: list[Results] = []
    first_runs: list[Run] = []
    for seed in range(seeds):
        runs = {}
        for number, (label, recipe) in enumerate(experiment.recipes.items(), 1):
            say(f"[{number}/{len(experiment.recipes)}] {label}, seed {seed}")
            before = tuple(dataclasses.replace(stage, seed=seed) for stage in recipe.before)
            seeded = dataclasses.replace(recipe, name=label, seed=seed, before=before)
            run_folder = folder / f"seed-{seed}" / label
            runs[label] = (
                wrap(given[label], seeded, run_folder) if label in given else train_or_resume(seeded, run_folder)
            )
            share_images([*first_runs, *runs.values()])
            if experiment.per_class:
                draw_if_missing(runs[label], seeded, experiment.per_class)
        results.append(experiment.measure(runs))
        first_runs = first_runs or list(runs.values())
    return compare.over_seeds(results), first_runs
