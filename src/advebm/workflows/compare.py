"""Measure several runs with the same metrics and write one report."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from advebm.core import config, console
from advebm.evaluation.compare import Records, compare
from advebm.reporting.build import report
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.workflows.devices import choose_device


def compare_runs(
    folders: Sequence[Path],
    overrides: Iterable[tuple[str, Any]],
    *,
    features: str | None,
    out: Path,
    seed: int,
    device: str | None,
) -> tuple[dict[str, Records], Path]:
    """Measure runs with the same metrics; return the records by run title and the path of the report."""
    runs = [Run.open(folder) for folder in folders]
    threat = resolve(config.describe(runs[0].recipe), overrides).threat
    options: dict[str, Any] = {"features": features, "seed": seed, "device": choose_device(device)}
    records = compare(runs, threat=threat, **options, progress=console.say, bar=console.bar)
    return records, report(runs[0], beside=runs[1:], out=out)
