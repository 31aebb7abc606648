"""The inventory of published results ``papers.yaml``: its items, tables and columns."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from advebm.core.errors import UserError, unknown_name

Records = list[dict[str, Any]]
Cell = dict[str, Any]  # one number of ours: value, error, n (images), seeds, measured (name of the quantity)
Cells = dict[str, dict[str, Cell]]  # by row and column


@functools.cache
def papers() -> list[dict[str, Any]]:
    """Load the inventory: the items that each paper publishes, and what reproduces them."""
    return yaml.safe_load(files("advebm.papers").joinpath("papers.yaml").read_text())["papers"]


class Column(NamedTuple):
    """A published quantity.

    Attributes:
        heading: its name in the papers.
        records: patterns of records that measure it, for :func:`advebm.metrics.keys.matches`, the preferred one first.
        scale: factor from a record's value to the published unit.
        tolerance: difference from the published number that counts as agreement regardless of errors, published unit.
        relative: whether differences are compared with the paper's in percent of the mean of both sides, as the scale
            of the quantity depends on the features it is computed in.
    """

    heading: str
    records: tuple[Mapping[str, Any], ...]
    scale: float = 100.0
    tolerance: float = 1.0
    relative: bool = False


def _feature_patterns(quantity: str) -> tuple[Mapping[str, Any], ...]:
    """Return patterns for a quantity in Inception features, as published, or else in any features."""
    return {"quantity": quantity, "space": "inception"}, {"quantity": quantity}


COLUMNS = {
    "clean": Column("clean %", ({"quantity": "accuracy"},)),
    "pgd50": Column("PGD-50 %", ({"quantity": "accuracy", "attack": "PGD", "steps": 50},)),
    "cw": Column("C&W %", ({"quantity": "accuracy", "attack": "C&W"},)),
    "aa": Column("AutoAttack %", ({"quantity": "accuracy", "attack": "AutoAttack"},)),
    "is": Column("IS", _feature_patterns("class score"), 1.0, 0.2, relative=True),
    "fid": Column("FID", _feature_patterns("FD"), 1.0, 2.0, relative=True),
}


@dataclass(frozen=True)
class Table:
    """A published table that ``advebm reproduce NAME --scale SCALE`` reproduces: an item of ``papers.yaml``.

    Attributes:
        paper, item, what: the paper's key, the item's id and its description.
        rows: the published rows: name, status, values.
        name: name of the table in commands.
        by: how it is computed, a key of :data:`advebm.reproduction.tables.COMPUTATIONS`.
        scales: supported :data:`advebm.reproduction.scales.SCALES`, each with the number of images that every row is
            trained on, see :func:`advebm.reproduction.tables.shorten`; 0: as many as its recipe says.
        columns: keys of published values, each with the title of its results, empty for keys of :data:`COLUMNS`.
        ours: what a row is compared with: a method of recipes ``DATA-METHOD``, alone or as ``{method, sampler, start,
            stage}`` (``sampler`` replaces the recipe's and begins from ``start``, by default class Gaussians; stage
            ``first`` is the model before its last stage); a title of results; or, if columns have titles, patterns of
            records as in :class:`Column`.
        claims: what the table shows, ``IN: MORE > LESS``: IN is a column and the others are rows, or vice versa.
        data: data set in the names of the recipes, ``DATA-METHOD``.
        digits: family of recipes used at the scale ``digits``.
        recipes: recipe names that deviate from ``DATA-METHOD``, by method and by network size of the scale, or
            ``digits``.
        beside: unpublished rows shown below the published ones, methods or titles of results, each with a note.
        why: explanation of the verdict, by scale.
        runs: name of another table that uses the same runs.
    """

    paper: str
    item: str
    what: str
    rows: tuple[Mapping[str, Any], ...]
    name: str
    by: str
    scales: Mapping[str, int]
    columns: Mapping[str, str]
    ours: Mapping[str, Any]
    claims: tuple[str, ...] = ()
    data: str = "cifar10"
    digits: str = ""
    recipes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    runs: str = ""

    def images(self, scale: str) -> int:
        """Return how many images every row is trained on at a scale the table supports; 0: as its recipe says."""
        if scale not in self.scales:
            raise UserError(f"{self.name} has no scale {scale!r}; it has {', '.join(self.scales)}")
        return self.scales[scale]

    def methods(self) -> list[str]:
        """Return what to train: titles of the columns, if they have any; else methods of ``ours`` and ``beside``."""
        titles = [title for title in self.columns.values() if title]
        titles = titles or [self.of(name)["method"] for name in (*self.ours, *self.beside)]
        return list(dict.fromkeys(title.partition(", ")[0] for title in titles))

    def of(self, name: str) -> dict[str, Any]:
        """Return what a row is compared with, ``{method, …}``; ``method`` may be a title that starts with a method."""
        ours = self.ours.get(name, name)
        return ours if isinstance(ours, dict) else {"method": ours}

    def row(self, name: str) -> Mapping[str, Any]:
        """Return the row called ``name``; one of status ``unpublished`` if the paper has none."""
        own = {"name": name, "status": "unpublished", "note": self.beside.get(name, "")}
        return next((row for row in self.rows if row["name"] == name), own)

    def names(self) -> list[str]:
        """Return the names of the published rows and of the unpublished ones in ``beside``."""
        return [*(row["name"] for row in self.rows), *self.beside]


def tables() -> dict[str, Table]:
    """Return the tables of the inventory that can be reproduced, by name."""
    by_name = {}
    for paper in papers():
        for item in paper["items"]:
            if spec := item.get("table"):
                named = {key: spec.get(key, {}) for key in ("columns", "beside")}
                named = {k: v if isinstance(v, Mapping) else dict.fromkeys(v, "") for k, v in named.items()}
                about = {"paper": paper["key"], "item": item["id"], "what": item["what"], "rows": tuple(item["rows"])}
                by_name[spec["name"]] = Table(**about, **{**spec, **named})
    return by_name


def find_table(name: str) -> Table:
    if name not in tables():
        raise unknown_name("table", name, tables())
    return tables()[name]


def find_column(key: str) -> Column:
    """Return the column of a key; for others, such as methods and data sets, a column in percent."""
    return COLUMNS.get(key, Column(f"{key} %", ()))


def published_numbers(table: Table, row: Mapping[str, Any]) -> dict[str, float]:
    values = row.get("values", {})
    return {key: values[key] for key in table.columns if values.get(key) is not None}
