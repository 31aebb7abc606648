"""Quality of generated images in a named feature space."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.metrics.base import Features, ProgressCounter, Record, SampleSet, Subject, proportion
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

PUBLISHED = 10_000  # smallest number of images that FID is published for
NEAR, WIDE = 3, 5  # k of precision and recall; k of density and coverage; as in their papers

Statistic = Callable[[Sequence[int]], float]  # indices of groups of samples -> statistic of their union


class Reference(NamedTuple):
    """Features of real images, and balls around a subset of them for k = ``NEAR`` and k = ``WIDE``."""

    features: RealFeatures
    near: Balls
    wide: Balls


@dataclass(frozen=True)
class SampleQuality:
    """How near each set of samples is to the training split, how the two overlap, and how many are what was asked for.

    FD is biased upwards for few samples (the setting ``few`` of a record: no more samples than feature dimensions).
    Compare FD, precision, recall, density and coverage only at equal numbers of samples; KID is unbiased.  Standard
    errors are jackknife estimates over groups of samples, with the radii of the samples' balls kept from the whole set.
    That of the class score is the standard deviation over its splits, which are the same groups, over √(splits - 1).

    Attributes:
        groups: number of jackknife groups; at most half the number of samples is used.
        overlap: maximum number of real images, and of samples, for precision, recall, density and coverage.
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
        """Return the records of each set; sets of at most ``NEAR`` samples are skipped with a warning.

        These are ``FD``, ``KID``, ``precision``, ``recall``, ``density`` and ``coverage``; for a classifier's features
        also ``class score``, and ``intended class``: the share of samples that it assigns to the class asked for.  Of
        samples without one, such as a critic's, it is the share assigned to any class of the data, if the classifier
        has others.  Classes are matched by their names unless these are numbers, else by number if there are as many.
        Names of records end with that of the feature space, except ``FID``, ``KID`` and ``IS`` for Inception.
        """
        if not subject.samples:
            return []
        if (space := subject.features) is None:
            raise UserError("sample quality needs a feature space: give --features RUN, inception or pixels")
        if not (sets := _drop_small_sets(subject.samples)):
            return []
        with subject.bar("features", len(subject.data.train)) as tell:
            counted = space._replace(extract=ProgressCounter(tell).count(space.extract, "of the training images"))
            features = counted.of(subject.data.train.x, subject.device, subject.batch)
        centres = features[rng.fixed_permutation(len(features))[: self.overlap]]
        real = Reference(RealFeatures(features), Balls.around(centres, NEAR), Balls.around(centres, WIDE))
        _warn_of_small_sets(space, sets, features.shape[1])
        records = []
        for name, samples in sets.items():
            records += self._rate(name, samples, space, subject, real)
        return records

    def _rate(self, name: str, samples: SampleSet, space: Features, subject: Subject, real: Reference) -> list[Record]:
        count, groups = len(samples.x), min(self.groups, len(samples.x) // 2)
        order = rng.fixed_permutation(count)  # so that groups and splits do not depend on how samples are sorted
        fake, classes = space.of(samples.x[order], subject.device, subject.batch), samples.y[order]
        parts, limited = fake.tensor_split(groups), fake[: self.overlap]
        settings = {"samples": name, "space": space.name, "dimensions": fake.shape[1], "reference": "train"}
        settings |= {"reference_count": len(real.features), "few": count <= fake.shape[1], **samples.manifest}
        statistics = [("FD", frechet(parts, real), count, settings), ("KID", kernel(parts, real), count, settings)]
        about = {**settings, "reference_count": len(real.near.centres)}
        for quantity, statistic in overlap(limited.tensor_split(groups), real).items():
            statistics.append((quantity, statistic, len(limited), about))
        records = [
            Record(label(quantity, space.name), statistic(range(groups)), jackknife(statistic, groups), n, about)
            for quantity, statistic, n, about in statistics
        ]
        logits = _logits(space, subject, fake)
        if logits is not None and logits.shape[1] > 1:  # a classifier, not a critic
            score, deviation = inception_score(logits, groups)
            about = {**settings, "splits": groups, "deviation": deviation}
            error = deviation / (groups - 1) ** 0.5
            records.append(Record(label("class score", space.name), score, error, count, about))
            if (hits := _intended(logits, classes, space, subject.data.classes)) is not None:
                records.append(_intended_class(hits, classes, space, subject, settings))
        return records


def frechet(parts: Sequence[Tensor], real: Reference) -> Statistic:
    """Return the Fréchet distance to the real images as a statistic of groups of samples."""
    moments = [Moments.of(part) for part in parts]
    return lambda subset: frechet_distance(reduce(add, [moments[i] for i in subset]), real.features.moments)


def kernel(parts: Sequence[Tensor], real: Reference) -> Statistic:
    """Return the kernel distance to the real images as a statistic of groups of samples."""
    within = [[kernel_sum(p, q) if p is not q else kernel_pairs(p) for q in parts] for p in parts]
    across = [kernel_sum(part, real.features.features) for part in parts]

    def distance(subset: Sequence[int]) -> float:
        own = sum(within[i][j] for i in subset for j in subset)
        count = sum(len(parts[i]) for i in subset)
        return unbiased_mmd(count, own, len(real.features), real.features.pairs, sum(across[i] for i in subset))

    return distance


def overlap(parts: Sequence[Tensor], real: Reference) -> dict[str, Statistic]:
    """Return precision, recall, density and coverage as statistics of groups; balls of samples use all groups."""
    balls = Balls.around(torch.cat(list(parts)), NEAR).split([len(part) for part in parts])
    near = [hits(part, real.near)[0] for part in parts]
    recalled = torch.stack([hits(real.near.centres, group)[0] for group in balls])
    wide, covers = zip(*(hits(part, real.wide) for part in parts), strict=True)
    covered = torch.stack(covers)
    return {
        "precision": lambda subset: share(torch.cat([near[i] for i in subset])),
        "recall": lambda subset: share(recalled[list(subset)].sum(0)),
        "density": lambda subset: torch.cat([wide[i] for i in subset]).double().mean().item() / real.wide.k,
        "coverage": lambda subset: share(covered[list(subset)].sum(0)),
    }


def _intended(logits: Tensor, classes: Tensor, space: Features, names: Sequence[str]) -> Tensor | None:
    """Return whether each sample is classified as what was asked for, as :class:`SampleQuality` says; None: unknown."""
    outputs, found = logits.shape[1], logits.argmax(1)
    if set(names) <= set(space.classes) and not all(map(str.isdecimal, names)):
        meant = torch.tensor([space.classes.index(name) for name in names])
    elif outputs == len(names):
        meant = torch.arange(outputs)
    else:
        return None
    if (classes >= 0).all():
        return found == meant[classes]
    return torch.isin(found, meant) if (classes < 0).all() and len(meant) < outputs else None


def _intended_class(hits: Tensor, classes: Tensor, space: Features, subject: Subject, settings: dict) -> Record:
    names = {k: name for k, name in enumerate(subject.data.classes) if (classes == k).any()}
    shares = {name: [hits[classes == k].float().mean().item()] for k, name in names.items()}
    return Record(label("intended class", space.name), *proportion(hits), settings, shares)


def _drop_small_sets(sets: Mapping[str, SampleSet]) -> dict[str, SampleSet]:
    """Drop, with a warning, sets that are too small for two groups and ``NEAR`` neighbours."""
    for name, samples in sets.items():
        if len(samples.x) <= NEAR:
            few = f"samples {name}: {len(samples.x)} images are too few for a distance"
            warnings.warn(f"{few}; draw at least {NEAR + 1}", stacklevel=3)
    return {name: samples for name, samples in sets.items() if len(samples.x) > NEAR}


def _warn_of_small_sets(space: Features, sets: Mapping[str, SampleSet], dimensions: int) -> None:
    """Warn once about all sets that are too small for a Fréchet distance that means something by itself."""
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


@torch.no_grad()
def _logits(space: Features, subject: Subject, features: Tensor) -> Tensor | None:
    if space.logits is None:
        return None
    return torch.cat([space.logits(part.to(subject.device)).cpu() for part in features.split(subject.batch)])
