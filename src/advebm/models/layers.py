"""What the backbones are made of: convolutions, normalisations, activations, stages."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
    """The normalisation of a convolution's output; it begins with weights 1 and biases 0."""
    match kind:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(max(g for g in (8, 4, 2, 1) if channels % g == 0), channels)
        case "dual":
            return DualBatchNorm2d(channels)
        case "none":
            return nn.Identity()


def conv2d(inputs: int, outputs: int, kernel: int, stride: int, norm: Norm) -> nn.Conv2d:
    """A convolution that keeps the size up to its stride, with biases exactly when ``norm`` is ``none``.

    Weights are drawn by He et al. (2015), normal with variance ``2 / (kernel² outputs)``; biases begin at 0.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def avoid_wrong_gradient(module: nn.Module) -> None:
    """Let strided 1x1 convolutions of 2 to 7 channels drop the pixels they skip first, then go over all that are left.

    The same function of the input, but never the kernel of oneDNN whose weight gradient is wrong, or writes out of
    bounds, for such convolutions in channels-last layout on CPUs without AVX-512; see docs/cpu.md.
    """
    for m in module.modules():
        if type(m) is not nn.Conv2d or m.kernel_size != (1, 1) or m.padding not in ((0, 0), "valid") or m.groups > 1:
            continue
        if m.stride != (1, 1) and 1 < m.in_channels < 8:
            m.register_forward_pre_hook(_Subsample(*m.stride))
            m.stride = (1, 1)


class _Subsample:
    """A hook that gives a module every so many rows and columns of its input (…, H, W)."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0][..., :: self.rows, :: self.columns]


class Staged(nn.Module):
    """``stem``, ``stages``, ``closing``, global average pooling: ``(B, C, H, W)`` -> ``(B, D)``.

    With ``recompute``, gradients of weights keep what goes into each block, and :func:`recompute` the rest.
    """

    recompute = False

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], closing: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages, self.closing = stem, nn.ModuleList(stages), closing
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """What each stage returns, ``(B, C_i, H_i, W_i)``."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """The last map, closed and averaged over its pixels, ``(B, D)``."""
        x = self.stem(x)
        again = self.recompute and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        for stage in self.stages:
            for block in stage if isinstance(stage, nn.Sequential) else (stage,):
                x = recompute(block, x) if again else block(x)
        return self.closing(x).mean((2, 3))


def recompute(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, whose activations are not kept but computed again for the gradient, Chen et al. (2016).

    By the weights, statistics, modes and branches of this call, whatever they are by then; statistics move once.
    """
    weights = dict(block.named_parameters())
    then = _AsThen(block)

    def run(z: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(block, given | (then.statistics if then.entered else {}), (z,))

    return checkpoint(run, x, *weights.values(), use_reentrant=False, context_fn=lambda: (nullcontext(), then))


class _AsThen:
    """Within it a block has the modes and branches of the moment this was made; ``statistics`` are those of then."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.entered = block, False
        self.state, self.statistics = self._look(), {name: value.clone() for name, value in block.named_buffers()}

    def __enter__(self) -> None:
        self.now, self.entered = self._look(), True
        self._set(self.state)

    def __exit__(self, *error: object) -> None:
        self._set(self.now)
        self.entered = False

    def _look(self) -> list[tuple[nn.Module, bool, str | None]]:
        return [(m, m.training, m.branch if isinstance(m, DualBatchNorm2d) else None) for m in self.block.modules()]

    @staticmethod
    def _set(state: list[tuple[nn.Module, bool, str | None]]) -> None:
        for module, training, branch in state:
            module.training = training
            if isinstance(module, DualBatchNorm2d) and branch is not None:
                module.branch = branch


def stages(
    block: Callable[[int, int, int], nn.Module], inputs: int, widths: Sequence[int], counts: Sequence[int]
) -> list[nn.Module]:
    """``counts[i]`` blocks ``block(inputs, widths[i], stride)`` each; all stages but the first begin with stride 2."""
    made: list[nn.Module] = []
    for width, count in zip(widths, counts, strict=True):
        first = block(inputs, width, 2 if made else 1)
        made.append(nn.Sequential(first, *(block(width, width, 1) for _ in range(count - 1))))
        inputs = width
    return made


def check_size(kind: str, size: int) -> None:
    """Refuse images below 8 pixels: three halvings leave one."""
    if size < 8:
        raise UserError(f"{kind} takes images of at least 8 pixels, got {size}")
