"""The page of a leaderboard, a sweep or a speed-run: one table, one picture, and how it was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from advebm.core import files
from advebm.reporting.records import markdown


class Measured(Protocol):
    """What a page is written of."""

    @property
    def folder(self) -> Path:
        """Where the page is written."""

    @property
    def environment(self) -> Mapping[str, Any]:
        """Hardware, versions and date, see :func:`advebm.runs.run.environment`."""

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings, and the texts of each row."""

    def describe(self) -> dict[str, Any]:
        """Return plain data, as JSON holds it."""


def write_page(
    found: Measured, title: str, picture: bytes | None, *, shows: str, lines: Sequence[str], advice: str = ""
) -> None:
    """Write ``NAME.md``, the same as data, ``NAME.json``, and the picture, ``NAME.png``, to the folder of ``found``.

    Args:
        found: what was measured.
        title: title of the page; NAME is its small letters without hyphens.
        picture: a PNG; None: there is nothing to show yet.
        shows: what the picture shows, for those who cannot see it.
        lines: how it was measured, an item each; hardware, versions and date are added.
        advice: Markdown that stands between table and picture.
    """
    name, here = title.lower().replace("-", ""), found.environment
    parts = [f"# {title}", markdown(*found.table()), advice]
    if picture is not None:
        files.write(found.folder / f"{name}.png", picture)
        parts.append(f"![{shows}]({name}.png)")
    machine = (
        f"Measured on {here['device']}, {here['system']}, {here['cores']} cores, torch {here['torch']}, advebm "
        f"{here['advebm']}, {here['started'][:10]}."
    )
    parts.append("\n".join(f"- {line}" for line in (*lines, machine)))
    files.write(found.folder / f"{name}.md", "\n\n".join(part for part in parts if part) + "\n")
    files.write_json(found.folder / f"{name}.json", found.describe())
