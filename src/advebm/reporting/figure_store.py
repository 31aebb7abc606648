"""Figures that a run keeps in ``RUN/figures`` and its report shows: a picture, and a file that says what it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advebm.core import files
from advebm.runs.run import Run


def save_figure(
    run: Run, name: str, picture: bytes, title: str, text: str, numbers: Mapping[str, Any] | None = None
) -> Path:
    """Keep a figure under a name, over an older one of that name; where the picture is.

    Args:
        run: whose.
        name: of the files, ``NAME.png`` and ``NAME.json``.
        picture: the bytes of a PNG file.
        title, text: for the report: what is shown, and how to read it.
        numbers: what the figure says in numbers, as JSON.
    """
    path = run.folder / "figures" / f"{name}.png"
    files.write(path, picture)
    files.write_json(path.with_suffix(".json"), {"title": title, "text": text, "numbers": dict(numbers or {})})
    return path


def load_figures(run: Run) -> list[dict[str, Any]]:
    """Title, text, numbers and picture of each figure, by name."""
    found = []
    for path in sorted((run.folder / "figures").glob("*.json")):
        if path.with_suffix(".png").exists():
            found.append({**files.read_json(path), "name": path.stem, "picture": path.with_suffix(".png").read_bytes()})
    return found
