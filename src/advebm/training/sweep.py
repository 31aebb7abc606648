"""The trials of a sweep: combinations of options, what their training costs, and what they score in validation."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from advebm.core import config, files, notebook
from advebm.core.errors import UserError
from advebm.data.sources import find_spec
from advebm.runs.optim import SGD, Cosine
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.training.cost import estimates, images_in_whole_batches
from advebm.training.hardware import TERA
from advebm.training.validate import SELECTED

Options = Mapping[str, Any]  # options of a recipe, such as ``{"optimizer.lr": 0.05}``
By = Literal["robust", "clean", "fd"]
# What is logged under these names: of a classifier, a critic or an encoder, and of samples
LOGGED: Mapping[str, Sequence[str]] = {"robust": SELECTED[::2], "clean": SELECTED[1::2], "fd": ("val/fd",)}
PROPORTIONS = ("val/robust_accuracy", "val/accuracy")  # shares of independent images, so that n gives the error
LONGEST_NAME = 150  # characters of a trial's folder, which file systems limit


def combine(vary: Mapping[str, Sequence[Any]], given: Sequence[Options] = ()) -> list[dict[str, Any]]:
    """Return every combination of the values of ``vary``, with each of the combinations ``given``; none twice.

    An empty combination is the recipe itself.

    Raises:
        UserError: there is no combination, or an option is in both.
    """
    for name in vary:
        if not vary[name]:
            raise UserError(f"{name} has no values to try")
        if any(name in options for options in given):
            raise UserError(f"{name} varies in the given combinations; leave it out of the options that all combine")
    if not vary and not any(given):
        raise UserError("nothing varies; name options and values, such as --vary optimizer.lr=0.05,0.1")
    grid = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    both = [{**options, **point} for options in given or [{}] for point in grid]
    return [options for i, options in enumerate(both) if options not in both[:i]]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each dotted name that no other one has: ``optimizer.lr`` -> ``lr``."""
    names = list(dict.fromkeys(names))
    ends = lambda name: [name.split(".", k)[-1] for k in range(name.count("."), -1, -1)]
    clash = lambda end, name: any(other != name and f".{other}".endswith(f".{end}") for other in names)
    return {name: next((end for end in ends(name) if not clash(end, name)), name) for name in names}


def value_text(value: Any) -> str:
    """Return an option's value as text: ``{"kind": "at", "attack": {"steps": 2}}`` -> ``at, attack (steps 2)``."""
    if not isinstance(value, Mapping):
        return str(value)
    nested = lambda part: f"({value_text(part)})" if isinstance(part, Mapping) else str(part)
    kind = [str(value["kind"])] if "kind" in value else []
    return ", ".join(kind + [f"{name} {nested(part)}" for name, part in value.items() if name != "kind"])


def options_text(options: Options) -> str:
    """Return a combination of options in one line."""
    return ", ".join(f"{name}={value_text(value)}" for name, value in options.items()) or "the recipe itself"


def trial_name(options: Options, seed: int, images: int) -> str:
    """Return the name of a trial's folder, such as ``optimizer.lr=0.05,seed=0,images=6016``."""
    parts = {**options, "seed": seed, "images": images}
    text = ",".join(f"{name}={value_text(value)}" for name, value in parts.items())
    name = re.sub(r"[^\w.,=+-]+", "-", text)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# Cost -----------------------------------------------------------------------------------------------------------------


def with_images(recipe: Recipe, images: int) -> Recipe:
    """Return the recipe with another length of its last stage."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, images=images))


def training_flops(recipe: Recipe) -> float:
    """Return the FLOP of training all stages: images x passes x FLOP of a pass, without validation.

    They are counted as ``advebm train --dry-run`` counts them; of a curriculum it is the upper bound.
    """
    return _training_flops(dataclasses.replace(recipe, optimizer=SGD(), schedule=Cosine(), seed=0))  # as these are free


@functools.cache
def _training_flops(recipe: Recipe) -> float:
    return sum(stage.training[1] for stage in estimates(recipe))


def images_for(recipe: Recipe, flops: float) -> int:
    """Return how many images, in whole batches, the last stage may train on so that all stages cost at most ``flops``.

    So the costs of different methods at one budget differ by less than a batch.

    Raises:
        UserError: the budget does not pay for a batch.
    """
    batch = recipe.train.batch
    cost = lambda batches: training_flops(with_images(recipe, batches * batch))
    earlier = sum(map(training_flops, recipe.before))
    first = cost(1) - earlier
    most = math.floor((flops - earlier) / first * (1 + 1e-9))
    if most < 1:
        raise UserError(
            f"a budget of {flops:.3g} FLOP pays for no batch: one takes {first:.3g}"
            + (f", and the stages before {earlier:.3g}" if earlier else "")
        )
    if cost(most) > flops * (1 + 1e-9):  # a curriculum, whose later batches cost more
        most = max(1, bisect.bisect_right(range(1, most), flops, key=cost))
    return most * batch


# Trials and what they scored ------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """One training: an ordinary run."""

    recipe: Recipe
    folder: Path


class Result(NamedTuple):
    """What a finished trial scored in its last validation.

    Attributes:
        scores: values by the names of ``metrics.jsonl``, such as ``val/robust_accuracy``, of the averaged weights.
        seconds: time of training with its validations, over all stages and sessions.
        note: what happened on the way, such as rollbacks; may be empty.
    """

    scores: Mapping[str, float]
    seconds: float
    note: str


def read_result(run: Run) -> Result:
    """Read the result of a run that has ended."""
    names = {name for known in LOGGED.values() for name in known}
    lines = [{name: line[name] for name in names & line.keys()} for line in run.history()]
    scores: dict[str, float] = next((found for found in reversed(lines) if found), {})
    progress = [files.read_json(stage.checkpoints.path() / "state" / "progress.json") for stage in run.stages]
    rollbacks = sum(line.get("event") == "rollback" for stage in run.stages for line in stage.history())
    notes = [f"{rollbacks} rollback{'s' * (rollbacks > 1)}"] * (rollbacks > 0)
    notes += [f"stopped early at {run.images:,} images"] * run.stopped_early
    return Result(scores, sum(p["seconds"] for p in progress), ", ".join(notes))


@dataclasses.dataclass
class Row:
    """A combination of options at one length of training, with a trial for each seed.

    Attributes:
        options: what the combination sets.
        trials: one for each seed.
        flops: FLOP of training of one trial; None: unknown.
        count: number of validation images.
        rung: 0, or of successive halving the number of this round.
        results: of the trials that have ended, by folder.
        faults: why trials have no result, by folder.
    """

    options: Options
    trials: tuple[Trial, ...]
    flops: float | None
    count: int
    rung: int = 0
    results: dict[Path, Result] = dataclasses.field(default_factory=dict)
    faults: dict[Path, str] = dataclasses.field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images that the last stage trains on."""
        return images_in_whole_batches(self.trials[0].recipe)

    @property
    def complete(self) -> bool:
        """Whether every seed has a result."""
        return len(self.results) == len(self.trials)

    def values(self, by: str) -> list[float]:
        """Return the scores of a kind, one for each seed that has one."""
        return [r.scores[name] for r in self.results.values() for name in LOGGED[by] if name in r.scores]

    def error(self, by: str) -> float | None:
        """Return the standard error, over validation images, of the mean accuracy; None of other scores.

        All seeds are scored on the same images, so that more seeds do not make it smaller: √(p(1-p)/n).
        """
        if not all(name in PROPORTIONS for r in self.results.values() for name in r.scores if name in LOGGED[by]):
            return None
        p = statistics.fmean(self.values(by))
        return math.sqrt(p * (1 - p) / self.count)

    @property
    def seconds(self) -> float | None:
        return statistics.fmean(r.seconds for r in self.results.values()) if self.results else None

    @property
    def note(self) -> str:
        """What happened to the trials, in one line."""
        several = len(self.trials) > 1
        faults = [(trial.recipe.seed, self.faults.get(trial.folder)) for trial in self.trials]
        told = [f"seed {seed}: {why}" if several else why for seed, why in faults if why]
        told += [r.note for r in self.results.values() if r.note]
        left = len(self.trials) - len(self.results) - len(self.faults)
        return "; ".join(told + [f"{left} of {len(self.trials)} not finished"] * (left > 0))

    def describe(self) -> dict[str, Any]:
        """Return plain data, as JSON holds it."""
        seeds = []
        for trial in self.trials:
            result = self.results.get(trial.folder)
            found = {} if result is None else {"scores": dict(result.scores), "seconds": result.seconds}
            fault = {"why": self.faults[trial.folder]} if trial.folder in self.faults else {}
            seeds.append({"seed": trial.recipe.seed, "run": str(trial.folder), **found, **fault})
        means = {by: statistics.fmean(v) for by in LOGGED if (v := self.values(by))}
        errors = {by: self.error(by) for by in means}
        about = {"options": dict(self.options), "images": self.images, "flops": self.flops, "rung": self.rung}
        return {**about, "count": self.count, "mean": means, "error": errors, "seeds": seeds, "note": self.note}


def best_first(rows: Iterable[Row], by: str) -> list[Row]:
    """Return rows by their mean score, those of the last rung first; combinations without a score of each seed last.

    If equal, the score under attack decides, or the clean one if that was asked for.
    """

    def key(row: Row) -> tuple[float, ...]:
        sign = 1 if by == "fd" else -1
        tie = "clean" if by == "robust" else "robust"
        full = len(row.values(by)) == len(row.trials)
        values = (statistics.fmean(row.values(by)) if full else 0.0, statistics.fmean(row.values(tie) or [0.0]))
        return (-row.rung, not full, sign * values[0], -values[1])

    return sorted(rows, key=key)


def better_half(rows: Iterable[Row], by: str) -> list[Row]:
    """Return the better half, rounded up, of the rows of a rung; those without a score of each seed are never in it."""
    rows = best_first(rows, by)
    return [row for row in rows[: -(-len(rows) // 2)] if len(row.values(by)) == len(row.trials)]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Combinations of options, trained alike and scored on validation images.

    Attributes:
        rows: the combinations, the best first, see :func:`best_first`.
        by: the score that they are sorted by.
        budget: FLOP of training that each trial may cost; None: as many images as the recipe says.
        environment: hardware, versions and date, see :func:`advebm.runs.run.environment`.
        folder: where ``sweep.json``, ``sweep.md``, ``sweep.png`` and ``trials`` are.
    """

    rows: list[Row]
    by: By
    budget: float | None
    environment: Mapping[str, Any]
    folder: Path

    @property
    def best(self) -> Run:
        """The run of the best combination, with the first seed.

        Raises:
            UserError: no combination has a score of each seed.
        """
        row = self.rows[0]
        if len(row.values(self.by)) < len(row.trials):
            raise UserError(f"no combination has a score: {row.note}")
        return Run.open(row.trials[0].folder)

    def __repr__(self) -> str:
        return f"Sweep of {len({str(row.options) for row in self.rows})} combinations: {self.folder}"

    def _repr_html_(self) -> str:
        picture = self.folder / "sweep.png"
        shown = notebook.picture(picture.read_bytes(), "scores of all trials") if picture.is_file() else ""
        return notebook.line(self) + notebook.table(*self.table()) + shown

    @property
    def varied(self) -> dict[str, str]:
        """The options that combinations set, with short names."""
        return short_names(name for row in self.rows for name in row.options)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and a row of texts for each combination."""
        scores = [by for by in LOGGED if any(row.values(by) for row in self.rows)]
        heads = [*self.varied.values(), *scores, "images", "TFLOP", "seconds"]
        rows = []
        for row in self.rows:
            cells = [value_text(row.options.get(name, "")) for name in self.varied]
            cells += [_cell(row, by) for by in scores]
            cells += [
                f"{row.images:,}",
                "" if row.flops is None else f"{row.flops / TERA:.4g}",
                "" if row.seconds is None else f"{row.seconds:.0f}",
            ]
            rows.append([*cells, row.note])
        noted = any(row.note for row in self.rows)
        return [*heads, "note"][: len(heads) + noted], [cells[: len(heads) + noted] for cells in rows]

    def describe(self) -> dict[str, Any]:
        """Return plain data, as JSON holds it."""
        recipe = self.rows[0].trials[0].recipe
        about = {"recipe": recipe.name, "threat": config.describe(recipe.threat), "by": self.by, "budget": self.budget}
        return {**about, "environment": dict(self.environment), "rows": [row.describe() for row in self.rows]}


def _cell(row: Row, by: str) -> str:
    """Return a score as text, with its standard error and its deviation over seeds, as far as there are any."""
    if not (values := row.values(by)):
        return ""
    name = next(name for r in row.results.values() for name in LOGGED[by] if name in r.scores)
    scale, unit, digits = (100, " %", 1) if name.endswith("accuracy") else (1, "", 3)
    error = row.error(by)
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    text += f" ± {scale * error:.{digits}f}{unit}" if error is not None else unit
    return text + (f", sd {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def count_validation(recipe: Recipe) -> int:
    """Return the number of images that each validation scores, reading them only if their source does not say it."""
    known = find_spec(recipe.data).val
    there = len(recipe.data.load().val) if known is None else known
    return min(there, recipe.train.validate_with or there)
