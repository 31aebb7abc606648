"""``advebm report``, ``export`` and ``push``: publish a run or its model."""

import argparse
from pathlib import Path
from typing import Any

from advebm.cli.options import Commands, Overrides, Parser, check_at_least


def add_report(verbs: Commands) -> None:
    parser = verbs.add("report", report, "Write RUN/report.html.")
    parser.add_run()
    parser.add_argument("--beside", action="append", default=[], metavar="RUN", help="compare with a run")


def report(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.build import report
    from advebm.workflows.adopt import open_runs

    first, *beside = open_runs((args.run, *args.beside), overrides, whole=False)
    print(report(first, beside=beside))


def add_export(verbs: Commands) -> None:
    about = "Write the model of a run by itself: its weights, and a card with what was measured."
    parser = verbs.add("export", export, about)
    _add_model_options(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty one")


def export(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.card import write_model
    from advebm.workflows.adopt import open_run

    print(write_model(open_run(args.run, overrides, whole=False), args.folder, **_model_options(args)))


def add_push(verbs: Commands) -> None:
    parser = verbs.add("push", push, "Publish what export writes on the Hub, where hf:USER/NAME finds it.")
    _add_model_options(parser)
    parser.add_argument("name", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="for those with access only")


def push(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.card import push_model
    from advebm.workflows.adopt import open_run

    run = open_run(args.run, overrides, whole=False)
    print(push_model(run, args.name, private=args.private, **_model_options(args)))


def _add_model_options(parser: Parser) -> None:
    parser.add_run()
    parser.add_argument("--weights", default="float32", metavar="KIND", help="float32, float16 or bfloat16 (float32)")
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="test images of each class that go along, with Gaussians of the training images: what sample, edit and "
        "app need where the data are not; 0: neither (4 of digits and CIFAR, 0 of other data)",
    )
    parser.add_argument(
        "--license", metavar="ID", help="the licence in the card, as the Hub names it: mit, cc-by-4.0, …"
    )
    parser.add_shared("checkpoint")


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    check_at_least(args, 0, "images")
    return {name: getattr(args, name) for name in ("checkpoint", "weights", "images", "license")}
