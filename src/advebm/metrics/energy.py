"""Energies of data, samples and noise."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from advebm import energies
from advebm.core.errors import UserError
from advebm.energies import Logits
from advebm.metrics.base import Record, Subject, average
from advebm.models.modes import searching


@dataclass(frozen=True)
class Energies:
    """``E(x)`` of test images, of each set of samples, and of uniform noise.  Compare within one model only.

    Attributes:
        noise: number of noise images.
        bins: number of bins of each record's histogram.
    """

    noise: int = 1000
    bins: int = 40

    cites: ClassVar[tuple[str, ...]] = ("grathwohl2020",)

    def __post_init__(self) -> None:
        if self.noise < 2 or self.bins < 1:
            raise UserError(f"noise must be at least 2 images and bins at least 1, got {self.noise} and {self.bins}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return a record ``E(x) of …`` for each set: the mean in nats, with the standard deviation in its settings."""
        uniform = torch.rand(self.noise, *subject.data.shape, generator=generator, device=generator.device)
        sets = {"test images": subject.split.x, **{f"samples {k}": v.x for k, v in subject.samples.items()}}
        sets["uniform noise"] = uniform
        records = []
        with searching(subject.model) as f, torch.no_grad():
            for name, x in sets.items():
                parts = [_energy(f, subject.on_device(part)).cpu() for part in x.split(subject.batch)]
                records.append(self._record(f"E(x) of {name}", torch.cat(parts)))
        return records

    def _record(self, name: str, values: Tensor) -> Record:
        density, edges = np.histogram(values.double().numpy(), bins=self.bins, density=True)
        settings = {"unit": "nats", "deviation": values.double().std().item()}
        series = {"edges": edges.tolist(), "density": density.tolist()}
        return Record(name, *average(values), settings, series)


def _energy(f: Logits, x: Tensor) -> Tensor:
    """Return ``E(x)`` (B,) from logits (B, K), or from a critic's outputs (B,) or (B, 1)."""
    return energies.marginal(f(x).reshape(len(x), -1))
