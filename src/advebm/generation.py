"""From a trained run to a folder of generated images: grid, film strip, all images, manifest."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from advebm import config, files, pictures, seeds
from advebm.data.sources import Data, to_float
from advebm.errors import UserError
from advebm.metrics.base import SampleSet, as_images, device_of
from advebm.models.inference import Way, fast, view
from advebm.modes import through
from advebm.samplers import Sampler

CHUNK = 500  # images drawn together, each chunk with its own generator: results do not depend on who draws which


def generate(
    model: nn.Module,
    sampler: Sampler,
    data: Data,
    y: Tensor,
    *,
    outside: Data | None = None,
    seed: int = 0,
    way: Way = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> SampleSet:
    """Images of classes ``y (N,)`` int64, -1 where there are none, uncurated, on the CPU.

    Args:
        model: classifier, or critic, ``(B, C, H, W)`` in [0, 1] -> logits.
        sampler: the algorithm and its settings.
        data: whose training split the seeds are fitted on.
        y: the class of each image.
        outside: whose test images chains begin from, with ``start: outside``.
        seed: of seeds and noise.
        way: how the network is computed, see :class:`advebm.models.inference.Fast`; ``auto`` folds.
        progress: told how many images are done.
    """
    device, start = device_of(model), sampler.prepare(data, outside)
    example = as_images(data.train.x[: min(len(y), CHUNK)], device)
    quick = view(model, example, fast(way), loud=way != "auto") if len(example) else None
    drawn = []
    for number, classes in enumerate(y.split(CHUNK)):
        classes, generator = classes.to(device), seeds.generator(seed, "sample", number, device=device)
        begin = start(torch.empty(len(classes), *data.shape, device=device), classes, generator)
        with through(model, quick and quick.refresh):
            drawn.append(sampler(model, classes, begin, generator=generator).cpu())
        progress(sum(map(len, drawn)))
    images = torch.cat(drawn) if drawn else torch.empty(0, *data.shape)
    about = {"sampler": config.describe(sampler), "seed": seed, "fast": "off" if quick is None else quick.way.name}
    return SampleSet(images, y.cpu(), about)


def wanted(sampler: Sampler, data: Data, per_class: int) -> Tensor:
    """The class of each image to draw; -1 for as many images where neither the energy nor the seeds are of a class."""
    y = torch.arange(len(data.classes)).repeat_interleave(per_class)
    return y if sampler.conditional or sampler.start == "class" else torch.full_like(y, -1)


def film(
    model: nn.Module,
    sampler: Sampler,
    data: Data,
    *,
    outside: Data | None = None,
    frames: int = 7,
    seed: int = 0,
) -> tuple[Tensor, list[int]]:
    """One chain a class, seen at ``frames`` steps from the seed to the last iterate: (classes, frames, C, H, W)."""
    device, y = device_of(model), wanted(sampler, data, 1)
    generator = seeds.generator(seed, "film", device=device)
    begin = sampler.prepare(data, outside)(torch.empty(len(y), *data.shape, device=device), y.to(device), generator)
    path: list[Tensor] = []
    end = sampler(model, y.to(device), begin, generator=generator, observe=lambda k, x, value: path.append(x.cpu()))
    path.append(end.cpu())
    shown = sorted({round(i) for i in np.linspace(0, sampler.steps, frames)})
    return torch.stack([path[k] for k in shown], 1), shown


def write(folder: Path, samples: SampleSet, classes: int, strip: tuple[Tensor, list[int]] | None = None) -> None:
    """``images.npz`` (uint8 ``x``, int64 ``y``), ``grid.png``, ``film.png``; then, to say so, ``manifest.json``.

    ``strip`` is what :func:`film` returned.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        pixels = (samples.x * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        np.savez_compressed(folder / "images.npz", x=pixels, y=samples.y.numpy())
        pictures.save(pictures.grid(pictures.by_class(samples.x, samples.y, classes)), folder / "grid.png")
        if strip is not None:
            pictures.save(pictures.grid(strip[0]), folder / "film.png")
    except OSError as error:
        raise files.unwritable(folder, error) from None
    about = {**samples.manifest, "count": len(samples.x), "film": [] if strip is None else strip[1]}
    files.write_json(folder / "manifest.json", about)


def read(folder: Path) -> SampleSet:
    """What :func:`write` wrote; an error where the manifest is missing, that is, where writing was cut short."""
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
