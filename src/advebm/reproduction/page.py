"""Write docs/results.md from results/*.json: ``python -m advebm.reproduction.page``."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from advebm.core import files
from advebm.core.errors import UserError
from advebm.papers import inventory, render
from advebm.reporting.records import markdown
from advebm.reproduction.scales import SCALES

HEAD = """# Results

Written by `make results` from `results/*.json`, which `advebm reproduce TABLE --scale SCALE` wrote; not by hand.

{scales}

Half an hour is a plan from the speed of single recipes, not measured; of two cores binary-at-table4 takes rather more.
Two hours are what `cifar10-at-2h` may take; judges (19 minutes), DAT's second stage (20) and measuring (an hour
for its three tables) come on top.
How many of its recipe's images a row is trained on is fixed for each table and scale (`table:` in `papers.yaml`), so
that results of different machines can be compared. Beside a number of ours stand its standard error over images and, in
brackets, how many; `3 x` says that it is the deviation over so many seeds of training or sampling. The papers' FID
and IS are of Inception features, ours at scale `full` alone: elsewhere they are FD and class score in the features
of a small classifier, which compare within a column and never with the paper's.

Verdicts are computed. At scale `full` a table is *reproduced* where every number is within two joint standard errors of
the paper's, or within {tolerances}.
At every other scale, and where that fails, it is *reproduced in shape* if each inequality that it is about holds by
more than two joint standard errors, *in part* if those that were measured do, else *not reproduced*. The standard error
of a mean over seeds is its deviation over the root of their number. `doubtful` numbers contradict other sources: claims
on them are listed and do not count. `quoted` ones are other papers', `unpublished` rows are ours alone.
"""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the summaries in a folder by file name, with verdicts recomputed from the current inventory."""
    summaries = {path.stem: files.read_json(path) for path in folder.glob("*.json")}
    order = [f"{table}-{scale}" for table in inventory.tables() for scale in SCALES]
    if unknown := summaries.keys() - set(order):
        raise UserError(f"{folder / sorted(unknown)[0]}.json is not named TABLE-SCALE.json")
    return {name: resummarize(summaries[name]) for name in order if name in summaries}


def resummarize(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new summary of the same measurements, judged by the current inventory."""
    cells = {row["name"]: row["ours"] for row in summary["rows"] if row["ours"]}
    table = inventory.find_table(summary["table"])
    if unknown := cells.keys() - set(table.names()):
        raise UserError(f"{table.name} was measured with a row {sorted(unknown)[0]!r}, which papers.yaml has no more")
    return render.summarize(table, summary["scale"], cells, summary["about"])


def summary_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row per table of the papers."""
    rows = [
        [f"[{summary['table']}](#{name})", summary["what"], summary["scale"], summary["verdict"]]
        for name, summary in summaries.items()
    ]
    return markdown(["table", "what", "scale", "verdict"], rows)


def page(summaries: Mapping[str, Mapping[str, Any]], pictures: Iterable[str]) -> str:
    """Return the whole page as Markdown; ``pictures`` are the names of the summaries that have one."""
    scales = "\n".join(f"- `{name}`: {scale.about}." for name, scale in SCALES.items())
    tolerances = ", ".join(f"{c.tolerance:g} ({c.heading})" for c in inventory.COLUMNS.values())
    parts = [
        HEAD.format(scales=scales, tolerances=tolerances),
        summary_table(summaries),
    ]
    for name, summary in summaries.items():
        where, verdict = render.text_lines(summary)
        heading = f"{summary['what']} ({summary['paper']}, {summary['item']})"
        parts += [f"## {name}", heading, f"`{summary['about']['command']}`", f"{where}."]
        parts += [markdown(*render.text_table(summary)), "\n".join(f"- {line}" for line in verdict)]
        notes = [f"{row['name']}: {row['note']}" for row in summary["rows"] if row["ours"] and row["note"]]
        trained = (f"{run} {images}" for run, images in summary["about"]["trained"].items())
        parts += [f"Notes. {'. '.join(notes)}."] * bool(notes) + [f"Trained on: {'; '.join(trained)}."]
        parts += [f"![Samples, {name}](../results/{name}.png)"] * (name in set(pictures))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write(root: Path) -> None:
    """Write the page and the recomputed summaries into the checkout ``root``."""
    summaries = load(root / "results")
    for name, summary in summaries.items():
        files.write_json(root / "results" / f"{name}.json", summary)
    files.write(root / "docs" / "results.md", page(summaries, [path.stem for path in (root / "results").glob("*.png")]))


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
