"""What people see while something runs: on stderr, with an estimate of when it ends."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

screen = Console(stderr=True, highlight=False)
QUIET = 10.0  # seconds between lines where there is no terminal to draw a bar on


class Bar:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, progress: Progress, name: str, total: int, done: int) -> None:
        self.progress, self.name, self.total = progress, name, total
        self.task = progress.add_task(name, total=total, completed=done, note="")
        self.first = self.done = done
        self.start = self.last = time.perf_counter()
        self.note = ""

    def __call__(self, done: int, note: str = "") -> None:
        """So many are done."""
        self.progress.update(self.task, completed=min(done, self.total), note=note)
        now = time.perf_counter()
        self.done, self.note = done, note
        if not screen.is_terminal and now - self.last > QUIET and done < self.total:
            self.say()
            self.last = now

    def say(self) -> None:
        """Where it stands, in a line."""
        seconds = time.perf_counter() - self.start
        speed = (self.done - self.first) / seconds
        left = (self.total - self.done) / speed if speed > 0 else 0.0
        eta = f"{left:.0f} s left" if self.done < self.total else f"{seconds:.1f} s"
        count = f"{min(self.done, self.total):,}/{self.total:,}"
        screen.print(f"  {self.name}  {count}  {speed:,.0f}/s, {eta}  {self.note}", soft_wrap=True)


@contextmanager
def bar(name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """``with bar("train", 50_000) as tell: tell(128, "loss 2.3")``."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as progress:
        drawn = Bar(progress, name, total, done)
        yield drawn
    if not screen.is_terminal:
        drawn.say()


def training_note(line: Mapping[str, Any], seen: dict[str, float]) -> str:
    """The newest numbers of a training log in a few words; ``seen`` keeps them from call to call."""
    names = {"train/loss": "loss", "val/accuracy": "clean", "val/robust_accuracy": "robust", "perf/img_per_s": "img/s"}
    seen.update({names[k]: v for k, v in line.items() if k in names})
    shown = {k: f"{v:,.0f}" if k == "img/s" else f"{v:.3f}" for k, v in seen.items()}
    return "  ".join(f"{k} {v}" for k, v in shown.items())
