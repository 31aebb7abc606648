"""Edit image files or dataset images with the model of a run, and write the results to a folder."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from advebm.core import config, files, rng
from advebm.core.errors import UserError
from advebm.data import pictures
from advebm.data.decode import open_image, open_mask
from advebm.data.folders import list_pictures
from advebm.data.sources import Data
from advebm.descent import repeat_pixels
from advebm.edits.base import Edit, Edited, box_hole, join_parts
from advebm.edits.restore import Inpaint, Upsample
from advebm.edits.transform import Compose, Interpolate
from advebm.metrics.restoration import corrupt_for, fidelity, middle_hole
from advebm.metrics.unusual import unusual
from advebm.models.batching import batch_size_for, device_of
from advebm.runs import checkpoint
from advebm.runs.run import Run
from advebm.sampling.generate import to_bytes
from advebm.sampling.job import start_images

TILE = 96  # pixels per edge of an image in edit.png, film.png and film.gif


@dataclass(frozen=True)
class EditRequest:
    """Which images to edit, with which models.

    Attributes:
        run: the run whose model edits the images.
        others: further runs whose models take part in a composition (:class:`Compose`).
        source: the run whose data ``split`` refers to.  Default: ``run``.
        images: image files, and folders of image files.
        split: the dataset split to take images from if ``images`` is empty, ``test`` or ``val``.  Default: ``val``;
            :class:`Compose` and :class:`Interpolate` start from sampler seeds instead.
        count: number of images to take from the split, or of seeds to draw.
        fit: whether to convert image files to the size and channels of the model.
        goal: name or number of the class to move the images to.
        classes: for a composition, one class per model.
        mask: path of an image file with the mask, or the mask.
        box: the hole as ``left,top,right,bottom``, in pixels.
        seed: seed of all random numbers.
        checkpoint: the checkpoint of every run to load.
        device: where to compute.
    """

    run: Run
    others: tuple[Run, ...] = ()
    source: Run | None = None
    images: tuple[Path, ...] = ()
    split: str | None = None
    count: int = 8
    fit: bool = False
    goal: str | None = None
    classes: tuple[str, ...] = ()
    mask: Path | Tensor | None = None
    box: str | None = None
    seed: int = 0
    checkpoint: str = "latest"
    device: str = "cpu"

    def hole(self, method: Edit, size: tuple[int, int]) -> Tensor | None:
        """Return the mask (H, W) or None, see :func:`find_hole`."""
        return find_hole(method, size, self.mask, self.box, fit=self.fit)

    def models(self) -> list[tuple[Run, str]]:
        return [(run, self.checkpoint) for run in (self.run, *self.others)]

    def own(self, shape: Sequence[int]) -> Tensor:
        """Return images of the split, float32 (count, C, H, W): the first of each class, then the second, and so on."""
        data = (self.source or self.run).data
        if data.shape != tuple(shape):
            raise UserError(f"images of {data.name} are {data.shape}, the model takes {tuple(shape)}")
        split = data.test if self.split == "test" else data.val
        per_class = [(split.y == k).nonzero().squeeze(1) for k in split.y.unique()]
        ranks = torch.cat([torch.arange(len(indices)) for indices in per_class])
        return split.take(torch.cat(per_class)[ranks.argsort(stable=True)][: self.count]).float()

    def begin(self, data: Data) -> Tensor:
        """Draw seeds (count, C, H, W) as the run's sampler does; class seeds are replaced by the global Gaussian."""
        sampler = self.run.recipe.sampler
        sampler = replace(sampler, start="global") if sampler.start == "class" else sampler
        start = sampler.prepare(data, start_images(self.run, sampler, self.checkpoint))
        return start(torch.empty(self.count, *data.shape), None, rng.generator(self.seed, "seeds"))


def find_hole(
    method: Edit, size: tuple[int, int], mask: Path | Tensor | None, box: str | None, *, fit: bool = False
) -> Tensor | None:
    """Return the mask, bool (H, W), true where pixels are to be made; None: there is none.

    Args:
        method: the edit; for :class:`Inpaint` the default is the middle half of both edges.
        size: height and width of the images.
        mask: an image file that is white there, or the mask itself.
        box: the hole as ``left,top,right,bottom``, in pixels.
        fit: whether to scale a mask of another size.
    """
    if mask is not None and box is not None:
        raise UserError("--mask or --box, not both")
    if mask is not None:
        return mask if isinstance(mask, Tensor) else open_mask(mask, size, fit=fit)
    if box is not None:
        try:
            left, top, right, bottom = (int(word) for word in box.split(","))
        except ValueError:
            raise UserError(f"a box is left,top,right,bottom such as 8,8,24,24, got {box!r}") from None
        return box_hole(size, left, top, right, bottom)
    return middle_hole(size) if isinstance(method, Inpaint) else None


def score_images(order: EditRequest) -> dict[str, dict[str, float]]:
    """Return the energy of each image, by name, and the share of validation images with a lower energy."""
    data = order.run.data
    x, names = _load_inputs(order, data.shape)
    model = order.run.model(order.checkpoint)[0].to(order.device)
    energies = unusual(model, x, data.val.x, batch=batch_size_for(data.shape, model))
    return {
        name: {"energy": energies.score[i].item(), "share of validation images below": energies.share[i].item()}
        for i, name in enumerate(names)
    }


class EditedImages(NamedTuple):
    """An edit of named images.

    Attributes:
        method: the edit.
        names: a name for each result.
        given: the images that were given (N, C, h, w) in [0, 1].
        edited: the results.
        manifest: what else determined them: weights, seed, classes.
    """

    method: Edit
    names: list[str]
    given: Tensor
    edited: Edited
    manifest: dict[str, Any]

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """The numbers of each result, such as its energies, by its name."""
        return {name: {k: v[i].item() for k, v in self.edited.numbers.items()} for i, name in enumerate(self.names)}

    def write(self, folder: Path, *, film: bool = False) -> Path:
        """Write the results to a folder by :func:`write_edit`; return the path of ``edit.png``."""
        return write_edit(folder, self.method, self.given, self.edited, self.names, self.manifest, film=film)


def run_edit(order: EditRequest, method: Edit, *, progress: Callable[[int], None] = lambda done: None) -> EditedImages:
    """Edit images; what restores images gets them spoilt, if they are of a split, and is compared with them.

    Raises:
        UserError: the model does not accept the images, the mask or a class.
    """
    data = order.run.data
    channels, height, width = data.shape
    models = [r.model(which)[0].to(order.device) for r, which in order.models()]
    hole, truth = order.hole(method, (height, width)), None
    if not order.images and order.split is None and isinstance(method, Compose | Interpolate):
        x, names = order.begin(data), [f"seed-{i}" for i in range(order.count)]
        method = replace(method, ends="moved") if isinstance(method, Interpolate) else method
    elif order.images:
        small = method.factor if isinstance(method, Upsample) else 1
        x, names = _load_inputs(order, (channels, height // small, width // small))
    else:
        truth, names = _load_inputs(order, data.shape)
        x = corrupt_for(method, truth, hole, rng.generator(order.seed, "spoil"))
        truth = None if x is truth else truth
    goal = None if order.goal is None else find_class(data, order.goal)
    y = None if goal is None else torch.full((len(x),), goal)
    classes: list[int | None] = [find_class(data, text) for text in order.classes] or [None] * len(models)
    if len(models) == 1:
        models = models * len(classes)
    options: dict[str, Any] = {"hole": hole, "seed": order.seed, "frames": 13, "progress": progress}
    edited = apply_edit(method, models, x, y, classes=classes, **options)
    if isinstance(method, Interpolate):
        pairs = itertools.pairwise(names)
        names = [f"{a}-{b}-{i}" for a, b in pairs for i in range(method.count)]
    elif truth is not None:
        restoration: dict[str, Tensor] = {}
        for when, images in (("before", edited.begin), ("after", edited.x)):
            restoration |= {f"{name} {when}": v for name, v in fidelity(truth, images).items()}
        edited = edited._replace(numbers={**edited.numbers, **restoration})
    manifest = {"models": [weights_of(*pair) for pair in order.models()], "seed": order.seed}
    manifest |= {"class": goal, "classes": classes if isinstance(method, Compose) else None}
    return EditedImages(method, names, x, edited, manifest)


def _load_inputs(order: EditRequest, shape: Sequence[int]) -> tuple[Tensor, list[str]]:
    if order.images:
        return read_images(order.images, shape, fit=order.fit)
    x = order.own(shape)
    return x, [f"{order.split or 'val'}-{i}" for i in range(len(x))]


def apply_edit(
    method: Edit,
    models: Sequence[nn.Module],
    x: Tensor,
    y: Tensor | None = None,
    *,
    classes: Sequence[int | None] = (None,),
    hole: Tensor | None = None,
    seed: int = 0,
    frames: int = 7,
    progress: Callable[[int], None] = lambda done: None,
) -> Edited:
    """Edit images (N, C, H, W) in batches whose size depends on the image size.

    Args:
        method: the edit.
        models: one model, or several for a composition.
        x: the images; for :class:`Interpolate` the end points, for :class:`Compose` the seeds.
        y: target classes (N,); ignored for a composition.
        classes: for a composition, one class per model.
        hole: see :class:`Edit`.
        seed: seed of all random numbers.
        frames: number of frames of the film.
        progress: called with the number of images done so far.
    """
    if isinstance(method, Interpolate):
        edited = method(models[0], x, y, frames=frames)
        progress(len(x))
        return edited
    size, device, parts = batch_size_for(x.shape[1:], models[0]), device_of(models[0]), []
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        if isinstance(method, Compose):
            parts.append(method(models, x[rows], classes, frames=frames))
        else:
            generator = rng.generator(seed, "edit", first, device=device)
            mask = hole if hole is None or hole.ndim < 4 or len(hole) == 1 else hole[rows]
            goal = None if y is None else y[rows]
            parts.append(method(models[0], x[rows], goal, hole=mask, generator=generator, frames=frames))
        progress(min(first + size, len(x)))
    return join_parts(parts)


def read_images(paths: Sequence[Path], shape: Sequence[int], *, fit: bool = False) -> tuple[Tensor, list[str]]:
    """Load image files, and all those in folders, as float32 (N, C, H, W) in [0, 1], with a unique name for each."""
    image_paths = list_images(paths)
    names = [path.stem for path in image_paths]
    names = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]
    return torch.stack([open_image(p, shape, fit=fit) for p in image_paths]), names


def list_images(paths: Sequence[Path]) -> list[Path]:
    images = [image for path in paths for image in (list_pictures(path) if path.is_dir() else [path])]
    if not images:
        raise UserError(f"there is no image in {', '.join(map(str, paths)) or 'nothing'}")
    return images


def find_class(data: Data, text: str) -> int | None:
    """Return the number of a class; None for the text ``none``, unless a class has that name."""
    return None if text.lower() == "none" and text not in data.classes else data.number(text)


def weights_of(run: Run, which: str) -> dict[str, str]:
    """Return the run folder, the checkpoint name and the sha256 of the weights in use, for the manifest."""
    path = run.checkpoints.path(which)
    return {"run": str(run.folder.resolve()), "checkpoint": path.name, "weights": checkpoint.weights(path)}


def check_folder(folder: Path) -> dict[str, Any]:
    """Return the manifest of the edit in a folder, {} if it is new or empty; raise if it holds something else."""
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; --out takes a folder for this edit")
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return {}
    except OSError as error:
        raise files.as_user_error(folder, error) from None
    manifest = files.read_json(folder / "manifest.json", default={})
    if not isinstance(manifest, dict) or not isinstance(manifest.get("edit"), dict):
        raise UserError(f"{folder} holds something that is not an edit; --out takes a new folder, or an edit's")
    return manifest


def write_edit(
    folder: Path,
    method: Edit,
    given: Tensor,
    edited: Edited,
    names: Sequence[str],
    manifest: Mapping[str, Any],
    *,
    film: bool = False,
) -> Path:
    """Write ``edit.png``, ``images.npz``, ``results/NAME.png``, ``film.png``, and last ``manifest.json``.

    Results of an earlier edit in the folder are replaced.  The films show the first 20 images.

    Args:
        folder: the folder to write to.
        method: the edit.
        given: the input images (N, C, h, w).
        edited: the results.
        names: one name per image.
        manifest: further entries of the manifest.
        film: whether to write ``film.gif`` as well.

    Returns:
        The path of ``edit.png``.
    """
    before, about = check_folder(folder), {"edit": config.describe(method)}
    files.write_json(folder / "manifest.json", about)  # marks the folder as an edit, without images yet
    try:
        (folder / "results").mkdir(exist_ok=True)
        (folder / "film.gif").unlink(missing_ok=True)
        for name in before.get("images", {}):
            (folder / "results" / f"{Path(name).name}.png").unlink(missing_ok=True)
    except OSError as error:
        raise files.as_user_error(folder, error) from None
    pictures.save(pictures.grid(comparison_rows(method, given, edited), tile=TILE), folder / "edit.png")
    pictures.save(pictures.grid(edited.film[:20], tile=TILE), folder / "film.png")
    if film:
        files.write(folder / "film.gif", pictures.animate(edited.film[:20], tile=TILE))
    results = to_bytes(edited.x)
    for name, x in zip(names, results, strict=True):
        pictures.save(pictures.to_picture(x), folder / "results" / f"{name}.png")
    with files.replace_atomically(folder / "images.npz") as file:
        np.savez_compressed(
            file, x=results.numpy(), given=to_bytes(given).numpy(), begin=to_bytes(edited.begin).numpy()
        )
    plain = lambda value: value if math.isfinite(value) else None  # JSON has no infinity, the PSNR of equal images
    numbers = {name: {k: plain(v[i].item()) for k, v in edited.numbers.items()} for i, name in enumerate(names)}
    series = {name: {k: v[i].tolist() for k, v in edited.series.items()} for i, name in enumerate(names)}
    record = {**manifest, **about, "film": edited.frame_steps, "images": numbers}
    files.write_json(folder / "manifest.json", record | ({"series": series} if edited.series else {}))
    return folder / "edit.png"


def comparison_rows(method: Edit, given: Tensor, edited: Edited) -> Tensor:
    """Return the images of ``edit.png``, (rows, columns, C, H, W), one row per pair of end points for interpolations.

    Other edits have a row per image, at most 20: input, result, and half their difference around mid grey.
    """
    if isinstance(method, Interpolate):
        return edited.x.view(-1, method.count, *edited.x.shape[1:])
    if given.shape != edited.x.shape:
        given = repeat_pixels(given, edited.x.shape[-1] // given.shape[-1])
    reference = edited.begin if isinstance(method, Upsample) else given
    return torch.stack([given, edited.x, 0.5 + (edited.x - reference) / 2], 1)[:20]
