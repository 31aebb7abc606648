"""Carry out the papers' tables as experiments, and show the papers' numbers beside ours."""

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
from advebm.metrics.keys import Key, attack_key
from advebm.metrics.quality import SampleQuality
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.objectives.free import FREE
from advebm.papers import agreement, inventory, render
from advebm.papers.inventory import Table
from advebm.reporting import figures
from advebm.reporting.build import report
from advebm.reporting.terminal import print_paper_table
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
    """Return a table of the papers as an experiment.

    Args:
        name: name of a table, see :func:`advebm.papers.inventory.tables`.
        scale: one of the table's scales, see :data:`advebm.reproduction.scales.SCALES`.
        folder: folder of the experiment, which also holds teachers.
        options: options of ``train`` for every recipe; ``outside`` and ``extra`` only for recipes that have them.
    """
    table = inventory.find_table(name)
    by_method = recipes_of(table, scale, folder, options)
    experiment = COMPUTATIONS[table.by](table, SCALES[scale], by_method)

    def prepare() -> None:
        experiment.prepare()
        supervised.train_teacher(by_method, folder)

    return dataclasses.replace(experiment, prepare=prepare)


def write_table(
    name: str,
    scale: str,
    folder: Path,
    results: Results,
    runs: Sequence[Run],
    *,
    seeds: int = 1,
    options: Options = (),
    given: Mapping[str, str] | None = None,
) -> Path:
    """Print a table beside the paper's, write it and the report, and return the path of ``NAME-SCALE.json``.

    ``NAME-SCALE.json`` holds the result of :func:`advebm.papers.render.summarize`; ``NAME-SCALE.png`` shows the
    samples, if any were drawn.
    """
    table = inventory.find_table(name)
    command = [f"advebm reproduce {name} --scale {scale}", f"--seeds {seeds}" * (seeds > 1)]
    command += [f"--{key} {value}" for key, value in options]
    command += [f"--row {label}={reference}" for label, reference in (given or {}).items()]
    about = {"command": " ".join(filter(None, command)), "seeds": seeds, **provenance(SCALES[scale], results, runs)}
    plain = render.summarize(table, scale, agreement.table_cells(table, results), about)
    path = folder / f"{name}-{scale}.json"
    files.write_json(path, plain)
    if (picture := samples_picture(table, runs)) is not None:
        files.write(path.with_suffix(".png"), picture)
    print_paper_table(plain)
    ordered = sorted(runs, key=lambda run: run.folder.name == "standard")  # the judge comes last
    shown = [stage for run in ordered for stage in reversed(run.stages)]
    report(shown[0], beside=shown[1:], out=folder / "report.html", title=f"{name}, scale {scale}", summary=plain)
    return path


def recipes_of(table: Table, scale: str, folder: Path, options: Options) -> dict[str, Recipe]:
    """Return the recipes of a table at a scale by method, a judge of samples first; leave out methods without one.

    All have the labels of ``rst-awp`` if that is among them: what it has beyond them are images without labels.
    """
    judge = ["standard"] if "fid" in table.columns and SCALES[scale].features is None else []
    candidates = {method: recipe_of(table, scale, method, folder, options) for method in (*judge, *table.methods())}
    by_method = {method: recipe for method, recipe in candidates.items() if recipe is not None}
    if "rst-awp" in by_method:
        labelled = by_method["rst-awp"].data
        by_method = {method: dataclasses.replace(recipe, data=labelled) for method, recipe in by_method.items()}
    return by_method


def recipe_of(table: Table, scale: str, method: str, folder: Path, options: Options) -> Recipe | None:
    """Return a method's recipe at a scale; None if there is none."""
    size, own = SCALES[scale].size, table.recipes.get(method, {})
    stem = "-".join(filter(None, (table.data, method)))
    method_on_digits = own.get("digits", method)
    name = own.get(size, stem if size == "full" else f"{stem}-{size}")
    name = f"digits-{method_on_digits}" if scale == "digits" else name
    if name not in recipes.names():
        return None
    roles = {"outside", "extra"} - recipes.find(name).keys()  # that this recipe does not have
    overrides = [(key, value) for key, value in options if key.partition(".")[0] not in roles]
    if scale == "digits":
        recipe = FAMILIES[table.digits](method_on_digits, folder, overrides)
    else:
        teacher = supervised.teacher_option(folder) if method == "rst-awp" else {}
        recipe = study.find_recipe(name, overrides, **SCALES[scale].changes, **teacher)
    if "train.images" in dict(overrides) or method not in table.methods():  # such as a judge of samples
        return recipe
    return with_images(recipe, table.images(scale))


def with_images(recipe: Recipe, images: int) -> Recipe:
    """Return a recipe whose first stage is trained on a number of images, and later ones in proportion; 0: unchanged.

    Images that ``free`` uses several times count as often.
    """
    if not images:
        return recipe
    first = recipe.before[0] if recipe.before else recipe
    uses = first.objective.replays if isinstance(first.objective, FREE) else 1
    return lengthen(recipe, images / (uses * first.train.images))


def lengthen(recipe: Recipe, factor: float) -> Recipe:
    """Return a recipe with a multiple of its training images, in every stage."""
    train = dataclasses.replace(recipe.train, images=round(factor * recipe.train.images))
    return dataclasses.replace(recipe, train=train, before=tuple(lengthen(stage, factor) for stage in recipe.before))


def provenance(scale: Scale, results: Mapping[str, Records], runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the numbers depend on: scale, hardware of the first run, latest date, and training of the runs."""
    machine = files.read_json(runs[0].folder / "env.json", default={})
    hardware = f"{machine.get('device')}, {machine.get('threads')} of {machine.get('cores')} cores, "
    hardware += f"{machine.get('system')}, torch {machine.get('torch')}"
    trained = {
        stage.recipe.name: f"{images:,} images of {len(stage.data.train):,}"
        if images
        else f"weights of {Path(stage.recipe.init or 'a module').name}"
        for run in runs
        for stage in run.stages
        for images in (stage.recipe.train.images,)
    }
    days = [record["time"][:10] for records in results.values() for record in records if "time" in record]
    return {
        "date": max(days, default=time.strftime("%Y-%m-%d")),
        "hardware": hardware,
        "settings": scale.about,
        "trained": trained,
    }


def samples_picture(table: Table, runs: Sequence[Run]) -> bytes | None:
    """Return a PNG of the samples of all runs side by side, four of each class; None if none were drawn."""
    if table.by == "samplers":
        return unsupervised.cem_figure1({run.folder.name: run for run in runs})
    stages = [stage for run in runs for stage in run.stages]
    sets = {run.recipe.name: generate.read_set(s[table.name]) for run in stages if table.name in (s := run.samples())}
    panels = {name: pictures.rows_by_class(s.x, s.y, len(runs[0].data.classes), 4) for name, s in sets.items()}
    return figures.grids(panels, dict.fromkeys(panels, ())) if panels else None


# Computations: (table, scale, recipes) -> experiment -----------------------------------------------------------------


def by_methods(table: Table, scale: Scale, by_method: Mapping[str, Recipe]) -> Experiment:
    """Return an experiment with a row per method, under the threat of the first."""
    threat, drawn = by_method[table.methods()[0]].threat, "fid" in table.columns

    def measure(runs: Mapping[str, Run]) -> Results:
        results = {}
        for name in table.names():
            row = table.of(name)
            if (run := runs.get(row["method"])) is not None:
                if row.get("stage") == "first":
                    run = Run.open(run.before[0])
                sampler = (row["sampler"], row.get("start", "class")) if "sampler" in row else None
                features = features_of(scale, runs) if drawn else None
                results[name] = numbers(table, scale, run, threat, features, sampler)
        return results

    return Experiment(by_method, measure)


def numbers(
    table: Table,
    scale: Scale,
    run: Run,
    threat: Attack,
    features: str | Path | None,
    sampler: tuple[str, str] | None = None,
) -> Records:
    """Return a run's records for the columns of a table; measure those that the run does not have.

    Args:
        table: the table that needs the records.
        scale: sizes of the experiment.
        run: trained run.
        threat: its norm and radius bound the attacks.
        features: feature space in which samplers are tuned and samples judged; None: the table has no samples.
        sampler: kind and start of the sampler; None: the recipe's sampler.
    """
    attacks: dict[str, Adversary] = {
        "pgd50": dataclasses.replace(threat, loss="cross-entropy", steps=50, restarts=1),
        "cw": CW(c=0.2),
        "aa": AutoAttack(threat.eps, threat.norm, scale.version),
    }
    metrics: Wanted = {Key("accuracy"): Accuracy()} if "clean" in table.columns else {}
    for key in attacks.keys() & table.columns.keys():
        metrics[Key("accuracy", attack_key(attacks[key]))] = RobustAccuracy(attacks[key], images=scale.images)
    if features is not None:
        recipe = run.recipe
        if sampler is not None:
            recipe = recipe.with_sampler(sampler[0], [("sampler.start", sampler[1])])
        best = study.tune(run, recipe.sampler, features, scale.trials)["best"]
        count = scale.samples // max(1, len(run.data.classes))
        set_name = study.draw_if_missing(run, dataclasses.replace(recipe, sampler=best), count, table.name)
        space = compare.space_name(features)
        metrics |= {Key(q, samples=set_name, space=space): SampleQuality() for q in ("FD", "class score")}
    return study.measure_missing(run, metrics, features)


def by_samplers(table: Table, scale: Scale, by_method: Mapping[str, Recipe]) -> Experiment:
    """Return an experiment with a row per network, kind of start and sampler."""
    options = {"samples": scale.samples, "draws": scale.draws, "trials": scale.trials}
    return Experiment(by_method, lambda runs: unsupervised.compare_samplers(runs, features_of(scale, runs), **options))


def features_of(scale: Scale, runs: Mapping[str, Run]) -> str | Path:
    """Return the feature space that judges samples at a scale: that of its name, or of the run ``standard``."""
    return runs["standard"].folder if scale.features is None else scale.features


COMPUTATIONS: dict[str, Callable[[Table, Scale, Mapping[str, Recipe]], Experiment]] = {
    "methods": by_methods,
    "samplers": by_samplers,
    "attacks": lambda table, scale, by_method: supervised.attacks_on(by_method),
    "detection": lambda table, scale, by_method: binary.detection_by(by_method, scale.outliers, scale.restarts),
}
