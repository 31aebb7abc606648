"""``advebm demo`` and ``advebm toy``: introductions that need no data."""

import argparse
import importlib.util
import textwrap
import time
from pathlib import Path

from advebm.cli.options import Commands, Overrides
from advebm.core import console
from advebm.core.errors import UserError


def add_demo(verbs: Commands) -> None:
    parser = verbs.add("demo", demo, "Train on digits, draw images, evaluate and report: a minute on a laptop.")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="where the runs go (runs)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted demo in its folder")
    parser.add_argument("--all", action="store_true", help="print every measurement, not just the main ones")
    parser.add_shared("seed", "threads")


def demo(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.terminal import print_accuracies, print_sets, print_side_by_side
    from advebm.runs.run import new_folder
    from advebm.workflows import demo as workflow

    start = time.perf_counter()
    if args.resume and not args.resume.is_dir():
        raise UserError(f"there is no demo at {args.resume}")
    done = workflow.demo(args.resume or new_folder(args.out, "demo"), seed=args.seed)
    robust = done.runs[workflow.ROBUST]
    if args.all:
        print_side_by_side(done.records)
        print()
    print_accuracies(done.records, robust.recipe.threat)
    print()
    print_sets(done.records, ("FD", "intended class", "recall"))
    print(f"\n{textwrap.fill(done.conclusion, 100)}\n")
    print(f"report ({time.perf_counter() - start:.0f} s): {done.report}")
    has_page = importlib.util.find_spec("gradio") is not None
    print(f"next: advebm {'app' if has_page else 'sample'} {robust.folder}{'' if has_page else ' --sampler.steps 50'}")


def add_toy(verbs: Commands) -> None:
    parser = verbs.add(
        "toy",
        toy,
        "Train on densities of the plane and draw what is learnt: a density or its support.",
        "Binary adversarial training from both p0 and maximum likelihood; with --method or --p0 that one alone.",
    )
    parser.add_argument(
        "density", nargs="?", metavar="DENSITY", help="gaussian (default), eight-gaussians, rings, moons or pinwheel"
    )
    parser.add_argument("--all", action="store_true", help="every density")
    parser.add_argument("--method", metavar="NAME", help="binary-at or mle")
    parser.add_argument("--p0", metavar="NAME", help="where contrastive points begin: uniform or concentrated")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/toy"), metavar="DIR", help="where pictures go (runs/toy)"
    )
    parser.add_shared("seed", "threads")


def toy(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.terminal import print_numbers
    from advebm.toy import densities, figures, train

    if args.all and args.density:
        raise UserError("--all is every density; leave out the name or --all")
    rows: dict[str, dict[str, float]] = {}
    pictures: list[Path] = []
    for density in densities.DENSITIES if args.all else [args.density or "gaussian"]:
        console.say(density)
        runs, paths = figures.draw_density(density, args.out, method=args.method, p0=args.p0, seed=args.seed)
        rows |= {f"{run.density} {run.method} {run.p0}": train.summarize(run, seed=args.seed) for run in runs}
        pictures += paths
    print_numbers(rows)
    print(*pictures, sep="\n")
