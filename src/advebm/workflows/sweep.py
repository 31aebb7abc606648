"""Train combinations of options side by side, score them on validation images, and write a table and a picture."""

import functools
import multiprocessing
import signal
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

import torch

from advebm.core import config, console, files
from advebm.core.allocator import tune_cpu_allocator
from advebm.core.errors import Interrupted, UserError, unknown_name
from advebm.core.processes import end_with_parent
from advebm.core.threads import count_cores, use_threads
from advebm.reporting import sweep as pages
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run, environment
from advebm.training import loop
from advebm.training.cost import images_in_whole_batches
from advebm.training.sweep import (
    By,
    Options,
    Row,
    Sweep,
    Trial,
    best_first,
    better_half,
    combine,
    count_validation,
    images_for,
    options_text,
    read_result,
    training_flops,
    trial_name,
    with_images,
)
from advebm.workflows.devices import choose_device
from advebm.workflows.train import find_recipe, train_or_resume

TELL = 0.5  # seconds between two messages of a trial about its progress


def sweep(
    source: str | Path | Recipe,
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    vary: Mapping[str, Sequence[Any]],
    trials: Sequence[Options] = (),
    out: Path,
    seeds: int = 1,
    jobs: int | None = None,
    halve: int = 0,
    budget: float | None = None,
    by: By = "robust",
    init: str | None = None,
    labels: str | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> Sweep:
    """Train every combination of options in a process of its own, with one thread, and sort them by a score.

    Each trial is a run in ``OUT/trials``, equal to what ``advebm train --threads 1`` makes of these options.  The score
    is that of the run's last validation: averaged weights, validation images, the recipe's threat; test images are not
    looked at.  Trials that are finished or have diverged are not trained again, others go on at their last checkpoint,
    so that the same call goes on after any interruption.  A trial that fails leaves the others alone.

    Args:
        source: name of a recipe, the path of a file, or a recipe.
        overrides: options of all trials.
        vary: values by option, of which every combination is tried.
        trials: combinations of your own, each tried with all of ``vary``; empty: those of ``vary`` alone.
        out: folder of table, picture and trials.
        seeds: number of seeds, the same for every combination; their mean score counts.
        jobs: number of trials side by side; None: as many as cores, one on a GPU.
        halve: number of rounds of successive halving (Jamieson and Talwalkar, 2016) before the last round.  All
            combinations are trained on 1 / 2^halve of the images, the better half of them on twice as many, and so on.
            A round trains from the beginning, with a whole schedule of that length: a long training that is stopped
            early would be judged at a high learning rate, which says little of its end.
        budget: FLOP of training of a trial, see :func:`advebm.training.sweep.images_for`: it sets ``train.images``, so
            that methods of different cost get equal shares.  None: ``train.images`` is the recipe's.
        by: what counts: ``robust``, ``clean``, or ``fd``, which needs ``train.features``.
        init, labels, seed: as for :func:`advebm.workflows.train.find_recipe`; ``seed`` is the first one.
        device: None: the best one available.

    Raises:
        UserError: an option, a value or a combination that does not exist, trials that cannot be compared, or a folder
            with other runs.
        Interrupted: Ctrl-C; what is trained is saved.
    """
    if by not in get_args(By):
        raise unknown_name("score", by, get_args(By))
    for name, value, least in (("seeds", seeds, 1), ("jobs", jobs, 1), ("halve", halve, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    overrides, combinations = list(overrides), combine(vary, trials)
    varied = {name for options in combinations for name in options}
    if "seed" in varied:
        raise UserError("seed says which is the first one, and seeds how many; leave it out of what varies")
    if budget is not None and "train.images" in varied:
        raise UserError("a budget says how many images; leave train.images out of what varies")

    def recipes_of(options: Options) -> tuple[Recipe, ...]:
        """Return the recipes of a combination, one for each seed."""
        changes: dict[str, Any] = {"init": init, "labels": labels}
        make = lambda s: find_recipe(source, [*overrides, *options.items()], seed=s, **changes)
        try:
            first = make(seed)
        except UserError as error:
            raise UserError(f"{options_text(options)}: {error}") from None
        return first, *map(make, range(first.seed + 1, first.seed + seeds))

    planned = [(options, recipes_of(options)) for options in combinations]
    check_comparable([recipes[0] for _, recipes in planned], by)
    device = choose_device(device)
    jobs = jobs or (count_cores() if device == "cpu" else 1)
    about, done = environment(torch.device(device)), list[Row]()

    def write(rows: Sequence[Row]) -> Sweep:
        found = Sweep(best_first([*done, *rows], by), by, budget, about, out)
        pages.write(found)
        return found

    with files.locked(out / ".lock", f"another sweep is at work in {out}"):
        rung = 0
        while True:
            last = rung == halve or len(planned) == 1
            share = 1.0 if last else 0.5 ** (halve - rung)
            rows = plan(planned, out / "trials", rung, share, budget)
            train_rows(rows, jobs, device, functools.partial(write, rows))
            found = write(rows)
            kept = [] if last else better_half(rows, by)
            if not kept:
                return found
            done += rows
            planned = [pair for pair in planned if pair[0] in [row.options for row in kept]]
            rung += 1


def check_comparable(recipes: Sequence[Recipe], by: By) -> None:
    """Raise UserError if scores of these recipes have different meanings, or there is none of this kind."""
    alike: dict[str, set[Any]] = {
        "threat": {recipe.threat for recipe in recipes},
        "train.validate_with": {recipe.train.validate_with for recipe in recipes},
        "train.features": {recipe.train.features for recipe in recipes},
        "train.samples": {recipe.train.samples for recipe in recipes},
        "data": {str(_without_augmentation(config.describe(recipe.data))) for recipe in recipes},
        "kind of model": {(r.objective.outputs == 1, r.objective.hidden is None) for r in recipes},
    }
    for what, found in alike.items():
        if len(found) > 1:
            raise UserError(f"trials are scored alike, and these differ in {what}; leave it out of what varies")
    if by == "fd" and recipes[0].train.features is None:
        raise UserError("fd needs a feature space; give --train.features")


def _without_augmentation(data: Any) -> Any:
    """Return a described source without what changes training images only."""
    if not isinstance(data, Mapping):
        return data
    return {name: _without_augmentation(value) for name, value in data.items() if name != "augment"}


def plan(
    planned: Sequence[tuple[Options, tuple[Recipe, ...]]], folder: Path, rung: int, share: float, budget: float | None
) -> list[Row]:
    """Return the rows of a round, whose trials get a share of the budget, or of their recipes' images.

    Raises:
        UserError: a trial's folder holds a run of another recipe, or two trials have the same name.
    """
    rows = []
    with console.bar("costs counted", len(planned), 0) as tell:
        for number, (options, recipes) in enumerate(planned, 1):
            images = recipes[0].train.images
            if budget is not None:
                images = images_for(recipes[0], share * budget)
            elif share < 1:
                images = images_in_whole_batches(with_images(recipes[0], round(share * images)))
            sized = [with_images(recipe, images) for recipe in recipes]
            trials = tuple(Trial(r, folder / trial_name(options, r.seed, images)) for r in sized)
            rows.append(Row(options, trials, flops_if_known(sized[0]), count_validation(sized[0]), rung))
            tell(number)
    folders = [trial.folder for row in rows for trial in row.trials]
    for trial in (trial for row in rows for trial in row.trials):
        if folders.count(trial.folder) > 1:
            raise UserError(f"two trials would have the same folder {trial.folder}; leave one of their values out")
        if (trial.folder / "config.yaml").is_file() and Run.open(trial.folder).recipe != trial.recipe:
            raise UserError(f"{trial.folder} holds a run of another recipe; choose another --out")
    return rows


def flops_if_known(recipe: Recipe) -> float | None:
    """Return the FLOP of training, or None if counting fails, as it may for networks and objectives of users."""
    try:
        return training_flops(recipe)
    except Exception as error:
        console.say(f"{recipe.name}: its FLOP cannot be counted: {textwrap.shorten(str(error), 200, placeholder=' …')}")
        return None


def train_rows(rows: Sequence[Row], jobs: int, device: str, changed: Callable[[], object]) -> None:
    """Train what is missing, and put results and faults into the rows; ``changed`` is called after each trial."""
    row_of = {trial.folder: row for row in rows for trial in row.trials}
    trials = [trial for row in rows for trial in row.trials]

    def take(trial: Trial, fault: str = "") -> bool:
        """Take over the result of a trial; return whether it has ended."""
        row = row_of[trial.folder]
        run = Run(trial.folder)
        begun = (trial.folder / "config.yaml").is_file()
        try:
            fault = fault or (run.diverged if begun else "")
            if begun and not fault and (run.finished or run.stopped_early):
                row.results[trial.folder] = read_result(run)
        except UserError as error:  # a damaged file
            fault = str(error)
        if fault:
            row.faults[trial.folder] = textwrap.shorten(fault, 300, placeholder=" …")
            console.say(f"{trial.folder.name}: {row.faults[trial.folder]}")
        return trial.folder in row.results or bool(fault)

    length = lambda trial: sum(stage.train.images for stage in (*trial.recipe.before, trial.recipe))
    left = [trial for trial in trials if not take(trial)]
    if not left:
        return
    seen = {trial.folder: length(trial) for trial in trials}
    for trial in left:
        begun = (trial.folder / "config.yaml").is_file()
        seen[trial.folder] = sum(stage.images for stage in Run(trial.folder).stages) if begun else 0
    console.say(f"{len(left)} of {len(trials)} trials to train, {min(jobs, len(left))} side by side")
    total = sum(map(length, trials))
    with console.bar("images", total) as tell:

        def told(trial: Trial, images: int) -> None:
            seen[trial.folder] = max(seen[trial.folder], images)
            ended = sum(len(row.results) + len(row.faults) for row in rows)
            tell(min(sum(seen.values()), total), f"{ended} of {len(trials)} trials ended")

        def ended(trial: Trial, fault: str) -> None:
            if not take(trial, fault):
                take(trial, "its process ended before its training did")
            told(trial, length(trial))
            changed()

        run_side_by_side(left, jobs, device, told, ended)


def run_side_by_side(
    trials: Sequence[Trial],
    jobs: int,
    device: str,
    told: Callable[[Trial, int], None],
    ended: Callable[[Trial, str], None],
) -> None:
    """Train each trial in a process of its own, at most ``jobs`` at once.

    A process is told to stop by SIGTERM, whereupon training saves a checkpoint; Ctrl-C reaches this process alone.

    Args:
        trials: what to train or to resume.
        jobs: number of processes at once.
        device: where to compute.
        told: called with a trial and the images it has seen, over all stages.
        ended: called with a trial and why it failed, or an empty text.

    Raises:
        Interrupted: Ctrl-C.
    """
    context, waiting = _context(), deque(trials)
    running: dict[Any, tuple[BaseProcess, Trial]] = {}
    faults: dict[Path, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                trial = waiting.popleft()
                reader, sender = context.Pipe(duplex=False)
                process = context.Process(target=_train, args=(trial, device, sender), daemon=True)
                _start_without_interrupts(process)
                sender.close()  # here, so that the end of the process is the end of the pipe
                running[reader] = (process, trial)
            channels: list[Any] = wait(list(running))
            for receiver in channels:
                process, trial = running[receiver]
                try:
                    message = receiver.recv()
                except (EOFError, OSError):
                    process.join()
                    del running[receiver]
                    ended(trial, faults.get(trial.folder) or _exit_text(process.exitcode or 0))
                    continue
                if isinstance(message, str):
                    faults[trial.folder] = message
                else:
                    told(trial, message)
    except KeyboardInterrupt:
        unfinished = len(waiting) + len(running)
        raise Interrupted(f"stopped with {unfinished} trials unfinished; the same command goes on") from None
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _exit_text(status: int) -> str:
    """Return why a process with this exit status did not end by itself; empty if it did."""
    if status < 0:
        return f"its process was killed by signal {-status}"
    return f"its process ended with status {status}" if status else ""


def _context() -> Any:
    """Return how processes are started: where possible from one that has imported this module once, in an instant."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_without_interrupts(process: BaseProcess) -> None:
    """Start a process that Ctrl-C does not reach, so that it neither prints a traceback nor gets two signals."""
    if not hasattr(signal, "pthread_sigmask"):
        process.start()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _train(trial: Trial, device: str, channel: Connection) -> None:
    """Train in this process; send the images seen now and then, and why it failed if it does."""

    end_with_parent()
    warnings.simplefilter("ignore")  # the run's log has them, and standard error is the sweep's
    use_threads(1)
    tune_cpu_allocator()
    last = [0.0]

    def tick(images: int) -> None:
        if (now := time.monotonic()) - last[0] > TELL:
            last[0] = now
            channel.send(images)

    try:
        train_or_resume(*trial, fit=functools.partial(loop.train, device=device, tick=tick))
    except Interrupted:
        return  # which the sweep knows
    except UserError as error:
        channel.send(str(error))
    except Exception as error:  # whatever it is, it is this trial's
        channel.send(f"{type(error).__name__}: {error}")
