"""Experiment trackers, such as TensorBoard, which show a run while it is trained.  accelerate knows how to call them.

They write into ``RUN/tracking/NAME``, without a network, unless a variable of the user's environment says otherwise.
"""

import contextlib
import dataclasses
import importlib
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image
from torch import Tensor

from advebm.core import config, files
from advebm.core.errors import UserError, unknown_name
from advebm.data import pictures
from advebm.runs.run import Run

REFUSED = {"dvclive"}  # it makes the user's git repository a DVC repository, and adds files to the index
CONFIGURED_ONCE = ("tensorboard", "mlflow")  # the first adds a run for each configuration, the second refuses changes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a tracker is told where to write.

    Attributes:
        options: its options.
        environment: variables that are set while it is used, unless the user has set them.
        project: the name under which it groups runs.
        identity: its option that goes on with a tracked run, and the attribute that names the run; None: there is none.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    project: str = "advebm"
    identity: tuple[str, str] | None = None


def settings_for(name: str, folder: Path, title: str, resume_from: int | None) -> Settings:
    """Return how a tracker is told to stay in ``folder`` and offline.

    Args:
        name: name of the tracker.
        folder: its own folder.
        title: what it calls the run.
        resume_from: images seen at the checkpoint that a tracked run goes on from; None: it begins.
    """
    at, given = str(folder), os.environ
    purge = None if resume_from is None else resume_from + 1
    quiet = {"auto_connect_frameworks": False, "auto_connect_arg_parser": False}  # or it copies every checkpoint
    known = {
        "tensorboard": Settings({"purge_step": purge}, project=""),
        "trackio": Settings(
            {"name": title, "embed": False, "resume": "never" if resume_from is None else "allow"}, {"TRACKIO_DIR": at}
        ),
        "wandb": Settings(
            {"name": title, "dir": at, "resume": "allow"},
            {"WANDB_MODE": "offline"},
            given.get("WANDB_PROJECT", "advebm"),
            ("id", "id"),
        ),
        "mlflow": Settings(
            {"run_name": title, "logging_dir": None if "MLFLOW_TRACKING_URI" in given else f"{at}/artifacts"},
            {"MLFLOW_TRACKING_URI": f"sqlite:///{at}/mlflow.db"},
            identity=("run_id", "info.run_id"),
        ),
        "swanlab": Settings(
            {"experiment_name": title, "resume": "allow"},
            {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": at},
            identity=("id", "id"),
        ),
        "aim": Settings(project=title, identity=("run_hash", "hash")),
        "clearml": Settings({"task_name": title, **quiet}, {"CLEARML_OFFLINE_MODE": "1", "CLEARML_CACHE_DIR": at}),
        "comet_ml": Settings({"online": "COMET_API_KEY" in given}, {"COMET_OFFLINE_DIRECTORY": at}),
    }
    return known.get(name, Settings())


def find_trackers(track: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of trackers, given as a list or as text with commas.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    names = tuple(dict.fromkeys(track.split(",") if isinstance(track, str) else track))
    known, installed = LOGGER_TYPE_TO_CLASS.keys() - REFUSED, {str(found) for found in get_available_trackers()}
    for name in names:
        if name not in known:
            raise unknown_name("tracker", name, known)
        if name in LoggerType.list() and name not in installed:
            raise UserError(f"tracker {name} is not installed: pip install {name}")
    return names


class Tracking:
    """Trackers that have been started.  One that fails later is left out, with a warning, and training goes on."""

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self.trackers = list(trackers)

    def log(self, line: Mapping[str, Any]) -> None:
        """Send the numbers of a line of ``metrics.jsonl``, with its ``images`` as the step; events are left out."""
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "images"}
        if numbers and "event" not in line:
            self._tell(lambda tracker: send(tracker, numbers, line["images"]))

    def show(self, images: int, x: Tensor, y: Tensor) -> None:
        """Send a picture of samples.

        Args:
            images: images seen, the step.
            x: samples, uint8 (N, C, H, W).
            y: their classes (N,), -1 for none.
        """
        if self.trackers:
            picture = draw_grid(x, y)
            self._tell(lambda tracker: send_picture(tracker, picture, images))

    def finish(self) -> None:
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, call: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    call(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                reason = f"tracker {tracker.name} failed and is left out from now on: {describe_error(error)}"
                warnings.warn(reason, RuntimeWarning, stacklevel=4)


@contextlib.contextmanager
def tracking(names: Sequence[str], run: Run, *, main: bool = True) -> Iterator[Tracking]:
    """Start trackers for a run, and finish them at the end of the block, however that ends.

    What a tracker shows of the run so far goes on, as far as it can.

    Args:
        names: names that :func:`find_trackers` returned.
        run: the run, whose recipe they are sent.
        main: whether this is the main process; no other one starts any.

    Raises:
        UserError: a tracker cannot be started.
    """
    with contextlib.ExitStack() as stack:
        started = Tracking([])
        try:
            for name in names if main else ():
                started.trackers.append(start(name, run, stack))
            yield started
        finally:
            started.finish()


def start(name: str, run: Run, stack: contextlib.ExitStack) -> GeneralTracker:
    """Start a tracker; its variables of the environment are removed with the ``stack``."""
    parent = run.folder.resolve() / "tracking"
    folder, ids = parent / name, files.read_json(parent / "started.json", default={})
    begun = name in ids
    settings = settings_for(name, folder, run.folder.resolve().name, images_seen(run) if begun else None)
    options = dict(settings.options)
    if settings.identity is not None and begun:
        options[settings.identity[0]] = ids[name]
    kind = LOGGER_TYPE_TO_CLASS[name]
    places = (settings.project, str(folder)) if kind.requires_logging_directory else (settings.project,)
    stack.enter_context(variables(settings.environment))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            tracker = kind(*places, **options)
            tracker.start()
            if not begun or name not in CONFIGURED_ONCE:
                tracker.store_init_configuration(flatten(config.describe(run.recipe)))
    except Exception as error:
        how = f"leave it out, or mend that, and go on with the run: advebm train --resume {run.folder}"
        raise UserError(f"tracker {name} did not start: {describe_error(error)}; {how}") from error
    named = None if settings.identity is None else operator.attrgetter(settings.identity[1])(tracker.tracker)
    files.write_json(parent / "started.json", {**ids, name: named})
    return tracker


def images_seen(run: Run) -> int:
    """Return the images seen at the latest checkpoint, over all stages."""
    seen = before = 0
    for stage in run.stages:
        seen = before + stage.images if stage.images else seen
        before += stage.recipe.train.images
    return seen


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that are not set, for the duration of the block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested plain data by dotted names, as options are given: ``{"before.0.train.images": 2000}``."""
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, part in parts for k, v in flatten(part, f"{name}.{key}" if name else str(key)).items()}


def draw_grid(x: Tensor, y: Tensor) -> Image.Image:
    """Draw the first ten samples of each of the first ten classes, a row each; without classes, rows of ten."""
    y = y if int(y.max()) >= 0 else torch.arange(len(y)) // 10
    rows, columns = min(10, int(y.max()) + 1), min(10, int(y.bincount().max()))
    return pictures.grid(pictures.rows_by_class(x, y, rows, columns)).convert("RGB")


def send(tracker: GeneralTracker, values: Mapping[str, Any], step: int) -> None:
    if tracker.name == "trackio":
        tracker.tracker.log(dict(values), step=step)  # accelerate 1.10 to 1.13 leaves its step out
    else:
        tracker.log(values, step=step)


def send_picture(tracker: GeneralTracker, picture: Image.Image, step: int) -> None:
    """Send a picture in the form that the tracker takes; one that takes none gets none."""
    name = "samples"
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        send(tracker, {name: importlib.import_module("trackio").Image(picture)}, step)
    elif tracker.name == "mlflow":
        importlib.import_module("mlflow").log_image(picture, key=name, step=step)
    elif tracker.name == "comet_ml":
        tracker.tracker.log_image(picture, name=name, step=step)
    elif tracker.name == "aim":
        tracker.log_images({name: picture}, step=step)
    elif tracker.name == "clearml":
        tracker.log_images({name: np.asarray(picture)}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: [picture]}, step=step)


def describe_error(error: Exception) -> str:
    """Return the first line of an error's message, or its type if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
