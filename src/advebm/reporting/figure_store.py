"""Figures saved in ``RUN/figures`` and shown in the report: a PNG file and a JSON file with its title and text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from advebm.core import files
from advebm.runs.run import Run


def save_figure(
    run: Run, name: str, picture: bytes, title: str, text: str, numbers: Mapping[str, Any] | None = None
) -> Path:
    """Save a figure of a run, replacing one of the same name.  Return the path of the picture.

    Args:
        run: the run to save it in.
        name: name of the files, ``NAME.png`` and ``NAME.json``.
        picture: the bytes of a PNG file.
        title, text: shown in the report: what the figure shows, and how to read it.
        numbers: numbers that belong to the figure, which JSON can hold.
    """
    path = run.folder / "figures" / f"{name}.png"
    files.write(path, picture)
    files.write_json(path.with_suffix(".json"), {"title": title, "text": text, "numbers": dict(numbers or {})})
    return path


def load_figures(run: Run) -> list[dict[str, Any]]:
    """Return ``name``, ``title``, ``text``, ``numbers`` and ``picture`` of each saved figure, sorted by name."""
    return [
        {**files.read_json(path), "name": path.stem, "picture": path.with_suffix(".png").read_bytes()}
        for path in sorted((run.folder / "figures").glob("*.json"))
        if path.with_suffix(".png").exists()
    ]
