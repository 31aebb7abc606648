"""Experiments: recipes that are trained for each seed, and measurements of the trained runs."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm.evaluation import compare
from advebm.evaluation.compare import Records
from advebm.reproduction.study import draw_if_missing, say, train_or_resume
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run, share_images

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


def carry_out(experiment: Experiment, folder: Path, seeds: int) -> tuple[Results, list[Run]]:
    """Train the recipes, draw from them and measure, for each seed; return the records and the first seed's runs.

    With several seeds the records hold means over seeds, with standard deviations as errors.
    """
    experiment.prepare()
    results: list[Results] = []
    first_runs: list[Run] = []
    for seed in range(seeds):
        runs = {}
        for number, (label, recipe) in enumerate(experiment.recipes.items(), 1):
            say(f"[{number}/{len(experiment.recipes)}] {label}, seed {seed}")
            before = tuple(dataclasses.replace(stage, seed=seed) for stage in recipe.before)
            seeded = dataclasses.replace(recipe, name=label, seed=seed, before=before)
            runs[label] = train_or_resume(seeded, folder / f"seed-{seed}" / label)
            share_images([*first_runs, *runs.values()])
            if experiment.per_class:
                draw_if_missing(runs[label], seeded, experiment.per_class)
        results.append(experiment.measure(runs))
        first_runs = first_runs or list(runs.values())
    return compare.over_seeds(results), first_runs
