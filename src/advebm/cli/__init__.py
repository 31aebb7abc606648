"""The command line: the verbs, their options, and what each does.  It calls what the other folders do."""

from advebm.cli.entry import main

__all__ = ["main"]
