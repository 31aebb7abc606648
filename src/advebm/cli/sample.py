"""``advebm sample`` and ``advebm tune-sampler``: draw images from a run."""

import argparse

from advebm.cli.options import FAST_VALUES, FEATURES, Commands, Overrides, check_at_least, split_blocks
from advebm.core import processes
from advebm.core.config import KINDS
from advebm.core.errors import UserError
from advebm.models.hub import DRAWING_MODEL


def add_sample(verbs: Commands) -> None:
    parser = verbs.add(
        "sample",
        sample,
        "Draw images from a run into RUN/samples.",
        "Takes --sampler.option VALUE. After an interruption the same command goes on; the result is the same.",
        takes=("sampler",),
        shared=True,
    )
    parser.add_run(optional=True, default=DRAWING_MODEL)
    parser.add_argument("--method", metavar="NAME", help=f"{', '.join(KINDS['sampler'])}; the recipe's by default")
    parser.add_argument("--per-class", type=int, default=10, metavar="N", help="images of each class (10)")
    parser.add_argument(
        "--steps",
        default="",
        metavar="K",
        help="short for --sampler.steps, at least 1; with --compare also several, as in 0,8,16",
    )
    parser.add_argument("--untuned", action="store_true", help="the recipe's settings, whatever tune-sampler found")
    parser.add_argument("--classes", default="", metavar="K,K", help="numbers of the classes to draw; all by default")
    parser.add_argument("--fast", default="auto", metavar="WAY", help=f"how the network is computed: {FAST_VALUES}")
    parser.add_argument("--name", help="of the set, METHOD-START by default")
    parser.add_argument(
        "--replace", action="store_true", help="a set of that name, if it was drawn with other settings"
    )
    parser.add_shared("seed", "checkpoint")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="number of processes; images do not depend on it (1)"
    )
    parser.add_argument(
        "--batch",
        type=batch_size,
        metavar="N",
        help="images the network sees at once, or auto (default): as many as the memory allows, up to 500",
    )
    parser.add_argument("--trajectory", action="store_true", help="also write film.gif, one chain per class")
    parser.add_argument("--compare", metavar="A,B", help="draw by several methods from the same seeds and judge them")
    parser.add_argument("--seeds", type=int, metavar="N", help="with --compare: sampling seeds; mean and deviation (1)")
    parser.add_argument("--features", metavar="RUN", help=f"with --compare: {FEATURES}")
    parser.add_shared("device", "threads")


def batch_size(text: str) -> int | None:
    """Read a batch size; None for ``auto``."""
    return None if text == "auto" else int(text)


def sample(args: argparse.Namespace, overrides: Overrides) -> None:
    """Draw a set and print the path of its grid; or compare methods and print their records and the figure's path."""
    from advebm.reporting.terminal import print_runs
    from advebm.workflows import sample as workflow
    from advebm.workflows.adopt import open_run

    check_at_least(args, 1, "per_class", "processes", "batch", "seeds")
    steps = _parse_numbers("--steps", args.steps)
    if not args.compare and (len(steps) > 1 or 0 in steps):
        raise UserError(f"--steps is one number of at least 1, got {args.steps!r}; several, and 0, go with --compare")
    if (args.seeds or args.features) and not args.compare:
        raise UserError("--seeds and --features go with --compare")
    if args.compare and (args.method or args.name or args.replace):
        raise UserError(
            "--compare names the methods, and each set after its own; leave --method, --name, --replace out"
        )
    if processes.rank_and_world()[1] > 1 and (args.compare or args.processes > 1):
        raise UserError("--compare and --processes take one process; leave them out, or run it without torchrun")
    data_overrides, overrides = split_blocks(overrides, "data")
    run = open_run(args.run, data_overrides, whole=bool(args.compare))  # the judge compares with test images
    if len(steps) == 1:
        overrides = [*overrides, ("sampler.steps", steps[0])]
    classes = _parse_numbers("--classes", args.classes) or None
    options = {"per_class": args.per_class, "seed": args.seed, "checkpoint": args.checkpoint, "batch": args.batch}
    options |= {"processes": args.processes, "trajectory": args.trajectory, "classes": classes}
    options |= {"backend": args.fast, "untuned": args.untuned, "device": args.device}
    if args.compare:
        options |= {"seeds": args.seeds or 1, "features": args.features, "steps": steps if len(steps) > 1 else ()}
        records, path = workflow.compare_methods(run, args.compare.split(","), overrides, **options)
        print_runs(records)
        print(path)
    else:
        print(
            workflow.sample(run, args.method, overrides, name=args.name, replace=args.replace, **options) / "grid.png"
        )


def _parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Read numbers >= 0, separated by commas; none if the text is empty."""
    words = text.split(",") if text else []
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"{option} takes numbers such as 0,3,7, got {text!r}")
    return tuple(map(int, words))


def add_tune_sampler(verbs: Commands) -> None:
    parser = verbs.add(
        "tune-sampler",
        tune_sampler,
        "Search step size, ball, noise and steps by a distance to validation images; sample then takes the best.",
        "Lists are such as 0.05,0.1 and none,2; by default half, same and double of step size and steps. Takes "
        "--sampler.option VALUE. Several processes may share one search; stopped, the same command goes on.",
        takes=("sampler",),
    )
    parser.add_run()
    parser.add_argument("--method", metavar="NAME", help="as for sample; the recipe's by default")
    for name in ("step-size", "radius", "noise", "steps"):
        parser.add_argument(f"--{name}", metavar="LIST", help=f"values of {name} to try")
    parser.add_argument("--by", choices=("KID", "FD"), default="KID", help="the distance; KID is unbiased (KID)")
    parser.add_argument("--features", metavar="RUN", help=FEATURES)
    parser.add_argument("--per-class", type=int, default=20, metavar="N", help="images of each class in a trial (20)")
    parser.add_shared("seed", "checkpoint", "device", "threads")


def tune_sampler(args: argparse.Namespace, overrides: Overrides) -> None:
    """Search settings; print the ten best trials, and the paths of the best settings and of the figure."""
    from advebm.reporting.terminal import print_numbers
    from advebm.sampling.tune import SETTINGS
    from advebm.workflows import sample as workflow
    from advebm.workflows.adopt import open_run

    check_at_least(args, 1, "per_class")
    values = {name: text.split(",") for name in SETTINGS if (text := getattr(args, name)) is not None}
    options = {"by": args.by, "features": args.features, "per_class": args.per_class, "seed": args.seed}
    options |= {"checkpoint": args.checkpoint, "device": args.device}
    data_overrides, overrides = split_blocks(overrides, "data")
    run = open_run(args.run, data_overrides)
    tuning = workflow.tune_sampler(run, args.method, overrides, values, **options)
    print_numbers(tuning.rows())
    if tuning.best.exists():
        print(tuning.best)
    print(tuning.figure)
