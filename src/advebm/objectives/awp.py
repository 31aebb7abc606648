"""Adversarial weight perturbation, applied to another objective."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.models.modes import searching
from advebm.objectives.at import AT
from advebm.objectives.base import Batch, Context, Loss, Objective
from advebm.objectives.wrapper import Wrapper


class AWPResult(NamedTuple):
    """The search result of the inner objective, and the perturbation of each weight by parameter name."""

    inner: Any
    moves: dict[str, Tensor]


class _Loss(nn.Module):
    """An objective's loss as a module, so that ``functional_call`` can evaluate it with other weights."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, *arguments: Any) -> Loss:
        return self.objective.loss(self.model, *arguments)

    def at(self, weights: dict[str, Tensor], *arguments: Any) -> Loss:
        return torch.func.functional_call(self, {f"model.{name}": w for name, w in weights.items()}, arguments)


@dataclass(frozen=True)
class AWP(Wrapper):
    """The loss of another objective at ``w + v``, ``v`` raising it: Wu et al. (2020), as in their code.

    ``v = gamma ‖w‖ g / ‖g‖`` for each weight of a convolution or linear layer (no biases, no norm layers), where g is
    the gradient of the loss at the inner search's result.  The gradient at w + v then updates w.  Weight decay acts on
    w (in the authors' code, which moves the weights in place, on w + v).

    Attributes:
        objective: the objective whose search and loss are used: ``at`` (AT-AWP), ``trades`` (TRADES-AWP), …
        gamma: size of v relative to each weight's norm; the paper uses 0.01 for AT and 0.005 for TRADES.
        warmup: number of training images seen before weights are perturbed.
    """

    objective: Objective = AT()
    gamma: float = 0.01
    warmup: int = 0

    cites: ClassVar[tuple[str, ...]] = ("wu2020",)

    def __post_init__(self) -> None:
        if not self.gamma >= 0 or self.warmup < 0:
            raise UserError(f"gamma and warmup must be >= 0, got {self.gamma} and {self.warmup}")
        name = type(self.objective).__name__
        if self.objective.hidden is not None:
            raise UserError(f"awp goes around an objective of classifiers or critics, not {name}")
        if self.objective.replays != 1:
            raise UserError(f"awp goes around an objective without replays, not {name}")

    def inner(self, batch: Batch, found: AWPResult) -> tuple[Batch, Any]:
        return batch, found.inner

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> AWPResult:
        """Run the inner search, then compute the perturbation v of each weight (none during the warm-up)."""
        inner = self.objective.search(model, batch, state, ctx)
        if ctx.images < self.warmup:
            return AWPResult(inner, {})
        weights = {n: p for n, p in model.named_parameters() if "weight" in n and p.ndim > 1 and p.requires_grad}
        with searching(model, training=True), torch.enable_grad():
            copies = {name: p.detach().clone().requires_grad_() for name, p in weights.items()}
            total = _Loss(model, self.objective).at(copies, batch, inner, state, ctx).total
            gradients = torch.autograd.grad(total, list(copies.values()), allow_unused=True)
        moves = {
            name: self.gamma * w.detach().norm() * g / (g.norm() + 1e-20)
            for (name, w), g in zip(weights.items(), gradients, strict=True)
            if g is not None
        }
        return AWPResult(inner, moves)

    def loss(self, model: nn.Module, batch: Batch, found: AWPResult, state: Any, ctx: Context) -> Loss:
        """Return the inner loss at the weights w + v; its gradient flows to w."""
        perturbed = {name: p + found.moves[name] for name, p in model.named_parameters() if name in found.moves}
        return _Loss(model, self.objective).at(perturbed, batch, found.inner, state, ctx)
