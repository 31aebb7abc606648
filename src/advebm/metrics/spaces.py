"""Feature spaces for sample quality other than the features of a run or model."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from advebm.metrics.base import Features
from advebm.metrics.keys import INCEPTION
from advebm.models import inception


class Space(Protocol):
    """A frozen dataclass that describes a feature space; ``load`` reads the weights."""

    @property
    def name(self) -> str:
        """Name of the space in the names of records."""

    @property
    def judge(self) -> str:
        """Name of the network weights, as records store it."""

    def load(self, device: torch.device | str) -> Features:
        """Return the features, computed on ``device``, where the images must be."""


@dataclass(frozen=True)
class InceptionFeatures:
    """The 2048 features of the Inception network: FID, KID and IS.

    Attributes:
        path: torch-fidelity's weight file.  None: download it once, to torch.hub's cache.
    """

    path: str | None = None

    cites: ClassVar[tuple[str, ...]] = ("szegedy2016",)
    name: ClassVar[str] = INCEPTION
    judge: ClassVar[str] = inception.NAME

    def load(self, device: torch.device | str) -> Features:
        network = inception.load(self.path).to(device)

        def extract(x: Tensor) -> Tensor:
            return torch.cat([network(part) for part in x.split(32)])  # few at a time: each is resized to 299 x 299

        return Features(self.name, extract, network.logits)


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves: needs no network, and is blind to what an image shows."""

    name: ClassVar[str] = "pixels"
    judge: ClassVar[str] = "pixels"

    def load(self, device: torch.device | str) -> Features:
        return Features(self.name, lambda x: x.flatten(1))
