"""Base class of objectives that wrap another objective."""

from typing import Any

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.objectives.base import Batch, Context, Loss, Objective, Validation


class Wrapper:
    """An objective that delegates to another one, ``objective``, whatever a subclass does not override.

    A subclass whose ``search`` returns more than the inner result overrides :meth:`inner`, which extracts the latter.
    """

    objective: Objective

    def inner(self, batch: Batch, found: Any) -> tuple[Batch, Any]:
        """Return the batch and the search result that the inner objective's methods take."""
        return batch, found

    @property
    def needs(self) -> frozenset[str]:
        return self.objective.needs

    @property
    def outputs(self) -> int | None:
        return self.objective.outputs

    @property
    def hidden(self) -> int | None:
        return self.objective.hidden

    @property
    def replays(self) -> int:
        return self.objective.replays

    @property
    def validate(self) -> Validation | None:
        return self.objective.validate

    def check(self, images: int, threat: Attack) -> None:
        self.objective.check(images, threat)

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        return self.objective.init(like, generator)

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> Any:
        return self.objective.search(model, batch, state, ctx)

    def loss(self, model: nn.Module, batch: Batch, found: Any, state: Any, ctx: Context) -> Loss:
        return self.objective.loss(model, *self.inner(batch, found), state, ctx)

    def after(self, model: nn.Module, batch: Batch, found: Any, state: Any, loss: Loss, ctx: Context) -> None:
        self.objective.after(model, *self.inner(batch, found), state, loss, ctx)

    def adversarial(self, batch: Batch, found: Any) -> Tensor | None:
        return self.objective.adversarial(*self.inner(batch, found))
