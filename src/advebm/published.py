"""What the papers publish beside what was measured here: the inventory, its tables, their claims, and verdicts."""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from advebm.errors import UserError, unknown

Records = list[dict[str, Any]]
Cell = dict[str, Any]  # of one number here: value, error, n, seeds, and the name of what was measured
Cells = dict[str, dict[str, Cell]]  # by row and column


@functools.cache
def papers() -> list[dict[str, Any]]:
    """The inventory ``papers.yaml``: what the papers publish, item by item, and what makes it."""
    return yaml.safe_load(files("advebm").joinpath("papers.yaml").read_text())["papers"]


class Column(NamedTuple):
    """A published quantity.

    Attributes:
        heading: what the papers call it.
        records: what our records of it are called, as patterns, the best first.
        scale: from a record's value to the published one's.
        tolerance: how far apart two full measurements may be whatever their errors say, in the published unit.
    """

    heading: str
    records: tuple[str, ...]
    scale: float = 100.0
    tolerance: float = 1.0


COLUMNS = {
    "clean": Column("clean %", ("accuracy",)),
    "pgd50": Column("PGD-50 %", ("accuracy under PGD-50 *",)),
    "cw": Column("C&W %", ("accuracy under C&W-*",)),
    "aa": Column("AutoAttack %", ("accuracy under AutoAttack*",)),
    "is": Column("IS", ("IS", "class score (*"), 1.0, 0.2),
    "fid": Column("FID", ("FID", "FD (*"), 1.0, 2.0),
}


@dataclass(frozen=True)
class Table:
    """A published table that ``advebm reproduce NAME --scale SCALE`` carries out: an item of ``papers.yaml``.

    Attributes:
        paper, item, what: of the inventory.
        rows: of the inventory.
        name: of the table.
        by: what its computation is, of :data:`advebm.scales.COMPUTATIONS`.
        scales: of :data:`advebm.scales.SCALES`, each with the share of the recipes' training images.
        columns: keys of published values: those of :data:`COLUMNS`, or each with the title of its results.
        ours: what stands beside a row: a method, by the stem of its recipes, alone or as ``{method, sampler, stage}``
            (a sampler from class Gaussians rather than the recipe's; ``first``, what it was before its last stage); the
            title of its results; or, where columns have titles, patterns of its records.
        claims: what the table is about, ``IN: MORE > LESS``: IN is a column and the others are rows, or vice versa.
        data: whose recipes, ``DATA-METHOD``.
        digits: whose recipes at the scale of that name.
        recipes: of methods whose recipes are called otherwise, by the size of networks (:class:`advebm.scales.Scale`).
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


def find(name: str) -> Table:
    """A table by its name."""
    if name not in tables():
        raise unknown("table", name, tables())
    return tables()[name]


def heading(key: str) -> Column:
    """A column, by its key; of shares where it is a method or a data set."""
    return COLUMNS.get(key, Column(f"{key} %", ()))


def cells(table: Table, results: Mapping[str, Records]) -> Cells:
    """The numbers of the results, by title, that stand where the table has its own."""
    found: Cells = {}
    for name in table.names():
        for key, title in table.columns.items():
            patterns = table.ours.get(name, ()) if title else COLUMNS[key].records
            records = results.get(title or (name if name in results else table.of(name)["method"]), [])
            matching = (r for pattern in patterns for r in records if fnmatchcase(r["name"], pattern))
            if (record := next(matching, None)) is not None:
                scale = heading(key).scale
                value, error = scale * record["value"], scale * record["error"]
                about = {"n": record["count"], "seeds": record.get("seeds", 1), "measured": record["name"]}
                found.setdefault(name, {})[key] = {"value": value, "error": error, **about}
    return found


# Verdicts -------------------------------------------------------------------------------------------------------------

HOLDS, FAILS, OPEN = "holds", "fails", "within errors"
SAME, SHAPE, PART = "reproduced", "reproduced in shape", "reproduced in part"
NOT, NONE = "not reproduced", "not measured"


def standard_error(cell: Cell) -> float:
    """Of a number: of one seed its error over images, of several their deviation over the root of how many."""
    return float(cell["error"]) / math.sqrt(cell["seeds"])


def close(row: Mapping[str, Any], key: str, cell: Cell) -> bool:
    """Whether a number is the published one, within two joint standard errors or the column's tolerance."""
    values = row["values"]
    joint = math.hypot(standard_error(cell), values.get(f"{key}_sd", 0.0))
    return abs(cell["value"] - values[key]) <= max(2 * joint, heading(key).tolerance)


def parts(table: Table, claim: str) -> list[tuple[str, str]]:
    """The row and the column of both sides of a claim, the larger first."""
    place, _, sides = claim.partition(": ")
    both = [side.strip() for side in sides.split(" > ")]
    if len(both) != 2:
        raise ValueError(f"a claim is IN: MORE > LESS, got {claim!r}")
    return [(side, place) if place in table.columns else (place, side) for side in both]


def judged(table: Table, found: Cells) -> Records:
    """What became of every claim: the difference with its joint standard error, and whether it has the stated sign.

    It holds, or fails, where the difference is more than two standard errors.  A claim on a published number that is in
    doubt is ``doubtful``: it does not count for the table.
    """
    judgements = []
    for claim in table.claims:
        places = parts(table, claim)
        more, less = (found.get(row, {}).get(key) for row, key in places)
        doubtful = any(table.row(row)["status"] == "doubtful" for row, _ in places)
        judgement: dict[str, Any] = {"claim": claim, "rows": [row for row, _ in places], "doubtful": doubtful}
        if more is None or less is None:
            judgements.append({**judgement, "verdict": NONE})
            continue
        difference, error = more["value"] - less["value"], math.hypot(standard_error(more), standard_error(less))
        verdict = OPEN if abs(difference) <= 2 * error else HOLDS if difference > 0 else FAILS
        judgements.append({**judgement, "difference": difference, "error": error, "verdict": verdict})
    return judgements


def row_verdict(table: Table, name: str, scale: str, found: Cells, claims: Records) -> str:
    """Of a row: its numbers at full scale, else how many of the claims that name it hold."""
    row = table.row(name)
    if scale == "full" and (met := {k: v for k, v in _targets(table, row, found).items() if v is not None}):
        far = [heading(key).heading for key, same in met.items() if not same]
        return f"{NOT}: {', '.join(far)}" if far else SAME
    own = [c["verdict"] for c in claims if name in c["rows"] and c["doubtful"] == (row["status"] == "doubtful")]
    return _counted(own)


def table_verdict(table: Table, scale: str, found: Cells, claims: Records) -> str:
    """Of a table: all its numbers at full scale, else, or where these differ, its claims on numbers not in doubt.

    What was not measured keeps a table from being more than reproduced in part.
    """
    if scale == "full":
        met = [same for row in table.rows for same in _targets(table, row, found).values()]
        if met and all(met):
            return SAME
    verdicts = [claim["verdict"] for claim in claims if not claim["doubtful"]]
    if not (count := _counted(verdicts)):
        return NONE
    missing = f", {n} {NONE}" if (n := verdicts.count(NONE)) else ""
    return f"{NOT if {FAILS, OPEN} & set(verdicts) else PART if missing else SHAPE}: {count}{missing}"


def printed(table: Table, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that the paper has in a row, by column."""
    values = row.get("values", {})
    return {key: values[key] for key in table.columns if values.get(key) is not None}


def _targets(table: Table, row: Mapping[str, Any], found: Cells) -> dict[str, bool | None]:
    """Whether each number of a row that is a target was met; None where it was not measured."""
    here = found.get(row["name"], {})
    keys = printed(table, row) if row["status"] == "runnable" else ()
    return {key: close(row, key, here[key]) if key in here else None for key in keys}


def _counted(verdicts: Iterable[str]) -> str:
    """How many of the claims that were measured hold; what became of the others."""
    measured = [verdict for verdict in verdicts if verdict != NONE]
    others = [f"{n} {words}" for what, words in ((FAILS, "fail"), (OPEN, OPEN)) if (n := measured.count(what))]
    count = f"{measured.count(HOLDS)} of {len(measured)} claims hold"
    return ", ".join([count, *others]) if measured else ""


def summary(table: Table, scale: str, found: Cells, about: Mapping[str, Any]) -> dict[str, Any]:
    """What ``results/NAME-SCALE.json`` holds, all that the page needs.

    ``table paper item what scale``; ``about``: ``command seeds date hardware settings`` (of the scale) and ``trained``
    (each run's training images, seen and there are); ``columns`` (published key -> heading); ``rows``: each with ``name
    status note``, ``published`` (key -> number), ``code`` (what reference code gives, where that is known), ``ours``
    (key -> ``value error n seeds measured``; ``error`` is a standard error over the n images, or with several training
    or sampling ``seeds`` the deviation over them) and ``verdict``; ``claims``: each with ``claim rows doubtful
    verdict`` and, where it was measured, ``difference error``; ``verdict``; ``why``.
    """
    claims = judged(table, found)
    rows = []
    for name in table.names():
        row = table.row(name)
        plain: dict[str, Any] = {"name": name, "status": row["status"], "note": row.get("note", "")}
        plain |= {"published": printed(table, row), "code": row.get("code", {}), "ours": found.get(name, {})}
        rows.append({**plain, "verdict": row_verdict(table, name, scale, found, claims)})
    return {
        "table": table.name,
        "paper": table.paper,
        "item": table.item,
        "what": table.what,
        "scale": scale,
        "about": dict(about),
        "columns": {key: f"{title} %" if title else heading(key).heading for key, title in table.columns.items()},
        "rows": rows,
        "claims": claims,
        "verdict": table_verdict(table, scale, found, claims),
        "why": table.why.get(scale, ""),
    }


def grid(plain: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A summary as text: headings, and a line a row that has numbers of ours, each right of the paper's.

    Ours are headed by what was measured, so that a distance in other features does not stand below the name FID.
    """
    rows = [row for row in plain["rows"] if row["ours"]]
    coded = any(row["code"] for row in rows)
    heads = ["", "status"]
    for key, head in plain["columns"].items():
        measured = {row["ours"][key]["measured"] for row in rows if key in row["ours"]}
        own = f"{measured.pop()}{' %' * (heading(key).scale == 100)}" if len(measured) == 1 else head
        heads += [f"{head}, paper", f"{own}, ours (n)"]
    lines = []
    for row in rows:
        line = [row["name"], "" if row["status"] == "runnable" else row["status"]]
        for key in plain["columns"]:
            line += [f"{row['published'][key]:g}" if key in row["published"] else "", _shown(row["ours"].get(key))]
        line += [", ".join(f"{plain['columns'][k]} {v:g}" for k, v in row["code"].items())] * coded
        lines.append([*line, row["verdict"]])
    return [*heads, *["reference code"] * coded, "verdict"], lines


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    times = f"{cell['seeds']} x " if cell["seeds"] > 1 else ""
    return f"{cell['value']:.2f} ± {cell['error']:.2f} ({times}{cell['n']:,})"


def lines(plain: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Where, when and how it was measured; then the claims, the verdict, and what it leaves out."""
    about, rows = plain["about"], plain["rows"]
    told = [
        f"scale {plain['scale']}: {about['settings']}",
        f"{about['seeds']} training seed{'s' * (about['seeds'] > 1)}",
    ]
    claims = []
    for claim in plain["claims"]:
        by = f" by {claim['difference']:.2f} ± {claim['error']:.2f}" if "difference" in claim else ""
        doubt = " (on a doubtful number: does not count)" if claim["doubtful"] else ""
        claims.append(f"{claim['claim']}{by}: {claim['verdict']}{doubt}")
    if left := sum(not row["ours"] for row in rows):
        claims.append(
            f"{left} of the paper's {sum(row['status'] != 'unpublished' for row in rows)} rows have no number here"
        )
    verdict = ". ".join(filter(None, [plain["verdict"], plain["why"]]))
    return "; ".join([*told, about["hardware"], about["date"]]), [*claims, f"verdict: {verdict}"]
