"""Out-of-distribution detection: scores, how well they tell two sets apart, and how well under attack.

Convention: a score is high where an image looks more out of distribution, and out of distribution is the positive
class.  Results in the literature often mean the opposite; each function says which.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from advebm import energies
from advebm.attacks.apgd import ascend
from advebm.attacks.base import check_radius, radius_text
from advebm.attacks.projected import Attack
from advebm.core import config, rng
from advebm.core.errors import UserError
from advebm.data import ood_sets
from advebm.data.ood_sets import ClassGaussianNoise, GaussianNoise, Outlier, UniformNoise
from advebm.descent import value_and_gradient
from advebm.energies import Logits
from advebm.metrics.base import Record, Subject
from advebm.metrics.distances import jackknife
from advebm.models.inference import faster_model
from advebm.models.modes import searching

BINS = 40  # of the histograms that records carry
GROUPS = 20  # of the jackknife

# Scores: network and images -> (B,) float64, high = more out of distribution -----------------------------------------


class Score(Protocol):
    """A frozen dataclass that scores images; differentiable in them, so that it can be attacked."""

    @property
    def name(self) -> str:
        """As tables write it."""
        ...

    @property
    def classes(self) -> bool:
        """Whether it needs a classifier."""
        ...

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        """Outputs ``f`` (B, K), or (B,) of a critic, at images (B, C, H, W) -> (B,) float64."""
        ...


@dataclass(frozen=True)
class EnergyScore:
    """``E(x) = -log Σ_k exp f_k(x)``, Liu et al. (2020); of a critic ``-f(x)``.

    Binary adversarial training makes f a classifier of data against the rest, not a log-density: it ranks, no more.
    """

    name = "energy"
    classes = False
    cites: ClassVar[tuple[str, ...]] = ("liu2020",)

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        return energies.marginal(_outputs(f, x))


@dataclass(frozen=True)
class MaxSoftmax:
    """``log (1 - p) / p`` of the confidence ``p = max_k p(k|x)``, Hendrycks and Gimpel (2017).

    It ranks as ``1 - p`` does, but two confidences that round to 1 are still told apart.
    """

    name = "max-softmax"
    classes = True
    cites: ClassVar[tuple[str, ...]] = ("hendrycks2017",)

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        return _doubt(_outputs(f, x))


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

    The defaults are not tuned to any set.  The step may leave [0, 1] by its size, as in the paper.

    Attributes:
        temperature: divides the logits.
        step: in pixels of [0, 1].
    """

    temperature: float = 1000.0
    step: float = 0.0014

    classes = True
    cites: ClassVar[tuple[str, ...]] = ("liang2018",)

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.step >= 0):
            raise UserError(f"temperature is > 0 and step >= 0, got {self.temperature} and {self.step}")

    @property
    def name(self) -> str:
        return f"odin T {self.temperature:g} step {self.step:g}"

    def __call__(self, f: Logits, x: Tensor) -> Tensor:
        doubt = lambda x: _doubt(_outputs(f, x) / self.temperature)
        _, gradient = value_and_gradient(doubt, x)
        return doubt(x - self.step * gradient.sign())


def _outputs(f: Logits, x: Tensor) -> Tensor:
    """(B, K), or (B, 1) of a critic, in float64, for differences of logits that ODIN divides by 1000."""
    return f(x).double().reshape(len(x), -1)


def _doubt(logits: Tensor) -> Tensor:
    """Log-odds against the most likely class, in nats; (B, K) -> (B,)."""
    if logits.shape[1] < 2:
        raise UserError("this score needs a classifier, the model has one output; use energy or max-logit")
    top, most_likely = logits.max(1)
    return logits.scatter(1, most_likely[:, None], -torch.inf).logsumexp(1) - top


# Two sets of scores -> how well they are told apart; float64, ties counted half --------------------------------------


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def auroc(inside: Tensor, outside: Tensor) -> Estimate:
    """Probability that an outlier ``outside (M,)`` scores higher than an image of the data ``inside (N,)``.

    The error is that of DeLong et al. (1988).
    """
    inside, outside = _checked(inside, outside)
    caught, passed = _share_below(outside, inside), _share_below(inside, outside)
    variance = caught.var() / len(outside) + passed.var() / len(inside)
    return Estimate(caught.mean().item(), variance.sqrt().item())


def aupr(inside: Tensor, outside: Tensor, *, positive: Literal["ood", "id"] = "ood") -> Estimate:
    """Average precision with the outliers, or with the data, as what is to be found; its level is their share.

    The error is a jackknife's over groups of both sets.
    """
    return _jackknifed(_average_precision, *_checked(inside, outside), positive)


def fpr95(inside: Tensor, outside: Tensor, *, recall: Literal["ood", "id"]) -> Estimate:
    """What is let through wrongly where 95 % of the outliers, or of the data, are recognised.

    ``ood``: share of the data that scores as high as the threshold that 95 % of the outliers reach.  ``id``: share of
    the outliers that score as low as the one 95 % of the data stay under.  The literature means either, the second
    more often.  The error is a jackknife's over groups of both sets, so it knows that the threshold is estimated too.
    """
    return _jackknifed(_false_positives, *_checked(inside, outside), recall)


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    """Of each score, the share of ``others`` below it; equal ones count half."""
    others = others.sort().values
    places = torch.searchsorted(others, scores) + torch.searchsorted(others, scores, right=True)
    return places.double() / (2 * len(others))


def _average_precision(positive: Tensor, negative: Tensor) -> float:
    """``Σ_t (R_t - R_{t-1}) P_t`` over the distinct scores of positives t, from the highest; no interpolation."""
    found, counts = positive.unique(return_counts=True)
    at_least = lambda scores: (len(scores) - torch.searchsorted(scores.sort().values, found)).double()
    true, false = at_least(positive), at_least(negative)
    return (counts * true / (true + false)).sum().item() / len(positive)


def _false_positives(positive: Tensor, negative: Tensor) -> float:
    """Share of negatives that reach the highest threshold that 95 % of the positives reach."""
    needed = math.ceil(19 * len(positive) / 20)
    threshold = positive.sort(descending=True).values[needed - 1]
    return (negative >= threshold).double().mean().item()


def _jackknifed(
    statistic: Callable[[Tensor, Tensor], float], inside: Tensor, outside: Tensor, positive: Literal["ood", "id"]
) -> Estimate:
    pair = (outside, inside) if positive == "ood" else (-inside, -outside)
    groups = min(GROUPS, *map(len, pair))

    def kept(groups_kept: Any) -> float:
        keep = [torch.isin(torch.arange(len(s)) % groups, torch.tensor(groups_kept)) for s in pair]
        return statistic(pair[0][keep[0]], pair[1][keep[1]])

    return Estimate(statistic(*pair), jackknife(kept, groups))


def _checked(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    for name, scores in (("in-distribution", inside), ("out-of-distribution", outside)):
        if scores.ndim != 1 or len(scores) < 2 or not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).sum())
            what = f"shape {tuple(scores.shape)}" + f", {bad} of them NaN or infinite" * (bad > 0)
            raise UserError(f"{name} scores are at least 2 finite numbers (N,), got {what}")
    return inside.double().cpu(), outside.double().cpu()


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

    The worst case follows Binary-AT's protocol: only the outliers are attacked, within a ball, by Auto-PGD on the very
    score; the lowest of all restarts and of the image itself counts.  Published numbers differ in attack, split,
    restarts and score: compare within one protocol only.

    Attributes:
        scores: ``energy``, ``max-softmax``, ``max-logit``, ``odin``; of a critic only those that need no classes.
        sets: ``uniform``, ``gaussian`` and ``class-gaussian`` noise, and sources such as ``cifar100`` or
            ``folder:PATH``: their test images, fitted to the data's shape.
        count: images of the data, and of each set; fewer where a split has no more.
        eps: radius in pixels of [0, 1]; none takes the threat's if it has this norm, else 1 (l2) or 8/255 (linf).
            0 leaves the worst case out.
        norm: of the ball.
        steps, restarts: of Auto-PGD.
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
            raise UserError(f"count is at least 2, steps and restarts at least 1, got {counts}")

    def __call__(self, subject: Subject, generator: torch.Generator) -> list[Record]:
        """Five records for each set and score, as the images are and in the worst case: ``AUROC energy vs uniform``."""
        seed, where = generator.initial_seed(), generator.device
        eps = self._radius(subject.threat)
        metric = config.describe(replace(self, eps=eps))
        inside = ood_sets.choose_images(subject.split.x, self.count, generator)
        sets: dict[str, Tensor] = {}
        for outlier in self.sets:
            own = rng.generator(seed, str(config.describe(outlier)), device=where)
            name, x = ood_sets.draw_outliers(outlier, subject.data, self.count, own)
            if name in sets:
                raise UserError(f"two sets are called {name}; measure them one at a time")
            sets[name] = x
        records = []
        with searching(subject.model) as f:
            quick = faster_model(subject.model, subject.on_device(inside[:2]))
            for score in self._scores(f, subject.on_device(inside[:2])):
                known = _scored(score, f, inside, subject)
                for name, x in sets.items():
                    about = {"score": score.name, "outliers": name, "metric": metric}
                    cases: dict[str | None, Tensor] = {None: _scored(score, f, x, subject)}
                    if eps > 0:
                        own = rng.generator(seed, "worst case", name, score.name, device=where)
                        worst = lambda x, s=score, g=own: lowest_scores(
                            partial(s, f),
                            x,
                            eps=eps,
                            norm=self.norm,
                            steps=self.steps,
                            restarts=self.restarts,
                            generator=g,
                            search=partial(s, quick),
                        )
                        parts = map(subject.on_device, x.split(subject.batch))
                        cases[self._attack(eps)] = torch.cat([worst(part) for part in parts])
                    records += self._records(known, cases, about)
        return records

    def _scores(self, f: Logits, x: Tensor) -> list[Score]:
        """Those that this model has."""
        with torch.no_grad():
            critic = _outputs(f, x).shape[1] < 2
        if not (kept := [score for score in self.scores if not (critic and score.classes)]):
            raise UserError("these scores need a classifier, the model has one output; use energy or max-logit")
        return kept

    def _records(self, inside: Tensor, cases: dict[str | None, Tensor], about: dict[str, Any]) -> list[Record]:
        edges = np.histogram_bin_edges(torch.cat([inside, *cases.values()]).numpy(), BINS)
        density = lambda scores: np.histogram(scores.numpy(), edges, density=True)[0].tolist()
        records = []
        for attack, outside in cases.items():
            settings = {**about, "inside": len(inside), "outside": len(outside)}
            name = f"{about['score']} vs {about['outliers']}"
            if attack is not None:
                name, settings["attack"] = f"{name}, {attack}", attack
            shown = {"score": edges.tolist(), "inside": density(inside), "outside": density(outside)}
            for measure, function in MEASURES.items():
                count, series = len(inside) + len(outside), shown if measure == "AUROC" else {}
                records.append(Record(f"{measure} {name}", *function(inside, outside), count, settings, series))
        return records

    def _radius(self, threat: Attack) -> float:
        if self.eps is not None:
            return self.eps
        return threat.eps if threat.norm == self.norm else {"l2": 1.0, "linf": 8 / 255}[self.norm]

    def _attack(self, eps: float) -> str:
        return search_name(self.steps, self.restarts, eps, self.norm)


def search_name(steps: int, restarts: int, eps: float, norm: str) -> str:
    """What tables call the search of :func:`lowest_scores`: ``APGD-100 x 5 l2 1``."""
    return f"APGD-{steps}{'' if restarts == 1 else f' x {restarts}'} {radius_text(eps, norm)}"


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
    """The lowest score in the ball around each of some images, theirs included, that Auto-PGD finds; (B,), on the CPU.

    Args:
        score: images (B, C, H, W) -> (B,), differentiable.
        x: the images.
        eps, norm: the ball.
        steps, restarts: of Auto-PGD.
        generator: of its starts.
        search: the same score, computed faster, which Auto-PGD climbs; what it finds is scored by ``score``.
    """
    likeness = lambda z: -(search or score)(z).to(z.dtype)
    found = [x] + [
        ascend(likeness, x, eps=eps, norm=norm, steps=steps, generator=generator)[0] for _ in range(restarts)
    ]
    with torch.no_grad():
        return torch.stack([score(z) for z in found]).amin(0).cpu()


def _plain(score: Score, f: Logits, x: Tensor) -> Tensor:
    with torch.no_grad():
        return score(f, x).cpu()


def _scored(score: Score, f: Logits, x: Tensor, subject: Subject) -> Tensor:
    return torch.cat([_plain(score, f, subject.on_device(part)) for part in x.split(subject.batch)])
