"""``advebm reproduce``: figures and tables of the papers."""

import argparse
from pathlib import Path

from advebm.cli.options import BLOCKS, Commands, Overrides
from advebm.core.errors import UserError


def add_reproduce(verbs: Commands) -> None:
    parser = verbs.add(
        "reproduce",
        reproduce,
        "Carry out an experiment of the papers at a size for two CPU cores, or a table at a scale, or on where it was.",
        "Takes --data.path and other options of a recipe, for all that it trains. A table ends beside the paper's.",
        takes=(*BLOCKS, "train", "threat", "normalise"),
    )
    parser.add_argument("experiment", nargs="?", metavar="NAME", help="see --list")
    parser.add_argument("--list", action="store_true", help="every figure, table and algorithm, and what makes it")
    parser.add_argument(
        "--scale", metavar="SCALE", help="of a table: full, gpu-30min, cpu-2h, cpu-30min or digits; docs/results.md"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="training seeds; tables give mean and deviation"
    )
    parser.add_argument(
        "--quick", action="store_true", help="shorter training, where an experiment has that; labelled so"
    )
    parser.add_argument(
        "--row", action="append", default=[], metavar="NAME=MODEL", help="a trained model instead of the run NAME"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the runs go (runs/NAME, runs/NAME-SCALE)")
    parser.add_shared("threads")


def reproduce(args: argparse.Namespace, overrides: Overrides) -> None:
    """Carry out an experiment or a table and print the path of its result, or list what can be reproduced."""
    from advebm.papers.inventory import papers, tables
    from advebm.reproduction import experiments

    name = args.experiment
    if name is None and args.scale is not None:
        raise UserError(f"--scale is of a table; name one of {', '.join(tables())}")
    if args.list or name is None:
        for experiment, call in experiments.EXPERIMENTS.items():
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
    given = dict(_parse_row(text) for text in args.row)
    options = {"seeds": args.seeds, "quick": args.quick, "options": overrides, "given": given}
    print(experiments.reproduce(name, args.out, scale=args.scale, **options))


def _parse_row(text: str) -> tuple[str, str]:
    """Return the label and the reference of ``NAME=MODEL``."""
    label, equals, reference = text.partition("=")
    if not (label and equals and reference):
        raise UserError(f"--row takes NAME=MODEL, as in --row at=model.pt, got {text!r}")
    return label, reference
