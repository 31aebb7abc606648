"""Whole experiments in one command: what the papers compare, at a size for two CPU cores."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm import comparison, config, console, evaluation, files, generation, pictures, recipes
from advebm.apps import Translate
from advebm.attacks.apgd import APGD
from advebm.attacks.projected import Attack
from advebm.chains import Chains, Point, best, reached
from advebm.checks import device
from advebm.comparison import Records, Wanted
from advebm.data.sources import Data
from advebm.errors import Diverged, UserError, unknown
from advebm.metrics.base import Record, proportion
from advebm.metrics.detectors import Detectors
from advebm.metrics.energy import Energies
from advebm.metrics.ood import EnergyScore, MaxSoftmax, OutOfDistribution
from advebm.metrics.probing import LinearProbe, NearestNeighbours
from advebm.metrics.restoration import Counterfactuals, Restoration
from advebm.metrics.robustness import Accuracy, RobustAccuracy, TargetedAccuracy
from advebm.reporting import figures, gallery
from advebm.reporting.build import report
from advebm.stages import contrast, draw, fit
from advebm.tables import one_a_line, side_by_side
from advebm.training.recipe import Recipe, resolve
from advebm.training.run import Run

Measure = Callable[[Mapping[str, Run]], dict[str, Records]]
Options = Sequence[tuple[str, Any]]  # of the command line: what every recipe of the experiment takes over
say = console.screen.print


def reproduce(name: str, folder: Path, *, seeds: int = 1, quick: bool = False, options: Options = ()) -> Path:
    """Carry an experiment out, or on where it was; what is there already is not done again.

    Args:
        name: of :data:`EXPERIMENTS`.
        folder: gets a run's folder for each recipe and seed, ``results.json`` and ``report.html``.
        seeds: how many training seeds; tables then give mean and deviation over them.
        quick: with the shorter training of :data:`QUICK`; the report says so.
        options: as on the command line of ``train``, for every recipe.

    Returns:
        The report.

    Raises:
        UserError: an unknown name, no quick form, or options that a recipe does not take.
    """
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS)
    if seeds < 1:
        raise UserError(f"seeds is at least 1, got {seeds}")
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; --out takes a folder for the whole experiment")
    if quick and name not in QUICK:
        raise UserError(f"{name} has no quick form; {', '.join(QUICK)} have")
    if quick:
        name_shown, options = f"{name} --quick: shorter training than the experiment's", [*QUICK[name], *options]
    else:
        name_shown = name
    results, runs = EXPERIMENTS[name](folder, seeds, options)
    files.write_json(folder / "results.json", results)
    (one_a_line if len(results) > 4 else side_by_side)(results)
    for line in CONCLUSIONS[name](results) if name in CONCLUSIONS else ():
        say(line)
    drawn = FIGURES[name](results) if name in FIGURES else {}
    return report(runs[0], beside=runs[1:], out=folder / "report.html", title=name_shown, shown=drawn)


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


def drawn(run: Run, recipe: Recipe, per_class: int, name: str | None = None) -> str:
    """Draw a set of samples by the recipe's sampler, unless it is there; its name."""
    name = name or generation.set_name(recipe.sampler)
    if name not in run.samples():
        draw(run, name, recipe.sampler, per_class, seed=recipe.seed, device=device())
    return name


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
            before = tuple(dataclasses.replace(stage, seed=seed) for stage in entry.before)
            seeded = dataclasses.replace(entry, name=label, seed=seed, before=before)
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
        options: dict[str, Any] = {"features": runs[judge].folder, "device": device(), "progress": tell}
        return comparison.compare(list(runs.values()), threat=threat, **options)

    return measure


def measured(run: Run, wanted: Wanted, features: str | Path | None = None) -> Records:
    """The records that metrics give; measured, in sight, unless they are there."""
    tell = lambda name: say(f"  {run.recipe.name}: {name}")
    return comparison.measure(run, wanted, features=features, device=device(), progress=tell, bar=console.bar)


def recipe(name: str, options: Options, **changes: Any) -> Recipe:
    """A recipe of the package with changes, then the options of the command line."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return resolve(recipes.find(name), [*pairs, *options])


# The experiments ------------------------------------------------------------------------------------------------------


LINF = {"threat__norm": "linf", "threat__eps": 0.2, "threat__step_size": 0.025, "sampler__start": "global"}
ADVERSARIAL = ("fast", "free", "trades", "weat", "at-awp", "trades-awp", "prejeat", "jeat")
SUPERVISED = ("standard", "at", "noise", *ADVERSARIAL, "jem", "persistent-mle", "short-run-mle", "rst-awp")


def supervised(method: str, folder: Path, options: Options) -> Recipe:
    """The recipe of a supervised method on digits, linf 0.2."""
    attack = {"objective": {"kind": "at", "attack": {"norm": "linf", "eps": 0.2, "steps": 7}}}
    changes = {"standard": LINF, "at": {**attack, **LINF}, "rst-awp": taught(folder)}
    return recipe(f"digits-{method}", options, **changes.get(method, {}))


def taught(folder: Path) -> dict[str, Any]:
    """The option of RST that names its teacher; see :func:`teach`."""
    return {"objective__objective__teacher": str(folder / "teacher")}


def teach(entries: Mapping[str, Recipe], folder: Path) -> None:
    """Train the teacher of ``rst-awp``, where that is among the entries: ``standard`` on the same labels."""
    if "rst-awp" in entries:
        data = entries["rst-awp"].data
        carry(dataclasses.replace(entries["standard"], name="teacher", data=data), folder / "teacher")


def digits_supervised(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Every supervised method on 8x8 digits, linf 0.2: the shape of JEAT tables 2 and 3 and figure 6."""
    entries = {method: supervised(method, folder, options) for method in SUPERVISED}
    teach(entries, folder)
    return study(folder, seeds, entries, compared("standard", entries["standard"].threat), per_class=50)


def jeat_table1(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Standard classifiers under the normal and the energy attack, one step and 20: the shape of JEAT table 1."""
    entries = {
        "cifar10": recipe("cifar10-standard-small", options),
        "cifar100-20k": recipe("cifar100-standard-small", options),
    }
    return attacked(folder, seeds, entries)


def attacked(folder: Path, seeds: int, entries: Mapping[str, Recipe]) -> tuple[dict[str, Records], list[Run]]:
    """The normal and the energy attack, by one step and by the steps of the first recipe's threat."""
    threat = next(iter(entries.values())).threat
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
            measured(run, wanted, judge)
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


def along(run: Run, recipe: Recipe, judge: Run, chains: Chains, name: str = "") -> list[Point]:
    """What the samples of a run are worth after each number of steps; measured unless it is there, under the name."""
    about = {"chains": config.describe(chains), "sampler": config.describe(recipe.sampler)}
    about |= {"features": str(comparison.judge(judge.folder)), "checkpoint": run.checkpoints.path().name}
    file = run.folder / f"chains-{chains.split}{name}.json"
    known = files.read_json(file, default={})
    if {k: known.get(k) for k in about} != about:
        say(f"  {recipe.name}: samples after {', '.join(map(str, chains.steps))} steps")
        outside = recipe.outside.load() if recipe.outside is not None else None
        space = evaluation.find_space(judge.folder).load(device())
        points = chains(run.model()[0].to(device()), recipe.sampler, recipe.data.load(), space, outside=outside)
        known = {**about, "points": [point._asdict() for point in points]}
        files.write_json(file, known)
    return [Point(**point) for point in known["points"]]


LONG = Chains()


def chosen(run: Run, recipe: Recipe, judge: Run, chains: Chains = LONG, name: str = "") -> Recipe:
    """The recipe with as many steps of sampling as validation images like best."""
    steps = best(along(run, recipe, judge, chains, name)).steps
    return dataclasses.replace(recipe, sampler=dataclasses.replace(recipe.sampler, steps=steps))


def detection(run: Run, count: int, restarts: int) -> OutOfDistribution:
    """Standard and worst case against noises and the test images of p0."""
    outside = () if run.recipe.outside is None else (run.recipe.outside,)
    sets = (*OutOfDistribution().sets, *(outside or (config.build("patches", "source"),)))
    return OutOfDistribution(sets=sets, count=count, eps=run.recipe.threat.eps, restarts=restarts)


def digits_binary_at(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Binary AT on digits from patches of photographs: steps K, fixed or growing, three other p0, no R1, detection."""
    judge = carry(recipe("digits-standard", ()), folder / "judge")
    critic = lambda **changes: recipe("digits-binary-at", options, **changes)
    entries = {"k-grows": critic()}
    schedule = config.describe(entries["k-grows"].objective)["curriculum"]
    images, largest = entries["k-grows"].train.images, schedule["steps"]
    for k in sorted({1, largest // 4, largest // 2, largest}):
        entries[f"k-{k}"] = critic(objective__curriculum={**schedule, "start": k, "steps": k})
    for of in ("k-grows", f"k-{largest // 4}", f"k-{largest}"):  # the rate is constant, so these are its beginning
        for count in (images // 4, images // 2):
            short = dataclasses.replace(entries[of].train, images=count)
            entries[f"{of}@{count}"] = dataclasses.replace(entries[of], train=short)
    entries["no-r1"] = critic(objective__r1=0.0)
    few = {"kind": "part", "source": {"kind": "patches"}, "share": 0.01}
    for name, outside in (("70-patches", few), ("noise", "noise"), ("patches-and-noise", "mixture")):
        entries[f"p0-{name}"] = critic(outside=outside)

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        found = {}
        for title, run in runs.items():
            setting = chosen(run, run.recipe, judge)
            drawn(run, setting, 100)
            wanted: Wanted = comparison.quality(run, judge.folder)
            if "@" not in title:
                wanted |= {("AUROC energy vs uniform", None): detection(run, 512, 1)}
            measured(run, wanted, judge.folder)
            steps = Record("steps chosen on validation", setting.sampler.steps, 0.0, 1)
            found[title] = [dataclasses.asdict(steps), *brief(run)]
        return found

    return study(folder, seeds, entries, measure)


def binary_at_table4(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """OE, JEM, RATIO and Binary AT on CIFAR-10, p0 80 classes of CIFAR-100: detection, Binary-AT table 4's form."""
    entries = {m: recipe(f"cifar10-{m}-small", options) for m in ("oe", "jem", "ratio", "binary-at")}
    return detecting(folder, seeds, entries, OUTLIERS)


P0 = {"kind": "classes", "source": "cifar100", "count": 80}
OUTLIERS = (P0, {**P0, "rest": True}, "digits", "uniform", "gaussian")


def detecting(
    folder: Path, seeds: int, entries: Mapping[str, Recipe], outliers: Sequence[Any], restarts: int = 1
) -> tuple[dict[str, Records], list[Run]]:
    """Detection of sets of images as they are and attacked within l2 1, by the scores of the methods' papers."""
    entries = {m: dataclasses.replace(e, threat=Attack(1.0, "l2", 20)) for m, e in entries.items()}
    sets = tuple(config.build(s, "outlier") for s in outliers)

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        found = {}
        for method, run in runs.items():
            # as the papers of these methods score: by confidence, or by log p(x)
            score = MaxSoftmax() if method in ("oe", "ratio") else EnergyScore()
            metric = OutOfDistribution((score,), sets, eps=1.0, restarts=restarts)
            first = measured(run, {(f"AUROC {score.name} vs uniform", None): metric})[0]
            own = [r for r in run.records() if r["time"] == first["time"] and r["settings"].get("metric")]  # with it
            found[method] = [{**r, "name": r["name"].replace(f" {score.name}", "")} for r in own]
        return found

    return study(folder, seeds, entries, measure)


def brief(run: Run) -> Records:
    """The latest records of a run that a table has room for."""
    names = ("accuracy", "FD", "KID", "AUROC", "fpr95_id")
    return [r for r in evaluation.latest(run.records()) if r["name"].startswith(names)]


def binary_at_figures(results: Mapping[str, Records]) -> dict[str, bytes]:
    """FD against K, against images, and for each p0: figures 4, 5 and 3 of Binary-AT."""
    fd = {t: next((r["value"], r["error"]) for r in rs if r["name"].startswith("FD")) for t, rs in results.items()}
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
L2 = {"threat": {"norm": "l2", "eps": 0.9, "steps": 20}}


def hybrid(method: str, folder: Path, options: Options) -> Recipe:
    """The recipe of a classifier or critic on digits, l2 0.9."""
    changes: dict[str, dict[str, Any]] = {method: {"sampler__start": "global"} for method in ("standard", "at")}
    changes["gat"] = {"objective__attack": {"norm": "l2", "eps": 0.9, "steps": 10, "step_size": 0.225}}
    changes["short-run-mle"] = {"sampler": SHORT_RUN}
    return recipe(f"digits-{method}", options, **L2, **changes.get(method, {}))


def digits_hybrids(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Classifiers and critics trained with outside data beside AT and JEM, l2 0.9: accuracy, samples, detection."""
    entries = {method: hybrid(method, folder, options) for method in HYBRIDS}
    apgd = APGD(eps=0.9, norm="l2")

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        judge = runs["standard"]
        stage = Run.open(runs["dat"].before[0])
        everyone = {title: run for title, run in runs.items() if title != "dat"}
        everyone |= {"dat, stage 1": stage, "dat, stage 2": runs["dat"]}
        found = {}
        for title, run in everyone.items():
            critic = run.recipe.objective.outputs == 1
            setting = chosen(run, run.recipe, judge) if critic else run.recipe
            drawn(run, setting, 50)
            wanted: Wanted = comparison.quality(run, judge.folder)
            wanted |= {("AUROC energy vs uniform", None): detection(run, 512, 1)}
            if not critic and title != "short-run-mle":
                wanted |= {("accuracy", None): Accuracy(), (f"accuracy under {apgd.name}", None): RobustAccuracy(apgd)}
                wanted |= {("AUROC of detectors", None): Detectors()}
            measured(run, wanted, judge.folder)
            found[title] = brief(run)
        return efficiency(everyone, judge, found)

    return study(folder, seeds, entries, measure)


SHORT_RUN = {"kind": "sgld", "steps": 40, "step_size": 0.1, "noise": 0.01}  # as the recipe trains


def efficiency(runs: Mapping[str, Run], judge: Run, found: dict[str, Records]) -> dict[str, Records]:
    """Records with what the samples of three generators cost where they are equally good, Binary-AT section 5."""
    points = {}
    for title in ("binary-at", "jem", "short-run-mle"):
        run = runs[title]
        own = (
            run.recipe
            if title != "jem"
            else dataclasses.replace(run.recipe, sampler=config.build(SHORT_RUN, "sampler"))
        )
        points[title] = along(run, own, judge, Chains("train"))
    level = max(min(p.fd for p in of) for of in points.values())
    for title, of in points.items():
        point = reached(of, level)
        assert point is not None
        about = {"level": level}
        for name, value in (("gradients an image", point.steps), ("milliseconds an image", 1000 * point.seconds)):
            record = Record(f"{name} to equal FD", value, 0.0, Chains().count, about)
            found[title].append(dataclasses.asdict(record))
    return found


HALVES = [{"kind": "classes", "source": "digits", "count": 5, "rest": rest} for rest in (False, True)]
AMOUNTS = (0.0, 0.25, 0.5, 1.0, 2.0)


def digits_applications(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Restoration and counterfactuals on digits beside other ways; translation by critics of half of the classes each.

    Of each half two critics, which begin training from patches of photographs, or from these and the other half.
    """
    entries = {m: recipe(f"digits-{m}", options, **L2) for m in ("standard", "at", "binary-at")}
    for half, (own, other) in {"first": HALVES, "second": HALVES[::-1]}.items():
        for p0, outside in {"patches": "patches", "both": {"kind": "mixture", "sources": ["patches", other]}}.items():
            change = {"data": own, "outside": outside, "train__images": 24_000, **L2}
            entries[f"{half}-{p0}"] = recipe("digits-binary-at", options, **change)

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        judge, found = runs["standard"].folder, {}
        for title, run in runs.items():
            if title in ("standard", "at", "binary-at"):
                wanted: Wanted = {("PSNR inpainting by energy", None): Restoration()}
                if title != "binary-at":
                    wanted |= {("counterfactual reached", None): Counterfactuals(), ("accuracy", None): Accuracy()}
                measured(run, wanted, judge)
                names = ("PSNR", "SSIM", "counterfactual", "accuracy")
                found[title] = [r for r in evaluation.latest(run.records()) if r["name"].startswith(names)]
            else:
                other = HALVES[0] if title.startswith("second") else HALVES[1]
                found[title] = translated(run, config.build(other, "source").load(), judge)
        return found

    return study(folder, seeds, entries, measure)


def translated(run: Run, source: Data, judge: Path) -> Records:
    """How many of the test images of another kind a judge takes for a critic's kind, by the amount of translation.

    A figure shows some on their way, Binary-AT figure 7.
    """
    classes = tuple(int(name) for name in run.recipe.data.load().classes)
    space, sampler, records = evaluation.find_space(judge).load("cpu"), run.recipe.sampler, []
    assert space.logits is not None
    model, films = run.model()[0], torch.empty(0)
    for amount in AMOUNTS:
        method = Translate(steps=sampler.steps, step_size=sampler.step_size, amount=amount)
        found = method(model, source.test.x)
        named = space.logits(space.of(found.x, torch.device("cpu"))).argmax(1)
        hits = torch.isin(named, torch.tensor(classes))
        records.append(Record(f"named as the target, amount {amount:g}", *proportion(hits)))
        films = found.film[:: len(found.x) // 10][:10] if amount == 1 else films
    text = (
        f"from {source.name}, a row an image, from left to right; the critic's own kind: {', '.join(map(str, classes))}"
    )
    gallery.hang(run, "translation", pictures.png(pictures.grid(films, tile=48)), "Translation", text)
    return [dataclasses.asdict(record) for record in records]


FIGURE4 = (("at", "jeat-16"), ("at", "jeat-17"), ("prejeat", "jeat-17"))  # from left to right


def jeat_figure4(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Ten ships by equations 16 and 17 from AT and by 17 from PreJEAT, from the same seeds: the shape of JEAT figure 4.

    The paper states neither steps nor step size; at temperature 1, as printed, images drown in noise.
    """
    entries = {"at": recipe("cifar10-at-small", options), "prejeat": recipe("cifar10-prejeat-small", options)}

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        classes = runs["at"].recipe.data.load().classes
        ships = (classes.index("ship"),) if "ship" in classes else None
        panels, texts = {}, {}
        for title, kind in FIGURE4:
            settings = [("steps", 100), ("step_size", 0.05), ("temperature", 1e-4), ("start", "class")]
            chosen = [("sampler", kind), *((f"sampler.{name}", value) for name, value in settings)]
            sampler = resolve(config.describe(runs[title].recipe), chosen).sampler
            where = draw(runs[title], kind, sampler, 10, classes=ships)
            x = generation.read(where).x
            panels[f"{title}, {kind}"] = x[:10].view(2, 5, *x.shape[1:])
            texts[f"{title}, {kind}"] = ["the same seeds"]
        text = "Equation 16 descends E(x, y) - E(x), 17 descends E(x, y); 100 steps of 0.05 at temperature 1e-4."
        gallery.hang(runs["at"], "jeat-figure4", figures.grids(panels, texts), "JEAT figure 4", text)
        return {title: measured(run, comparison.accuracies(())) for title, run in runs.items()}

    return study(folder, seeds, entries, measure)


ALONE = "no steps"  # the row of seeds as they are
SEEDS = {f"{given}, {ALONE}": ("langevin", start) for given, start in (("cond", "class"), ("uncond", "global"))}
SUPERVISED_ROWS = {f"cond, {name}": (name.lower(), "class") for name in ("TA", "Langevin", "CS", "RCS")}
UNSUPERVISED = {
    f"{given}, {name}": (kind, start)
    for given, start in (("uncond", "global"), ("cond", "class"))
    for name, kind in (("PGD", "np-pgd"), ("Langevin", "np-langevin"), ("MaxEnt", "maxent"))
}
TABLE2 = {
    "at": SEEDS | SUPERVISED_ROWS,
    "infonce": UNSUPERVISED,
    "acl": UNSUPERVISED,
}  # each run's rows: kind and start


def rows_of(label: str) -> dict[str, tuple[str, str]]:
    """The rows of CEM's tables that a run of this label has."""
    everyone = {**TABLE2, "jem": {"SGLD": ("sgld", "noise")}}
    return next((rows for name, rows in everyone.items() if label.startswith(name)), {})


def unsupervised(label: str, folder: Path, options: Options) -> Recipe:
    """The recipe of an encoder, or of a classifier beside it, on digits, l2 0.9."""
    return recipe(f"digits-{label}", options, **L2)


def digits_unsupervised(folder: Path, seeds: int, options: Options) -> tuple[dict[str, Records], list[Run]]:
    """Encoders by InfoNCE, standard and adversarial, beside AT on digits, l2 0.9: probes, CEM table 2 and figure 1."""
    entries = {label: unsupervised(label, folder, options) for label in ("standard", *TABLE2)}
    threat = entries["standard"].threat

    def measure(runs: Mapping[str, Run]) -> dict[str, Records]:
        probe, neighbours = LinearProbe(), NearestNeighbours()
        name = "accuracy of a linear probe"
        probes: Wanted = {(name, None): probe, (f"{name} under {threat.name}", None): probe}
        probes[f"accuracy of {neighbours.k} nearest neighbours", None] = neighbours
        plain = comparison.accuracies((threat,))
        found = {t: measured(run, plain if run.recipe.objective.hidden is None else probes) for t, run in runs.items()}
        return found | sampled(runs)

    return study(folder, seeds, entries, measure)


def sampled(runs: Mapping[str, Run], **drawing: Any) -> dict[str, Records]:
    """CEM's table 2 of all runs but the standard classifier, which judges and gets figure 1.

    ``drawing`` are the options of :func:`table2`.
    """
    judge, found = runs["standard"], dict[str, Records]()
    for title, run in runs.items():
        if rows := rows_of(title):
            table = table2(run, rows, judge, **drawing)
            found |= {f"{title}, {row}": records for row, records in table.items()}
    gallery.hang(judge, "cem-figure1", cem_figure1(runs), "CEM figure 1", "Uncurated; seeds, then a row a network.")
    return found


def of_kind(run: Run, kind: str, start: str) -> Recipe:
    """A run's recipe with another sampler."""
    return resolve(config.describe(run.recipe), [("sampler", kind), ("sampler.start", start)])


FEW = Chains(count=500, steps=(1, 2, 4, 8, 16, 32, 64))  # what steps are chosen from


def table2(
    run: Run,
    rows: Mapping[str, tuple[str, str]],
    judge: Run,
    *,
    samples: int = 1000,
    draws: int = 3,
    features: str | Path | None = None,
) -> dict[str, Records]:
    """Samplers of a run beside each other over sampling seeds, each with as many steps as validation likes best.

    Drawn and measured unless it is there; in the features of the judge unless others are given.
    """
    samplers = {}
    for row, (kind, start) in rows.items():
        other = of_kind(run, kind, start)
        name = f"-{generation.set_name(other.sampler)}"
        count = 0 if ALONE in row else chosen(run, other, judge, FEW, name).sampler.steps
        samplers[folder_of(row)] = dataclasses.replace(other.sampler, steps=count)
    about: dict[str, Any] = {name: config.describe(sampler) for name, sampler in samplers.items()}
    features = features or judge.folder
    about |= {"features": comparison.judge(features), "checkpoint": run.checkpoints.path().name}
    about |= {"samples": samples, "draws": draws}
    file = run.folder / "table2.json"
    known = files.read_json(file, default={})
    if known.get("about") != about:
        tell = lambda text: say(f"  {run.recipe.name}: {text}")
        count = samples // len(run.recipe.data.load().classes)
        found, _ = contrast(run, samplers, count, draws, features=features, say=tell, device=device())
        known = {"about": about, "found": found, "time": files.now()}
        files.write_json(file, known)
    taken = {name: Record("steps chosen on validation", sampler.steps, 0.0, 1) for name, sampler in samplers.items()}
    names = {row: folder_of(row) for row in rows}
    day = {"time": known.get("time", files.now())}
    found = {name: [dataclasses.asdict(taken[name]), *known["found"][name]] for name in names.values()}
    return {row: [{**record, **day} for record in found[name]] for row, name in names.items()}


def folder_of(row: str) -> str:
    """What the samples of a row are called."""
    return row.lower().replace(",", "").replace(" ", "-")


def cem_figure1(runs: Mapping[str, Run]) -> bytes:
    """Samples of the first sampling seed: what chains began from, then a row a network; four of each class."""
    drawn = {
        f"{title}, {row}": generation.read(run.folder / "comparison" / f"{folder_of(row)}-0")
        for title, run in runs.items()
        for row in rows_of(title)
    }
    panels = {title: pictures.by_class(some.x, some.y, 10, 4) for title, some in drawn.items()}
    strips = [{t.partition(", ")[2]: x for t, x in panels.items() if ALONE in t}]
    strips += [{t: x for t, x in panels.items() if t.startswith(f"{run}, ") and ALONE not in t} for run in runs]
    return pictures.stacked([figures.grids(strip, dict.fromkeys(strip, ())) for strip in strips if strip])


def distances(results: Mapping[str, Records]) -> dict[str, tuple[float, float]]:
    """FD and its error of each row that has one."""
    return {t: (r["value"], r["error"]) for t, rs in results.items() for r in rs if r["name"].startswith("FD")}


def winners(results: Mapping[str, Records]) -> list[str]:
    """For each network and kind of start, which sampler is nearest to the data, and by how much; in FD."""
    fd = distances(results)
    lines = []
    for group in dict.fromkeys(title.rpartition(", ")[0] for title in fd if ALONE not in title):
        rows = {t.rpartition(", ")[2]: v for t, v in fd.items() if t.rpartition(", ")[0] == group and ALONE not in t}
        (name, first), (other, second), *_ = sorted(rows.items(), key=lambda row: row[1][0])
        margin, error = second[0] - first[0], (first[1] ** 2 + second[1] ** 2) ** 0.5
        seeds = fd[f"at, {group.rpartition(', ')[2]}, {ALONE}"][0]
        line = f"{group}: {name} ({first[0]:.1f}) before {other} by {margin:.1f} ± {error:.1f} in FD"
        lines.append(f"{line}; its seeds have {seeds:.1f}")
    return lines


def unsupervised_figures(results: Mapping[str, Records]) -> dict[str, bytes]:
    """FD of every row of the table, and what follows from it."""
    fd = distances(results)
    return {". ".join(winners(results)): figures.bars(fd, "FD in the features of a standard classifier")}


EXPERIMENTS: dict[str, Callable[[Path, int, Options], tuple[dict[str, Records], list[Run]]]] = {
    "digits-supervised": digits_supervised,
    "jeat-table1": jeat_table1,
    "jeat-figure4": jeat_figure4,
    "jeat-figure5": jeat_figure5,
    "cem-claims": cem_claims,
    "digits-binary-at": digits_binary_at,
    "digits-hybrids": digits_hybrids,
    "digits-unsupervised": digits_unsupervised,
    "binary-at-table4": binary_at_table4,
    "digits-applications": digits_applications,
}
FIGURES: dict[str, Callable[[Mapping[str, Records]], dict[str, bytes]]] = {
    "digits-binary-at": binary_at_figures,
    "digits-unsupervised": unsupervised_figures,
}
CONCLUSIONS: dict[str, Callable[[Mapping[str, Records]], list[str]]] = {"digits-unsupervised": winners}
QUICK: dict[str, Options] = {
    "digits-binary-at": [("train.images", 16_000), ("objective.curriculum.window", 400)],
    "digits-hybrids": [("train.images", 12_000)],
    "digits-unsupervised": [("train.images", 12_000)],
    "digits-applications": [("train.images", 12_000)],
}
