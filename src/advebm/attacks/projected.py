"""Projected-gradient attacks: FGSM, PGD and the energy attack as one dataclass, and targeted attacks."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advebm import energies
from advebm.attacks.base import Adversary, AttackRun, ball_text, check_radius, margin
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.descent import Descent, Energy, Observer, both, box, heavy_ball, l2_ball, linf_ball, sign, unit
from advebm.starts import Gaussian, Start, UniformBall, clean


@dataclass(frozen=True)
class Attack(Adversary):
    """Projected gradient descent in an eps-ball, Madry et al. (2018); with one step from ``clean``, FGSM.

    ``attack(model, x, y)`` is untargeted.  :meth:`minimize` lowers any energy within the ball; for a targeted attack,
    give it ``lambda x: energies.conditional(f(x), target)``.

    Attributes:
        eps: radius, for pixel values in [0, 1].
        norm: ``linf`` (sign steps) or ``l2`` (unit steps).
        steps: gradient evaluations per run.
        step_size: for pixel values in [0, 1]; None: 2.5 eps / steps.
        start: ``uniform`` in the ball, ``gaussian`` (noise of standard deviation ``spread``), or ``clean`` (the image).
        spread: standard deviation of a gaussian start.
        loss: what an untargeted attack maximises: ``cross-entropy`` = E(x, y) - E(x), JEAT eq. 14; ``energy`` =
            E(x, y), JEAT eq. 18, which the scale of the logits can mask, so judge robustness by the first; or
            ``margin``, the loss of Carlini and Wagner (2017) within the ball.
        restarts: runs from different starts; :meth:`minimize` keeps the lowest energy of each image, :meth:`find` the
            first misclassified point.
        momentum: share of the previous step that is added to the next unit step (RATIO has 0.9); l2 only.
    """

    eps: float = 8 / 255
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10
    step_size: float | None = None
    start: Literal["uniform", "gaussian", "clean"] = "uniform"
    spread: float = 1e-3
    loss: Literal["cross-entropy", "energy", "margin"] = "cross-entropy"
    restarts: int = 1
    momentum: float = 0.0

    cites: ClassVar[tuple[str, ...]] = ("madry2018",)
    carried: ClassVar[tuple[str, ...]] = ("eps", "norm")  # kept when the training method changes, see config.switch

    def __post_init__(self) -> None:
        check_choices(self)
        check_radius(self.eps, self.norm)
        if self.steps < 1 or self.restarts < 1:
            raise UserError(f"steps and restarts must be at least 1, got {self.steps} and {self.restarts}")
        if self.step_size is not None and not self.step_size > 0:
            raise UserError(f"step_size must be > 0 or none (2.5 eps / steps), got {self.step_size}")
        if self.spread < 0:
            raise UserError(f"spread is a deviation >= 0, got {self.spread}")
        if not 0 <= self.momentum < 1 or (self.momentum and self.norm == "linf"):
            raise UserError(f"momentum must lie in [0, 1) and is for norm l2, got {self.momentum} with {self.norm}")

    def raise_loss(self, f: energies.Logits, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] within eps of ``x``, of high ``loss``."""
        return self.minimize(self.negative_loss(f, y), x, generator)

    def minimize(
        self, energy: Energy, x: Tensor, generator: torch.Generator | None, *, observe: Observer | None = None
    ) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] within eps of ``x``, of low energy."""
        descent, runs = self.descent(), []
        for _ in range(self.restarts):
            start = self.begin(x, generator)
            runs.append(descent(energy, start, origin=x, generator=generator, observe=observe))
        if self.restarts == 1:
            return runs[0]
        with torch.no_grad():
            best = torch.stack([energy(run) for run in runs]).argmin(0)
        return torch.stack(runs)[best, torch.arange(len(x), device=x.device)]

    def begin(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return where a run starts, (B, C, H, W) in the ball and in [0, 1]."""
        starts: dict[str, Start] = {
            "uniform": UniformBall(self.eps, self.norm),
            "gaussian": Gaussian(self.spread),
            "clean": clean,
        }
        return self.descent().constraint(starts[self.start](x, None, generator), x)

    def descent(self) -> Descent:
        """Return its search, the one place where radius, norm and step size become a direction and a constraint."""
        unit_step = heavy_ball(self.momentum) if self.momentum else unit
        ball, direction = (linf_ball(self.eps), sign) if self.norm == "linf" else (l2_ball(self.eps), unit_step)
        size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        return Descent(self.steps, size, direction, both(ball, box()))

    def negative_loss(self, f: energies.Logits, y: Tensor) -> Energy:
        """Return the energy that an untargeted attack on the labels ``y (B,)`` minimises: minus ``loss``."""
        if self.loss == "energy":
            return lambda x: -energies.joint(f(x), y)
        if self.loss == "margin":
            return lambda x: -margin(f(x), y)
        return lambda x: -energies.conditional(f(x), y)

    def runs(self, classes: int) -> list[AttackRun]:
        once = replace(self, restarts=1)
        return [AttackRun(self.name, once.raise_loss, self.steps)] * self.restarts

    @property
    def name(self) -> str:
        """Return the name used in tables, such as ``PGD-20 l2 0.75``."""
        kind = {"energy": "energy attack", "margin": "C&W-PGD"}.get(self.loss, "PGD")
        kind = "FGSM" if kind == "PGD" and self.start == "clean" and self.steps == 1 else kind
        times = "" if self.restarts == 1 else f" x {self.restarts}"
        steps = "" if kind == "FGSM" else f"-{self.steps}"
        return f"{kind}{steps}{times} {ball_text(self.eps, self.norm)}"


def fgsm(eps: float, norm: Literal["linf", "l2"] = "linf") -> Attack:
    """Return the fast gradient (sign) method of Goodfellow et al. (2015): one full step from the image itself."""
    return Attack(eps=eps, norm=norm, steps=1, start="clean")


@dataclass(frozen=True)
class Targeted(Adversary):
    """An attack towards a random wrong class for each image, CEM section 4.1: it minimises ``E(x, t) - E(x)``.

    Attributes:
        attack: the search; each restart draws new target classes.
    """

    attack: Attack = Attack()

    @property
    def eps(self) -> float:
        return self.attack.eps

    @property
    def norm(self) -> str:
        return self.attack.norm

    @property
    def name(self) -> str:
        """Return the name used in tables, such as ``targeted PGD-20 linf 8/255``."""
        return f"targeted {self.attack.name}"

    def runs(self, classes: int) -> list[AttackRun]:
        once = replace(self.attack, restarts=1)

        def search(f: energies.Logits, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
            target = (y + torch.randint(1, classes, y.shape, generator=generator, device=y.device)) % classes
            return once.minimize(lambda z: energies.conditional(f(z), target), x, generator)

        return [AttackRun(self.name, search, self.attack.steps)] * self.attack.restarts
