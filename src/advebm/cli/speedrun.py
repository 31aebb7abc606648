"""``advebm speedrun``: train recipes from nothing and measure them on test images."""

import argparse
from pathlib import Path
from typing import Any

from advebm.cli.options import FEATURES, Commands, Overrides


def add_speedrun(verbs: Commands) -> None:
    parser = verbs.add(
        "speedrun",
        speedrun,
        "Train recipes from nothing and measure them on test images: seconds, FLOP, accuracies, samples.",
        "Without recipes: those of the package for this device. Takes --data.path DIR, for all of them. Stopped, the "
        "same command goes on.",
        takes=("data",),
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="of the package; or a RUN that is trained already")
    parser.add_argument(
        "--out", type=Path, default=Path("speedrun"), metavar="DIR", help="runs, table, curves (speedrun)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds of each recipe (1)")
    parser.add_argument(
        "--tier",
        default="standard",
        metavar="NAME",
        help="quick (the recipe's PGD on all test images) or standard (default: also APGD-CE and APGD-T on 2,000, "
        "AutoAttack on 500, 1,000 samples by ta and by cs)",
    )
    parser.add_argument("--features", metavar="RUN", help=FEATURES)
    parser.add_shared("device", "threads")


def speedrun(args: argparse.Namespace, overrides: Overrides) -> None:
    """Train and measure; print the table, and the folder."""
    from advebm.reporting.terminal import print_speedrun
    from advebm.workflows.speedrun import run_recipes

    options: dict[str, Any] = {"seeds": args.seeds, "tier": args.tier, "features": args.features}
    print_speedrun(run_recipes(args.recipes, overrides, out=args.out, **options, device=args.device))
