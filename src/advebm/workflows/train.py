"""Training behind a progress bar."""

from pathlib import Path

import torch

from advebm.core import checks, console
from advebm.core.threads import take_over_threads
from advebm.models.precision import precision_label
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.training.hardware import describe
from advebm.training.loop import train


def fit(recipe: Recipe, folder: Path, *, resume: bool = False, device: str | None = None) -> Run:
    """:func:`advebm.training.loop.train` behind a progress bar."""
    where = checks.device(device)
    begun = Run.open(folder) if resume else None
    if begun and where == "cpu" and not begun.finished:
        reason = take_over_threads(begun.environment.get("threads"))
        if reason:
            console.say(f"{folder}: {reason}")
    kind = precision_label(recipe.train.precision, torch.device(where))
    console.computing_on(f"{describe(where)}, {kind}")
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
