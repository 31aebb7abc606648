"""Calibration of confidences: calibration errors, proper scoring rules, temperature scaling."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

import torch
from torch import Tensor

from advebm import energies
from advebm.core import checks
from advebm.core.errors import UserError
from advebm.data.sources import Images
from advebm.metrics.base import ProgressCounter, Record, Subject, average
from advebm.metrics.distances import jackknife
from advebm.models.modes import searching

JACKKNIFE_GROUPS = 20
MAX_ABS_LOG_T = 20.0  # log T is searched in [-20, 20]


@dataclass(frozen=True)
class Reliability:
    """Sums over the predictions in each of M equal confidence bins ``(m/M, (m+1)/M]``; sums of batches add up."""

    count: Tensor  # number of predictions, (M,) float64
    confidence: Tensor  # sum of confidences, (M,) float64
    right: Tensor  # number of correct predictions, (M,) float64

    @classmethod
    def of(cls, logits: Tensor, y: Tensor, bins: int) -> "Reliability":
        """Compute the sums from logits (N, K) and labels int64 (N,)."""
        confidence, predicted = logits.double().softmax(1).max(1)
        index = (confidence * bins).ceil().long().clamp(1, bins) - 1
        sums = lambda values: torch.zeros(bins, dtype=torch.float64, device=index.device).index_add(0, index, values)
        return cls(sums(torch.ones_like(confidence)), sums(confidence), sums((predicted == y).double()))

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(self.count + other.count, self.confidence + other.confidence, self.right + other.right)

    @property
    def gaps(self) -> Tensor:
        """|accuracy - mean confidence| of each bin, 0 for empty bins, (M,)."""
        return (self.right - self.confidence).abs() / self.count.clamp_min(1)

    def expected_error(self) -> float:
        """Return the ECE: the mean gap, weighted by the share of predictions in each bin, Guo et al. (2017)."""
        return (self.gaps * self.count).sum().item() / self.count.sum().item()

    def maximum_error(self) -> float:
        """Return the MCE: the largest gap of any bin, however few predictions it contains, Guo et al. (2017)."""
        return self.gaps.max().item()

    def series(self) -> dict[str, list[float]]:
        """Return lower edge, mean confidence, accuracy and share of all predictions of each non-empty bin."""
        filled = self.count.nonzero().squeeze(1)
        n = self.count[filled]
        return {
            "lower": (filled / len(self.count)).tolist(),
            "confidence": (self.confidence[filled] / n).tolist(),
            "accuracy": (self.right[filled] / n).tolist(),
            "share": (n / self.count.sum()).tolist(),
        }


def negative_log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``-log p(y|x)`` in nats; (N, K), (N,) -> (N,) float64."""
    return energies.conditional(logits.double(), y)


def brier(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``Σ_k (p(k|x) - [k = y])²``, in [0, 2], Brier (1950); (N, K), (N,) -> (N,) float64."""
    p = logits.double().softmax(1)
    return p.square().sum(1) - 2 * p.gather(1, y[:, None]).squeeze(1) + 1


def fit_temperature(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Fit temperature scaling, Guo et al. (2017): return T and its standard error.

    T minimises the mean negative log-likelihood of ``softmax(f / T)`` for logits f (N, K) and labels (N,).  Bisection
    on log T finds the root of its derivative with respect to 1/T, the mean of ``E_p[f] - f_y``, which never decreases
    in 1/T.  The standard error is that of an M-estimator: it does not assume that the model is correct.

    Raises:
        UserError: no finite T > 0 is optimal, because every image is classified correctly (T -> 0) or the labels'
            logits are on average not above the mean logit (T -> ∞).
    """
    z = logits.double()
    z_y = z.gather(1, y[:, None]).squeeze(1)
    if not z.mean(1).mean() < z_y.mean() < z.amax(1).mean():
        why = "the labels' logits are on average not above the mean logit"
        if (z.argmax(1) == y).all():
            why = "every image is classified correctly"
        raise UserError(f"no finite temperature is optimal for these {len(z)} images: {why}")

    def slope(t: float) -> Tensor:
        return ((z / t).softmax(1) * z).sum(1) - z_y  # derivative with respect to 1/T, (N,)

    low, high = -MAX_ABS_LOG_T, MAX_ABS_LOG_T
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)).mean() < 0 else (middle, high)
    t = math.exp((low + high) / 2)
    p = (z / t).softmax(1)
    curvature = ((p * z.square()).sum(1) - (p * z).sum(1).square()).mean()
    error = slope(t).square().mean().sqrt() / (curvature * math.sqrt(len(z)))
    return t, t**2 * error.item()


@dataclass(frozen=True)
class Calibration:
    """Calibration errors, likelihood and Brier score of a classifier, before and after temperature scaling.

    The temperature is fitted on the validation split and does not change predicted classes.  ECE depends on the number
    of bins and is biased upwards for few images.

    Attributes:
        bins: number of confidence bins, of equal width on [0, 1].
    """

    bins: int = 15

    cites: ClassVar[tuple[str, ...]] = ("guo2017", "brier1950")

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise UserError(f"bins must be at least 1, got {self.bins}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return ``ECE``, ``MCE``, ``NLL``, ``Brier score``; then ``temperature`` and all four after scaling."""
        validation, (logits, y) = _logits(subject, subject.data.val), _logits(subject, subject.split)
        records = self._records(logits, y, "", {"temperature": 1.0})
        try:
            t, error = fit_temperature(*validation)
        except UserError as reason:
            warnings.warn(f"calibration is measured without temperature scaling: {reason}", stacklevel=2)
            return records
        scaled = self._records(logits / t, y, " after temperature scaling", {"temperature": t})
        return [*records, Record("temperature", t, error, len(validation[1]), {"fitted_on": "val"}), *scaled]

    def _records(self, logits: Tensor, y: Tensor, case: str, settings: dict[str, Any]) -> list[Record]:
        whole, groups = Reliability.of(logits, y, self.bins), min(JACKKNIFE_GROUPS, len(y))
        parts = [Reliability.of(logits[g::groups], y[g::groups], self.bins) for g in range(groups)]

        def error(statistic: Callable[[Reliability], float]) -> float:
            return jackknife(lambda subset: statistic(reduce(add, [parts[g] for g in subset])), groups)

        settings = {**settings, "bins": self.bins}
        records = []
        for name, statistic in (("ECE", Reliability.expected_error), ("MCE", Reliability.maximum_error)):
            series = whole.series() if name == "ECE" else {}
            records.append(Record(f"{name}{case}", statistic(whole), error(statistic), len(y), settings, series))
        for name, values in (("NLL", negative_log_likelihood(logits, y)), ("Brier score", brier(logits, y))):
            records.append(Record(f"{name}{case}", *average(values), settings))
        return records


def _logits(subject: Subject, split: Images) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) in float64 and labels (N,) of a split, on the CPU."""
    if not split.labelled:
        raise UserError(f"calibration needs labels, {subject.data.name} has none; choose --metrics without it")
    batches = []
    with searching(subject.model) as f, torch.no_grad(), subject.bar("calibration", len(split)) as tell:
        counted = ProgressCounter(tell).count(f)
        for x, y in subject._replace(split=split).batches():
            batches.append((checks.logits(counted(x), len(x)).cpu().double(), y.cpu()))
    logits, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if logits.shape[1] < 2:
        raise UserError("calibration needs a classifier, the model has one output")
    return logits, y
