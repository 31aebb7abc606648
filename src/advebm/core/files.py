"""Reading and writing files; a file is replaced as a whole or not at all."""

import contextlib
import errno
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from advebm.core.errors import Busy, UserError


def timestamp() -> str:
    """Return the local time in the format used in files: ISO 8601 with the UTC offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces ``path`` at the end, once it is on the disk; on an error ``path`` stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise as_user_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``path`` during the block; the lock also ends with the process, even if that is killed.

    Raises:
        Busy: another process holds the lock; the message is ``busy``.
    """
    try:
        lock = filelock.FileLock(path, timeout=0).acquire()
    except filelock.Timeout:
        raise Busy(busy) from None
    except OSError as error:
        raise as_user_error(path, error) from None
    with lock:
        yield


def write(path: Path, content: str | bytes) -> None:
    """Replace ``path`` in one step, after its new content has reached the disk."""
    with replace_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """Return the value in a JSON file, or ``default`` if the file is missing; without a default that is a UserError."""
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


def as_user_error(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "make room there" if full else "choose a writable folder with --out"
    return UserError(f"cannot write {path}: {error.strerror or error}; {fix}")


def new_path(path: Path, *, named: bool, replace: bool, taken: Callable[[Path], bool] = Path.exists) -> Path:
    """Return ``path``, or where it is taken ``path`` with a number, so that nothing is overwritten.

    Args:
        path: a file or folder.
        named: whether the user named it: then it is an error if it is taken.
        replace: whether it may be overwritten.
        taken: tells whether something is there that must be kept.
    """
    if replace or not taken(path):
        return path
    if named:
        raise UserError(f"{path} is there already; give another --out, or --replace")
    numbered = (path.with_name(f"{path.stem}-{k}{path.suffix}") for k in itertools.count(2))
    return next(candidate for candidate in numbered if not taken(candidate))
