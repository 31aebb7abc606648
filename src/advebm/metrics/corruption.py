"""Accuracy on corrupted images."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from advebm.attacks.base import is_correct
from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.corruptions import CORRUPTIONS, SEVERITIES, check, corrupt
from advebm.metrics.base import ProgressCounter, Record, Subject, average, proportion
from advebm.models.modes import searching


@dataclass(frozen=True)
class CorruptionAccuracy:
    """Share of corrupted images that are classified as labelled, for each corruption and severity.

    The corruptions follow Hendrycks and Dietterich (2019) with this package's own parameters: the results are not
    comparable with those on CIFAR-10-C.

    Attributes:
        corruptions: names from :mod:`advebm.data.corruptions`.
        severities: from 1 to 5.
    """

    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    severities: tuple[int, ...] = SEVERITIES

    cites: ClassVar[tuple[str, ...]] = ("hendrycks2019",)

    def __post_init__(self) -> None:
        if not self.corruptions or not self.severities:
            raise UserError("corruptions and severities name at least one each, such as jpeg and 3")
        for name in self.corruptions:
            for severity in self.severities:
                check(name, severity)

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return ``accuracy under gaussian-noise 3`` etc. and their mean, ``accuracy under corruptions``."""
        subject.check_labelled()
        records, all_hits = [], []
        kinds = [(name, severity) for name in self.corruptions for severity in self.severities]
        with (
            searching(subject.model) as f,
            subject.bar("corruptions", len(kinds) * len(subject.split)) as tell,
        ):
            counter = ProgressCounter(tell)
            for name, severity in kinds:
                draws = rng.generator(generator.initial_seed(), name, severity, device=generator.device)
                counted = counter.count(f, f"{name} {severity}")
                hits = torch.cat(
                    [is_correct(counted, corrupt(x, name, severity, draws), y) for x, y in subject.batches()]
                )
                settings = {"corruption": name, "severity": severity, "parameters": "advebm"}
                records.append(Record(f"accuracy under {name} {severity}", *proportion(hits), settings))
                all_hits.append(hits)
        settings = {"corruption": list(self.corruptions), "severity": list(self.severities), "parameters": "advebm"}
        shares = torch.stack(all_hits).cpu().double().mean(0)  # per image: repeated images are not independent
        return [*records, Record("accuracy under corruptions", *average(shares), settings)]
