"""What each verb does."""

import argparse
import ast
import functools
import importlib.util
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from advebm import recipes
from advebm.cli.options import Overrides
from advebm.core import processes
from advebm.core.config import KINDS
from advebm.core.errors import UserError, unknown


def device(name: str | None) -> str:
    """As :func:`advebm.core.checks.device`, and said; torch is imported when it is wanted."""
    from advebm.core import checks, console
    from advebm.training.hardware import describe

    found = checks.device(name)
    console.computing_on(describe(found))
    return found


def team(name: str | None) -> tuple[processes.Team, str]:
    """The processes that share the command, and the device of this one."""
    if processes.launched()[1] == 1:
        return processes.ALONE, device(name)
    from advebm.runs.engine import Engine

    engine = Engine(name)
    return engine, str(engine.device)


def run_demo(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm demo``."""
    from advebm.cli.demo import demo
    from advebm.reporting.terminal import side_by_side
    from advebm.runs.run import new_folder

    begun = time.perf_counter()
    path, records = demo(new_folder(args.out, "demo"), seed=args.seed)
    side_by_side(records)
    print(f"{time.perf_counter() - begun:.0f} s; report: {path}")


def run_toy(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm toy``."""
    from advebm.core import console
    from advebm.reporting.terminal import numbers_table
    from advebm.toy import train as toy_training
    from advebm.toy.densities import DENSITIES
    from advebm.toy.figures import draw

    if args.all and args.density:
        raise UserError("--all is every density; leave out the name or --all")
    rows: dict[str, dict[str, float]] = {}
    written: list[Path] = []
    for density in DENSITIES if args.all else [args.density or "gaussian"]:
        console.say(density)
        plays, paths = draw(density, args.out, method=args.method, p0=args.p0, seed=args.seed)
        rows |= {
            f"{play.density} {play.method} {play.p0}": toy_training.numbers(play, seed=args.seed) for play in plays
        }
        written += paths
    numbers_table(rows)
    for path in written:
        print(path)


def run_train(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm train``."""
    if (folder := _train(args, overrides)) is not None:
        print(folder)


def _train(args: argparse.Namespace, overrides: Overrides) -> Path | None:
    """Train as the options say; the run's folder, or None where only the recipe was asked for."""
    from advebm.runs.recipe import dump, read, resolve
    from advebm.runs.run import Run, new_folder
    from advebm.workflows.train import fit

    if args.resume is not None:
        if overrides or args.out or args.init or args.model or args.fast or args.labels or args.seed is not None:
            raise UserError("a resumed run keeps its own recipe and folder; leave the other options out")
        recipe, folder = Run.open(args.resume).recipe, args.resume
    else:
        if (args.recipe or args.config) is None:
            raise UserError(
                f"train takes --recipe NAME, --config FILE or --resume RUN; recipes: {', '.join(recipes.names())}"
            )
        plain = recipes.find(args.recipe) if args.recipe else read(args.config)
        if args.model:
            overrides = [*overrides, ("backbone", {"kind": "own", "path": args.model})]
        if args.fast:
            overrides = [*overrides, ("train.fast", args.fast)]
        given = {"seed": args.seed, "init": args.init}
        recipe = resolve({**plain, **{k: v for k, v in given.items() if v is not None}}, overrides)
        if args.labels == "none":
            recipe = recipe.unlabelled()
        folder = args.out or new_folder(Path("runs"), recipe.name)
    if args.print_config:
        print(dump(recipe), end="")
        return None
    if args.dry_run is not None:
        from advebm.reporting.terminal import costs_table
        from advebm.training import cost, hardware

        if args.dry_run:
            found = hardware.find(args.dry_run)
            stages = cost.estimates(recipe)
            costs_table(stages, [found] * len(stages))
        else:
            where = device(args.device)
            stages = cost.estimates(recipe.computed_on(where))
            costs_table(stages, [cost.measured_here(stage, where) for stage in stages])
        return None
    return fit(recipe, folder, resume=args.resume is not None, device=args.device).folder


def run_run(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm run``."""
    from advebm.evaluation.evaluate import find_space

    if args.per_class < 1:
        raise UserError(f"--per-class is at least 1, got {args.per_class}")
    if args.features:
        find_space(args.features).load("cpu")  # rather now than after training
    folder = _train(args, overrides)
    if folder is None:
        return
    where = [f"--device={args.device}"] if args.device else []
    judge = [f"--features={args.features}"] if args.features else []
    way = [f"--fast={args.fast}"] if args.fast else []
    for verb, options in (
        ("sample", [*where, *way, f"--per-class={args.per_class}"]),
        ("evaluate", [*where, *judge]),
        ("report", []),
    ):
        if verb == "report" and processes.launched()[0]:
            return
        from advebm.cli.parser import build_parser

        following = build_parser().parse_args([verb, str(folder), *options])
        following.call(following, [])


def run_sample(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm sample``."""
    from advebm.core import console
    from advebm.reporting.terminal import one_a_line
    from advebm.runs.run import Run
    from advebm.sampling.generate import set_name
    from advebm.workflows.sample import contrast, draw

    for name in ("per_class", "steps", "processes", "batch", "seeds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is at least 1, got {value}")
    if (args.seeds or args.features) and not args.compare:
        raise UserError("--seeds and --features go with --compare")
    if args.compare and (args.method or args.name):
        raise UserError("--compare names the methods, and each set after its own; leave --method and --name out")
    if processes.launched()[1] > 1 and (args.compare or args.processes > 1):
        raise UserError("--compare and --processes take one process; leave them out, or run it without torchrun")
    run = Run.open(args.run)
    members, where = team(args.device)
    if args.steps:
        overrides = [*overrides, ("sampler.steps", args.steps)]
    options = {"seed": args.seed, "checkpoint": args.checkpoint, "device": where, "batch": args.batch}
    options |= {"processes": args.processes, "trajectory": args.trajectory, "classes": _numbers(args.classes)}
    options["way"] = args.fast
    leak = "seeds are fitted on test images: what is measured against them is flattered"
    if args.compare:
        chosen = {method: _settled(run, method, overrides, args) for method in args.compare.split(",")}
        samplers = {method: sampler for method, (sampler, _) in chosen.items()}
        if len({sampler.start for sampler in samplers.values()}) > 1:
            starts = ", ".join(f"{method} from {sampler.start}" for method, sampler in samplers.items())
            console.say(f"seeds differ: {starts}; --sampler.start sets all")
        if any(sampler.fit == "test" for sampler in samplers.values()):
            warnings.warn(leak, stacklevel=1)
        seeds = args.seeds or 1
        options["about"] = {method: about for method, (_, about) in chosen.items()}
        rows, path = contrast(run, samplers, args.per_class, seeds, features=args.features, say=console.say, **options)
        one_a_line(rows)
        print(path)
        return
    sampler, about = _settled(run, args.method, overrides, args)
    if sampler.fit == "test":
        warnings.warn(leak, stacklevel=1)
    options |= {"about": about, "team": members}
    print(draw(run, args.name or set_name(sampler), sampler, args.per_class, **options) / "grid.png")


def run_tune(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm tune-sampler``."""
    from advebm.core import config
    from advebm.reporting.terminal import numbers_table
    from advebm.runs.run import Run
    from advebm.sampling.tune import SETTINGS, grid, result
    from advebm.workflows.sample import search

    if args.per_class < 1:
        raise UserError(f"--per-class is at least 1, got {args.per_class}")
    run = Run.open(args.run)
    sampler = _sampler(run, args.method, overrides)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    plain = config.describe(sampler)
    values = {
        name: [getattr(config.build({**plain, name: v}, "sampler"), name) for v in text.split(",")]
        for name, text in given.items()
    }
    options = {"by": args.by, "features": args.features, "per_class": args.per_class, "seed": args.seed}
    options |= {"checkpoint": args.checkpoint, "device": device(args.device)}
    trials, path = search(run, grid(sampler, values), **options)
    rows = {}
    for number, trial in enumerate(trials[:10], 1):
        settings = {name: trial["sampler"][name] for name in SETTINGS}
        rows[str(number)] = {trial["name"]: trial["value"], **{k: v for k, v in settings.items() if v is not None}}
    numbers_table(rows)
    if (best := result(run, sampler)).exists():
        print(best)
    print(path)


def _sampler(run: Any, method: str | None, overrides: Overrides) -> Any:
    """The run's sampler, or another with its settings, with options changed."""
    from advebm.core import config
    from advebm.runs.recipe import resolve

    return resolve(config.describe(run.recipe), [*([("sampler", method)] if method else []), *overrides]).sampler


def _settled(
    run: Any, method: str | None, overrides: Overrides, args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """The same, with what ``tune-sampler`` found for that method and start; and how, where it did."""
    from advebm.core import config, console
    from advebm.runs.recipe import resolve
    from advebm.sampling.tune import tuned

    sampler = _sampler(run, method, overrides)
    if args.untuned or (found := tuned(run, sampler)) is None:
        return sampler, {}
    best, how = found
    if how["checkpoint"] != run.checkpoints.path(args.checkpoint).name:
        warnings.warn(f"tune-sampler looked at checkpoint {how['checkpoint']}; its settings are left", stacklevel=1)
        return sampler, {}
    console.say(f"{f'{method}: ' if args.compare else ''}settings of tune-sampler; --untuned takes the recipe's")
    plain = {**config.describe(run.recipe), "sampler": config.describe(best)}
    return resolve(plain, overrides).sampler, {"tuned": {**how, "changed": [name for name, _ in overrides]}}


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--classes takes numbers such as 0,3,7, got {text!r}") from None


def run_diagnose(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm diagnose``."""
    from advebm.core import console
    from advebm.evaluation.compare import titled
    from advebm.reporting.diagnostics import diagnose
    from advebm.reporting.terminal import figures_list
    from advebm.runs.run import Run

    for name in ("images", "steps"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name} is at least 2, got {getattr(args, name)}")
    if not args.reach > 0:
        raise UserError(f"--reach is > 0, got {args.reach}")
    runs = [Run.open(path) for path in args.runs]
    options = {"count": args.images, "along": args.along, "reach": args.reach, "steps": args.steps, "seed": args.seed}
    options |= {"checkpoint": args.checkpoint, "device": device(args.device)}
    options["sampler"] = _sampler(runs[0], args.method, overrides)
    numbers, written = diagnose(
        titled(runs), args.what.split(",") if args.what else (), progress=console.say, **options
    )
    figures_list(numbers)
    for path in written:
        print(path)


def run_evaluate(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm evaluate``."""
    import dataclasses

    from advebm.attacks.projected import Attack
    from advebm.core import config, console
    from advebm.evaluation.evaluate import evaluate_run
    from advebm.evaluation.suites import suite
    from advebm.reporting.terminal import record_table
    from advebm.runs.recipe import resolve
    from advebm.runs.run import Run, new_folder
    from advebm.workflows.adopt import adopt
    from advebm.workflows.sample import take_in

    if (args.run is None) == (args.model is None):
        raise UserError("evaluate takes a RUN, or --model and --data for a model without one")
    measured = [pair for pair in overrides if pair[0].partition(".")[0] in ("threat", "metrics")]
    if args.model is None and (args.out or measured != overrides):
        raise UserError("--out, --data and --normalise go with --model; a run has its own")
    if args.tier and not args.suite:
        raise UserError("--tier goes with --suite")
    if args.suite:
        if any(name.partition(".")[0] == "metrics" for name, _ in overrides):
            raise UserError("--suite says which metrics; leave --metrics out")
        suite(args.suite, Attack(), args.tier or "standard")  # a misspelt name is noticed before anything is written
    for folder in args.samples:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    if args.model and processes.launched()[1] > 1:
        raise UserError("--model makes a run, which takes one process; evaluate that RUN with several")
    if args.model is None:
        run = Run.open(args.run)
    else:
        run = adopt(args.model, args.out or new_folder(Path("runs"), "model"), overrides, device=args.device)
        print(run.folder)
    recipe = resolve(config.describe(run.recipe), measured)
    if args.suite:
        recipe = dataclasses.replace(recipe, metrics=suite(args.suite, recipe.threat, args.tier or "standard"))
    members, where = team(args.device)
    for folder in args.samples if members.main else ():
        take_in(run, folder)
    members.share(None)  # they are there
    options = {"features": args.features, "checkpoint": args.checkpoint, "seed": args.seed}
    options |= {"device": where, "team": members}
    records = evaluate_run(run, recipe=recipe, **options, progress=console.say, bar=console.bar)
    if args.json:
        for record in records:
            print(json.dumps(dataclasses.asdict(record)))
    else:
        record_table(records)


def run_probe(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm probe``."""
    import dataclasses

    from advebm.core import console
    from advebm.evaluation.evaluate import evaluate_run
    from advebm.metrics.probing import NearestNeighbours, Probe
    from advebm.reporting.terminal import record_table
    from advebm.runs.run import Run
    from advebm.workflows.adopt import probe

    run, by = Run.open(args.run), Probe(args.c, branch=args.branch)
    neighbours = NearestNeighbours(args.neighbours, args.branch)
    options = {"checkpoint": args.checkpoint, "device": device(args.device)}
    folder = args.out or run.folder.with_name(f"{run.folder.resolve().name}-probe")
    probed = probe(run, folder, by=by, overrides=overrides, **options)
    print(probed.folder)
    alone = dataclasses.replace(run.recipe, metrics=(neighbours,))
    records = evaluate_run(probed, device=options["device"], seed=args.seed, progress=console.say, bar=console.bar)
    record_table([*records, *evaluate_run(run, recipe=alone, seed=args.seed, progress=console.say, **options)])


def run_edit(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm edit``."""
    from advebm.core import config, console
    from advebm.reporting.terminal import numbers_table
    from advebm.runs.run import Run
    from advebm.sampling import edit_job

    if args.what not in ("score", *KINDS["edit"]):
        raise unknown("edit", args.what, ["score", *KINDS["edit"]])
    for name, takers in EDITS.items():
        if getattr(args, name) not in (None, []) and args.what not in takers:
            flag = {"goal": "class", "others": "with", "source": "from"}.get(name, name)
            raise UserError(f"--{flag} is for {', '.join(takers)}; {args.what} takes none")
    if args.count < 1:
        raise UserError(f"--count is at least 1, got {args.count}")
    if args.image and (args.split or args.source):
        raise UserError("--image or --split, not both; --from goes with --split")
    order = edit_job.Order(
        run=Run.open(args.run),
        others=tuple(Run.open(path) for path in args.others),
        source=Run.open(args.source) if args.source else None,
        images=tuple(args.image or ()),
        split=args.split,
        count=args.count,
        fit=args.fit,
        goal=args.goal,
        classes=tuple(args.classes.split(",")) if args.classes else (),
        mask=args.mask,
        box=args.box,
        seed=args.seed,
        checkpoint=args.checkpoint,
        device=device(args.device),
    )
    if args.what == "score":
        if overrides:
            raise UserError("score takes no --edit options")
        numbers_table(edit_job.score(order))
        return
    amount = [("edit.amount", args.amount)] if args.amount else []
    plain: Any = {"edit": config.describe(config.build(args.what, "edit"))}
    for name, value in [*overrides, *amount]:
        plain = config.override(plain, name, value)
    method = config.build(plain["edit"], "edit")
    with console.bar(args.what, len(edit_job.listed(order.images)) if order.images else args.count, 0) as tell:
        path, numbers = edit_job.edit(order, method, args.out, film=args.film, progress=tell)
    numbers_table(numbers)
    print(path)


EDITS = {  # options that only some take
    "mask": ("inpaint", "paint"),
    "box": ("inpaint", "paint"),
    "others": ("compose",),
    "classes": ("compose",),
    "amount": ("translate",),
    "source": ("translate", "counterfactual", "score"),
    "goal": ("translate", "inpaint", "paint", "denoise", "upsample", "counterfactual"),
}


# A recipe of which only images and threat are looked at.
IMAGES_ALONE: dict[str, Any] = {"name": "doctor", "threat": {}, "backbone": "small-conv", "objective": "standard"}
IMAGES_ALONE |= {"sampler": "ta", "metrics": []}


def run_doctor(args: argparse.Namespace, overrides: Overrides) -> int:
    """``advebm doctor``: 1 where there are faults."""
    import dataclasses

    from advebm.attacks.base import radius
    from advebm.core import config, console
    from advebm.diagnostics.doctor import examine_split
    from advebm.reporting.terminal import findings_list
    from advebm.runs.find_model import find_model
    from advebm.runs.recipe import resolve
    from advebm.runs.run import Run

    if args.machine:
        return _doctor_machine(args, overrides)
    if args.model is None:
        raise UserError("doctor takes a MODEL, or --machine to check this machine")
    if (Path(args.model) / "config.yaml").is_file():
        plain = config.describe(Run.open(args.model).recipe)
    elif "data" in dict(overrides):
        plain = IMAGES_ALONE
    else:
        raise UserError(f"{args.model} is not a run, which knows its images: give --data NAME, as in --data cifar10")
    recipe = resolve(plain, overrides)
    model = find_model(args.model, checkpoint=args.checkpoint).to(device(args.device))
    data, threat = recipe.data.load(), recipe.threat
    count = min(args.images, len(data.test))
    console.say(f"{args.model} on {count} test images of {data.name} at {radius(threat.eps, threat.norm)}")
    findings = examine_split(model, data.test, threat=threat, count=count, seed=args.seed, progress=console.say)
    if args.json:
        for finding in findings:
            print(json.dumps(dataclasses.asdict(finding)))
    else:
        findings_list(findings)
    return int(any(finding.severity == "fault" for finding in findings))


def _doctor_machine(args: argparse.Namespace, overrides: Overrides) -> int:
    """``advebm doctor --machine``: 1 where a convolution is computed wrongly."""
    import dataclasses

    from advebm.core import console
    from advebm.data.sources import outline
    from advebm.diagnostics.kernels import KNOWN, check, convolutions
    from advebm.models import network
    from advebm.runs.find_model import find_model, is_factory
    from advebm.runs.recipe import resolve
    from advebm.training import hardware

    if args.device not in (None, "cpu"):
        raise UserError(f"--machine checks the CPU, got --device {args.device}")
    if not args.json:
        print(hardware.report("cpu"))
    if args.model is None:
        names = ("cifar10-at-small", "cifar10-at-2h")
        shape: tuple[int, ...] = (3, 32, 32)
        models = {name: resolve(recipes.find(name)).backbone.build(*shape[:2])[0].eval() for name in names}
    else:
        models = {args.model: find_model(args.model, checkpoint=args.checkpoint)}
        if "data" in dict(overrides):
            shape = outline(resolve(IMAGES_ALONE, overrides).data).shape
        elif is_factory(args.model):
            raise UserError(f"{args.model} says nothing of its images: give --data NAME, as in --data cifar10")
        else:
            architecture = network.read_architecture(*network.locate(args.model)[:1], foreign=True)
            shape = (architecture.channels, architecture.size, architecture.size)
    found = dict.fromkeys(c for model in models.values() for c in convolutions(model, shape, MACHINE_BATCH, "bfloat16"))
    with console.bar("convolutions", len(found), 0) as tell:
        verdicts = list(check(list(found), progress=tell))
    (known,) = check([KNOWN])  # in a process of its own: it may damage what comes after it, even where it is right
    wrong = [verdict for verdict in verdicts if verdict.wrong]
    if args.json:
        for verdict in (known, *verdicts):
            print(json.dumps({**dataclasses.asdict(verdict), "wrong": verdict.wrong}))
        return int(bool(wrong))
    for verdict in wrong:
        print(f"fault: {verdict}")
    if known.wrong:
        print(f"warning: {known}; advebm's networks avoid it, training code of your own may not: docs/cpu.md")
    right = [max(v.errors) for v in verdicts if not v.wrong and v.convolution.dtype == "float32"]
    print(
        f"{len(verdicts) - len(wrong)} of {len(found)} convolutions of {', '.join(models)} agree with float64", end=""
    )
    print(f", in float32 to {max(right):.1g}" if right else "")
    if len(verdicts) < len(found):
        print(f"{len(found) - len(verdicts)} were not checked: time was up")
    return int(bool(wrong))


MACHINE_BATCH = 16  # images of the convolutions that are checked


def run_report(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm report``."""
    from advebm.reporting.build import report
    from advebm.runs.run import Run

    print(report(Run.open(args.run), beside=[Run.open(path) for path in args.beside]))


def run_compare(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm compare``."""
    from advebm.core import config, console
    from advebm.evaluation.compare import compare
    from advebm.reporting.build import report
    from advebm.reporting.terminal import one_a_line
    from advebm.runs.recipe import resolve
    from advebm.runs.run import Run

    runs = [Run.open(path) for path in args.runs]
    threat = resolve(config.describe(runs[0].recipe), overrides).threat
    options = {"features": args.features, "seed": args.seed, "device": device(args.device)}
    one_a_line(compare(runs, threat=threat, **options, progress=console.say, bar=console.bar))
    print(report(runs[0], beside=runs[1:], out=args.out))


def run_reproduce(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm reproduce``."""
    from advebm.papers.inventory import papers, tables
    from advebm.reproduction.experiments import EXPERIMENTS, reproduce

    name = args.experiment
    if name is None and args.scale is not None:
        raise UserError(f"--scale is of a table; name one of {', '.join(tables())}")
    if args.list or name is None:
        for experiment, call in EXPERIMENTS.items():
            print(f"{experiment:20} {(call.__doc__ or '').splitlines()[0]}")
        for table in tables().values():
            print(f"{table.name:20} --scale {', '.join(table.scales)}: {table.what}")
        for paper in papers():
            print(f"\n{paper['key']}: {paper['title']}")
            for item in paper["items"]:
                print(f"  {item['id']:18} {item['status']:9} {item['what']}\n  {'':28} {item['how']}")
                for row in item.get("rows", []):
                    values = "  ".join(f"{k} {'-' if v is None else v}" for k, v in row["values"].items())
                    print(f"  {'':28} {row['status']:9} {row['name']}: {values}")
        return
    if args.scale is not None:
        from advebm.reproduction.replicate import replicate

        if args.quick:
            raise UserError("--quick is of experiments; a table has --scale alone")
        runs = tables()[name].runs if name in tables() else ""
        folder = args.out or Path("runs") / f"{runs or name}-{args.scale}"
        print(replicate(name, args.scale, folder, seeds=args.seeds, options=overrides))
        return
    if name in tables() and name not in EXPERIMENTS:
        raise UserError(f"{name} is a table; say how large with --scale, one of {', '.join(tables()[name].scales)}")
    folder = args.out or Path("runs") / f"{name}{'-quick' * args.quick}"
    print(reproduce(name, folder, seeds=args.seeds, quick=args.quick, options=overrides))


def run_app(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm app``."""
    from advebm.web.server import serve

    where = {"host": args.host, "port": args.port}
    serve(args.runs, **where, checkpoint=args.checkpoint, device=device(args.device), say=print)


def run_push(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm push``."""
    from advebm.models import hub
    from advebm.reporting.card import publish
    from advebm.runs.run import Run

    with tempfile.TemporaryDirectory() as folder:
        publish(Run.open(args.run), Path(folder), checkpoint=args.checkpoint, weights=args.weights)
        print(hub.push(Path(folder), args.name, private=args.private))


def run_export(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm export``."""
    from advebm.reporting.card import publish
    from advebm.runs.run import Run

    print(publish(Run.open(args.run), args.folder, checkpoint=args.checkpoint, weights=args.weights))


def run_list(args: argparse.Namespace, overrides: Overrides) -> None:
    """``advebm list``: from static text and source files; imports no method."""
    what = None if args.what is None else args.what.rstrip("s")
    if what is not None and what not in ("recipe", *KINDS):
        raise unknown("kind of thing", args.what, ["recipe", *KINDS])
    if what in (None, "recipe"):
        print("recipe (advebm train --recipe NAME)")
        width = max(map(len, recipes.names()))
        for name in recipes.names():
            print(f"  {name:{width}} {recipes.header(name)[0]}")
    for role, kinds in KINDS.items():
        if what in (None, role):
            print(role)
            for kind, target in kinds.items():
                print(f"  {kind:20} {_summary(target)}")


def _summary(target: str) -> str:
    """The first line of a class's docstring, without importing its module."""
    module, _, name = target.partition(":")
    tree = _parsed(module)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    return (ast.get_docstring(node) or "").splitlines()[0].replace("``", "") if node else ""


@functools.cache
def _parsed(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    return ast.Module([], []) if spec is None or spec.origin is None else ast.parse(Path(spec.origin).read_text())
