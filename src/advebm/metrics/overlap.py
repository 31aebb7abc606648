"""Overlap of two sets of features: which items of one lie near items of the other.

Each item is the centre of a ball that reaches to its k-th nearest neighbour in its own set.  Distances are Euclidean,
in float64, a block at a time: memory does not grow with the product of the sets' sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from advebm.core.errors import UserError
from advebm.metrics.distances import check_features

BLOCK = 1024


class Balls(NamedTuple):
    """Balls around the items of a set, each out to the k-th nearest other item; the surface belongs to it."""

    centres: Tensor  # (N, D) float64
    radii: Tensor  # (N,)
    k: int

    @classmethod
    def around(cls, features: Tensor, k: int) -> "Balls":
        """Around features (N, D), N > k."""
        centres = check_features(features)
        if not 0 < k < len(centres):
            raise UserError(f"the {k}-th nearest neighbour takes at least {k + 1} features, got {len(centres)}")
        parts = (torch.cdist(part, centres) for part in centres.split(BLOCK))
        return cls(centres, torch.cat([part.kthvalue(k + 1).values for part in parts]), k)

    def split(self, sizes: list[int]) -> list["Balls"]:
        """The same balls in parts."""
        pairs = zip(self.centres.split(sizes), self.radii.split(sizes), strict=True)
        return [Balls(centres, radii, self.k) for centres, radii in pairs]


def hits(points: Tensor, balls: Balls) -> tuple[Tensor, Tensor]:
    """How many balls hold each point (P,), and how many points each ball holds (N,), int64.

    Over parts of the points the first are joined and the second add; over parts of the balls it is the other way round.
    """
    points = check_features(points)
    if points.shape[1] != balls.centres.shape[1]:
        raise UserError(f"two sets have features of one dimension, got {points.shape[1]} and {balls.centres.shape[1]}")
    of_points, of_balls = [], torch.zeros_like(balls.radii, dtype=torch.int64)
    for part in points.split(BLOCK):
        inside = torch.cdist(part, balls.centres) <= balls.radii
        of_points.append(inside.sum(1))
        of_balls += inside.sum(0)
    return torch.cat(of_points), of_balls


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of fakes in a real image's ball, and of real images in a fake's ball, Kynkäänniemi et al. (2019)."""
    precise, recalled = hits(fake, Balls.around(real, k))[0], hits(real, Balls.around(fake, k))[0]
    return share(precise), share(recalled)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Real images' balls around a fake, over k; and the share of these balls with a fake in them, Naeem et al. (2020).

    Density may exceed 1; for two large sets of one distribution it is 1 on average.
    """
    dense, covered = hits(fake, Balls.around(real, k))
    return dense.double().mean().item() / k, share(covered)


def share(counts: Tensor) -> float:
    """Of counts, how many are not 0."""
    return (counts > 0).double().mean().item()
