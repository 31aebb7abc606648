"""Out-of-distribution (OOD) detection: scores, and how well they separate two sets, clean and under attack.

Convention: a higher score means more out of distribution, and out of distribution is the positive class.  The
literature often uses the opposite; functions with both options say which is meant.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from advebm import energies
from advebm.attacks.apgd import ascend
from advebm.attacks.base import ball_text, check_radius
from advebm.attacks.projected import Attack
from advebm.core import config, rng
from advebm.core.errors import UserError
from advebm.core.floats import widen
from advebm.data import ood_sets
from advebm.data.ood_sets import ClassGaussianNoise, GaussianNoise, Outlier, UniformNoise
from advebm.descent import value_and_gradient
from advebm.energies import Logits
from advebm.metrics.base import ProgressCounter, Record, Subject
from advebm.metrics.distances import jackknife
from advebm.models.inference import faster_model
from advebm.models.modes import searching

BINS = 40  # number of bins of the histograms in records
GROUPS = 20  # of the jackknife
MORE = 4  # outliers for each image of the data, at most

# Scores: network and images -> (B,), widened, high = more out of distribution -----------------------------------------


class Score(Protocol):
    """A frozen dataclass that scores images, differentiably, so that gradient attacks can lower the score."""

    @property
    def name(self) -> str:
        """Return the name of the score as tables and records write it."""

    @property
    def classes(self) -> bool:
        """Whether the score needs a classifier, rather than a critic (one output)."""

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        """Return scores (B,) of images (B, C, H, W), with ``f`` giving logits (B, K), or (B,) for a critic.

        They are float64, or float32 on a device that has no float64.
        """


@dataclass(frozen=True)
class EnergyScore:
    """``E(x) = -log Σ_k exp f_k(x)``, Liu et al. (2020); of a critic ``-f(x)``.

    After binary adversarial training f separates data from the rest and is no log-density: only its ranking counts.
    """

    name = "energy"
    classes = False
    cites: ClassVar[tuple[str, ...]] = ("liu2020",)

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        return energies.marginal(_outputs(f, x))


@dataclass(frozen=True)
class MaxSoftmax:
    """``log (1 - p) / p`` of the confidence ``p = max_k p(k|x)``, Hendrycks and Gimpel (2017).

    It ranks images as ``1 - p`` does, but still separates two confidences that both round to 1.
    """

    name = "max-softmax"
    classes = True
    cites: ClassVar[tuple[str, ...]] = ("hendrycks2017",)

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        return _log_odds(_outputs(f, x))


@dataclass(frozen=True)
class MaxLogit:
    """``-max_k f_k(x)``, Hendrycks et al. (2022); of a critic ``-f(x)``."""

    name = "max-logit"
    classes = False
    cites: ClassVar[tuple[str, ...]] = ("hendrycks2022",)

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        return -_outputs(f, x).amax(1)


@dataclass(frozen=True)
class ODIN:
    """:class:`MaxSoftmax` at a temperature, after a sign step that raises the confidence, Liang et al. (2018).

    The defaults are not tuned on any set of outliers.  As in the paper, the step is not clamped to [0, 1].

    Attributes:
        temperature: divisor of the logits.
        step: step size, in pixels of [0, 1].
    """

    temperature: float = 1000.0
    step: float = 0.0014

    classes = True
    cites: ClassVar[tuple[str, ...]] = ("liang2018",)

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.step >= 0):
            raise UserError(f"temperature must be > 0 and step >= 0, got {self.temperature} and {self.step}")

    @property
    def name(self) -> str:
        return f"odin T {self.temperature:g} step {self.step:g}"

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        log_odds = lambda x: _log_odds(_outputs(f, x) / self.temperature)
        _, gradient = value_and_gradient(log_odds, x)
        return log_odds(x - self.step * gradient.sign())


def _outputs(f: Logits, x: Tensor) -> Tensor:
    """Return outputs (B, K), or (B, 1) of a critic, widened, since ODIN divides logits by 1000."""
    return widen(f(x)).reshape(len(x), -1)


def _log_odds(logits: Tensor) -> Tensor:
    """Return the log-odds against the most likely class, in nats; (B, K) -> (B,)."""
    if logits.shape[1] < 2:
        raise UserError("this score needs a classifier, the model has one output; use energy or max-logit")
    top, most_likely = logits.max(1)
    return logits.scatter(1, most_likely[:, None], -torch.inf).logsumexp(1) - top


# Two sets of scores -> how well they are separated; float64, ties count half -----------------------------------------


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def auroc(inside: Tensor, outside: Tensor) -> Estimate:
    """Return the probability that an outlier in ``outside (M,)`` scores above an image of the data in ``inside (N,)``.

    The standard error is that of DeLong et al. (1988).
    """
    inside, outside = _check_scores(inside, outside)
    below_outside, below_inside = _share_below(outside, inside), _share_below(inside, outside)
    variance = below_outside.var() / len(outside) + below_inside.var() / len(inside)
    return Estimate(below_outside.mean().item(), variance.sqrt().item())


def aupr(inside: Tensor, outside: Tensor, *, positive: Literal["ood", "id"] = "ood") -> Estimate:
    """Return the average precision with outliers (``ood``) or data (``id``) as positives; chance is their share.

    The standard error is a jackknife estimate over groups of both sets.
    """
    return _jackknife_estimate(_average_precision, *_check_scores(inside, outside), positive)


def fpr95(inside: Tensor, outside: Tensor, *, recall: Literal["ood", "id"]) -> Estimate:
    """Return the false-positive rate at 95 % recall of the outliers or of the data.

    ``recall="ood"``: the share of the data at or above the threshold that 95 % of the outliers reach.  ``recall="id"``:
    the share of the outliers at or below the threshold that 95 % of the data do not exceed.  Both are called FPR95 in
    the literature, the second more often.  The standard error is a jackknife estimate over groups of both sets, so it
    includes the uncertainty of the threshold.
    """
    return _jackknife_estimate(_false_positives, *_check_scores(inside, outside), recall)


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Return for each score the share of ``others`` below it; ties count half."""
    others = others.sort().values
    places = torch.searchsorted(others, scores) + torch.searchsorted(others, scores, right=True)
    return places.double() / (2 * len(others))


def _average_precision(positive: Tensor, negative: Tensor) -> float:
    """Return ``Σ_t (R_t - R_{t-1}) P_t`` over the distinct positive scores t, highest first; no interpolation."""
    thresholds, counts = positive.unique(return_counts=True)
    at_least = lambda scores: (len(scores) - torch.searchsorted(scores.sort().values, thresholds)).double()
    true_positives, false_positives = at_least(positive), at_least(negative)
    return (counts * true_positives / (true_positives + false_positives)).sum().item() / len(positive)


def _false_positives(positive: Tensor, negative: Tensor) -> float:
    """Return the share of negatives at or above the highest threshold that 95 % of the positives reach."""
    needed = math.ceil(19 * len(positive) / 20)
    threshold = positive.sort(descending=True).values[needed - 1]
    return (negative >= threshold).double().mean().item()


def _jackknife_estimate(
    statistic: Callable[[Tensor, Tensor], float], inside: Tensor, outside: Tensor, positive: Literal["ood", "id"]
) -> Estimate:
    pair = (outside, inside) if positive == "ood" else (-inside, -outside)
    groups = min(GROUPS, *map(len, pair))

    def statistic_of(subset: Sequence[int]) -> float:
        return statistic(*(s[torch.isin(torch.arange(len(s)) % groups, torch.tensor(subset))] for s in pair))

    return Estimate(statistic(*pair), jackknife(statistic_of, groups))


def _check_scores(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    for name, scores in (("in-distribution", inside), ("out-of-distribution", outside)):
        if scores.ndim != 1 or len(scores) < 2 or not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).sum())
            what = f"shape {tuple(scores.shape)}" + f", {bad} of them NaN or infinite" * (bad > 0)
            raise UserError(f"{name} scores must be at least 2 finite numbers (N,), got {what}")
    return inside.cpu().double(), outside.cpu().double()


MEASURES: dict[str, Callable[[Tensor, Tensor], Estimate]] = {
    "AUROC": auroc,
    "AUPR-OOD": partial(aupr, positive="ood"),
    "AUPR-ID": partial(aupr, positive="id"),
    "fpr95_ood_recall": partial(fpr95, recall="ood"),
    "fpr95_id_recall": partial(fpr95, recall="id"),
}


# The metric ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutOfDistribution:
    """How well scores tell the data from other images, as they are and moved so as to look like data.

    The worst case follows Binary-AT's protocol: only the outliers are attacked, by Auto-PGD minimising the score itself
    within a ball; the lowest score over all restarts and the clean image counts.  Published numbers differ in attack,
    split, restarts and score: compare within one protocol only.

    Attributes:
        scores: ``energy``, ``max-softmax``, ``max-logit``, ``odin``; a critic skips those that need a classifier.
        sets: ``uniform``, ``gaussian`` and ``class-gaussian`` noise, and sources such as ``cifar100`` or
            ``folder:PATH``, whose test images are fitted to the data's shape.
        count: maximum number of images of the data, and of each set; a set has at most four times as many as the data,
            since more would cost time and hardly sharpen the result.
        eps: radius in pixels of [0, 1].  None: the threat model's if it has the same norm, else 1 (l2) or 8/255 (linf).
            0: no worst case.
        norm: norm of the ball.
        steps, restarts: settings of Auto-PGD.
    """

    scores: tuple[Score, ...] = (EnergyScore(), MaxSoftmax())
    sets: tuple[Outlier, ...] = (UniformNoise(), GaussianNoise(), ClassGaussianNoise())
    count: int = 1024
    eps: float | None = None
    norm: Literal["l2", "linf"] = "l2"
    steps: int = 100
    restarts: int = 5

    cites: ClassVar[tuple[str, ...]] = ("binary-at", "croce2020reliable", "delong1988")

    def __post_init__(self) -> None:
        config.check_choices(self)
        if not self.scores or not self.sets:
            raise UserError("scores and sets name at least one each, such as energy and uniform")
        if len({score.name for score in self.scores}) < len(self.scores):
            raise UserError(f"scores are named once each, got {', '.join(s.name for s in self.scores)}")
        if self.eps is not None:
            check_radius(self.eps, self.norm)
        if self.count < 2 or min(self.steps, self.restarts) < 1:
            counts = f"{self.count}, {self.steps} and {self.restarts}"
            raise UserError(f"count must be at least 2, steps and restarts at least 1, got {counts}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Return five records, such as ``AUROC energy vs uniform``, for each set and score, clean and worst case."""
        seed, device = generator.initial_seed(), generator.device
        eps = self._radius(subject.threat)
        metric = config.describe(replace(self, eps=eps))
        inside = ood_sets.choose_images(subject.split.x, self.count, generator)
        sets: dict[str, Tensor] = {}
        for outlier in self.sets:
            draws = rng.generator(seed, str(config.describe(outlier)), device=device)
            count = min(self.count, MORE * len(inside))
            name, x = ood_sets.draw_outliers(outlier, subject.data, count, draws)
            if name in sets:
                raise UserError(f"two sets are called {name}; measure them one at a time")
            sets[name] = x
        ball: dict[str, Any] = {"eps": eps, "norm": self.norm, "steps": self.steps, "restarts": self.restarts}
        records = []
        with searching(subject.model) as f:
            fast = faster_model(subject.model, subject.on_device(inside[:2]))
            scores = self._scores(f, subject.on_device(inside[:2]))
            searched = sum(map(len, sets.values())) * self.steps * self.restarts * (eps > 0)
            with subject.bar("detection", len(scores) * max(1, searched)) as tell:
                counter = ProgressCounter(tell)
                for score in scores:
                    inside_scores = _compute_scores(score, f, inside, subject)
                    for name, x in sets.items():
                        about = {"score": score.name, "outliers": name, "metric": metric}
                        cases: dict[str | None, Tensor] = {None: _compute_scores(score, f, x, subject)}
                        if eps > 0:
                            draws = rng.generator(seed, "worst case", name, score.name, device=device)
                            search = counter.count(partial(score, fast), f"{score.name} vs {name}")
                            lowest = [
                                lowest_scores(partial(score, f), part, search=search, generator=draws, **ball)
                                for part in map(subject.on_device, x.split(subject.batch))
                            ]
                            cases[search_name(self.steps, self.restarts, eps, self.norm)] = torch.cat(lowest)
                        records += self._records(inside_scores, cases, about)
                tell(len(scores) * max(1, searched), "")
        return records

    def _scores(self, f: Logits, x: Tensor) -> list[Score]:
        """Return the scores that the model supports; raise UserError if there are none."""
        with torch.no_grad():
            critic = _outputs(f, x).shape[1] < 2
        if not (scores := [score for score in self.scores if not (critic and score.classes)]):
            raise UserError("these scores need a classifier, the model has one output; use energy or max-logit")
        return scores

    def _records(self, inside: Tensor, cases: dict[str | None, Tensor], about: dict[str, Any]) -> list[Record]:
        edges = np.histogram_bin_edges(torch.cat([inside, *cases.values()]).numpy(), BINS)
        density = lambda scores: np.histogram(scores.numpy(), edges, density=True)[0].tolist()
        records = []
        for attack, outside in cases.items():
            settings = {**about, "inside": len(inside), "outside": len(outside)}
            name = f"{about['score']} vs {about['outliers']}"
            if attack is not None:
                name, settings["attack"] = f"{name}, {attack}", attack
            histograms = {"score": edges.tolist(), "inside": density(inside), "outside": density(outside)}
            for measure, function in MEASURES.items():
                count, series = len(inside) + len(outside), histograms if measure == "AUROC" else {}
                records.append(Record(f"{measure} {name}", *function(inside, outside), count, settings, series))
        return records

    def _radius(self, threat: Attack) -> float:
        if self.eps is not None:
            return self.eps
        return threat.eps if threat.norm == self.norm else {"l2": 1.0, "linf": 8 / 255}[self.norm]


def search_name(steps: int, restarts: int, eps: float, norm: str) -> str:
    """Return the name of the search of :func:`lowest_scores` in tables, such as ``APGD-100 x 5 l2 1``."""
    return f"APGD-{steps}{'' if restarts == 1 else f' x {restarts}'} {ball_text(eps, norm)}"


def lowest_scores(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float,
    norm: Literal["l2", "linf"],
    steps: int,
    restarts: int,
    generator: torch.Generator,
    search: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the lowest score that Auto-PGD finds in the ball around each image, its own included; (B,), on the CPU.

    Args:
        score: images (B, C, H, W) -> (B,), differentiable.
        eps, norm: radius and norm of the balls.
        steps, restarts: settings of Auto-PGD.
        search: faster version of ``score`` for Auto-PGD to minimise; the result is scored by ``score``.
    """
    negated = lambda z: -(search or score)(z).to(z.dtype)
    candidates = [x]
    for _ in range(restarts):
        candidates.append(ascend(negated, x, eps=eps, norm=norm, steps=steps, generator=generator)[0])
    with torch.no_grad():
        return torch.stack([score(z) for z in candidates]).amin(0).cpu()


@torch.no_grad()
def _compute_scores(score: Score, f: Logits, x: Tensor, subject: Subject) -> Tensor:
    return torch.cat([score(f, subject.on_device(part)).cpu() for part in x.split(subject.batch)])
