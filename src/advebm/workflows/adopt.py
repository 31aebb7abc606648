"""Open the run that a reference stands for; around any other model make one, without training it."""

import contextlib
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm.core import checks, config, console
from advebm.core.errors import UserError
from advebm.data.sources import Data
from advebm.models.excerpt import Published, has_excerpt
from advebm.models.factory import find_root
from advebm.models.modes import searching
from advebm.models.network import Architecture
from advebm.runs.find_model import Reference, digest, find_reference, read_constants, weights_folder
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.workflows.train import fit

KNOWING = ("run", "checkpoint", "model", "pretrained", "module")  # kinds of references, the most informed first
MADE = Path("runs") / "models"  # where runs around models are made, as a model's own folder may not be written to


def open_run(
    where: str | Path,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    whole: bool = True,
    device: str | None = None,
) -> Run:
    """Return the run that a reference stands for, or else one around the model, in ``runs/models``, which is printed.

    Args:
        where: a reference to a model, see :func:`advebm.runs.find_model.find_reference`.
        overrides: of a run, where its images are now, such as ``("data.path", "new/place")``; of any other model, the
            options of the recipe of a new run, such as ``("data", "cifar10")``.
        whole: whether the data set of a published model is needed, rather than the images that the model brings.
        device: device that a new run's ``env.json`` records.

    Raises:
        UserError: nothing is found, or what :func:`adopt` raises.
    """
    overrides, reference = list(overrides), find_reference(where)
    if reference.kind == "run":
        assert reference.path is not None
        return with_images(Run.open(reference.path), overrides, whole)
    places: list[tuple[str, Any]] = []
    if reference.kind == "model" and has_excerpt(reference.folder) and "data" not in dict(overrides):
        places, overrides = overrides, []  # of data that the model knows, only the place can be given
    identity = json.dumps([reference.text, digest(reference.load()), _read_source(reference), overrides], default=str)
    folder = MADE / f"{reference.title}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    known = (folder / "config.yaml").is_file()
    run = adopt(reference, folder, overrides, device=device)
    if not known:
        console.say(f"{where} is no run; made {run.folder} around it")
    return with_images(run, places, whole)


def with_images(run: Run, places: Sequence[tuple[str, Any]] = (), whole: bool = True) -> Run:
    """Return the run with its images read from other places, if given; around a published model by default all."""
    if whole and not places and isinstance(run.recipe.data, Published) and not run.recipe.data.path:
        places = [("data.whole", True)]
    return run.with_images_at(places) if places else run


def open_runs(wheres: Sequence[str], overrides: Iterable[tuple[str, Any]] = (), *, whole: bool = True) -> list[Run]:
    """Return the runs that several references stand for; a model that does not know its data takes those of a run.

    If there are runs and other models, overrides are for the models; only those of a path are for the runs, too.
    ``whole`` is as for :func:`open_run`.
    """
    runs = open_each(wheres, overrides, whole=whole)
    return [runs[where] for where in wheres]


def open_each(
    wheres: Sequence[str],
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    whole: bool = True,
    failed: Callable[[str, UserError], None] | None = None,
) -> dict[str, Run]:
    """Return by reference the runs that :func:`open_runs` returns, without those that cannot be opened.

    ``failed`` is called with the reference of each of those, and why.  None: the first one raises its error.
    """

    @contextlib.contextmanager
    def reporting(where: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if failed is None:
                raise
            failed(where, error)

    overrides, references, runs = list(overrides), list[Reference](), dict[str, Run]()
    for where in dict.fromkeys(wheres):
        with reporting(where):
            references.append(find_reference(where))
    paths = [pair for pair in overrides if pair[0].endswith(".path")]
    for_runs = overrides if all(reference.kind == "run" for reference in references) else paths
    for reference in sorted(references, key=lambda reference: KNOWING.index(reference.kind)):
        with reporting(reference.text):
            own = for_runs if reference.kind == "run" else overrides
            if reference.kind != "run" and runs and not own and "data" not in reference.options():
                own = [("data", config.describe(next(iter(runs.values())).recipe.data))]
            runs[reference.text] = open_run(reference.text, own, whole=whole)
    return {where: runs[where] for where in wheres if where in runs}


def _read_source(reference: Reference) -> str:
    """Return the source code that defines a user's module, as far as it is in the file that is named."""
    if reference.module is None:
        return ""
    spec = importlib.util.find_spec(reference.module.partition(":")[0])
    return Path(spec.origin).read_text(errors="replace") if spec and spec.origin and Path(spec.origin).is_file() else ""


def adopt(
    where: str | Path | Reference, folder: Path, overrides: Iterable[tuple[str, Any]], *, device: str | None = None
) -> Run:
    """Create a run around an existing model, without training it, so that the other commands can use it.

    Data, threat model, sampler and metrics are those that are known of the model, unless options change them.  If
    ``folder`` already holds a run of this model on this data, open that run instead.

    Args:
        where: the model, or a reference to it.
        folder: folder of the new run.
        overrides: options of a recipe; ``data`` is required if the model does not say what it was trained on.
        device: device that the run's ``env.json`` records; no training step is taken.

    Raises:
        UserError: there is no model, it is an encoder, no data is given, the data differs from the model's in number of
            classes or image shape, or ``folder`` holds another run.
    """
    reference = where if isinstance(where, Reference) else find_reference(where)
    overrides, architecture = list(overrides), reference.architecture()
    plain = {k: v for k, v in reference.options().items() if k in ("data", "threat", "sampler", "metrics")}
    changed = {name.partition(".")[0] for name, _ in overrides}
    if "data" not in changed and "data" not in plain:
        raise UserError(f"{reference.text} says nothing of its images: give --data NAME, as in --data cifar10")
    if architecture is None:
        backbone = {"kind": "own", "path": reference.module, "root": find_root(str(reference.module))}
        weights = reference.path
        constants = None if weights is None or weights.is_file() else read_constants(weights_folder(weights))
        mean, std = constants or ((0.0,), (1.0,))
        plain |= {"backbone": backbone, "normalise": {"mean": list(mean), "std": list(std)}}
        plain["init"] = None if weights is None else str(weights)
    else:
        if architecture.hidden is not None:
            raise UserError(
                f"{reference.text} is an encoder, which has no logits; advebm probe makes a classifier of its run"
            )
        plain |= {"backbone": config.describe(architecture.backbone), "init": reference.text}
        plain |= {"normalise": {"mean": list(architecture.mean), "std": list(architecture.std)}}
    if architecture is not None and architecture.outputs == 1:
        plain.pop("metrics", None)
    recipe = untrained_recipe(reference.title, plain, overrides)
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        if any(getattr(run.recipe, n) != getattr(recipe, n) for n in ("data", "backbone", "init", "normalise")):
            raise UserError(f"{folder} holds another model or other data; choose another --out")
        return run if run.checkpoints.latest() else fit(recipe, folder, resume=True, device=device)
    data = recipe.data.load()
    if architecture is not None:
        _check_data(reference, architecture, data)
    _check_logits(reference, data)
    run = fit(recipe, folder, device=device)
    run.data = data
    return run


def _check_data(reference: Reference, architecture: Architecture, data: Data) -> None:
    """Raise UserError for data of another shape or number of classes than the model's; warn of other class names."""
    size = data.shape[1:] if reference.kind == "pretrained" else architecture.shape[1:]  # theirs may be any
    ours, theirs = (architecture.outputs, architecture.channels, *size), (len(data.classes), *data.shape)
    if ours != theirs:
        words = "{} classes of {} x {} x {}".format
        raise UserError(
            f"{reference.text} is for {words(*ours)}, {data.name} has {words(*theirs)}; "
            "evaluate it on data like its own"
        )
    names = reference.classes
    if len(names) == len(data.classes) and names != data.classes:
        first = next(k for k, (a, b) in enumerate(zip(names, data.classes, strict=True)) if a != b)
        warnings.warn(
            f"{reference.text} was trained on other classes: its class {first} is {names[first]}, that of {data.name} "
            f"{data.classes[first]}",
            stacklevel=3,
        )


def _check_logits(reference: Reference, data: Data) -> None:
    """Raise UserError for a model that returns probabilities instead of logits for images of the data."""
    x = data.val.take(slice(64)).float()
    with searching(reference.load()) as f, torch.no_grad():
        out = checks.outputs(f, x, reference.text)
        if out.ndim == 2 and out.shape[1] > 1:
            checks.logits(out, len(x))


def untrained_recipe(name: str, plain: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> Recipe:
    """Return the recipe of a run that trains nothing; ``plain`` describes the existing classifier."""
    rest: dict[str, Any] = {"name": name, "objective": "standard", "threat": {}, "sampler": "cs", "data": "digits"}
    rest |= {"metrics": ["accuracy", "robust-accuracy"], "train": {"images": 0}}
    return resolve({**rest, **plain}, overrides)
