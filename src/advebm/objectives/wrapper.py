"""What goes around another objective."""

from typing import Any

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.objectives.base import Batch, Context, Loss, Objective, Validation


class Wrapper:
    """An objective around another, ``objective``, which does everything that a subclass does not say otherwise.

    A subclass whose ``search`` gives more than the inner one's overrides :meth:`inner`, which takes that apart again.
    """

    objective: Objective

    def inner(self, batch: Batch, found: Any) -> tuple[Batch, Any]:
        """The batch and the search result that the inner objective works on."""
        return batch, found

    @property
    def needs(self) -> frozenset[str]:
        """Which of labels, view, outside and extra a batch has to have."""
        return self.objective.needs

    @property
    def outputs(self) -> int | None:
        """Outputs of the network; None for a logit a class."""
        return self.objective.outputs

    @property
    def hidden(self) -> int | None:
        """Width of the projection head of an encoder."""
        return self.objective.hidden

    @property
    def replays(self) -> int:
        """Optimiser steps a batch."""
        return self.objective.replays

    @property
    def validate(self) -> Validation | None:
        """How an encoder is judged."""
        return self.objective.validate

    def check(self, images: int, threat: Attack) -> None:
        """Refuse a training split of so many images, or a threat."""
        self.objective.check(images, threat)

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        """State that outlives a step."""
        return self.objective.init(like, generator)

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> Any:
        """Inner loops on the network."""
        return self.objective.search(model, batch, state, ctx)

    def loss(self, model: nn.Module, batch: Batch, found: Any, state: Any, ctx: Context) -> Loss:
        """The loss at what was found."""
        return self.objective.loss(model, *self.inner(batch, found), state, ctx)

    def after(self, model: nn.Module, batch: Batch, found: Any, state: Any, loss: Loss, ctx: Context) -> None:
        """Called when the weights have been updated."""
        self.objective.after(model, *self.inner(batch, found), state, loss, ctx)

    def adversarial(self, batch: Batch, found: Any) -> Tensor | None:
        """The attacked images among what was found, in the order of the batch."""
        return self.objective.adversarial(*self.inner(batch, found))
