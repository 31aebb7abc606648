"""``advebm diagnose`` and ``advebm doctor``: why a model generates or not, and faults that spoil its numbers."""

import argparse
import dataclasses
import json

from advebm.cli.options import Commands, Overrides, check_at_least, split_blocks
from advebm.core import console
from advebm.core.errors import UserError


def add_diagnose(verbs: Commands) -> None:
    parser = verbs.add(
        "diagnose",
        diagnose,
        "Why a model generates, or does not: figures and numbers, side by side for several runs.",
        "They go into the first RUN's figures and its report. Takes --sampler.option VALUE.",
        takes=("sampler",),
    )
    parser.add_run(several=True)
    parser.add_argument(
        "--what",
        metavar="A,B",
        help="landscape, gradients, energies, neighbours, interpolation, chains, saliency, inversion; all by default",
    )
    parser.add_argument("--method", metavar="NAME", help="sampler of the chains; the first run's by default")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="test images behind the numbers (100)")
    parser.add_argument(
        "--along",
        choices=("random", "gradient", "pca"),
        default="random",
        help="directions in which landscapes are cut (random)",
    )
    parser.add_argument(
        "--reach", type=float, default=2.0, metavar="R", help="extent of landscapes, l2, in pixels of [0, 1] (2)"
    )
    parser.add_argument("--steps", type=int, default=1000, metavar="K", help="length of long chains (1000)")
    parser.add_shared("seed", "checkpoint", "device", "threads")


def diagnose(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.evaluation.compare import by_title
    from advebm.reporting.diagnostics import diagnose
    from advebm.reporting.terminal import print_figures
    from advebm.workflows.adopt import open_runs
    from advebm.workflows.devices import choose_device
    from advebm.workflows.sample import choose_sampler

    check_at_least(args, 2, "images", "steps")
    if not args.reach > 0:
        raise UserError(f"--reach must be > 0, got {args.reach}")
    data_overrides, overrides = split_blocks(overrides, "data")
    runs = open_runs(args.runs, data_overrides)
    options = {"count": args.images, "along": args.along, "reach": args.reach, "steps": args.steps, "seed": args.seed}
    options |= {"checkpoint": args.checkpoint, "device": choose_device(args.device)}
    options["sampler"] = choose_sampler(runs[0], args.method, overrides)
    what = args.what.split(",") if args.what else ()
    numbers, paths = diagnose(by_title(runs), what, progress=console.say, **options)
    print_figures(numbers)
    for path in paths:
        print(path)


def add_doctor(verbs: Commands) -> None:
    parser = verbs.add(
        "doctor",
        doctor,
        "Look for what spoils a model's energies and the attacks on it; say what to do.",
        "Exit status 1 where there are faults. A run has its images and its threat; any other model takes --data NAME. "
        "Takes --data.option VALUE and --threat.option VALUE.",
        takes=("data", "threat"),
    )
    parser.add_run(optional=True)
    parser.add_argument(
        "--machine",
        action="store_true",
        help="check this machine instead: its speed, and its convolutions, those of RUN or of two CIFAR-10 networks",
    )
    parser.add_argument("--images", type=int, default=300, metavar="N", help="test images to try it on (300)")
    parser.add_shared("seed", "checkpoint")
    parser.add_argument("--json", action="store_true", help="print findings as JSON, one a line")
    parser.add_shared("device", "threads")


def doctor(args: argparse.Namespace, overrides: Overrides) -> int:
    """Print the findings; return the exit status, 1 if there are faults."""
    from advebm.reporting.terminal import print_findings
    from advebm.workflows.doctor import examine_model

    if args.machine:
        return _check_this_machine(args, overrides)
    if args.run is None:
        raise UserError("doctor takes a RUN or any model, or --machine to check this machine")
    options = {"images": args.images, "checkpoint": args.checkpoint, "seed": args.seed, "device": args.device}
    findings = examine_model(args.run, overrides, **options)
    if args.json:
        for finding in findings:
            print(json.dumps(dataclasses.asdict(finding)))
    else:
        print_findings(findings)
    return int(any(finding.severity == "fault" for finding in findings))


def _check_this_machine(args: argparse.Namespace, overrides: Overrides) -> int:
    """Check this machine and print the results; return 1 if a convolution of the models is computed wrongly."""
    from advebm.training import hardware
    from advebm.workflows.doctor import check_machine

    if args.device not in (None, "cpu"):
        raise UserError(f"--machine checks the CPU, got --device {args.device}")
    if not args.json:
        print(hardware.report("cpu"))
    result = check_machine(args.run, overrides, checkpoint=args.checkpoint)
    if args.json:
        for verdict in (result.known, *result.verdicts):
            print(json.dumps({**dataclasses.asdict(verdict), "wrong": verdict.wrong}))
        return int(bool(result.wrong))
    for verdict in result.wrong:
        print(f"fault: {verdict}")
    if result.known.wrong:
        print(f"warning: {result.known}; advebm's networks avoid it, training code of your own may not: docs/cpu.md")
    correct = len(result.verdicts) - len(result.wrong)
    error = "" if result.error is None else f", in float32 to {result.error:.1g}"
    print(f"{correct} of {result.convolutions} convolutions of {', '.join(result.models)} agree with float64{error}")
    if len(result.verdicts) < result.convolutions:
        print(f"{result.convolutions - len(result.verdicts)} were not checked: time was up")
    return int(bool(result.wrong))
