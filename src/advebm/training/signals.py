"""Let the training loop handle SIGINT, SIGTERM and processes that have ended."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from advebm.core.errors import Lost
from advebm.runs.run import Run

SAME_SIGNAL_SECONDS = 1.0  # a repetition within it is the same signal: torchrun forwards what the terminal sends


@contextlib.contextmanager
def explain_resume(run: Run, command: str) -> Iterator[None]:
    """Add the last checkpoint and the command that resumes the run to a :class:`Lost` error."""
    try:
        yield
    except Lost as error:
        raise Lost(f"{error}; the last checkpoint is of {run.images:,} images; {command} {run.folder}") from None


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM was received; a second signal takes effect at once."""
    received: list[float] = []
    old: dict[int, Any] = {}

    def receive(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if received[-1] - received[0] > SAME_SIGNAL_SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        old.update({number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield lambda: bool(received)
    finally:
        restore()
