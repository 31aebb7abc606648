"""AutoAugment's policy for CIFAR-10 (Cubuk et al., 2019), applied to a whole batch on its device.

The operations work on uint8 and reproduce Pillow exactly: its fixed-point coordinates, its single and double
precision, its truncations, except for rounding on a device that has no float64.  Random numbers are first drawn for all
images (:func:`draw_plan`) and then applied (:func:`apply_plan`), so that the result for an image depends only on that
image and its own numbers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advebm.core.errors import UserError
from advebm.core.floats import widen, widest

GREY = 128  # fill value outside the image in shear, translate and rotate, the usual choice for CIFAR
LEVELS = 10  # the paper's grid of magnitudes, 0 ... 9

# The 25 sub-policies found on CIFAR-10 (appendix of Cubuk et al., 2019): (operation, probability, level) twice.
POLICY = (
    (("Invert", 0.1, 7), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 8), ("Equalize", 0.9, 2)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 5), ("Equalize", 0.5, 1)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 7), ("AutoContrast", 0.4, 8)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 3)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 8), ("Equalize", 0.6, 4)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 6)),
    (("AutoContrast", 0.8, 4), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 3)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 2), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 8), ("Invert", 0.1, 3)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
)


class Plan(NamedTuple):
    """The random choices for B images.

    Attributes:
        sub: int64 (B,), the index of the sub-policy in :data:`POLICY`.
        applied: bool (B, 2), whether its first and its second operation are applied.
        sign: (B, 2), -1 or 1; operations without a direction ignore it.
    """

    sub: Tensor
    applied: Tensor
    sign: Tensor


def autoaugment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Apply one random sub-policy to each image, drawn uniformly.  ``x (B, C, H, W)`` in [0, 1] -> same shape and type.

    Raises:
        UserError: images that are neither grey nor RGB.
    """
    return apply_plan(x, draw_plan(len(x), generator))


def draw_plan(count: int, generator: torch.Generator) -> Plan:
    """Draw the random choices for ``count`` images, on the generator's device."""
    device = generator.device
    sub = torch.randint(len(POLICY), (count,), generator=generator, device=device)
    chance = torch.rand(count, 2, generator=generator, device=device, dtype=widest(device))
    sign = 2.0 * widen(torch.randint(2, (count, 2), generator=generator, device=device)) - 1
    return Plan(sub, chance < _tables(device, widest(device))[0][sub], sign)


def apply_plan(x: Tensor, plan: Plan) -> Tensor:
    """Apply a plan to ``x (B, C, H, W)`` in [0, 1], rounded to uint8 once -> same shape and type, multiples of 1/255.

    Each operation is called once for all images that need it as their first or as their second operation.
    """
    check_colours(x)
    pixels = (x * 255).round().to(torch.uint8)
    operation, base, span = (table[plan.sub] for table in _tables(x.device, widest(x.device))[1:])
    operation = torch.where(plan.applied, operation, len(OPERATIONS))
    magnitude = base + plan.sign * span
    for turn, groups in enumerate(group_by_operation(operation, len(OPERATIONS))):
        for (function, *_), members in zip(OPERATIONS.values(), groups, strict=True):
            if len(members):
                pixels[members] = function(pixels[members], magnitude[members, turn])
    return pixels.to(x.dtype) / 255


def color_shape(x: Tensor, generator: torch.Generator) -> Tensor:
    """Apply one of eight changes of colours or shape to each image, all equally likely, Li and Spratling (2023).

    The changes, their chances and ranges are those of the authors' code for CIFAR-10, the operations those of
    AutoAugment here: in their code degrees are whole, shears are about the centre, and what was outside is black.
    ``x (B, C, H, W)`` in [0, 1] -> same shape and type.

    Raises:
        UserError: images that are neither grey nor RGB.
    """
    check_colours(x)
    chance, size, side = torch.rand(3, len(x), generator=generator, device=x.device, dtype=widest(x.device))
    slots, low, span, signed = _color_shape_tables(x.device, widest(x.device))
    chosen = slots[(chance * len(slots)).long()]
    magnitude = low[chosen] + span[chosen] * size
    magnitude = torch.where(signed[chosen] & (side < 0.5), -magnitude, magnitude)
    pixels = (x * 255).round().to(torch.uint8)
    (groups,) = group_by_operation(chosen[:, None], len(COLOR_SHAPE))
    for change, members in zip(COLOR_SHAPE, groups, strict=True):
        if len(members):
            pixels[members] = change.function(pixels[members], magnitude[members])
    return pixels.to(x.dtype) / 255


def check_colours(x: Tensor) -> None:
    """Raise UserError for images that are neither grey nor RGB."""
    if x.shape[1] not in (1, 3):
        raise UserError(f"autoaugment and color-shape take grey or RGB images, 1 or 3 channels, got {x.shape[1]}")


def group_by_operation(chosen: Tensor, operations: int) -> list[Sequence[Tensor]]:
    """Return, for each turn, the indices of the images that take each operation.

    ``chosen (B, turns)`` holds numbers of operations; larger ones stand for none.  The host waits for the device once.
    """
    counts = (chosen[:, :, None] == torch.arange(operations, device=chosen.device)).sum(0).tolist()
    order = chosen.argsort(dim=0, stable=True)
    return [order[: sum(sizes), turn].split(sizes) for turn, sizes in enumerate(counts)]


# --- operations: uint8 (B, C, H, W), C = 1 or 3, and magnitudes (B,) -> uint8 (B, C, H, W) ---


def shear_x(x: Tensor, magnitude: Tensor) -> Tensor:
    """Shear rows: ``out[i, j] = x[i, j + magnitude · i]``, about the upper left corner, so row 0 stays."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(x, (one, zero, zero), (magnitude, one, zero))


def shear_y(x: Tensor, magnitude: Tensor) -> Tensor:
    """Shear columns: ``out[i, j] = x[i + magnitude · j, j]``, about the upper left corner, so column 0 stays."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(x, (one, magnitude, zero), (zero, one, zero))


def translate_x(x: Tensor, magnitude: Tensor) -> Tensor:
    """Shift to the left by ``magnitude`` times the width."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(x, (one, zero, zero), (zero, one, magnitude * x.shape[3]))


def translate_y(x: Tensor, magnitude: Tensor) -> Tensor:
    """Shift upwards by ``magnitude`` times the height."""
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)
    return _affine(x, (one, zero, magnitude * x.shape[2]), (zero, one, zero))


def rotate(x: Tensor, magnitude: Tensor) -> Tensor:
    """Rotate by ``magnitude`` degrees about the centre, counterclockwise."""
    cos, sin = magnitude.deg2rad().cos(), magnitude.deg2rad().sin()
    i, j = x.shape[2] / 2, x.shape[3] / 2
    return _affine(x, (cos, sin, i - cos * i - sin * j), (-sin, cos, j + sin * i - cos * j))


def autocontrast(x: Tensor, magnitude: Tensor) -> Tensor:
    """Stretch each channel to 0 ... 255, truncated as in Pillow; a constant channel stays."""
    del magnitude
    low, high = (widen(f((2, 3), keepdim=True)) for f in (x.amin, x.amax))
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / tensor would round twice
    stretched = (x * scale + -low * scale).to(torch.uint8)
    return torch.where(high > low, stretched, x)


def invert(x: Tensor, magnitude: Tensor) -> Tensor:
    del magnitude
    return 255 - x


def equalize(x: Tensor, magnitude: Tensor) -> Tensor:
    """Flatten each channel's histogram.

    Each level of the result stands for 1/255 of the pixels, not counting the brightest ones; where that is less than
    one pixel, as in a constant channel and in every image of 8x8, nothing changes.
    """
    del magnitude
    index = x.flatten(2).long()
    counts = index.new_zeros(*x.shape[:2], 256).scatter_add_(2, index, torch.ones_like(index))
    brightest = (x == x.amax((2, 3), keepdim=True)).flatten(2).sum(2, keepdim=True)
    step = (index.shape[2] - brightest) // 255
    darker = counts.cumsum(2) - counts
    table = ((darker + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, index), index).to(torch.uint8).view_as(x)


def solarize(x: Tensor, magnitude: Tensor) -> Tensor:
    """Invert the values that are not below the threshold ``magnitude``."""
    return torch.where(x < _per_image(magnitude), x, 255 - x)


def posterize(x: Tensor, magnitude: Tensor) -> Tensor:
    """Keep the ``magnitude`` highest bits, rounded to a whole number of them, 1 ... 8."""
    mask = 256 - 2 ** (8 - magnitude.round().long())
    return x & _per_image(mask).to(torch.uint8)


def contrast(x: Tensor, magnitude: Tensor) -> Tensor:
    """Scale differences from the image's mean luma, rounded to uint8, by ``magnitude``."""
    light = luma(x)
    count = light[0].numel()
    mean = (2 * light.sum((1, 2, 3), dtype=torch.int64) + count) // (2 * count)
    return _blend(_per_image(mean), x, magnitude)


def color(x: Tensor, magnitude: Tensor) -> Tensor:
    """Scale differences from the grey image by ``magnitude``; a grey image stays."""
    return _blend(luma(x), x, magnitude)


def brightness(x: Tensor, magnitude: Tensor) -> Tensor:
    """Scale all values by ``magnitude``."""
    return _blend(torch.zeros_like(x), x, magnitude)


def sharpness(x: Tensor, magnitude: Tensor) -> Tensor:
    """Scale differences from the 3x3 average (the centre counts five times, border pixels stay) by ``magnitude``."""
    wide = x.int()
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]
    wide[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(wide, x, magnitude)


def _affine(x: Tensor, row: tuple[Tensor, Tensor, Tensor], column: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return ``out[i, j] = x[a i + b j + c, d i + e j + f]``, ``row = (a, b, c)``, ``column = (d, e, f)``, each (B,).

    Pixels are squares around their centres, the nearest one is taken, positions outside become :data:`GREY`.
    Coordinates are multiples of 2^-16, as Pillow computes them for images of less than 32,768 pixels a side.
    """
    height, width = x.shape[2:]
    i, j = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)

    def source(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        di, dj, start = ((v * 65536 + 0.5).floor().long()[:, None, None] for v in (a, b, c + a / 2 + b / 2))
        return (di * i + dj * j + start) >> 16

    r, c = source(*row), source(*column)
    inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
    index = torch.where(inside, r * width + c, 0).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return torch.where(inside[:, None], x.flatten(2).gather(2, index).view_as(x), GREY)


def _blend(start: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Return ``start + factor (x - start)``, in float32 and truncated as in Pillow.

    Where Pillow was compiled with fused multiply-add (not on x86-64), its result is 1 less or more for 0.4 % of the
    pairs of uint8 values.
    """
    start = start.float()
    return (start + _per_image(factor).float() * (x.float() - start)).clamp(0, 255).to(torch.uint8)


def luma(x: Tensor) -> Tensor:
    """Return the ITU-R 601-2 luma (B, 1, H, W), rounded to integers in 0 ... 255; a grey image is its own luma."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.int().split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _per_image(value: Tensor) -> Tensor:
    return value[:, None, None, None]


# --- the paper's magnitudes ---


class Operation(NamedTuple):
    """An operation and its magnitudes.

    Attributes:
        function: uint8 (B, C, H, W) and magnitudes (B,) -> uint8 (B, C, H, W).
        lowest: magnitude of level 0.
        highest: magnitude of level 9; those between are evenly spaced.
        mirrored: whether half of the images get ``2 · lowest - magnitude`` instead: the opposite direction, or less
            contrast.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    lowest: float = 0
    highest: float = 0
    mirrored: bool = False


OPERATIONS = {
    "ShearX": Operation(shear_x, 0, 0.3, mirrored=True),
    "ShearY": Operation(shear_y, 0, 0.3, mirrored=True),
    "TranslateX": Operation(translate_x, 0, 150 / 331, mirrored=True),  # 150 pixels of an ImageNet crop of 331
    "TranslateY": Operation(translate_y, 0, 150 / 331, mirrored=True),
    "Rotate": Operation(rotate, 0, 30, mirrored=True),
    "AutoContrast": Operation(autocontrast),
    "Invert": Operation(invert),
    "Equalize": Operation(equalize),
    "Solarize": Operation(solarize, 256, 0),
    "Posterize": Operation(posterize, 8, 4),
    "Contrast": Operation(contrast, 1, 1.9, mirrored=True),
    "Color": Operation(color, 1, 1.9, mirrored=True),
    "Brightness": Operation(brightness, 1, 1.9, mirrored=True),
    "Sharpness": Operation(sharpness, 1, 1.9, mirrored=True),
}


class Change(NamedTuple):
    """A change of :func:`color_shape`.

    Attributes:
        function: uint8 (B, C, H, W) and magnitudes (B,) -> uint8 (B, C, H, W).
        low, high: smallest and largest magnitude.
        signed: whether half of the magnitudes are negative.
        slots: how often it is among the equally likely ones.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    low: float = 0
    high: float = 0
    signed: bool = False
    slots: int = 2


COLOR_SHAPE = (
    Change(color, 0.1, 1.9),
    Change(brightness, 0.5, 1.9),
    Change(contrast, 0.5, 1.9),
    Change(sharpness, 0.1, 1.9),
    Change(autocontrast),
    Change(equalize),
    Change(shear_x, 0.05, 0.15, signed=True, slots=1),
    Change(shear_y, 0.05, 0.15, signed=True, slots=1),
    Change(rotate, 1, 11, signed=True),
)


@functools.cache  # a copy to the device makes the host wait
def _color_shape_tables(device: torch.device, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the number of the change in each slot, and of each change smallest magnitude, span and whether signed."""
    slots = torch.tensor([i for i, change in enumerate(COLOR_SHAPE) for _ in range(change.slots)], device=device)
    low, high = (
        torch.tensor([getattr(c, end) for c in COLOR_SHAPE], dtype=kind, device=device) for end in ("low", "high")
    )
    return slots, low, high - low, torch.tensor([change.signed for change in COLOR_SHAPE], device=device)


def _terms(name: str, level: int) -> tuple[float, float]:
    """Return base and span of ``magnitude = base + sign · span``."""
    _, lowest, highest, mirrored = OPERATIONS[name]
    span = (highest - lowest) * level / (LEVELS - 1)
    return (lowest, span) if mirrored else (lowest + span, 0)


# The policy as tables (25, 2), indexed by a plan's ``sub``.
_PROBABILITY = torch.tensor([[p for _, p, _ in pair] for pair in POLICY], dtype=torch.float64)
_OPERATION = torch.tensor([[list(OPERATIONS).index(name) for name, _, _ in pair] for pair in POLICY])
_BASE, _SPAN = torch.tensor(
    [[_terms(name, level) for name, _, level in pair] for pair in POLICY], dtype=torch.float64
).unbind(2)


@functools.cache  # a copy to the device makes the host wait
def _tables(device: torch.device, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return probability, operation, and base and span of the magnitude of each sub-policy, (25, 2) each."""
    probability, base, span = (table.to(kind).to(device) for table in (_PROBABILITY, _BASE, _SPAN))
    return probability, _OPERATION.to(device), base, span
