"""Robust self-training: images without labels join in with the labels that a standard classifier gives them."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.models import network
from advebm.models.modes import searching
from advebm.objectives.base import Batch, Context, Objective
from advebm.objectives.trades import TRADES
from advebm.objectives.wrapper import Wrapper


@dataclass(frozen=True)
class RST(Wrapper):
    """Another objective on batches that are half pseudo-labelled, Carmon et al. (2019).

    Each step's images and as many ``extra`` ones are one batch, with one mean over it, as in the authors' code (there:
    TRADES).  They label the extra set once, without augmentation; here the teacher sees each augmented image.

    Attributes:
        teacher: run or folder of the standard classifier that gives the labels.
        objective: what is done with the joint batch.
    """

    teacher: str
    objective: Objective = TRADES()

    cites: ClassVar[tuple[str, ...]] = ("carmon2019",)

    def __post_init__(self) -> None:
        if self.objective.needs - {"labels"}:
            raise UserError(f"rst goes around an objective on labelled images, not {type(self.objective).__name__}")

    @property
    def needs(self) -> frozenset[str]:
        """Extra images."""
        return self.objective.needs | {"extra"}

    def inner(self, batch: Batch, found: tuple[Batch, Any]) -> tuple[Batch, Any]:
        """The joint batch, and what was found on it."""
        return found

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        """The inner objective's state, for batches of twice the size."""
        try:
            with searching(_teacher(self.teacher)) as f, torch.no_grad():
                f(like[:2].cpu())
        except RuntimeError as error:
            shape = " x ".join(map(str, like.shape[1:]))
            raise UserError(f"the teacher {self.teacher} does not take images of {shape}: {error}") from None
        return self.objective.init(torch.cat([like, like]), generator)

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> tuple[Batch, Any]:
        """The joint batch, and what the inner objective finds on it."""
        assert batch.extra is not None
        with searching(_teacher(self.teacher).to(batch.x.device)) as f, torch.no_grad():
            labels = f(batch.extra).argmax(1)
        whole = Batch(torch.cat([batch.x, batch.extra]), torch.cat([batch.y, labels]))
        return whole, self.objective.search(model, whole, state, ctx)

    def adversarial(self, batch: Batch, found: tuple[Batch, Any]) -> Tensor | None:
        """The attacked images with true labels."""
        moved = super().adversarial(batch, found)
        return None if moved is None else moved[: len(batch.x)]


@functools.lru_cache(maxsize=1)
def _teacher(where: str) -> network.Network:
    return network.load_model(where)
