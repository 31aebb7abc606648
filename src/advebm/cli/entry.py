"""Entry point of the command line: parse, call, print errors.  torch is imported only when a command needs it."""

import atexit
import contextlib
import io
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from advebm.cli.options import check_options, split_overrides
from advebm.cli.parser import build_parser
from advebm.core import processes
from advebm.core.allocator import tune_cpu_allocator
from advebm.core.console import announcing
from advebm.core.errors import Diverged, Interrupted, Lost, Notice, UserError
from advebm.core.threads import bound_waiting, use_threads

GRACE = 3.0  # seconds that other processes give the main one to report the error


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 1 (diverged, process lost, faults), 2 (wrong input), 130 (stopped)."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # for user-defined package.module:Class
    warnings.showwarning = lambda message, kind, *rest: _say(f"{'' if kind is Notice else 'warning: '}{message}")
    tune_cpu_allocator()
    bound_waiting()
    rank, world = processes.rank_and_world()
    with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
        return _main(sys.argv[1:] if argv is None else argv, world)


def _main(argv: Sequence[str], world: int) -> int:
    try:
        plain, overrides = split_overrides(argv)
        args, unexpected = build_parser().parse_known_args(plain)
        check_options(args, unexpected, overrides)
        if world > 1 and not args.shared:
            raise UserError(f"{args.verb} takes one process, and there are {world}; run it without torchrun")
        if (threads := getattr(args, "threads", None)) is not None:
            use_threads(threads)
        subjects = (getattr(args, name, None) for name in ("run", "recipe", "resume", "config", "model"))
        subject = next((f" {subject}" for subject in subjects if subject), "")
        begins = "reading images and weights" if subject else "starting"
        with announcing(f"{args.verb}{subject}: {begins}"):
            status = args.call(args, overrides) or 0
        _close_connections_at_exit(world)
        return status
    except UserError as error:
        return _fail(error, 2)
    except (Diverged, Lost) as error:
        return _fail(error, 1)
    except Interrupted as error:
        _close_connections_at_exit(world)  # all processes stop together
        _say(str(error))
        return 130
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0


def _close_connections_at_exit(world: int) -> None:
    if world > 1:
        from advebm.runs.engine import close_connections

        atexit.register(close_connections)


def _fail(error: Exception, status: int) -> int:
    text = f"error: {' '.join(str(error).split())}"
    if rank := processes.rank_and_world()[0]:
        time.sleep(GRACE)  # the main process reports the same error and then ends this one
        print(f"advebm: process {rank}: {text}", file=sys.stderr)
    _say(text)
    return status


def _say(text: str) -> None:
    """Print to stderr, from the main process only."""
    if not processes.rank_and_world()[0]:
        print(f"advebm: {text}", file=sys.stderr)
