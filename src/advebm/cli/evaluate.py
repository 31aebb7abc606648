"""``advebm evaluate``, ``probe`` and ``compare``: measure runs and models."""

import argparse
import dataclasses
import json
from pathlib import Path

from advebm.cli.options import FEATURES, Overrides, Verbs
from advebm.core import processes
from advebm.core.errors import UserError


def add_evaluate(verbs: Verbs) -> None:
    parser = verbs.add(
        "evaluate",
        evaluate,
        "Measure a run and its samples; appends to RUN/metrics.json.",
        "Takes --threat.option VALUE, --metrics NAME,NAME and --metrics.NUMBER.option VALUE; with --model also --data "
        "and --normalise.option. A stopped evaluation goes on in the run's folder.",
        takes=("threat", "metrics", "data", "normalise"),
        shared=True,
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="PACKAGE.MODULE:FACTORY, a model's folder or hf:USER/NAME; becomes a run in --out",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --model: the run's folder (runs/model-TIME)")
    parser.add_argument(
        "--suite", metavar="NAME", help="robustbench, jeat, cem, binary-at or all, instead of --metrics"
    )
    parser.add_argument("--tier", metavar="NAME", help="of a suite: quick, standard (default) or full")
    parser.add_argument(
        "--samples", type=Path, action="append", default=[], metavar="DIR", help="images to judge as samples; repeat"
    )
    parser.add_argument("--features", metavar="RUN", help=FEATURES)
    parser.add_seed()
    parser.add_checkpoint()
    parser.add_argument("--json", action="store_true", help="print records as JSON, one a line")
    parser.add_device()
    parser.add_threads()


def evaluate(args: argparse.Namespace, overrides: Overrides) -> None:
    """Measure a run or a model; print the records as a table or as JSON."""
    from advebm.reporting.terminal import record_table
    from advebm.runs.run import Run
    from advebm.workflows import evaluate as workflow

    tier = args.tier or "standard"
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
        workflow.check_suite(args.suite, tier)  # raises for a wrong name before anything is written
    for folder in args.samples:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    if args.model and processes.rank_and_world()[1] > 1:
        raise UserError("--model makes a run, which takes one process; evaluate that RUN with several")
    if args.model is None:
        run = Run.open(args.run)
    else:
        run = workflow.adopt_model(args.model, args.out, overrides, args.device)
        print(run.folder)
    options = {"features": args.features, "checkpoint": args.checkpoint, "seed": args.seed, "device": args.device}
    records = workflow.measure(run, measured, suite_name=args.suite, tier=tier, samples=args.samples, **options)
    if args.json:
        for record in records:
            print(json.dumps(dataclasses.asdict(record)))
    else:
        record_table(records)


def add_probe(verbs: Verbs) -> None:
    parser = verbs.add(
        "probe",
        probe,
        "Fit a linear classifier on a run's frozen features; it becomes a run that every other command takes.",
        "Measures it, and the nearest neighbours in the features. Takes --threat.option VALUE.",
        takes=("threat",),
    )
    parser.add_run()
    parser.add_argument("--out", type=Path, metavar="DIR", help="the classifier's run (RUN-probe)")
    parser.add_argument("--c", type=float, default=1.0, metavar="C", help="inverse weight of the l2 penalty (1)")
    parser.add_argument(
        "--branch", default="clean", metavar="NAME", help="of dual batch norms: clean or adversarial (clean)"
    )
    parser.add_argument("--neighbours", type=int, default=20, metavar="K", help="that vote (20)")
    parser.add_seed("of the attack")
    parser.add_checkpoint()
    parser.add_device()
    parser.add_threads()


def probe(args: argparse.Namespace, overrides: Overrides) -> None:
    """Fit a probe; print its run's folder, and the records of the probe and of nearest neighbours."""
    from advebm.metrics.probing import NearestNeighbours, Probe
    from advebm.reporting.terminal import record_table
    from advebm.runs.run import Run
    from advebm.workflows.devices import choose_device
    from advebm.workflows.probe import measure_probe, probe

    run, by = Run.open(args.run), Probe(args.c, branch=args.branch)
    neighbours = NearestNeighbours(args.neighbours, args.branch)
    options = {"checkpoint": args.checkpoint, "device": choose_device(args.device)}
    folder = args.out or run.folder.with_name(f"{run.folder.resolve().name}-probe")
    probed = probe(run, folder, by=by, overrides=overrides, **options)
    print(probed.folder)
    record_table(measure_probe(run, probed, neighbours, seed=args.seed, **options))


def add_compare(verbs: Verbs) -> None:
    parser = verbs.add(
        "compare",
        compare,
        "Measure runs alike, print one table and write one report.",
        "Clean, PGD-10, PGD-50 and energy-attack accuracy, sample quality, cost. Takes --threat.option VALUE.",
        takes=("threat",),
    )
    parser.add_run(several=True)
    parser.add_argument("--features", metavar="RUN", help=FEATURES)
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), metavar="FILE", help="comparison.html")
    parser.add_seed()
    parser.add_device()
    parser.add_threads()


def compare(args: argparse.Namespace, overrides: Overrides) -> None:
    """Measure runs; print a row per run and the path of the report."""
    from advebm.reporting.terminal import runs_table
    from advebm.workflows.compare import compare_runs

    options = {"features": args.features, "out": args.out, "seed": args.seed, "device": args.device}
    records, path = compare_runs(args.runs, overrides, **options)
    runs_table(records)
    print(path)
