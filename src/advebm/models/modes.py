"""How a network behaves while it is searched rather than trained."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)


class SearchView(Protocol):
    """The same function as a network in eval mode, computed faster; :func:`advebm.models.inference.make_view`."""

    def refresh(self) -> Callable[[Tensor], Tensor]:
        """The function (B, C, H, W) -> outputs, by the weights and statistics that the network has now."""
        ...


@contextmanager
def searching(
    model: nn.Module, *, view: SearchView | None = None, training: bool = False
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields the function to search: the network with frozen parameters, in a fixed mode, or its ``view``.

    A search calls only what this yields, never ``model`` itself.  Modes and ``requires_grad`` are restored exactly,
    running statistics stay put.

    Freezing spares the activations that only weight gradients need, and a compiled backward would compute those
    gradients and throw them away.

    Args:
        model: any module that maps images (B, C, H, W) to outputs.
        view: of this model, refreshed and called in its place; none calls the model.  Training hands one to objectives
            as ``ctx.view``.  It is of eval mode: with ``training`` the model is called.
        training: whether batch norm uses the batch's statistics (FAST does) instead of the running ones.
    """
    modes = {m: m.training for m in model.modules()}
    norms = {m: m.track_running_stats for m in model.modules() if isinstance(m, _BatchNorm)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.train(training)
        for norm in norms:
            norm.track_running_stats = False  # in train mode: use the batch's statistics, move nothing
        for p in trainable:
            p.requires_grad_(False)
        yield model if view is None or training else view.refresh()
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for norm, tracked in norms.items():
            norm.track_running_stats = tracked
        for m, was in modes.items():
            m.training = was


@contextmanager
def norms_fixed(model: nn.Module) -> Iterator[nn.Module]:
    """Batch norms by their running statistics, which stay put, while gradients reach their weights; restored after.

    Take gradients before anything moves the statistics: torch's are by those of that moment, not of the forward pass.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    try:
        for norm in norms:
            norm.eval()
        yield model
    finally:
        for norm in norms:
            norm.train()


class DualBatchNorm2d(nn.Module):
    """Batch norm with separate statistics and affine terms for clean and adversarial batches.

    The branch is chosen by ``with using(model, "adversarial")``, never by an extra argument, so that backbones keep
    the signature ``forward(x)``.  Xie et al. (2020); the encoders of Jiang et al. (2020) need it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: nn.BatchNorm2d(channels) for name in ("clean", "adversarial")})
        self.branch = "clean"

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the same shape, by the statistics of the current branch."""
        return self.branches[self.branch](x)


@contextmanager
def using(model: nn.Module, branch: str) -> Iterator[nn.Module]:
    """Every :class:`DualBatchNorm2d` of ``model`` on one branch, restored afterwards."""
    norms = [m for m in model.modules() if isinstance(m, DualBatchNorm2d)]
    before = [m.branch for m in norms]
    try:
        for norm in norms:
            norm.branches[branch]  # a misspelt branch fails here, before anything changes
            norm.branch = branch
        yield model
    finally:
        for norm, name in zip(norms, before, strict=True):
            norm.branch = name


def fix_branch(model: Module, branch: str) -> Module:
    """A copy whose :class:`DualBatchNorm2d` all compute as those of one branch, whichever is asked for."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, DualBatchNorm2d):
            for other in norm.branches.values():
                other.load_state_dict(norm.branches[branch].state_dict())
    return model


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter and buffer is a number."""
    return all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())
