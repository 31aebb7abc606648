"""Evaluation of edits: restoration against the original images and baseline methods, and counterfactuals."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from advebm.core import config, rng
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.core.rng import rand, randn
from advebm.descent import repeat_pixels
from advebm.edits.base import Edit, box_hole
from advebm.edits.restore import Denoise, Inpaint, Upsample, median
from advebm.edits.transform import Counterfactual
from advebm.metrics.base import Record, Subject, average, proportion
from advebm.metrics.robustness import check_image_count, random_subset
from advebm.metrics.similarity import paired_ssim, psnr

Restore = Callable[[Tensor], Tensor]  # degraded images -> restored images
PEPPER = 0.1  # share of pixels that salt-and-pepper noise replaces
STRENGTHS = tuple(2.0**k for k in range(-4, 4))  # multiples of an edit's own strength to try on validation images
VARIATIONS = (0.02, 0.05, 0.1, 0.2, 0.4)  # weights of total variation to try on validation images


def corrupt_for(method: Edit, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Degrade images (B, C, H, W) for an edit to restore: add noise, downsample, or make the hole black."""
    if isinstance(method, Upsample):
        return avg_pool2d(x, method.factor)
    if isinstance(method, Denoise) and method.noise == "gaussian":
        return (x + method.sigma * randn(x, generator)).clamp(0, 1)
    if isinstance(method, Denoise):
        return add_salt_and_pepper(x, PEPPER, generator)
    if isinstance(method, Inpaint) and hole is not None:
        return x.masked_fill(hole.to(x.device).reshape(-1, 1, *hole.shape[-2:]), 0.0)
    return x


def add_salt_and_pepper(x: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Make each pixel black or white, in all channels, with probability ``share / 2`` each."""
    draw = rand(x[:, :1], generator)
    return x.masked_fill(draw < share / 2, 0.0).masked_fill((draw >= share / 2) & (draw < share), 1.0)


def middle_hole(size: tuple[int, int]) -> Tensor:
    """Return a mask (H, W) that is true in the middle half of height and width."""
    height, width = size
    return box_hole(size, width // 4, height // 4, width * 3 // 4, height * 3 // 4)


def fidelity(truth: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Return ``PSNR`` (decibels) and ``SSIM`` of images to the originals, (B,) each."""
    return {"PSNR": psnr(truth, x), "SSIM": paired_ssim(truth, x)}


def baselines(method: Edit, hole: Tensor) -> dict[str, Restore]:
    """Return baseline methods for an edit's task, including the edit's starting image, but not total variation.

    Raises:
        UserError: the edit is inpainting and scikit-image is not installed.
    """
    start_of = lambda edit: lambda x: edit.make_problem(x, hole.expand(len(x), 1, -1, -1), None).start
    if isinstance(method, Inpaint):
        inpaint = partial(scikit_image().inpaint_biharmonic, mask=hole.numpy(), channel_axis=-1)
        fills = {f"{fill} fill": start_of(replace(method, fill=fill)) for fill in ("mean", "smooth")}
        return {**fills, "biharmonic": for_each_image(inpaint)}
    if isinstance(method, Upsample):
        return {"blocks": lambda x: repeat_pixels(x, method.factor), "bicubic": start_of(method)}
    assert isinstance(method, Denoise)
    nothing: dict[str, Restore] = {"nothing": lambda x: x}
    if method.noise == "gaussian":
        return nothing
    return {**nothing, "median": median, "median where found": start_of(method)}


def scikit_image() -> Any:
    try:
        from skimage import restoration
    except ImportError:
        raise UserError(
            "this compares with scikit-image, which is not installed: pip install 'advebm[compare]'"
        ) from None
    return restoration


def for_each_image(method: Callable[[Any], Any]) -> Restore:
    """Return the restoration of a batch by a method of scikit-image, which takes one NumPy image (H, W, C)."""
    one = lambda x: torch.from_numpy(method(x.permute(1, 2, 0).numpy())).to(x).permute(2, 0, 1)
    return lambda x: torch.stack([one(image) for image in x]).clamp(0, 1)


def total_variation(weight: float) -> Restore:
    """Return total-variation denoising, Chambolle (2004), by scikit-image; a larger weight smooths more."""
    return for_each_image(partial(scikit_image().denoise_tv_chambolle, weight=weight, channel_axis=-1))


@dataclass(frozen=True)
class Restoration:
    """PSNR (decibels) and SSIM of test images that were spoilt and restored, by edits and by other ways.

    All methods get the same degraded images.  The strength of an edit (2^-4 to 2^3 times its own λ for Gaussian
    denoising, else its own step size) and the weight of total variation are chosen by PSNR on ``images`` validation
    images.  Salt-and-pepper noise replaces a tenth of the pixels; the hole is the middle half of height and width.

    Attributes:
        edits: the edits to measure.
        images: number of images of the split, always the same ones.  None: all.
    """

    edits: tuple[Edit, ...] = (Denoise(), Denoise(noise="salt-and-pepper"), Inpaint(), Upsample())
    images: int | None = 100

    cites: ClassVar[tuple[str, ...]] = ("binary-at", "chambolle2004", "vanderwalt2014")

    def __post_init__(self) -> None:
        check_image_count(self.images)
        if not all(isinstance(edit, Denoise | Inpaint | Upsample) for edit in self.edits):
            raise UserError("edits that restore are denoise, inpaint and upsample")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return ``PSNR`` and ``SSIM`` for each task and method; the edit itself is the method ``energy``."""
        subject = random_subset(subject, self.images)
        truth = subject.split.float()
        validation = random_subset(subject._replace(split=subject.data.val), self.images).split.float()
        hole, records = middle_hole(truth.shape[2:]), []  # type: ignore[arg-type]
        seed = generator.initial_seed()
        for edit in self.edits:
            name = task(edit)
            degraded = corrupt_for(edit, truth, hole, rng.generator(seed, name, "test"))
            degraded_validation = corrupt_for(edit, validation, hole, rng.generator(seed, name, "validation"))
            tuned = self._tune(edit, subject, degraded_validation, validation, hole)
            methods = baselines(edit, hole)
            if isinstance(edit, Denoise):
                score = lambda weight, x=degraded_validation: psnr(validation, total_variation(weight)(x)).mean().item()
                methods["total variation"] = total_variation(max(VARIATIONS, key=score))
            methods["energy"] = partial(self._apply, tuned, subject, hole)
            for method, restore in methods.items():
                about = {"edit": config.describe(tuned), "way": method, "metric": config.describe(self)}
                for quantity, values in fidelity(truth, restore(degraded)).items():
                    records.append(Record(f"{quantity} {name} by {method}", *average(values), about))
        return records

    def _tune(self, edit: Edit, subject: Subject, x: Tensor, truth: Tensor, hole: Tensor) -> Edit:
        """Return the edit with the strength that has the highest mean PSNR on degraded (validation) images ``x``."""
        if isinstance(edit, Denoise) and edit.noise == "gaussian":
            candidates: list[Edit] = [replace(edit, prior=edit.prior * strength) for strength in STRENGTHS]
        else:
            share = torch.as_tensor(edit.make_problem(x, hole.expand(len(x), 1, -1, -1), None).share).double().mean()
            step_size = edit.step_size or edit.stride * math.sqrt(share.item() * truth[0].numel())
            candidates = [replace(edit, step_size=step_size * strength) for strength in STRENGTHS]
        return max(candidates, key=lambda e: psnr(truth, self._apply(e, subject, hole, x)).mean().item())

    @staticmethod
    def _apply(edit: Edit, subject: Subject, hole: Tensor, x: Tensor) -> Tensor:
        generator = rng.generator(0, "restoration", device=subject.device)
        mask = hole if isinstance(edit, Inpaint) else None
        parts = [edit(subject.model, z, hole=mask, generator=generator, frames=2).x for z in x.split(subject.batch)]
        return torch.cat(parts)


def task(edit: Edit) -> str:
    """Return the name of an edit's task in tables, such as ``inpainting``."""
    if isinstance(edit, Inpaint):
        return "inpainting"
    if isinstance(edit, Upsample):
        return f"upsampling x{edit.factor}"
    assert isinstance(edit, Denoise)
    return "salt and pepper" if edit.noise == "salt-and-pepper" else f"denoising {edit.sigma:g}"


@dataclass(frozen=True)
class Counterfactuals:
    """Whether images of another class are found nearby, how near, and whether others see that class in them.

    Attributes:
        edit: the search.
        towards: target class: ``likely``, the second most likely one, or ``random``, any but the label.
        images: number of images of the split, always the same ones.  None: all.
    """

    edit: Counterfactual = Counterfactual()
    towards: Literal["likely", "random"] = "likely"
    images: int | None = 100

    cites: ClassVar[tuple[str, ...]] = ("augustin2020",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_image_count(self.images)

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return the share ``counterfactual reached``, and for those ``… distance`` (l2) and ``… named so``.

        The last is the share that the classifier of ``subject.features``, if it fits, assigns to the target class.
        """
        split = random_subset(subject, self.images).split
        targets = None
        if self.towards == "random":
            count = len(subject.data.classes)
            offset = torch.randint(1, count, split.y.shape, generator=generator, device=generator.device).cpu()
            targets = (split.y + offset) % count
        parts = []
        for first in range(0, len(split), subject.batch):
            rows = slice(first, first + subject.batch)
            parts.append(self.edit(subject.model, split.x[rows], None if targets is None else targets[rows], frames=2))
        column = lambda name: torch.cat([part.numbers[name] for part in parts])
        reached = column("reached").bool()
        about: dict[str, Any] = {"metric": config.describe(self), "images": self.images}
        records = [Record("counterfactual reached", *proportion(reached), about)]
        if reached.sum() > 1:
            records.append(Record("counterfactual distance", *average(column("distance")[reached]), about))
            space = subject.features
            if space is not None and space.logits is not None:
                features = space.of(torch.cat([part.x for part in parts])[reached], subject.device, subject.batch)
                logits = space.logits(features.to(subject.device)).detach().cpu()
                if logits.shape[1] == len(subject.data.classes):
                    named = proportion(logits.argmax(1) == column("to")[reached].long())
                    name = f"counterfactual named so ({space.name})"
                    records.append(Record(name, *named, {**about, "space": space.name}))
        return records
