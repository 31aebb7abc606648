"""Records, and the subject (model, data, samples) that a metric measures."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.core.processes import ALONE, Team
from advebm.data import pictures
from advebm.data.sources import Data, Images
from advebm.metrics import texts
from advebm.models.batching import as_images, device_of


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured number.

    Attributes:
        name: quantity and main settings in words, such as ``accuracy under PGD-20 l2 0.75``.
        value: measured value.
        error: standard error of the value over the ``count`` images, not over training seeds.
        count: number of images measured.
        settings: everything needed to repeat the measurement.
        series: numbers for a figure, such as a histogram's edges and densities.
    """

    name: str
    value: float
    error: float
    count: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    series: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        text = texts.as_text(vars(self))
        samples, but = (f", {text[key]}" if text[key] else "" for key in ("samples", "caution"))
        return f"{self.name}{samples}: {text['value']} (n = {text['count']}{but})"


class Records(list[Record]):
    """Records, shown as lines and in notebooks as a table; otherwise a list like any other."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no records"

    def _repr_html_(self) -> str:
        return texts.html_table(map(vars, self))


class SampleSet(NamedTuple):
    """Generated images ``x``, float32 (N, C, H, W) in [0, 1], their intended classes ``y``, and how they were made."""

    x: Tensor
    y: Tensor
    manifest: Mapping[str, Any]

    def __repr__(self) -> str:
        sampler = self.manifest.get("sampler")
        how = f", drawn by {sampler['kind']} from {sampler['start']}, {sampler['steps']} steps" if sampler else ""
        return f"SampleSet: {len(self.x):,} images of {pictures.size_text(self.x.shape[1:])}{how}"

    def _repr_html_(self) -> str:
        return pictures.preview(self.x, self.y, repr(self))


class Features(NamedTuple):
    """A named feature space: images (B, C, H, W) in [0, 1] -> features (B, D).

    ``logits`` maps the features to logits (B, K).  None: the features are not those of a classifier.  ``classes`` are
    the names of these K classes; empty: unknown.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None
    classes: tuple[str, ...] = ()

    @torch.no_grad()
    def of(self, x: Tensor, device: torch.device, batch: int = 500) -> Tensor:
        """Compute features (N, D), on the CPU, of images (N, C, H, W), uint8 or floating point, on ``device``."""
        parts = (as_images(part, device) for part in x.split(batch))
        return torch.cat([self.extract(part).flatten(1).cpu() for part in parts])


ProgressCallback = Callable[[int, str], None]  # called with the number of images done and a note
Bar = Callable[[str, int], AbstractContextManager[ProgressCallback]]  # name and total -> progress callback


class ProgressCounter:
    """Adds up the images that functions have been called with, and reports the sum, as ``tell`` of a progress bar."""

    def __init__(self, tell: ProgressCallback) -> None:
        self.tell, self.done = tell, 0

    def count(self, function: Callable[[Tensor], Tensor], note: str = "") -> Callable[[Tensor], Tensor]:
        """Return the function, which then also counts its images (B, C, H, W)."""

        def counted(x: Tensor) -> Tensor:
            out = function(x)
            self.done += len(x)
            self.tell(self.done, note)
            return out

        return counted


def no_bar(name: str, total: int) -> AbstractContextManager[ProgressCallback]:
    return nullcontext(lambda done, note: None)


class Subject(NamedTuple):
    """Model, data and options that a metric is applied to."""

    model: nn.Module
    data: Data
    split: Images  # images to measure on: test for reporting, val for model selection
    threat: Attack  # default attack; its radius and norm are the threat model
    samples: Mapping[str, SampleSet] = MappingProxyType({})
    features: Features | None = None
    batch: int = 500
    folder: Path | None = None  # where long measurements save their progress
    bar: Bar = no_bar  # shows the progress of long measurements
    team: Team = ALONE  # processes that run the same measurement and divide the images to attack among them

    def check_labelled(self) -> None:
        if not self.split.labelled:
            raise UserError(f"accuracy needs labels, {self.data.name} has none; choose --metrics without it")

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def on_device(self, x: Tensor) -> Tensor:
        """Return images, uint8 or floating point in [0, 1], as floating point on the model's device."""
        return as_images(x, self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the split: floating-point images and labels on the model's device."""
        for start in range(0, len(self.split), self.batch):
            part = self.split.take(slice(start, start + self.batch))
            yield self.on_device(part.x), part.y.to(self.device)


class Metric(Protocol):
    """A frozen dataclass that measures a subject.  The class attribute ``encoders = True``: it needs no logits."""

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]: ...


def proportion(hits: Tensor) -> tuple[float, float, int]:
    """Return the share p of true values, its standard error √(p(1-p)/n), and n."""
    n = hits.numel()
    p = hits.cpu().double().mean().item()
    return p, math.sqrt(p * (1 - p) / n), n


def average(values: Tensor) -> tuple[float, float, int]:
    """Return the mean, its standard error s/√n, and n."""
    n, values = values.numel(), values.cpu().double()
    return values.mean().item(), values.std().item() / math.sqrt(n), n
