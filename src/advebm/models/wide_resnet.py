"""Wide residual networks for small images."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.layers import Activation, Norm, check_size
from advebm.models.resnet import Variant, preactivated


@dataclass(frozen=True)
class WideResNet:
    """Wide residual network WRN-``depth``-``widen`` of Zagoruyko & Komodakis (2016), without dropout.

    A 3x3 convolution to 16 channels, three stages of ``(depth - 4) / 6`` pre-activation blocks with 16, 32 and 64 times
    ``widen`` channels, of which the last two halve the size, then a norm and an activation before pooling.  Where the
    shape changes, the shortcut is a 1x1 convolution of the activated input.  Convolutions have biases exactly when
    ``norm`` is ``none``.  Weights begin as in He et al. (2015), by fan-out, those of norms at 1, and biases at 0.

    Attributes:
        depth: 6n + 4: 10, 16, 22, 28, 34, ...
        widen: factor on the channels of every stage.
        norm: ``batch``, ``group``, ``dual`` (separate clean and adversarial batch norm) or ``none``.
        activation: ``silu``, ``relu`` or ``leaky_relu``.
        variant: whose function it is.  In ``deepmind``, Gowal et al. (2020), with SiLU, 3x3 convolutions of stride 2
            pad on the right and at the bottom only.  In ``jem``, Grathwohl et al. (2020), with no norm and leaky ReLU,
            the shortcut takes the bare input and the second 3x3 convolution of a block has the stride.
    """

    depth: int = 28
    widen: int = 10
    norm: Norm = "batch"
    activation: Activation = "relu"
    variant: Literal["standard", "deepmind", "jem"] = "standard"

    cites: ClassVar[tuple[str, ...]] = ("zagoruyko2016",)
    own: ClassVar[tuple[str, ...]] = ("depth", "widen", "variant")  # they mean others in other residual networks
    variants: ClassVar[dict[str, Variant]] = {
        "standard": Variant(),
        "deepmind": Variant(one_sided=True),
        "jem": Variant(bare=True, late=True),
    }

    def __post_init__(self) -> None:
        check_choices(self)
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(f"depth is 6n + 4, so one of 10, 16, 22, 28, 34, ..., got {self.depth}")
        if self.widen < 1:
            raise UserError(f"widen must be at least 1, got {self.widen}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is at least 8.

        That of DeepMind's is a multiple of 4: an odd size is halved to another one by its shortcuts.
        """
        check_size("wide-resnet", size)
        variant, count = self.variants[self.variant], (self.depth - 4) // 6
        if variant.one_sided and size % 4:
            raise UserError(f"variant deepmind takes images of 8, 12, 16, … pixels, got {size}")
        widths = (16 * self.widen, 32 * self.widen, 64 * self.widen)
        return preactivated(channels, 16, widths, (count,) * 3, self.norm, self.activation, variant), widths[-1]
