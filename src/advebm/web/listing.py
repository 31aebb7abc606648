"""The tab Runs: measurements and reports."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advebm.core import files
from advebm.core.errors import UserError
from advebm.evaluation import evaluate
from advebm.metrics.keys import INCEPTION, attack_key, key_of
from advebm.metrics.texts import as_text
from advebm.reporting import build
from advebm.reporting.records import pivot
from advebm.runs.find_model import find_reference
from advebm.runs.run import Run
from advebm.web import views
from advebm.web.studio import Studio

Records = list[dict[str, Any]]
CLEAN, UNDER_THREAT, STRONGEST = "clean accuracy", "accuracy under the threat", "accuracy under AutoAttack"


def full_table(studios: Sequence[Studio]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: a row per quantity, those measured on most runs first, and a column per run."""
    records = {studio.title: read_records(studio.run) for studio in studios}
    return pivot(records).quantities_down(widest_first=True)


def headline_table(studios: Sequence[Studio]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of what is asked first, as far as any run has it, and a column per run.

    These are accuracy on test images, under the run's threat and under AutoAttack, and of the set of samples with the
    least FD this distance and the share of its images that are taken for their class.  FD is in Inception features if
    it was measured there, and in the model's own only if in no other.
    """
    columns = {studio.title: dict(_headlines(studio.run)) for studio in studios}
    names = dict.fromkeys([CLEAN, UNDER_THREAT, STRONGEST])
    names |= dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return ["measured", *columns], [row for row in rows if any(row[1:])]


def _headlines(run: Run) -> Iterable[tuple[str, str]]:
    """Yield the name and the text of a run's headline values."""
    records = read_records(run)
    threat = attack_key(run.recipe.threat).text
    for record in records:
        if record["name"] == "accuracy":
            yield CLEAN, as_text(record)["value"]
        if record["name"] == f"accuracy under {threat}":
            yield UNDER_THREAT, f"{as_text(record)['value']} ({threat})"
        if record["name"].startswith("accuracy under AutoAttack") and ", after " not in record["name"]:
            yield STRONGEST, f"{as_text(record)['value']} ({record['name'].removeprefix('accuracy under AutoAttack ')})"
    distances = [record for record in records if key_of(record).quantity == "FD" and key_of(record).samples]
    if distances:
        spaces = [key_of(record).space for record in distances]  # distances in different ones cannot be compared
        space = min(spaces, key=lambda name: (name == evaluate.OWN_FEATURES, name != INCEPTION))
        best = min((r for r in distances if key_of(r).space == space), key=lambda record: record["value"])
        samples = key_of(best).samples
        yield f"{best['name']}, best set", f"{as_text(best)['value']} ({samples})"
        for record in records:
            key = key_of(record)
            if (key.quantity, key.samples, key.space) == ("intended class", samples, space):
                yield f"{record['name']}, same set", f"{as_text(record)['value']} ({samples})"


def read_records(run: Run) -> Records:
    """Return the newest records of a run; if it has none, those that its model was published with."""
    return evaluate.newest_records(run.records()) or list(_published_records(run.recipe.init))


def is_published(run: Run) -> bool:
    """Return whether :func:`read_records` returns what the model was published with."""
    return not run.records() and bool(read_records(run))


def _published_records(init: str | None) -> Iterable[dict[str, Any]]:
    """Yield what a model's card says was measured, as records; whatever has another form is left out."""
    try:
        reference = None if init is None else find_reference(init)
    except UserError:  # the model has moved since
        return
    if reference is None or reference.kind != "model" or reference.path is None:
        return
    measured = files.read_json(reference.path / "config.json", default={}).get("measured")
    for value in measured if isinstance(measured, list) else ():
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            numbers = {name: value.get(name) for name in ("value", "error", "count")}
            if all(isinstance(number, int | float) for number in numbers.values()):
                samples = value.get("samples")
                settings = {"samples": samples} if isinstance(samples, str) else {"published": True}
                yield {"name": value["name"], **numbers, "settings": settings, "series": {}}


def report(studio: Studio, folder: Path) -> Path:
    """Write the run's report into a new folder within ``folder``, not into the run, and return its path."""
    own = Path(tempfile.mkdtemp(prefix="report-", dir=folder))
    with views.PYPLOT_LOCK:
        return build.report(studio.run, out=own / "report.html")
