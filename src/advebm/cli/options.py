"""Parse arguments: options of a recipe, most of which have a dot, and ordinary arguments."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from advebm.core.errors import UserError, suggest

Overrides = list[tuple[str, Any]]
Call = Callable[[argparse.Namespace, Overrides], int | None]
# Blocks of a recipe that accept a kind, as in --objective at; all other recipe options but --metrics have a dot.
BLOCKS = {"data": "source", "backbone": "backbone", "objective": "objective", "sampler": "sampler"}
BLOCKS |= {"optimizer": "optimizer", "schedule": "schedule", "outside": "source", "extra": "source"}

RUN = (
    "a run; or any model, around which a run is made: its folder, one of the package, hf:USER/NAME, timm:NAME, "
    "robustbench:NAME, a weight file, NETWORK:OPTION=VALUE,...@FILE, PACKAGE.MODULE:FACTORY or "
    "PACKAGE.MODULE:FACTORY@WEIGHTS, with --data where it does not say its own"
)
FEATURES = (
    "what judges the samples: the classifier of a run or model (its own by default), pixels, inception (downloads its "
    "weights once), or inception:PATH of torch-fidelity's weight file"
)
FAST_VALUES = "auto, off, fold, compile, bf16 or bf16+compile"  # values of --fast
SHARED: dict[str, dict[str, Any]] = {  # options that many commands take
    "seed": {"type": int, "default": 0},
    "checkpoint": {"default": "latest", "metavar": "WHICH", "help": "latest, best or a number of images"},
    "device": {"metavar": "NAME", "help": "cpu, cuda, cuda:1, mps, …; the first GPU of CUDA by default, else cpu"},
    "threads": {"type": int, "metavar": "N", "help": "of the CPU; all cores by default"},  # main() applies it
}


class Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors, without abbreviations, and with options that many commands share."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise UserError, which :func:`advebm.cli.entry.main` prints like all other errors."""
        if match := re.search(r"invalid choice: '([^']*)'.*choose from (.*)\)", message):
            known = [word.strip(" '") for word in match[2].split(",")]
            raise UserError(f"no command {match[1]!r}{suggest(match[1], known)}; there is {', '.join(known)}")
        raise UserError(f"{message}; see {self.prog} --help")

    def add_run(self, *, several: bool = False, optional: bool = False, default: str | None = None) -> None:
        """Add the run or runs, as references to be opened by ``open_run``, and the options of their data.

        Args:
            several: whether the command takes several runs.
            optional: whether it takes none, too.
            default: the model that it takes then.
        """
        name, nargs = ("runs", "*" if optional else "+") if several else ("run", "?" if optional else None)
        about = RUN if default is None else f"{RUN}; {default} if none is given"
        self.add_argument(name, metavar="RUN", nargs=nargs, default=[default] if several else default, help=about)
        takes = self.get_default("takes")
        self.set_defaults(takes=takes if "data" in takes else (*takes, "data"))

    def add_shared(self, *names: str) -> None:
        """Add options of :data:`SHARED`, in this order."""
        for name in names:
            self.add_argument(f"--{name}", **SHARED[name])


class Commands:
    """The commands of the command line; each module of this package adds its own."""

    def __init__(self, parser: Parser) -> None:
        self.subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        self, name: str, call: Call, about: str, more: str = "", *, takes: Sequence[str] = (), shared: bool = False
    ) -> Parser:
        """Add a command and return its parser.

        Args:
            name: name of the command.
            call: function that the command runs; returns the exit status, None for 0.
            about: summary for the help, in one line.
            more: further text for the help.
            takes: blocks of a recipe whose options the command takes.
            shared: whether several processes may run the command together.
        """
        parser: Parser = self.subparsers.add_parser(name, help=about, description=f"{about} {more}".strip())
        known = parser._option_string_actions
        parser.set_defaults(verb=name, call=call, takes=tuple(takes), options=known, shared=shared)
        return parser


def split_overrides(argv: Sequence[str]) -> tuple[list[str], Overrides]:
    """Split off ``--a.b value``, ``--a.b=value`` and ``--objective value``; return the other words, and pairs."""
    words, plain, overrides = list(argv), [], []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not ("." in name or name in (*BLOCKS, "metrics", "before")):
            plain.append(word)
            continue
        if not equals:
            if not words:
                raise UserError(f"{word} needs a value")
            value = words.pop(0)
        overrides.append((name, value))
    return plain, overrides


def check_options(args: argparse.Namespace, unexpected: Sequence[str], overrides: Overrides) -> None:
    """Raise UserError for words and overrides that the command does not take."""
    allowed = ", ".join(f"--{block}.…" for block in args.takes)
    more = f"; options of a recipe have a dot, as in {allowed}" if allowed else ""
    if unexpected:
        word = unexpected[0].partition("=")[0]
        raise UserError(f"unexpected {word!r}{suggest(word, args.options)}{more}")
    for name, _ in overrides:
        if (block := name.partition(".")[0]) not in args.takes:
            what = f"this command takes {allowed or 'no options of a recipe'}"
            raise UserError(f"no option --{name}{suggest(block, args.takes)}; {what}")


def split_blocks(overrides: Overrides, *blocks: str) -> tuple[Overrides, Overrides]:
    """Return the overrides of these blocks of a recipe, and all others."""
    chosen = [pair for pair in overrides if pair[0].partition(".")[0] in blocks]
    return chosen, [pair for pair in overrides if pair not in chosen]


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise UserError if a named option is below ``least``; ignore options that were not given."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
