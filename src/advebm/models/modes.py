"""How a network behaves while it is searched rather than trained: modes, frozen weights, batch-norm branches."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advebm.core.errors import UserError
from advebm.descent import Differentiate, differentiating

Module = TypeVar("Module", bound=nn.Module)


class SearchView(Protocol):
    """A network in eval mode, computed faster; made by :func:`advebm.models.inference.make_view`.

    Attributes:
        compiled: a compiled function of an energy and images, and the shape of the images it is for; None: there is
            none.
    """

    compiled: tuple[torch.Size, Differentiate] | None

    def refresh(self) -> Callable[[Tensor], Tensor]:
        """Return the function (B, C, H, W) -> outputs, with the network's current weights and statistics."""


@contextmanager
def searching(
    model: nn.Module, *, view: SearchView | None = None, training: bool = False
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the function to search: the network with frozen parameters, in a fixed mode, or its ``view``.

    A search calls only what this yields, never ``model`` itself.  Modes and ``requires_grad`` are restored exactly, and
    running statistics do not change.

    Freezing avoids storing activations that only weight gradients need, which a compiled backward would compute in
    vain.

    Args:
        model: any module that maps images (B, C, H, W) to outputs.
        view: a view of this model, refreshed and used in its place; None: the model itself.  Objectives get a view from
            training, as ``ctx.view``.  Views are for eval mode only: with ``training`` the model itself is used.
        training: use train mode, in which batch norm takes the batch's statistics (as FAST does), not the running ones.

    Raises:
        UserError: the model was made under ``torch.inference_mode()``.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise UserError("the model was made under torch.inference_mode(), so it has no gradients; make it outside")
    modes = {m: m.training for m in model.modules()}
    norms = {m: m.track_running_stats for m in model.modules() if isinstance(m, _BatchNorm)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.train(training)
        for norm in norms:
            norm.track_running_stats = False  # in train mode: use the batch's statistics, update nothing
        for p in trainable:
            p.requires_grad_(False)
        view = None if training else view
        with torch.inference_mode(False), differentiating(None if view is None else view.compiled):
            yield model if view is None else view.refresh()
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for norm, tracked in norms.items():
            norm.track_running_stats = tracked
        for m, mode in modes.items():
            m.training = mode


@contextmanager
def freeze_batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """Let batch norms use their running statistics, without updates, while gradients reach their weights.

    Train mode is restored at the end.  Compute gradients before anything changes the statistics: torch's backward uses
    the statistics at that moment, not those of the forward pass.
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
    """Batch norm with separate statistics and affine terms for clean and adversarial batches, Xie et al. (2020).

    Select the branch by ``with using(model, "adversarial")``, not by an extra argument, so that backbones keep the
    signature ``forward(x)``.  The encoders of Jiang et al. (2020) need it.
    """

    kind: ClassVar[type[_BatchNorm]] = nn.BatchNorm2d

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: self.kind(channels) for name in ("clean", "adversarial")})
        self.branch = "clean"

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[self.branch](x)


class DualBatchNorm1d(DualBatchNorm2d):
    """The same for features (B, D), as in the projection head of Jiang et al. (2020)."""

    kind = nn.BatchNorm1d


@contextmanager
def using(model: nn.Module, branch: str) -> Iterator[nn.Module]:
    """Switch every :class:`DualBatchNorm2d` of ``model`` to one branch, and back at the end."""
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
    """Return a copy whose :class:`DualBatchNorm2d` all compute as ``branch``, whichever branch is selected."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, DualBatchNorm2d):
            for batch_norm in norm.branches.values():
                batch_norm.load_state_dict(norm.branches[branch].state_dict())
    return model


def all_finite(model: nn.Module) -> bool:
    """Return whether every parameter and buffer is finite."""
    return all(bool(torch.isfinite(v).all()) for v in model.state_dict().values())
