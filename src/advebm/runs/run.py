"""Run folders, which training, sampling, evaluation and reports read and write."""

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import numpy
import torch

import advebm
from advebm.core import files, notebook, processes
from advebm.core.errors import UserError
from advebm.data.sources import Data, Images, Source
from advebm.metrics import texts
from advebm.models import network
from advebm.models.excerpt import Published
from advebm.models.network import Architecture, Network
from advebm.models.precision import precision_label
from advebm.runs import recipe as recipes
from advebm.runs.checkpoint import Checkpoints
from advebm.runs.recipe import Recipe


class Run:
    """A folder with ``config.yaml env.json metrics.jsonl checkpoints/ samples/ metrics.json report.html``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: tuple[tuple[str, Any], ...] = ()  # where the images are read from instead of the recipe's paths
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def __reduce__(self) -> tuple[Callable[..., "Run"], tuple[Any, ...]]:
        """Pickle only the folder and where the images are, not the loaded images."""
        return _reopen, (self.folder, self.places)

    def __repr__(self) -> str:
        """Return a line about the run; only its folder, if its files cannot be read."""
        try:
            sets, records = len(self.samples()), len(self.records())
            seen = f"{self.images:,} of {self.recipe.train.images:,} images"
            return f"Run {self.folder}: {self.recipe.name}, {seen}, {sets} sets of samples, {records} records"
        except UserError:
            return f"Run {self.folder}"

    def _repr_html_(self) -> str:
        """Return the recipe, the newest records, and the grid of each set of samples."""
        records = {(r["name"], r["settings"].get("samples")): r for r in self.records()}
        parts = [notebook.line(self), notebook.line(self.recipe)]
        parts += [texts.html_table(records.values())] if records else []
        for name, folder in self.samples().items():
            if (path := folder / "grid.png").is_file():
                parts += [notebook.line(f"samples {name}"), notebook.picture(path.read_bytes(), f"samples {name}")]
        return "".join(parts)

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, environment: Mapping[str, Any]) -> "Run":
        """Create a run in a new or empty folder; raise ``UserError`` if it is not empty or cannot be written."""
        try:
            empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        except OSError as error:
            raise files.as_user_error(folder, error) from None
        if not empty and folder.is_dir():
            hint = f"; to go on with it: advebm train --resume {folder}" if (folder / "config.yaml").exists() else ""
            raise UserError(f"{folder} is not empty{hint}")
        if not empty:
            raise UserError(f"{folder} is a file; --out takes a folder")
        files.write_json(folder / "env.json", dict(environment))
        files.write(folder / "config.yaml", recipes.dump(recipe))  # last: a folder without it is no run
        return cls(folder)

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """Open an existing run; raise ``UserError`` if there is none."""
        folder = Path(folder)
        if not (folder / "config.yaml").is_file():
            runs = sorted(p.parent.name for p in folder.parent.glob("*/config.yaml")) if folder.parent.is_dir() else []
            hint = f"; in {folder.parent} there is {', '.join(runs)}" if runs else ""
            raise UserError(f"there is no run at {folder} (no config.yaml){hint}")
        return cls(folder)

    @functools.cached_property
    def recipe(self) -> Recipe:
        return recipes.resolve(recipes.read(self.folder / "config.yaml"))

    @functools.cached_property
    def data(self) -> Data:
        """The dataset of the recipe, loaded on first use."""
        return self.recipe.data.load()

    def with_images_at(self, places: Iterable[tuple[str, Any]]) -> "Run":
        """Return the run with its images read from another place, such as ``("data.path", "new/place")``.

        For a run around a published model this place, or ``("data.whole", True)``, replaces the few images that the
        model brings by its data set.

        Raises:
            UserError: another option than a path, no images there, or other images than those of the run.
        """
        places = tuple(places)
        if any(not dotted.endswith(".path") and dotted != "data.whole" for dotted, _ in places):
            raise UserError(f"{self.folder} is a run and has its own data; only their place can be given: --data.path")
        run = _reopen(self.folder, places)
        if not isinstance(run.recipe.data, Published):  # which checks its images itself
            run.check_images(run.data)
        return run

    def check_images(self, data: Data) -> None:
        """Raise UserError unless these are the images that the run was trained on, as far as it recorded that."""
        expected = self.environment.get("images")
        if expected is not None and data.digest() != expected:
            raise UserError(f"the images of {data.name} are not those that {self.folder} was trained on")

    def check_judge(self, judge: str | None) -> None:
        """Raise UserError if validation would go on with FD in other features than it began with.

        Only names of folders and numbers of checkpoints are compared, as folders may have moved.
        """
        before = self.environment.get("judge")
        if before is not None and judge is not None and Path(before).name != Path(judge).name:
            raise UserError(
                f"{self.folder} took FD in the features of {before} so far, and train.features is now {judge}; FD of "
                "the two cannot be compared: put the former back, or train anew"
            )

    @property
    def images(self) -> int:
        """Number of images seen by the latest checkpoint; 0 before the first."""
        return int(self.checkpoints.latest() or 0)

    @property
    def finished(self) -> bool:
        """Whether the latest checkpoint has seen all images of the recipe."""
        return int(self.checkpoints.latest() or -1) >= self.recipe.train.images

    @property
    def stopped_early(self) -> bool:
        """Whether the objective stopped training early."""
        return any(line.get("event") == "early stop" for line in self.history())

    @property
    def diverged(self) -> str:
        """Why training ended before its time and will not go on; empty if it did not."""
        path = self.folder / "diverged"
        return path.read_text() if path.exists() else ""

    @property
    def before(self) -> list[Path]:
        """The run folders of the earlier stages, in order."""
        return [self.folder / "before" / f"{i}-{stage.name}" for i, stage in enumerate(self.recipe.before)]

    @property
    def stages(self) -> "list[Run]":
        """The existing runs of the earlier stages, and this run."""
        return [*(Run(folder) for folder in self.before if (folder / "config.yaml").is_file()), self]

    @property
    def environment(self) -> dict[str, Any]:
        """Hardware, versions, precision and threads at the start of the run."""
        return files.read_json(self.folder / "env.json", default={})

    @property
    def processes(self) -> int:
        """Number of processes that train the run."""
        return int(self.environment.get("processes", 1))

    def check_processes(self, world: int) -> None:
        """Raise ``UserError`` if an unfinished run would continue with a different number of processes."""
        if (count := self.processes) != world and not self.finished and not self.stopped_early:
            raise UserError(
                f"{self.folder} was trained by {count} process{'es' * (count > 1)} so far, and there "
                f"{'is' if world == 1 else 'are'} {world}; with another number its results would not be what they are: "
                f"{processes.launch_command(count)} train --resume {self.folder}"
            )

    def model(self, which: str = "latest") -> tuple[Network, Architecture]:
        """Load the network of a checkpoint (averaged weights if there are any, eval mode)."""
        return network.load(self.checkpoints.path(which), foreign=True)

    def chains(self, which: str = "latest") -> Data:
        """Return the replay chains of a checkpoint that have begun, over all streams, unlabelled, clamped to [0, 1]."""
        states = sorted((self.checkpoints.path(which) / "state").glob("stream-*.pt"))
        loaded = [torch.load(path, weights_only=True, map_location="cpu") for path in states]
        chains = [state["chains"].clamp(0, 1) for state in loaded if "chains" in state]
        if not chains:
            raise UserError(f"{self.folder} keeps no replay buffer; runs of jeat, jem and mle with a buffer do")
        x = torch.cat(chains)
        x = x[x.flatten(1).isfinite().all(1)]
        if not len(x):
            raise UserError(f"no chain of {self.folder} has begun at checkpoint {which}; choose a later one")
        images = Images(x, torch.full((len(x),), -1))
        return Data("replay buffer", (), images, images, images)

    def samples(self) -> dict[str, Path]:
        """Return the folder of each complete sample set, by name."""
        return {path.parent.name: path.parent for path in sorted(self.folder.glob("samples/*/manifest.json"))}

    @contextlib.contextmanager
    def locked(self, main: bool = True) -> Iterator[None]:
        """Raise ``Busy`` if another process trains this run; the lock is released even if the process is killed."""
        busy = f"another process is training {self.folder}"
        with files.locked(self.folder / ".lock", busy) if main else contextlib.nullcontext():
            yield

    # metrics.jsonl: one line per training event ---------------------------------------------------------------------

    def log(self, record: Mapping[str, Any]) -> None:
        try:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise files.as_user_error(self.folder / "metrics.jsonl", error) from None

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``, without damaged ones such as a line cut off by a killed process."""
        path, lines = self.folder / "metrics.jsonl", []
        try:
            content = path.read_text(errors="replace") if path.exists() else ""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        for text in content.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                if isinstance(line, dict) and "images" in line:
                    lines.append(line)
        return lines

    def rewind(self, images: int, attempt: int, main: bool = True) -> None:
        """Remove log lines after ``images`` or of attempts after ``attempt``, which are about to be computed again."""
        if not main:
            return
        lines = [line for line in self.history() if line["images"] <= images and line.get("attempt", 0) <= attempt]
        files.write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    # metrics.json: evaluation records ---------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """Return all evaluation records, oldest first."""
        records = files.read_json(self.folder / "metrics.json", default=[])
        required = {"name", "value", "error", "count", "settings", "series"}
        if not isinstance(records, list) or not all(isinstance(r, dict) and required <= r.keys() for r in records):
            raise UserError(f"{self.folder / 'metrics.json'} is damaged: it is not a list of records")
        return records

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add evaluation records to ``metrics.json``; existing ones are never changed or removed."""
        with filelock.FileLock(self.folder / ".records.lock"):  # another evaluation may be appending
            files.write_json(self.folder / "metrics.json", [*self.records(), *records])


def _reopen(folder: Path, places: tuple[tuple[str, Any], ...]) -> Run:
    """Return the run with its images read from other places."""
    run = Run(folder)
    run.places = places
    if places:
        described: Mapping[str, Any] = recipes.config.describe(run.recipe)
        for dotted, value in places:
            described = recipes.config.override(described, dotted, value)
        run.recipe = recipes.resolve(described)
    return run


def share_images(runs: Iterable[Run]) -> None:
    """Make runs with the same data source share one copy of its images in memory."""
    loaded: list[tuple[Source, Data]] = []
    for run in runs:
        shared = next((data for source, data in loaded if source == run.recipe.data), None)
        if shared is None:
            loaded.append((run.recipe.data, run.data))
        else:
            run.data = shared


def new_folder(parent: Path, name: str) -> Path:
    """Return an unused folder ``parent/name-20261120-161200``, with a counter if two runs start in one second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = [f"{name}-{stamp}", *(f"{name}-{stamp}-{i}" for i in range(2, 100))]
    return next(parent / c for c in candidates if not (parent / c).exists())


def environment(device: torch.device, asked: str = "float32") -> dict[str, Any]:
    """Return hardware, versions, time and the precision used for ``asked``, for ``env.json`` and the report."""
    return {
        "advebm": advebm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision_label(asked, device),
        "started": files.timestamp(),
    }
