"""Tables of encoded images and their labels, decoded in memory or, where that does not hold them, to disk."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advebm.core import console
from advebm.core.errors import UserError
from advebm.data import disk
from advebm.data.cache import cached
from advebm.data.decode import Corrupt, Progress, decode
from advebm.data.disk import Shard
from advebm.data.sources import Images
from advebm.data.splits import Parts, number_labels


class Table(NamedTuple):
    """Rows of a split.

    Attributes:
        where: what the rows are called in messages, before their number.
        images: reads the encoded images.
        labels: the labels as they stand there.
        content: the key of the decoded images in the cache.
        stamp: a text that changes when the images do, found without reading them.
        first: number of the first row.
    """

    where: str
    images: Callable[[], Sequence[Any]]
    labels: Sequence[Any]
    content: Callable[[], Iterable[bytes]]
    stamp: str
    first: int = 0


class Encoded(NamedTuple):
    """Images of a shard before they are decoded: what reads them, and the names and labels of all; None: no label."""

    blobs: Callable[[], Sequence[bytes | Path]]
    names: Sequence[str]
    labels: Sequence[int | None]
    stamp: str


def decode_tables(
    name: str,
    tables: Mapping[str, Sequence[Table]],
    classes: tuple[str, ...],
    corrupt: Corrupt,
    channels: int = 3,
    size: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> tuple[Parts, tuple[str, ...]]:
    """Decode the images of tables, or read them from the cache, and number their labels.

    ``shape`` is that of the decoded images, where it is known beforehand; only then can they be more than memory holds.
    """
    everything = [label for shards in tables.values() for table in shards for label in table.labels]
    numbers, classes = number_labels(everything, name, classes)
    rest = iter(numbers)
    labels = {
        split: [_check_labels(table, list(itertools.islice(rest, len(table.labels))), corrupt) for table in shards]
        for split, shards in tables.items()
    }
    if shape is None or disk.fits(len(everything), shape):
        load = functools.partial(_load, corrupt=corrupt, channels=channels, size=size)
        return {split: list(map(load, shards, labels[split])) for split, shards in tables.items()}, classes
    parts: Parts = {}
    for split, shards in tables.items():
        encoded = [_encoded(table, own) for table, own in zip(shards, labels[split], strict=True)]
        parts[split] = [*make_shards(encoded, shape=shape, size=size, corrupt=corrupt)]
    return parts, classes


def make_shards(
    encoded: Sequence[Encoded], *, shape: tuple[int, ...], size: int | None, corrupt: Corrupt
) -> list[Shard]:
    """Return shards of images of a ``shape`` (C, H, W), which are decoded when they are written to disk.

    With ``corrupt: skip`` all are decoded here, too, to know which can be read; the answer is cached.
    """
    options: dict[str, Any] = {"channels": shape[0], "size": size}

    def readable(part: Encoded, progress: Progress) -> list[int]:
        if corrupt == "refuse":
            return list(range(len(part.labels)))
        make = lambda: {"rows": decode(part.blobs(), part.names, corrupt="skip", progress=progress, **options)[1]}
        return cached([f"readable {part.stamp} {options}".encode()], make)["rows"].tolist()

    def shard(part: Encoded, rows: list[int]) -> Shard:
        def read(progress: Progress) -> Tensor:
            blobs = part.blobs()
            chosen, names = [blobs[row] for row in rows], [part.names[row] for row in rows]
            return decode(chosen, names, corrupt="refuse", progress=progress, **options)[0]

        y = torch.tensor([part.labels[row] for row in rows], dtype=torch.int64)
        return Shard(y, shape, hashlib.sha256(f"{part.stamp} {options} {rows}".encode()).hexdigest(), read)

    shards, start = [], 0
    with console.lines("images looked at", sum(len(part.labels) for part in encoded)) as tell:
        for part in encoded:
            rows = readable(part, disk.behind(start, tell))
            start += len(part.labels)
            if kept := [row for row in rows if part.labels[row] is not None]:
                shards.append(shard(part, kept))
    return shards


def _encoded(table: Table, labels: Sequence[int | None]) -> Encoded:
    return Encoded(functools.partial(_find_blobs, table), _row_names(table), labels, table.stamp)


def _row_names(table: Table) -> list[str]:
    return [f"{table.where} {table.first + row}" for row in range(len(table.labels))]


def _check_labels(table: Table, labels: list[int | None], corrupt: Corrupt) -> list[int | None]:
    """Return the labels of a table, all -1 if there are none; raise UserError if only some are missing."""
    without = labels.count(None)
    if without == len(labels):  # such as the test images of a competition
        return [-1] * len(labels)
    if without and corrupt == "refuse":
        raise UserError(
            f"{without} of {len(labels)} images have no label, the first of them {table.where} "
            f"{table.first + labels.index(None)}; "
            "leave such images out with --data.corrupt skip"
        )
    return labels


def _load(table: Table, labels: Sequence[int | None], *, corrupt: Corrupt, channels: int, size: int | None) -> Images:
    """Return the labelled and readable images of a table, in memory; decoded once and then read from the cache."""

    def make() -> dict[str, Tensor]:
        x, rows = decode(_find_blobs(table), _row_names(table), channels=channels, size=size, corrupt=corrupt)
        return {"x": x, "rows": rows}

    decoded = cached(table.content(), make)
    x, rows = decoded["x"], decoded["rows"]
    if None in labels:
        labelled = torch.tensor([labels[row] is not None for row in rows.tolist()])
        x, rows = x[labelled], rows[labelled]
    return Images(x, torch.tensor([labels[row] for row in rows.tolist()], dtype=torch.int64))


def _find_blobs(table: Table) -> list[bytes | Path]:
    return [find_blob(cell, table.where) for cell in table.images()]


def find_blob(cell: Any, where: str) -> bytes | Path:
    """Return the encoded image in a cell, or its path; empty for an empty cell."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if cell is None or isinstance(cell, bytes):
        return cell or b""
    if isinstance(cell, str):
        return Path(cell)
    raise UserError(f"{where}: a cell of the image column holds a {type(cell).__name__}, not an image file")
