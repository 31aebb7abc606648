"""Each logit of a classifier as a detector of the images of its class, under attack."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from advebm.core import config
from advebm.core.errors import UserError
from advebm.core.floats import widen
from advebm.data import ood_sets
from advebm.energies import Logits
from advebm.metrics.base import ProgressCounter, Record, Subject
from advebm.metrics.ood import Estimate, auroc, lowest_scores, search_name
from advebm.models.inference import faster_model
from advebm.models.modes import searching


@dataclass(frozen=True)
class Detectors:
    """How well ``f_k`` tells images of class k from those of other classes that are moved to raise it, GAT's measure.

    This is how Yin et al. (2020) evaluate their K detectors: images of class k stay clean, and Auto-PGD perturbs the
    images of other classes to maximise ``f_k`` within the threat model's ball.  The result is the mean AUROC over the
    classes; its standard error treats the AUROCs as independent, although they share images.

    Attributes:
        count: maximum number of images of class k, and of other classes, for each detector.
        steps, restarts: settings of Auto-PGD.
    """

    count: int = 1000
    steps: int = 100
    restarts: int = 1

    cites: ClassVar[tuple[str, ...]] = ("yin2020gat", "croce2020reliable", "delong1988")

    def __post_init__(self) -> None:
        if self.count < 2 or min(self.steps, self.restarts) < 1:
            counts = f"{self.count}, {self.steps} and {self.restarts}"
            raise UserError(f"count must be at least 2, steps and restarts at least 1, got {counts}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return ``AUROC of detectors``, clean and under attack; ``series`` contains the AUROC of each class."""
        subject.check_labelled()
        threat, split, names = subject.threat, subject.split, subject.data.classes
        attack = search_name(self.steps, self.restarts, threat.eps, threat.norm)
        options: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm, "generator": generator}
        options |= {"steps": self.steps, "restarts": self.restarts}
        clean_aurocs, attacked_aurocs = dict[str, Estimate](), dict[str, Estimate]()
        images = sum(min(self.count, int((split.y != k).sum())) for k in range(len(names)))
        with (
            searching(subject.model) as f,
            subject.bar("detectors", images * self.steps * self.restarts) as tell,
        ):
            counter = ProgressCounter(tell)
            fast = faster_model(subject.model, subject.on_device(split.x[:2]))
            for k, name in enumerate(names):
                own, others = split.x[split.y == k], split.x[split.y != k]
                if min(len(own), len(others)) < 2:
                    raise UserError(f"a detector takes 2 images of its class and of others, {name} has {len(own)}")
                own, others = (ood_sets.choose_images(x, self.count, generator) for x in (own, others))

                def score(x: Tensor, k: int = k, f: Logits = f) -> Tensor:
                    logits = f(x)
                    if logits.ndim != 2 or logits.shape[1] != len(names):
                        raise UserError(f"detectors need a classifier of {len(names)} classes; a critic is one already")
                    return -widen(logits[:, k])

                inside, clean, lowest = [], [], []
                for part in own.split(subject.batch):
                    inside.append(score(subject.on_device(part)).detach().cpu())
                for part in others.split(subject.batch):
                    x = subject.on_device(part)
                    clean.append(score(x).detach().cpu())
                    lowest.append(
                        lowest_scores(score, x, search=counter.count(partial(score, f=fast), name), **options)
                    )
                clean_aurocs[name] = auroc(torch.cat(inside), torch.cat(clean))
                attacked_aurocs[name] = auroc(torch.cat(inside), torch.cat(lowest))
        settings = {"metric": config.describe(self)}
        return [
            _mean("AUROC of detectors", clean_aurocs, len(split), settings),
            _mean(f"AUROC of detectors, {attack}", attacked_aurocs, len(split), {**settings, "attack": attack}),
        ]


def _mean(name: str, aurocs: dict[str, Estimate], count: int, settings: dict[str, object]) -> Record:
    value = sum(e.value for e in aurocs.values()) / len(aurocs)
    error = sum(e.error**2 for e in aurocs.values()) ** 0.5 / len(aurocs)
    return Record(name, value, error, count, settings, {k: [e.value] for k, e in aurocs.items()})
