"""Tables for people, on standard output."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from advebm.metrics.base import Record
from advebm.reporting.build import row


def record_table(records: Iterable[Record]) -> None:
    """One row a record."""
    table = Table("measured", "samples", "value", "n", box=None, pad_edge=False)
    for text in (row(asdict(record)) for record in records):
        table.add_row(text["name"], text["samples"], text["value"], text["count"])
    _print(table)


def demo_table(records: Iterable[Mapping[str, Any]]) -> None:
    """Standard and adversarial training side by side, then the samples."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for item in records:
        text = row(asdict(item["record"]))
        cells.setdefault((text["name"], text["samples"]), {})[item["run"]] = text["value"]
    runs = ("digits-standard", "digits-at")
    table = Table("measured", "samples", *runs, box=None, pad_edge=False)
    for (name, samples), values in cells.items():
        table.add_row(name, samples, *(values.get(run, "") for run in runs))
    _print(table)


def _print(table: Table) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # a pipe has no width of its own
    console.print(table)
