"""Experiments on encoders and their samplers: CEM's table 2 and figure 1."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advebm.core import config, files
from advebm.core.checks import device
from advebm.data import pictures
from advebm.evaluation import compare
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.base import Record
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.metrics.probing import LinearProbe, NearestNeighbours
from advebm.objectives.langevin import SGLD
from advebm.reporting import figure_store, figures
from advebm.reproduction.experiment import Experiment, Options, Results
from advebm.reproduction.study import DIGITS_L2, find_recipe, measure_missing, say, with_best_steps
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.sampling.step_curve import Chains
from advebm.workflows.sample import compare_sets

NO_STEPS = "no steps"  # the baseline: images of the Gaussians that samplers begin from
SEEDS = {f"{given}, {NO_STEPS}": ("langevin", start) for given, start in (("cond", "class"), ("uncond", "global"))}
SUPERVISED_ROWS = {f"cond, {name}": (name.lower(), "class") for name in ("TA", "Langevin", "CS", "RCS")}
UNSUPERVISED = {
    f"{given}, {name}": (kind, start)
    for given, start in (("uncond", "global"), ("cond", "class"))
    for name, kind in (("PGD", "np-pgd"), ("Langevin", "np-langevin"), ("MaxEnt", "maxent"))
}
TABLE2 = {"at": SEEDS | SUPERVISED_ROWS, "infonce": UNSUPERVISED, "acl": UNSUPERVISED}  # rows as (kind, start), by run


def rows_of(label: str) -> dict[str, tuple[str, str]]:
    """Return the rows of CEM's tables for the run with this label."""
    rows_by_run = {**TABLE2, "jem": {"SGLD": ("sgld", "noise")}}
    return next((rows for name, rows in rows_by_run.items() if label.startswith(name)), {})


def unsupervised(label: str, folder: Path, options: Options) -> Recipe:
    """Return the recipe of an encoder, or of a classifier to compare with, on digits, l2 0.9."""
    return find_recipe(f"digits-{label}", options, **DIGITS_L2)


def digits_unsupervised(folder: Path, options: Options) -> Experiment:
    """Encoders by InfoNCE, standard and adversarial, beside AT on digits, l2 0.9: probes, CEM table 2 and figure 1."""
    recipes = {label: unsupervised(label, folder, options) for label in ("standard", *TABLE2)}
    threat = recipes["standard"].threat

    def measure(runs: Mapping[str, Run]) -> Results:
        probe, neighbours = LinearProbe(), NearestNeighbours()
        linear = Key("accuracy", by=probe.probe.name)
        probes: Wanted = {linear: probe, linear._replace(attack=attack_key(threat)): probe}
        probes[Key("accuracy", by=f"{neighbours.k} nearest neighbours")] = neighbours
        accuracies = compare.accuracy_metrics((threat,))
        results = {}
        for title, run in runs.items():
            results[title] = measure_missing(run, accuracies if run.recipe.objective.hidden is None else probes)
        return results | compare_samplers(runs)

    return Experiment(recipes, measure, figures=unsupervised_figures, conclude=winners)


def compare_samplers(runs: Mapping[str, Run], **drawing: Any) -> dict[str, Records]:
    """Return the records of CEM's table 2 for all runs but the standard classifier, which judges them.

    Save CEM's figure 1 with that classifier's run.  ``drawing`` are options of :func:`table2`.
    """
    judge, results = runs["standard"], dict[str, Records]()
    for title, run in runs.items():
        if rows := rows_of(title):
            table = table2(run, rows, judge, **drawing)
            results |= {f"{title}, {row}": records for row, records in table.items()}
    text = "Uncurated: the Gaussians that samplers begin from, then a row for each network."
    figure_store.save_figure(judge, "cem-figure1", cem_figure1(runs), "CEM figure 1", text)
    return results


def with_sampler(run: Run, kind: str, start: str) -> Recipe:
    """Return a run's recipe with another kind and start of sampler; ``sgld`` has the step and noise of its training."""
    changes: list[tuple[str, Any]] = [("sampler", kind), ("sampler.start", start)]
    negatives = getattr(run.recipe.objective, "negatives", None)
    if kind == "sgld" and isinstance(negatives, SGLD):
        changes += [("sampler.step_size", negatives.step_size), ("sampler.noise", negatives.noise)]
    return resolve(config.describe(run.recipe), changes)


FEW = Chains(count=500, steps=(1, 2, 4, 8, 16, 32, 64))  # chains to choose the number of steps by


def table2(
    run: Run,
    rows: Mapping[str, tuple[str, str]],
    judge: Run,
    *,
    samples: int = 1000,
    draws: int = 3,
    features: str | Path | None = None,
) -> dict[str, Records]:
    """Compare samplers of a run over ``draws`` sampling seeds, each with the number of steps of least validation KID.

    Return records by row; skip drawing and measuring if ``table2.json`` already holds them.  Samples are judged in
    ``features``; None: the judge's.
    """
    samplers = {}
    for row, (kind, start) in rows.items():
        recipe = with_sampler(run, kind, start)
        name = f"-{generate.set_name(recipe.sampler)}"
        count = 0 if NO_STEPS in row else with_best_steps(run, recipe, judge, FEW, name).sampler.steps
        samplers[folder_of(row)] = dataclasses.replace(recipe.sampler, steps=count)
    about: dict[str, Any] = {name: config.describe(sampler) for name, sampler in samplers.items()}
    features = features or judge.folder
    about |= {"features": compare.feature_weights(features), "checkpoint": run.checkpoints.path().name}
    about |= {"samples": samples, "draws": draws}
    file = run.folder / "table2.json"
    saved = files.read_json(file, default={})
    if saved.get("about") != about:
        progress = lambda text: say(f"  {run.recipe.name}: {text}")
        count = samples // len(run.data.classes)
        found, _ = compare_sets(run, samplers, count, draws, features=features, say=progress, device=device())
        saved = {"about": about, "found": found, "time": files.timestamp()}
        files.write_json(file, saved)
    time = saved.get("time", files.timestamp())
    results = {}
    for row in rows:
        name = folder_of(row)
        steps = Record("steps chosen on validation", samplers[name].steps, 0.0, 1)
        results[row] = [{**record, "time": time} for record in (dataclasses.asdict(steps), *saved["found"][name])]
    return results


def folder_of(row: str) -> str:
    """Return the name of a row's set of samples."""
    return row.lower().replace(",", "").replace(" ", "-")


def cem_figure1(runs: Mapping[str, Run]) -> bytes:
    """Return a PNG of samples of the first sampling seed, four of each class: the seeds, then a row per network."""
    sets = {
        f"{title}, {row}": generate.read_set(run.folder / "comparison" / f"{folder_of(row)}-0")
        for title, run in runs.items()
        for row in rows_of(title)
    }
    panels = {title: pictures.rows_by_class(samples.x, samples.y, 10, 4) for title, samples in sets.items()}
    strips = [{t.partition(", ")[2]: x for t, x in panels.items() if NO_STEPS in t}]
    strips += [{t: x for t, x in panels.items() if t.startswith(f"{run}, ") and NO_STEPS not in t} for run in runs]
    return pictures.stack_pngs([figures.grids(strip, dict.fromkeys(strip, ())) for strip in strips if strip])


def distances(results: Mapping[str, Records]) -> dict[str, tuple[float, float]]:
    """Return FD and its error for each row that has one."""
    return {t: (r["value"], r["error"]) for t, rs in results.items() for r in rs if key_of(r).quantity == "FD"}


def winners(results: Mapping[str, Records]) -> list[str]:
    """Return a line per network and kind of start: which sampler has the lowest FD, and by how much."""
    fd = distances(results)
    lines = []
    for group in dict.fromkeys(title.rpartition(", ")[0] for title in fd if NO_STEPS not in title):
        rows = {t.rpartition(", ")[2]: v for t, v in fd.items() if t.rpartition(", ")[0] == group and NO_STEPS not in t}
        (name, first), (second_name, second), *_ = sorted(rows.items(), key=lambda row: row[1][0])
        margin, error = second[0] - first[0], (first[1] ** 2 + second[1] ** 2) ** 0.5
        baseline = fd[f"at, {group.rpartition(', ')[2]}, {NO_STEPS}"][0]
        line = f"{group}: {name} ({first[0]:.1f}) before {second_name} by {margin:.1f} ± {error:.1f} in FD"
        lines.append(f"{line}; the baseline, {NO_STEPS}, has {baseline:.1f}")
    return lines


def unsupervised_figures(results: Mapping[str, Records]) -> dict[str, bytes]:
    """Return a bar chart of the FD of every row, titled by :func:`winners`."""
    fd = distances(results)
    return {". ".join(winners(results)): figures.bars(fd, "FD in the features of a standard classifier")}
