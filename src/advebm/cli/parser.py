"""All commands, in the order of the help."""

from advebm import __version__
from advebm.cli import catalog, demo, diagnose, edit, evaluate, page, publish, reproduce, sample, speedrun, sweep, train
from advebm.cli.options import Commands, Parser

ADD = (
    demo.add_demo,
    demo.add_toy,
    train.add_train,
    train.add_run,
    sweep.add_sweep,
    speedrun.add_speedrun,
    sample.add_sample,
    sample.add_tune_sampler,
    diagnose.add_diagnose,
    evaluate.add_evaluate,
    evaluate.add_probe,
    edit.add_edit,
    diagnose.add_doctor,
    publish.add_report,
    evaluate.add_compare,
    evaluate.add_leaderboard,
    reproduce.add_reproduce,
    page.add_app,
    publish.add_export,
    publish.add_push,
    catalog.add_list,
    catalog.add_explain,
)


def build_parser() -> Parser:
    """Return the parser of all commands, without importing torch or any method."""
    parser = Parser(prog="advebm", description="Adversarially trained energy-based models.")
    parser.add_argument("--version", action="version", version=f"advebm {__version__}")
    verbs = Commands(parser)
    for add in ADD:
        add(verbs)
    return parser
