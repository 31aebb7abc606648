"""Other objectives at weights that are moved to raise the loss: AWP and SAM."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.models.modes import searching
from advebm.objectives.at import AT
from advebm.objectives.base import Batch, Context, Loss, Objective
from advebm.objectives.wrapper import Wrapper


class PerturbedResult(NamedTuple):
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


class _Perturbing(Wrapper):
    """Base: the loss of another objective at ``w + v``, where v raises it at the inner search's result."""

    def __post_init__(self) -> None:
        kind, name = type(self).__name__.lower(), type(self.objective).__name__
        if self.objective.hidden is not None:
            raise UserError(f"{kind} goes around an objective of classifiers or critics, not {name}")
        if self.objective.replays != 1:
            raise UserError(f"{kind} goes around an objective without replays, not {name}")

    def perturb(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return v for each weight, given the loss's gradients by the same names."""
        raise NotImplementedError

    def moved(self, name: str, weight: Tensor) -> bool:
        """Return whether a parameter is perturbed."""
        return True

    def active(self, ctx: Context) -> bool:
        """Return whether weights are perturbed yet."""
        return True

    def inner(self, batch: Batch, found: PerturbedResult) -> tuple[Batch, Any]:
        return batch, found.inner

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> PerturbedResult:
        """Run the inner search, then compute the perturbation v of each weight."""
        inner = self.objective.search(model, batch, state, ctx)
        if not self.active(ctx):
            return PerturbedResult(inner, {})
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad and self.moved(n, p)}
        with searching(model, training=True), torch.enable_grad():
            copies = {name: p.detach().clone().requires_grad_() for name, p in weights.items()}
            total = _Loss(model, self.objective).at(copies, batch, inner, state, ctx).total
            gradients = torch.autograd.grad(total, list(copies.values()), allow_unused=True)
        known = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
        return PerturbedResult(inner, self.perturb({name: weights[name].detach() for name in known}, known))

    def loss(self, model: nn.Module, batch: Batch, found: PerturbedResult, state: Any, ctx: Context) -> Loss:
        """Return the inner loss at the weights w + v; its gradient flows to w."""
        perturbed = {name: p + found.moves[name] for name, p in model.named_parameters() if name in found.moves}
        return _Loss(model, self.objective).at(perturbed, batch, found.inner, state, ctx)


@dataclass(frozen=True)
class AWP(_Perturbing):
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
        super().__post_init__()

    def moved(self, name: str, weight: Tensor) -> bool:
        return "weight" in name and weight.ndim > 1

    def active(self, ctx: Context) -> bool:
        return ctx.images >= self.warmup

    def perturb(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.gamma * weights[name].norm() * g / (g.norm() + 1e-20) for name, g in gradients.items()}


@dataclass(frozen=True)
class SAM(_Perturbing):
    """The loss of another objective at ``w + v``, for flat minima: sharpness-aware minimisation, Foret et al. (2021).

    ``v = rho t² g / ‖t g‖``, over all parameters together, where g is the gradient of the loss at the inner search's
    result and t is 1, or |w| of each number if ``adaptive`` (Kwon et al., 2021, without their η).  The gradient there
    then updates w.  SADA-JEM (Yang et al., 2023) is ``jem`` in the adaptive form with rho 2.  Batch norm's running
    statistics are updated at w + v, as in ``awp``; codes of SAM update them at w.

    Attributes:
        objective: the objective whose search and loss are used.
        rho: length of v, in units of the weights, or relative to them if ``adaptive``.
        adaptive: whether larger weights move further.
    """

    objective: Objective = AT()
    rho: float = 0.05
    adaptive: bool = False

    @property
    def cites(self) -> tuple[str, ...]:
        return ("foret2021", "kwon2021") if self.adaptive else ("foret2021",)

    def __post_init__(self) -> None:
        if not self.rho >= 0:
            raise UserError(f"rho must be >= 0, got {self.rho}")
        super().__post_init__()

    def perturb(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        scales = {name: w.abs() if self.adaptive else torch.ones_like(w) for name, w in weights.items()}
        length = torch.stack([(scales[name] * g).norm() for name, g in gradients.items()]).norm() + 1e-20
        return {name: self.rho * scales[name].square() * g / length for name, g in gradients.items()}
