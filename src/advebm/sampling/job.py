"""Draw a sample set from a run, chunk by chunk; after an interruption the same call continues.

``samples/NAME/parts`` holds the finished chunks, each in a file that is written atomically, and ``plan.json`` the
settings they were drawn with.  Each chunk has its own generator, so the final bytes do not depend on interruptions or
on the number of processes.  ``manifest.json`` is written last and marks a complete set.
"""

import contextlib
import io
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advebm.core import config, files
from advebm.core.errors import UserError
from advebm.core.processes import ALONE, Team, end_with_parent
from advebm.data import pictures
from advebm.data.sources import Data
from advebm.models.inference import BackendName, View
from advebm.models.network import Network
from advebm.runs import checkpoint
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.sampling import generate
from advebm.sampling.generate import CHUNK
from advebm.starts import Start


@dataclass(frozen=True)
class SampleJob:
    """A sample set to draw from a run.

    Attributes:
        run: the run whose model is sampled.
        name: name of the set, a folder in ``RUN/samples`` (or in ``RUN/WITHIN``).
        sampler: the algorithm and its settings.
        per_class: number of images per class.
        classes: numbers of the classes to draw.  Default: all classes.
        seed: seed of the starting images and of the noise.
        checkpoint: name of the checkpoint: ``latest``, ``best``, or its number of training images.
        device: where to compute.
        batch: images per forward pass.  Default: as many as the memory allows, see
            :func:`advebm.models.batching.batch_size_for`.
        backend: how to compute the network, see :class:`advebm.models.inference.Backend`; ``auto`` folds batch norms.
        about: further entries of the plan and the manifest.
        within: folder in the run folder that holds the set.
    """

    run: Run
    name: str
    sampler: Sampler
    per_class: int
    classes: tuple[int, ...] | None = None
    seed: int = 0
    checkpoint: str = "latest"
    device: str = "cpu"
    batch: int | None = None
    backend: BackendName = "auto"
    about: Mapping[str, Any] = field(default_factory=dict)
    within: str = "samples"

    @property
    def folder(self) -> Path:
        return self.run.folder / self.within / self.name

    def plan(self) -> dict[str, Any]:
        """Return all settings that determine the images; an unfinished set is continued only if they are equal."""
        return {
            "sampler": config.describe(self.sampler),
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "weights": checkpoint.weights(self.run.checkpoints.path(self.checkpoint)),
            "per_class": self.per_class,
            "classes": None if self.classes is None else list(self.classes),
            "chunk": CHUNK,
            "batch": self.batch,
            "device": torch.device(self.device).type,
            "fast": self.backend,
            **self.about,
        }

    def part(self, number: int) -> Path:
        return self.folder / "parts" / f"{number:06}.npy"


@dataclass(frozen=True)
class WorkerState:
    """A sample job with everything loaded that a process needs to draw its chunks."""

    job: SampleJob
    model: Network
    data: Data
    outside: Data | None
    start: Start
    y: Tensor
    view: View | None
    bank: Tensor | None

    @classmethod
    def open(cls, job: SampleJob) -> "WorkerState":
        """Load network and data; raise ``UserError`` for unknown or unusable classes and missing starting images."""
        run, sampler, data = job.run, job.sampler, job.run.data
        if any(not 0 <= k < len(data.classes) for k in job.classes or ()):
            numbers = ", ".join(map(str, job.classes or ()))
            raise UserError(f"{data.name} has classes 0 to {len(data.classes) - 1}, got {numbers}")
        if job.classes is not None and not sampler.conditional and sampler.start != "class":
            method = generate.set_name(sampler)
            raise UserError(f"{method} draws from no class; leave the classes out, or set start to class")
        outside = start_images(run, sampler, job.checkpoint)
        model = run.model(job.checkpoint)[0].to(job.device)
        y = generate.classes_to_draw(sampler, data, job.per_class, job.classes)
        generate.check_groups(sampler, len(y), job.batch)
        view = generate.sampling_view(model, data, min(len(y), job.batch or len(y)), job.backend)
        return cls(job, model, data, outside, sampler.prepare(data, outside), y, view, sampler.bank(data))

    def draw(self, number: int) -> None:
        """Draw chunk ``number`` and write it to its file."""
        job = self.job
        options: dict[str, Any] = {"shape": self.data.shape, "seed": job.seed, "batch": job.batch}
        options |= {"view": self.view, "bank": self.bank}
        images = generate.draw_chunk(self.model, job.sampler, self.start, self.y, number, **options)
        buffer = io.BytesIO()
        np.save(buffer, generate.to_bytes(images).numpy())
        files.write(job.part(number), buffer.getvalue())


def start_images(run: Run, sampler: Sampler, checkpoint: str = "latest") -> Data | None:
    """Return the outside images or replay chains that the sampler starts from; None for other starts."""
    if sampler.start == "buffer":
        return run.chains(checkpoint)
    recipe = run.recipe
    return recipe.outside.load() if sampler.start == "outside" and recipe.outside is not None else None


def draw_set(
    job: SampleJob,
    *,
    processes: int = 1,
    team: Team = ALONE,
    trajectory: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Draw a sample set and return its folder.

    An unfinished set is continued if its plan (settings and weights) is the same.  A finished set, or one with another
    plan, is discarded and drawn from the beginning.

    Args:
        job: what to draw.
        processes: number of worker processes to start; 1 draws in this process.
        team: already running processes that all call this function and share the chunks; the main one writes the set.
        trajectory: whether to write ``film.gif`` with up to 60 frames, and 13 instead of 7 columns in ``film.png``.
        progress: called with the number of images done so far.

    Raises:
        Busy: another process is drawing the same set.
    """
    folder, plan = job.folder, job.plan()
    state = WorkerState.open(job)
    count = generate.count_chunks(len(state.y))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.as_user_error(folder, error) from None
    busy = f"another process is drawing {folder}"
    with files.locked(folder / ".lock", busy) if team.main else contextlib.nullcontext():
        if team.main:
            _prepare(folder, plan)
        todo = team.all_gather([number for number in range(count) if team.main and not job.part(number).exists()])[0]
        done = len(state.y) - sum(len(state.y[n * CHUNK : (n + 1) * CHUNK]) for n in todo)
        progress(done)
        for number in _draw_parts(state, todo[team.rank :: team.world], processes):
            done += len(state.y[number * CHUNK : (number + 1) * CHUNK]) * team.world
            progress(min(done, len(state.y)))
        team.all_gather(None)  # wait until every chunk is written
        if team.main:
            _finish_set(state, plan, count, trajectory)
        team.all_gather(None)
    return folder


def _finish_set(state: WorkerState, plan: Mapping[str, Any], count: int, trajectory: bool) -> None:
    """Combine the chunks into the final set, and remove them."""
    job, folder = state.job, state.job.folder
    frames = 60 if trajectory else 7
    options: dict[str, Any] = {"outside": state.outside, "classes": job.classes, "seed": job.seed}
    film, steps = generate.draw_trajectory(state.model, job.sampler, state.data, frames=frames, **options)
    if trajectory:
        files.write(folder / "film.gif", pictures.animate(film))
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, 13 if trajectory else 7)})
    strip = film[:, shown], [steps[i] for i in shown]
    parts = (_read(job.part(number)) for number in range(count))
    about = {**plan, "fast": "off" if state.view is None else state.view.backend.name}
    generate.write_parts(folder, parts, state.y, state.data.shape, about, len(state.data.classes), strip)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    (folder / "plan.json").unlink(missing_ok=True)


def _prepare(folder: Path, plan: Mapping[str, Any]) -> None:
    """Discard a finished set, and chunks that were drawn with another plan."""
    whole = (folder / "manifest.json").exists()
    (folder / "manifest.json").unlink(missing_ok=True)
    if whole or files.read_json(folder / "plan.json", default={}) != plan:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        (folder / "film.gif").unlink(missing_ok=True)
        files.write_json(folder / "plan.json", dict(plan))


def _draw_parts(state: WorkerState, todo: list[int], processes: int) -> Iterator[int]:
    """Draw chunks, and yield the number of each as it is finished."""
    if min(processes, len(todo)) < 2:
        for number in todo:
            state.draw(number)
            yield number
        return
    threads = max(1, torch.get_num_threads() // processes)
    pool = ProcessPoolExecutor(
        min(processes, len(todo)), multiprocessing.get_context("spawn"), _init_worker, (state.job, threads)
    )
    try:
        for done in as_completed([pool.submit(_draw, number) for number in todo]):
            yield done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_states: list[WorkerState] = []  # one entry, in each worker process


def _init_worker(job: SampleJob, threads: int) -> None:
    """Load the state of a worker process, and make the process end when its parent does, even if that is killed."""

    end_with_parent()
    torch.set_num_threads(threads)
    _worker_states.append(WorkerState.open(job))


def _draw(number: int) -> int:
    _worker_states[0].draw(number)
    return number


def _read(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise UserError(
            f"{path} was damaged ({type(error).__name__}) and is removed; the same command goes on"
        ) from None
