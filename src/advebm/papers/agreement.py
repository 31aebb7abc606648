"""Compare our numbers with the published ones."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from advebm.metrics.keys import first_match
from advebm.papers.inventory import COLUMNS, Cell, Cells, Records, Table, find_column, published_numbers


def table_cells(table: Table, results: Mapping[str, Records]) -> Cells:
    """Return our number for each cell of the table that the results, records by title, have one for."""
    cells: Cells = {}
    for name in table.names():
        for key, title in table.columns.items():
            patterns = table.ours.get(name, ()) if title else COLUMNS[key].records
            records = results.get(title or (name if name in results else table.of(name)["method"]), [])
            if (record := first_match(records, patterns)) is not None:
                scale = find_column(key).scale
                value, error = scale * record["value"], scale * record["error"]
                about = {"n": record["count"], "seeds": record.get("seeds", 1), "measured": record["name"]}
                cells.setdefault(name, {})[key] = {"value": value, "error": error, **about}
    return cells


HOLDS, FAILS, OPEN = "holds", "fails", "within errors"
SAME, SHAPE, PART = "reproduced", "reproduced in shape", "reproduced in part"
NOT, NONE = "not reproduced", "not measured"


def standard_error(cell: Cell) -> float:
    """Return the standard error: over images for one seed; for several, their deviation / √(number of seeds)."""
    return float(cell["error"]) / math.sqrt(cell["seeds"])


def is_close(row: Mapping[str, Any], key: str, cell: Cell) -> bool:
    """Return whether a number is within two joint standard errors, or the column's tolerance, of the published one."""
    values = row["values"]
    joint = math.hypot(standard_error(cell), values.get(f"{key}_sd", 0.0))
    return abs(cell["value"] - values[key]) <= max(2 * joint, find_column(key).tolerance)


def claim_sides(table: Table, claim: str) -> list[tuple[str, str]]:
    """Return (row, column) of both sides of a claim ``IN: MORE > LESS``, the larger first."""
    place, _, sides = claim.partition(": ")
    names = [side.strip() for side in sides.split(" > ")]
    if len(names) != 2:
        raise ValueError(f"a claim is IN: MORE > LESS, got {claim!r}")
    return [(name, place) if place in table.columns else (place, name) for name in names]


def judge_claims(table: Table, cells: Cells) -> Records:
    """Judge every claim: its difference with the joint standard error, and whether the difference has the stated sign.

    A claim holds or fails if the difference exceeds two standard errors; otherwise it is ``within errors``.  A claim
    about a row of status ``doubtful`` is ``doubtful``: it does not count for the table.
    """
    judgements = []
    for claim in table.claims:
        places = claim_sides(table, claim)
        larger, smaller = (cells.get(row, {}).get(key) for row, key in places)
        doubtful = any(table.row(row)["status"] == "doubtful" for row, _ in places)
        judgement: dict[str, Any] = {"claim": claim, "rows": [row for row, _ in places], "doubtful": doubtful}
        if larger is None or smaller is None:
            judgements.append({**judgement, "verdict": NONE})
            continue
        difference = larger["value"] - smaller["value"]
        error = math.hypot(standard_error(larger), standard_error(smaller))
        verdict = OPEN if abs(difference) <= 2 * error else HOLDS if difference > 0 else FAILS
        judgements.append({**judgement, "difference": difference, "error": error, "verdict": verdict})
    return judgements


def row_verdict(table: Table, name: str, scale: str, cells: Cells, claims: Records) -> str:
    """Judge a row: by its numbers at full scale, if any was measured; else by the share of its claims that hold."""
    row = table.row(name)
    if scale == "full" and (met := {k: v for k, v in _targets(table, row, cells).items() if v is not None}):
        missed = [find_column(key).heading for key, same in met.items() if not same]
        return f"{NOT}: {', '.join(missed)}" if missed else SAME
    doubtful = row["status"] == "doubtful"
    return _count_verdicts([c["verdict"] for c in claims if name in c["rows"] and c["doubtful"] == doubtful])


def table_verdict(table: Table, scale: str, cells: Cells, claims: Records) -> str:
    """Judge a table: ``reproduced`` if all its target numbers are met at full scale; else by its claims.

    Doubtful claims are ignored.  One that fails or is within errors makes the table ``not reproduced``; else one that
    was not measured makes it ``reproduced in part``.
    """
    if scale == "full":
        met = [same for row in table.rows for same in _targets(table, row, cells).values()]
        if met and all(met):
            return SAME
    verdicts = [claim["verdict"] for claim in claims if not claim["doubtful"]]
    if not (count := _count_verdicts(verdicts)):
        return NONE
    missing = f", {n} {NONE}" if (n := verdicts.count(NONE)) else ""
    return f"{NOT if {FAILS, OPEN} & set(verdicts) else PART if missing else SHAPE}: {count}{missing}"


def _targets(table: Table, row: Mapping[str, Any], cells: Cells) -> dict[str, bool | None]:
    """Return whether each published number of a ``runnable`` row was met; None: not measured."""
    ours = cells.get(row["name"], {})
    keys = published_numbers(table, row) if row["status"] == "runnable" else ()
    return {key: is_close(row, key, ours[key]) if key in ours else None for key in keys}


def _count_verdicts(verdicts: Iterable[str]) -> str:
    """Return a text that counts the measured claims that hold, fail or are within errors; empty if none is."""
    measured = [verdict for verdict in verdicts if verdict != NONE]
    others = [f"{n} {words}" for what, words in ((FAILS, "fail"), (OPEN, OPEN)) if (n := measured.count(what))]
    count = f"{measured.count(HOLDS)} of {len(measured)} claims hold"
    return ", ".join([count, *others]) if measured else ""
