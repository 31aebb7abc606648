"""``advebm edit``: change images by a run's model."""

import argparse
from pathlib import Path

from advebm.cli.options import Commands, Overrides, split_blocks
from advebm.core.errors import UserError


def add_edit(verbs: Commands) -> None:
    parser = verbs.add(
        "edit",
        edit,
        "Edit images with a run's model, or say how unusual they are.",
        "WHAT is translate, inpaint, paint, denoise, upsample, compose, interpolate, counterfactual or score; takes "
        "--edit.option VALUE. Without --image the images are the run's own: spoilt first for what restores them, and "
        "results are then compared with them; seeds, for compose and interpolate.",
        takes=("edit",),
    )
    parser.add_argument("what", metavar="WHAT")
    parser.add_run()
    parser.add_argument("--image", type=Path, nargs="+", metavar="PATH", help="files, and folders of them")
    parser.add_argument("--fit", action="store_true", help="cut, scale and convert images that the model does not take")
    parser.add_argument("--split", choices=("test", "val"), help="images of the run's data, one class after the other")
    parser.add_argument("--from", dest="source", metavar="RUN", help="with --split: another run's data, to translate")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="of --split, or of seeds (8)")
    parser.add_argument("--class", dest="goal", metavar="K", help="the class to move to, by name or number; none: E(x)")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="white where pixels are to be made: inpaint, paint")
    parser.add_argument("--box", metavar="L,T,R,B", help="a rectangle as the mask; the middle half for inpaint")
    parser.add_argument("--with", dest="others", action="append", default=[], metavar="RUN", help="compose: too")
    parser.add_argument("--classes", metavar="K,K", help="compose: a class a model, or several of the one")
    parser.add_argument("--amount", metavar="A", help="translate: short for --edit.amount; 0 nothing, 1 all steps")
    parser.add_argument("--film", action="store_true", help="also film.gif")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (RUN/edits/WHAT, WHAT-2 …)")
    parser.add_argument("--replace", action="store_true", help="replace the results that are there")
    parser.add_shared("seed", "checkpoint", "device", "threads")


def edit(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.reporting.terminal import print_numbers
    from advebm.sampling import edit_job
    from advebm.workflows import edit as workflow
    from advebm.workflows.adopt import open_run, open_runs
    from advebm.workflows.devices import choose_device

    workflow.check_options(args.what, vars(args))
    data_overrides, overrides = split_blocks(overrides, "data")
    run, *others = open_runs([args.run, *args.others], data_overrides, whole=args.what == "score")
    request = edit_job.EditRequest(
        run=run,
        others=tuple(others),
        source=open_run(args.source, whole=False) if args.source else None,
        images=tuple(args.image or ()),
        split=args.split,
        count=args.count,
        fit=args.fit,
        goal=args.goal,
        classes=tuple(args.classes.split(",")) if args.classes else (),
        mask=args.mask,
        box=args.box,
        seed=args.seed,
        checkpoint=args.checkpoint,
        device=choose_device(args.device),
    )
    if args.what == "score":
        if overrides:
            raise UserError("score takes no --edit options")
        print_numbers(edit_job.score_images(request))
        return
    amount = [("edit.amount", args.amount)] if args.amount else []
    method = workflow.find_edit(args.what, [*overrides, *amount])
    out = workflow.choose_folder(args.what, request, args.out, replace=args.replace)
    done = workflow.edit(request, method)
    path = done.write(out, film=args.film)
    print_numbers(done.numbers)
    print(path)
