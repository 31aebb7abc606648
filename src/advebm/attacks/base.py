"""The base class of attacks, their runs, and the losses that they maximise."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.energies import Logits
from advebm.models.modes import searching

Search = Callable[[Logits, Tensor, Tensor, torch.Generator], Tensor]  # (f, x, y, generator) -> images like x


class AttackRun(NamedTuple):
    """One run of an attack, from one start towards at most one target class.

    Attributes:
        attack: name of the attack that the run belongs to.
        search: function that returns the images found.
        passes: forward passes per image, for estimates of time.
    """

    attack: str
    search: Search
    passes: int


class Adversary:
    """An attack on labelled images: a frozen dataclass of plain data with an ``eps``, a ``norm`` and a ``name``.

    An attack consists of runs.  Each run gets only the points that no earlier run has misclassified.
    """

    @property
    def eps(self) -> float:
        """Return the radius, for pixel values in [0, 1]; infinite for an attack that minimises the distance."""
        raise NotImplementedError

    @property
    def norm(self) -> str:
        """Return ``linf`` or ``l2``."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Return the name used in tables."""
        raise NotImplementedError

    def runs(self, classes: int) -> Sequence[AttackRun]:
        """Return the runs against a classifier of ``classes`` classes, in order.

        Raises:
            UserError: the loss needs more classes.
        """
        raise NotImplementedError

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Attack a classifier: return images (B, C, H, W) in [0, 1] within ``eps`` of ``x``, as :meth:`find` does.

        Args:
            model: maps images (B, C, H, W) in [0, 1] to logits (B, K); attacked in eval mode, with frozen weights.
            x, y: images and their labels, int64 (B,).
            generator: source of all random numbers; None: the same numbers are drawn at each call.

        Raises:
            UserError: ``model`` is not a module, or ``y`` is not a tensor.
        """
        if not isinstance(model, nn.Module) or not isinstance(y, Tensor):
            raise UserError(
                "an attack takes a module, images and labels; a function is attacked by attack.find(f, x, y, "
                "generator), and an energy lowered by attack.minimize(energy, x, generator)"
            )
        with searching(model) as f:
            return self.find(f, x, y, rng.generator("attack", device=x.device) if generator is None else generator)

    def find(self, f: Logits, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] within ``eps`` of ``x``; the last run's where no run succeeds.

        Args:
            f: maps images to logits (B, K), as :func:`advebm.models.modes.searching` yields it.
            x, y: images and their labels, int64 (B,); images that are misclassified already are returned unchanged.
            generator: source of all random numbers.
        """
        with torch.no_grad():
            logits = check_classifier(f(x))
        x_adv, remaining = x.clone(), (logits.argmax(1) == y).nonzero().squeeze(1)
        for run in self.runs(logits.shape[1]):
            if len(remaining) == 0:
                break
            x_adv[remaining] = run.search(f, x[remaining], y[remaining], generator)
            remaining = remaining[is_correct(f, x_adv[remaining], y[remaining])]
        return x_adv


@torch.no_grad()
def is_correct(f: Logits, x: Tensor, y: Tensor) -> Tensor:
    """Return which images are classified as labelled, bool (B,)."""
    return check_classifier(f(x)).argmax(1) == y


def check_classifier(outputs: Tensor) -> Tensor:
    """Return the logits (B, K) of at least two classes; refuse other outputs."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise UserError("accuracy needs a classifier, the model has one output; choose --metrics without it")
    return outputs


def critic_as_classifier(f: Logits) -> Logits:
    """Turn a critic f into a classifier with the logits ``(0, f)``, whose softmax is the sigmoid of f."""

    def logits(x: Tensor) -> Tensor:
        logit = f(x).reshape(len(x))
        return torch.stack([torch.zeros_like(logit), logit], 1)

    return logits


def ball_text(eps: float, norm: str) -> str:
    """Return how tables write a ball: ``linf 8/255``, ``l2 0.5``."""
    return f"{norm} {eps * 255:.3g}/255" if norm == "linf" else f"{norm} {eps:.4g}"


def check_radius(eps: float, norm: str) -> None:
    """Raise a UserError for a radius that is negative or NaN, or for an linf radius above 1 (8 instead of 8/255)."""
    if not eps >= 0:
        raise UserError(f"eps is a radius >= 0 in pixels of [0, 1], got {eps}")
    if eps > 1 and norm == "linf":
        raise UserError(f"an linf eps must be at most 1 in pixels of [0, 1], got {eps}; write 8/255, not 8")


def runner_up_class(f: Logits, x: Tensor, y: Tensor, rank: int) -> Tensor:
    """Return each image's ``rank``-th most likely class other than ``y``, counted from 1: int64 (B,)."""
    with torch.no_grad():
        logits = f(x).scatter(1, y[:, None], -torch.inf)
    return logits.argsort(1, descending=True)[:, rank - 1]


# Losses that attacks maximise: logits (B, K) and labels (B,) -> (B,), positive where misclassified --------------------


def margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Return ``max_{k≠y} f_k - f_y``, Carlini and Wagner (2017); with a target ``f_t - f_y``."""
    own = logits.gather(1, y[:, None]).squeeze(1)
    if target is not None:
        return logits.gather(1, target[:, None]).squeeze(1) - own
    return logits.scatter(1, y[:, None], -torch.inf).amax(1) - own


def dlr(logits: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Return the difference-of-logits ratio of Croce and Hein (2020), a margin invariant to the scale of the logits.

    The margin is divided by ``f_(1) - f_(3)`` of the sorted logits; with a target by ``f_(1) - (f_(3) + f_(4)) / 2``.
    """
    top = logits.topk(3 if target is None else 4, 1).values
    third = top[:, 2] if target is None else (top[:, 2] + top[:, 3]) / 2
    return margin(logits, y, target) / (top[:, 0] - third + 1e-12)
