"""``advebm app``: the web page."""

import argparse

from advebm.cli.options import Commands, Overrides
from advebm.models.hub import EDITING_MODEL


def add_app(verbs: Commands) -> None:
    parser = verbs.add(
        "app",
        app,
        "Serve a page for the browser: draw, edit, explain, attack, look at energies and reports.",
        "On this machine alone unless --host says otherwise; needs pip install 'advebm[app]'.",
    )
    parser.add_run(several=True, optional=True, default=EDITING_MODEL)
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="the address to answer at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="the port to answer at (7860)")
    parser.add_shared("checkpoint", "device", "threads")


def app(args: argparse.Namespace, overrides: Overrides) -> None:
    from advebm.web.server import serve
    from advebm.workflows.adopt import open_runs
    from advebm.workflows.devices import choose_device

    options = {"host": args.host, "port": args.port, "checkpoint": args.checkpoint}
    runs = open_runs(args.runs, overrides, whole=False)
    serve(runs, **options, device=choose_device(args.device), say=print)
