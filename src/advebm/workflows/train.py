"""Training from what a command asks for, behind a progress bar."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from advebm import recipes
from advebm.core import checks, console
from advebm.core.threads import take_over_threads
from advebm.models.precision import precision_label
from advebm.runs.recipe import Recipe, read, resolve
from advebm.runs.run import Run
from advebm.training.hardware import describe_device
from advebm.training.loop import train


def find_recipe(
    source: str | Path,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    seed: int | None = None,
    init: str | None = None,
    labels: str | None = None,
) -> Recipe:
    """A recipe of the package by its name, or one of a file by its path, with options changed.

    Args:
        source: the name, or the path.
        overrides: options, such as ``("train.images", 6000)``.
        seed: in the place of the recipe's.
        init: run, model or file that training begins from.
        labels: ``none`` for a recipe that does without them.

    Raises:
        UserError: no such recipe, or an option that is not there.
    """
    plain = read(source) if isinstance(source, Path) else recipes.find(source)
    given = {name: value for name, value in (("seed", seed), ("init", init)) if value is not None}
    recipe = resolve({**plain, **given}, overrides)
    return recipe.unlabelled() if labels == "none" else recipe


def fit(recipe: Recipe, folder: Path, *, resume: bool = False, device: str | None = None) -> Run:
    """:func:`advebm.training.loop.train` behind a progress bar."""
    where = checks.device(device)
    begun = Run.open(folder) if resume else None
    if begun and where == "cpu" and not begun.finished:
        reason = take_over_threads(begun.environment.get("threads"))
        if reason:
            console.say(f"{folder}: {reason}")
    kind = precision_label(recipe.train.precision, torch.device(where))
    console.computing_on(f"{describe_device(where)}, {kind}")
    seen: dict[str, float] = {}
    total = sum(stage.train.images for stage in (*recipe.before, recipe))
    done = sum(min(run.images, run.recipe.train.images) for run in begun.stages) if begun else 0
    with console.bar(recipe.name, total, done) as tell:
        return train(
            recipe,
            folder,
            resume=resume,
            device=device,
            report=lambda line: tell(line["images"], console.training_note(line, seen)),
            tick=lambda images: tell(images, console.training_note({}, seen)),
        )
