"""Find the recipe that a command names and train it, with a progress bar."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm import recipes
from advebm.core import checks, config, console, files
from advebm.core.errors import Diverged, UserError
from advebm.core.threads import take_over_threads
from advebm.models.precision import precision_label
from advebm.runs.recipe import Recipe, read, resolve
from advebm.runs.run import Run
from advebm.training.hardware import describe_device
from advebm.training.loop import train


def find_recipe(
    source: str | Path | Recipe,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    seed: int | None = None,
    init: str | None = None,
    labels: str | None = None,
) -> Recipe:
    """Return a recipe of the package or of a file, with options changed.

    Args:
        source: name of a recipe of the package, the :class:`~pathlib.Path` of a file, or a recipe.
        overrides: options, such as ``("train.images", 6000)``.
        seed: replaces the recipe's seed.
        init: run, model or file whose weights training starts from.
        labels: ``none`` removes the labels of the data.

    Raises:
        UserError: the recipe or an option does not exist, or the objective needs labels.
    """
    if isinstance(source, Recipe):
        plain = config.describe(source)
    else:
        plain = read(source) if isinstance(source, Path) else recipes.find(source)
    replaced = {name: value for name, value in (("seed", seed), ("init", init)) if value is not None}
    recipe = resolve({**plain, **replaced}, overrides)
    return recipe.unlabelled() if labels == "none" else recipe


def fit(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    track: str | Sequence[str] = (),
) -> Run:
    """Train a recipe by :func:`advebm.training.loop.train`, with a progress bar."""
    device_name = checks.device(device)
    earlier = Run.open(folder) if resume else None
    if earlier and device_name == "cpu" and not earlier.finished:
        reason = take_over_threads(earlier.environment.get("threads"))
        if reason:
            console.say(f"{folder}: {reason}")
    kind = precision_label(recipe.train.precision, torch.device(device_name))
    console.computing_on(f"{describe_device(device_name)}, {kind}")
    latest: dict[str, float] = {}
    total = sum(stage.train.images for stage in (*recipe.before, recipe))
    done = sum(min(run.images, run.recipe.train.images) for run in earlier.stages) if earlier else 0
    with console.bar(recipe.name, total, done) as progress:
        return train(
            recipe,
            folder,
            resume=resume,
            device=device,
            track=track,
            report=lambda line: progress(line["images"], console.training_note(line, latest)),
            tick=lambda images: progress(images, console.training_note({}, latest)),
        )


def train_or_resume(recipe: Recipe, folder: Path, fit: Callable[..., Run] = fit) -> Run:
    """Train a recipe in a folder, or resume its run there, or return that run if it is finished or has diverged.

    A run that diverges for good counts as a result: it stays at its last checkpoint, and :attr:`Run.diverged` says why.

    Args:
        recipe: what to train.
        folder: new, or holding a run of this recipe; where its weights began (``init``) is not compared.
        fit: trains, as :func:`fit` does.

    Raises:
        UserError: the folder holds a run of another recipe, or training cannot begin.
    """
    begun = (folder / "config.yaml").is_file()
    if begun:
        run = Run.open(folder)
        if dataclasses.replace(run.recipe, init=None) != dataclasses.replace(recipe, init=None):
            raise UserError(f"{folder} holds a run of another recipe; choose another --out")
        if run.finished or run.diverged:
            return run
    try:
        return fit(recipe, folder, resume=begun)
    except Diverged as failure:
        files.write(folder / "diverged", str(failure))
        return Run.open(folder)
