"""Robust self-training: unlabelled images are added with labels predicted by a standard classifier."""

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

    The labelled images of a step and an equal number of ``extra`` images form one batch, with one mean over it, as in
    the authors' code (which uses TRADES).  They label the extra set once, without augmentation; here the teacher labels
    each augmented image.

    Attributes:
        teacher: run or folder of the standard classifier that predicts the labels.
        objective: the objective that the joint batch is trained with.
    """

    teacher: str
    objective: Objective = TRADES()

    cites: ClassVar[tuple[str, ...]] = ("carmon2019",)

    def __post_init__(self) -> None:
        if self.objective.needs - {"labels"}:
            raise UserError(f"rst goes around an objective on labelled images, not {type(self.objective).__name__}")

    @property
    def needs(self) -> frozenset[str]:
        return self.objective.needs | {"extra"}

    def inner(self, batch: Batch, found: tuple[Batch, Any]) -> tuple[Batch, Any]:
        return found

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        """Return the inner objective's state for joint batches; UserError if the images do not fit the teacher."""
        try:
            with searching(_load_teacher(self.teacher)) as f, torch.no_grad():
                f(like[:2].cpu())
        except RuntimeError as error:
            shape = " x ".join(map(str, like.shape[1:]))
            raise UserError(f"the teacher {self.teacher} does not take images of {shape}: {error}") from None
        return self.objective.init(torch.cat([like, like]), generator)

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> tuple[Batch, Any]:
        """Label the extra images, and return the joint batch and the inner objective's search result on it."""
        assert batch.extra is not None
        with searching(_load_teacher(self.teacher).to(batch.x.device)) as f, torch.no_grad():
            labels = f(batch.extra).argmax(1)
        joint = Batch(torch.cat([batch.x, batch.extra]), torch.cat([batch.y, labels]))
        return joint, self.objective.search(model, joint, state, ctx)

    def adversarial(self, batch: Batch, found: tuple[Batch, Any]) -> Tensor | None:
        """Return the attacked images that have true labels; None: the inner objective has no attacked images."""
        x_adv = super().adversarial(batch, found)
        return None if x_adv is None else x_adv[: len(batch.x)]


@functools.lru_cache(maxsize=1)
def _load_teacher(where: str) -> network.Network:
    return network.load_model(where)
