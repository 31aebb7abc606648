"""Configurations of optimisers and learning-rate schedules; training progress is counted in images."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError


class Optimizer(Protocol):
    """The configuration of a torch optimiser; ``lr`` is the peak learning rate, which a schedule scales."""

    @property
    def lr(self) -> float: ...

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer: ...


def _check_rates(lr: float, weight_decay: float) -> None:
    if not lr > 0 or not weight_decay >= 0:
        raise UserError(f"lr must be > 0 and weight_decay >= 0, got {lr} and {weight_decay}")


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with (Nesterov) momentum.

    Attributes:
        lr: peak learning rate.
        momentum: share of the last step that the next one keeps, in [0, 1).
        nesterov: whether the gradient is taken as if after the momentum's step.
        weight_decay: factor on the weights, which is added to their gradient.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.nesterov and not self.momentum > 0:
            raise UserError("nesterov needs momentum > 0; set nesterov to false")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled weight decay (AdamW); without decay it is Adam.

    Attributes:
        lr: peak learning rate.
        betas: decay of the running means of gradients and of their squares, both in [0, 1).
        weight_decay: share of the weights, times the learning rate, that each step takes off.
    """

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.weight_decay)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"betas are two numbers in [0, 1), got {self.betas}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        first, second = self.betas
        return torch.optim.AdamW(parameters, self.lr, betas=(first, second), weight_decay=self.weight_decay)


class LayerwiseSGD(torch.optim.Optimizer):
    """LARS: ``v ← m v + γ r (g + d w)``, ``w ← w - v`` with ``r = η ‖w‖ / (‖g‖ + d ‖w‖)`` for each tensor.

    You et al. (2017, algorithm 1).  One-dimensional parameters (biases, norms) use r = 1 and d = 0, as in SimCLR.  Also
    r = 1 if ``‖w‖`` or the denominator is 0.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, trust: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for w in (p for p in group["params"] if p.grad is not None):
                update, rate = w.grad, w.new_ones(())
                if w.ndim > 1:
                    weight_norm, update_norm = w.norm(), update.norm() + group["weight_decay"] * w.norm()
                    nonzero = (weight_norm > 0) & (update_norm > 0)
                    rate = torch.where(nonzero, group["trust"] * weight_norm / update_norm, rate)
                    update = update + group["weight_decay"] * w
                state = self.state[w]
                if not state:
                    state["velocity"] = torch.zeros_like(w)
                velocity = state["velocity"]
                w -= velocity.mul_(group["momentum"]).add_(group["lr"] * rate * update)


@dataclass(frozen=True)
class LARS:
    """Layer-wise adaptive rates for large batches, You et al. (2017), see :class:`LayerwiseSGD`.

    Attributes:
        lr: γ, the peak learning rate; ACL uses 5 for batches of 512 images.
        momentum: m.
        weight_decay: d.
        trust: η, the norm of a step divided by that of the weights it changes, at γ = 1.
    """

    lr: float = 5.0
    momentum: float = 0.9
    weight_decay: float = 1e-6
    trust: float = 1e-3

    cites: ClassVar[tuple[str, ...]] = ("you2017",)

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.weight_decay)
        if not 0 <= self.momentum < 1 or not self.trust > 0:
            raise UserError(f"momentum must lie in [0, 1) and trust must be > 0, got {self.momentum} and {self.trust}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return LayerwiseSGD(parameters, self.lr, self.momentum, self.weight_decay, self.trust)


class OrthogonalMomentum(torch.optim.Optimizer):
    """Muon: each matrix moves by its momentum with all singular values made about 1, Jordan et al. (2024).

    ``v ← m v + g``, then ``w ← (1 - γ d) w - γ √max(1, rows / columns) O(g + m v)``, where O is :func:`orthogonalize`
    and a filter is a matrix of one row for each output.  One-dimensional parameters (biases, norms) follow Nesterov's
    momentum, ``w ← w - γ_1 (g + m v)``, without decay.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, vector_lr: float
    ) -> None:
        shares = {"lr": lr, "vector_share": vector_lr / lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, shares)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for w in (p for p in group["params"] if p.grad is not None):
                state = self.state[w]
                if not state:
                    state["velocity"] = torch.zeros_like(w)
                velocity = state["velocity"].mul_(momentum).add_(w.grad)
                update = w.grad + momentum * velocity
                if w.ndim < 2:
                    w -= rate * group["vector_share"] * update
                    continue
                matrix = update.flatten(1)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                w *= 1 - rate * group["weight_decay"]
                w -= rate * scale * orthogonalize(matrix).view_as(w)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return ``U V^T`` for a matrix ``U S V^T``, with singular values that are only about 1, by Newton-Schulz steps.

    Five steps of the polynomial of Jordan et al. (2024) bring singular values above 1/100 of the Frobenius norm, the
    root of the sum of their squares, to 0.7 to 1.2; smaller ones stay smaller.
    """
    x = matrix / matrix.norm().clamp_min(1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


@dataclass(frozen=True)
class Muon:
    """Momentum made orthogonal for matrices and filters, Jordan et al. (2024), see :class:`OrthogonalMomentum`.

    They use it for hidden layers only; here the first and the last layer have it, too.

    Attributes:
        lr: peak learning rate of matrices and filters: about the spectral norm of a step, times √(rows / columns) if
            there are more rows.
        momentum: of all parameters, in [0, 1).
        weight_decay: share of matrices and filters, times the learning rate, that each step takes off.
        vector_lr: peak learning rate of biases and norms.
    """

    lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.01
    vector_lr: float = 0.01

    cites: ClassVar[tuple[str, ...]] = ("jordan2024",)

    def __post_init__(self) -> None:
        _check_rates(self.lr, self.weight_decay)
        _check_rates(self.vector_lr, 0.0)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), got {self.momentum}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return OrthogonalMomentum(parameters, self.lr, self.momentum, self.weight_decay, self.vector_lr)


@dataclass(frozen=True)
class Lookahead:
    """Another optimiser whose weights go back, every few steps, to a point between them and slower ones.

    Zhang et al. (2019, algorithm 1): after ``every`` steps the slow weights move by ``share`` of the way to the fast
    ones, and the fast ones begin there again.  Checkpoints, averages and validation have the fast ones.

    Attributes:
        optimizer: takes the fast steps; the learning rate is its own, ``optimizer.optimizer.lr``.
        every: number of fast steps, k in the paper.
        share: α in the paper, in (0, 1].
    """

    optimizer: Optimizer = SGD()
    every: int = 5
    share: float = 0.5

    cites: ClassVar[tuple[str, ...]] = ("zhang2019lookahead",)

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.share <= 1:
            raise UserError(f"every is at least 1 step and share in (0, 1], got {self.every} and {self.share}")
        if isinstance(self.optimizer, Lookahead):
            raise UserError("lookahead goes around another optimiser, not around itself")

    @property
    def lr(self) -> float:
        return self.optimizer.lr

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = self.optimizer.build(parameters)
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._pull)
        return optimizer

    @staticmethod
    @torch.no_grad()
    def _remember(optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Keep the first weights as the slow ones, in the optimiser's state, so that checkpoints have them."""
        for group in optimizer.param_groups:
            if "slow" not in group:
                group["fast_steps"], group["slow"] = 0, [p.detach().clone() for p in group["params"]]
            group["slow"] = [w.to(p.device) for w, p in zip(group["slow"], group["params"], strict=True)]  # resumed

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            group["fast_steps"] += 1
            if group["fast_steps"] % self.every == 0:
                for slow, fast in zip(group["slow"], group["params"], strict=True):
                    fast.copy_(slow.lerp_(fast, self.share))


class Schedule(Protocol):
    """Return the factor on the peak learning rate after ``images`` of ``total`` images."""

    def __call__(self, images: int, total: int) -> float: ...


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up over a share of the images, then half a cosine to zero.

    Attributes:
        warmup: share of the images over which the rate first rises from zero, in [0, 1).
    """

    warmup: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a share in [0, 1) of all images, got {self.warmup}")

    def __call__(self, images: int, total: int) -> float:
        share = min(images / total, 1.0)  # the last batch may reach beyond the end
        if share < self.warmup:
            return share / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (share - self.warmup) / (1 - self.warmup)))


@dataclass(frozen=True)
class Cyclic:
    """Linear from zero to the peak rate at a share of the way, and linear back to zero.

    Attributes:
        peak: share of the images at which the rate is highest, in (0, 1).
    """

    peak: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1:
            raise UserError(f"peak is a share in (0, 1) of all images, got {self.peak}")

    def __call__(self, images: int, total: int) -> float:
        share = min(images / total, 1.0)
        return share / self.peak if share < self.peak else (1 - share) / (1 - self.peak)


@dataclass(frozen=True)
class Steps:
    """The rate times ``factor`` at each of some shares of the way; ``at=()`` keeps it constant.

    Attributes:
        at: shares of the images, in (0, 1), at which the rate changes.
        factor: what the rate is multiplied by at each of them.
        warmup: share of the images over which the rate first rises from zero, in [0, 1).
    """

    at: tuple[float, ...] = ()
    factor: float = 0.1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not (all(0 < at < 1 for at in self.at) and 0 <= self.warmup < 1 and self.factor > 0):
            got = f"{self.at}, {self.warmup}, {self.factor}"
            raise UserError(f"at are shares in (0, 1), warmup is one in [0, 1) and factor must be > 0, got {got}")

    def __call__(self, images: int, total: int) -> float:
        share = images / total
        if share < self.warmup:
            return share / self.warmup
        return self.factor ** sum(share >= at for at in self.at)
