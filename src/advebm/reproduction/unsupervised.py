"""Experiments on encoders and their samplers: CEM's table 2 and figure 1."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from advebm.data import pictures
from advebm.evaluation import compare
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.metrics.probing import LinearProbe, NearestNeighbours
from advebm.metrics.quality import SampleQuality
from advebm.reporting import figure_store, figures
from advebm.reproduction.experiment import Experiment, Options, Results
from advebm.reproduction.study import COMMON_STEPS, DIGITS_L2, draw_if_missing, find_recipe, measure_missing, tune
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.sampling import generate

NO_STEPS = "no steps"  # the baseline: images of the Gaussians that samplers begin from
SEEDS = {f"{given}, {NO_STEPS}": ("langevin", start) for given, start in (("cond", "class"), ("uncond", "global"))}
SUPERVISED_ROWS = {f"cond, {name}": (name.lower(), "class") for name in ("TA", "Langevin", "CS", "RCS")}
UNSUPERVISED = {
    f"{given}, {name}": (kind, start)
    for given, start in (("uncond", "global"), ("cond", "class"))
    for name, kind in (("PGD", "np-pgd"), ("Langevin", "np-langevin"), ("MaxEnt", "maxent"))
}
QUANTITIES = ("FD", "KID", "class score")
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
        return results | compare_samplers(runs, runs["standard"].folder)

    return Experiment(recipes, measure, figures=unsupervised_figures, conclude=winners)


def compare_samplers(
    runs: Mapping[str, Run], features: str | Path, *, samples: int = 1000, draws: int = 3, trials: int = 250
) -> dict[str, Records]:
    """Return the records of CEM's table 2 for all runs that have rows there, and save CEM's figure 1 with the first.

    Args:
        runs: runs by label.
        features: feature space of the distances, in which samplers are also tuned, see :func:`study.tune`.
        samples: number of samples of each set.
        draws: number of sampling seeds; for several the records are means, with the deviation as error.
        trials: number of samples of each trial of a sampler's settings.
    """
    results = dict[str, Records]()
    for title, run in runs.items():
        if rows := rows_of(title):
            chosen = choose_samplers(run, rows, features, trials)
            found = measure_samplers(run, chosen, features, samples=samples, draws=draws)
            results |= {f"{title}, {row}": records for row, records in found.items()}
    text = "Uncurated: the Gaussians that samplers begin from, then a row for each network."
    figure_store.save_figure(next(iter(runs.values())), "cem-figure1", cem_figure1(runs), "CEM figure 1", text)
    return results


def choose_samplers(
    run: Run, rows: Mapping[str, tuple[str, str]], features: str | Path, trials: int
) -> dict[str, Sampler]:
    """Return a tuned sampler for each row of (kind, start), and one of 16 steps for ``ROW, 16 steps``."""
    chosen = {}
    for row, (kind, start) in rows.items():
        sampler = run.recipe.with_sampler(kind, [("sampler.start", start)]).sampler
        if NO_STEPS in row:
            chosen[row] = dataclasses.replace(sampler, steps=0)
        else:
            tuned = tune(run, sampler, features, trials)
            chosen |= {row: tuned["best"], f"{row}, {COMMON_STEPS} steps": tuned["common"]}
    return chosen


def measure_samplers(
    run: Run, samplers: Mapping[str, Sampler], features: str | Path, *, samples: int, draws: int
) -> dict[str, Records]:
    """Draw by each sampler, from the same seeds, and return the records of their quality by row."""
    count, space = samples // len(run.data.classes), compare.space_name(features)
    sets = {sampler: folder_of(row) for row, sampler in reversed(list(samplers.items()))}  # equal ones are drawn once
    for number in range(draws):
        recipe = dataclasses.replace(run.recipe, seed=number)
        for sampler, name in sets.items():
            draw_if_missing(run, dataclasses.replace(recipe, sampler=sampler), count, f"{name}-{number}")
    by_draw = []
    for number in range(draws):
        keys = [Key(q, samples=f"{n}-{number}", space=space) for n in sets.values() for q in QUANTITIES]
        records = measure_missing(run, dict.fromkeys(keys, SampleQuality()), features)
        by_draw.append({row: _of_set(records, f"{sets[s]}-{number}", row) for row, s in samplers.items()})
    return compare.over_seeds(by_draw)


def _of_set(records: Records, name: str, row: str) -> Records:
    """Return the records of a set of samples as those of a row, whichever sampling seed the set is of."""
    return [{**r, "settings": {**r["settings"], "samples": row}} for r in records if r["settings"]["samples"] == name]


def folder_of(row: str) -> str:
    """Return the name of a row's set of samples."""
    return row.lower().replace(",", "").replace(" ", "-")


def cem_figure1(runs: Mapping[str, Run]) -> bytes:
    """Return a PNG of samples of the first sampling seed, four of each class: the seeds, then a row per network."""
    sets = {
        f"{title}, {row}": generate.read_set(run.folder / "samples" / f"{folder_of(row)}-0")
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
    """Return a line per network and kind of start: which sampler has the lowest FD, and by how much.

    Lines on samplers with settings of their own come first, then those on samplers of the same number of steps.
    """
    fd = distances(results)
    equal = f", {COMMON_STEPS} steps"
    tuned = {title: value for title, value in fd.items() if not title.endswith(equal)}
    baselines = {title: value for title, value in tuned.items() if NO_STEPS in title}
    common = {title.removesuffix(equal): value for title, value in fd.items() if title.endswith(equal)}
    return [*_rank(tuned), *(f"at {COMMON_STEPS} steps, {line}" for line in _rank(baselines | common))]


def _rank(fd: Mapping[str, tuple[float, float]]) -> list[str]:
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
    tuned = {t: rs for t, rs in results.items() if not t.endswith(f", {COMMON_STEPS} steps")}
    label = "FD in the features of a standard classifier"
    return {". ".join(winners(tuned)): figures.bars(distances(results), label)}
