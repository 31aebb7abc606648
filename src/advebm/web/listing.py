"""The tab Runs: what was measured, and reports."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from advebm.evaluation import evaluate
from advebm.reporting import build
from advebm.reporting.records import pivot
from advebm.web import views
from advebm.web.studio import Studio


def table(studios: Sequence[Studio]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row a quantity, a column a run; first what was measured on most of the runs."""
    records = {studio.title: evaluate.latest(studio.run.records()) for studio in studios}
    return pivot(records).quantities_down(widest_first=True)


def report(studio: Studio, folder: Path) -> Path:
    """The run's report, made anew in a folder of its own within the page's; nothing is written into the run."""
    own = Path(tempfile.mkdtemp(prefix="report-", dir=folder))
    with views.alone():
        return build.report(studio.run, out=own / "report.html")
