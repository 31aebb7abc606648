"""Wrap models that are already trained in run folders."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from advebm.core import config
from advebm.core.errors import UserError
from advebm.models import network
from advebm.runs.find_model import is_factory
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.workflows.train import fit


def adopt(where: str, folder: Path, overrides: Iterable[tuple[str, Any]], *, device: str | None = None) -> Run:
    """Create a run around an existing model, without training it, so that the other commands can use it.

    If ``folder`` already holds a run of this model on this data, open that run instead.

    Args:
        where: ``PACKAGE.MODULE:FACTORY``, the folder of a model or a run, or ``hf:USER/NAME``.
        folder: folder of the new run.
        overrides: the option ``data``, which is required, and other options of a recipe.
        device: device that the run's ``env.json`` records; no training step is taken.

    Raises:
        UserError: there is no model, it is an encoder, no data is given, the data differs from the model's in number of
            classes or image shape, or ``folder`` holds another run.
    """
    overrides = list(overrides)
    if not any(name.partition(".")[0] == "data" for name, _ in overrides):
        raise UserError("a model of its own needs --data NAME, and --data.path where that takes one")
    architecture = None
    if is_factory(where):
        plain = {"backbone": {"kind": "own", "path": where}, "normalise": {"mean": [0.0], "std": [1.0]}}
    else:
        location, foreign = network.locate(where)
        architecture = network.read_architecture(location, foreign=foreign)
        if architecture.hidden is not None:
            raise UserError(f"{where} is an encoder, which has no logits; advebm probe makes a classifier of its run")
        plain = {"backbone": config.describe(architecture.backbone), "init": where}
        plain |= {"normalise": {"mean": list(architecture.mean), "std": list(architecture.std)}}
    recipe = untrained_recipe(folder.name, plain, overrides)
    if architecture is not None:
        data = recipe.data.load()
        ours = (architecture.outputs, *architecture.shape)
        if ours != (theirs := (len(data.classes), *data.shape)):
            words = "{} classes of {} x {} x {}".format
            raise UserError(
                f"{where} is for {words(*ours)}, {data.name} has {words(*theirs)}; evaluate it on data like its own"
            )
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        if any(getattr(run.recipe, n) != getattr(recipe, n) for n in ("data", "backbone", "init", "normalise")):
            raise UserError(f"{folder} holds another model or other data; choose another --out")
        return run
    return fit(recipe, folder, device=device)


def untrained_recipe(name: str, plain: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> Recipe:
    """Return the recipe of a run that trains nothing; ``plain`` describes the existing classifier."""
    rest: dict[str, Any] = {"name": name, "objective": "standard", "threat": {}, "sampler": "cs", "data": "digits"}
    rest |= {"metrics": ["accuracy", "robust-accuracy"], "train": {"images": 0}}
    return resolve({**rest, **plain}, overrides)
