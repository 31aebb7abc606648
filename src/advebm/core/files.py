"""Files that are either whole or not there."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from advebm.core.errors import Busy, UserError


def now() -> str:
    """The time, as files have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` in one step at the end, on the disk by then; or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock ``path``, which goes with the process, however it ends.

    Raises:
        Busy: another process holds it; says ``busy``.
    """
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Busy(busy) from None
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        yield
    finally:
        lock.release()


def write(path: Path, content: str | bytes) -> None:
    """Replace ``path`` in one step, and make sure that it is on the disk before that."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """JSON that a person can read, in one step."""
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """The value in ``path``; ``default``, where one is given, if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        if default is not None:
            return default
        raise UserError(f"there is no {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a path that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "make room there" if full else "choose a writable folder with --out"
    return UserError(f"cannot write {path}: {error.strerror or error}; {fix}")
