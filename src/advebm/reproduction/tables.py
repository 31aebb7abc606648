"""The papers' tables as experiments, and the papers' numbers beside ours."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm import recipes
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.base import Adversary
from advebm.attacks.cw import CW
from advebm.attacks.projected import Attack
from advebm.core import files
from advebm.data import pictures
from advebm.evaluation import compare
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.keys import Key, key_of_attack
from advebm.metrics.quality import SampleQuality
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.papers import agreement, inventory, render
from advebm.papers.inventory import Table
from advebm.reporting import figures
from advebm.reporting.build import report
from advebm.reporting.terminal import beside
from advebm.reproduction import binary, study, supervised, unsupervised
from advebm.reproduction.experiment import Experiment, Options, Results
from advebm.reproduction.scales import SCALES, Scale
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.sampling import generate

FAMILIES: dict[str, Callable[[str, Path, Options], Recipe]] = {
    "digits-supervised": supervised.supervised,
    "digits-hybrids": binary.hybrid,
    "digits-unsupervised": unsupervised.unsupervised,
}


def at_scale(name: str, scale: str, folder: Path, options: Options = ()) -> Experiment:
    """A table of the papers as an experiment.

    Args:
        name: of :func:`advebm.papers.inventory.tables`.
        scale: of :data:`advebm.reproduction.scales.SCALES`, one that the table has.
        folder: of the experiment, where teachers are.
        options: as on the command line of ``train``, for every recipe; of ``outside`` and ``extra`` where it has these.
    """
    table = inventory.find_table(name)
    by_method = recipes_of(table, scale, folder, options)
    experiment = COMPUTATIONS[table.by](table, SCALES[scale], by_method)

    def prepare() -> None:
        experiment.prepare()
        supervised.train_teacher(by_method, folder)

    return dataclasses.replace(experiment, prepare=prepare)


def write_table(
    name: str, scale: str, folder: Path, results: Results, runs: Sequence[Run], *, seeds: int = 1, options: Options = ()
) -> Path:
    """Print a table beside the paper's, and write it: ``NAME-SCALE.json``, which is returned, and the report.

    ``NAME-SCALE.json`` is what :func:`advebm.papers.render.summarize` returns; where samples are drawn there is
    ``NAME-SCALE.png``.
    """
    table = inventory.find_table(name)
    command = [f"advebm reproduce {name} --scale {scale}", f"--seeds {seeds}" * (seeds > 1)]
    command += [f"--{key} {value}" for key, value in options]
    about = {"command": " ".join(filter(None, command)), "seeds": seeds, **setting(SCALES[scale], results, runs)}
    plain = render.summarize(table, scale, agreement.table_cells(table, results), about)
    path = folder / f"{name}-{scale}.json"
    files.write_json(path, plain)
    if (picture := drawing(table, runs)) is not None:
        files.write(path.with_suffix(".png"), picture)
    beside(plain)
    ordered = sorted(runs, key=lambda run: run.folder.name == "standard")  # who judges comes last
    shown = [stage for run in ordered for stage in reversed(run.stages)]
    report(shown[0], beside=shown[1:], out=folder / "report.html", title=f"{name}, scale {scale}", summary=plain)
    return path


def recipes_of(table: Table, scale: str, folder: Path, options: Options) -> dict[str, Recipe]:
    """The recipe of each method that the table has at a scale, the judge of samples first; some have no such recipe."""
    judge = ["standard"] * ("fid" in table.columns and bool(table.data))
    found = {method: recipe_of(table, scale, method, folder, options) for method in (*judge, *table.methods())}
    return {method: recipe for method, recipe in found.items() if recipe is not None}


def recipe_of(table: Table, scale: str, method: str, folder: Path, options: Options) -> Recipe | None:
    """A method's recipe at a scale; none where there is no such recipe."""
    stem = "-".join(filter(None, (table.data, method)))
    size = SCALES[scale].size
    name = table.recipes.get(method, {}).get(size, stem if size == "full" else f"{stem}-{size}")
    name = f"digits-{method}" if scale == "digits" else name
    if name not in recipes.names():
        return None
    roles = {"outside", "extra"} - recipes.find(name).keys()  # which this recipe does not take
    own = [(key, value) for key, value in options if key.partition(".")[0] not in roles]
    share = 1.0 if "train.images" in dict(own) else table.share(scale)
    if scale == "digits":
        return shortened(FAMILIES[table.digits](method, folder, own), share)
    taught = supervised.teacher_option(folder) if method == "rst-awp" else {}
    return shortened(study.find_recipe(name, own, **SCALES[scale].changes, **taught), share)


def shortened(recipe: Recipe, share: float) -> Recipe:
    """A recipe on a share of its training images, in every stage."""
    train = dataclasses.replace(recipe.train, images=round(share * recipe.train.images))
    return dataclasses.replace(recipe, train=train, before=tuple(shortened(stage, share) for stage in recipe.before))


def setting(scale: Scale, results: Mapping[str, Records], runs: Sequence[Run]) -> dict[str, Any]:
    """What the numbers depend on: the scale, the first run's machine, their last day, how runs were trained."""
    machine = files.read_json(runs[0].folder / "env.json", default={})
    where = f"{machine.get('device')}, {machine.get('threads')} of {machine.get('cores')} cores"
    trained = {}
    for stage in (stage for run in runs for stage in run.stages):
        recipe = stage.recipe
        trained[recipe.name] = f"{recipe.train.images:,} images of {len(stage.data.train):,}"
    hardware = f"{where}, {machine.get('system')}, torch {machine.get('torch')}"
    days = [record["time"][:10] for records in results.values() for record in records if "time" in record]
    return {
        "date": max(days, default=time.strftime("%Y-%m-%d")),
        "hardware": hardware,
        "settings": scale.about,
        "trained": trained,
    }


def drawing(table: Table, runs: Sequence[Run]) -> bytes | None:
    """The samples of every run side by side, four of each class; none where none are drawn."""
    if table.by == "samplers":
        return unsupervised.cem_figure1({run.folder.name: run for run in runs})
    stages = [stage for run in runs for stage in run.stages]
    sets = {run.recipe.name: generate.read_set(s[table.name]) for run in stages if table.name in (s := run.samples())}
    panels = {name: pictures.rows_by_class(s.x, s.y, len(runs[0].data.classes), 4) for name, s in sets.items()}
    return figures.grids(panels, dict.fromkeys(panels, ())) if panels else None


# Computations: a table, a scale, recipes -> an experiment -----------------------------------------------------------


def by_methods(table: Table, scale: Scale, by_method: Mapping[str, Recipe]) -> Experiment:
    """A row a method, under the threat of the first."""
    threat = by_method[table.methods()[0]].threat

    def measure(runs: Mapping[str, Run]) -> Results:
        found = {}
        for name in table.names():
            of = table.of(name)
            if (run := runs.get(of["method"])) is not None:
                if of.get("stage") == "first":
                    run = Run.open(run.before[0])
                found[name] = numbers(table, scale, run, threat, runs.get("standard"), of.get("sampler"))
        return found

    return Experiment(by_method, measure)


def numbers(
    table: Table, scale: Scale, run: Run, threat: Attack, judge: Run | None, kind: str | None = None
) -> Records:
    """A run's records for the columns of a table; measured unless they are there.

    Args:
        table: that asks for them.
        scale: how many images.
        run: trained.
        threat: whose ball attacks stay in.
        judge: in whose features the number of sampling steps is chosen, and samples are judged unless the scale says
            otherwise; none takes the recipe's number.
        kind: of sampler, from class Gaussians; the recipe's sampler by default.
    """
    attacks: dict[str, Adversary] = {
        "pgd50": dataclasses.replace(threat, loss="cross-entropy", steps=50, restarts=1),
        "cw": CW(c=0.2),
        "aa": AutoAttack(threat.eps, threat.norm, scale.version),
    }
    wanted: Wanted = {Key("accuracy"): Accuracy()} if "clean" in table.columns else {}
    for key in attacks.keys() & table.columns.keys():
        wanted[Key("accuracy", key_of_attack(attacks[key]))] = RobustAccuracy(attacks[key], images=scale.images)
    features = scale.features or (judge.folder if judge else None)
    whose = compare.space_name(features)
    if "fid" in table.columns:
        own = run.recipe if kind is None else unsupervised.with_sampler(run, kind, "class")
        if judge is not None:
            own = study.with_best_steps(run, own, judge, unsupervised.FEW, f"-{generate.set_name(own.sampler)}")
        count = scale.samples // max(1, len(run.data.classes))
        drawn = study.draw_if_missing(run, own, count, table.name)
        wanted |= {Key(q, samples=drawn, space=whose): SampleQuality() for q in ("FD", "class score")}
    return study.measure_missing(run, wanted, features)


def by_samplers(table: Table, scale: Scale, by_method: Mapping[str, Recipe]) -> Experiment:
    """A row a sampler of a network and a kind of start."""
    options: dict[str, Any] = {"samples": scale.samples, "draws": scale.draws, "features": scale.features}
    return Experiment(by_method, lambda runs: unsupervised.compare_samplers(runs, **options))


def by_attacks(table: Table, scale: Scale, by_method: Mapping[str, Recipe]) -> Experiment:
    """A row an attack, a column a set of images; on all test images."""
    return supervised.attacks_on(by_method)


def by_detection(table: Table, scale: Scale, by_method: Mapping[str, Recipe]) -> Experiment:
    """A row a set of other images, a column a method."""
    return binary.detection_by(by_method, scale.outliers, scale.restarts)


COMPUTATIONS: dict[str, Callable[[Table, Scale, Mapping[str, Recipe]], Experiment]] = {
    "methods": by_methods,
    "samplers": by_samplers,
    "attacks": by_attacks,
    "detection": by_detection,
}
