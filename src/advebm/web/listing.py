"""The tab Runs: measurements and reports."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from advebm.evaluation import evaluate
from advebm.reporting import build
from advebm.reporting.records import pivot
from advebm.web import views
from advebm.web.studio import Studio


def table(studios: Sequence[Studio]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: a row per quantity, those measured on most runs first, and a column per run."""
    records = {studio.title: evaluate.newest_records(studio.run.records()) for studio in studios}
    return pivot(records).quantities_down(widest_first=True)


def report(studio: Studio, folder: Path) -> Path:
    """Write the run's report into a new folder within ``folder``, not into the run, and return its path."""
    own = Path(tempfile.mkdtemp(prefix="report-", dir=folder))
    with views.PYPLOT_LOCK:
        return build.report(studio.run, out=own / "report.html")
