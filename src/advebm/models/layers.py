"""Building blocks of the backbones: convolutions, normalisations, activations, stages."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from advebm.core.errors import UserError
from advebm.models.modes import DualBatchNorm2d

Norm = Literal["batch", "group", "dual", "none"]
Activation = Literal["silu", "relu", "leaky_relu"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}


def norm2d(kind: Norm, channels: int) -> nn.Module:
    """Return the normalisation of a convolution's output, with initial weights 1 and biases 0."""
    match kind:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(max(g for g in (8, 4, 2, 1) if channels % g == 0), channels)
        case "dual":
            return DualBatchNorm2d(channels)
        case "none":
            return nn.Identity()


def conv2d(inputs: int, outputs: int, kernel: int, stride: int, norm: Norm, *, padding: int | None = None) -> nn.Conv2d:
    """Return a convolution that divides the size by its stride only; it has biases exactly when ``norm`` is ``none``.

    ``padding`` is 0 where the input is padded before.  Weights are drawn as in He et al. (2015), normal with variance
    ``2 / (kernel² outputs)``; biases begin at 0.
    """
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def avoid_wrong_gradient(module: nn.Module) -> None:
    """Make strided 1x1 convolutions of 2 to 7 input channels subsample their input first and then run with stride 1.

    The outputs stay the same, but oneDNN's faulty kernel is never used: for such convolutions in channels-last layout,
    on CPUs without AVX-512, its weight gradient is wrong or it writes out of bounds; see docs/cpu.md.
    """
    for m in module.modules():
        if type(m) is not nn.Conv2d or m.kernel_size != (1, 1) or m.padding not in ((0, 0), "valid") or m.groups > 1:
            continue
        if m.stride != (1, 1) and 1 < m.in_channels < 8:
            m.register_forward_pre_hook(partial(_subsample, m.stride))
            m.stride = (1, 1)


def _subsample(stride: tuple[int, ...], module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Return the rows and columns of a module's input (…, H, W) that a stride keeps: a forward pre-hook."""
    return inputs[0][..., :: stride[0], :: stride[1]]


class Staged(nn.Module):
    """A backbone of ``stem``, ``stages``, ``closing`` and global average pooling: ``(B, C, H, W)`` -> ``(B, D)``.

    If ``recompute`` is True, only each block's input is stored for weight gradients; :func:`recompute` does the rest.
    """

    recompute = False

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], closing: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages, self.closing = stem, nn.ModuleList(stages), closing
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """Return the output of each stage, ``(B, C_i, H_i, W_i)``."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's output after ``closing``, averaged over its pixels, ``(B, D)``."""
        x = self.stem(x)
        recomputing = self.recompute and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        for stage in self.stages:
            for block in stage if isinstance(stage, nn.Sequential) else (stage,):
                x = recompute(block, x) if recomputing else block(x)
        return self.closing(x).mean((2, 3))


def recompute(block: nn.Module, x: Tensor) -> Tensor:
    """Return ``block(x)`` without storing its activations, which the gradient computes again, Chen et al. (2016).

    It does so with the weights, statistics, modes and branches of this call, and updates running statistics only once.
    """
    weights = dict(block.named_parameters())
    snapshot = _AsThen(block)

    def run(z: Tensor, *values: Tensor) -> Tensor:
        tensors = dict(zip(weights, values, strict=True)) | (snapshot.statistics if snapshot.entered else {})
        return torch.func.functional_call(block, tensors, (z,))

    return checkpoint(run, x, *weights.values(), use_reentrant=False, context_fn=lambda: (nullcontext(), snapshot))


class _AsThen:
    """Context that gives a block the modes and branches it had at creation; ``statistics`` are copies from then."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.entered = block, False
        self.state, self.statistics = self._modes(), {name: value.clone() for name, value in block.named_buffers()}

    def __enter__(self) -> None:
        self.now, self.entered = self._modes(), True
        self._restore(self.state)

    def __exit__(self, *error: object) -> None:
        self._restore(self.now)
        self.entered = False

    def _modes(self) -> list[tuple[nn.Module, bool, str | None]]:
        return [(m, m.training, m.branch if isinstance(m, DualBatchNorm2d) else None) for m in self.block.modules()]

    @staticmethod
    def _restore(state: list[tuple[nn.Module, bool, str | None]]) -> None:
        for module, training, branch in state:
            module.training = training
            if isinstance(module, DualBatchNorm2d) and branch is not None:
                module.branch = branch


def stages(
    block: Callable[[int, int, int], nn.Module], inputs: int, widths: Sequence[int], counts: Sequence[int]
) -> list[nn.Module]:
    """Return stages of ``counts[i]`` blocks ``block(inputs, widths[i], stride)``; from the second on, with stride 2."""
    sequence: list[nn.Module] = []
    for width, count in zip(widths, counts, strict=True):
        first = block(inputs, width, 2 if sequence else 1)
        sequence.append(nn.Sequential(first, *(block(width, width, 1) for _ in range(count - 1))))
        inputs = width
    return sequence


def check_size(kind: str, size: int, least: int = 8) -> None:
    """Raise a UserError for images of fewer pixels than all halvings together need: three of 8 leave one."""
    if size < least:
        raise UserError(f"{kind} takes images of at least {least} pixels, got {size}")
