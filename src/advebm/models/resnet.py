"""Residual networks for small images: 3x3 stem of stride 1, no max-pooling."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.layers import ACTIVATIONS, Activation, Norm, Staged, check_size, conv2d, norm2d, stages

# depth -> width of the first stage, blocks of each stage, ratio of a block's outputs to the channels inside it
LAYOUTS: dict[int, tuple[int, tuple[int, ...], int]] = {
    8: (16, (1, 1, 1), 1),
    18: (64, (2, 2, 2, 2), 1),
    50: (64, (3, 4, 6, 3), 4),
}


class PostActivated(nn.Module):
    """The residual block ``act(residual(x) + shortcut(x))``, He et al. (2016, fig. 5).

    The residual has two 3x3 convolutions, the first with the stride; with ``expansion`` above 1 a bottleneck of 1x1,
    3x3 and 1x1 with ``outputs / expansion`` channels inside, the stride on the 3x3 (the paper: on the first 1x1).
    Where the shape changes, the shortcut is a 1x1 convolution and a norm.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, expansion: int, norm: Norm, activation: Activation
    ) -> None:
        super().__init__()
        inner, act = outputs // expansion, ACTIVATIONS[activation]

        def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            return [conv2d(inputs, outputs, kernel, stride, norm), norm2d(norm, outputs)]

        if expansion == 1:
            layers = [*unit(inputs, outputs, 3, stride), act(), *unit(outputs, outputs, 3)]
        else:
            layers = [*unit(inputs, inner, 1), act(), *unit(inner, inner, 3, stride), act(), *unit(inner, outputs, 1)]
        same = stride == 1 and inputs == outputs
        self.residual = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if same else nn.Sequential(*unit(inputs, outputs, 1, stride))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        return self.act(self.residual(x) + self.shortcut(x))


class PreActivated(nn.Module):
    """The block ``residual(a) + shortcut`` with ``a = act(norm(x))``, He et al. (2016b, fig. 1b).

    The residual is 3x3 conv with the stride, norm, act, 3x3 conv; the shortcut ``x``, or a 1x1 conv of ``a`` to a new
    shape.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        self.opening = nn.Sequential(norm2d(norm, inputs), act())
        self.residual = nn.Sequential(
            conv2d(inputs, outputs, 3, stride, norm),
            norm2d(norm, outputs),
            act(),
            conv2d(outputs, outputs, 3, 1, norm),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else conv2d(inputs, outputs, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        a = self.opening(x)
        return self.residual(a) + (x if self.shortcut is None else self.shortcut(a))


def preactivated(
    channels: int, stem: int, widths: tuple[int, ...], count: int, norm: Norm, activation: Activation
) -> Staged:
    """Build a 3x3 convolution to ``stem`` channels, ``count`` blocks per stage, a closing norm and activation."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return PreActivated(inputs, outputs, stride, norm, activation)

    return Staged(
        conv2d(channels, stem, 3, 1, norm),
        stages(block, stem, widths, [count] * len(widths)),
        nn.Sequential(norm2d(norm, widths[-1]), ACTIVATIONS[activation]()),
    )


@dataclass(frozen=True)
class ResNet:
    """Residual network of He et al. (2016), activation after the sum, with a stem for small images.

    Depth 8 has three stages of one block, 18 four of two, 50 four of 3, 4, 6 and 3 bottlenecks; each stage but the
    first doubles the width and halves the size.  Shortcuts are a 1x1 convolution and a norm where the shape changes.
    Convolutions have biases exactly when ``norm`` is ``none``.  Weights begin as in He et al. (2015), by fan-out, those
    of norms at 1, and biases at 0.

    Attributes:
        depth: 8, 18 or 50.
        width: channels of the first stage (a quarter of its outputs at depth 50); None: 16 at depth 8, else 64.
        norm: ``batch``, ``group``, ``dual`` (separate clean and adversarial batch norm) or ``none``.
        activation: ``silu``, ``relu`` or ``leaky_relu``.
    """

    depth: int = 18
    width: int | None = None
    norm: Norm = "batch"
    activation: Activation = "relu"

    cites: ClassVar[tuple[str, ...]] = ("he2016",)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.depth not in LAYOUTS:
            raise UserError(f"depth is one of {', '.join(map(str, LAYOUTS))}, got {self.depth}")
        if self.width is not None and self.width < 1:
            raise UserError(f"width must be at least 1, got {self.width}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is at least 8."""
        check_size("resnet", size)
        width, counts, expansion = LAYOUTS[self.depth]
        width = width if self.width is None else self.width
        widths = [expansion * width * 2**i for i in range(len(counts))]

        def block(inputs: int, outputs: int, stride: int) -> nn.Module:
            return PostActivated(inputs, outputs, stride, expansion, self.norm, self.activation)

        stem = nn.Sequential(
            conv2d(channels, width, 3, 1, self.norm), norm2d(self.norm, width), ACTIVATIONS[self.activation]()
        )
        return Staged(stem, stages(block, width, widths, counts), nn.Identity()), widths[-1]


@dataclass(frozen=True)
class PreActResNet:
    """Pre-activation residual network of depth 18, He et al. (2016b), with a stem for small images.

    Four stages of two blocks, then a norm and an activation before pooling; each stage but the first doubles the width
    and halves the size.  Where the shape changes, the shortcut is a 1x1 convolution, without norm, of the activated
    input.  Convolutions have biases exactly when ``norm`` is ``none``.  Weights begin as in He et al. (2015), by
    fan-out, those of norms at 1, and biases at 0.

    Attributes:
        width: channels of the first stage.
        norm: ``batch``, ``group``, ``dual`` (separate clean and adversarial batch norm) or ``none``.
        activation: ``silu``, ``relu`` or ``leaky_relu``.
    """

    width: int = 64
    norm: Norm = "batch"
    activation: Activation = "relu"

    cites: ClassVar[tuple[str, ...]] = ("he2016b",)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.width < 1:
            raise UserError(f"width must be at least 1, got {self.width}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is at least 8."""
        check_size("preact-resnet", size)
        width = self.width
        widths = (width, 2 * width, 4 * width, 8 * width)
        return preactivated(channels, width, widths, 2, self.norm, self.activation), widths[-1]
