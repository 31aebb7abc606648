"""``advebm train`` and ``advebm run``: train a recipe, or train, sample, evaluate and report."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from advebm import recipes
from advebm.cli.options import BLOCKS, FAST_VALUES, FEATURES, Commands, Overrides, Parser, check_at_least
from advebm.core import processes
from advebm.core.errors import UserError

if TYPE_CHECKING:
    from advebm.runs.recipe import Recipe
    from advebm.runs.run import Run

TAKES = (*BLOCKS, "train", "threat", "metrics", "normalise", "before")
LABELS = "none: train an encoder or a critic on the images alone"
OPTIONS = (
    "Any option of a recipe can be given as --block.option VALUE, as in --objective.attack.eps 8/255; --print_config "
    "shows them all."
)


def add_train(verbs: Commands) -> None:
    parser = verbs.add("train", train, "Train a recipe, or go on with a run.", OPTIONS, takes=TAKES, shared=True)
    _add_training_options(parser)
    parser.add_argument("--labels", choices=("none",), help=LABELS)
    parser.add_shared("threads")


def train(args: argparse.Namespace, overrides: Overrides) -> None:
    if (run := _train(args, overrides)) is not None:
        print(run.folder)


def add_run(verbs: Commands) -> None:
    summary = "Train, sample, evaluate and report, in one command."
    parser = verbs.add("run", run, summary, OPTIONS, takes=TAKES, shared=True)
    _add_training_options(parser)
    parser.set_defaults(labels=None)  # advebm run measures accuracy, which needs labels
    parser.add_argument("--per-class", type=int, default=10, metavar="N", help="images to draw of each class (10)")
    parser.add_argument("--features", metavar="RUN", help=FEATURES)
    parser.add_shared("threads")


def run(args: argparse.Namespace, overrides: Overrides) -> None:
    """Train, draw, measure and report; print the grid's path, the records and the report's path."""
    from advebm.reporting.build import report
    from advebm.reporting.terminal import print_records
    from advebm.runs.find_space import find_space
    from advebm.workflows.evaluate import measure
    from advebm.workflows.sample import sample

    check_at_least(args, 1, "per_class")
    if args.features:
        find_space(args.features).load("cpu")  # raises before training rather than after
    if (run := _train(args, overrides)) is None:
        return
    folder = sample(run, per_class=args.per_class, device=args.device, backend=args.fast or "auto")
    print(folder / "grid.png")
    print_records(measure(run, features=args.features, device=args.device))
    if not processes.rank_and_world()[0]:
        print(report(run))


def add_recipe_options(parser: Parser) -> argparse._MutuallyExclusiveGroup:
    """Add what :func:`recipe_source` reads; return the group of options that say where the recipe is."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help="a recipe of the package; see advebm list")
    source.add_argument("--config", type=Path, metavar="FILE", help="a recipe as YAML, such as a run's config.yaml")
    parser.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help="train a torch module of your own")
    parser.add_argument(
        "--init", metavar="RUN", help="begin with the weights of a run, a model or a file; other classes: new head"
    )
    parser.add_argument("--fast", metavar="WAY", help=f"how searches compute the network: {FAST_VALUES}; --train.fast")
    return source


def recipe_source(
    args: argparse.Namespace, overrides: Overrides, known: str = "--recipe NAME or --config FILE"
) -> tuple[str | Path, Overrides]:
    """Return the name or file of the recipe, and the overrides with those that other options stand for."""
    from advebm.models.factory import find_root

    if (args.recipe or args.config) is None:
        raise UserError(f"{args.verb} takes {known}; recipes: {', '.join(recipes.names())}")
    if args.model:
        overrides = [*overrides, ("backbone", {"kind": "own", "path": args.model, "root": find_root(args.model)})]
    if args.fast:
        overrides = [*overrides, ("train.fast", args.fast)]
    return args.recipe or args.config, overrides


def _add_training_options(parser: Parser) -> None:
    source = add_recipe_options(parser)
    source.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run where its last checkpoint is")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/NAME-TIME)")
    parser.add_argument("--seed", type=int)
    parser.add_shared("device")
    parser.add_argument(
        "--track",
        metavar="NAMES",
        default=(),
        help="show the run in tensorboard, trackio, wandb, mlflow, …: A or A,B,…",
    )
    parser.add_argument("--print_config", "--print-config", action="store_true", help="print the recipe and stop")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="",
        metavar="MACHINE",
        help="print passes, FLOP, memory and hours of training: here (default), or on a100, h100, h200, rtx4090",
    )


def _train(args: argparse.Namespace, overrides: Overrides) -> "Run | None":
    """Train as the options say and return the run; None if only the recipe or its cost was to be printed."""
    from advebm.runs.recipe import dump
    from advebm.runs.run import Run, new_folder
    from advebm.workflows.train import find_recipe, fit

    if args.resume is not None:
        moved = all(name.endswith(".path") for name, _ in overrides)
        if not moved or args.out or args.init or args.model or args.fast or args.labels or args.seed is not None:
            raise UserError("a resumed run keeps its own recipe and folder; leave the other options out")
        run = Run.open(args.resume)
        recipe = (run.with_images_at(overrides) if overrides else run).recipe
    else:
        source, overrides = recipe_source(args, overrides, "--recipe NAME, --config FILE or --resume RUN")
        recipe = find_recipe(source, overrides, seed=args.seed, init=args.init, labels=args.labels)
    if args.print_config:
        print(dump(recipe), end="")
        return None
    if args.dry_run is not None:
        _print_costs(recipe, args.dry_run, args.device)
        return None
    if processes.may_restart() and not (args.resume or args.out):
        raise UserError("torchrun --max-restarts begins this command again, in a new folder each time; give --out DIR")
    folder = args.resume or args.out or new_folder(Path("runs"), recipe.name)
    goes_on = processes.may_restart() and (folder / "config.yaml").exists() and Run.open(folder).recipe == recipe
    return fit(recipe, folder, resume=goes_on or args.resume is not None, device=args.device, track=args.track)


def _print_costs(recipe: "Recipe", machine: str, device: str | None) -> None:
    """Print passes, FLOP, memory and hours of a recipe on the named machine; on this one if the name is empty."""
    from advebm.reporting.terminal import print_costs
    from advebm.training import cost, hardware
    from advebm.workflows.devices import choose_device

    if machine:
        named = hardware.find_machine(machine)
        stages = cost.estimates(recipe)
        machines = [named] * len(stages)
    else:
        device = choose_device(device)
        stages = cost.estimates(recipe.computed_on(device))
        machines = [cost.measure_machine(stage, device) for stage in stages]
    print_costs(stages, machines)
