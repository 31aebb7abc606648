"""Wide residual networks for small images."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.layers import Activation, Norm, check_size
from advebm.models.resnet import preactivated


@dataclass(frozen=True)
class WideResNet:
    """Wide residual network WRN-``depth``-``widen`` of Zagoruyko & Komodakis (2016), without dropout.

    A 3x3 convolution to 16 channels, three stages of ``(depth - 4) / 6`` pre-activation blocks with 16, 32 and 64 times
    ``widen`` channels, of which the last two halve the size, then a norm and an activation before pooling.  Where the
    shape changes, the shortcut is a 1x1 convolution of the activated input.  Convolutions have biases exactly when
    ``norm`` is ``none``, as in JEM's norm-free network.  Weights begin as in He et al. (2015), by fan-out, those of
    norms at 1, and biases at 0.

    Attributes:
        depth: 6n + 4: 10, 16, 22, 28, 34, ...
        widen: factor on the channels of every stage.
        norm: ``batch``, ``group``, ``dual`` (separate clean and adversarial batch norm) or ``none``.
        activation: ``silu``, ``relu`` or ``leaky_relu``.
    """

    depth: int = 28
    widen: int = 10
    norm: Norm = "batch"
    activation: Activation = "relu"

    cites: ClassVar[tuple[str, ...]] = ("zagoruyko2016",)
    own: ClassVar[tuple[str, ...]] = ("depth",)  # other residual networks count it differently

    def __post_init__(self) -> None:
        check_choices(self)
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(f"depth is 6n + 4, so one of 10, 16, 22, 28, 34, ..., got {self.depth}")
        if self.widen < 1:
            raise UserError(f"widen must be at least 1, got {self.widen}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is at least 8."""
        check_size("wide-resnet", size)
        widths = (16 * self.widen, 32 * self.widen, 64 * self.widen)
        return preactivated(channels, 16, widths, (self.depth - 4) // 6, self.norm, self.activation), widths[-1]
