"""Evaluation records as text: for the terminal, reports, model cards and Markdown pages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from advebm.metrics.keys import key_of

Quantity = tuple[str, str]  # names of the record and of its set of samples


def as_text(record: Mapping[str, Any]) -> dict[str, str]:
    """Return ``name``, ``samples``, ``value``, ``count``, ``caution``; shares in percent, others with 3 decimals."""
    share = key_of(record).is_share
    scale, unit = (100, " %") if share else (1, "")
    value, error = record["value"] * scale, record["error"] * scale
    digits = 1 if share else 3
    text = f"{value:.{digits}f} ± {error:.{digits}f}{unit}"
    if error == 0 and not share and not record["settings"]:  # a count
        text = f"{value:,.0f}" if value == round(value) or value > 100 else f"{value:.1f}"
    return {
        "name": record["name"],
        "value": text,
        "count": f"{record['count']:,}",
        "samples": str(record["settings"].get("samples", "")),
        "caution": caution(record),
    }


def caution(record: Mapping[str, Any]) -> str:
    """Return why a distance between features says little, else the empty string."""
    if key_of(record).quantity != "FD":
        return ""
    if record["settings"].get("few"):
        return "no more images than dimensions"
    return "in the model's own features" if record["settings"].get("space") == "own features" else ""


class Pivot(NamedTuple):
    """Records of several runs as a table.

    Attributes:
        titles: titles of the runs.
        cells: texts of values by quantity, in the order of first appearance, and by title of the run.
    """

    titles: list[str]
    cells: dict[Quantity, dict[str, str]]

    def quantities_down(self, *, widest_first: bool = False) -> tuple[list[str], list[list[str]]]:
        """Return headings and a row for each quantity; ``widest_first``: those that most runs have come first."""
        rows = list(self.cells.items())
        if widest_first:
            rows.sort(key=lambda row: -len(row[1]))
        lines = [[*quantity, *(values.get(title, "") for title in self.titles)] for quantity, values in rows]
        return ["measured", "samples", *self.titles], lines

    def runs_down(self, columns: Sequence[Quantity]) -> tuple[list[str], list[list[str]]]:
        """Return headings and a row for each run that has any of the quantities ``columns``."""
        heads = ["run", *(" · ".join(filter(None, quantity)) for quantity in columns)]
        texts = {title: [self.cells[quantity].get(title, "") for quantity in columns] for title in self.titles}
        return heads, [[title, *line] for title, line in texts.items() if any(line)]


def pivot(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> Pivot:
    """Arrange records, by title of their run, as a table; of several records of one quantity the last counts."""
    cells: dict[Quantity, dict[str, str]] = {}
    for title, records in runs.items():
        for text in map(as_text, records):
            cells.setdefault((text["name"], text["samples"]), {})[title] = text["value"]
    return Pivot(list(runs), cells)


def class_tables(records: Iterable[Mapping[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    """Return, for each judging classifier, headings and rows: the share of each class's samples assigned to it."""
    shares: dict[str, dict[str, dict[str, float]]] = {}  # percent, by name of record, samples and class
    for record in records:
        if (key := key_of(record)).quantity == "intended class":
            percent = {name: 100 * values[0] for name, values in record["series"].items()}
            shares.setdefault(record["name"], {})[key.samples or ""] = percent
    tables = []
    for name, sets in shares.items():
        classes = dict.fromkeys(k for percent in sets.values() for k in percent)
        rows = [[k, *(f"{percent[k]:.0f} %" if k in percent else "" for percent in sets.values())] for k in classes]
        tables.append(([name, *sets], rows))
    return tables


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
