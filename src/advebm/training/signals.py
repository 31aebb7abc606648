"""SIGINT and SIGTERM as a question that the loop can ask, and processes that are gone."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from advebm.core.errors import Lost
from advebm.runs.run import Run

TWICE = 1.0  # seconds within which a signal that comes again is the same one: torchrun passes on what a terminal sends


@contextlib.contextmanager
def going_on(run: Run, again: str) -> Iterator[None]:
    """Where a process of the job is gone, says what there is and how to go on."""
    try:
        yield
    except Lost as error:
        raise Lost(f"{error}; the last checkpoint is of {run.images:,} images; {again} {run.folder}") from None


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a question the loop can ask; a later one acts at once."""
    received: list[float] = []
    old: dict[int, Any] = {}

    def receive(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > TWICE:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    wanted: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        old.update({number: signal.signal(number, receive) for number in wanted})
    try:
        yield lambda: bool(received)
    finally:
        restore()
