"""A line of the table of agreement."""

from importlib import metadata
from typing import NamedTuple


class Row(NamedTuple):
    """A number by two implementations; ``unit`` says what the difference counts."""

    metric: str
    peer: str
    theirs: float
    ours: float
    difference: float
    unit: str = ""


def peer(package: str) -> str:
    """Name and version."""
    return f"{package} {metadata.version(package)}"
