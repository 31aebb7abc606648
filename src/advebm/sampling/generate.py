"""Draw samples from a model in chunks, and write or read the folder of a sample set (images, grid, film, manifest)."""

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
from advebm.descent import Observer
from advebm.metrics.base import SampleSet
from advebm.models.batching import as_images, batch_size_for, device_of
from advebm.models.inference import BackendName, View, find_backend, make_view
from advebm.samplers.base import Sampler
from advebm.starts import ImagePool, Start

CHUNK = 500  # images per chunk; each chunk has its own generator, so results do not depend on the number of processes


def generate(
    model: nn.Module,
    sampler: Sampler,
    data: Data,
    y: Tensor,
    *,
    outside: Data | None = None,
    seed: int = 0,
    backend: BackendName = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> SampleSet:
    """Draw one sample for each entry of ``y``, without selecting among them; they are returned on the CPU.

    Args:
        model: classifier or critic, ``(B, C, H, W)`` in [0, 1] -> logits; or encoder, -> features g(x).
        sampler: the algorithm and its settings.
        data: the dataset; the distribution of the seeds is fitted on one of its splits.
        y: class of each sample, int64 (N,); -1 for no class.
        outside: the data whose test images chains start from, with ``start: outside`` or ``start: buffer``.
        seed: seed of the starting images and of the noise.
        backend: how to compute the network, see :class:`advebm.models.inference.Backend`; ``auto`` folds batch norms.
        progress: called at each step with the number of images done so far; those under way count by their steps.
    """
    options: dict[str, Any] = {"outside": outside, "seed": seed, "backend": backend, "progress": progress}
    images, view = generate_along(model, sampler, data, y, (sampler.steps,), **options)
    manifest = {"sampler": config.describe(sampler), "seed": seed, "fast": "off" if view is None else view.backend.name}
    return SampleSet(images[sampler.steps], y.cpu(), manifest)


def generate_along(
    model: nn.Module,
    sampler: Sampler,
    data: Data,
    y: Tensor,
    steps: Sequence[int],
    *,
    outside: Data | None = None,
    seed: int = 0,
    backend: BackendName = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[int, Tensor], View | None]:
    """Draw as :func:`generate` does; return the images after each of ``steps``, and the view of the network used.

    The images after k steps are those of a chain of k steps only if the sampler is ``extendable``.
    """
    check_groups(sampler, len(y))
    start, images = sampler.prepare(data, outside), {k: [torch.empty(0, *data.shape)] for k in steps}
    bank, view = sampler.bank(data), sampling_view(model, data, len(y), backend)

    options: dict[str, Any] = {"shape": data.shape, "seed": seed, "view": view, "bank": bank}
    for number in range(count_chunks(len(y))):

        def keep(k: int, x: Tensor, energy: Tensor | None = None, done: int = number * CHUNK) -> None:
            if k in images:
                images[k].append(x.cpu())
            progress(done + len(x) * k // max(1, sampler.steps))

        keep(sampler.steps, draw_chunk(model, sampler, start, y, number, observe=keep, **options))
    return {k: torch.cat(parts) for k, parts in images.items()}, view


def check_groups(sampler: Sampler, count: int, batch: int | None = None) -> None:
    """Raise ``UserError`` if samples interact and ``count`` or ``batch`` is too small to hold a group of them."""
    for size in {min(count, CHUNK), count % CHUNK} - {0}:
        sampler.parts(size, batch)


def sampling_view(model: nn.Module, data: Data, count: int, backend: BackendName) -> View | None:
    """Return the network as ``backend`` computes it, for ``count`` images; None if that cannot be applied."""
    images = data.train.x if len(data.train) else data.test.x
    example = as_images(images[: min(count, CHUNK, batch_size_for(data.shape, model))], device_of(model))
    return make_view(model, example, find_backend(backend), loud=backend != "auto") if len(example) else None


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
    view: View | None = None,
    bank: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Draw chunk ``number`` of the images of classes ``y (N,)``, and return it on the CPU.

    The result does not depend on which chunks were drawn before.  ``batch`` (images per forward pass, default:
    :func:`batch_size_for`) and ``view`` (from :func:`sampling_view`) change rounding only.  ``bank`` is what
    :meth:`Sampler.bank` returned.  ``observe`` is called before each step.
    """
    batch = batch_size_for(shape, model) if batch is None else batch
    if isinstance(start, ImagePool):
        first = number * CHUNK
        start = dataclasses.replace(start, order=deal_images(len(start.x), first, min(CHUNK, len(y) - first), seed))
    chains = start_chains(model, start, y, number, shape, seed, "sample")
    return run_chains(model, sampler, chains, batch=batch, bank=bank, view=view, observe=observe).cpu()


class ChainStart(NamedTuple):
    """The chains of a chunk before their first step: classes, starting images, and the generator of the noise."""

    y: Tensor
    x: Tensor
    generator: torch.Generator


def count_chunks(count: int) -> int:
    return -(-count // CHUNK)


def start_chains(
    model: nn.Module, start: Start, y: Tensor, number: int, shape: Sequence[int], seed: int, purpose: str
) -> ChainStart:
    """Draw the starting images of a chunk, from random numbers that depend on ``seed``, ``purpose`` and ``number``."""
    device, first = device_of(model), number * CHUNK
    classes, generator = y[first : first + CHUNK].to(device), rng.generator(seed, purpose, number, device=device)
    x = start(torch.empty(len(classes), *shape, device=device), classes, generator)
    return ChainStart(classes, x, generator)


def run_chains(model: nn.Module, sampler: Sampler, chains: ChainStart, **options: Any) -> Tensor:
    return sampler(model, chains.y, chains.x, generator=chains.generator, **options)


def deal_images(total: int, first: int, count: int, seed: int) -> Tensor:
    """Return items ``first`` to ``first + count - 1`` of an endless sequence of permutations of ``range(total)``."""
    rounds = range(first // total, (first + count - 1) // total + 1)
    row = torch.cat([torch.randperm(total, generator=rng.generator(seed, "deal", number)) for number in rounds])
    return row[first - rounds[0] * total :][:count]


def set_name(sampler: Sampler) -> str:
    """Return the default name of a sample set, such as ``cs-class``."""
    return f"{config.describe(sampler)['kind'].rpartition(':')[2].lower()}-{sampler.start}"


def classes_to_draw(sampler: Sampler, data: Data, per_class: int, classes: Sequence[int] | None = None) -> Tensor:
    """Return the class of each image to draw, int64; all -1 if neither the energy nor the seeds depend on a class."""
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
    """Run one chain per class; return images (classes, frames, C, H, W) from seed to last iterate, and their steps.

    A single class gets two chains if samples interact.
    """
    pair = sampler.coupled and len(data.classes if classes is None else classes) == 1
    device, y = device_of(model), classes_to_draw(sampler, data, 1 + pair, classes)
    generator = rng.generator(seed, "film", device=device)
    x = sampler.prepare(data, outside)(torch.empty(len(y), *data.shape, device=device), y.to(device), generator)
    path: list[Tensor] = []
    options: dict[str, Any] = {"generator": generator, "bank": sampler.bank(data)}
    end = sampler(model, y.to(device), x, observe=lambda k, x, value: path.append(x.cpu()), **options)
    path.append(end.cpu())
    steps = sorted({round(i) for i in np.linspace(0, sampler.steps, frames)})
    return torch.stack([path[k] for k in steps], 1), steps


def write_set(folder: Path, samples: SampleSet, classes: int) -> None:
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
    """Write ``images.npz`` (uint8 ``x``, int64 ``y``), ``grid.png`` and ``film.png``, and last ``manifest.json``.

    The manifest marks a complete set.  Equal content gives equal bytes, since there are no time stamps.

    Args:
        folder: the folder of the set.
        parts: uint8 images (n, C, H, W), of which one part at a time is in memory.
        y: class of each image.
        shape: (C, H, W) of an image.
        manifest: how the images were made.
        classes: number of rows of the grid.
        strip: what :func:`draw_trajectory` returned; without it no ``film.png`` is written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
    except OSError as error:
        raise files.as_user_error(folder, error) from None
    first: dict[int, list[Tensor]] = {}
    done = 0
    with files.replace_atomically(folder / "images.npz") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(_archive_entry("x"), "w", force_zip64=True) as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(y), *shape)}
            np.lib.format.write_array_header_1_0(out, header)
            for part in parts:
                out.write(part.numpy().tobytes())
                for x, k in zip(part, y[done : done + len(part)].tolist(), strict=True):
                    if len(row := first.setdefault(k, [])) < (10 if k >= 0 else 10 * classes):  # the grid shows no more
                        row.append(x.clone())
                done += len(part)
        with archive.open(_archive_entry("y"), "w") as out:
            np.lib.format.write_array(out, y.numpy())
    shown = [(x, k) for k, row in sorted(first.items()) for x in row]
    images = torch.stack([x for x, _ in shown]) if shown else torch.empty(0, *shape)
    rows = pictures.rows_by_class(images, torch.tensor([k for _, k in shown], dtype=torch.int64), classes)
    pictures.save(pictures.grid(rows), folder / "grid.png")
    if strip is not None:
        pictures.save(pictures.grid(strip[0]), folder / "film.png")
    files.write_json(folder / "manifest.json", {**manifest, "count": len(y), "film": [] if strip is None else strip[1]})


def _archive_entry(name: str) -> zipfile.ZipInfo:
    """Return the archive entry of an array, dated 1980 so that equal content gives equal bytes."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def read_set(folder: Path) -> SampleSet:
    """Load what :func:`write_parts` wrote; raise ``UserError`` if it is damaged or incomplete (no manifest)."""
    manifest = files.read_json(folder / "manifest.json")
    try:
        with (folder / "images.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    except (OSError, KeyError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{folder / 'images.npz'} is damaged ({type(error).__name__}); sample again") from None
    complete = isinstance(manifest, dict) and ({"sampler", "seed"} <= manifest.keys() or "images" in manifest)
    if not complete or x.ndim != 4:
        raise UserError(f"{folder / 'manifest.json'} is damaged; sample again")
    return SampleSet(to_float(x), y, manifest)


def to_bytes(x: Tensor) -> Tensor:
    """Convert floating point in [0, 1] to uint8, rounding to the nearest of 256 levels."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)
