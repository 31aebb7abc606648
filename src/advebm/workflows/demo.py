"""The demo: train two classifiers of digits, one adversarially, draw images from that one and write a report."""

import dataclasses
from pathlib import Path
from typing import Any

from advebm import recipes
from advebm.core import config, console
from advebm.core.errors import Interrupted
from advebm.evaluation import evaluate
from advebm.reporting.build import report
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.workflows.sample import draw_set
from advebm.workflows.train import fit

PER_CLASS = 150
SETS = {f"{kind}-{start}": (kind, start) for start in ("class", "global") for kind in ("ta", "cs")}


def demo(folder: Path, *, seed: int = 0) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Train, sample, evaluate and report in ``folder``; return the report's path and the records by run.

    What an interrupted demo has left in the folder is kept, and gone on with.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the message contains the command that goes on.
    """
    try:
        return _demo(folder, seed)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; to go on: advebm demo --resume {folder}") from None


def _demo(folder: Path, seed: int) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    say = console.screen.print
    runs = {}
    for number, name in enumerate(("digits-standard", "digits-at"), 1):
        say(f"[{number}/5] train {name}")
        begun = (folder / name / "config.yaml").is_file()
        recipe = Run.open(folder / name).recipe if begun else resolve({**recipes.find(name), "seed": seed})
        runs[name], seed = fit(recipe, folder / name, resume=begun), recipe.seed
    robust = runs["digits-at"]
    say(f"[3/5] sample {PER_CLASS * 10:,} images each by {', '.join(SETS)}")
    for name, (kind, start) in SETS.items():
        recipe = resolve(config.describe(robust.recipe), [("sampler", kind), ("sampler.start", start)])
        if name not in robust.samples():
            draw_set(robust, name, recipe.sampler, PER_CLASS, seed=seed)
    say("[4/5] evaluate both; sample quality in the features of digits-standard")
    records = {}
    for name, run in runs.items():
        measured = evaluate.evaluate_run(run, features=runs["digits-standard"].folder, seed=seed)
        records[name] = [dataclasses.asdict(record) for record in measured]
    say("[5/5] report")
    return report(robust, beside=[runs["digits-standard"]], out=folder / "report.html"), records
