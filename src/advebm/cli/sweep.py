"""``advebm sweep``: train combinations of options, and show which is best on validation images."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from advebm.cli.options import Commands, Overrides
from advebm.cli.train import LABELS, TAKES, add_recipe_options, recipe_source
from advebm.core.errors import UserError


def add_sweep(verbs: Commands) -> None:
    parser = verbs.add(
        "sweep",
        sweep,
        "Train combinations of options side by side, scored on validation images: a table and a picture.",
        "Other options of a recipe are those of all trials: --train.images 20000. Each trial is a run in DIR/trials. "
        "Stopped, the same command goes on.",
        takes=TAKES,
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="OPTION=VALUE,VALUE",
        help="values of an option, as optimizer.lr=0.05,0.1 or objective=at,trades; values with commas as a YAML list, "
        "[[1,2],[3,4]]; repeat: all combinations",
    )
    parser.add_argument(
        "--trials",
        type=Path,
        metavar="FILE",
        help="YAML: a list of combinations, as - {optimizer.lr: 0.1}; {} is the recipe itself",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of table, picture and trials")
    parser.add_argument("--seed", type=int, help="the first seed; the recipe's by default")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds of each combination (1)")
    parser.add_argument("--jobs", type=int, metavar="N", help="trials side by side (as many as cores; on a GPU one)")
    parser.add_argument(
        "--halve",
        type=int,
        nargs="?",
        const=2,
        default=0,
        metavar="N",
        help="successive halving, N (2) times: from round to round the better half, on twice as many images",
    )
    parser.add_argument(
        "--budget", type=float, metavar="FLOP", help="of training of each trial, as 2e13: sets --train.images"
    )
    parser.add_argument("--by", choices=("robust", "clean", "fd"), default="robust", help="the score that counts")
    parser.add_argument("--labels", choices=("none",), help=LABELS)
    parser.add_shared("device")


def sweep(args: argparse.Namespace, overrides: Overrides) -> None:
    """Train the trials; print the table, and the folder of the sweep."""
    from advebm.reporting.terminal import print_sweep
    from advebm.workflows import sweep as workflow

    source, overrides = recipe_source(args, overrides)
    options: dict[str, Any] = {"seeds": args.seeds, "jobs": args.jobs, "halve": args.halve, "budget": args.budget}
    options |= {"by": args.by, "init": args.init, "labels": args.labels, "seed": args.seed, "device": args.device}
    given = [] if args.trials is None else read_trials(args.trials)
    print_sweep(workflow.sweep(source, overrides, vary=parse_vary(args.vary), trials=given, out=args.out, **options))


def parse_vary(texts: list[str]) -> dict[str, list[Any]]:
    """Read ``optimizer.lr=0.05,0.1``, or ``backbone.widths=[[8,16],[16,32]]`` as YAML."""
    vary: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.removeprefix("--").partition("=")
        if not (name and equals and values):
            raise UserError(f"--vary takes OPTION=VALUE,VALUE, as in --vary optimizer.lr=0.05,0.1, got {text!r}")
        if name in vary:
            raise UserError(f"--vary {name} is given twice; put its values behind one another")
        vary[name] = values.split(",")
        if values.startswith("["):
            try:
                vary[name] = yaml.safe_load(values)
            except yaml.YAMLError:
                raise UserError(f"--vary {name} takes a YAML list such as [[1,2],[3,4]], got {values!r}") from None
    return vary


def read_trials(path: Path) -> list[dict[str, Any]]:
    """Read a YAML file that lists combinations of options."""
    try:
        trials = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(trials, list) or not trials or not all(isinstance(t, dict) for t in trials):
        raise UserError(f"{path} takes a list of combinations, such as - {{optimizer.lr: 0.1, objective: trades}}")
    return trials
