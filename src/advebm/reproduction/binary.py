"""Experiments of Binary-AT: critics, and classifiers that are also generative models."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm.attacks.apgd import APGD
from advebm.attacks.projected import Attack
from advebm.core import config, files
from advebm.core.checks import device
from advebm.evaluation import compare, evaluate
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.base import Record
from advebm.metrics.detectors import Detectors
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.metrics.ood import EnergyScore, MaxSoftmax, OutOfDistribution, Score
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.reporting import figures
from advebm.reproduction.experiment import Experiment, Options, Results
from advebm.reproduction.study import (
    DIGITS_L2,
    draw_if_missing,
    find_recipe,
    measure_missing,
    say,
    train_or_resume,
    tune,
)
from advebm.runs.find_space import find_space
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.sampling.step_curve import Chains, CurvePoint, first_reaching

DETECTION = Key("AUROC", set="uniform", by="energy")  # if a run has this record, detection was measured


def detection(run: Run, count: int, restarts: int) -> OutOfDistribution:
    """Return the metric that detects noises and test images of p0 (default: patches), clean and in the worst case."""
    p0 = config.build("patches", "source") if run.recipe.outside is None else run.recipe.outside
    sets = (*OutOfDistribution().sets, p0)
    return OutOfDistribution(sets=sets, count=count, eps=run.recipe.threat.eps, restarts=restarts)


def digits_binary_at(folder: Path, options: Options) -> Experiment:
    """Binary AT on digits from patches of photographs: steps K, fixed or growing, three other p0, no R1, detection."""
    judge_recipe = find_recipe("digits-standard", ())
    critic = lambda **changes: find_recipe("digits-binary-at", options, **changes)
    recipes = {"k-grows": critic()}
    schedule = config.describe(recipes["k-grows"].objective)["curriculum"]
    images, largest = recipes["k-grows"].train.images, schedule["steps"]
    for k in sorted({1, largest // 4, largest // 2, largest}):
        recipes[f"k-{k}"] = critic(objective__curriculum={**schedule, "start": k, "steps": k})
    # The learning rate is constant, so shorter runs are the beginnings of longer ones.
    for label in ("k-grows", f"k-{largest // 4}", f"k-{largest}"):
        for count in (images // 4, images // 2):
            train = dataclasses.replace(recipes[label].train, images=count)
            recipes[f"{label}@{count}"] = dataclasses.replace(recipes[label], train=train)
    recipes["no-r1"] = critic(objective__r1=0.0)
    one_percent = {"kind": "part", "source": {"kind": "patches"}, "share": 0.01}
    for name, outside in (("70-patches", one_percent), ("noise", "noise"), ("patches-and-noise", "mixture")):
        recipes[f"p0-{name}"] = critic(outside=outside)

    def measure(runs: Mapping[str, Run]) -> Results:
        results, judge = {}, Run.open(folder / "judge")
        for title, run in runs.items():
            sampler = tune(run, run.recipe.sampler, judge.folder)["best"]
            draw_if_missing(run, dataclasses.replace(run.recipe, sampler=sampler), 100)
            metrics: Wanted = compare.quality_metrics(run, judge.folder)
            if "@" not in title:
                metrics |= {DETECTION: detection(run, 512, 1)}
            measure_missing(run, metrics, judge.folder)
            results[title] = table_records(run)
        return results

    prepare = lambda: train_or_resume(judge_recipe, folder / "judge")
    return Experiment(recipes, measure, prepare=prepare, figures=binary_at_figures)


def detection_by(recipes: Mapping[str, Recipe], outliers: Sequence[Any], restarts: int = 1) -> Experiment:
    """Return an experiment: detection of outliers, clean and attacked within l2 1.

    Classifiers detect by low confidence, as Binary-AT section 5.2 says of OE, RATIO and JEM, and critics by energy.
    What JEM's energy detects comes as ``jem, energy``.
    """
    recipes = {m: dataclasses.replace(e, threat=Attack(1.0, "l2", 20)) for m, e in recipes.items()}
    sets = tuple(config.build(s, "outlier") for s in outliers)

    def records(run: Run, score: Score) -> Records:
        metric = OutOfDistribution((score,), sets, eps=1.0, restarts=restarts)
        first = measure_missing(run, {DETECTION._replace(by=score.name): metric})[0]
        found = [r for r in run.records() if r["time"] == first["time"] and key_of(r).by == score.name]
        return [{**r, "name": r["name"].replace(f" {score.name}", "")} for r in found]

    def measure(runs: Mapping[str, Run]) -> Results:
        results = {}
        for method, run in runs.items():
            is_critic = run.recipe.objective.outputs == 1
            results[method] = records(run, EnergyScore() if is_critic else MaxSoftmax())
            if method == "jem":
                results[f"{method}, energy"] = records(run, EnergyScore())
        return results

    return Experiment(recipes, measure)


def table_records(run: Run) -> Records:
    """Return the latest records of a run, only of the quantities that the table shows."""
    shown = ("accuracy", "FD", "KID", "AUROC", "AUROC of detectors", "fpr95_id_recall")
    return [r for r in evaluate.newest_records(run.records()) if key_of(r).quantity in shown]


def binary_at_figures(results: Mapping[str, Records]) -> dict[str, bytes]:
    """Return figures of FD against K, against training images, and for each p0: Binary-AT figures 4, 5 and 3."""
    fd = {t: next((r["value"], r["error"]) for r in rs if key_of(r).quantity == "FD") for t, rs in results.items()}
    fixed = {float(t[2:]): v for t, v in fd.items() if t[2:].isdigit()}
    curves: dict[str, dict[float, tuple[float, float]]] = {}
    for title, value in fd.items():
        if "@" in title:
            label, _, count = title.partition("@")
            curves.setdefault(label, {})[float(count)] = value
    for label, points in curves.items():
        points[2 * max(points)] = fd[label]
    p0 = {"patches": fd["k-grows"], **{t.removeprefix("p0-"): v for t, v in fd.items() if t.startswith("p0-")}}
    name = "FD in the features of a standard classifier"
    return {
        "FD against the number of steps K in training, K fixed": figures.lines({"": fixed}, "K", name, log=True),
        "FD during training": figures.lines(curves, "images", name),
        "FD for each p0": figures.bars(p0, name),
    }


STABILITY = {  # of each run: objective and largest gradient norm
    "binary-at": ("binary-at", None),
    "maximum likelihood": ("binary-mle", None),
    "binary-at, clipped": ("binary-at", 1.0),
    "maximum likelihood, clipped": ("binary-mle", 1.0),
}
GAP, LOSS = "E(negatives) - E(data), largest", "loss, lowest"  # names of records


def binary_at_stability(folder: Path, options: Options) -> Experiment:
    """Binary AT beside maximum likelihood with the same search, without and with gradient clipping: section 5.3.

    Only the loss differs: none has R1, and none goes back with a lower learning rate when it diverges.
    """
    critic = lambda kind, clip: find_recipe(
        "digits-binary-at",
        options,
        objective=kind,
        objective__r1=0.0,
        train__clip=clip,
        train__rollbacks=0,
        train__log_every=400,
    )
    recipes = {label: critic(*changes) for label, changes in STABILITY.items()}
    return Experiment(
        recipes,
        lambda runs: {label: stability_records(run) for label, run in runs.items()},
        figures=stability_figures,
        conclude=conclude_stability,
    )


def stability_records(run: Run) -> Records:
    """Return how far the energies of negatives and data came apart in training, and how low the loss fell."""
    names = ("train/energy_negative", "train/energy_data", "train/loss")
    lines = [line for line in run.history() if all(name in line for name in names)]
    gaps = [line[names[0]] - line[names[1]] for line in lines]
    series = {"images": [float(line["images"]) for line in lines], "gap": gaps}
    lowest = min(line[names[2]] for line in lines)
    records = [Record(GAP, max(gaps), 0.0, len(lines), {}, series), Record(LOSS, lowest, 0.0, len(lines))]
    return [dataclasses.asdict(record) for record in records]


def stability_figures(results: Results) -> dict[str, bytes]:
    """Return a figure of the distance between energies of negatives and data against training images."""
    gaps = {}
    for label, records in results.items():
        series = next(r["series"] for r in records if r["name"] == GAP)
        gaps[label] = {x: (y, 0.0) for x, y in zip(series["images"], series["gap"], strict=True)}
    return {
        "How far the energies of negatives and data come apart": figures.lines(
            gaps, "training images", "E(negatives) - E(data), nats", yscale="symlog"
        )
    }


def conclude_stability(results: Results) -> list[str]:
    """Return in words how far the energies come apart by each loss, without and with clipping."""
    gap = {label: next(r["value"] for r in records if r["name"] == GAP) for label, records in results.items()}
    parts = [
        f"{gap[f'binary-at{suffix}']:.3g} nats in binary AT and {gap[f'maximum likelihood{suffix}']:.3g} in maximum "
        f"likelihood {how}"
        for suffix, how in (("", "without clipping"), (", clipped", "with gradients clipped at 1"))
    ]
    return [f"The energies of negatives and data come apart by at most {', '.join(parts)}."]


HYBRIDS = ("standard", "at", "oe", "ratio", "gat", "dat", "jem", "short-run-mle", "binary-at")


def hybrid(method: str, folder: Path, options: Options) -> Recipe:
    """Return the recipe of a classifier or critic on digits, l2 0.9."""
    changes: dict[str, dict[str, Any]] = {method: {"sampler__start": "global"} for method in ("standard", "at")}
    changes["gat"] = {"objective__attack": {"norm": "l2", "eps": 0.9, "steps": 10, "step_size": 0.225}}
    changes["short-run-mle"] = {"sampler": SHORT_RUN}
    return find_recipe(f"digits-{method}", options, **DIGITS_L2, **changes.get(method, {}))


def digits_hybrids(folder: Path, options: Options) -> Experiment:
    """Classifiers and critics trained with outside data beside AT and JEM, l2 0.9: accuracy, samples, detection."""
    recipes = {method: hybrid(method, folder, options) for method in HYBRIDS}
    apgd = APGD(eps=0.9, norm="l2")

    def measure(runs: Mapping[str, Run]) -> Results:
        judge = runs["standard"]
        stage = Run.open(runs["dat"].before[0])
        stages = {title: run for title, run in runs.items() if title != "dat"}
        stages |= {"dat, stage 1": stage, "dat, stage 2": runs["dat"]}
        results = {}
        for title, run in stages.items():
            is_critic = run.recipe.objective.outputs == 1
            sampler = tune(run, run.recipe.sampler, judge.folder)["best"]
            draw_if_missing(run, dataclasses.replace(run.recipe, sampler=sampler), 50)
            metrics: Wanted = compare.quality_metrics(run, judge.folder)
            metrics |= {DETECTION: detection(run, 512, 1)}
            if not is_critic and title != "short-run-mle":
                metrics |= {Key("accuracy"): Accuracy(), Key("accuracy", attack_key(apgd)): RobustAccuracy(apgd)}
                metrics |= {Key("AUROC of detectors"): Detectors()}
            measure_missing(run, metrics, judge.folder)
            results[title] = table_records(run)
        return efficiency(stages, judge, results)

    return Experiment(recipes, measure)


SHORT_RUN = {"kind": "sgld", "steps": 40, "step_size": 0.1, "noise": 0.01}  # the sampler that the recipe trains with


def efficiency(runs: Mapping[str, Run], judge: Run, results: dict[str, Records]) -> dict[str, Records]:
    """Return the records with the sampling cost of three generators at equal FD added, Binary-AT section 5."""
    curves = {}
    for title in ("binary-at", "jem", "short-run-mle"):
        recipe = runs[title].recipe
        if title == "jem":
            recipe = dataclasses.replace(recipe, sampler=config.build(SHORT_RUN, "sampler"))
        curves[title] = measure_steps(runs[title], recipe, judge)
    level = max(min(p.fd for p in curve) for curve in curves.values())
    for title, curve in curves.items():
        point = first_reaching(curve, level)
        assert point is not None
        for name, value in (("gradients an image", point.steps), ("milliseconds an image", 1000 * point.seconds)):
            record = Record(f"{name} to equal FD", value, 0.0, Chains().count, {"level": level})
            results[title].append(dataclasses.asdict(record))
    return results


def measure_steps(run: Run, recipe: Recipe, judge: Run) -> list[CurvePoint]:
    """Return the quality of a run's samples after each number of steps; kept in ``chains.json``."""
    chains = Chains()
    about = {"chains": config.describe(chains), "sampler": config.describe(recipe.sampler)}
    about |= {"features": str(compare.feature_weights(judge.folder)), "checkpoint": run.checkpoints.path().name}
    file = run.folder / "chains.json"
    saved = files.read_json(file, default={})
    if {k: saved.get(k) for k in about} != about:
        say(f"  {recipe.name}: samples after {', '.join(map(str, chains.steps))} steps")
        outside = recipe.outside.load() if recipe.outside is not None else None
        space = find_space(judge.folder).load(device())
        points = chains(run.model()[0].to(device()), recipe.sampler, run.data, space, outside=outside)
        saved = {**about, "points": [point._asdict() for point in points]}
        files.write_json(file, saved)
    return [CurvePoint(**point) for point in saved["points"]]
