"""What goes wrong, said so that the reader can mend it: what was given, what is allowed, the likely fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked for.  The command line prints it as one line and exits with status 2."""


class Diverged(RuntimeError):
    """Training produced non-finite numbers more often than it may roll back."""


class EarlyStop(RuntimeError):
    """An objective asks that training end at the last checkpoint; the message says why."""


class Lost(RuntimeError):
    """Another process of the same job is gone, and nothing can be finished without it."""


class Interrupted(RuntimeError):
    """Training was stopped by a signal, after saving; the message holds the command that resumes it."""


def suggest(word: object, known: Iterable[str]) -> str:
    """``" (did you mean 'eps'?)"`` if one of the known words is near, else the empty string."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown_name(what: str, word: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a list of names."""
    known = sorted(known)
    return UserError(f"no {what} {word!r}{suggest(word, known)}; there is {', '.join(known)}")


class Busy(UserError):
    """Somebody else holds a lock."""
