"""Records, and what a metric is asked about."""

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
from advebm.data.sources import Data, Images
from advebm.models.batching import as_images, device_of


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured number.

    Attributes:
        name: what was measured, with its settings in words: ``accuracy under PGD-20 l2 0.75``.
        value: the number.
        error: its standard error over the ``count`` items; not over training seeds.
        count: images it was measured on.
        settings: everything needed to measure it again.
        series: numbers for a figure: a histogram's edges and densities.
    """

    name: str
    value: float
    error: float
    count: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    series: dict[str, list[float]] = dataclasses.field(default_factory=dict)


class SampleSet(NamedTuple):
    """Generated images: float32 (N, C, H, W) in [0, 1], the classes asked for, and how they were made."""

    x: Tensor
    y: Tensor
    manifest: Mapping[str, Any]


class Features(NamedTuple):
    """A named feature space: images (B, C, H, W) in [0, 1] -> features (B, D).

    ``logits``, where the features are a classifier's, takes them to its logits (B, K).
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def of(self, x: Tensor, device: torch.device, batch: int = 500) -> Tensor:
        """Of images (N, C, H, W), bytes or floating point, computed on a device: (N, D) on the CPU."""
        parts = (as_images(part, device) for part in x.split(batch))
        return torch.cat([self.extract(part).flatten(1).cpu() for part in parts])


Tell = Callable[[int, str], None]  # how much is done, and a note
Bar = Callable[[str, int], AbstractContextManager[Tell]]  # what, and how much there is to do


def no_bar(name: str, total: int) -> AbstractContextManager[Tell]:
    """Tells nobody."""
    return nullcontext(lambda done, note: None)


class Subject(NamedTuple):
    """What a metric looks at."""

    model: nn.Module
    data: Data
    split: Images  # the images measured on: test for reporting, val for selection
    threat: Attack  # the radius and norm of the threat model, and the attack that judges by it
    samples: Mapping[str, SampleSet] = MappingProxyType({})
    features: Features | None = None
    batch: int = 500
    folder: Path | None = None  # where long measurements keep where they are
    bar: Bar = no_bar  # what shows how far they are
    team: Team = ALONE  # processes that measure the same, and share the images of attacks

    def check_labelled(self) -> None:
        """Refuse a split whose images have no labels."""
        if not self.split.labelled:
            raise UserError(f"accuracy needs labels, {self.data.name} has none; choose --metrics without it")

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return device_of(self.model)

    def on_device(self, x: Tensor) -> Tensor:
        """Images, bytes or floating point in [0, 1], as floating point on the model's device."""
        return as_images(x, self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The split as float images and labels on the model's device."""
        for start in range(0, len(self.split), self.batch):
            part = self.split.take(slice(start, start + self.batch))
            yield self.on_device(part.x), part.y.to(self.device)


class Metric(Protocol):
    """A frozen dataclass that turns a subject into records; ``encoders`` says that it needs no logits."""

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Measure."""
        ...


def proportion(hits: Tensor) -> tuple[float, float, int]:
    """Share of true values, its standard error √(p(1-p)/n), and n."""
    n = hits.numel()
    p = hits.double().mean().item()
    return p, math.sqrt(p * (1 - p) / n), n


def average(values: Tensor) -> tuple[float, float, int]:
    """Mean, its standard error s/√n, and n."""
    n = values.numel()
    return values.double().mean().item(), values.double().std().item() / math.sqrt(n), n
