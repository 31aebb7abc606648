"""What a speed-run measures of its models, and its records over seeds."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.projected import Attack
from advebm.core import config, notebook
from advebm.core.errors import UserError, unknown_name
from advebm.evaluation import compare
from advebm.evaluation.compare import Records, Wanted
from advebm.metrics.keys import Key, attack_key, key_of
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.runs.recipe import Recipe
from advebm.runs.run import Run
from advebm.samplers.base import Sampler
from advebm.samplers.classifier import CS, TA
from advebm.training.hardware import TERA
from advebm.training.sweep import read_result

SAMPLERS: tuple[Sampler, ...] = (TA(steps=40, step_size=0.25), CS(steps=16, step_size=0.25))
QUALITIES = ("FD", "class score", "intended class", "recall")  # of samples, in the order of the table


@dataclass(frozen=True)
class Tier:
    """How much a speed-run measures on test images.

    Attributes:
        attacks: for the recipe's threat, each metric of robust accuracy.
        samples: number of images that each sampler draws, of all classes together; 0: none.
    """

    attacks: Callable[[Attack], Sequence[RobustAccuracy]]
    samples: int


def _standard(threat: Attack) -> Sequence[RobustAccuracy]:
    ball = threat.eps, threat.norm
    apgds, all_attacks = AutoAttack(*ball, "quick"), AutoAttack(*ball)
    return RobustAccuracy(threat), RobustAccuracy(apgds, images=2_000), RobustAccuracy(all_attacks, images=500)


TIERS: Mapping[str, Tier] = MappingProxyType(
    {"quick": Tier(lambda threat: [RobustAccuracy(threat)], 0), "standard": Tier(_standard, 1_000)}
)


def find_tier(name: str) -> Tier:
    if name not in TIERS:
        raise unknown_name("tier", name, TIERS)
    return TIERS[name]


def accuracies(tier: str, threat: Attack) -> Wanted:
    """Return the metrics of accuracy, clean and under each attack of the tier."""
    robust = find_tier(tier).attacks(threat)
    return {Key("accuracy"): Accuracy(), **{Key("accuracy", attack_key(m.attack)): m for m in robust}}


@dataclass
class Entry:
    """A recipe, trained with one or several seeds.

    Attributes:
        recipe: the recipe, with the seed of the first run.
        runs: its runs, one for each seed.
        stages: FLOP of training each stage, the last one last; empty: unknown.
        records: what was measured, by the seed of the run; a run that could not be measured has none.
        faults: why not, by seed.
    """

    recipe: Recipe
    runs: list[Run]
    stages: Sequence[float]
    records: dict[int, Records] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """What happened to the runs and why numbers are missing, in one line."""
        notes = {run.recipe.seed: run.diverged or read_result(run).note for run in self.runs} | self.faults
        return "; ".join(f"seed {seed}: {text}" for seed, text in notes.items() if text)

    @property
    def flops(self) -> float | None:
        """FLOP of training a run, without validation; None: unknown."""
        return sum(self.stages) or None

    @property
    def images(self) -> int:
        """Number of training images of all stages."""
        return sum(stage.train.images for stage in (*self.recipe.before, self.recipe))

    @property
    def seconds(self) -> float:
        """Mean time of training with its validations, which depends on the machine."""
        return statistics.fmean(read_result(run).seconds for run in self.runs)

    @property
    def machines(self) -> list[str]:
        """Where the runs were trained: device, precision, threads."""
        about = [run.environment for run in self.runs]
        return sorted({f"{a['device']}, {a.get('precision', '')}, {a['threads']} thread(s)" for a in about})

    def columns(self) -> dict[Key, Records]:
        """Return the records of each kind, one for each seed that has one."""
        found: dict[Key, Records] = {}
        for records in self.records.values():
            for record in records:
                found.setdefault(key_of(record), []).append(record)
        return found


@dataclass(frozen=True)
class Speedrun:
    """Recipes, trained from nothing and measured on test images.

    Attributes:
        entries: a recipe each, in the order in which they were given.
        tier: how much was measured.
        environment: hardware, versions and date, see :func:`advebm.runs.run.environment`.
        folder: where ``speedrun.json``, ``speedrun.md`` and ``speedrun.png`` are.
    """

    entries: Sequence[Entry]
    tier: str
    environment: Mapping[str, Any]
    folder: Path

    @property
    def titles(self) -> list[str]:
        """A title for each entry: its recipe's name, or the folder of its first run if several have that name."""
        return list(compare.by_title(entry.runs[0] for entry in self.entries))

    def __repr__(self) -> str:
        return f"Speed-run of {', '.join(self.titles)}: {self.folder}"

    def _repr_html_(self) -> str:
        return notebook.line(self) + notebook.table(*self.table())

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and a row of texts for each recipe: cost, accuracies, samples."""
        columns = [entry.columns() for entry in self.entries]
        keys = list(dict.fromkeys(key for found in columns for key in found if _is_shown(key)))
        counts = {key: next(found[key][0]["count"] for found in columns if key in found) for key in keys}
        heads = [f"{_title(key)}, n = {counts[key]:,}" for key in keys]
        rows = []
        for title, entry, found in zip(self.titles, self.entries, columns, strict=True):
            cost = "" if entry.flops is None else f"{entry.flops / TERA:.4g}"
            cells = [_cell(found[key]) if key in found else "" for key in keys]
            name = f"{title}{f' x {len(entry.runs)}' if len(entry.runs) > 1 else ''}"
            rows.append([name, f"{entry.images:,}", cost, f"{entry.seconds:.0f}", *cells, entry.note])
        noted = any(entry.note for entry in self.entries)
        heads = ["recipe", "images", "TFLOP", "seconds", *heads, "but"]
        keep = len(heads) if noted else -1
        return heads[:keep], [row[:keep] for row in rows]

    def describe(self) -> dict[str, Any]:
        """Return plain data, as JSON holds it."""
        entries = []
        for entry in self.entries:
            about = {"recipe": config.describe(entry.recipe), "flops": entry.flops, "seconds": entry.seconds}
            runs = []
            for run in entry.runs:
                seed, fields = run.recipe.seed, ("name", "value", "error", "count")
                records = [{name: record[name] for name in fields} for record in entry.records.get(seed, ())]
                runs.append({"run": str(run.folder), "seed": seed, "records": records})
            entries.append({**about, "machines": entry.machines, "runs": runs, "note": entry.note})
        return {"tier": self.tier, "environment": dict(self.environment), "entries": entries}


def group_by_recipe(runs: Iterable[Run]) -> list[list[Run]]:
    """Return runs in groups of one recipe, whatever the seed.

    Raises:
        UserError: two runs have the same recipe and seed.
    """
    groups: dict[Recipe, dict[int, Run]] = {}
    for run in runs:
        stages = tuple(dataclasses.replace(stage, seed=0) for stage in run.recipe.before)
        group = groups.setdefault(dataclasses.replace(run.recipe, seed=0, before=stages), {})
        if (other := group.setdefault(run.recipe.seed, run)) is not run:
            raise UserError(f"{other.folder} and {run.folder} have the same recipe and seed; give one of them")
    return [list(group.values()) for group in groups.values()]


def _is_shown(key: Key) -> bool:
    parts = key.attack is not None and key.attack.part is not None
    return (key.quantity == "accuracy" and not parts) or key.quantity in QUALITIES


def _title(key: Key) -> str:
    if key.quantity == "accuracy":
        return "clean" if key.attack is None else key.attack.text
    return f"{key.quantity} {(key.samples or '').removeprefix('speedrun-')}"


def _cell(records: Records) -> str:
    """Return the mean, its standard error over images, and the deviation over seeds."""
    share = key_of(records[0]).is_share
    scale, unit, digits = (100, " %", 1) if share else (1, "", 2)
    values = [scale * record["value"] for record in records]
    error = scale * statistics.fmean(record["error"] for record in records)
    spread = f", sd {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}{unit}{spread}"
