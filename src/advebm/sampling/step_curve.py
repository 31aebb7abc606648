"""Measure sample quality (FD and KID) as a function of the number of sampling steps."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data import ood_sets
from advebm.data.sources import Data
from advebm.metrics.base import Features
from advebm.metrics.distances import RealFeatures
from advebm.models.batching import device_of
from advebm.samplers.base import Sampler
from advebm.sampling import generate

MAX_REAL_IMAGES = 10_000  # largest number of real images that samples are compared with
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


class CurvePoint(NamedTuple):
    """Quality and cost of samples after a number of steps.

    Attributes:
        steps: number of steps, that is, of gradients per image.
        fd, kid: Fréchet distance and KID between samples and real images.
        seconds: computing time per image up to this step.
    """

    steps: int
    fd: float
    kid: float
    seconds: float


@dataclass(frozen=True)
class Chains:
    """Settings of a step curve: how many chains of a sampler to run, and after which steps to measure them.

    Attributes:
        count: number of chains, at least 2.
        steps: the numbers of steps after which to measure, increasing.
        seed: seed of the chains.
    """

    count: int = 1000
    steps: tuple[int, ...] = STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 2 or not self.steps or list(self.steps) != sorted({*self.steps}) or self.steps[0] < 0:
            got = f"{self.count} and {self.steps}"
            raise UserError(f"count must be at least 2, and steps are rising numbers >= 0, got {got}")

    def __call__(
        self, model: nn.Module, sampler: Sampler, data: Data, space: Features, *, outside: Data | None = None
    ) -> list[CurvePoint]:
        """Return one point per number of steps, all measured on the same chains and against training images.

        Chains run for the largest number of steps, whatever ``sampler.steps``; schedules span that number.
        """
        real_images = ood_sets.choose_images(data.train.x, MAX_REAL_IMAGES, rng.generator(self.seed, "chains", "real"))
        real, points = RealFeatures(space.of(real_images, device_of(model))), []
        for steps, (x, seconds) in self._draw(model, sampler, data, outside).items():
            features = space.of(x, device_of(model))
            points.append(CurvePoint(steps, real.frechet(features), real.kernel(features), seconds / len(x)))
        return points

    def _draw(
        self, model: nn.Module, sampler: Sampler, data: Data, outside: Data | None
    ) -> Mapping[int, tuple[Tensor, float]]:
        """Return, for each number of steps, the samples as uint8 and the total computing time in seconds."""
        longest = replace(sampler, steps=self.steps[-1])
        start = longest.prepare(data, outside)
        y = generate.classes_to_draw(longest, data, math.ceil(self.count / len(data.classes)))
        y = y[torch.randperm(len(y), generator=rng.generator(self.seed, "chains"))[: self.count]]
        bank, samples = longest.bank(data), {k: list[Tensor]() for k in self.steps}
        elapsed = dict.fromkeys(self.steps, 0.0)
        for number in range(generate.count_chunks(len(y))):
            chains = generate.start_chains(model, start, y, number, data.shape, self.seed, "chains")
            since = [time.perf_counter()]

            def record(k: int, x: Tensor, energy: Tensor | None = None, since: list[float] = since) -> None:
                now = time.perf_counter()
                if k + 1 in elapsed:  # the gradient at x has been computed already
                    elapsed[k + 1] += now - since[0]
                if k in samples:
                    samples[k].append(generate.to_bytes(x).cpu())
                since[0] += time.perf_counter() - now  # exclude the time spent here

            record(longest.steps, generate.run_chains(model, longest, chains, observe=record, bank=bank))
        return {k: (torch.cat(samples[k]), elapsed[k]) for k in self.steps}


def first_reaching(points: Iterable[CurvePoint], fd: float) -> CurvePoint | None:
    """Return the first point whose FD is at most ``fd``; None if there is none."""
    return next((point for point in points if point.fd <= fd), None)
