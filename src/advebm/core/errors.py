"""Exceptions, whose messages say what was given, what is allowed and the likely fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input from the user.  The command line prints it as one line and exits with status 2."""


class Diverged(RuntimeError):
    """Training produced non-finite numbers; it ends with this error when no rollback is left."""


class EarlyStop(RuntimeError):
    """An objective requests that training end at the last checkpoint; the message gives the reason."""


class Lost(RuntimeError):
    """Another process of the same job has died, and the job cannot continue without it."""


class Interrupted(RuntimeError):
    """Training was stopped by a signal, after saving; the message contains the command that resumes it."""


def suggest(word: object, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'eps'?)"`` if a known word is similar, else the empty string."""
    matches = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def unknown_name(what: str, word: object, known: Iterable[str]) -> UserError:
    known = sorted(known)
    return UserError(f"no {what} {word!r}{suggest(word, known)}; there is {', '.join(known)}")


class Busy(UserError):
    """Another process holds a lock."""


class Notice(UserWarning):
    """A warning category for what is no fault: how an input was understood."""
