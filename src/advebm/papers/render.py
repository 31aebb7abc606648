"""Summaries that compare a reproduced table with the paper's, and their text."""

from collections.abc import Mapping
from typing import Any

from advebm.papers.agreement import judge_claims, row_verdict, table_verdict
from advebm.papers.inventory import Cell, Cells, Table, find_column, published_numbers

FORMER = "former settings"  # beside numbers that are to be measured again


def summarize(table: Table, scale: str, cells: Cells, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``results/NAME-SCALE.json``, which has all that reports show.

    Its keys are:

    - ``table``, ``paper``, ``item``, ``what``, ``scale``, ``verdict`` and ``why``;
    - ``about``: ``command``, ``seeds``, ``date``, ``hardware``, ``settings`` (of the scale), ``trained`` (for each
      run, the number of training images seen and of those in the data) and perhaps ``former`` (row or column of numbers
      that are to be measured again -> the settings that they were measured with);
    - ``columns``: published key -> heading;
    - ``rows``: each with ``name``, ``status``, ``note``, ``published`` (key -> number), ``code`` (results of reference
      code, if known), ``ours`` (key -> ``value``, ``error``, ``n``, ``seeds``, ``measured`` and, of samples, the
      settings of their ``sampler``; ``error`` is the standard error over n images, or with several training or sampling
      seeds the deviation over them) and ``verdict``;
    - ``claims``: each with ``claim``, ``places`` (row and column of both sides), ``doubtful``, ``verdict`` and, if
      measured, ``difference``, ``error``, ``published`` (the paper's difference, None if unknown) and their ``unit``.
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
    rows, former = [row for row in summary["rows"] if row["ours"]], summary["about"].get("former", {})
    coded = any(row["code"] for row in rows)
    published = {key for row in summary["rows"] for key in row["published"]}
    headings = ["", "status"]
    for key, heading in summary["columns"].items():
        measured = {row["ours"][key]["measured"] for row in rows if key in row["ours"]}
        own = f"{measured.pop()}{' %' * (find_column(key).scale == 100)}" if len(measured) == 1 else heading
        headings += [f"{heading}, paper"] * (key in published)
        headings += [", ".join([f"{own}, ours (n)", *[FORMER] * (key in former)])]
    lines = []
    for row in rows:
        status = "" if row["status"] == "runnable" else row["status"]
        line = [row["name"], ", ".join(filter(None, [status, FORMER * (row["name"] in former)]))]
        for key in summary["columns"]:
            line += [f"{row['published'][key]:g}" if key in row["published"] else ""] * (key in published)
            line += [_format_cell(row["ours"].get(key))]
        line += [", ".join(f"{summary['columns'][k]} {v:g}" for k, v in row["code"].items())] * coded
        lines.append([*line, row["verdict"]])
    return [*headings, *["reference code"] * coded, "verdict"], lines


def _format_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    times = f"{cell['seeds']} x " if cell["seeds"] > 1 else ""
    return f"{cell['value']:.2f} ± {cell['error']:.2f} ({times}{cell['n']:,})"


def text_lines(summary: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return how, where and when it was measured; then lines with samplers, claims, unmeasured rows and the verdict."""
    about, rows = summary["about"], summary["rows"]
    seeds = f"{about['seeds']} training seed{'s' * (about['seeds'] > 1)}"
    where = [f"scale {summary['scale']}: {about['settings']}", seeds, about["hardware"], about["date"]]
    lines = [_format_claim(claim, about.get("former", {})) for claim in summary["claims"]]
    samplers = {row["name"]: cell["sampler"] for row in rows for cell in row["ours"].values() if "sampler" in cell}
    if listed := [f"{name}: {format_sampler(sampler)}" for name, sampler in samplers.items() if sampler["steps"]]:
        lines.insert(0, f"samplers: {'; '.join(listed)}")
    published = [row for row in rows if row["status"] != "unpublished"]
    if missing := sum(not row["ours"] for row in published):
        lines.append(f"{missing} of the paper's {len(published)} rows have no number here")
    verdict = ". ".join(filter(None, [summary["verdict"], summary["why"]]))
    return "; ".join(where), [*lines, f"verdict: {verdict}"]


def format_sampler(sampler: Mapping[str, Any]) -> str:
    """Return what :func:`advebm.sampling.tune.tune` searches of a sampler, such as ``16 steps of 0.25, noise 0.01``."""
    text = f"{sampler['steps']} steps of {sampler['step_size']:g}"
    if sampler["noise"]:
        text += f", noise {sampler['noise']:g}"
    if sampler["radius"]:
        text += f", within {sampler['radius']:g} of the seed"
    return text


def _format_claim(claim: Mapping[str, Any], former: Mapping[str, str]) -> str:
    """Return a claim with our difference, the paper's, the verdict and what speaks against relying on it."""
    text = claim["claim"]
    if "difference" in claim:
        text += f" by {claim['difference']:.2f} ± {claim['error']:.2f} {claim['unit']}"
        text += "" if claim["published"] is None else f" (paper: {claim['published']:.2f})"
    doubts = ["on a doubtful number: does not count"] * claim["doubtful"]
    if "difference" in claim and any(name in former for place in claim["places"] for name in place):
        doubts.append(FORMER)
    return f"{text}: {claim['verdict']}" + f" ({'; '.join(doubts)})" * bool(doubts)
