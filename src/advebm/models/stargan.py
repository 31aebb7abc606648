"""The critic of Binary-AT at 64 to 256 pixels: the discriminator of StarGAN v2 without its head."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.layers import ACTIVATIONS, Activation, Staged, conv2d


class Down(nn.Module):
    """The residual block ``(residual(x) + shortcut(x)) / √2`` at half the size, with activations first and no norm.

    The residual is activation, 3x3 convolution, 2x2 mean, activation, 3x3 convolution.  The shortcut is a 1x1
    convolution without bias where the number of channels changes, then a 2x2 mean.
    """

    def __init__(self, inputs: int, outputs: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            act(), conv2d(inputs, inputs, 3, 1, "none"), nn.AvgPool2d(2), act(), conv2d(inputs, outputs, 3, 1, "none")
        )
        self.shortcut = nn.Identity() if inputs == outputs else conv2d(inputs, outputs, 1, 1, "batch")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / 2, W / 2)``."""
        return (avg_pool2d(self.shortcut(x), 2) + self.residual(x)) / math.sqrt(2)


@dataclass(frozen=True)
class StarGAN:
    """The discriminator of StarGAN v2 (Choi et al., 2020), as Yin et al. (2022) use it at 64 and 256 pixels.

    A 3x3 convolution to ``2^14 / size`` channels; blocks down to 4x4 that halve the size and double the channels up to
    ``widest``; an activation, a 4x4 convolution to 1x1, an activation.  Weights begin as in He et al. (2015), by
    fan-in, biases at 0.

    Attributes:
        widest: largest number of channels.
        width: channels after the first convolution; None: ``2^14 / size``, at most ``widest``.
        activation: ``leaky_relu`` (of slope 0.2), ``relu`` or ``silu``.
    """

    widest: int = 512
    width: int | None = None
    activation: Activation = "leaky_relu"

    cites: ClassVar[tuple[str, ...]] = ("choi2020", "binary-at")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.widest < 1 or (self.width is not None and not 1 <= self.width <= self.widest):
            raise UserError(
                f"widest must be at least 1 and width at most that or none, got {self.widest} and {self.width}"
            )

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is 8, 16, …, 1024."""
        if not 8 <= size <= 1024 or size & (size - 1):
            raise UserError(f"stargan takes images of 8, 16, …, 1024 pixels, got {size}")
        act = ACTIVATIONS[self.activation]
        width = min(2**14 // size, self.widest) if self.width is None else self.width
        stem, stages = conv2d(channels, width, 3, 1, "none"), []
        while size > 4:
            outputs = min(2 * width, self.widest)
            stages.append(Down(width, outputs, act))
            width, size = outputs, size // 2
        module = Staged(stem, stages, nn.Sequential(act(), nn.Conv2d(width, width, 4), act()))
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        return module, width
