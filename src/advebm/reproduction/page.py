"""Write docs/results.md from results/*.json: ``python -m advebm.reproduction.page``."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from advebm.core import files
from advebm.core.errors import UserError
from advebm.papers import inventory, render
from advebm.reporting.records import markdown
from advebm.reproduction import study
from advebm.reproduction.scales import SCALES

HEAD = """# Results

Written by `make results` from `results/*.json`, which `advebm reproduce TABLE --scale SCALE` wrote; not by hand.

{scales}

Half an hour is a plan from the speed of single recipes, not measured; of two cores binary-at-table4 takes rather more.
Two hours are what `cifar10-at-2h` may take; DAT's second stage (20 minutes) and measuring come on top. `--row
at=cifar10-at-2h` takes the package's network instead of training it again.
At `full` each row is trained for as long as in its paper, at `cpu-2h` for as long as its recipe says. At the other
scales all rows of a table are trained on the same number of images (`table:` in `papers.yaml`); FREE takes an eighth
of them and uses each eight times, DAT's second stage comes on top of its first, and RST-AWP has as many images without
labels on top. `former settings` are numbers from before a row was changed, which are to be measured again. Beside a
number of ours stand its standard error over images and, in brackets, how many; `3 x` says that it is the deviation over
so many seeds of training or sampling.

The papers' FID and IS are of Inception features, ours at scale `full` alone: elsewhere they are FD and class score in
the features of a small network, which compare within a column and never with the paper's. On CIFAR-10 that network is
`cifar10-infonce`, trained without labels on CIFAR-10's training images, so that it favours no sampler that descends a
classifier's loss; its class score is that of a linear probe. On digits it is a standard classifier. Step size, noise,
ball and number of steps of every sampler are those of the lowest FD to validation images, out of one grid for all:
{grid}. Rows that end in `{common} steps` are the same at one number of steps. `no steps` is the baseline of samplers:
draws from the Gaussians that they begin from.

Verdicts are computed. At scale `full` a table is *reproduced* where every number is within two joint standard errors of
the paper's, or within {tolerances}.
At every other scale, and where that fails, what counts are the inequalities that the table is about. With d our
difference, s its standard error and p the paper's difference of the same two numbers, an inequality

- is *not resolvable* at this scale if p is smaller than 2 s: an effect of the paper's size could not be seen here. A d
  far from zero then has another cause than the paper's effect;
- else *holds* if d is above 2 s, and *fails* if d is below p - 2 s;
- else is *not resolvable*, too: neither no difference nor the paper's is ruled out.

Differences are in points. FID and IS change their scale with the features, so theirs are in percent of the mean of the
two numbers, the paper's of the paper's mean. Where the paper has no number for one side, p is 0 and the first line is
left out. The papers' own errors, most of them unknown, are left out of s; of a mean over seeds the standard error is
the deviation over the root of their number.

A table is *reproduced in shape* if every inequality that can be resolved holds, *in part* if some were not measured,
and *not reproduced* if one fails; if none holds or fails it is *undecided*. `doubtful` numbers contradict other
sources: inequalities on them are listed and do not count. `quoted` ones are other papers', `unpublished` rows are ours
alone.
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


def describe_grid() -> str:
    """Return in words which settings of samplers are tried."""
    factors = ", ".join(f"{factor:g}" for factor in study.FACTORS)
    noises = ", ".join(f"{noise:g}" for noise in study.NOISES)
    balls = ", ".join("none" if radius is None else f"{radius:g}" for radius in study.BALLS)
    steps = ", ".join(map(str, study.STEPS))
    return f"{factors} times its step size, noise {noises} or its own, radius {balls}, and {steps} steps"


def summary_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row per table of the papers."""
    rows = [
        [f"[{summary['table']}](#{name})", summary["what"], summary["scale"], summary["verdict"] + former]
        for name, summary in summaries.items()
        for former in (f" ({render.FORMER})" * ("former" in summary["about"]),)
    ]
    return markdown(["table", "what", "scale", "verdict"], rows)


def page(summaries: Mapping[str, Mapping[str, Any]], pictures: Iterable[str]) -> str:
    """Return the whole page as Markdown; ``pictures`` are the names of the summaries that have one."""
    scales = "\n".join(f"- `{name}`: {scale.about}." for name, scale in SCALES.items())
    tolerances = ", ".join(f"{c.tolerance:g} ({c.heading})" for c in inventory.COLUMNS.values())
    parts = [
        HEAD.format(scales=scales, tolerances=tolerances, grid=describe_grid(), common=study.COMMON_STEPS),
        summary_table(summaries),
    ]
    for name, summary in summaries.items():
        where, verdict = render.text_lines(summary)
        heading = f"{summary['what']} ({summary['paper']}, {summary['item']})"
        parts += [f"## {name}", heading, f"`{summary['about']['command']}`", f"{where}."]
        parts += [markdown(*render.text_table(summary)), "\n".join(f"- {line}" for line in verdict)]
        former = summary["about"].get("former", {}).items()
        listed = "; ".join(f"{summary['columns'].get(name, name)}: {settings}" for name, settings in former)
        parts += [f"Former settings, to be measured again: {listed}."] * bool(former)
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
