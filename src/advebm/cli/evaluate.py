"""``advebm evaluate``, ``probe``, ``compare`` and ``leaderboard``: measure runs and models."""

import argparse
import dataclasses
import json
from pathlib import Path

from advebm.cli.options import FEATURES, Commands, Overrides, split_blocks
from advebm.core import config, processes
from advebm.core.errors import UserError


def add_evaluate(verbs: Commands) -> None:
    parser = verbs.add(
        "evaluate",
        evaluate,
        "Measure a run and its samples; appends to RUN/metrics.json.",
        "Takes --threat.option VALUE, --metrics NAME,NAME and --metrics.NUMBER.option VALUE; with --model also --data "
        "and --normalise.option. A stopped evaluation goes on in the run's folder.",
        takes=("threat", "metrics", "data", "normalise"),
        shared=True,
    )
    parser.add_run(optional=True)
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
    parser.add_shared("seed", "checkpoint")
    parser.add_argument("--json", action="store_true", help="print records as JSON, one a line")
    parser.add_shared("device", "threads")


def evaluate(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.attacks.projected import Attack
    from advebm.evaluation.suites import suite
    from advebm.reporting.terminal import print_records
    from advebm.runs.run import new_folder
    from advebm.workflows.adopt import adopt, open_run, with_images
    from advebm.workflows.evaluate import measure

    tier = args.tier or "standard"
    if (args.run is None) == (args.model is None):
        raise UserError("evaluate takes a RUN, or --model and --data for a model without one")
    metric_overrides, data_overrides = split_blocks(overrides, "threat", "metrics")
    if args.model is None and args.out:
        raise UserError("--out goes with --model; what is given as RUN has its own folder, or one in runs/models")
    if args.tier and not args.suite:
        raise UserError("--tier goes with --suite")
    if args.suite:
        if any(name.partition(".")[0] == "metrics" for name, _ in overrides):
            raise UserError("--suite says which metrics; leave --metrics out")
        suite(args.suite, Attack(), tier)  # raises for a wrong name before anything is written
    for folder in args.samples:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
    if args.model and processes.rank_and_world()[1] > 1:
        raise UserError("--model makes a run, which takes one process; evaluate that RUN with several")
    if args.model is None:
        run = open_run(args.run, data_overrides, device=args.device)
    else:
        folder = args.out or new_folder(Path("runs"), "model")
        run = with_images(adopt(args.model, folder, overrides, device=args.device))
        print(run.folder)
    options = {"features": args.features, "checkpoint": args.checkpoint, "seed": args.seed, "device": args.device}
    records = measure(run, metric_overrides, suite_name=args.suite, tier=tier, samples=args.samples, **options)
    if args.json:
        for record in records:
            print(json.dumps(dataclasses.asdict(record)))
    else:
        print_records(records)


def add_probe(verbs: Commands) -> None:
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
    parser.add_argument("--seed", type=int, default=0, help="of the attack")
    parser.add_shared("checkpoint", "device", "threads")


def probe(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.metrics.probing import NearestNeighbours, Probe
    from advebm.reporting.terminal import print_records
    from advebm.workflows.adopt import open_run
    from advebm.workflows.devices import choose_device
    from advebm.workflows.probe import measure_probe, probe

    data_overrides, overrides = split_blocks(overrides, "data")
    run = open_run(args.run, data_overrides)
    neighbours = NearestNeighbours(args.neighbours, args.branch)
    options = {"checkpoint": args.checkpoint, "device": choose_device(args.device)}
    probe_run = probe(run, args.out, by=Probe(args.c, branch=args.branch), overrides=overrides, **options)
    print(probe_run.folder)
    print_records(measure_probe(run, probe_run, neighbours, seed=args.seed, **options))


def add_compare(verbs: Commands) -> None:
    parser = verbs.add(
        "compare",
        compare,
        "Measure runs alike, print one table and write one report.",
        "Clean, PGD-10, PGD-50 and energy-attack accuracy, sample quality, cost. Takes --threat.option VALUE.",
        takes=("threat",),
    )
    parser.add_run(several=True)
    parser.add_argument("--features", metavar="RUN", help=FEATURES)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a new file (comparison.html, comparison-2.html …)")
    parser.add_argument("--replace", action="store_true", help="replace the file if it is there")
    parser.add_shared("seed", "device", "threads")


def compare(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.terminal import print_runs, print_side_by_side
    from advebm.runs.recipe import resolve
    from advebm.workflows.adopt import open_runs
    from advebm.workflows.evaluate import compare_runs

    data_overrides, overrides = split_blocks(overrides, "data")
    runs = open_runs(args.runs, data_overrides)
    threat = resolve(config.describe(runs[0].recipe), overrides).threat
    options = {"features": args.features, "seed": args.seed, "device": args.device}
    records, path = compare_runs(runs, threat, **options, out=args.out, replace=args.replace)
    (print_runs if len(records) > 4 else print_side_by_side)(records)
    print(path)


def add_leaderboard(verbs: Commands) -> None:
    parser = verbs.add(
        "leaderboard",
        leaderboard,
        "Rank models by one protocol: a table, and a picture of FD against robust accuracy.",
        "Clean and robust accuracy, FD, class score, AUROC, seconds; what a run holds is not measured again, so the "
        "same command goes on. Takes --threat.eps, --threat.norm, --sampler KIND and --sampler.option VALUE.",
        takes=("threat", "sampler"),
    )
    parser.add_run(several=True)
    parser.add_argument(
        "--tier",
        default="quick",
        metavar="NAME",
        help="quick (default: PGD-20 on 512 images, 1,000 samples), standard (APGD-CE and APGD-T on 1,000, 5,000 "
        "samples) or full (AutoAttack on all, 50,000 samples)",
    )
    parser.add_argument(
        "--features",
        metavar="RUN",
        help="what judges the samples of all: a run or model (cifar10-infonce for CIFAR-10), pixels (for other data), "
        "inception or inception:PATH",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of table and picture (leaderboard)")
    parser.add_argument("--replace", action="store_true", help="replace a leaderboard of another protocol there")
    parser.add_shared("seed", "device", "threads")


def leaderboard(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.terminal import print_leaderboard
    from advebm.workflows.leaderboard import rank

    options = {"features": args.features, "out": args.out, "replace": args.replace}
    board = rank(args.runs, overrides, tier=args.tier, **options, device=args.device, seed=args.seed)
    print_leaderboard(board)
