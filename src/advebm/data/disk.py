"""Images that do not fit in memory: decoded once, shard by shard, to files in the cache that are memory-mapped."""

import contextlib
import hashlib
import itertools
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import filelock
import numpy as np
import torch
from torch import Tensor

from advebm.core import console, files
from advebm.core.errors import UserError
from advebm.data.cache import cache_folder
from advebm.data.decode import READER, Progress

IN_MEMORY = 2 * 2**30  # bytes of the decoded images of a set that is held in memory, at most
CHUNK = 128 * 2**20  # bytes of the images that are handled at once, where shards can be cut so and all images are read
HEAD_START = 0.5  # seconds by which the first process of a machine is the one that decodes, and so the one that reports


class Decodable(Protocol):
    """A part of a set: ``key`` names its content and how it is decoded; empty: only the pixels do."""

    @property
    def key(self) -> str: ...

    def __len__(self) -> int: ...

    def decode(self, progress: Progress) -> Tensor:
        """Return the images, uint8 (N, C, H, W)."""
        ...


@dataclass(frozen=True)
class Shard:
    """A part of a set whose images are decoded only when they are written to disk.

    Attributes:
        y: labels, int64 (N,).
        shape: (C, H, W) of an image.
        key: names the files and how they are decoded.
        decode: returns the images, uint8 (N, C, H, W); it is given a function that takes the number of images done.
    """

    y: Tensor
    shape: tuple[int, ...]
    key: str
    decode: Callable[[Progress], Tensor]

    def __len__(self) -> int:
        return len(self.y)


def fits(count: int, shape: Sequence[int]) -> bool:
    """Return whether ``count`` images of a shape (C, H, W) are held in memory."""
    return count * math.prod(shape) <= IN_MEMORY


def chunk(shape: Sequence[int]) -> int:
    """Return how many images of a shape (C, H, W) are handled at once."""
    return max(1, CHUNK // math.prod(shape))


def stamp(paths: Sequence[Path], root: Path) -> str:
    """Return a text that changes with the names of files below ``root``, their sizes and times of change.

    Their content is not read, which would take as long as decoding it again.
    """
    facts = [(str(path.relative_to(root)), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def write_parts(
    shards: Sequence[Decodable], parts: Sequence[Tensor], shape: tuple[int, ...]
) -> list[tuple[Tensor, str]]:
    """Return, for each part, the images at its sorted positions in the concatenation of ``shards``, and their key.

    They are read-only tensors, uint8 (N, C, H, W), mapped from files of the cache folder: the operating system reads
    what is used and keeps as much as there is room for.  The files are written if they are not there, a shard at a
    time; if that is interrupted, it goes on behind the last whole shard.  Several processes take turns: one writes.

    Raises:
        UserError: there is too little room on the disk, it cannot be written, or an image is damaged or of another
            shape.
    """
    name = _name(shards, parts)
    folder, sizes = cache_folder() / name, [len(part) * math.prod(shape) for part in parts]
    if not _is_whole(folder, sizes):
        with _turn(folder):
            if not _is_whole(folder, sizes):
                _write(folder, shards, parts, shape)
    return [(_map(folder / str(i), (len(part), *shape)), f"{name}/{i}") for i, part in enumerate(parts)]


def _name(shards: Sequence[Decodable], parts: Sequence[Tensor]) -> str:
    content = hashlib.sha256(READER)
    for shard in shards:
        content.update(f"{len(shard)} {shard.key}\n".encode())
        if not shard.key:
            x = shard.decode(lambda done: None)
            for rows in x.split(chunk(x.shape[1:])):
                content.update(rows.contiguous().numpy().data)
    for part in parts:
        content.update(f"{len(part)}\n".encode() + part.numpy().tobytes())
    return f"images-{content.hexdigest()[:32]}"


def _is_whole(folder: Path, sizes: Sequence[int]) -> bool:
    try:
        return [(folder / str(i)).stat().st_size for i in range(len(sizes))] == list(sizes)
    except OSError:
        return False


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other process writes this folder, and let none begin."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(HEAD_START)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            console.say("another process decodes these images: waiting for it")
            held = lock.acquire()
    except OSError as error:
        raise _cannot_write(folder, error) from None
    with held:
        yield


def _write(folder: Path, shards: Sequence[Decodable], parts: Sequence[Tensor], shape: tuple[int, ...]) -> None:
    """Decode the shards that are not in the draft of the folder yet, append each to the files, and name the folder."""
    draft, size = folder.with_name(f".{folder.name}.partial"), math.prod(shape)
    starts = [0, *itertools.accumulate(map(len, shards))]
    try:
        shutil.rmtree(folder, ignore_errors=True)  # what is there is cut short
        draft.mkdir(exist_ok=True)
        done, written = _find_done(draft, parts, starts, size)
        _check_room(draft, sum(map(len, parts)) * size - sum(written))
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context((draft / str(i)).open("ab")) for i in range(len(parts))]
            for output, length in zip(outputs, written, strict=True):
                output.truncate(length)
            tell = stack.enter_context(console.lines("images decoded to disk", starts[-1], starts[done]))
            for number in range(done, len(shards)):
                start, stop = starts[number : number + 2]
                x = shards[number].decode(behind(start, tell))
                if tuple(x.shape) != (stop - start, *shape):
                    got, first = (" x ".join(map(str, s[:0:-1])) for s in (tuple(x.shape[1:]), shape))
                    raise UserError(f"images of one set have one size, got {first} and {got}; give it with --data.size")
                for output, part in zip(outputs, parts, strict=True):
                    for rows in part[(part >= start) & (part < stop)].split(chunk(shape)):
                        output.write(x[rows - start].numpy().tobytes())
                    output.flush()
                    os.fsync(output.fileno())
                files.write_json(draft / "shards", number + 1)
        draft.replace(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _find_done(draft: Path, parts: Sequence[Tensor], starts: Sequence[int], size: int) -> tuple[int, list[int]]:
    """Return how many shards are in the draft, and how many bytes of each file they are."""
    done = int(files.read_json(draft / "shards", default=0))
    written = [int((part < starts[done]).sum()) * size for part in parts]
    if done and any((draft / str(i)).stat().st_size < length for i, length in enumerate(written)):
        return 0, [0] * len(parts)
    return done, written


def behind(start: int, progress: Progress) -> Progress:
    """Return a report of progress to which ``start`` images are added, those done before."""
    return lambda done: progress(start + done)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    console.say(f"{needed / 1e9:,.1f} GB of images, more than is held in memory, are decoded to {folder.parent}")
    if needed > free:
        raise UserError(
            f"{needed / 1e9:,.1f} GB of decoded images do not fit in {folder.parent}, which has {free / 1e9:,.1f} GB "
            "free; make room there, or name a folder on another disk in the environment variable ADVEBM_CACHE"
        )


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {folder}: {error.strerror or error}; images that do not fit in memory are decoded to files: "
        "name a folder with room in the environment variable ADVEBM_CACHE"
    )


def _map(path: Path, shape: tuple[int, ...]) -> Tensor:
    if not shape[0]:
        return torch.empty(shape, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, np.uint8, "r", shape=shape))
