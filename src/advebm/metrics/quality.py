"""Quality of generated images in a named feature space."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from advebm.errors import UserError
from advebm.metrics.base import Features, Record, SampleSet, Subject, proportion
from advebm.metrics.distances import Moments, frechet_distance, jackknife, kernel_pairs, kernel_sum, unbiased_mmd


class Reference(NamedTuple):
    """Real images in a feature space, and what every comparison with them needs."""

    features: Tensor
    moments: Moments
    pairs: float


@dataclass(frozen=True)
class SampleQuality:
    """Fréchet and kernel distance of each set of samples to the training split, and how many are what was asked for.

    FD is biased upwards where samples are few (``few`` marks no more samples than dimensions): compare it at one
    count only.  KID is unbiased.

    Attributes:
        groups: of the jackknife behind the error bars; fewer where there are few samples.
    """

    groups: int = 10

    cites: ClassVar[tuple[str, ...]] = ("heusel2017", "binkowski2018")

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise UserError(f"a jackknife takes at least 2 groups, got {self.groups}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Records ``FD (space)``, ``KID (space)`` and, where the space can classify, ``intended class (space)``."""
        if not subject.samples:
            return []
        if (space := subject.features) is None:
            raise UserError("sample quality needs a feature space: give --features RUN")
        features = _features(space, subject, subject.data.train.x)
        real = Reference(features, Moments.of(features), kernel_pairs(features))
        records = []
        for name, samples in subject.samples.items():
            records += self._one(name, samples, space, subject, real)
        return records

    def _one(self, name: str, samples: SampleSet, space: Features, subject: Subject, real: Reference) -> list[Record]:
        fake, groups = _features(space, subject, samples.x), min(self.groups, len(samples.x) // 2)
        if groups < 2:
            warnings.warn(
                f"samples {name}: {len(fake)} images are too few for a distance; draw at least 4", stacklevel=2
            )
            return []
        parts = fake[torch.randperm(len(fake), generator=torch.Generator().manual_seed(0))].tensor_split(groups)
        moments = [Moments.of(part) for part in parts]
        within = [[kernel_sum(p, q) if p is not q else kernel_pairs(p) for q in parts] for p in parts]
        across = [kernel_sum(part, real.features) for part in parts]

        def fd(kept: Sequence[int]) -> float:
            return frechet_distance(reduce(add, [moments[i] for i in kept]), real.moments)

        def kid(kept: Sequence[int]) -> float:
            own = sum(within[i][j] for i in kept for j in kept)
            count = sum(len(parts[i]) for i in kept)
            return unbiased_mmd(count, own, len(real.features), real.pairs, sum(across[i] for i in kept))

        settings = {"samples": name, "space": space.name, "dimensions": fake.shape[1], "reference": "train"}
        settings |= {"reference_count": len(real.features), "few": len(fake) <= fake.shape[1], **samples.manifest}
        records = []
        for label, distance in (("FD", fd), ("KID", kid)):
            value, error = distance(range(groups)), jackknife(distance, groups)
            records.append(Record(f"{label} ({space.name})", value, error, len(fake), settings))
        if space.classify is not None:
            with torch.no_grad():
                hits = torch.cat(
                    [space.classify(x.to(subject.device)).argmax(1).cpu() for x in samples.x.split(subject.batch)]
                )
            intended = hits == samples.y
            classes = [k for k in range(len(subject.data.classes)) if (samples.y == k).any()]
            shares = {subject.data.classes[k]: [intended[samples.y == k].float().mean().item()] for k in classes}
            records.append(Record(f"intended class ({space.name})", *proportion(intended), settings, shares))
        return records


@torch.no_grad()
def _features(space: Features, subject: Subject, x: Tensor) -> Tensor:
    parts = (subject.on_device(part) for part in x.split(subject.batch))
    return torch.cat([space.extract(part).flatten(1).cpu() for part in parts])
