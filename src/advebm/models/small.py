"""A small convolutional network for images of 8, 16 or 32 pixels."""

from dataclasses import dataclass

import torch
from torch import nn

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.layers import ACTIVATIONS, Activation, Norm, norm2d


@dataclass(frozen=True)
class SmallConv:
    """Two 3x3 convolutions at full size, then pairs of a stride-2 and a 3x3 convolution down to 4x4.

    Each halving doubles the width.  The head sees the 4x4 grid rather than its mean, since drawing a stroke depends on
    where it lies.  SiLU is the default, since a smooth energy has smooth input gradients.

    Attributes:
        width: channels of the first convolutions.
        features: size of a linear layer before the head; None: the head gets the flattened grid.
        norm: ``batch``, ``group``, ``dual`` (separate clean and adversarial batch norm) or ``none``.
        activation: ``silu``, ``relu`` or ``leaky_relu``.
    """

    width: int = 24
    features: int | None = None
    norm: Norm = "batch"
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.width, self.features or 1) < 1:
            raise UserError(f"width and features must be at least 1, got {self.width} and {self.features}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is 8, 16 or 32."""
        if size not in (8, 16, 32):
            raise UserError(f"small-conv takes images of 8, 16 or 32 pixels, got {size}")

        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=self.norm == "none")
            return [conv, norm2d(self.norm, outputs), ACTIVATIONS[self.activation]()]

        width, layers = self.width, [*block(channels, self.width), *block(self.width, self.width)]
        while size > 4:
            layers += [*block(width, 2 * width, stride=2), *block(2 * width, 2 * width)]
            width, size = 2 * width, size // 2
        layers, outputs = [*layers, nn.Flatten()], width * size * size
        if self.features is not None:
            layers += [nn.Linear(outputs, self.features), ACTIVATIONS[self.activation]()]
            outputs = self.features
        module = nn.Sequential(*layers)
        return module.to(memory_format=torch.channels_last), outputs  # type: ignore[call-overload]
