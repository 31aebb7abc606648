"""Tables for people, on standard output."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from advebm import doctor, published
from advebm.metrics.base import Record
from advebm.reporting.build import row


def record_table(records: Iterable[Record]) -> None:
    """One row a record."""
    table = Table("measured", "samples", "value", "n", box=None, pad_edge=False)
    for text in (row(asdict(record)) for record in records):
        table.add_row(text["name"], text["samples"], text["value"], text["count"])
    _print(table)


ABREAST = 8  # columns


def side_by_side(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """A column a run, a row a quantity."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for title, records in runs.items():
        for text in map(row, records):
            cells.setdefault((text["name"], text["samples"]), {})[title] = text["value"]
    table = Table("measured", "samples", *runs, box=None, pad_edge=False)
    for (name, samples), values in cells.items():
        table.add_row(name, samples, *(values.get(run, "") for run in runs))
    _print(table)


def one_a_line(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """A row a run, a column a quantity, a few of these a table: for many runs."""
    cells = {title: {(r["name"], r["samples"]): r["value"] for r in map(row, rs)} for title, rs in runs.items()}
    columns = list(dict.fromkeys(key for values in cells.values() for key in values))
    for first in range(0, len(columns), ABREAST):
        some = columns[first : first + ABREAST]
        table = Table("run", *(" · ".join(filter(None, key)) for key in some), box=None, pad_edge=False)
        for title, values in cells.items():
            if any(key in values for key in some):
                table.add_row(title, *(values.get(key, "") for key in some))
        _print(table, 60 + 14 * len(some))
        print()


def beside(summary: Mapping[str, Any]) -> None:
    """The paper's numbers and ours side by side, a row a row; above, where and how; below, the claims and verdict."""
    where, verdict = published.lines(summary)
    heads, rows = published.grid(summary)
    print(f"{summary['table']} ({summary['paper']}, {summary['item']}): {where}")
    table = Table(*heads, box=None, pad_edge=False)
    for line in rows:
        table.add_row(*line)
    _print(table, 40 + 17 * len(heads))
    print("\n".join(verdict))


def numbers_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    """A row a thing, a column a number; numbers that a thing has not are left out."""
    columns = list(dict.fromkeys(name for numbers in rows.values() for name in numbers))
    table = Table("", *columns, box=None, pad_edge=False)
    for title, numbers in rows.items():
        table.add_row(title, *(f"{numbers[name]:.3f}" if name in numbers else "" for name in columns))
    _print(table, 150)


def figures_list(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """The numbers of figures: a block a figure, a row a number, a column a model where there are several."""
    for name, numbers in figures.items():
        models = numbers if all(isinstance(v, Mapping) for v in numbers.values()) else {"": numbers}
        table = Table(name, *models, box=None, pad_edge=False)
        for quantity in dict.fromkeys(q for values in models.values() for q in values):
            table.add_row(quantity, *(_number(values.get(quantity)) for values in models.values()))
        _print(table)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value[0]:.3g} ± {value[1]:.2g}" if isinstance(value, list) else f"{value:.3g}"


def findings_list(findings: Iterable[doctor.Finding]) -> None:
    """A block a finding, then what was skipped; where there is none, what was looked at."""
    findings = list(findings)
    shown = [f for f in findings if f.severity != "skipped"]
    for finding in shown:
        print(f"{finding.severity}: {finding.name}")
        for line in (f"found: {finding.what}", f"to do: {finding.fix}"):
            print(textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="         "))
    if skipped := [f.name for f in findings if f.severity == "skipped"]:
        print(textwrap.fill(f"skipped until that is mended: {', '.join(skipped)}", 100, subsequent_indent="  "))
    faults = sum(f.severity == "fault" for f in shown)
    if not faults:
        print("no faults found; checked:")
        for check in doctor.CHECKS:
            print(f"  {doctor.title(check):12}{doctor.about(check)}")
    else:
        print(f"{faults} fault{'s' * (faults > 1)}")


def _print(table: Table, width: int = 120) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, width)  # a pipe has no width of its own
    console.print(table)
