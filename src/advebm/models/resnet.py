"""Residual networks, with activations after or before the convolutions, and what code bases vary of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.models.layers import ACTIVATIONS, Activation, Norm, Staged, check_size, conv2d, norm2d, stages

# depth -> width of the first stage, blocks of each stage, ratio of a block's outputs to the channels inside it
LAYOUTS: dict[int, tuple[int, tuple[int, ...], int]] = {
    **{6 * n + 2: (16, (n, n, n), 1) for n in (1, 2, 3, 5, 7, 9, 18)},
    18: (64, (2, 2, 2, 2), 1),
    34: (64, (3, 4, 6, 3), 1),
    50: (64, (3, 4, 6, 3), 4),
    101: (64, (3, 4, 23, 3), 4),
    152: (64, (3, 8, 36, 3), 4),
}

Shortcut = Literal["projection", "padding"]


class PostActivated(nn.Module):
    """The residual block ``act(residual(x) + shortcut(x))``, He et al. (2016, fig. 5).

    The residual has two 3x3 convolutions, the first with the stride; with ``expansion`` above 1 a bottleneck of 1x1,
    3x3 and 1x1 with ``widen * outputs / expansion`` channels inside, the stride on the 3x3 (the paper: on the first
    1x1).  Where the shape changes, the shortcut is a 1x1 convolution and a norm, or :class:`Padding`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm: Norm,
        activation: Activation,
        *,
        expansion: int = 1,
        widen: int = 1,
        shortcut: Shortcut = "projection",
    ) -> None:
        super().__init__()
        inner, act = widen * outputs // expansion, ACTIVATIONS[activation]

        def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            return [conv2d(inputs, outputs, kernel, stride, norm), norm2d(norm, outputs)]

        if expansion == 1:
            layers = [*unit(inputs, outputs, 3, stride), act(), *unit(outputs, outputs, 3)]
        else:
            layers = [*unit(inputs, inner, 1), act(), *unit(inner, inner, 3, stride), act(), *unit(inner, outputs, 1)]
        self.residual = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projects = shortcut == "projection"
            self.shortcut = (
                nn.Sequential(*unit(inputs, outputs, 1, stride)) if projects else Padding(inputs, outputs, stride)
            )
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        return self.act(self.residual(x) + self.shortcut(x))


class Padding(nn.Module):
    """The shortcut without parameters of He et al. (2016, option A): pixels are skipped, channels of zeros are added.

    Half of the zeros come before the channels and half behind them, as in the usual code for CIFAR; the paper does not
    say where.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.before = (outputs - inputs) // 2
        self.behind, self.stride = outputs - inputs - self.before, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))


class Variant(NamedTuple):
    """What code bases do differently in networks of pre-activation blocks; the defaults are those of the papers.

    Attributes:
        bare: a shortcut to a new shape takes the block's input as it is, not normalised and activated.
        kernel: size of that shortcut's convolution.
        one_sided: 3x3 convolutions of stride 2 pad their input on the right and at the bottom only.
        late: the second 3x3 convolution of a block has the stride, not the first.
        closing: a norm and an activation follow the last block.
    """

    bare: bool = False
    kernel: int = 1
    one_sided: bool = False
    late: bool = False
    closing: bool = True


class PreActivated(nn.Module):
    """The block ``residual(a) + shortcut`` with ``a = act(norm(x))``, He et al. (2016b, fig. 1b).

    The residual is 3x3 conv with the stride, norm, act, 3x3 conv; the shortcut ``x``, or a 1x1 conv of ``a`` to a new
    shape.  A :class:`Variant` changes details.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Norm, activation: Activation, variant: Variant
    ) -> None:
        super().__init__()
        act, kernel = ACTIVATIONS[activation], variant.kernel
        one_sided = variant.one_sided and stride > 1
        first, second = (1, stride) if variant.late else (stride, 1)
        self.variant = variant
        self.opening = nn.Sequential(norm2d(norm, inputs), act())
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if one_sided else nn.Identity()
        self.residual = nn.Sequential(
            conv2d(inputs, outputs, 3, first, norm, padding=0 if one_sided else 1),
            norm2d(norm, outputs),
            act(),
            conv2d(outputs, outputs, 3, second, norm),
        )
        same = stride == 1 and inputs == outputs
        padding = 0 if one_sided else kernel // 2
        self.shortcut = None if same else conv2d(inputs, outputs, kernel, stride, norm, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        a = self.opening(x)
        y = self.residual(self.pad(a))
        if self.shortcut is None:
            return y + x
        z = x if self.variant.bare else a
        return y + self.shortcut(self.pad(z) if self.variant.kernel > 1 else z)


def preactivated(
    channels: int,
    stem: int,
    widths: tuple[int, ...],
    counts: Sequence[int],
    norm: Norm,
    activation: Activation,
    variant: Variant,
) -> Staged:
    """Build a 3x3 convolution to ``stem`` channels, ``counts`` blocks of each stage, a closing norm and activation."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return PreActivated(inputs, outputs, stride, norm, activation, variant)

    return Staged(
        conv2d(channels, stem, 3, 1, norm),
        stages(block, stem, widths, counts),
        nn.Sequential(norm2d(norm, widths[-1]), ACTIVATIONS[activation]()) if variant.closing else nn.Identity(),
    )


@dataclass(frozen=True)
class ResNet:
    """Residual network of He et al. (2016), activation after the sum, with a stem for small images or for ImageNet.

    Depths 6n + 2 have three stages of n blocks, 18 four of two, 34 four of 3, 4, 6 and 3, 50 as many bottlenecks, 101
    and 152 more in the middle; each stage but the first doubles the width and halves the size.  Convolutions have
    biases exactly when ``norm`` is ``none``.  Weights begin as in He et al. (2015), by fan-out, those of norms at 1,
    and biases at 0.

    Attributes:
        depth: 8, 14, 20, 32, 44, 56, 110, or 18, 34, 50, 101, 152.
        width: channels of the first stage (a quarter of its outputs with bottlenecks); None: 16 at 6n + 2, else 64.
        norm: ``batch``, ``group``, ``dual`` (separate clean and adversarial batch norm) or ``none``.
        activation: ``silu``, ``relu`` or ``leaky_relu``.
        stem: ``cifar``, a 3x3 convolution, or ``imagenet``, a 7x7 convolution and a 3x3 maximum, each of stride 2.
        shortcut: where the shape changes, ``projection``, a 1x1 convolution and a norm, or ``padding``, no parameters:
            every other pixel, and zeros for new channels (option A of the paper, its CIFAR networks).
        widen: factor on the channels inside bottlenecks, Zagoruyko & Komodakis (2016): 2 in wide_resnet50_2.
    """

    depth: int = 18
    width: int | None = None
    norm: Norm = "batch"
    activation: Activation = "relu"
    stem: Literal["cifar", "imagenet"] = "cifar"
    shortcut: Shortcut = "projection"
    widen: int = 1

    cites: ClassVar[tuple[str, ...]] = ("he2016",)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.depth not in LAYOUTS:
            raise UserError(f"depth is one of {', '.join(map(str, sorted(LAYOUTS)))}, got {self.depth}")
        if self.width is not None and self.width < 1:
            raise UserError(f"width must be at least 1, got {self.width}")
        if self.widen < 1:
            raise UserError(f"widen must be at least 1, got {self.widen}")
        if self.widen > 1 and LAYOUTS[self.depth][2] == 1:
            raise UserError(f"widen is for bottlenecks, which depth {self.depth} has none of; width makes it wider")

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is at least 8.

        With the stem for ImageNet it is at least 32.
        """
        imagenet = self.stem == "imagenet"
        check_size("resnet", size, 32 if imagenet else 8)
        width, counts, expansion = LAYOUTS[self.depth]
        width = width if self.width is None else self.width
        widths = [expansion * width * 2**i for i in range(len(counts))]

        def block(inputs: int, outputs: int, stride: int) -> nn.Module:
            return PostActivated(
                inputs,
                outputs,
                stride,
                self.norm,
                self.activation,
                expansion=expansion,
                widen=self.widen,
                shortcut=self.shortcut,
            )

        stem = nn.Sequential(
            conv2d(channels, width, *((7, 2) if imagenet else (3, 1)), self.norm),
            norm2d(self.norm, width),
            ACTIVATIONS[self.activation](),
        )
        if imagenet:
            stem.append(nn.MaxPool2d(3, 2, 1))
        return Staged(stem, stages(block, width, widths, counts), nn.Identity()), widths[-1]


@dataclass(frozen=True)
class PreActResNet:
    """Pre-activation residual network of He et al. (2016b), with a stem for small images.

    Depth 18 has four stages of two blocks, 34 of 3, 4, 6 and 3, then a norm and an activation before pooling; each
    stage but the first doubles the width and halves the size.  Where the shape changes, the shortcut is a 1x1
    convolution, without norm, of the activated input.  Convolutions have biases exactly when ``norm`` is ``none``.
    Weights begin as in He et al. (2015), by fan-out, those of norms at 1, and biases at 0.

    Attributes:
        depth: 18 or 34.
        width: channels of the first stage.
        norm: ``batch``, ``group``, ``dual`` (separate clean and adversarial batch norm) or ``none``.
        activation: ``silu``, ``relu`` or ``leaky_relu``.
        variant: whose function it is.  ``standard`` is the one above (Rice et al., 2020); in ``wong2020``, as
            RobustBench has it, shortcuts take the bare input and neither norm nor activation follows the last block;
            ``fast-adversarial``, the code of Wong et al. (2020), has them; ``pytorch-cifar`` has none and takes the
            activated input; in ``deepmind`` (Rebuffi et al., 2021; Rade & Moosavi-Dezfooli, 2021) shortcuts are 3x3
            convolutions of the bare input, and convolutions of stride 2 pad on the right and at the bottom only.
    """

    depth: int = 18
    width: int = 64
    norm: Norm = "batch"
    activation: Activation = "relu"
    variant: Literal["standard", "wong2020", "fast-adversarial", "pytorch-cifar", "deepmind"] = "standard"

    cites: ClassVar[tuple[str, ...]] = ("he2016b",)
    own: ClassVar[tuple[str, ...]] = ("depth", "variant")  # other residual networks count and vary otherwise
    variants: ClassVar[dict[str, Variant]] = {
        "standard": Variant(),
        "wong2020": Variant(bare=True, closing=False),
        "fast-adversarial": Variant(bare=True),
        "pytorch-cifar": Variant(closing=False),
        "deepmind": Variant(bare=True, kernel=3, one_sided=True),
    }

    def __post_init__(self) -> None:
        check_choices(self)
        if self.depth not in (18, 34):
            raise UserError(f"depth is 18 or 34, got {self.depth}")
        if self.width < 1:
            raise UserError(f"width must be at least 1, got {self.width}")

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``; ``size`` is at least 8."""
        check_size("preact-resnet", size)
        width, counts, variant = self.width, LAYOUTS[self.depth][1], self.variants[self.variant]
        widths = (width, 2 * width, 4 * width, 8 * width)
        return preactivated(channels, width, widths, counts, self.norm, self.activation, variant), widths[-1]
