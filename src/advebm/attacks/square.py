"""Square attack: random search without gradients, Andriushchenko et al. (2020)."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advebm.attacks.base import Adversary, AttackRun, ball_text, check_radius, margin
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.descent import per_sample
from advebm.energies import Logits

FIRST_SHARE = 0.8  # share of the pixels that the first square covers: p of the paper, as AutoAttack sets it
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which that share is halved


@dataclass(frozen=True)
class Square(Adversary):
    """The square attack on the margin, Andriushchenko et al. (2020): it sees outputs, never gradients.

    Each query changes a square (with l2, a pair of squares) at a random place, the same for all points of a batch, and
    keeps the change where it raises :func:`advebm.attacks.base.margin`; it stops at a point once that is misclassified.

    Attributes:
        eps: radius, for pixel values in [0, 1].
        norm: ``linf`` or ``l2``.
        queries: forward passes per image.
    """

    eps: float = 8 / 255
    norm: Literal["linf", "l2"] = "linf"
    queries: int = 5000

    cites: ClassVar[tuple[str, ...]] = ("andriushchenko2020",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_radius(self.eps, self.norm)
        if self.queries < 1:
            raise UserError(f"queries must be at least 1, got {self.queries}")

    @property
    def name(self) -> str:
        """Return the name used in tables, such as ``Square 5000 linf 8/255``."""
        return f"Square {self.queries} {ball_text(self.eps, self.norm)}"

    def runs(self, classes: int) -> list[AttackRun]:
        return [AttackRun("Square", self._search, self.queries)]

    @torch.no_grad()
    def _search(self, f: Logits, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return misclassified points where the run found them, else the points of the largest margin."""
        x_adv, rows = x.clone(), torch.arange(len(x), device=x.device)
        start, propose = (_stripes, _square) if self.norm == "linf" else (_tiles, _two_windows)
        origin, label, best = x, y, start(x, self.eps, generator)
        value = margin(f(best), label)
        for query in range(self.queries):
            misclassified = value > 0
            if misclassified.any():
                x_adv[rows[misclassified]] = best[misclassified]
                rows, origin, label, best, value = (v[~misclassified] for v in (rows, origin, label, best, value))
                if len(rows) == 0:
                    return x_adv
            if query == self.queries - 1:
                break  # the start was the first query
            share = FIRST_SHARE / 2 ** bisect_left(HALVINGS, query)
            candidate = propose(best, origin, share, self.eps, generator)
            new = margin(f(candidate), label)
            better = new > value
            value = torch.where(better, new, value)
            best = torch.where(per_sample(better, best), candidate, best)
        x_adv[rows] = best
        return x_adv


def side(share: float, size: int) -> int:
    """Return the side, in pixels, of a square that covers ``share`` of ``size`` x ``size`` pixels; at least 1."""
    return min(max(round(math.sqrt(share) * size), 1), size)


def _random_window(size: int, shape: torch.Size, generator: torch.Generator) -> tuple[slice, slice]:
    """Draw a window of ``size`` x ``size`` pixels anywhere within the image; return its row and column slices."""
    draw = lambda n: torch.randint(0, n - size + 1, (), generator=generator, device=generator.device)
    corner = torch.stack([draw(n) for n in shape[2:]]).tolist()  # read together: the host waits once
    return slice(corner[0], corner[0] + size), slice(corner[1], corner[1] + size)


def _random_signs(*shape: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=generator, device=like.device).to(like.dtype) - 1


def _stripes(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Add vertical stripes of plus or minus eps, with a random sign for each image, channel and column."""
    b, c, _, w = x.shape
    return (x + eps * _random_signs(b, c, 1, w, like=x, generator=generator)).clamp(0, 1)


def _square(best: Tensor, origin: Tensor, share: float, eps: float, generator: torch.Generator) -> Tensor:
    """Set all pixels of a random square to the original values plus or minus eps, one sign per channel."""
    h, w = _random_window(side(share, min(best.shape[2:])), best.shape, generator)
    signs = _random_signs(best.shape[1], 1, 1, like=best, generator=generator)
    candidate = best.clone()
    candidate[:, :, h, w] = (origin[:, :, h, w] + eps * signs).clamp(0, 1)
    return candidate


def _tiles(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Add a grid of bumps with random signs, of total l2 norm eps; five by five, more on small or oblong images."""
    b, c, height, width = x.shape
    size = max(min(height, width) // 5, 1)
    delta = torch.zeros_like(x)
    for i in range(0, height - size + 1, size):
        for j in range(0, width - size + 1, size):
            signs = _random_signs(b, c, 1, 1, like=x, generator=generator)
            delta[:, :, i : i + size, j : j + size] = bump(size, generator).to(x) * signs
    return _rescale_and_clip(x, delta, eps)


def _two_windows(best: Tensor, origin: Tensor, share: float, eps: float, generator: torch.Generator) -> Tensor:
    """Erase one window and spend its norm, and what clipping left unused, on a bump added in another window."""
    size = max(side(share, min(best.shape[2:])), 3)
    size = min(size + 1 - size % 2, *best.shape[2:])
    delta = best - origin
    h, w = _random_window(size, best.shape, generator)
    h2, w2 = _random_window(size, best.shape, generator)
    both = torch.zeros_like(delta[:1, :1], dtype=torch.bool)
    both[:, :, h, w] = both[:, :, h2, w2] = True
    norm = lambda v: v.flatten(2).norm(dim=2)[:, :, None, None]
    available = norm(delta * both) ** 2
    unused = (eps**2 - delta.flatten(1).square().sum(1)).clamp_min(0)[:, None, None, None] / delta.shape[1]
    old = delta[:, :, h, w]
    new = bump(size, generator).to(best) * _random_signs(*delta.shape[:2], 1, 1, like=best, generator=generator)
    new = new + old / norm(old).clamp_min(1e-12)
    new = new / norm(new).clamp_min(1e-12) * (available + unused).sqrt()
    delta[:, :, h2, w2] = 0
    delta[:, :, h, w] = new
    return _rescale_and_clip(origin, delta, eps)


def _rescale_and_clip(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    length = per_sample(delta.flatten(1).norm(dim=1).clamp_min(1e-12), x)
    return (x + eps * delta / length).clamp(0, 1)


def bump(size: int, generator: torch.Generator) -> Tensor:
    """Return a pattern (``size``, ``size``) of l2 norm 1: a positive pyramid above a negative one, or beside it.

    A pyramid falls off from its centre with the Chebyshev distance d ≤ M as ``Σ_{m = d}^{M} 1 / (m + 1)²``.
    """
    half = size // 2
    pattern = torch.cat([_pyramid(half, size), -_pyramid(size - half, size)])
    pattern = pattern / pattern.norm()
    return pattern.T if torch.rand((), generator=generator, device=generator.device) > 0.5 else pattern


def _pyramid(height: int, width: int) -> Tensor:
    if height == 0:
        return torch.zeros(0, width)
    rows, columns = (torch.arange(n) - n // 2 for n in (height, width))
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    terms = 1 / torch.arange(1, max(height // 2, width // 2) + 2).double() ** 2
    tails = terms.flip(0).cumsum(0).flip(0)
    pyramid = tails[distance.clamp_max(len(tails) - 1)].float()
    return pyramid / pyramid.norm()
