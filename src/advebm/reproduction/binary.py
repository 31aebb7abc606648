"""Experiments of Binary-AT: critics, and classifiers that are also generative models."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm.attacks.apgd import APGD
from advebm.attacks.projected import Attack
from advebm.core import config
from advebm.evaluation import compare, evaluate
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.base import Record
from advebm.metrics.detectors import Detectors
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.metrics.ood import EnergyScore, MaxSoftmax, OutOfDistribution
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.reporting import figures
from advebm.reproduction.experiment import Experiment, Options, Results
from advebm.reproduction.study import (
    DIGITS_L2,
    draw_if_missing,
    find_recipe,
    measure_missing,
    measure_steps,
    train_or_resume,
    with_best_steps,
)
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.sampling.step_curve import Chains, first_reaching

DETECTION = Key("AUROC", set="uniform", by="energy")  # if a run has this record, detection was measured


def detection(run: Run, count: int, restarts: int) -> OutOfDistribution:
    """Return the metric that detects noises and test images of p0 (default: patches), clean and in the worst case."""
    outside = () if run.recipe.outside is None else (run.recipe.outside,)
    sets = (*OutOfDistribution().sets, *(outside or (config.build("patches", "source"),)))
    return OutOfDistribution(sets=sets, count=count, eps=run.recipe.threat.eps, restarts=restarts)


def digits_binary_at(folder: Path, options: Options) -> Experiment:
    """Binary AT on digits from patches of photographs: steps K, fixed or growing, three other p0, no R1, detection."""
    judging = find_recipe("digits-standard", ())
    critic = lambda **changes: find_recipe("digits-binary-at", options, **changes)
    recipes = {"k-grows": critic()}
    schedule = config.describe(recipes["k-grows"].objective)["curriculum"]
    images, largest = recipes["k-grows"].train.images, schedule["steps"]
    for k in sorted({1, largest // 4, largest // 2, largest}):
        recipes[f"k-{k}"] = critic(objective__curriculum={**schedule, "start": k, "steps": k})
    for of in ("k-grows", f"k-{largest // 4}", f"k-{largest}"):  # constant learning rate: the start of the longer runs
        for count in (images // 4, images // 2):
            short = dataclasses.replace(recipes[of].train, images=count)
            recipes[f"{of}@{count}"] = dataclasses.replace(recipes[of], train=short)
    recipes["no-r1"] = critic(objective__r1=0.0)
    few = {"kind": "part", "source": {"kind": "patches"}, "share": 0.01}
    for name, outside in (("70-patches", few), ("noise", "noise"), ("patches-and-noise", "mixture")):
        recipes[f"p0-{name}"] = critic(outside=outside)

    def measure(runs: Mapping[str, Run]) -> Results:
        found, judge = {}, Run.open(folder / "judge")
        for title, run in runs.items():
            setting = with_best_steps(run, run.recipe, judge)
            draw_if_missing(run, setting, 100)
            wanted: Wanted = compare.quality_metrics(run, judge.folder)
            if "@" not in title:
                wanted |= {DETECTION: detection(run, 512, 1)}
            measure_missing(run, wanted, judge.folder)
            steps = Record("steps chosen on validation", setting.sampler.steps, 0.0, 1)
            found[title] = [dataclasses.asdict(steps), *table_records(run)]
        return found

    prepare = lambda: train_or_resume(judging, folder / "judge")
    return Experiment(recipes, measure, prepare=prepare, figures=binary_at_figures)


def detection_by(recipes: Mapping[str, Recipe], outliers: Sequence[Any], restarts: int = 1) -> Experiment:
    """Return an experiment: detection of outliers, clean and attacked within l2 1, by the scores of the papers."""
    recipes = {m: dataclasses.replace(e, threat=Attack(1.0, "l2", 20)) for m, e in recipes.items()}
    sets = tuple(config.build(s, "outlier") for s in outliers)

    def measure(runs: Mapping[str, Run]) -> Results:
        found = {}
        for method, run in runs.items():
            # the scores of the methods' papers: confidence, or log p(x)
            score = MaxSoftmax() if method in ("oe", "ratio") else EnergyScore()
            metric = OutOfDistribution((score,), sets, eps=1.0, restarts=restarts)
            first = measure_missing(run, {DETECTION._replace(by=score.name): metric})[0]
            own = [r for r in run.records() if r["time"] == first["time"] and r["settings"].get("metric")]
            found[method] = [{**r, "name": r["name"].replace(f" {score.name}", "")} for r in own]
        return found

    return Experiment(recipes, measure)


def table_records(run: Run) -> Records:
    """Return the latest records of a run, only of the quantities that the table shows."""
    shown = ("accuracy", "FD", "KID", "AUROC", "AUROC of detectors", "fpr95_id_recall")
    return [r for r in evaluate.newest_records(run.records()) if key_of(r).quantity in shown]


def binary_at_figures(results: Mapping[str, Records]) -> dict[str, bytes]:
    """Return figures of FD against K, against training images, and for each p0: Binary-AT figures 4, 5 and 3."""
    fd = {t: next((r["value"], r["error"]) for r in rs if key_of(r).quantity == "FD") for t, rs in results.items()}
    fixed = {float(t[2:]): v for t, v in fd.items() if t[2:].isdigit()}
    during: dict[str, dict[float, tuple[float, float]]] = {}
    for title, value in fd.items():
        if "@" in title:
            of, _, count = title.partition("@")
            during.setdefault(of, {})[float(count)] = value
    for of, points in during.items():
        points[2 * max(points)] = fd[of]
    p0 = {"patches": fd["k-grows"], **{t.removeprefix("p0-"): v for t, v in fd.items() if t.startswith("p0-")}}
    name = "FD in the features of a standard classifier"
    return {
        "FD against the number of steps K in training, K fixed": figures.lines({"": fixed}, "K", name, log=True),
        "FD during training": figures.lines(during, "images", name),
        "FD for each p0": figures.bars(p0, name),
    }


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
        everyone = {title: run for title, run in runs.items() if title != "dat"}
        everyone |= {"dat, stage 1": stage, "dat, stage 2": runs["dat"]}
        found = {}
        for title, run in everyone.items():
            critic = run.recipe.objective.outputs == 1
            setting = with_best_steps(run, run.recipe, judge) if critic else run.recipe
            draw_if_missing(run, setting, 50)
            wanted: Wanted = compare.quality_metrics(run, judge.folder)
            wanted |= {DETECTION: detection(run, 512, 1)}
            if not critic and title != "short-run-mle":
                wanted |= {Key("accuracy"): Accuracy(), Key("accuracy", attack_key(apgd)): RobustAccuracy(apgd)}
                wanted |= {Key("AUROC of detectors"): Detectors()}
            measure_missing(run, wanted, judge.folder)
            found[title] = table_records(run)
        return efficiency(everyone, judge, found)

    return Experiment(recipes, measure)


SHORT_RUN = {"kind": "sgld", "steps": 40, "step_size": 0.1, "noise": 0.01}  # the sampler that the recipe trains with


def efficiency(runs: Mapping[str, Run], judge: Run, found: dict[str, Records]) -> dict[str, Records]:
    """Return the records with the sampling cost of three generators at equal FD added, Binary-AT section 5."""
    points = {}
    for title in ("binary-at", "jem", "short-run-mle"):
        run = runs[title]
        own = (
            run.recipe
            if title != "jem"
            else dataclasses.replace(run.recipe, sampler=config.build(SHORT_RUN, "sampler"))
        )
        points[title] = measure_steps(run, own, judge, Chains("train"))
    level = max(min(p.fd for p in of) for of in points.values())
    for title, of in points.items():
        point = first_reaching(of, level)
        assert point is not None
        about = {"level": level}
        for name, value in (("gradients an image", point.steps), ("milliseconds an image", 1000 * point.seconds)):
            record = Record(f"{name} to equal FD", value, 0.0, Chains().count, about)
            found[title].append(dataclasses.asdict(record))
    return found
