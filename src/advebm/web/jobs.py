"""Run long work for the page in threads that report progress, take turns, and can be stopped."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WAITING = "waiting for another search on this model to end"


class Stopped(Exception):
    """The visitor stopped the work."""


class Job:
    """One piece of work.  Its thread calls ``tell`` and ``check``, which raise once it is stopped, and ``turn``."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def stop(self) -> None:
        """End the work at its next call of ``tell``, ``check`` or, while waiting, ``turn``."""
        self._stopped.set()

    def check(self, *ignored: Any) -> None:
        """Raise :class:`Stopped` if the work was stopped; ignore arguments, so that this can serve as any hook."""
        if self._stopped.is_set():
            raise Stopped

    def tell(self, news: Any) -> None:
        """Report an intermediate result."""
        self.check()
        self._told.put(("told", news))

    @contextmanager
    def turn(self, lock: threading.Lock) -> Iterator[None]:
        """Hold a shared lock; if that means waiting, report it first, and let the work be stopped meanwhile."""
        if not lock.acquire(blocking=False):
            self.tell(WAITING)
            while not lock.acquire(timeout=0.1):
                self.check()
        try:
            yield
        finally:
            lock.release()

    def follow(self, work: Callable[["Job"], Any]) -> Iterator[Any]:
        """Run ``work`` in a thread; yield what it reports, skipping all but the newest, then what it returns.

        Exceptions of the work, including :class:`Stopped`, are raised here.  Closing the iterator stops the work.
        """

        def run() -> None:
            try:
                self._told.put(("done", work(self)))
            except BaseException as error:
                self._told.put(("failed", error))

        threading.Thread(target=run, daemon=True).start()
        try:
            while True:
                kind, news = self._told.get()
                while kind == "told" and not self._told.empty():
                    kind, news = self._told.get()
                if kind == "failed":
                    raise news
                yield news
                if kind == "done":
                    return
        finally:
            self.stop()


class Jobs:
    """The running jobs of each visitor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, set[Job]] = {}

    @contextmanager
    def begin(self, visitor: str) -> Iterator[Job]:
        """Provide a new job of a visitor, which ends with the block."""
        job = Job()
        with self._lock:
            self._under_way.setdefault(visitor, set()).add(job)
        try:
            yield job
        finally:
            job.stop()
            with self._lock:
                self._under_way[visitor].discard(job)
                if not self._under_way[visitor]:
                    del self._under_way[visitor]

    def stop(self, visitor: str) -> None:
        with self._lock:
            for job in self._under_way.get(visitor, ()):
                job.stop()
