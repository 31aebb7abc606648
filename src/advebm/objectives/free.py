"""Adversarial training whose perturbations come free with the gradients of the weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.objectives.base import Batch, Context, Loss, Stateless
from advebm.objectives.standard import cross_entropy


@dataclass
class Perturbation:
    """What FREE keeps from batch to batch: one perturbation for each place in a batch."""

    delta: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with a checkpoint's."""
        if state["delta"].shape != self.delta.shape:
            raise UserError(
                f"the checkpoint's perturbations are {tuple(state['delta'].shape)}, this run's "
                f"{tuple(self.delta.shape)}; was the batch changed?"
            )
        self.delta = state["delta"].to(self.delta)


@dataclass(frozen=True)
class FREE(Stateless):
    """Each batch is trained on ``replays`` times; one backward pass updates weights and perturbation together.

    Shafahi et al. (2019): the loss at ``clip(x + δ, 0, 1)``, then ``δ ← clip(δ + step sign ∇_δ, ±eps)``
    with the gradient at the weights before their update.  δ outlives the batch.  An image counts once as seen, so the
    papers' 200 epochs with m = 8 are 25 epochs of images here.

    Attributes:
        eps: linf radius in pixels of [0, 1].
        replays: m, optimiser steps a batch.
        step_size: of δ; none for ``eps``, as the paper has it.
    """

    eps: float = 8 / 255
    replays: int = 8  # type: ignore[misc]
    step_size: float | None = None

    cites: ClassVar[tuple[str, ...]] = ("shafahi2019",)

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise UserError(f"eps is a radius in [0, 1], got {self.eps}; write 8/255, not 8")
        if self.replays < 1:
            raise UserError(f"replays is at least 1, got {self.replays}")
        if self.step_size is not None and not self.step_size > 0:
            raise UserError(f"step_size is > 0 or none (eps), got {self.step_size}")

    def init(self, like: Tensor, generator: torch.Generator) -> Perturbation:
        """Zeros, as in the authors' code."""
        return Perturbation(torch.zeros_like(like))

    def search(self, model: nn.Module, batch: Batch, state: Perturbation, ctx: Context) -> Tensor:
        """No search: the perturbation so far, as a leaf whose gradient the loss leaves behind."""
        return state.delta.to(batch.x).clone().requires_grad_()

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: Perturbation, ctx: Context) -> Loss:
        """``CE(clip(x + δ), y)``."""
        return cross_entropy(model, self.adversarial(batch, found), batch.y)

    def adversarial(self, batch: Batch, found: Tensor) -> Tensor:
        """The images that the loss is taken at."""
        return (batch.x + found).clamp(0, 1)

    def after(
        self, model: nn.Module, batch: Batch, found: Tensor, state: Perturbation, loss: Loss, ctx: Context
    ) -> None:
        """Raise the loss with the gradient that the backward pass left."""
        assert found.grad is not None
        step = self.eps if self.step_size is None else self.step_size
        state.delta = (found.detach() + step * found.grad.sign()).clamp(-self.eps, self.eps)
