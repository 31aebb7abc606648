"""Auto-PGD: projected gradient descent that adapts its step size, Croce and Hein (2020)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advebm import energies
from advebm.attacks.base import Adversary, AttackRun, ball_text, check_radius, dlr, margin, runner_up_class
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.core.rng import rand, randn
from advebm.descent import both, box, l2_ball, linf_ball, per_sample, sign, unit
from advebm.energies import Logits

# (images, their row indices in the batch) -> (value to maximise (B,), whether each point is finished, bool (B,))
Outcome = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

MOMENTUM = 0.75  # weight of the gradient step, eq. 2 of the paper; the rest repeats the last move
RISES = 0.75  # rho, section 3.1: a check halves the step if the loss rose in at most this share of the steps before it
FIRST, SHORTER, SHORTEST = 0.22, 0.03, 0.06  # steps between checks, as shares of all steps, section 3.1


@dataclass(frozen=True)
class APGD(Adversary):
    """Auto-PGD, Croce and Hein (2020), on one of four losses; it stops at a point once that is misclassified.

    Attributes:
        eps: radius, for pixel values in [0, 1].
        norm: ``linf`` (sign steps) or ``l2`` (unit steps).
        steps: steps per run; each takes one gradient, and the starting point takes one more.
        loss: ``cross-entropy``; ``dlr``, which needs at least three classes; ``targeted-dlr``, which needs at least
            four and aims at the ``targets`` most likely wrong classes in turn; or the plain ``margin``.
        targets: number of target classes of ``targeted-dlr``, capped at the number of wrong classes.
        restarts: runs from different random starts, for each target class.
        samples: forward passes averaged in a gradient, for randomised networks (expectation over transformation).
    """

    eps: float = 8 / 255
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 100
    loss: Literal["cross-entropy", "dlr", "targeted-dlr", "margin"] = "cross-entropy"
    targets: int = 9
    restarts: int = 1
    samples: int = 1

    cites: ClassVar[tuple[str, ...]] = ("croce2020reliable",)

    def __post_init__(self) -> None:
        check_choices(self)
        check_radius(self.eps, self.norm)
        if min(self.steps, self.targets, self.restarts, self.samples) < 1:
            counts = f"{self.steps}, {self.targets}, {self.restarts} and {self.samples}"
            raise UserError(f"steps, targets, restarts and samples must be at least 1, got {counts}")

    @property
    def label(self) -> str:
        """Return the name without the ball, such as ``APGD-CE``."""
        kinds = {"cross-entropy": "CE", "dlr": "DLR", "targeted-dlr": "T", "margin": "margin"}
        return f"APGD-{kinds[self.loss]}" + (f" x {self.restarts}" if self.restarts > 1 else "")

    @property
    def name(self) -> str:
        """Return the name used in tables, such as ``APGD-CE 100 linf 8/255``."""
        return f"{self.label} {self.steps} {ball_text(self.eps, self.norm)}"

    def runs(self, classes: int) -> list[AttackRun]:
        """Return one run for each target class and restart."""
        needed = {"dlr": 3, "targeted-dlr": 4}.get(self.loss, 2)
        if classes < needed:
            raise UserError(f"the loss {self.loss} takes at least {needed} classes, got {classes}; use margin")
        goals = range(1, min(self.targets, classes - 1) + 1) if self.loss == "targeted-dlr" else [0]
        passes = 1 + self.samples * (self.steps + 1)
        return [
            AttackRun(self.label, partial(self._search, goal), passes) for goal in goals for _ in range(self.restarts)
        ]

    def _search(self, goal: int, f: Logits, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return misclassified points where the run found them, else the points of the highest loss."""
        target = runner_up_class(f, x, y, goal) if goal else None

        def outcome(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            out = f(x)
            aim = None if target is None else target[rows]
            return self._loss(out, y[rows], aim), out.argmax(1) != y[rows]

        return maximise(
            outcome, x, eps=self.eps, norm=self.norm, steps=self.steps, generator=generator, samples=self.samples
        )[0]

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        match self.loss:
            case "cross-entropy":
                return energies.conditional(logits, y)
            case "margin":
                return margin(logits, y)
            case _:
                return dlr(logits, y, target)


def ascend(
    value: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float,
    norm: Literal["linf", "l2"],
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Maximise ``value`` with Auto-PGD: return the best point in the ball around each ``x``, and its value (B,).

    ``value(x) -> (B,)`` may be any differentiable function of images.  The other arguments are those of :class:`APGD`.
    """
    never = lambda x, rows: (value(x), torch.zeros(len(x), dtype=torch.bool, device=x.device))
    return maximise(never, x, eps=eps, norm=norm, steps=steps, generator=generator)


def maximise(
    outcome: Outcome,
    x: Tensor,
    *,
    eps: float,
    norm: Literal["linf", "l2"],
    steps: int,
    generator: torch.Generator,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run Auto-PGD, algorithm 1 of Croce and Hein (2020); return points in the ball around ``x`` and their values (B,).

    A point that ``outcome`` calls finished takes no more steps and is returned as it is; for others, the best point is.
    """
    constraint = both(linf_ball(eps) if norm == "linf" else l2_ball(eps), box())
    direction = sign if norm == "linf" else unit
    found, values = x.clone(), x.new_full((len(x),), -torch.inf)
    rows = torch.arange(len(x), device=x.device)
    at = constraint(x + eps * _full_length(x, norm, generator), x)
    value, gradient, done = _look(outcome, at, rows, samples)
    s = {"rows": rows, "origin": x, "x": at, "before": at, "gradient": gradient, "value": value, "done": done}
    s |= {"best": at, "best_gradient": gradient, "best_value": value, "last_best": value}
    s |= {"size": torch.full_like(value, 2 * eps), "rises": torch.zeros_like(value), "halved": torch.ones_like(done)}
    stretch, since = max(int(FIRST * steps), 1), 0
    for k in range(steps):
        if 8 * int(s["done"].sum()) >= len(s["done"]):  # drop finished points, an eighth or more at a time
            out = s["done"]
            found[s["rows"][out]], values[s["rows"][out]] = s["x"][out], s["value"][out]
            s = {name: v[~out] for name, v in s.items()}
            if len(s["rows"]) == 0:
                return found, values
        size = per_sample(s["size"], s["x"])
        step = constraint(s["x"] - size * direction(-s["gradient"], {}), s["origin"])
        share = MOMENTUM if k else 1.0
        move = share * (step - s["x"]) + (1 - share) * (s["x"] - s["before"])
        moving = per_sample(~s["done"], s["x"])
        new = torch.where(moving, constraint(s["x"] + move, s["origin"]), s["x"])
        value, gradient, done = _look(outcome, new, s["rows"], samples)
        s["before"], s["x"], s["gradient"] = s["x"], new, gradient
        s["rises"] = s["rises"] + (value > s["value"])
        s["value"], s["done"] = value, s["done"] | done
        better = value > s["best_value"]
        s["best_value"] = torch.where(better, value, s["best_value"])
        for best, current in (("best", new), ("best_gradient", gradient)):
            s[best] = torch.where(per_sample(better, new), current, s[best])
        since += 1
        if since == stretch:
            stuck = ~s["halved"] & (s["last_best"] >= s["best_value"])
            halve = (s["rises"] <= RISES * stretch) | stuck
            back = per_sample(halve & ~s["done"], new)
            s["size"] = torch.where(halve, s["size"] / 2, s["size"])
            s["x"], s["gradient"] = (
                torch.where(back, s[b], s[a]) for a, b in (("x", "best"), ("gradient", "best_gradient"))
            )
            s["last_best"], s["halved"], s["rises"] = s["best_value"], halve, torch.zeros_like(value)
            stretch, since = max(stretch - max(int(SHORTER * steps), 1), max(int(SHORTEST * steps), 1)), 0
    over = per_sample(s["done"], s["x"])
    found[s["rows"]] = torch.where(over, s["x"], s["best"])
    values[s["rows"]] = torch.where(s["done"], s["value"], s["best_value"])
    return found, values


def _look(outcome: Outcome, x: Tensor, rows: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value (B,), its gradient averaged over ``samples`` passes, and what is finished; all detached."""
    gradient = torch.zeros_like(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        for _ in range(samples):
            value, done = outcome(x, rows)
            gradient += torch.autograd.grad(value.sum(), x)[0] / samples
    return value.detach(), gradient, done


def _full_length(x: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """Draw random directions of norm 1, shaped like ``x``."""
    noise = 2 * rand(x, generator) - 1 if norm == "linf" else randn(x, generator)
    length = noise.flatten(1).abs().amax(1) if norm == "linf" else noise.flatten(1).norm(dim=1)
    return noise / per_sample(length.clamp_min(1e-12), x)
