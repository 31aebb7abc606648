"""The demo: train one network twice on digits, adversarially and not, draw from both, evaluate and write a report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from advebm import recipes
from advebm.core import console
from advebm.core.errors import Interrupted
from advebm.evaluation import evaluate
from advebm.reporting.build import report
from advebm.reporting.records import RatedSet, best_set, find_accuracies, rate_sets
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.workflows.sample import draw_set
from advebm.workflows.train import fit

STANDARD, ROBUST = "digits-standard", "digits-at"  # recipes, and names of the runs
PER_CLASS = 150
SETS = {f"{kind}-{start}": (kind, start) for start in ("class", "global") for kind in ("ta", "cs")}

Records = Sequence[Mapping[str, Any]]


class Demo(NamedTuple):
    """What the demo has made.

    Attributes:
        runs: the two runs by title.
        records: their records, the newest of each kind, by title.
        conclusion: what the numbers say.
        report: path of the report.
    """

    runs: dict[str, Run]
    records: dict[str, list[dict[str, Any]]]
    conclusion: str
    report: Path


def demo(folder: Path, *, seed: int = 0) -> Demo:
    """Train, sample, evaluate and report in ``folder``.

    What an interrupted demo has left in the folder is kept, and gone on with.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the message contains the command that goes on.
    """
    try:
        return _demo(folder, seed)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; to go on: advebm demo --resume {folder}") from None


def _demo(folder: Path, seed: int) -> Demo:
    say = console.screen.print
    runs = {}
    for number, name in enumerate((STANDARD, ROBUST), 1):
        say(f"[{number}/5] train {name}")
        begun = (folder / name / "config.yaml").is_file()
        recipe = Run.open(folder / name).recipe if begun else resolve({**recipes.find(name), "seed": seed})
        runs[name], seed = fit(recipe, folder / name, resume=begun), recipe.seed
    say(f"[3/5] sample {PER_CLASS * 10:,} images each by {', '.join(SETS)} from both")
    for run in runs.values():
        for name, (kind, start) in SETS.items():
            if name not in run.samples():
                sampler = run.recipe.with_sampler(kind, [("sampler.start", start)]).sampler
                draw_set(run, name, sampler, PER_CLASS, seed=seed)
    say(f"[4/5] evaluate both; sample quality in the features of {STANDARD}")
    for run in runs.values():
        evaluate.evaluate_run(run, features=runs[STANDARD].folder, seed=seed)
    records = {name: evaluate.newest_records(run.records()) for name, run in runs.items()}
    conclusion = conclude(records, runs[ROBUST].recipe.threat)
    say("[5/5] report")
    path = report(runs[ROBUST], beside=[runs[STANDARD]], out=folder / "report.html", sentence=conclusion)
    return Demo(runs, records, conclusion, path)


def conclude(records: Mapping[str, Records], threat: Any) -> str:
    """Return in words whether the adversarially trained network is more robust, and draws better, by their records.

    Two numbers are called equal where they differ by less than two standard errors.  Samples are those of the search
    that is best on the adversarially trained network, and of the same search on the standard one; a star marks that its
    own network judges those.
    """
    before, after = (find_accuracies(records[name], threat)[1] for name in (STANDARD, ROBUST))
    parts = []
    if before is not None and after is not None:
        was, now = (f"{100 * r['value']:.0f} %" for r in (before, after))
        parts.append(
            {
                1: f"keeps {now} accuracy under attack instead of {was}",
                0: f"is no more robust: {now} accuracy under attack against {was}",
                -1: f"is less robust: {now} accuracy under attack against {was}",
            }[_compare(after, before)]
        )
    if (pair := _same_search(records)) is not None:
        best, other = pair
        near, far = best.records["FD"], other.records["FD"]
        distance = {1: "farther from", 0: "as far from", -1: "nearer to"}[_compare(near, far)]
        numbers = f"FD {near['value']:.3g} against {far['value']:.3g}{'*' * other.judges_itself}"
        parts.append(f"its samples are {distance} real digits: {numbers} by the same search, {best.name}")
    return f"Trained on adversarial examples, the same network {', and '.join(parts) or 'was not measured'}."


def _compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> int:
    """Return the sign of a - b; 0 if they differ by less than two standard errors."""
    difference = a["value"] - b["value"]
    return 0 if abs(difference) < 2 * math.hypot(a["error"], b["error"]) else int(math.copysign(1, difference))


def _same_search(records: Mapping[str, Records]) -> tuple[RatedSet, RatedSet] | None:
    """Return the best set of the adversarially trained network and that of the same name of the standard one."""
    for sets in rate_sets(records).values():
        best = best_set(s for s in sets if s.run == ROBUST)
        other = next((s for s in sets if best is not None and (s.run, s.name) == (STANDARD, best.name)), None)
        if best is not None and other is not None:
            return best, other
    return None
