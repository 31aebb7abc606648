"""Words of a command: options of a recipe, which have a dot, and the rest."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from advebm.core.errors import UserError, suggest

Overrides = list[tuple[str, Any]]
# Blocks of a recipe that a kind can be given for, as in --objective at; any other option has a dot in its name.
BLOCKS = {"data": "source", "backbone": "backbone", "objective": "objective", "sampler": "sampler"}
BLOCKS |= {"optimizer": "optimizer", "schedule": "schedule", "outside": "source", "extra": "source"}


class Parser(argparse.ArgumentParser):
    """One-line errors, no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise, so that :func:`main` prints it like every other mistake."""
        if bad := re.search(r"invalid choice: '([^']*)'.*choose from (.*)\)", message):
            known = [word.strip(" '") for word in bad[2].split(",")]
            raise UserError(f"no command {bad[1]!r}{suggest(bad[1], known)}; there is {', '.join(known)}")
        raise UserError(f"{message}; see {self.prog} --help")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], Overrides]:
    """Take ``--a.b value``, ``--a.b=value`` and ``--objective value`` out of the words: what is left, and pairs."""
    words, plain, overrides = list(argv), [], []
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not ("." in name or name in (*BLOCKS, "metrics")):
            plain.append(word)
            continue
        if not equals:
            if not words:
                raise UserError(f"{word} needs a value")
            value = words.pop(0)
        overrides.append((name, value))
    return plain, overrides


def check_options(args: argparse.Namespace, unexpected: Sequence[str], overrides: Overrides) -> None:
    """Refuse words that the command does not take."""
    allowed = ", ".join(f"--{block}.…" for block in args.takes)
    more = f"; options of a recipe have a dot, as in {allowed}" if allowed else ""
    if unexpected:
        word = unexpected[0].partition("=")[0]
        raise UserError(f"unexpected {word!r}{suggest(word, args.options)}{more}")
    for name, _ in overrides:
        block = name.partition(".")[0]
        if block not in args.takes:
            what = f"this command takes {allowed}" if allowed else "this command takes no options of a recipe"
            raise UserError(f"no option --{name}{suggest(block, args.takes)}; {what}")
