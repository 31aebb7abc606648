"""Whole experiments in one command: what the papers compare, at a size for two CPU cores."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import yaml

from advebm import comparison, config, console, evaluation, files, recipes
from advebm.attacks.projected import Attack
from advebm.comparison import Records, Wanted
from advebm.errors import Diverged, UserError, unknown
from advebm.metrics.base import Record
from advebm.metrics.energy import Energies
from advebm.metrics.robustness import TargetedAccuracy
from advebm.reporting.build import report
from advebm.stages import draw, fit, set_name
from advebm.tables import one_a_line, side_by_side
from advebm.training.recipe import Recipe, resolve
from advebm.training.run import Run

Measure = Callable[[Mapping[str, Run]], dict[str, Records]]
Options = Sequence[tuple[str, Any]]  # of the command line: what every recipe of the experiment takes over
say = console.screen.print


def papers() -> list[dict[str, Any]]:
    """The inventory ``papers.yaml``: every figure, table and algorithm of the four papers, and what makes it."""
    return yaml.safe_load(resources("advebm").joinpath("papers.yaml").read_text())["papers"]


def reproduce(name: str, folder: Path, *, seeds: int = 1, options: Options = ()) -> Path:
    """Carry an experiment out, or on where it was; what is there already is not done again.

    Args:
        name: of :data:`EXPERIMENTS`.
        folder: gets a run's folder for each recipe and seed, ``results.json`` and ``report.html``.
        seeds: how many training seeds; tables then give mean and deviation over them.
        options: as on the command line of ``train``, for every recipe.

    Returns:
        The report.

    Raises:
        UserError: an unknown name, or options that a recipe does not take.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    if seeds < 1:
        raise UserError(f"seeds is at least 1, got {seeds}")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; --out takes a folder for the whole experiment")
    results, runs = EXPERIMENTS[name](folder, seeds, options)
    files.write_json(folder / "results.json", results)
    (one_a_line if len(results) > 4 else side_by_side)(results)
    return report(runs[0], beside=runs[1:], out=folder / "report.html", title=name)


def carry(recipe: Recipe, folder: Path) -> Run:
    """Train a recipe in a folder: from the beginning, from where it was, or not at all."""
    if not (folder / "config.yaml").is_file():
        return _fit(recipe, folder)
    run = Run.open(folder)
    if dataclasses.replace(run.recipe, init=None) != dataclasses.replace(recipe, init=None):
        raise UserError(f"{folder} holds a run of another recipe; choose another --out")
    return run if run.finished or (folder / "diverged").exists() else _fit(recipe, folder, resume=True)


def _fit(recipe: Recipe, folder: Path, *, resume: bool = False) -> Run:
    """Train; what diverges for good stays as it was at its last checkpoint, and is a result as well."""
    try:
        return fit(recipe, folder, resume=resume)
    except Diverged as failure:
        say(f"  {recipe.name}: {failure}")
        files.write(folder / "diverged", str(failure))
        return Run.open(folder)


def drawn(run: Run, recipe: Recipe, per_class: int) -> None:
    """Draw a set of samples by the recipe's sampler, unless it is there."""
    name = set_name(recipe.sampler)
    if name not in run.samples():
        draw(run, name, recipe.sampler, per_class, seed=recipe.seed)


def study(
    folder: Path, seeds: int, entries: Mapping[str, Recipe], measure: Measure, *, per_class: int = 0
) -> tuple[dict[str, Records], list[Run]]:
    """Train recipes by label, draw from them and measure, for each seed; the records, and the first seed's runs."""
    found: list[dict[str, Records]] = []
    first: list[Run] = []
    for seed in range(seeds):
        runs = {}
        for number, (label, entry) in enumerate(entries.items(), 1):
            say(f"[{number}/{len(entries)}] {label}, seed {seed}")
            seeded = dataclasses.replace(entry, name=label, seed=seed)
            runs[label] = carry(seeded, folder / f"seed-{seed}" / label)
            if per_class:
                drawn(runs[label], seeded, per_class)
        found.append(measure(runs))
        first = first or list(runs.values())
    return comparison.over_seeds(found), first


def compared(judge: str, threat: Attack) -> Measure:
    """The comparison of all runs, in the features of one of them."""

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        tell = lambda text: say(f"  {text}")
        return comparison.compare(list(runs.values()), threat=threat, features=runs[judge].folder, progress=tell)

    return measure


def measured(run: Run, wanted: Wanted) -> Records:
    """The records that metrics give; measured unless they are there."""
    comparison.measure(run, wanted)
    names = {name for name, _ in wanted}
    return [r for r in evaluation.latest(run.records()) if r["name"] in names]


def recipe(name: str, options: Options, **changes: Any) -> Recipe:
    """A recipe of the package with changes, then the options of the command line."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return resolve(recipes.find(name), [*pairs, *options])


# The experiments ------------------------------------------------------------------------------------------------------


def digits_supervised(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Every supervised method on 8x8 digits, linf 0.2: the shape of JEAT tables 2 and 3 and figure 6."""
    threat = {"threat__norm": "linf", "threat__eps": 0.2, "threat__step_size": 0.025}
    common = {**threat, "sampler__start": "global"}
    at = {"objective": {"kind": "at", "attack": {"norm": "linf", "eps": 0.2, "steps": 7}}}
    entries = {
        "standard": recipe("digits-standard", options, **common),
        "at": recipe("digits-at", options, **at, **common),
    }
    methods = ("noise", "fast", "free", "trades", "weat", "at-awp", "trades-awp", "prejeat", "jeat", "jem")
    for method in (*methods, "persistent-mle", "short-run-mle"):
        entries[method] = recipe(f"digits-{method}", options)
    half = recipe("digits-standard", [*options, ("data", "part")], **common)
    teacher = folder / "teacher"
    entries["rst-awp"] = recipe("digits-rst-awp", options, objective__objective__teacher=str(teacher))
    carry(dataclasses.replace(half, name="teacher"), teacher)
    return study(folder, seeds, entries, compared("standard", entries["standard"].threat), per_class=50)


def jeat_table1(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Standard classifiers under the normal and the energy attack, one step and 20: the shape of JEAT table 1."""
    entries = {
        "cifar10": recipe("cifar10-standard-small", options),
        "cifar100-20k": recipe("cifar100-standard-small", options),
    }
    threat = entries["cifar10"].threat
    one = [
        dataclasses.replace(threat, steps=1, step_size=threat.eps, start="clean", loss=loss)
        for loss in ("cross-entropy", "energy")
    ]
    many = [dataclasses.replace(threat, loss=loss) for loss in ("cross-entropy", "energy")]

    wanted = comparison.accuracies((*one, *many))
    measure = lambda runs: {label: measured(run, wanted) for label, run in runs.items()}
    return study(folder, seeds, entries, measure)


def jeat_figure5(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Noise injection at 8, 16 and 24/255, read as deviation and as variance: the shape of JEAT figure 5."""
    entries = {}
    for level in (8, 16, 24):
        for reading, std in (("deviation", level / 255), ("variance", (level / 255) ** 0.5)):
            entries[f"{reading}-{level}"] = recipe("cifar10-noise-small", options, objective__std=std)
    entries = {"standard": recipe("cifar10-standard-small", options), **entries}

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        judge = runs["standard"].folder
        for run in runs.values():
            wanted = {**comparison.accuracies(()), **comparison.quality(run, judge)}
            comparison.measure(run, wanted, features=judge)
        return {label: evaluation.latest(run.records()) for label, run in runs.items()}

    return study(folder, seeds, entries, measure, per_class=20)


def cem_claims(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """CEM sections 3 and 4.1 on digits: how often P-CEM by Langevin diverges, and what targets do to an attack."""
    common = {"threat__norm": "linf", "threat__eps": 0.2, "threat__step_size": 0.025, "train__rollbacks": 20}
    at = {"objective": {"kind": "at", "attack": {"norm": "linf", "eps": 0.2, "steps": 7}}}
    langevin = {"objective": {"kind": "jeat", "attack": {"eps": 0.0, "steps": 1, "loss": "energy"}}}
    langevin["objective"]["negatives"] = {"buffer": 2000}
    # same network, optimiser and rate, so that only the negatives differ
    shared = {"backbone__norm": "none", "train__images": 40_000, "optimizer__lr": 0.1}
    entries = {
        "at": recipe("digits-at", options, **at, **common, **shared),
        "p-cem-langevin": recipe("digits-at", options, **langevin, **common, **shared),
    }

    threat = entries["at"].threat
    towards: Wanted = {(f"accuracy under targeted {threat.name}", None): TargetedAccuracy(threat)}

    def stability(run: Run) -> Records:
        events = [line["attempt"] for line in run.history() if line.get("event") == "rollback"]
        count = Record("rollbacks", max(events, default=0), 0.0, 1)
        return [dataclasses.asdict(count), *measured(run, towards)]

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        for kind in ("ta", "cs"):
            drawn(runs["at"], resolve(config.describe(runs["at"].recipe), [("sampler", kind)]), 100)
        records = compared("at", threat)(runs)
        found = {label: [*records[label], *stability(run)] for label, run in runs.items()}
        # section 4.1: TA pushes up E(x), CS does not
        of = ("test images", "samples ta-class", "samples cs-class")
        found["at"] += measured(runs["at"], {(f"E(x) of {what}", None): Energies() for what in of})
        return found

    return study(folder, seeds, entries, measure)


EXPERIMENTS: dict[str, Callable[[Path, int, Options], tuple[dict[str, Records], list[Run]]]] = {
    "digits-supervised": digits_supervised,
    "jeat-table1": jeat_table1,
    "jeat-figure5": jeat_figure5,
    "cem-claims": cem_claims,
}
