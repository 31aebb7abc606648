"""Find a feature space by its reference: the features of a run or model, of Inception, or pixels."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advebm.core import config
from advebm.metrics.base import Features
from advebm.metrics.spaces import Space
from advebm.models.modes import searching
from advebm.models.network import Network
from advebm.runs.find_model import find_model, find_reference
from advebm.runs.run import Run


@dataclass(frozen=True)
class ClassifierFeatures:
    """Feature space: the penultimate features of the network of a run or model.

    Attributes:
        where: run or model, as :func:`find_model` reads it.
    """

    where: str

    @property
    def name(self) -> str:
        """``features of`` and the name of the run or model."""
        path = Path(self.where).resolve()
        return f"features of {path.parents[1].name if path.parent.name == 'checkpoints' else path.name}"

    @property
    def judge(self) -> str:
        """Folder (of a run: with its latest checkpoint), model on the Hub, or user-defined module."""
        if self.where.startswith("hf:") or (reference := find_reference(self.where)).path is None or reference.module:
            return self.where
        latest = f"@{Run.open(self.where).checkpoints.path().name}" if reference.kind == "run" else ""
        return f"{reference.path.resolve()}{latest}"

    def load(self, device: torch.device | str) -> Features:
        model = find_model(self.where).to(device)
        return feature_space(self.name, model)._replace(classes=model.origin.classes)


def find_space(features: str | Path) -> Space:
    """Return the feature space that ``--features`` names.

    ``inception``, ``inception:PATH`` (its weight file), ``pixels``, or what :func:`find_model` reads, such as a run.
    A folder called ``pixels`` is written ``./pixels``.
    """
    text = str(features)
    return config.build(text, "space") if text.partition(":")[0] in config.KINDS["space"] else ClassifierFeatures(text)


def feature_space(name: str, model: Network) -> Features:
    """Return a network's penultimate features as a feature space; an encoder's has no logits."""

    def extract(x: Tensor) -> Tensor:
        with searching(model):
            return model.features(x)

    return Features(name, extract, None if model.encoder else model.head)
