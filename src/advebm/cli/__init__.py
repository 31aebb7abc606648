"""The command line: commands and their options, which call the other packages."""

from advebm.cli.entry import main

__all__ = ["main"]
