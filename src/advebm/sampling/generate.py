"""Images from a model, chunk by chunk, and what a folder of them holds: all images, grid, film, manifest."""

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from advebm.core import config, files, rng
from advebm.core.errors import UserError
from advebm.data import pictures
from advebm.data.sources import Data, to_float
from advebm.metrics.base import SampleSet
from advebm.models.batching import as_images, batch_size_for, device_of
from advebm.models.inference import BackendName, View, find_backend, make_view
from advebm.samplers.base import Sampler
from advebm.starts import ImagePool, Start

CHUNK = 500  # images drawn together, each chunk with its own generator: results do not depend on who draws which


def generate(
    model: nn.Module,
    sampler: Sampler,
    data: Data,
    y: Tensor,
    *,
    outside: Data | None = None,
    seed: int = 0,
    way: BackendName = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> SampleSet:
    """Images of classes ``y (N,)`` int64, -1 where there are none, uncurated, on the CPU.

    Args:
        model: classifier or critic, ``(B, C, H, W)`` in [0, 1] -> logits, or encoder, -> g(x).
        sampler: the algorithm and its settings.
        data: on a split of which the seeds are fitted.
        y: the class of each image.
        outside: whose test images chains begin from, with ``start: outside``.
        seed: of seeds and noise.
        way: how the network is computed, see :class:`advebm.models.inference.Backend`; ``auto`` folds.
        progress: told how many images are done.
    """
    check_groups(sampler, len(y))
    start, drawn = sampler.prepare(data, outside), [torch.empty(0, *data.shape)]
    bank, quick = sampler.bank(data), sampling_view(model, data, len(y), way)
    for number in range(count_chunks(len(y))):
        drawn.append(draw_chunk(model, sampler, start, y, number, shape=data.shape, seed=seed, quick=quick, bank=bank))
        progress(sum(map(len, drawn)))
    about = {"sampler": config.describe(sampler), "seed": seed, "fast": "off" if quick is None else quick.way.name}
    return SampleSet(torch.cat(drawn), y.cpu(), about)


def check_groups(sampler: Sampler, count: int, batch: int | None = None) -> None:
    """Refuse a number of images, or a ``batch``, that leaves out a sample's others where samples interact."""
    for size in {min(count, CHUNK), count % CHUNK} - {0}:
        sampler.parts(size, batch)


def sampling_view(model: nn.Module, data: Data, count: int, way: BackendName) -> View | None:
    """The network for searches, as ``way`` asks, where that applies; for ``count`` images, in chunks."""
    example = as_images(data.train.x[: min(count, CHUNK, batch_size_for(data.shape))], device_of(model))
    return make_view(model, example, find_backend(way), loud=way != "auto") if len(example) else None


def draw_chunk(
    model: nn.Module,
    sampler: Sampler,
    start: Start,
    y: Tensor,
    number: int,
    *,
    shape: Sequence[int],
    seed: int = 0,
    batch: int | None = None,
    quick: View | None = None,
    bank: Tensor | None = None,
) -> Tensor:
    """Images ``number * CHUNK`` and on of those of classes ``y (N,)``, on the CPU.

    They depend on nothing that was drawn before.  ``batch`` (images that the network sees at once; none for as many
    as :func:`batch_size_for` says) and ``quick`` (the network as it is searched) change rounding.  ``bank`` is the
    sampler's, of the data.
    """
    batch = batch_size_for(shape) if batch is None else batch
    if isinstance(start, ImagePool):
        first = number * CHUNK
        start = dataclasses.replace(start, order=deal_images(len(start.x), first, min(CHUNK, len(y) - first), seed))
    chains = start_chains(model, start, y, number, shape, seed, "sample")
    return run_chains(model, sampler, chains, batch=batch, bank=bank, view=quick).cpu()


class ChainStart(NamedTuple):
    """Chains of a chunk before their first step: classes, initial samples, and the generator of their noise."""

    y: Tensor
    x: Tensor
    generator: torch.Generator


def count_chunks(count: int) -> int:
    """How many chunks so many images are drawn in."""
    return -(-count // CHUNK)


def start_chains(
    model: nn.Module, start: Start, y: Tensor, number: int, shape: Sequence[int], seed: int, purpose: str
) -> ChainStart:
    """The chains of a chunk of the classes ``y (N,)``; other seeds and other purposes draw other numbers."""
    device, first = device_of(model), number * CHUNK
    classes, generator = y[first : first + CHUNK].to(device), rng.generator(seed, purpose, number, device=device)
    x = start(torch.empty(len(classes), *shape, device=device), classes, generator)
    return ChainStart(classes, x, generator)


def run_chains(model: nn.Module, sampler: Sampler, chains: ChainStart, **options: Any) -> Tensor:
    """Where a sampler leads chains; ``options`` are those of :meth:`Sampler.__call__`."""
    return sampler(model, chains.y, chains.x, generator=chains.generator, **options)


def deal_images(total: int, first: int, count: int, seed: int) -> Tensor:
    """Items ``first`` to ``first + count - 1`` of an endless row of shuffles of ``total`` things."""
    rounds = range(first // total, (first + count - 1) // total + 1)
    row = torch.cat([torch.randperm(total, generator=rng.generator(seed, "deal", number)) for number in rounds])
    return row[first - rounds[0] * total :][:count]


def set_name(sampler: Sampler) -> str:
    """What a set of samples is called unless it is given a name: ``cs-class``."""
    return f"{config.describe(sampler)['kind'].rpartition(':')[2].lower()}-{sampler.start}"


def classes_to_draw(sampler: Sampler, data: Data, per_class: int, classes: Sequence[int] | None = None) -> Tensor:
    """The class of each image to draw; -1 for as many images where neither the energy nor the seeds are of a class."""
    y = torch.tensor(range(len(data.classes)) if classes is None else classes).repeat_interleave(per_class)
    return y if sampler.conditional or sampler.start == "class" else torch.full_like(y, -1)


def draw_trajectory(
    model: nn.Module,
    sampler: Sampler,
    data: Data,
    *,
    outside: Data | None = None,
    classes: Sequence[int] | None = None,
    frames: int = 7,
    seed: int = 0,
) -> tuple[Tensor, list[int]]:
    """One chain a class, seen at ``frames`` steps from the seed to the last iterate: (classes, frames, C, H, W).

    Two of a single class, where samples interact.
    """
    alone = sampler.coupled and len(data.classes if classes is None else classes) == 1
    device, y = device_of(model), classes_to_draw(sampler, data, 1 + alone, classes)
    generator = rng.generator(seed, "film", device=device)
    begin = sampler.prepare(data, outside)(torch.empty(len(y), *data.shape, device=device), y.to(device), generator)
    path: list[Tensor] = []
    options: dict[str, Any] = {"generator": generator, "bank": sampler.bank(data)}
    end = sampler(model, y.to(device), begin, observe=lambda k, x, value: path.append(x.cpu()), **options)
    path.append(end.cpu())
    shown = sorted({round(i) for i in np.linspace(0, sampler.steps, frames)})
    return torch.stack([path[k] for k in shown], 1), shown


def write_set(folder: Path, samples: SampleSet, classes: int) -> None:
    """A set of samples that is in memory; see :func:`write_parts`."""
    write_parts(folder, [to_bytes(samples.x)], samples.y, samples.x.shape[1:], samples.manifest, classes)


def write_parts(
    folder: Path,
    parts: Iterable[Tensor],
    y: Tensor,
    shape: Sequence[int],
    manifest: Mapping[str, Any],
    classes: int,
    strip: tuple[Tensor, list[int]] | None = None,
) -> None:
    """``images.npz`` (uint8 ``x``, int64 ``y``), ``grid.png``, ``film.png``; then, to say so, ``manifest.json``.

    The bytes of the files depend on what is in them alone.

    Args:
        folder: of the set.
        parts: uint8 images (n, C, H, W), held one part at a time.
        y: the class of each image.
        shape: of an image.
        manifest: how they were made.
        classes: rows of the grid.
        strip: what :func:`draw_trajectory` returned.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
    except OSError as error:
        raise files.unwritable(folder, error) from None
    first: dict[int, list[Tensor]] = {}
    done = 0
    with files.replacing(folder / "images.npz") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(_member("x"), "w", force_zip64=True) as out:
            about = {"descr": "|u1", "fortran_order": False, "shape": (len(y), *shape)}
            np.lib.format.write_array_header_1_0(out, about)
            for part in parts:
                out.write(part.numpy().tobytes())
                for x, k in zip(part, y[done : done + len(part)].tolist(), strict=True):
                    if len(row := first.setdefault(k, [])) < (10 if k >= 0 else 10 * classes):  # what a grid shows
                        row.append(x.clone())
                done += len(part)
        with archive.open(_member("y"), "w") as out:
            np.lib.format.write_array(out, y.numpy())
    shown = [(x, k) for k, row in sorted(first.items()) for x in row]
    images = torch.stack([x for x, _ in shown]) if shown else torch.empty(0, *shape)
    rows = pictures.rows_by_class(images, torch.tensor([k for _, k in shown], dtype=torch.int64), classes)
    pictures.save(pictures.grid(rows), folder / "grid.png")
    if strip is not None:
        pictures.save(pictures.grid(strip[0]), folder / "film.png")
    files.write_json(folder / "manifest.json", {**manifest, "count": len(y), "film": [] if strip is None else strip[1]})


def _member(name: str) -> zipfile.ZipInfo:
    """An array of an archive, dated 1980 so that time does not change the bytes."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def read_set(folder: Path) -> SampleSet:
    """What :func:`write_parts` wrote; an error where the manifest is missing, that is, where writing was cut short."""
    manifest = files.read_json(folder / "manifest.json")
    try:
        with (folder / "images.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    except (OSError, KeyError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{folder / 'images.npz'} is damaged ({type(error).__name__}); sample again") from None
    known = isinstance(manifest, dict) and ({"sampler", "seed"} <= manifest.keys() or "images" in manifest)
    if not known or x.ndim != 4:
        raise UserError(f"{folder / 'manifest.json'} is damaged; sample again")
    return SampleSet(to_float(x), y, manifest)


def to_bytes(x: Tensor) -> Tensor:
    """Floating point in [0, 1] -> uint8, to the nearest of 256 levels."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
