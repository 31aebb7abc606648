"""Edits that restore an image from partial information: inpaint, denoise, upsample."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, pad

from advebm.core.errors import UserError
from advebm.core.rng import rand
from advebm.descent import Constraint, Descent, Energy, hold, means, raw, repeat_pixels
from advebm.edits.base import Edit, Problem, hold_outside
from advebm.energies import Logits
from advebm.samplers.base import geometric


@dataclass(frozen=True)
class Inpaint(Edit):
    """A hole filled so that the whole has low energy; known pixels stay as they are, to the bit.

    Attributes:
        fill: first content of the hole: ``smooth`` (each pixel the mean of its neighbours), ``mean`` (of the known
            pixels, per channel) or ``noise`` (uniform).
    """

    fill: Literal["smooth", "mean", "noise"] = "smooth"

    stride: ClassVar[float] = 0.003

    def make_problem(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        if hole is None:
            raise UserError("inpainting takes a hole: a mask, true or white where pixels are to be made")
        known = ~hole
        average = (x * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
        filling = rand(x, generator) if self.fill == "noise" else average.expand_as(x)
        start = torch.where(hole, filling, x)
        if self.fill == "smooth":
            start = smooth(start, hole)
        return hold_outside(start, hole, self.within(hold(known)))


def smooth(x: Tensor, hole: Tensor) -> Tensor:
    """Fill the hole from means of known pixels at half the size, recursively, then smooth it by 50 sweeps.

    A sweep sets each pixel of the hole to the mean of its 4 neighbours; the result is near the harmonic filling.
    """
    if not hole.any():
        return x
    half = (-(-x.shape[2] // 2), -(-x.shape[3] // 2))
    share = adaptive_avg_pool2d((~hole).to(x.dtype), half)
    coarse = smooth(adaptive_avg_pool2d(x * ~hole, half) / share.clamp_min(1e-12), share == 0)
    x = torch.where(hole, interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False), x)
    for _ in range(50):
        padded = pad(x, (1, 1, 1, 1), mode="replicate")
        rows, columns = padded[..., 1:-1], padded[..., 1:-1, :]
        mean = (rows[..., :-2, :] + rows[..., 2:, :] + columns[..., :-2] + columns[..., 2:]) / 4
        x = torch.where(hole, mean, x)
    return x


@dataclass(frozen=True)
class Denoise(Edit):
    """Noise taken out: by ``gaussian`` noise of deviation σ, the x of least ``λ E(x) + ‖x - b‖² / 2σ²`` for an image b.

    Gradient steps of size σ²/2 converge to ``x = b - λ σ² ∇E(x)``, with the gradient at x: for λ = 1 and the energy of
    clean images the most likely x given b.  The posterior mean (Miyasawa, 1961) is another image, ``b - σ² ∇E(b)`` with
    the energy of noisy images.  ``salt-and-pepper`` noise leaves most pixels unchanged: only pixels that are black or
    white in all channels, and differ from the median of the 3 x 3 pixels around them by more than ``off``, are replaced
    by that median and then moved by unit steps; the others are held fixed.

    Attributes:
        step_size: for gaussian noise a factor on the gradient, None: σ²/2; for salt and pepper as in :class:`Edit`.
        noise: kind of noise.
        sigma: σ, pixels of [0, 1], for gaussian noise.
        prior: λ; 0 leaves the image as it is, with gaussian noise.
        off: threshold of the difference from the median, pixels of [0, 1], for salt and pepper.
    """

    steps: int = 20
    noise: Literal["gaussian", "salt-and-pepper"] = "gaussian"
    sigma: float = 0.1
    prior: float = 4.0
    off: float = 0.2

    cites: ClassVar[tuple[str, ...]] = ("binary-at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0 or not self.prior >= 0 or not 0 <= self.off < 1:
            got = f"{self.sigma}, {self.prior} and {self.off}"
            raise UserError(f"sigma must be > 0, prior >= 0 and off must lie in [0, 1), got {got}")

    def make_problem(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        if self.noise == "gaussian":
            fidelity: Energy = lambda z: (z - x).square().flatten(1).sum(1) / (2 * self.sigma**2)
            return Problem(x, self.within(), x, fidelity=fidelity)
        medians = median(x)
        extreme = ((x == 0) | (x == 1)).all(1, keepdim=True) & ((x - medians).abs().amax(1, keepdim=True) > self.off)
        return hold_outside(torch.where(extreme, medians, x), extreme, self.within(hold(~extreme)))

    def target_energy(self, f: Logits, x: Tensor, y: Tensor | None) -> Energy:
        energy = super().target_energy(f, x, y)
        return lambda z: self.prior * energy(z)

    def descent(self, constraint: Constraint, values: Tensor) -> Descent:
        if self.noise == "gaussian":
            size = self.step_size or self.sigma**2 / 2
            return Descent(self.steps, geometric(size, self.step_decay), raw, constraint)
        return super().descent(constraint, values)


def median(x: Tensor) -> Tensor:
    """Return the median of the 3 x 3 pixels around each pixel, per channel; the border is replicated."""
    neighbours = pad(x, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    return neighbours.flatten(-2).median(-1).values


@dataclass(frozen=True)
class Upsample(Edit):
    """A larger image of low energy whose means over blocks are the small image, within 1e-6.

    Attributes:
        factor: edge length of a block in pixels, and so the enlargement.
    """

    factor: int = 2

    stride: ClassVar[float] = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 2:
            raise UserError(f"factor must be at least 2, got {self.factor}")

    def make_problem(self, x: Tensor, hole: Tensor | None, generator: torch.Generator | None) -> Problem:
        blocks, keep_means = repeat_pixels(x, self.factor), means(self.factor)
        start = keep_means(interpolate(x, scale_factor=self.factor, mode="bicubic", align_corners=False), blocks)
        fixed = lambda z: z + repeat_pixels(x - avg_pool2d(z, self.factor), self.factor)
        return Problem(start, self.within(keep_means), blocks, fixed, share=1 - 1 / self.factor**2)
