"""Grid search over the settings of a sampler, on the validation split; test images are never used.

Each setting is a trial with its own file in ``RUN/tuning``, written atomically.  Trials that differ in the number of
steps alone are measured along the same chains.  A process locks the trials of its chains while it runs, so several
processes that make the same call share the trials.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from advebm.core import config, files
from advebm.core.errors import Busy, UserError, unknown_name
from advebm.data.sources import Data
from advebm.metrics.base import Features
from advebm.metrics.distances import RealFeatures
from advebm.metrics.keys import label
from advebm.models.batching import device_of
from advebm.models.inference import BackendName
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.sampling import generate
from advebm.sampling.job import start_images

Quantity = Literal["KID", "FD"]
SETTINGS = ("step_size", "radius", "noise", "steps")  # α, β, η, K
FACTORS = (0.5, 1.0, 2.0)  # default values of α and K, relative to those of the sampler


def settings_grid(sampler: Sampler, values: Mapping[str, Sequence[Any]]) -> list[Sampler]:
    """Return a sampler for every combination of values of α, β, η and K, without duplicates.

    By default α and K take half, once and twice the value of ``sampler`` (K rounded, at least 1); β and η keep it.
    """
    for name in values:
        if name not in SETTINGS:
            raise UserError(f"tuning searches {', '.join(SETTINGS)}, got {name!r}")
    grid: dict[str, Sequence[Any]] = {name: [getattr(sampler, name)] for name in SETTINGS}
    grid["step_size"] = [sampler.step_size * factor for factor in FACTORS]
    grid["steps"] = [max(1, round(sampler.steps * factor)) for factor in FACTORS]
    grid |= values
    combinations = (dict(zip(grid, settings, strict=True)) for settings in itertools.product(*grid.values()))
    return list(dict.fromkeys(dataclasses.replace(sampler, **settings) for settings in combinations))


def tune(
    run: Run,
    samplers: Sequence[Sampler],
    space: Features,
    *,
    judge: str | None = None,
    by: Quantity = "KID",
    per_class: int = 20,
    seed: int = 0,
    checkpoint: str = "latest",
    device: str = "cpu",
    backend: BackendName = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Evaluate every sampler, and write the best one to ``RUN/tuned/METHOD-START.json``.

    Finished trials are not repeated, and trials that another process is running are skipped without waiting.  The
    best one is written by the process that finds all trials finished.

    Args:
        run: a trained run.
        samplers: the samplers to try, see :func:`settings_grid`; all of one kind and start.
        space: the features in which the distance is computed.
        judge: name of the weights of the feature network, for the record.
        by: the distance to minimise: ``KID``, which is unbiased for few images, or ``FD``.
        per_class: images per class that a trial draws.
        seed: seed of the samples, the same for every trial.
        checkpoint: which checkpoint of the run to use.
        device: where to compute.
        backend: how to compute the network, see :class:`advebm.models.inference.Backend`.
        progress: called with the number of steps taken, of those that :func:`count_steps` counts.

    Returns:
        The records of the finished trials, the best (smallest distance) first.
    """
    if by not in get_args(Quantity):
        raise unknown_name("distance", by, get_args(Quantity))
    number = run.checkpoints.path(checkpoint).name
    data, model = run.data, run.model(number)[0].to(device)
    about = {"by": by, "space": space.name, "judge": judge, "per_class": per_class, "seed": seed, "checkpoint": number}
    about |= {"split": "val", "reference_count": len(data.val), "fast": backend}
    if any(sampler.fit == "test" for sampler in samplers):
        raise UserError("tuning never looks at test images; set fit to train")
    real, outside = RealFeatures(space.of(data.val.x, torch.device(device))), start_images(run, samplers[0], number)
    if outside is not None and samplers[0].start == "outside":
        outside = outside._replace(test=outside.val)
    paths = {sampler: _trial_path(run, sampler, about) for sampler in samplers}
    done = 0
    for chain in _group_by_chain(samplers):
        tell = lambda steps, done=done: progress(done + steps)
        _run_trials({sampler: paths[sampler] for sampler in chain}, model, data, outside, real, space, about, tell)
        done += count_steps(chain)
        progress(done)
    records = [files.read_json(path) for path in paths.values() if path.exists()]
    records.sort(key=lambda trial: trial["value"])
    if len(records) == len(paths):
        files.write_json(result_path(run, samplers[0]), {**records[0], "trials": len(records)})
    return records


def count_steps(samplers: Sequence[Sampler]) -> int:
    """Return how many steps :func:`tune` takes with every sample of its trials."""
    return sum(max(sampler.steps for sampler in chain) for chain in _group_by_chain(samplers))


def result_path(run: Run, like: Sampler) -> Path:
    """Return the file in which :func:`tune` keeps the best setting for the kind and start of ``like``."""
    return run.folder / "tuned" / f"{generate.set_name(like)}.json"


def find_tuned(run: Run, like: Sampler) -> tuple[Sampler, dict[str, Any]] | None:
    """Load the best setting for the kind and start of ``like``, and the rest of its record; None if not tuned."""
    if not (path := result_path(run, like)).exists():
        return None
    best = files.read_json(path)
    try:
        sampler = config.build(best["sampler"], "sampler")
        return sampler, {name: value for name, value in best.items() if name != "sampler"}
    except (AttributeError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}); tune again or remove it") from None


def response_curves(trials: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Any, float, float]]]:
    """Return, for each setting that varies, (value, best distance, median distance) over the trials with that value."""
    curves = {}
    for name in SETTINGS:
        groups: dict[Any, list[float]] = {}
        for trial in trials:
            groups.setdefault(trial["sampler"][name], []).append(trial["value"])
        if len(groups) > 1:
            order = sorted(groups, key=lambda value: float("inf") if value is None else value)
            curves[name] = [(v, min(groups[v]), torch.tensor(groups[v]).double().quantile(0.5).item()) for v in order]
    return curves


def _trial_path(run: Run, sampler: Sampler, about: Mapping[str, Any]) -> Path:
    text = json.dumps({"sampler": config.describe(sampler), **about}, sort_keys=True)
    return run.folder / "tuning" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _group_by_chain(samplers: Sequence[Sampler]) -> list[list[Sampler]]:
    """Return the samplers in groups that the same chains serve, as they differ in their number of steps alone."""
    groups: dict[Sampler, list[Sampler]] = {}
    for sampler in samplers:
        chain = dataclasses.replace(sampler, steps=0) if sampler.extendable else sampler
        groups.setdefault(chain, []).append(sampler)
    return list(groups.values())


def _run_trials(
    paths: Mapping[Sampler, Path],
    model: nn.Module,
    data: Data,
    outside: Data | None,
    real: RealFeatures,
    space: Features,
    about: Mapping[str, Any],
    progress: Callable[[int], None],
) -> None:
    """Run the missing trials of samplers that share their chains, unless another process is at them."""
    lock = next(iter(paths.values())).with_suffix(".lock")
    missing = lambda: {sampler.steps: (sampler, path) for sampler, path in paths.items() if not path.exists()}
    if not missing():
        return
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.as_user_error(lock.parent, error) from None
    with contextlib.suppress(Busy):
        with files.locked(lock, f"another process is at {lock.parent}"):
            if not (trials := missing()):  # another process has finished them in the meantime
                return
            longest, _ = trials[max(trials)]
            y = generate.classes_to_draw(longest, data, about["per_class"])
            tell = lambda done: progress(done * longest.steps // len(y))
            options: dict[str, Any] = {"outside": outside, "seed": about["seed"], "backend": about["fast"]}
            images, _ = generate.generate_along(model, longest, data, y, tuple(trials), progress=tell, **options)
            name = f"{label(about['by'], space.name)} on validation images"
            for steps, (sampler, path) in trials.items():
                features = space.of(images[steps], device_of(model))
                value = real.frechet(features) if about["by"] == "FD" else real.kernel(features)
                files.write_json(path, {"sampler": config.describe(sampler), "name": name, "value": value, **about})
        lock.unlink(missing_ok=True)
