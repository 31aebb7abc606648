"""How many steps a sampler takes: what its samples are worth after each number of them."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from advebm.core import config, rng
from advebm.core.errors import UserError
from advebm.data import ood_sets
from advebm.data.sources import Data
from advebm.metrics.base import Features
from advebm.metrics.distances import RealFeatures
from advebm.models.batching import device_of
from advebm.samplers.base import Sampler
from advebm.sampling import generate

REAL = 10_000  # images, at most, that samples are compared with
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


class Point(NamedTuple):
    """Samples after so many steps.

    Attributes:
        steps: gradients taken of each image.
        fd, kid: distances to real images.
        seconds: that the gradients of an image took.
    """

    steps: int
    fd: float
    kid: float
    seconds: float


@dataclass(frozen=True)
class Chains:
    """What is measured along chains of one sampler.

    Attributes:
        split: real images that samples are compared with, 10,000 at most.  ``val`` is for choosing, and there chains
            from outside images take validation images, too; ``train`` is for reporting.
        count: chains.
        steps: after which to look.
        seed: of the chains.
    """

    split: Literal["val", "train"] = "val"
    count: int = 1000
    steps: tuple[int, ...] = STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        config.check_choices(self)
        if self.count < 2 or not self.steps or list(self.steps) != sorted({*self.steps}) or self.steps[0] < 0:
            got = f"{self.count} and {self.steps}"
            raise UserError(f"count is at least 2, and steps are rising numbers >= 0, got {got}")

    def __call__(
        self, model: nn.Module, sampler: Sampler, data: Data, space: Features, *, outside: Data | None = None
    ) -> list[Point]:
        """A point for each number of steps, all from the same chains.

        A schedule over the share of the steps is that of the longest chains.
        """
        if outside is not None and self.split == "val":
            outside = outside._replace(test=outside.val)
        shown = ood_sets.choose_images(getattr(data, self.split).x, REAL, rng.generator(self.seed, "chains", "real"))
        real, points = RealFeatures(space.of(shown, device_of(model))), []
        for steps, (x, seconds) in self._images(model, sampler, data, outside).items():
            drawn = space.of(x, device_of(model))
            points.append(Point(steps, real.frechet(drawn), real.kernel(drawn), seconds / len(x)))
        return points

    def _images(
        self, model: nn.Module, sampler: Sampler, data: Data, outside: Data | None
    ) -> Mapping[int, tuple[Tensor, float]]:
        """Images, as bytes, and the seconds they took, by the number of steps."""
        longest = replace(sampler, steps=self.steps[-1])
        start, y = (
            longest.prepare(data, outside),
            generate.classes_to_draw(longest, data, -(-self.count // len(data.classes))),
        )
        y = y[torch.randperm(len(y), generator=rng.generator(self.seed, "chains"))[: self.count]]
        bank, seen = longest.bank(data), {k: list[Tensor]() for k in self.steps}
        spent = dict.fromkeys(self.steps, 0.0)
        for number in range(generate.count_chunks(len(y))):
            chains = generate.start_chains(model, start, y, number, data.shape, self.seed, "chains")
            since = [time.perf_counter()]

            def look(k: int, x: Tensor, energy: Tensor | None = None, since: list[float] = since) -> None:
                now = time.perf_counter()
                if k + 1 in spent:  # the gradient at x is taken already
                    spent[k + 1] += now - since[0]
                if k in seen:
                    seen[k].append(generate.to_bytes(x).cpu())
                since[0] += time.perf_counter() - now  # looking takes no time

            look(longest.steps, generate.run_chains(model, longest, chains, observe=look, bank=bank))
        return {k: (torch.cat(seen[k]), spent[k]) for k in self.steps}


def best_point(points: Iterable[Point]) -> Point:
    """The one of least KID, which no number of samples biases; the earliest of several."""
    return min(points, key=lambda point: point.kid)


def first_reaching(points: Iterable[Point], fd: float) -> Point | None:
    """The first whose FD is at most ``fd``."""
    return next((point for point in points if point.fd <= fd), None)
