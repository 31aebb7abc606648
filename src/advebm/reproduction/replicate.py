"""The papers' tables at several scales: recipes trained, drawn from and measured, the papers' numbers beside ours."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from advebm import recipes
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.base import Adversary
from advebm.attacks.cw import CW
from advebm.attacks.projected import Attack
from advebm.core import files
from advebm.core.errors import UserError, unknown
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
from advebm.reproduction.study import Options
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.sampling import generate

Found = tuple[dict[str, Records], list[Run]]


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.  What a row trains on is the share that its table names, of its recipe's images.

    Attributes:
        about: in words.
        size: of the networks: ``full`` is the papers', ``DATA-METHOD``; otherwise recipes are ``DATA-METHOD-SIZE``.
        images: test images that attacks are run on; none for all.
        samples: drawn of each set.
        draws: sampling seeds, where samplers are compared.
        version: of AutoAttack.
        changes: of every recipe.
        features: that samples are judged in; none takes the standard classifier's of the same table.
        outliers: sets that detection is of.
        restarts: of its worst case.
    """

    about: str
    size: str = "small"
    images: int | None = None
    samples: int = 1000
    draws: int = 3
    version: Literal["quick", "standard"] = "standard"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: str | None = None
    outliers: tuple[Any, ...] = binary.OUTLIERS
    restarts: int = 1


SVHN = {"kind": "hf", "path": "ufldl-stanford/svhn", "subset": "cropped_digits"}
IMAGENET = {"kind": "hf", "path": "benjamin-paine/imagenet-1k-32x32"}
SCALES = {
    "full": Scale(
        "the papers' networks and lengths, all test images, 50,000 samples; days of GPUs; not run here",
        size="full",
        samples=50_000,
        draws=1,
        features="inception",
        outliers=(SVHN, "cifar100", IMAGENET, "uniform"),
        restarts=5,
    ),
    "gpu-30min": Scale(
        "ResNet-18s, PGD-50, C&W, AutoAttack of 1,000 images, 5,000 samples; for half an hour of an H200, never run",
        images=1000,
        samples=5_000,
        changes={"backbone__depth": 18, "backbone__width": 64},
    ),
    "cpu-2h": Scale(
        "ResNet-18s of width 32 for two hours of two cores, AutoAttack's APGDs on 1,000 images, 1,000 samples",
        size="2h",
        images=1000,
        version="quick",
    ),
    "cpu-30min": Scale(
        "ResNet-8s, PGD-50, C&W, AutoAttack's APGDs on 500 images, 1,000 samples; for half an hour of two cores",
        images=500,
        version="quick",
    ),
    "digits": Scale(
        "8x8 digits, a network of four convolutions, AutoAttack's APGDs, all 359 test images, 1,000 samples",
        version="quick",
        outliers=("uniform", "gaussian"),
    ),
}
FAMILIES: dict[str, Callable[[str, Path, Options], Recipe]] = {
    "digits-supervised": supervised.supervised,
    "digits-hybrids": binary.hybrid,
    "digits-unsupervised": unsupervised.unsupervised,
}


def replicate(name: str, scale: str, folder: Path, *, seeds: int = 1, options: Options = ()) -> Path:
    """Carry a table out at a scale, or on where it was, and print it beside the paper's.

    Args:
        name: of :func:`advebm.papers.inventory.tables`.
        scale: of :data:`SCALES`.
        folder: gets a run's folder for each recipe and seed, ``results.json``, ``report.html``, ``NAME-SCALE.json``
            (:func:`advebm.papers.render.summary`) and, where samples are drawn, ``NAME-SCALE.png``.
        seeds: how many training seeds; errors are then deviations over them.
        options: as on the command line of ``train``, for every recipe; of ``outside`` and ``extra`` where it has these.

    Returns:
        ``NAME-SCALE.json``.

    Raises:
        UserError: an unknown name or scale, or one that the table has not.
    """
    table = inventory.find(name)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    table.share(scale)
    if seeds < 1:
        raise UserError(f"seeds is at least 1, got {seeds}")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; --out takes a folder for the whole table")
    study.say(f"{name}, scale {scale}: {SCALES[scale].about}")
    entries = chosen(table, scale, folder, options)
    supervised.teach(entries, folder)
    results, runs = COMPUTATIONS[table.by](table, SCALES[scale], entries, folder, seeds)
    files.write_json(folder / "results.json", results)
    command = [f"advebm reproduce {name} --scale {scale}", f"--seeds {seeds}" * (seeds > 1)]
    command += [f"--{key} {value}" for key, value in options]
    about = {"command": " ".join(filter(None, command)), "seeds": seeds, **setting(SCALES[scale], results, runs)}
    plain = render.summary(table, scale, agreement.cells(table, results), about)
    path = folder / f"{name}-{scale}.json"
    files.write_json(path, plain)
    if (picture := drawing(table, runs)) is not None:
        files.write(path.with_suffix(".png"), picture)
    beside(plain)
    ordered = sorted(runs, key=lambda run: run.folder.name == "standard")  # who judges comes last
    shown = [stage for run in ordered for stage in reversed(run.stages)]
    report(shown[0], beside=shown[1:], out=folder / "report.html", title=f"{name}, scale {scale}", summary=plain)
    return path


def chosen(table: Table, scale: str, folder: Path, options: Options) -> dict[str, Recipe]:
    """The recipe of each method that the table has at a scale, the judge of samples first; some have no such recipe."""
    judge = ["standard"] * ("fid" in table.columns and bool(table.data))
    found = {method: sized(table, scale, method, folder, options) for method in (*judge, *table.methods())}
    return {method: entry for method, entry in found.items() if entry is not None}


def sized(table: Table, scale: str, method: str, folder: Path, options: Options) -> Recipe | None:
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
    taught = supervised.taught(folder) if method == "rst-awp" else {}
    return shortened(study.recipe(name, own, **SCALES[scale].changes, **taught), share)


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
        trained[recipe.name] = f"{recipe.train.images:,} images of {len(recipe.data.load().train):,}"
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
    sets = {run.recipe.name: generate.read(s[table.name]) for run in stages if table.name in (s := run.samples())}
    panels = {name: pictures.by_class(s.x, s.y, len(runs[0].data.classes), 4) for name, s in sets.items()}
    return figures.grids(panels, dict.fromkeys(panels, ())) if panels else None


# Computations: a table, a scale, recipes, a folder, seeds -> results by title, and the first seed's runs -------------


def by_methods(table: Table, scale: Scale, entries: Mapping[str, Recipe], folder: Path, seeds: int) -> Found:
    """A row a method, under one threat."""
    threat = entries[table.methods()[0]].threat

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        found = {}
        for name in table.names():
            of = table.of(name)
            if (run := runs.get(of["method"])) is not None:
                if of.get("stage") == "first":
                    run = Run.open(run.before[0])
                found[name] = numbers(table, scale, run, threat, runs.get("standard"), of.get("sampler"))
        return found

    return study.study(folder, seeds, entries, measure)


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
    whose = compare.space(features)
    if "fid" in table.columns:
        own = run.recipe if kind is None else unsupervised.of_kind(run, kind, "class")
        if judge is not None:
            own = binary.chosen(run, own, judge, unsupervised.FEW, f"-{generate.set_name(own.sampler)}")
        count = scale.samples // max(1, len(own.data.load().classes))
        drawn = study.drawn(run, own, count, table.name)
        wanted |= {Key(q, samples=drawn, space=whose): SampleQuality() for q in ("FD", "class score")}
    return study.measured(run, wanted, features)


def by_samplers(table: Table, scale: Scale, entries: Mapping[str, Recipe], folder: Path, seeds: int) -> Found:
    """A row a sampler of a network and a kind of start."""
    options: dict[str, Any] = {"samples": scale.samples, "draws": scale.draws, "features": scale.features}
    return study.study(folder, seeds, entries, lambda runs: unsupervised.sampled(runs, **options))


def by_attacks(table: Table, scale: Scale, entries: Mapping[str, Recipe], folder: Path, seeds: int) -> Found:
    """A row an attack, a column a set of images; on all test images."""
    return supervised.attacked(folder, seeds, entries)


def by_detection(table: Table, scale: Scale, entries: Mapping[str, Recipe], folder: Path, seeds: int) -> Found:
    """A row a set of other images, a column a method."""
    return binary.detecting(folder, seeds, entries, scale.outliers, scale.restarts)


COMPUTATIONS: dict[str, Callable[[Table, Scale, Mapping[str, Recipe], Path, int], Found]] = {
    "methods": by_methods,
    "samplers": by_samplers,
    "attacks": by_attacks,
    "detection": by_detection,
}
