"""Feature spaces that samples are judged in, beside the features of a run or model."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from advebm.metrics.base import Features
from advebm.metrics.keys import INCEPTION
from advebm.models import inception


class Space(Protocol):
    """A frozen dataclass that names a feature space; ``load`` reads what it needs."""

    @property
    def name(self) -> str:
        """As it stands in the names of records."""
        ...

    @property
    def judge(self) -> str:
        """Which weights it is of."""
        ...

    def load(self, device: torch.device | str) -> Features:
        """The features, computed on ``device``, where the images have to be."""
        ...


@dataclass(frozen=True)
class InceptionFeatures:
    """The 2048 features of the Inception network: FID, KID and IS.

    Attributes:
        path: of torch-fidelity's weight file; none downloads it once, into torch.hub's cache.
    """

    path: str | None = None

    cites: ClassVar[tuple[str, ...]] = ("szegedy2016",)
    name: ClassVar[str] = INCEPTION
    judge: ClassVar[str] = inception.NAME

    def load(self, device: torch.device | str) -> Features:
        """A few images at a time, since each is taken to 299 x 299 pixels."""
        network = inception.load(self.path).to(device)

        def extract(x: Tensor) -> Tensor:
            return torch.cat([network(part) for part in x.split(32)])

        return Features(self.name, extract, network.logits)


@dataclass(frozen=True)
class Pixels:
    """The pixels themselves: needs no network, and is blind to what an image shows."""

    name: ClassVar[str] = "pixels"
    judge: ClassVar[str] = "pixels"

    def load(self, device: torch.device | str) -> Features:
        """Nothing to read."""
        return Features(self.name, lambda x: x.flatten(1))
