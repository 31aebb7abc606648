"""Small sets of images written in the layouts that large ones have, of images whose pixels tell their class."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZE, CLASSES, NAMES = 8, 4, ("ant", "bee", "cat", "dog")
SHARDS = {"train-0": range(40), "train-1": range(40, 75), "train-2": range(75, 120), "test-0": range(120, 150)}


def pictures(count: int = 150, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 (N, H, W, 3), the first pixel of which says their class and number, and their classes."""
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, CLASSES, count)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = y, np.arange(count)
    return x, y


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, blobs: list[bytes], labels: list[int], names: tuple[str, ...] = NAMES) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    cells = arrow.array([{"bytes": blob, "path": None} for blob in blobs], kind)
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = arrow.table({"image": cells, "label": arrow.array(labels, arrow.int64())}).replace_schema_metadata(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def write(kind: str, root: Path) -> Path:
    """Write the set as ``parquet``, ``tar`` or a ``folder``, in three training shards and one of test images."""
    x, y = pictures()
    for name, rows in SHARDS.items():
        blobs, labels = [encode(x[i]) for i in rows], [int(y[i]) for i in rows]
        if kind == "parquet":
            write_parquet(root / "data" / f"{name}.parquet", blobs, labels)
        elif kind == "tar":
            pairs = zip(rows, blobs, labels, strict=True)
            files = {
                f"{i:04}.{part}": content for i, b, k in pairs for part, content in (("png", b), ("cls", b"%d" % k))
            }
            write_tar(root / f"set-{name}.tar", files)
        else:
            for i, blob, label in zip(rows, blobs, labels, strict=True):
                path = root / name[:-2] / NAMES[label] / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(blob)
    return root
