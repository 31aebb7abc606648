"""Overlap of two sets of features: which items of one lie near items of the other.

Each item is the centre of a ball that reaches to its k-th nearest neighbour in its own set.  Distances are Euclidean,
in float64, computed in blocks so that memory does not grow with the product of the sets' sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from advebm.core.errors import UserError
from advebm.metrics.distances import check_features

BLOCK = 1024


class Balls(NamedTuple):
    """Closed balls around the items of a set, each with the distance to the k-th nearest other item as radius."""

    centres: Tensor  # (N, D) float64
    radii: Tensor  # (N,)
    k: int

    @classmethod
    def around(cls, features: Tensor, k: int) -> "Balls":
        """Return the balls around features (N, D), N > k."""
        centres = check_features(features)
        if not 0 < k < len(centres):
            raise UserError(f"the {k}-th nearest neighbour takes at least {k + 1} features, got {len(centres)}")
        parts = (torch.cdist(part, centres) for part in centres.split(BLOCK))
        return cls(centres, torch.cat([part.kthvalue(k + 1).values for part in parts]), k)

    def split(self, sizes: list[int]) -> list["Balls"]:
        pairs = zip(self.centres.split(sizes), self.radii.split(sizes), strict=True)
        return [Balls(centres, radii, self.k) for centres, radii in pairs]


def hits(points: Tensor, balls: Balls) -> tuple[Tensor, Tensor]:
    """Count the balls that contain each point (P,), and the points that each ball contains (N,), int64.

    To combine parts of the points, concatenate the first counts and add the second; for parts of the balls, vice versa.
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
    """Return the shares of fakes in any real ball, and of reals in any fake ball, Kynkäänniemi et al. (2019)."""
    precise, recalled = hits(fake, Balls.around(real, k))[0], hits(real, Balls.around(fake, k))[0]
    return share(precise), share(recalled)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Return density (mean number of real balls that contain a fake, over k) and coverage, Naeem et al. (2020).

    Coverage is the share of real balls that contain a fake.  Density may exceed 1; for two large sets of one
    distribution it is 1 on average.
    """
    dense, covered = hits(fake, Balls.around(real, k))
    return dense.double().mean().item() / k, share(covered)


def share(counts: Tensor) -> float:
    """Return the share of counts above 0."""
    return (counts > 0).double().mean().item()
