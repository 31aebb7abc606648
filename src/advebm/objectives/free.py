"""Adversarial training whose perturbations reuse the backward pass of the weight update."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.objectives.base import Batch, Context, Loss, Stateless
from advebm.objectives.standard import cross_entropy


@dataclass
class Perturbation:
    """State of FREE: one perturbation for each position in a batch, (B, C, H, W), kept from batch to batch."""

    delta: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a checkpoint's perturbations; raise UserError if their shape differs."""
        old, new = tuple(state["delta"].shape), tuple(self.delta.shape)
        if old != new:
            raise UserError(f"the checkpoint's perturbations are {old}, this run's {new}; was the batch changed?")
        self.delta = state["delta"].to(self.delta)


@dataclass(frozen=True)
class FREE(Stateless):
    """Each batch is trained on ``replays`` times; one backward pass updates weights and perturbation together.

    Shafahi et al. (2019): the loss at ``clip(x + δ, 0, 1)``, then ``δ ← clip(δ + step sign ∇_δ, ±eps)``
    with the gradient at the weights before their update.  δ is kept for the next batch.  An image counts as seen once,
    so the papers' 200 epochs with m = 8 are 25 epochs of images here.

    Attributes:
        eps: linf radius in pixels of [0, 1].
        replays: m, the number of optimiser steps on each batch.
        step_size: step of δ, in pixels of [0, 1]; None: ``eps``, as in the paper.
    """

    eps: float = 8 / 255
    replays: int = 8  # type: ignore[misc]
    step_size: float | None = None

    cites: ClassVar[tuple[str, ...]] = ("shafahi2019",)

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise UserError(f"eps is a radius in [0, 1], got {self.eps}; write 8/255, not 8")
        if self.replays < 1:
            raise UserError(f"replays must be at least 1, got {self.replays}")
        if self.step_size is not None and not self.step_size > 0:
            raise UserError(f"step_size must be > 0 or none (eps), got {self.step_size}")

    def init(self, like: Tensor, generator: torch.Generator) -> Perturbation:
        """Return zero perturbations, as in the authors' code."""
        return Perturbation(torch.zeros_like(like))

    def search(self, model: nn.Module, batch: Batch, state: Perturbation, ctx: Context) -> Tensor:
        """Return a copy of δ that requires grad, so that the loss's backward pass fills its ``grad``; no search."""
        return state.delta.to(batch.x).clone().requires_grad_()

    def loss(self, model: nn.Module, batch: Batch, found: Tensor, state: Perturbation, ctx: Context) -> Loss:
        return cross_entropy(model, self.adversarial(batch, found), batch.y)

    def adversarial(self, batch: Batch, found: Tensor) -> Tensor:
        return (batch.x + found).clamp(0, 1)

    def after(
        self, model: nn.Module, batch: Batch, found: Tensor, state: Perturbation, loss: Loss, ctx: Context
    ) -> None:
        assert found.grad is not None
        step = self.eps if self.step_size is None else self.step_size
        state.delta = (found.detach() + step * found.grad.sign()).clamp(-self.eps, self.eps)
