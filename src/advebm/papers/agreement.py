"""Compare our numbers with the published ones."""

import math
from collections.abc import Mapping, Sequence
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
                if "sampler" in record["settings"]:
                    about["sampler"] = record["settings"]["sampler"]
                cells.setdefault(name, {})[key] = {"value": value, "error": error, **about}
    return cells


HOLDS, FAILS, UNRESOLVED, NONE = "holds", "fails", "not resolvable", "not measured"
COUNTED = {HOLDS: "held", FAILS: "failed", UNRESOLVED: UNRESOLVED, NONE: NONE}  # how summaries count verdicts
SAME, SHAPE, PART = "reproduced", "reproduced in shape", "reproduced in part"
NOT, UNDECIDED = "not reproduced", "undecided"


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
    """Judge every claim; see :func:`claim_verdict`.

    Differences, their joint standard errors and the paper's differences are in the unit of the column: points, or for
    FID and IS, whose scale depends on the features, percent of the mean of both sides.  A claim about a row of status
    ``doubtful`` is ``doubtful``: it does not count for the table.
    """
    judgements = []
    for claim in table.claims:
        places = claim_sides(table, claim)
        larger, smaller = (cells.get(row, {}).get(key) for row, key in places)
        doubtful = any(table.row(row)["status"] == "doubtful" for row, _ in places)
        judgement: dict[str, Any] = {"claim": claim, "places": [list(place) for place in places], "doubtful": doubtful}
        if larger is None or smaller is None:
            judgements.append({**judgement, "verdict": NONE})
            continue
        relative = find_column(places[0][1]).relative
        difference = _difference(larger["value"], smaller["value"], relative)
        scale = 200.0 / (larger["value"] + smaller["value"]) if relative else 1.0
        error = scale * math.hypot(standard_error(larger), standard_error(smaller))
        high, low = (table.row(row).get("values", {}).get(key) for row, key in places)
        published = None if high is None or low is None else _difference(high, low, relative)
        judgement |= {"unit": "%" if relative else "points", "published": published}
        verdict = claim_verdict(difference, error, published)
        judgements.append({**judgement, "difference": difference, "error": error, "verdict": verdict})
    return judgements


def _difference(larger: float, smaller: float, relative: bool) -> float:
    """Return the difference of two numbers; ``relative``: in percent of their mean."""
    return 200.0 * (larger - smaller) / (larger + smaller) if relative else larger - smaller


def claim_verdict(difference: float, error: float, published: float | None) -> str:
    """Judge a claim that was measured, all in one unit, differences positive where they have the stated sign.

    - ``not resolvable``: the paper's difference is smaller than two standard errors of ours, so that our numbers could
      not have shown it, whatever they are.
    - ``holds``: ours is more than two standard errors above zero.
    - ``fails``: ours is more than two standard errors below the paper's, or below zero where the paper has no number.
    - ``not resolvable``, too: anything else, as neither no difference nor the paper's is ruled out.
    """
    if published is not None and published < 2 * error:
        return UNRESOLVED
    if difference > 2 * error:
        return HOLDS
    return FAILS if difference < (published or 0.0) - 2 * error else UNRESOLVED


def row_verdict(table: Table, name: str, scale: str, cells: Cells, claims: Records) -> str:
    """Judge a row: by its numbers at full scale, if any was measured; else count the verdicts of its claims."""
    row = table.row(name)
    if scale == "full" and (met := {k: v for k, v in _targets(table, row, cells).items() if v is not None}):
        missed = [find_column(key).heading for key, same in met.items() if not same]
        return f"{NOT}: {', '.join(missed)}" if missed else SAME
    if name not in cells:
        return ""
    doubtful = row["status"] == "doubtful"
    own = [c for c in claims if c["doubtful"] == doubtful and any(row == name for row, _ in c["places"])]
    return _count_verdicts([claim["verdict"] for claim in own])


def table_verdict(table: Table, scale: str, cells: Cells, claims: Records) -> str:
    """Judge a table: ``reproduced`` if all its target numbers are met at full scale; else by its claims.

    Doubtful claims are ignored, and those that are not resolvable decide nothing.  One that fails makes the table
    ``not reproduced``; else one that was not measured makes it ``reproduced in part``; else it is ``reproduced in
    shape``.  Where no claim holds or fails the table is ``undecided``, or ``not measured``.
    """
    if scale == "full":
        met = [same for row in table.rows for same in _targets(table, row, cells).values()]
        if met and all(met):
            return SAME
    verdicts = [claim["verdict"] for claim in claims if not claim["doubtful"]]
    if FAILS in verdicts:
        verdict = NOT
    elif HOLDS in verdicts:
        verdict = PART if NONE in verdicts else SHAPE
    elif UNRESOLVED in verdicts:
        verdict = UNDECIDED
    else:
        return NONE
    return f"{verdict}: {_count_verdicts(verdicts)}"


def _targets(table: Table, row: Mapping[str, Any], cells: Cells) -> dict[str, bool | None]:
    """Return whether each published number of a ``runnable`` row was met; None: not measured."""
    ours = cells.get(row["name"], {})
    keys = published_numbers(table, row) if row["status"] == "runnable" else ()
    return {key: is_close(row, key, ours[key]) if key in ours else None for key in keys}


def _count_verdicts(verdicts: Sequence[str]) -> str:
    """Return a text such as ``2 held, 1 failed, 1 not resolvable, 2 not measured``, without zeros."""
    return ", ".join(f"{n} {words}" for verdict, words in COUNTED.items() if (n := verdicts.count(verdict)))
