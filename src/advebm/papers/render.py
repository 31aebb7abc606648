"""Summaries that compare a reproduced table with the paper's, and their text."""

from collections.abc import Mapping
from typing import Any

from advebm.papers.agreement import judge_claims, row_verdict, table_verdict
from advebm.papers.inventory import Cell, Cells, Table, find_column, published_numbers


def summarize(table: Table, scale: str, cells: Cells, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``results/NAME-SCALE.json``, which has all that reports show.

    Its keys are:

    - ``table``, ``paper``, ``item``, ``what``, ``scale``, ``verdict`` and ``why``;
    - ``about``: ``command``, ``seeds``, ``date``, ``hardware``, ``settings`` (of the scale) and ``trained`` (for each
      run, the number of training images seen and of those in the data);
    - ``columns``: published key -> heading;
    - ``rows``: each with ``name``, ``status``, ``note``, ``published`` (key -> number), ``code`` (results of reference
      code, if known), ``ours`` (key -> ``value``, ``error``, ``n``, ``seeds``, ``measured``; ``error`` is the standard
      error over n images, or with several training or sampling seeds the deviation over them) and ``verdict``;
    - ``claims``: each with ``claim``, ``rows``, ``doubtful``, ``verdict`` and, if measured, ``difference``, ``error``.
    """
    claims = judge_claims(table, cells)
    rows = []
    for name in table.names():
        row = table.row(name)
        entry: dict[str, Any] = {"name": name, "status": row["status"], "note": row.get("note", "")}
        entry |= {"published": published_numbers(table, row), "code": row.get("code", {}), "ours": cells.get(name, {})}
        rows.append({**entry, "verdict": row_verdict(table, name, scale, cells, claims)})
    return {
        "table": table.name,
        "paper": table.paper,
        "item": table.item,
        "what": table.what,
        "scale": scale,
        "about": dict(about),
        "columns": {key: f"{title} %" if title else find_column(key).heading for key, title in table.columns.items()},
        "rows": rows,
        "claims": claims,
        "verdict": table_verdict(table, scale, cells, claims),
        "why": table.why.get(scale, ""),
    }


def text_table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and a line for each row that has numbers of ours, each to the right of the paper's.

    The heading of ours names what was measured, so that a distance in other features is not labelled FID.
    """
    rows = [row for row in summary["rows"] if row["ours"]]
    coded = any(row["code"] for row in rows)
    headings = ["", "status"]
    for key, heading in summary["columns"].items():
        measured = {row["ours"][key]["measured"] for row in rows if key in row["ours"]}
        own = f"{measured.pop()}{' %' * (find_column(key).scale == 100)}" if len(measured) == 1 else heading
        headings += [f"{heading}, paper", f"{own}, ours (n)"]
    lines = []
    for row in rows:
        line = [row["name"], "" if row["status"] == "runnable" else row["status"]]
        for key in summary["columns"]:
            published = f"{row['published'][key]:g}" if key in row["published"] else ""
            line += [published, _format_cell(row["ours"].get(key))]
        line += [", ".join(f"{summary['columns'][k]} {v:g}" for k, v in row["code"].items())] * coded
        lines.append([*line, row["verdict"]])
    return [*headings, *["reference code"] * coded, "verdict"], lines


def _format_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    times = f"{cell['seeds']} x " if cell["seeds"] > 1 else ""
    return f"{cell['value']:.2f} ± {cell['error']:.2f} ({times}{cell['n']:,})"


def text_lines(summary: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return how, where and when it was measured; then lines with the claims, unmeasured rows and the verdict."""
    about, rows = summary["about"], summary["rows"]
    seeds = f"{about['seeds']} training seed{'s' * (about['seeds'] > 1)}"
    where = [f"scale {summary['scale']}: {about['settings']}", seeds, about["hardware"], about["date"]]
    claims = []
    for claim in summary["claims"]:
        by = f" by {claim['difference']:.2f} ± {claim['error']:.2f}" if "difference" in claim else ""
        doubt = " (on a doubtful number: does not count)" if claim["doubtful"] else ""
        claims.append(f"{claim['claim']}{by}: {claim['verdict']}{doubt}")
    if missing := sum(not row["ours"] for row in rows):
        published = sum(row["status"] != "unpublished" for row in rows)
        claims.append(f"{missing} of the paper's {published} rows have no number here")
    verdict = ". ".join(filter(None, [summary["verdict"], summary["why"]]))
    return "; ".join(where), [*claims, f"verdict: {verdict}"]
