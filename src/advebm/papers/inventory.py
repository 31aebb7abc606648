"""What the papers publish: the inventory, its tables, their columns."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from advebm.core.errors import UserError, unknown_name

Records = list[dict[str, Any]]
Cell = dict[str, Any]  # of one number here: value, error, n, seeds, and the name of what was measured
Cells = dict[str, dict[str, Cell]]  # by row and column


@functools.cache
def papers() -> list[dict[str, Any]]:
    """The inventory ``papers.yaml``: what the papers publish, item by item, and what makes it."""
    return yaml.safe_load(files("advebm.papers").joinpath("papers.yaml").read_text())["papers"]


class Column(NamedTuple):
    """A published quantity.

    Attributes:
        heading: what the papers call it.
        records: which records are of it, as :func:`advebm.metrics.keys.matches` takes them, the best first.
        scale: from a record's value to the published one's.
        tolerance: how far apart two full measurements may be whatever their errors say, in the published unit.
    """

    heading: str
    records: tuple[Mapping[str, Any], ...]
    scale: float = 100.0
    tolerance: float = 1.0


def _in_features(quantity: str) -> tuple[Mapping[str, Any], ...]:
    """In Inception's, as published, or else in any."""
    return {"quantity": quantity, "space": "inception"}, {"quantity": quantity}


COLUMNS = {
    "clean": Column("clean %", ({"quantity": "accuracy"},)),
    "pgd50": Column("PGD-50 %", ({"quantity": "accuracy", "attack": "PGD", "steps": 50},)),
    "cw": Column("C&W %", ({"quantity": "accuracy", "attack": "C&W"},)),
    "aa": Column("AutoAttack %", ({"quantity": "accuracy", "attack": "AutoAttack"},)),
    "is": Column("IS", _in_features("class score"), 1.0, 0.2),
    "fid": Column("FID", _in_features("FD"), 1.0, 2.0),
}


@dataclass(frozen=True)
class Table:
    """A published table that ``advebm reproduce NAME --scale SCALE`` carries out: an item of ``papers.yaml``.

    Attributes:
        paper, item, what: of the inventory.
        rows: of the inventory.
        name: of the table.
        by: what its computation is, of :data:`advebm.reproduction.tables.COMPUTATIONS`.
        scales: of :data:`advebm.reproduction.scales.SCALES`, each with the share of the recipes' training images.
        columns: keys of published values: those of :data:`COLUMNS`, or each with the title of its results.
        ours: what stands beside a row: a method, by the stem of its recipes, alone or as ``{method, sampler, stage}``
            (a sampler from class Gaussians rather than the recipe's; ``first``, what it was before its last stage); the
            title of its results; or, where columns have titles, which records are of it, as in :class:`Column`.
        claims: what the table is about, ``IN: MORE > LESS``: IN is a column and the others are rows, or vice versa.
        data: whose recipes, ``DATA-METHOD``.
        digits: whose recipes at the scale of that name.
        recipes: of methods whose recipes are called otherwise, by the size of networks of a scale.
        beside: what is shown below the rows and published nowhere: methods, or titles of results.
        why: facts that explain a verdict, by scale.
        runs: the table whose runs these are, too.
    """

    paper: str
    item: str
    what: str
    rows: tuple[Mapping[str, Any], ...]
    name: str
    by: str
    scales: Mapping[str, float]
    columns: Mapping[str, str]
    ours: Mapping[str, Any]
    claims: tuple[str, ...] = ()
    data: str = "cifar10"
    digits: str = ""
    recipes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)
    runs: str = ""

    def share(self, scale: str) -> float:
        """Of the recipes' training images at a scale."""
        if scale not in self.scales:
            raise UserError(f"{self.name} has no scale {scale!r}; it has {', '.join(self.scales)}")
        return self.scales[scale]

    def methods(self) -> list[str]:
        """What it takes to train: of the columns, of the rows, of what is beside them."""
        if titles := [title for title in self.columns.values() if title]:
            return titles
        own = [self.of(name)["method"].partition(", ")[0] for name in (*self.ours, *self.beside)]
        return list(dict.fromkeys(own))

    def of(self, name: str) -> dict[str, Any]:
        """What stands beside a row, as ``{method, …}``: a method, or the title of results that begins with it."""
        plain = self.ours.get(name, name)
        return plain if isinstance(plain, dict) else {"method": plain}

    def row(self, name: str) -> Mapping[str, Any]:
        """A row by its name; a bare one where it is not published."""
        return next((row for row in self.rows if row["name"] == name), {"name": name, "status": "unpublished"})

    def names(self) -> list[str]:
        """Of the rows, and of what is shown beside them."""
        return [*(row["name"] for row in self.rows), *self.beside]


def tables() -> dict[str, Table]:
    """Those of the inventory that can be carried out, by name."""
    found = {}
    for paper in papers():
        for item in paper["items"]:
            if plain := item.get("table"):
                columns = plain["columns"]
                columns = columns if isinstance(columns, Mapping) else dict.fromkeys(columns, "")
                about = {"paper": paper["key"], "item": item["id"], "what": item["what"], "rows": tuple(item["rows"])}
                found[plain["name"]] = Table(**about, **{**plain, "columns": columns})
    return found


def find_table(name: str) -> Table:
    """A table by its name."""
    if name not in tables():
        raise unknown_name("table", name, tables())
    return tables()[name]


def find_column(key: str) -> Column:
    """A column, by its key; of shares where it is a method or a data set."""
    return COLUMNS.get(key, Column(f"{key} %", ()))


def published_numbers(table: Table, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that the paper has in a row, by column."""
    values = row.get("values", {})
    return {key: values[key] for key in table.columns if values.get(key) is not None}
