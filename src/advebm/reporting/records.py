"""Evaluation records as text: for the terminal, reports, model cards and Markdown pages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from advebm.metrics.keys import Key, key_of
from advebm.metrics.texts import as_text, caution, judges_itself

if TYPE_CHECKING:  # advebm list reads records without torch
    from advebm.attacks.projected import Attack

Quantity = tuple[str, str]  # names of the record and of its set of samples
MEASURES = ("FD", "KID", "precision", "recall", "density", "coverage", "class score", "intended class")
LOWER_IS_BETTER = ("FD", "KID")


class RatedSet(NamedTuple):
    """A set of samples and its quality in one feature space.

    Attributes:
        run: title of the run that it was drawn from.
        name: name of the set.
        space: name of the feature space.
        records: records by quantity, such as ``FD`` and ``recall``, those of :data:`MEASURES`.
    """

    run: str
    name: str
    space: str
    records: dict[str, Mapping[str, Any]]

    @property
    def judges_itself(self) -> bool:
        """Whether its judge is the model that it was drawn from."""
        return any(map(judges_itself, self.records.values()))


def rate_sets(runs: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, list[RatedSet]]:
    """Return the measured sets of samples of several runs, by feature space."""
    spaces: dict[str, dict[tuple[str, str], RatedSet]] = {}
    for title, records in runs.items():
        for record in records:
            key = key_of(record)
            if key.quantity in MEASURES and key.space is not None and key.samples is not None:
                new = RatedSet(title, key.samples, key.space, {})
                sets = spaces.setdefault(key.space, {})
                sets.setdefault((title, key.samples), new).records[key.quantity] = record
    return {space: list(sets.values()) for space, sets in spaces.items()}


def best_set(sets: Iterable[RatedSet], quantity: str = "FD") -> RatedSet | None:
    """Return the set that is best by a measure; None if there are no sets whose number says enough.

    Sets that their own model judges do not count, nor distances with a caution.
    """
    sound = [s for s in sets if quantity in s.records and not s.judges_itself and not caution(s.records[quantity])]
    sign = 1 if quantity in LOWER_IS_BETTER else -1
    return min(sound, key=lambda s: sign * s.records[quantity]["value"], default=None)


def find_accuracies(
    records: Iterable[Mapping[str, Any]], threat: "Attack", by: str | None = None
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Return the records of clean accuracy, and of the lowest accuracy under attacks of the threat's norm and radius.

    Args:
        records: records of one run.
        threat: the threat model.
        by: name of a probe; None: the model's own predictions count.

    Returns:
        Two records, None where there is none.
    """
    clean, attacked = None, []
    for record in records:
        key, attack = key_of(record), record["settings"].get("attack")
        if key._replace(attack=None) != Key("accuracy", by=by) or record["settings"].get("targeted"):
            continue
        if key.attack is None:
            clean = record
        elif key.attack.part is None and isinstance(attack, Mapping) and attack.get("norm") == threat.norm:
            attacked += [record] if math.isclose(attack.get("eps") or 0, threat.eps, rel_tol=0.01) else []
    return clean, min(attacked, key=lambda r: r["value"], default=None)


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
            if percent:  # samples of a critic were asked for no class
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
