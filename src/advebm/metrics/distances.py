"""Fréchet and kernel distances between two sets of features, the Inception score of one, and the jackknife; float64."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advebm.core.errors import UserError


def check_features(features: Tensor) -> Tensor:
    """Return features as float64; raise UserError if they are not finite and of shape (N, D)."""
    if features.ndim != 2 or not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features)).sum())
        what = f"shape {tuple(features.shape)}" + f" with {bad} values that are NaN or infinite" * (bad > 0)
        raise UserError(f"features are finite and of shape (N, D), got {what}")
    return features.double()


WIDEST = 16_384  # dimension of features, whose covariance then takes 2 GiB


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features (N, D); those of batches or processes can be added."""

    count: int
    total: Tensor  # (D,) float64
    outer: Tensor  # (D, D) float64

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        f = check_features(features)
        if f.shape[1] > WIDEST:
            raise UserError(
                f"a covariance of {f.shape[1]:,} features takes too much memory, at most {WIDEST:,} are possible; "
                "choose features of a network, not pixels"
            )
        return cls(len(f), f.sum(0), f.T @ f)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance, (D, D), with divisor N - 1."""
        return (self.outer - torch.outer(self.total, self.total) / self.count) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return ``‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½)``, Heusel et al. (2017).

    The trace of the matrix root is computed as the sum of the square roots of the eigenvalues of ``Lᵀ Σ_b L``, where
    ``L Lᵀ = Σ_a``; this matrix is symmetric, so no imaginary parts arise.  Only in Inception features is the distance
    called FID.  It is biased upwards for few samples; with no more samples than dimensions it means little by itself.
    """
    if min(a.count, b.count) < 2 or a.mean.shape != b.mean.shape:
        sizes = f"{a.count} x {len(a.total)} and {b.count} x {len(b.total)}"
        raise UserError(f"a Fréchet distance takes two sets of at least 2 features of one dimension, got {sizes}")
    cov_a, cov_b = a.covariance, b.covariance
    try:
        root = torch.linalg.cholesky(cov_a)
    except torch.linalg.LinAlgError:  # fewer samples than dimensions
        values, vectors = torch.linalg.eigh(cov_a)
        root = vectors * values.clamp_min(0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp_min(0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return KID: the unbiased squared MMD, kernel ``(x·y / D + 1)³``, Bińkowski et al. (2018).  May be negative."""
    return RealFeatures(b).kernel(a)


def unbiased_mmd(m: int, aa: float, n: int, bb: float, ab: float) -> float:
    """Combine kernel sums: ``aa`` and ``bb`` over pairs of different items of one set, ``ab`` over all across."""
    return aa / (m * (m - 1)) + bb / (n * (n - 1)) - 2 * ab / (m * n)


def kernel_sum(a: Tensor, b: Tensor, *, block: int = 2048) -> float:
    """Return ``Σ_ij (a_i·b_j / D + 1)³`` in float64, ``block`` rows at a time to limit memory."""
    b = b.double()
    return sum(((part.double() @ b.T / b.shape[1] + 1) ** 3).sum().item() for part in a.split(block))


def kernel_pairs(a: Tensor) -> float:
    """Return the kernel's sum over ordered pairs of different items of one set."""
    return kernel_sum(a, a) - ((a.double().square().sum(1) / a.shape[1] + 1) ** 3).sum().item()


class RealFeatures:
    """Features (N, D) of real images to compare samples with; what depends on them alone is computed once."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    @functools.cached_property
    def moments(self) -> Moments:
        return Moments.of(self.features)

    @functools.cached_property
    def pairs(self) -> float:
        """The kernel summed over ordered pairs of different images."""
        return kernel_pairs(self.features)

    def frechet(self, samples: Tensor) -> float:
        return frechet_distance(Moments.of(samples), self.moments)

    def kernel(self, samples: Tensor) -> float:
        a, b = check_features(samples), check_features(self.features)
        if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
            sizes = f"{len(a)} x {a.shape[1]} and {len(b)} x {b.shape[1]}"
            raise UserError(f"a kernel distance takes two sets of at least 2 features of one dimension, got {sizes}")
        return unbiased_mmd(len(a), kernel_pairs(a), len(b), self.pairs, kernel_sum(a, b))


def inception_score(logits: Tensor, splits: int = 10, generator: torch.Generator | None = None) -> tuple[float, float]:
    """Return mean and standard deviation over splits of ``exp E_x KL(p(y|x) ‖ p(y))``, Salimans et al. (2016).

    The score lies between 1 and K.  The deviation (divisor: number of splits) is what papers print behind ±; it is not
    a standard error.

    Args:
        logits: (N, K).
        splits: number of equal parts of the images, each with its own p(y).
        generator: shuffles the images.  None: they are split in the given order, which must be random.
    """
    logits = check_features(logits)
    if not 1 <= splits <= len(logits):
        raise UserError(f"a score in {splits} splits takes at least as many images, got {len(logits)}")
    if logits.shape[1] == 1:
        warnings.warn("the score is 1 whatever the images are: the classifier has one class", stacklevel=2)
    if generator is not None:
        logits = logits[torch.randperm(len(logits), generator=generator, device=generator.device).to(logits.device)]
    ends = [i * len(logits) // splits for i in range(1, splits)]
    scores = torch.stack([_split_score(part) for part in logits.log_softmax(1).tensor_split(ends)])
    return scores.mean().item(), scores.std(correction=0).item()


def _split_score(log_p: Tensor) -> Tensor:
    """Return the score of one split from log-probabilities (N, K), which do not underflow."""
    log_q = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().exp()


def jackknife(statistic: Callable[[Sequence[int]], float], groups: int) -> float:
    """Return the jackknife standard error ``√((g-1)/g Σ (θ_i - θ̄)²)``, leaving out one of g equal groups at a time.

    ``statistic(subset)`` computes θ from the groups whose indices it is given.
    """
    estimates = torch.tensor([statistic([g for g in range(groups) if g != out]) for out in range(groups)])
    return ((groups - 1) * estimates.double().var(correction=0)).sqrt().item()
