"""The form of every training method: search, loss, and what follows the optimiser's step.

found = objective.search(...)   the maximisation or sampling process: inner loops, no parameter gradients
loss  = objective.loss(...)     the minimisation process: the only part inside distributed training's forward
objective.after(...)            after the optimiser's step: buffers, curricula, instruments
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.descent import Energy
from advebm.models.modes import SearchView


class Batch(NamedTuple):
    """One stream's share of a step."""

    x: Tensor  # (B, C, H, W) in [0, 1]
    y: Tensor  # (B,) int64; -1 where the objective needs no labels
    view: Tensor | None = None  # another augmentation of the same images
    outside: Tensor | None = None  # (B, C, H, W): images that are not of the data
    extra: Tensor | None = None  # (B, C, H, W): more images of the data, without labels


class Context(NamedTuple):
    """What a step may draw from and look at."""

    generator: torch.Generator  # seeded from (seed, attempt, images, stream)
    images: int = 0  # seen so far: the clock of every schedule
    mean: Callable[[Tensor], Tensor] = lambda x: x  # over processes
    gather: Callable[[Tensor], Tensor] = lambda x: x  # rows of all processes, one's own first; differentiable
    note: Callable[[str], None] = lambda text: None  # warn, and say so in metrics.jsonl
    view: SearchView | None = None  # of the network, for ``searching(model, view=ctx.view)``


class Loss(NamedTuple):
    """A scalar to differentiate, and detached 0-d tensors to log; the loop decides when to look at them."""

    total: Tensor
    terms: dict[str, Tensor]


Validation = Callable[[nn.Module, Batch, Attack, torch.Generator], dict[str, float]]


class Objective(Protocol):
    """A frozen dataclass of plain data with these three parts."""

    @property
    def needs(self) -> frozenset[str]:
        """Which of labels, view, outside and extra a batch has to have."""
        ...

    @property
    def outputs(self) -> int | None:
        """Outputs of the network: None for a logit a class, 1 for a critic, the dimension of g(x) for an encoder."""
        ...

    @property
    def hidden(self) -> int | None:
        """Width of the projection head of an encoder; None says that it trains no encoder."""
        ...

    @property
    def replays(self) -> int:
        """Optimiser steps a batch: 1, or m for "free" training."""
        ...

    @property
    def validate(self) -> Validation | None:
        """Scores of two augmentations of some images, as they are and under a threat: how an encoder is judged.

        None leaves a classifier or a critic to the loop, and an encoder unjudged.
        """
        ...

    def check(self, images: int, threat: Attack) -> None:
        """Refuse a training split of so many images, or a threat, before anything is written."""
        ...

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        """State that outlives a step, one for each stream: None, or an object with (load_)state_dict."""
        ...

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> Any:
        """Inner loops on the bare network.  Leaves no trace on it."""
        ...

    def loss(self, model: nn.Module, batch: Batch, found: Any, state: Any, ctx: Context) -> Loss:
        """The loss at what was found."""
        ...

    def after(self, model: nn.Module, batch: Batch, found: Any, state: Any, loss: Loss, ctx: Context) -> None:
        """Called when the weights have been updated."""
        ...

    def adversarial(self, batch: Batch, found: Any) -> Tensor | None:
        """The attacked images among what was found, in the order of the batch, for instruments; None without any."""
        ...


def r1(energy: Energy, x: Tensor) -> Tensor:
    """``½ E‖∇E(x)‖²``, Mescheder et al. (2018), differentiable in the weights; images in [0, 1] set its unit."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / 2


class Stateless:
    """A classifier, labels, no state, nothing to do after a step, no attack: what most objectives share."""

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    outputs: ClassVar[int | None] = None
    hidden: ClassVar[int | None] = None
    replays: ClassVar[int] = 1
    validate: ClassVar[None] = None

    def check(self, images: int, threat: Attack) -> None:
        """Anything will do."""
        return

    def init(self, like: Tensor, generator: torch.Generator) -> Any:
        """No state."""
        return None

    def after(self, model: nn.Module, batch: Batch, found: Any, state: Any, loss: Loss, ctx: Context) -> None:
        """Nothing to do."""
        return

    def adversarial(self, batch: Batch, found: Any) -> Tensor | None:
        """None."""
        return None
