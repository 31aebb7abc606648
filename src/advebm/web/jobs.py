"""Long work behind a page: a thread that tells what it has so far, waits for its turn, and can be stopped."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WAITING = "waiting for another search on this model to end"


class Stopped(Exception):
    """Whoever asked for the work stopped it."""


class Job:
    """One piece of work.  Its own thread calls ``tell``, ``check`` and ``turn``, which end it once it is stopped."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def stop(self) -> None:
        """End the work at its next step."""
        self._stopped.set()

    def check(self, *ignored: Any) -> None:
        """Go on, or raise :class:`Stopped`; takes anything, so that it can be hooked in anywhere."""
        if self._stopped.is_set():
            raise Stopped

    def tell(self, news: Any) -> None:
        """What there is to show so far."""
        self.check()
        self._told.put(("told", news))

    @contextmanager
    def turn(self, lock: threading.Lock) -> Iterator[None]:
        """Hold a lock that others hold, too; says so where that means waiting, and can be stopped meanwhile."""
        if not lock.acquire(blocking=False):
            self.tell(WAITING)
            while not lock.acquire(timeout=0.1):
                self.check()
        try:
            yield
        finally:
            lock.release()

    def follow(self, work: Callable[["Job"], Any]) -> Iterator[Any]:
        """What the work tells, then what it returns; newer news replace older ones that nobody has looked at.

        What the work raises is raised here, :class:`Stopped` among it.  Closing the iterator stops the work.
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
    """The work under way, by visitor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[str, set[Job]] = {}

    @contextmanager
    def begin(self, visitor: str) -> Iterator[Job]:
        """A new job of a visitor, for as long as the block lasts."""
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
        """End everything that a visitor has under way."""
        with self._lock:
            for job in self._under_way.get(visitor, ()):
                job.stop()
