"""Find the recipe that a command names and train it, with a progress bar."""

from collections.abc import Iterable, Sequence
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
    """Return a recipe of the package or of a file, with options changed.

    Args:
        source: name of a recipe of the package, or the :class:`~pathlib.Path` of a file.
        overrides: options, such as ``("train.images", 6000)``.
        seed: replaces the recipe's seed.
        init: run, model or file whose weights training starts from.
        labels: ``none`` removes the labels of the data.

    Raises:
        UserError: the recipe or an option does not exist, or the objective needs labels.
    """
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
