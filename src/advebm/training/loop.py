"""The training loop, which counts progress in images.  It contains no code for particular training methods."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advebm.core import processes
from advebm.core.errors import Diverged, EarlyStop, Interrupted
from advebm.runs.engine import Engine
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run, environment
from advebm.runs.tracking import find_trackers, tracking
from advebm.training.setup import check_trainable, load_initial_weights, set_up
from advebm.training.signals import explain_resume, stopping
from advebm.training.trainer import Report, Show, Trainer

Tick = Callable[[int], None]  # called with the images seen so far


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    track: str | Sequence[str] = (),
    report: Report = lambda line: None,
    tick: Tick = lambda images: None,
    show: Show = lambda images, x, y: None,
) -> Run:
    """Train a recipe in a run folder.

    Args:
        recipe: what to compute.
        folder: new or empty; with ``resume``, the folder of this recipe's run.  All processes use the main process's.
        resume: whether to continue from the latest checkpoint; this needs the same number of processes.  On CPU the
            result is bit-identical to an uninterrupted run, except that the first logged means after resuming cover
            only the steps since the checkpoint.
        device: ``cpu``, ``cuda``, ``cuda:1``, …  None: ``cuda`` if there is one, else ``cpu``.
        track: names of experiment trackers, such as ``("tensorboard",)``, see :mod:`advebm.runs.tracking`; or text
            with commas.
        report: called with every line of ``metrics.jsonl``.
        tick: called after every step with the images seen so far, over all stages.
        show: called with the samples that validation draws, if ``train.features`` is set.

    Raises:
        UserError: the recipe, the folder or a tracker cannot be used.
        Diverged: losses or weights were non-finite more often than the recipe's ``rollbacks``.
        Interrupted: SIGINT or SIGTERM was received; the run is saved.
        Lost: another process of the job has ended.
    """
    engine, cfg = Engine(device), recipe.train
    folder = engine.all_gather(folder)[0]
    trackers = find_trackers(track)
    options = f"--track {','.join(trackers)} --resume" if trackers else "--resume"
    command = f"{processes.launch_command(engine.world)} train {options}"
    if resume:
        run = Run.open(folder)
        if run.stopped_early or (run.finished and run.processes != engine.world):
            return run  # no training is left to do
        run.check_processes(engine.world)

    # Check everything that may be wrong with the request before writing any file
    setup = set_up(recipe, engine)
    judge = None if setup.distance is None else setup.distance.judge
    if resume:
        Run.open(folder).check_images(setup.data)
        Run.open(folder).check_judge(judge)
    fresh = not resume or not Run.open(folder).checkpoints.latest()
    if fresh and recipe.init is not None and not recipe.before:
        load_initial_weights(setup.model, recipe.init, setup.data, recipe)
    check_trainable(setup.model, recipe)

    # Create the folder, and train the earlier stages
    if not resume and engine.main:
        facts = {"processes": engine.world, "images": setup.data.digest()}
        facts |= {} if judge is None else {"judge": judge}
        Run.create(folder, recipe, {**environment(engine.device, cfg.precision), **facts})
    engine.barrier()
    run = Run.open(folder)
    run.data = setup.data  # so that it is not loaded again
    with run.locked(engine.main), tracking(trackers, run, main=engine.main) as tracker:

        def report_and_track(line: Mapping[str, Any]) -> None:
            report(line)
            tracker.log(line)

        def show_and_track(images: int, x: Tensor, y: Tensor) -> None:
            show(images, x, y)
            tracker.show(images, x, y)

        callbacks: dict[str, Any] = {"report": report_and_track, "tick": tick, "show": show_and_track}
        if fresh and recipe.before:
            last_stage = train_stages_before(recipe, run, device, command, **callbacks)
            load_initial_weights(setup.model, str(last_stage.folder), setup.data, recipe)
        trainer = Trainer(run, setup, report_and_track, show_and_track)
        with explain_resume(run, command), stopping() as signalled, torch.random.fork_rng(devices=[]):
            trainer.begin()
            train_to_end(trainer, tick, signalled, command)
    return run


def train_to_end(trainer: Trainer, tick: Tick, signalled: Callable[[], bool], command: str) -> None:
    """Train until all images are seen or the objective stops, with logs, validations, checkpoints and rollbacks."""
    engine, cfg = trainer.engine, trainer.cfg
    while not trainer.finished:
        due = trainer.progress.due_after(cfg.batch, cfg.images)
        try:
            trainer.step(measure_shift=due(cfg.log_every))
            if engine.main:
                tick(trainer.seen_before + trainer.progress.images)
            trainer.warn()
            if due(cfg.log_every):
                trainer.log()
            if trainer.setup.validates and due(cfg.validate_every):
                trainer.validate()
            stop = engine.any(signalled())
            if due(cfg.checkpoint_every) or trainer.progress.at_best or stop:
                trainer.save()
            if stop and not trainer.finished:
                saved = f"saved after {trainer.progress.images:,} images"
                raise Interrupted(f"{saved}; {command} {trainer.run.folder}")
        except EarlyStop as reason:
            trainer.stop_early(reason)
            break
        except Diverged as failure:
            trainer.rollback(failure)


def train_stages_before(
    recipe: Recipe, run: Run, device: str | None, command: str, report: Report, tick: Tick, show: Show
) -> Run:
    """Train the unfinished earlier stages of a recipe in ``RUN/before``, and return the run of the last one."""
    init = recipe.init
    for number, (stage, folder) in enumerate(zip(recipe.before, run.before, strict=True)):
        started = (folder / "config.yaml").exists()
        if not started or not Run.open(folder).finished:
            offset = sum(earlier.train.images for earlier in recipe.before[:number])
            callbacks: dict[str, Any] = {
                "report": lambda line, offset=offset: report({**line, "images": offset + line["images"]}),
                "tick": lambda images, offset=offset: tick(offset + images),
                "show": lambda images, x, y, offset=offset: show(offset + images, x, y),
            }
            try:
                train(dataclasses.replace(stage, init=init), folder, resume=started, device=device, **callbacks)
            except Interrupted as stop:
                raise Interrupted(f"{str(stop).partition(';')[0]} of {stage.name}; {command} {run.folder}") from None
        init = str(folder)
    return Run.open(folder)
