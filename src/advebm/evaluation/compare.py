"""Comparison of several runs by the same measurements."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm.attacks.base import Adversary
from advebm.attacks.projected import Attack
from advebm.core import config, files
from advebm.core.errors import UserError
from advebm.evaluation import evaluate
from advebm.metrics.base import Bar, Metric, no_bar
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.metrics.quality import SampleQuality
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.models.precision import asked_precision
from advebm.runs.find_space import find_space
from advebm.runs.run import Run, share_images
from advebm.sampling import generate
from advebm.training.cost import passes_per_image

Records = list[dict[str, Any]]
Wanted = dict[Key, Metric]  # key of a record -> metric that produces it


def jeat_attacks(threat: Attack) -> tuple[Attack, ...]:
    """Return PGD of 10 and 50 steps, and the energy attack with the threat's steps, in its ball, JEAT section 4.1."""
    pgd = dataclasses.replace(threat, loss="cross-entropy", restarts=1)
    pgd10, pgd50 = (dataclasses.replace(pgd, steps=steps) for steps in (10, 50))
    return pgd10, pgd50, dataclasses.replace(pgd, loss="energy")


def compare(
    runs: Sequence[Run],
    *,
    threat: Attack | None = None,
    features: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
    bar: Bar = no_bar,
) -> dict[str, Records]:
    """Measure clean, PGD-10, PGD-50 and energy-attack accuracy, sample quality and training cost of several runs.

    Results already in a run's ``metrics.json`` for its latest checkpoint are reused; new ones are appended to it.
    Returns the records of each run by its title.

    Args:
        runs: trained runs; those with samples are also compared by sample quality.
        threat: threat model for all runs; default: the first run's.
        features: feature space of sample quality, as for :func:`advebm.evaluation.evaluate.evaluate_run`.
        progress: called with ``TITLE: METRIC`` when a metric starts on a run.
        bar: progress bar of the attacks.

    Raises:
        UserError: the runs have different test images.
    """
    share_images(runs)
    test_images = [run.data.test.x for run in runs]
    if any(not torch.equal(x, test_images[0]) for x in test_images):
        raise UserError("the runs have different test images; compare runs on the same data")
    attacks = jeat_attacks(threat or runs[0].recipe.threat)
    described = (None, *map(config.describe, attacks))
    weights = (None, feature_weights(features))
    results = {}
    for title, run in by_title(runs).items():
        wanted = {**accuracy_metrics(attacks), **quality_metrics(run, features)}
        tell = lambda name, title=title: progress(f"{title}: {name}")
        measure(run, wanted, features=features, seed=seed, device=device, progress=tell, bar=bar)
        if not any(r["name"] == COSTS[0] for r in run.records()):
            run.append(training_costs(run))
        keys = {*wanted, *map(Key, COSTS)}
        keys |= {k._replace(quantity=q) for k in wanted if k.samples for q in ("KID", "class score", "intended class")}
        results[title] = [
            r
            for r in evaluate.newest_records(run.records())
            if key_of(r) in keys and r.get("judge") in weights and r["settings"].get("attack") in described
        ]
    return results


def accuracy_metrics(attacks: Iterable[Adversary], images: int | None = None) -> Wanted:
    """Return clean accuracy, and that under each attack on ``images`` test images (None: all)."""
    robust = {Key("accuracy", attack_key(a)): RobustAccuracy(a, images=images) for a in attacks}
    return {Key("accuracy"): Accuracy(), **robust}


def quality_metrics(run: Run, features: str | Path | None) -> Wanted:
    return {Key("FD", samples=name, space=space_name(features)): SampleQuality() for name in run.samples()}


def measure(run: Run, wanted: Wanted, *, features: str | Path | None = None, seed: int = 0, **options: Any) -> Records:
    """Evaluate the metrics that the run has no current records of, and return the newest record of each wanted key.

    ``options`` are further ones of :func:`advebm.evaluation.evaluate.evaluate_run`.
    """
    current = current_records(run, wanted, features=features, seed=seed)
    missing = tuple(dict.fromkeys(metric for key, metric in wanted.items() if key not in current))
    if missing:
        recipe = dataclasses.replace(run.recipe, metrics=missing)
        evaluate.evaluate_run(run, recipe=recipe, features=features, seed=seed, **options)
        current = current_records(run, wanted, features=features, seed=seed)
    return list(current.values())


def records_beside(run: Run, record: Mapping[str, Any], quantities: Iterable[str]) -> Records:
    """Return the records of these quantities, in this order, that were measured together with one of the run."""
    key = key_of(record)
    together = {key_of(r): r for r in run.records() if r.get("time") == record["time"]}
    return [together[k] for q in quantities if (k := key._replace(quantity=q)) in together]


def current_records(
    run: Run, wanted: Wanted, *, features: str | Path | None = None, seed: int = 0
) -> dict[Key, dict[str, Any]]:
    """Return the newest current record of each wanted key that has one.

    A record is current if checkpoint (the latest), seed, attack, number of images, precision and metric settings agree;
    for sample quality also the set of samples (by its manifest) and the weights of the feature network.
    """
    about = {"checkpoint": run.checkpoints.path().name, "seed": seed}
    judge = feature_weights(features)
    named = {key.samples for key in wanted}
    manifests = {name: generate.read_set(folder).manifest for name, folder in run.samples().items() if name in named}
    records = run.records()

    def find_current(key: Key, metric: Metric) -> Records:
        samples = key.samples if key.space is not None else None  # the set whose quality is measured
        settings = {"samples": samples, **manifests[samples]} if samples else {}
        if (attack := getattr(metric, "attack", None)) is not None:
            settings["attack"] = config.describe(attack)
        settings |= {"images": metric.images} if hasattr(metric, "images") else {}
        precision = getattr(metric, "precision", None)
        expected = {**about, "judge": judge} if samples else about
        spec = json.loads(json.dumps({k: v for k, v in config.describe(metric).items() if v is not None}))
        return [
            r
            for r in records
            if key_of(r) == key
            and all(r.get(name) == value for name, value in expected.items())
            and all(r["settings"].get(name) == value for name, value in settings.items())
            and (precision is None or asked_precision(r["settings"].get("precision", "")) == precision)
            and spec.items() <= r["settings"].get("metric", spec).items()  # not every metric stores its settings
        ]

    return {key: found[-1] for key, metric in wanted.items() if (found := find_current(key, metric))}


COSTS = ("forward passes an image", "backward passes an image", "training images a second")


def training_costs(run: Run) -> Records:
    """Return passes per training image, counted on one training step, and the median logged speed (0 if none)."""
    speeds = [line["perf/img_per_s"] for line in run.history() if "perf/img_per_s" in line]
    values = (*passes_per_image(run.recipe), statistics.median(speeds) if speeds else 0.0)
    about = {"error": 0.0, "settings": {}, "series": {}, "time": files.timestamp()}
    counts = (1, 1, len(speeds))
    return [{"name": n, "value": v, "count": c, **about} for n, v, c in zip(COSTS, values, counts, strict=True)]


def by_title(runs: Iterable[Run]) -> dict[str, Run]:
    """Return runs by their recipe's name, or by their folder if several have a recipe of that name."""
    runs = list(runs)
    names = [run.recipe.name for run in runs]
    return {str(run.folder) if names.count(name) > 1 else name: run for name, run in zip(names, runs, strict=True)}


def over_seeds(results: Sequence[Mapping[str, Records]]) -> dict[str, Records]:
    """Average the results of several seeds, with the deviation as ``error``; those of one seed stay as they are.

    Records that only one of several seeds has are dropped, and titles that the first seed has not.
    """
    if len(results) == 1:
        return dict(results[0])
    merged: dict[str, Records] = {}
    for title in results[0]:
        groups: dict[tuple[str, Any], Records] = {}
        for results_of_seed in results:
            for r in results_of_seed[title]:
                groups.setdefault((r["name"], r["settings"].get("samples")), []).append(r)
        merged[title] = [
            {
                **group[0],
                "value": statistics.fmean(r["value"] for r in group),
                "error": statistics.stdev(r["value"] for r in group),
                "seeds": len(group),
                **({"time": max(r["time"] for r in group)} if "time" in group[0] else {}),
            }
            for group in groups.values()
            if len(group) > 1
        ]
    return merged


def space_name(features: str | Path | None) -> str:
    """Return the name of a feature space in records.  None: the run's own features."""
    return evaluate.OWN_FEATURES if features is None else find_space(features).name


def feature_weights(features: str | Path | None) -> str | None:
    """Return the name of the feature network's weights in records.  None: the run's own features."""
    return None if features is None else find_space(features).judge
