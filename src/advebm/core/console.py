"""Progress messages on stderr, with an estimate of the remaining time."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from advebm.core.processes import rank_and_world

screen = Console(
    stderr=True, highlight=False, emoji=False, quiet=rank_and_world()[0] > 0
)  # only the main process (rank 0) prints
FIRST, QUIET = 2.0, 10.0  # without a terminal: seconds before the first progress line, and between lines


class _ComputingOn:
    """The text of :func:`computing_on`: ``pending`` until it is printed, then ``said``."""

    said = pending = ""


class _Lines:
    """How many lines have been printed."""

    count = 0


@contextmanager
def announcing(text: str) -> Iterator[None]:
    """Print ``text`` if the block shows nothing else for ``FIRST`` seconds, as while images are read."""

    def announce() -> None:
        if _Lines.count == before:
            say(text)

    before = _Lines.count
    timer = threading.Timer(FIRST, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def computing_on(text: str) -> None:
    """Print ``text``, such as ``cpu, 2 threads``, before the next line of output, unless that was done already."""
    if not _ComputingOn.said.startswith(text):
        _ComputingOn.pending = text


def say(*texts: str) -> None:
    """Print indented lines, after any pending text of :func:`computing_on`."""
    if pending := _ComputingOn.pending:
        _ComputingOn.said, _ComputingOn.pending = pending, ""
        texts = (pending, *texts)
    for text in texts:
        _Lines.count += 1
        screen.print(f"  {text}", soft_wrap=True, markup=False)


class Bar:
    """A progress bar on a terminal, else an occasional line; both show the recent speed and the time left."""

    def __init__(self, progress: Progress, name: str, total: int, done: int | None, lines: bool = False) -> None:
        self.progress, self.name, self.total, self.lines = progress, name, total, lines
        self.task = progress.add_task(name, total=total, completed=done or 0, note="", speed="")
        self.begun = done is not None
        self._begin(done or 0)

    def _begin(self, done: int) -> None:
        self.done, self.note = done, ""
        self.start = time.perf_counter(), done
        self.marks = deque([self.start], maxlen=6)  # latest lines: speed is measured over them, as stages differ

    def __call__(self, done: int, note: str = "") -> None:
        """Report that ``done`` items are done.

        If no initial count was given, the items of the first call were done earlier and do not count towards the speed.
        """
        if not self.lines:
            say()
        if not self.begun or done < self.done:  # the first call, or a return to a checkpoint
            self.begun = True
            self._begin(done)
        self.done, self.note = done, note
        self.progress.update(self.task, completed=min(done, self.total), note=note, speed=self._speed()[0])
        now = time.perf_counter()
        if now - self.marks[-1][0] > (QUIET if len(self.marks) > 1 else FIRST) and done < self.total:
            if self.lines or not screen.is_terminal:
                self.tell()
            self.marks.append((now, done))

    def _speed(self) -> tuple[str, str]:
        """Return speed and time left, at the end overall speed and time taken; ``cached`` if there was no work."""
        if self.done >= self.total and self.done == self.start[1]:
            return "cached", ""
        began, first = self.marks[0] if self.done < self.total else self.start
        seconds = time.perf_counter() - began
        if self.done <= first or seconds <= 0:
            return "", ""
        speed = (self.done - first) / seconds
        if self.done >= self.total:
            return f"{speed:,.0f}/s", f", {seconds:.1f} s"
        shown = f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2g}/s"
        return shown, f", {(self.total - self.done) / speed:.0f} s left"

    def tell(self) -> None:
        count = f"{min(self.done, self.total):,}/{self.total:,}"
        say(f"{self.name}  {count}  {''.join(self._speed())}  {self.note}")


@contextmanager
def bar(name: str, total: int, done: int | None = None) -> Iterator[Bar]:
    """Show progress: ``with bar("train", 50_000, 0) as tell: tell(128, "loss 2.3")``.

    ``done`` items were finished before; None: the first call gives their number.
    """
    columns = (
        TextColumn("  {task.description}", table_column=Column(no_wrap=True)),
        BarColumn(16),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left  {task.fields[speed]}"),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=screen, expand=True, disable=not screen.is_terminal) as progress:
        progress_bar = Bar(progress, name, total, done)
        with nullcontext() if screen.is_terminal else announcing(f"{name}  {done or 0:,}/{total:,}  working"):
            yield progress_bar
    if total and not screen.is_terminal:
        progress_bar.tell()


@contextmanager
def lines(name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show progress in lines, also on a terminal, where a bar of what waits for it may be; none if it takes ``FIRST``.

    As for :func:`bar`, ``done`` of ``total`` items were finished before.
    """
    yield Bar(Progress(disable=True), name, total, done, lines=True)


def training_note(line: Mapping[str, Any], seen: dict[str, float]) -> str:
    """Summarise the newest values of a training log in a few words; ``seen`` keeps them between calls."""
    names = {"train/loss": "loss", "val/accuracy": "clean", "val/robust_accuracy": "robust"}
    names |= {"val/auroc": "AUROC", "val/adversarial_auroc": "attacked", "train/steps": "K"}
    names |= {"val/contrastive_accuracy": "clean", "val/robust_contrastive_accuracy": "robust", "val/fd": "FD"}
    seen.update({k: v for k, v in line.items() if k in names})
    values = {label: seen[k] for k, label in names.items() if k in seen}
    return "  ".join(f"{label} {value:.3g}" for label, value in values.items())
