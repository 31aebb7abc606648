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
from advebm.descent import both, box, gradient_of, l2_ball, linf_ball, per_sample, sign, unit
from advebm.energies import Logits
from advebm.starts import random_direction

# (images, their row indices in the batch) -> (value to maximise (B,), whether each point is finished, bool (B,))
Outcome = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

MOMENTUM = 0.75  # weight of the gradient step, eq. 2 of the paper; the rest repeats the last move
RISES = 0.75  # rho, section 3.1: a check halves the step if the loss rose in at most this share of the steps before it
LOOK_EVERY = 5  # steps between looks for finished points on a device that the host would have to wait for
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
            logits = f(x)
            loss = self._loss(logits, y[rows], None if target is None else target[rows])
            return loss, logits.argmax(1) != y[rows]

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
    outcome = lambda x, rows: (value(x), torch.zeros(len(x), dtype=torch.bool, device=x.device))
    return maximise(outcome, x, eps=eps, norm=norm, steps=steps, generator=generator)


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
    x_adv, values = x.clone(), x.new_full((len(x),), -torch.inf)
    rows = torch.arange(len(x), device=x.device)
    start = constraint(x + eps * random_direction(x, norm, generator), x)
    value, gradient, done = _evaluate(outcome, start, rows, samples)
    state = {"rows": rows, "origin": x, "x": start, "before": start, "gradient": gradient, "value": value, "done": done}
    state |= {"best": start, "best_gradient": gradient, "best_value": value, "last_best": value}
    state |= {"size": torch.full_like(value, 2 * eps), "halved": torch.ones_like(done)}
    state["rises"] = torch.zeros_like(value)
    interval, since_check = max(int(FIRST * steps), 1), 0
    every = 1 if x.device.type == "cpu" else LOOK_EVERY
    for k in range(steps):
        done = state["done"]
        if k % every == 0 and 8 * int(done.sum()) >= len(done):  # drop finished points, an eighth or more at a time
            x_adv[state["rows"][done]], values[state["rows"][done]] = state["x"][done], state["value"][done]
            state = {name: v[~done] for name, v in state.items()}
            if len(state["rows"]) == 0:
                return x_adv, values
        size = per_sample(state["size"], state["x"])
        step = constraint(state["x"] - size * direction(-state["gradient"], {}), state["origin"])
        share = MOMENTUM if k else 1.0
        move = share * (step - state["x"]) + (1 - share) * (state["x"] - state["before"])
        moving = per_sample(~state["done"], state["x"])
        new = torch.where(moving, constraint(state["x"] + move, state["origin"]), state["x"])
        value, gradient, done = _evaluate(outcome, new, state["rows"], samples)
        state["before"], state["x"], state["gradient"] = state["x"], new, gradient
        state["rises"] = state["rises"] + (value > state["value"])
        state["value"], state["done"] = value, state["done"] | done
        better = value > state["best_value"]
        state["best_value"] = torch.where(better, value, state["best_value"])
        state["best"] = torch.where(per_sample(better, new), new, state["best"])
        state["best_gradient"] = torch.where(per_sample(better, new), gradient, state["best_gradient"])
        since_check += 1
        if since_check == interval:
            stuck = ~state["halved"] & (state["last_best"] >= state["best_value"])
            halve = (state["rises"] <= RISES * interval) | stuck
            back = per_sample(halve & ~state["done"], new)
            state["size"] = torch.where(halve, state["size"] / 2, state["size"])
            state["x"] = torch.where(back, state["best"], state["x"])
            state["gradient"] = torch.where(back, state["best_gradient"], state["gradient"])
            state["last_best"], state["halved"], state["rises"] = state["best_value"], halve, torch.zeros_like(value)
            interval, since_check = max(interval - max(int(SHORTER * steps), 1), max(int(SHORTEST * steps), 1)), 0
    x_adv[state["rows"]] = torch.where(per_sample(state["done"], state["x"]), state["x"], state["best"])
    values[state["rows"]] = torch.where(state["done"], state["value"], state["best_value"])
    return x_adv, values


def _evaluate(outcome: Outcome, x: Tensor, rows: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value (B,), its gradient averaged over ``samples`` passes, and what is finished; all detached."""
    gradient = torch.zeros_like(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        for _ in range(samples):
            value, done = outcome(x, rows)
            gradient += gradient_of(value, x) / samples
    return value.detach(), gradient, done
