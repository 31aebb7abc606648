"""Quality of generated images in a named feature space."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from advebm.core.errors import UserError
from advebm.metrics.base import Features, Record, SampleSet, Subject, proportion
from advebm.metrics.distances import (
    Moments,
    RealFeatures,
    frechet_distance,
    inception_score,
    jackknife,
    kernel_pairs,
    kernel_sum,
    unbiased_mmd,
)
from advebm.metrics.keys import INCEPTION, label
from advebm.metrics.overlap import Balls, hits, share

PUBLISHED = 10_000  # images, the fewest that FID is published from
NEAR, WIDE = 3, 5  # neighbours for precision and recall, and for density and coverage, as in their papers

Statistic = Callable[[Sequence[int]], float]  # of the groups of samples whose numbers it is given


class Reference(NamedTuple):
    """Real images in a feature space, and what every comparison with them needs."""

    features: RealFeatures
    near: Balls
    wide: Balls


@dataclass(frozen=True)
class SampleQuality:
    """How near each set of samples is to the training split, how the two overlap, and how many are what was asked for.

    FD is biased upwards where samples are few (``few`` marks no more samples than dimensions): compare it at one
    count only, and precision, recall, density and coverage, too.  KID is unbiased.  Errors are of a jackknife over
    groups of samples, in which the balls of the others stay as they are; that of the class score is the deviation of
    its splits, which are the same groups, over √(splits - 1).

    Attributes:
        groups: of the jackknife behind the error bars; fewer where there are few samples.
        overlap: images on either side, at most, that precision, recall, density and coverage are measured on.
    """

    groups: int = 10
    overlap: int = 10_000

    encoders: ClassVar[bool] = True
    cites: ClassVar[tuple[str, ...]] = ("heusel2017", "binkowski2018", "salimans2016", "kynkaanniemi2019", "naeem2020")

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise UserError(f"a jackknife takes at least 2 groups, got {self.groups}")
        if self.overlap <= max(WIDE, self.groups):
            raise UserError(f"overlap is more than {WIDE} images and more than groups, got {self.overlap}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Records of each set.

        ``FD``, ``KID``, ``precision``, ``recall``, ``density`` and ``coverage``; in a classifier's features the
        ``class score``, too, and ``intended class`` where it has as many classes as the data.  All are followed by the
        space's name; but in Inception's features FD, KID and the class score are ``FID``, ``KID`` and ``IS``.
        """
        if not subject.samples:
            return []
        if (space := subject.features) is None:
            raise UserError("sample quality needs a feature space: give --features RUN, inception or pixels")
        if not (sets := _enough(subject.samples)):
            return []
        features = space.of(subject.data.train.x, subject.device, subject.batch)
        some = features[_order(len(features))[: self.overlap]]
        real = Reference(RealFeatures(features), Balls.around(some, NEAR), Balls.around(some, WIDE))
        _warn_of_few(space, sets, features.shape[1])
        records = []
        for name, samples in sets.items():
            records += self._one(name, samples, space, subject, real)
        return records

    def _one(self, name: str, samples: SampleSet, space: Features, subject: Subject, real: Reference) -> list[Record]:
        count, groups = len(samples.x), min(self.groups, len(samples.x) // 2)
        order = _order(count)
        fake, classes = space.of(samples.x[order], subject.device, subject.batch), samples.y[order]
        parts, some = fake.tensor_split(groups), fake[: self.overlap]
        settings = {"samples": name, "space": space.name, "dimensions": fake.shape[1], "reference": "train"}
        settings |= {"reference_count": len(real.features), "few": count <= fake.shape[1], **samples.manifest}
        beside = {**settings, "reference_count": len(real.near.centres)}
        measured = [("FD", frechet(parts, real), count, settings), ("KID", kernel(parts, real), count, settings)]
        overlaps = overlap(some.tensor_split(groups), real)
        measured += [(quantity, value, len(some), beside) for quantity, value in overlaps.items()]
        records = [
            Record(label(quantity, space.name), of(range(groups)), jackknife(of, groups), n, about)
            for quantity, of, n, about in measured
        ]
        if space.logits is not None:
            logits = _logits(space, subject, fake)
        if space.logits is not None and logits.shape[1] > 1:  # not a critic's
            score, deviation = inception_score(logits, groups)
            about = {**settings, "splits": groups, "deviation": deviation}
            error = deviation / (groups - 1) ** 0.5
            records.append(Record(label("class score", space.name), score, error, count, about))
            if logits.shape[1] == len(subject.data.classes) and (classes >= 0).all():
                records.append(_intended(logits.argmax(1) == classes, classes, space, subject, settings))
        return records


def frechet(parts: Sequence[Tensor], real: Reference) -> Statistic:
    """The Fréchet distance of groups of samples to the real images."""
    moments = [Moments.of(part) for part in parts]
    return lambda kept: frechet_distance(reduce(add, [moments[i] for i in kept]), real.features.moments)


def kernel(parts: Sequence[Tensor], real: Reference) -> Statistic:
    """The kernel distance of groups of samples to the real images."""
    within = [[kernel_sum(p, q) if p is not q else kernel_pairs(p) for q in parts] for p in parts]
    across = [kernel_sum(part, real.features.features) for part in parts]

    def distance(kept: Sequence[int]) -> float:
        own = sum(within[i][j] for i in kept for j in kept)
        count = sum(len(parts[i]) for i in kept)
        return unbiased_mmd(count, own, len(real.features), real.features.pairs, sum(across[i] for i in kept))

    return distance


def overlap(parts: Sequence[Tensor], real: Reference) -> dict[str, Statistic]:
    """Precision, recall, density and coverage of groups of samples; the samples' balls are those among all groups."""
    balls = Balls.around(torch.cat(list(parts)), NEAR).split([len(part) for part in parts])
    precise = [hits(part, real.near)[0] for part in parts]
    recalled = torch.stack([hits(real.near.centres, group)[0] for group in balls])
    dense, covered = zip(*(hits(part, real.wide) for part in parts), strict=True)
    reached = torch.stack(covered)
    return {
        "precision": lambda kept: share(torch.cat([precise[i] for i in kept])),
        "recall": lambda kept: share(recalled[list(kept)].sum(0)),
        "density": lambda kept: torch.cat([dense[i] for i in kept]).double().mean().item() / real.wide.k,
        "coverage": lambda kept: share(reached[list(kept)].sum(0)),
    }


def _intended(hits: Tensor, classes: Tensor, space: Features, subject: Subject, settings: dict) -> Record:
    names = {k: name for k, name in enumerate(subject.data.classes) if (classes == k).any()}
    shares = {name: [hits[classes == k].float().mean().item()] for k, name in names.items()}
    return Record(label("intended class", space.name), *proportion(hits), settings, shares)


def _enough(sets: Mapping[str, SampleSet]) -> dict[str, SampleSet]:
    """Without sets that are too small for two groups and for three neighbours."""
    for name, samples in sets.items():
        if len(samples.x) <= NEAR:
            few = f"samples {name}: {len(samples.x)} images are too few for a distance"
            warnings.warn(f"{few}; draw at least {NEAR + 1}", stacklevel=3)
    return {name: samples for name, samples in sets.items() if len(samples.x) > NEAR}


def _warn_of_few(space: Features, sets: Mapping[str, SampleSet], dimensions: int) -> None:
    """Once for all sets: which are too small for a Fréchet distance that means something by itself."""
    published = space.name == INCEPTION
    least = PUBLISHED if published else dimensions + 1
    few = [f"{name} has {len(samples.x):,}" for name, samples in sets.items() if len(samples.x) < least]
    if few:
        needs = "is published" if published else f"in {dimensions} dimensions should be taken"
        warnings.warn(
            f"{label('FD', space.name)} {needs} from {least:,} images or more, and fewer give a larger one: "
            f"{', '.join(few)}; compare at one count only, or by KID",
            stacklevel=3,
        )


def _order(count: int) -> Tensor:
    """A shuffle that is the same every time: groups and splits are random ones whatever order samples come in."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(space: Features, subject: Subject, features: Tensor) -> Tensor:
    assert space.logits is not None
    return torch.cat([space.logits(part.to(subject.device)).cpu() for part in features.split(subject.batch)])
