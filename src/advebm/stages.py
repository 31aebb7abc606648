"""Training and sampling behind a progress bar: what the command line and the demo share."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from advebm import config, console, generation
from advebm.data.files import read_folder
from advebm.errors import UserError
from advebm.evaluation import is_factory
from advebm.metrics.base import SampleSet
from advebm.models import network
from advebm.models.inference import Way
from advebm.samplers import Sampler
from advebm.training.loop import train
from advebm.training.recipe import Recipe, resolve
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


def adopt(where: str, folder: Path, overrides: Iterable[tuple[str, Any]]) -> Run:
    """A run around a model that is there already: nothing is trained, everything else works on it.

    A folder that holds it from an earlier call is opened as it is.

    Args:
        where: ``PACKAGE.MODULE:FACTORY``, a model's or run's folder, or ``hf:USER/NAME``.
        folder: of the new run.
        overrides: ``data``, and other options of a recipe.

    Raises:
        UserError: no model there, no data, data of other classes or another shape, or a folder that holds another run.
    """
    overrides = list(overrides)
    if not any(name.partition(".")[0] == "data" for name, _ in overrides):
        raise UserError("a model of its own needs --data NAME, and --data.path where that takes one")
    plain: dict[str, Any] = {"name": folder.name, "objective": "standard", "threat": {}, "sampler": "cs"}
    plain |= {"metrics": ["accuracy", "robust-accuracy"], "train": {"images": 0}, "data": "digits"}
    architecture = None
    if is_factory(where):
        plain |= {"backbone": {"kind": "own", "path": where}, "normalise": {"mean": [0.0], "std": [1.0]}}
    else:
        at, foreign = network.locate(where)
        architecture = network.read_architecture(at, foreign=foreign)
        plain |= {"backbone": config.describe(architecture.backbone), "init": where}
        plain |= {"normalise": {"mean": list(architecture.mean), "std": list(architecture.std)}}
    recipe = resolve(plain, overrides)
    if architecture is not None:
        data = recipe.data.load()
        ours = (architecture.outputs, architecture.channels, architecture.size)
        if ours != (theirs := (len(data.classes), *data.shape[:2])):
            words = "{} classes of {} x {} x {}".format
            raise UserError(
                f"{where} is for {words(*ours, ours[-1])}, {data.name} has {words(*theirs, theirs[-1])}; "
                "evaluate it on data like its own"
            )
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        same = [getattr(run.recipe, n) == getattr(recipe, n) for n in ("data", "backbone", "init", "normalise")]
        if not all(same):
            raise UserError(f"{folder} holds another model or other data; choose another --out")
        return run
    return fit(recipe, folder)


def take_in(run: Run, folder: Path) -> str:
    """Images from a folder as a set of samples of a run, under the folder's name, which is returned."""
    data, name = run.recipe.data.load(), folder.resolve().name
    images = read_folder(folder, data.classes, data.shape)
    about = {"images": str(folder.resolve())}
    if name in run.samples() and generation.read(run.samples()[name]).manifest.get("images") != about["images"]:
        raise UserError(f"{run.folder} has samples called {name} already; rename {folder}")
    generation.write(run.folder / "samples" / name, SampleSet(images.float(), images.y, about), len(data.classes))
    return name


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
    way: Way = "auto",
) -> Path:
    """Images of every class, and one chain a class as a film, into the run's ``samples/NAME``.

    Of a critic as many images and chains, without classes.
    """
    if Path(name).name != name:
        raise UserError(f"--name is the name of a folder in {run.folder / 'samples'}, got {name!r}")
    number = run.checkpoints.path(checkpoint).name
    recipe = run.recipe
    model, data = run.model(number)[0].to(device), recipe.data.load()
    outside = recipe.outside.load() if recipe.outside is not None and sampler.start == "outside" else None
    y = generation.wanted(sampler, data, per_class)
    with console.bar(name, len(y)) as tell:
        samples = generation.generate(model, sampler, data, y, outside=outside, seed=seed, way=way, progress=tell)
    samples = samples._replace(manifest={**samples.manifest, "checkpoint": number})
    folder = run.folder / "samples" / name
    strip = generation.film(model, sampler, data, outside=outside, seed=seed)
    generation.write(folder, samples, len(data.classes), strip)
    return folder
