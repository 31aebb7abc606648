"""Files that hold many images each: parquet as on the Hugging Face Hub, and tar as webdataset writes it."""

import functools
import importlib
import json
import re
import tarfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from advebm.core import console
from advebm.core.errors import Notice, UserError, unknown_name
from advebm.data.cache import remember
from advebm.data.decode import Corrupt, readable_suffixes
from advebm.data.disk import stamp
from advebm.data.splits import Parts, list_some, split_name
from advebm.data.tables import Table, decode_tables

IMAGE_COLUMNS = ("img", "image", "images", "pixel_values", "picture", "png", "jpg", "jpeg", "webp")
LABEL_COLUMNS = ("label", "fine_label", "labels", "cls", "class", "class_label", "target", "y")
SUFFIXES = (".parquet", ".tar")


def find_shard_files(root: Path) -> list[Path]:
    """Return the parquet or tar files in a folder and the folders in it, sorted.

    Raises:
        UserError: there are files of both kinds.
    """
    folders = [root, *(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))]
    found = sorted(p for folder in folders for s in SUFFIXES for p in folder.glob(f"*{s}") if p.name[0] != ".")
    if len({p.suffix for p in found}) > 1:
        raise UserError(f"{root} has both parquet and tar files; give a folder with one kind of them")
    return found


def read_shard_files(
    root: Path, shards: Sequence[Path], *, size: int, channels: int, corrupt: Corrupt
) -> tuple[Parts, tuple[str, ...]]:
    """Return the splits of parquet or tar files below ``root``, and the names of classes; empty: labels are numbers.

    A file belongs to the split that its name, or else its folder's, has among its words: ``train-00000-of-00010``,
    ``imagenet-val-03``, ``test/0001``.  If no file's does, all are training images.

    Raises:
        UserError: names that do not say which files are the training images, or a damaged file.
    """
    splits = _find_file_splits(root, shards)
    tables: dict[str, list[Table]] = {split: [] for split in splits}
    classes: tuple[str, ...] = ()
    settings = f" {channels} {size}"
    everything = [(split, path) for split, paths in splits.items() for path in paths]
    with console.lines("shards looked through", len(everything)) as tell:
        for number, (split, path) in enumerate(everything):
            if path.suffix == ".tar":
                table = _tar_table(path, root, corrupt, settings)
            else:
                table, names = parquet_table(path, root, corrupt, settings)
                classes = classes or names
            tables[split].append(table)
            tell(number + 1)
    return decode_tables(str(root), tables, classes, corrupt, channels, size, (channels, size, size))


def _find_file_splits(root: Path, shards: Sequence[Path]) -> dict[str, list[Path]]:
    splits: dict[str | None, list[Path]] = {}
    for shard in shards:
        splits.setdefault(_find_split(shard, root), []).append(shard)
    others = splits.pop(None, [])
    if not splits:
        return {"train": others}
    if "train" not in splits:
        raise UserError(f"{root} has shards of {' and '.join(map(str, splits))}, but no train; name the others so")
    if others:
        warnings.warn(f"{root}: {list_some([p.name for p in others])} beside the splits: left out", stacklevel=3)
    named: dict[str, list[Path]] = {split: splits[split] for split in ("train", "val", "test") if split in splits}
    text = ", ".join(f"{len(paths)} shards as {split}" for split, paths in named.items())
    warnings.warn(f"{root}: read {text}", Notice, stacklevel=3)
    return named


def _find_split(shard: Path, root: Path) -> str | None:
    for text in (shard.stem, *reversed(shard.relative_to(root).parts[:-1])):
        found = {split for word in re.split(r"[^A-Za-z]+", text) if word and (split := split_name(word))}
        if len(found) > 1:
            raise UserError(f"{shard} names the splits {' and '.join(sorted(found))}; name it by one of them")
        if found:
            return found.pop()
    return None


# Parquet --------------------------------------------------------------------------------------------------------------


def parquet_table(shard: Path, root: Path, corrupt: Corrupt, settings: str = "") -> tuple[Table, tuple[str, ...]]:
    """Return the rows of a parquet file, and the names of classes that it gives.

    ``settings`` tells images that are decoded differently apart.

    Raises:
        UserError: the file is damaged or lacks the columns.
    """
    parquet = import_optional("pyarrow.parquet")
    schema = _read_or_refuse(shard, lambda: parquet.read_schema(shard))
    image, label = (choose_column(shard, schema.names, usual) for usual in (IMAGE_COLUMNS, LABEL_COLUMNS))
    cells = functools.partial(_read_column, parquet, shard, image)
    content = functools.partial(_shard_content, shard, f"parquet {corrupt}{settings}")
    table = Table(f"{shard.name} row", cells, _read_column(parquet, shard, label), content, stamp([shard], root))
    return table, _names_in(schema.metadata or {}, label)


def _read_column(parquet: Any, shard: Path, name: str) -> list[Any]:
    return _read_or_refuse(shard, lambda: parquet.read_table(shard, columns=[name])[name].to_pylist())


def _read_or_refuse(shard: Path, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # pyarrow raises many kinds
        raise UserError(f"{shard} is not parquet: {' '.join(str(error).split())[:200]}") from None


def _shard_content(shard: Path, settings: str) -> tuple[bytes, bytes]:
    return settings.encode(), shard.read_bytes()


def _names_in(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names in the metadata of the Hub's parquet files, if any."""
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def choose_column(
    where: object,
    names: Sequence[str],
    usual: Sequence[str],
    given: str | None = None,
    option: str = "",
    kinds: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the column that is given, or else one of a usual name or the only one of its type.

    For images the type counts more, for labels the name.
    """
    if given is not None:
        if given not in names:
            raise unknown_name(f"column for --data.{option}", given, names)
        return given
    typed = [name for name in names if kinds.get(name) == ("Image" if usual is IMAGE_COLUMNS else "ClassLabel")]
    named = [name for name in usual if name in names]
    if usual is IMAGE_COLUMNS and len(typed) == 1:
        return typed[0]
    if named or len(typed) == 1:
        return (named or typed)[0]
    fix = f"; say which it is: --data.{option} NAME" if option else ""
    raise UserError(f"{where} has the columns {', '.join(names)}; it needs one of {', '.join(usual)}{fix}")


def import_optional(module: str) -> Any:
    """Import a module of the extra ``data``; raise UserError with what installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this data needs {module.split('.')[0]}: pip install 'advebm[data]'") from None


# Tar ------------------------------------------------------------------------------------------------------------------

Place = tuple[int, int]  # where a file begins in an archive, and its bytes


def _tar_table(shard: Path, root: Path, corrupt: Corrupt, settings: str) -> Table:
    """Return the samples of a tar file: files of one name up to the first dot, such as ``7.jpg`` and ``7.cls``.

    A label is the text of ``.cls``, or an entry of ``.json`` with a usual name such as ``label``.

    Raises:
        UserError: the file is damaged, or a sample has several images.
    """
    changes = stamp([shard], root)
    places, labels = remember(f"samples of {shard.resolve()} {changes}", lambda: _read_samples(shard))
    content = functools.partial(_shard_content, shard, f"tar {corrupt}{settings}")
    return Table(f"{shard.name} image", functools.partial(_read_places, shard, places), labels, content, changes)


def _read_samples(shard: Path) -> tuple[list[Place], list[Any]]:
    """Return where the images of a tar file are, and their labels."""
    try:
        samples = _list_samples(shard)
        places, labels = [], []
        with shard.open("rb") as file:
            for name, kinds in samples.items():
                images = [place for kind, place in kinds.items() if f".{kind}" in readable_suffixes()]
                if len(images) > 1:
                    raise UserError(f"{shard}: {name} has {len(images)} images; there has to be one")
                if images:
                    places += images
                    labels.append(_read_label(file, kinds))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{shard} is not a whole tar file: {' '.join(str(error).split())}") from None
    return places, labels


def _list_samples(shard: Path) -> dict[str, dict[str, Place]]:
    """Return the files of each sample by what stands behind the first dot of their names, in the order of the archive.

    Raises:
        tarfile.TarError: the archive ends before its closing block of zeros.
    """
    samples: dict[str, dict[str, Place]] = {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, kind = name.partition(".")
            if member.isfile() and stem and dot:
                samples.setdefault(folder + slash + stem, {})[kind.lower()] = member.offset_data, member.size
        end = archive.offset  # tarfile takes a damaged header for the end
    if _read_places(shard, [(end, tarfile.BLOCKSIZE)]) != [bytes(tarfile.BLOCKSIZE)]:
        raise tarfile.ReadError(f"damaged or cut short at byte {end:,}")
    return samples


def _read_label(file: Any, kinds: Mapping[str, Place]) -> int | str | None:
    if (place := kinds.get("cls")) is not None:
        value: Any = _read_place(file, place).decode().strip()
    elif (place := kinds.get("json")) is not None:
        about = json.loads(_read_place(file, place))
        value = next((about[name] for name in LABEL_COLUMNS if name in about), None) if about else None
    else:
        return None
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _read_place(file: Any, place: Sequence[int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _read_places(shard: Path, places: Iterable[Sequence[int]]) -> list[bytes]:
    try:
        with shard.open("rb") as file:
            return [_read_place(file, place) for place in places]
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror or error}") from None
