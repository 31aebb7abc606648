"""The interface of every training method: a search, a loss, and an update of its state after the optimiser's step.

found = objective.search(...)   maximisation or sampling: inner loops, no gradients of the parameters
loss  = objective.loss(...)     minimisation: the loss that is differentiated with respect to the parameters
objective.after(...)            after the optimiser's step: update buffers, curricula and monitors
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.data.loader import Origin
from advebm.descent import Energy
from advebm.models.modes import SearchView


class Batch(NamedTuple):
    """The images of one training step and stream (a fixed share of the batch with its own random numbers)."""

    x: Tensor  # (B, C, H, W) in [0, 1]
    y: Tensor  # (B,) int64; -1 where the objective needs no labels; of mixed images shares (B, K)
    view: Tensor | None = None  # (B, C, H, W): another augmentation of the same images
    outside: Tensor | None = None  # (B, C, H, W): images from outside the data distribution
    extra: Tensor | None = None  # (B, C, H, W): unlabelled images like the data
    origin: Origin | None = None  # which training images these are, and where their pixels come from


class Context(NamedTuple):
    """What the training loop provides to the methods of an objective."""

    generator: torch.Generator  # seeded from (seed, attempt, images, stream, replay)
    images: int = 0  # training images seen before this step, which all schedules count in
    mean: Callable[[Tensor], Tensor] = lambda x: x  # mean over processes
    gather: Callable[[Tensor], Tensor] = lambda x: x  # rows of all processes, this one's first; differentiable
    note: Callable[[str], None] = lambda text: None  # report a warning, also in metrics.jsonl
    view: SearchView | None = None  # faster network, for ``searching(model, view=ctx.view)``


class Loss(NamedTuple):
    """A scalar to differentiate, and detached 0-d tensors by name, which the loop reads only when it logs."""

    total: Tensor
    terms: dict[str, Tensor]


Validation = Callable[[nn.Module, Batch, Attack, torch.Generator], dict[str, float]]


class Objective(Protocol):
    """A training method: a frozen dataclass of plain data (numbers, strings, other such dataclasses)."""

    @property
    def needs(self) -> frozenset[str]:
        """The parts that a batch must have, out of ``labels``, ``view``, ``outside``, ``extra`` and ``origin``."""

    @property
    def outputs(self) -> int | None:
        """Number of outputs of the network: 1 for a critic, D for an encoder; None: one logit per class."""

    @property
    def hidden(self) -> int | None:
        """Hidden width of the projection head of an encoder; None: the objective does not train an encoder."""

    @property
    def replays(self) -> int:
        """Number of optimiser steps on each batch: 1, or m for "free" training."""

    @property
    def validate(self) -> Validation | None:
        """Function that scores an encoder on two augmentations of validation images, clean and under a threat.

        None: the training loop scores a classifier or critic itself; an encoder is not validated.
        """

    def check(self, images: int, threat: Attack) -> None:
        """Raise UserError if the number of training images or the threat is unsuitable; called before any output."""

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        """Return a stream's state: None, or an object with ``state_dict`` and ``load_state_dict``.

        ``like`` has the shape of the stream's images in a step, (B, C, H, W).
        """

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> Any:
        """Run the inner loops, and return their result for :meth:`loss`.  Leaves the network unchanged."""

    def loss(self, model: nn.Module, batch: Batch, found: Any, state: Any, ctx: Context) -> Loss:
        """Return the loss at the result of the search."""

    def after(self, model: nn.Module, batch: Batch, found: Any, state: Any, loss: Loss, ctx: Context) -> None:
        """Update the state, once the optimiser has updated the weights."""

    def adversarial(self, batch: Batch, found: Any) -> Tensor | None:
        """Return the attacked images (B, C, H, W) in the order of the batch, for monitoring; None: there are none."""


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the share of logits (B, K) whose largest is that of the label (B,), or of the largest share (B, K)."""
    return (logits.argmax(1) == (y.argmax(1) if y.ndim == 2 else y)).float().mean()


def r1(energy: Energy, x: Tensor) -> Tensor:
    """Return ``½ mean ‖∇E(x)‖²``, Mescheder et al. (2018), with x in [0, 1]; differentiable in the weights."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / 2


class Stateless:
    """Defaults that most objectives share: a classifier on labelled images, no state, no attacked images."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    outputs: ClassVar[int | None] = None
    hidden: ClassVar[int | None] = None
    replays: ClassVar[int] = 1
    validate: ClassVar[None] = None

    def check(self, images: int, threat: Attack) -> None:
        return

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        return None

    def after(self, model: nn.Module, batch: Batch, found: Any, state: Any, loss: Loss, ctx: Context) -> None:
        return

    def adversarial(self, batch: Batch, found: Any) -> Tensor | None:
        return None
