"""Training and sampling behind a progress bar: what the command line and the demo share."""

from pathlib import Path

import torch

from advebm import config, console, generation
from advebm.errors import UserError
from advebm.samplers import Sampler
from advebm.training.loop import train
from advebm.training.recipe import Recipe
from advebm.training.run import Run


def fit(recipe: Recipe, folder: Path, *, resume: bool = False, device: str | None = None) -> Run:
    """:func:`advebm.training.loop.train` behind a progress bar."""
    seen: dict[str, float] = {}
    latest = Run.open(folder).checkpoints.latest() if resume else ""
    earlier = sum(stage.train.images for stage in recipe.before)
    done = earlier + int(latest) if latest.isdigit() else 0
    with console.bar(recipe.name, earlier + recipe.train.images, done) as tell:
        return train(
            recipe,
            folder,
            resume=resume,
            device=device,
            report=lambda line: tell(line["images"], console.training_note(line, seen)),
        )


def set_name(sampler: Sampler) -> str:
    """What a set of samples is called unless it is given a name: ``cs-class``."""
    return f"{config.describe(sampler)['kind'].rpartition(':')[2].lower()}-{sampler.start}"


def draw(
    run: Run,
    name: str,
    sampler: Sampler,
    per_class: int,
    *,
    seed: int = 0,
    checkpoint: str = "latest",
    device: str = "cpu",
) -> Path:
    """Images of every class, and one chain a class as a film, into the run's ``samples/NAME``."""
    if Path(name).name != name:
        raise UserError(f"--name is the name of a folder in {run.folder / 'samples'}, got {name!r}")
    number = run.checkpoints.path(checkpoint).name
    model, data = run.model(number)[0].to(device), run.recipe.data.load()
    y = torch.arange(len(data.classes)).repeat_interleave(per_class)
    with console.bar(name, len(y)) as tell:
        samples = generation.generate(model, sampler, data, y, seed=seed, progress=tell)
    samples = samples._replace(manifest={**samples.manifest, "checkpoint": number})
    folder = run.folder / "samples" / name
    generation.write(folder, samples, len(data.classes), generation.film(model, sampler, data, seed=seed))
    return folder
