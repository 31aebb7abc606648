"""The training loop, timed in images.  Methods never appear in it."""

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
from advebm.training.signals import going_on, stopping
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
        folder: new or empty; with ``resume``, the one that holds this recipe's run.  Of several processes, the main
            one's.
        resume: go on from the latest checkpoint, with as many processes, to the bit on CPU; only a logged mean may miss
            what its window held before the checkpoint.
        device: ``cpu`` or ``cuda``; None takes the best there is.
        report: called with every line of ``metrics.jsonl``.
        tick: called with the images seen so far, over all stages, after every step.

    Raises:
        UserError: a bad recipe or folder.
        Diverged: non-finite numbers more often than the recipe's ``rollbacks``.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
        Lost: another process of the job is gone.
    """
    engine, cfg = Engine(device), recipe.train
    folder = engine.all_gather(folder)[0]
    again = f"{processes.launch_command(engine.world)} train --resume"
    if resume:
        begun = Run.open(folder)
        if begun.stopped_early or (begun.finished and begun.processes != engine.world):
            return begun  # nothing is left to share
        begun.check_processes(engine.world)

    # Everything that can be wrong with what was asked for, before anything is written
    setup = set_up(recipe, engine)
    fresh = not resume or not Run.open(folder).checkpoints.latest()
    if fresh and recipe.init is not None and not recipe.before:
        load_initial_weights(setup.model, recipe.init, setup.data, recipe)
    check_trainable(setup.model, recipe)

    # The folder, and the stages before
    if not resume and engine.main:
        Run.create(folder, recipe, {**environment(engine.device, cfg.precision), "processes": engine.world})
    engine.barrier()
    run = Run.open(folder)
    run.data = setup.data  # what follows does not load it again
    if fresh and recipe.before:
        last = train_stages_before(recipe, run, device, report, tick, again)
        load_initial_weights(setup.model, str(last.folder), setup.data, recipe)
    trainer = Trainer(run, setup, report)

    # The loop
    with going_on(run, again), run.locked(engine.main), stopping() as signalled, torch.random.fork_rng(devices=[]):
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
                    raise Interrupted(f"saved after {trainer.progress.images:,} images; {again} {folder}")
            except EarlyStop as reason:
                trainer.stop_early(reason)
                break
            except Diverged as failure:
                trainer.rollback(failure)
    return run


def train_stages_before(recipe: Recipe, run: Run, device: str | None, report: Report, tick: Tick, again: str) -> Run:
    """Train what is left of the stages before a recipe, in ``before`` of its run's folder; the last one's run."""
    init = recipe.init
    for number, (stage, folder) in enumerate(zip(recipe.before, run.before, strict=True)):
        begun = (folder / "config.yaml").exists()
        if not begun or not Run.open(folder).finished:
            offset = sum(earlier.train.images for earlier in recipe.before[:number])
            hear: dict[str, Any] = {
                "report": lambda line, offset=offset: report({**line, "images": offset + line["images"]}),
                "tick": lambda images, offset=offset: tick(offset + images),
            }
            try:
                train(dataclasses.replace(stage, init=init), folder, resume=begun, device=device, **hear)
            except Interrupted as stop:
                raise Interrupted(f"{str(stop).partition(';')[0]} of {stage.name}; {again} {run.folder}") from None
        init = str(folder)
    return Run.open(folder)
