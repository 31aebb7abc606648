"""The training loop, which counts progress in images.  It contains no code for particular training methods."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from advebm.core import processes
from advebm.core.errors import Diverged, EarlyStop, Interrupted
from advebm.runs.engine import Engine
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run, environment
from advebm.training.setup import check_trainable, load_initial_weights, set_up
from advebm.training.signals import explain_resume, stopping
from advebm.training.trainer import Report, Trainer

Tick = Callable[[int], None]  # called with the images seen so far


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    report: Report = lambda line: None,
    tick: Tick = lambda images: None,
) -> Run:
    """Train a recipe in a run folder.

    Args:
        recipe: what to compute.
        folder: new or empty; with ``resume``, the folder of this recipe's run.  All processes use the main process's.
        resume: whether to continue from the latest checkpoint; this needs the same number of processes.  On CPU the
            result is bit-identical to an uninterrupted run, except that the first logged means after resuming cover
            only the steps since the checkpoint.
        device: ``cpu``, ``cuda``, ``cuda:1``, …  None: ``cuda`` if there is one, else ``cpu``.
        report: called with every line of ``metrics.jsonl``.
        tick: called after every step with the images seen so far, over all stages.

    Raises:
        UserError: the recipe or the folder cannot be used.
        Diverged: losses or weights were non-finite more often than the recipe's ``rollbacks``.
        Interrupted: SIGINT or SIGTERM was received; the run is saved.
        Lost: another process of the job has ended.
    """
    engine, cfg = Engine(device), recipe.train
    folder = engine.all_gather(folder)[0]
    command = f"{processes.launch_command(engine.world)} train --resume"
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
    if fresh and recipe.before:
        last_stage = train_stages_before(recipe, run, device, report, tick, command)
        load_initial_weights(setup.model, str(last_stage.folder), setup.data, recipe)
    trainer = Trainer(run, setup, report)

    with (
        explain_resume(run, command),
        run.locked(engine.main),
        stopping() as signalled,
        torch.random.fork_rng(devices=[]),
    ):
        trainer.begin()
        while not trainer.finished:
            due = trainer.progress.due_after(cfg.batch, cfg.images)
            try:
                trainer.step(measure_shift=due(cfg.log_every))
                if engine.main:
                    tick(trainer.seen_before + trainer.progress.images)
                trainer.warn()
                if due(cfg.log_every):
                    trainer.log()
                if setup.validates and due(cfg.validate_every):
                    trainer.validate()
                stop = engine.any(signalled())
                if due(cfg.checkpoint_every) or trainer.progress.at_best or stop:
                    trainer.save()
                if stop and not trainer.finished:
                    raise Interrupted(f"saved after {trainer.progress.images:,} images; {command} {folder}")
            except EarlyStop as reason:
                trainer.stop_early(reason)
                break
            except Diverged as failure:
                trainer.rollback(failure)
    return run


def train_stages_before(recipe: Recipe, run: Run, device: str | None, report: Report, tick: Tick, command: str) -> Run:
    """Train the unfinished earlier stages of a recipe in ``RUN/before``, and return the run of the last one."""
    init = recipe.init
    for number, (stage, folder) in enumerate(zip(recipe.before, run.before, strict=True)):
        started = (folder / "config.yaml").exists()
        if not started or not Run.open(folder).finished:
            offset = sum(earlier.train.images for earlier in recipe.before[:number])
            callbacks: dict[str, Any] = {
                "report": lambda line, offset=offset: report({**line, "images": offset + line["images"]}),
                "tick": lambda images, offset=offset: tick(offset + images),
            }
            try:
                train(dataclasses.replace(stage, init=init), folder, resume=started, device=device, **callbacks)
            except Interrupted as stop:
                raise Interrupted(f"{str(stop).partition(';')[0]} of {stage.name}; {command} {run.folder}") from None
        init = str(folder)
    return Run.open(folder)
