"""A set of samples drawn from a run chunk by chunk onto the disk: stopped at any moment, the same call goes on.

``samples/NAME/parts`` holds the chunks that are done, each in a file that is whole or absent, and ``plan.json`` what
they are chunks of.  Each chunk has its own generator, so the bytes at the end do not depend on stops or on how many
processes share the work.  ``manifest.json`` comes last.
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import threading
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
from advebm.core.processes import ALONE, Team
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
    """What to draw from a run.

    Attributes:
        run: whose model draws.
        name: of the set, a folder in the run's ``samples`` or in what ``within`` names.
        sampler: the algorithm.
        per_class: images of each class.
        classes: which; none for all.
        seed: of seeds and noise.
        checkpoint: its number of images.
        device: where to compute.
        batch: images that the network sees at once; none for 500 of up to 32 x 32 pixels, fewer of larger ones.
        way: how the network is computed, see :class:`advebm.models.inference.Backend`; ``auto`` folds.
        about: what else the manifest says.
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
    way: BackendName = "auto"
    about: Mapping[str, Any] = field(default_factory=dict)
    within: str = "samples"

    @property
    def folder(self) -> Path:
        """Of the set."""
        return self.run.folder / self.within / self.name

    def plan(self) -> dict[str, Any]:
        """Everything that decides the images."""
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
            "fast": self.way,
            **self.about,
        }

    def part(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / "parts" / f"{number:06}.npy"


@dataclass(frozen=True)
class WorkerState:
    """A drawing with all that is loaded for it."""

    drawing: SampleJob
    model: Network
    data: Data
    outside: Data | None
    start: Start
    y: Tensor
    quick: View | None
    bank: Tensor | None

    @classmethod
    def open(cls, drawing: SampleJob) -> "WorkerState":
        """Load the network and the images; seeds that cannot be drawn are noticed here."""
        run, sampler, data = drawing.run, drawing.sampler, drawing.run.data
        if any(not 0 <= k < len(data.classes) for k in drawing.classes or ()):
            got = ", ".join(map(str, drawing.classes or ()))
            raise UserError(f"{data.name} has classes 0 to {len(data.classes) - 1}, got {got}")
        if drawing.classes is not None and not sampler.conditional and sampler.start != "class":
            method = generate.set_name(sampler)
            raise UserError(f"{method} draws from no class; leave the classes out, or set start to class")
        outside = start_images(run, sampler, drawing.checkpoint)
        model = run.model(drawing.checkpoint)[0].to(drawing.device)
        y = generate.classes_to_draw(sampler, data, drawing.per_class, drawing.classes)
        generate.check_groups(sampler, len(y), drawing.batch)
        quick = generate.sampling_view(model, data, min(len(y), drawing.batch or len(y)), drawing.way)
        return cls(drawing, model, data, outside, sampler.prepare(data, outside), y, quick, sampler.bank(data))

    def draw(self, number: int) -> None:
        """Write a chunk."""
        d = self.drawing
        options: dict[str, Any] = {"shape": self.data.shape, "seed": d.seed, "batch": d.batch, "quick": self.quick}
        options["bank"] = self.bank
        images = generate.draw_chunk(self.model, d.sampler, self.start, self.y, number, **options)
        buffer = io.BytesIO()
        np.save(buffer, generate.to_bytes(images).numpy())
        files.write(d.part(number), buffer.getvalue())


def start_images(run: Run, sampler: Sampler, checkpoint: str = "latest") -> Data | None:
    """The images that chains begin from where they are not the data's: outside images or replay chains."""
    if sampler.start == "buffer":
        return run.chains(checkpoint)
    recipe = run.recipe
    return recipe.outside.load() if sampler.start == "outside" and recipe.outside is not None else None


def draw_set(
    drawing: SampleJob,
    *,
    processes: int = 1,
    team: Team = ALONE,
    trajectory: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Draw what is not there yet and publish the set; its folder.

    Args:
        drawing: what to draw.  A set of that name made from another plan is replaced, and so is a whole one.
        processes: to start, that share the work.
        team: processes that are there and all call this, instead; the main one publishes the set.
        trajectory: whether to make a longer film, and ``film.gif``, of 60 moments at most.
        progress: told how many images are done.
    """
    folder, plan = drawing.folder, drawing.plan()
    desk = WorkerState.open(drawing)
    count = generate.count_chunks(len(desk.y))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.unwritable(folder, error) from None
    busy = f"another process is drawing {folder}"
    with files.locked(folder / ".lock", busy) if team.main else contextlib.nullcontext():
        if team.main:
            _prepare(folder, plan)
        todo = team.all_gather([number for number in range(count) if team.main and not drawing.part(number).exists()])[
            0
        ]
        done = len(desk.y) - sum(len(desk.y[n * CHUNK : (n + 1) * CHUNK]) for n in todo)
        progress(done)
        for number in _draw_parts(desk, todo[team.rank :: team.world], processes):
            done += len(desk.y[number * CHUNK : (number + 1) * CHUNK]) * team.world
            progress(min(done, len(desk.y)))
        team.all_gather(None)  # every part is there
        if team.main:
            _publish(desk, plan, count, trajectory)
        team.all_gather(None)
    return folder


def _publish(desk: WorkerState, plan: Mapping[str, Any], count: int, trajectory: bool) -> None:
    """Make the set of its parts."""
    drawing, folder = desk.drawing, desk.drawing.folder
    frames = 60 if trajectory else 7
    options: dict[str, Any] = {"outside": desk.outside, "classes": drawing.classes, "seed": drawing.seed}
    moments, steps = generate.draw_trajectory(desk.model, drawing.sampler, desk.data, frames=frames, **options)
    if trajectory:
        files.write(folder / "film.gif", pictures.animate(moments))
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, 13 if trajectory else 7)})
    strip = moments[:, shown], [steps[i] for i in shown]
    parts = (_read(drawing.part(number)) for number in range(count))
    about = {**plan, "fast": "off" if desk.quick is None else desk.quick.way.name}
    generate.write_parts(folder, parts, desk.y, desk.data.shape, about, len(desk.data.classes), strip)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    (folder / "plan.json").unlink(missing_ok=True)


def _prepare(folder: Path, plan: Mapping[str, Any]) -> None:
    """Remove what is whole, or was begun by another plan."""
    whole = (folder / "manifest.json").exists()
    (folder / "manifest.json").unlink(missing_ok=True)
    if whole or files.read_json(folder / "plan.json", default={}) != plan:
        shutil.rmtree(folder / "parts", ignore_errors=True)
        (folder / "film.gif").unlink(missing_ok=True)
        files.write_json(folder / "plan.json", dict(plan))


def _draw_parts(desk: WorkerState, todo: list[int], processes: int) -> Iterator[int]:
    """Draw chunks; their numbers, as they get done."""
    if min(processes, len(todo)) < 2:
        for number in todo:
            desk.draw(number)
            yield number
        return
    threads = max(1, torch.get_num_threads() // processes)
    pool = ProcessPoolExecutor(
        min(processes, len(todo)), multiprocessing.get_context("spawn"), _init_worker, (desk.drawing, threads)
    )
    try:
        for done in as_completed([pool.submit(_draw, number) for number in todo]):
            yield done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_desks: list[WorkerState] = []  # of a process of the pool


def _init_worker(drawing: SampleJob, threads: int) -> None:
    """Open the desk of a process of the pool; it ends when its parent does, however that ends."""

    def follow() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    _desks.append(WorkerState.open(drawing))


def _draw(number: int) -> int:
    _desks[0].draw(number)
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
