"""What people see while something runs: on stderr, with an estimate of when it ends."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from advebm.processes import launched

screen = Console(stderr=True, highlight=False, quiet=launched()[0] > 0)  # of several processes the main one's
QUIET = 10.0  # seconds between lines where there is no terminal to draw a bar on


class Bar:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, progress: Progress, name: str, total: int, done: int | None) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.task = progress.add_task(name, total=total, completed=done or 0, note="")
        self.begun = done is not None
        self._begin(done or 0)

    def _begin(self, done: int) -> None:
        self.done, self.note = done, ""
        self.start = time.perf_counter(), done
        self.marks = deque([self.start], maxlen=6)  # the latest lines: speed is theirs, as stages differ in it

    def __call__(self, done: int, note: str = "") -> None:
        """So many are done; at the first call where it was not said before, they were done earlier."""
        self.progress.update(self.task, completed=min(done, self.total), note=note)
        if not self.begun:
            self.begun = True
            self._begin(done)
        self.done, self.note = done, note
        now = time.perf_counter()
        if not screen.is_terminal and now - self.marks[-1][0] > QUIET and done < self.total:
            self.say()
            self.marks.append((now, done))

    def say(self) -> None:
        """Where it stands, in a line."""
        began, first = self.marks[0] if self.done < self.total else self.start
        seconds = time.perf_counter() - began
        speed = (self.done - first) / seconds if seconds > 0 else 0.0
        left = (self.total - self.done) / speed if speed > 0 else 0.0
        eta = f"{left:.0f} s left" if self.done < self.total else f"{seconds:.1f} s"
        count = f"{min(self.done, self.total):,}/{self.total:,}"
        screen.print(f"  {self.name}  {count}  {speed:,.0f}/s, {eta}  {self.note}", soft_wrap=True)


@contextmanager
def bar(name: str, total: int, done: int | None = None) -> Iterator[Bar]:
    """``with bar("train", 50_000, 0) as tell: tell(128, "loss 2.3")``.

    ``done`` were done before; without it the first call says how many.
    """
    columns = (
        TextColumn("  {task.description}", table_column=Column(no_wrap=True)),
        BarColumn(16),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left  {task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=screen, expand=True, disable=not screen.is_terminal) as progress:
        drawn = Bar(progress, name, total, done)
        yield drawn
    if not screen.is_terminal:
        drawn.say()


def training_note(line: Mapping[str, Any], seen: dict[str, float]) -> str:
    """The newest numbers of a training log in a few words; ``seen`` keeps them from call to call."""
    names = {"perf/img_per_s": "img/s", "train/loss": "loss", "val/accuracy": "clean", "val/robust_accuracy": "robust"}
    names |= {"val/auroc": "AUROC", "val/adversarial_auroc": "attacked", "train/steps": "K"}
    names |= {"val/contrastive_accuracy": "clean", "val/robust_contrastive_accuracy": "robust"}
    seen.update({k: v for k, v in line.items() if k in names})
    shown = {names[k]: seen[k] for k in names if k in seen}
    return "  ".join(f"{v:,.0f} {k}" if k == "img/s" else f"{k} {v:.3g}" for k, v in shown.items())
