"""What an experiment is, and how any is carried out: recipes, trained for each seed, and measured."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm.evaluation import compare
from advebm.evaluation.compare import Records
from advebm.reproduction.study import draw_if_missing, say, train_or_resume
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run, share_images

Results = dict[str, Records]  # by title: a method, a row of a table
Measure = Callable[[Mapping[str, Run]], Results]
Options = Sequence[tuple[str, Any]]  # of the command line: what every recipe of the experiment takes over


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained and what is measured.

    Attributes:
        recipes: by the label of their runs.
        measure: the trained runs of a seed -> records by title; what is there already is not measured again.
        per_class: images of each class to draw from every run, before it is measured.
        prepare: trains what others need, once: a teacher, a judge.
        figures: results -> PNG figures by title, for the report.
        conclude: results -> lines to print.
    """

    recipes: Mapping[str, Recipe]
    measure: Measure
    per_class: int = 0
    prepare: Callable[[], object] = lambda: None
    figures: Callable[[Results], dict[str, bytes]] = lambda results: {}
    conclude: Callable[[Results], list[str]] = lambda results: []


def carry_out(experiment: Experiment, folder: Path, seeds: int) -> tuple[Results, list[Run]]:
    """Train the recipes, draw from them and measure, for each seed; the records, and the first seed's runs.

    Of several seeds the records are means, and their errors deviations.
    """
    experiment.prepare()
    found: list[Results] = []
    first: list[Run] = []
    for seed in range(seeds):
        runs = {}
        for number, (label, recipe) in enumerate(experiment.recipes.items(), 1):
            say(f"[{number}/{len(experiment.recipes)}] {label}, seed {seed}")
            before = tuple(dataclasses.replace(stage, seed=seed) for stage in recipe.before)
            seeded = dataclasses.replace(recipe, name=label, seed=seed, before=before)
            runs[label] = train_or_resume(seeded, folder / f"seed-{seed}" / label)
            share_images([*first, *runs.values()])
            if experiment.per_class:
                draw_if_missing(runs[label], seeded, experiment.per_class)
        found.append(experiment.measure(runs))
        first = first or list(runs.values())
    return compare.over_seeds(found), first
