"""Adversarial training by a single step, with a monitor that detects its collapse."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advebm.attacks.projected import Attack
from advebm.core.errors import EarlyStop, UserError
from advebm.data.loader import Origin
from advebm.descent import box, per_sample
from advebm.models.modes import searching
from advebm.objectives.at import AT, with_step
from advebm.objectives.base import Batch, Context, Loss, accuracy
from advebm.starts import UniformBall


@dataclass
class CollapseMonitor:
    """State of FAST's monitor: the images seen at the last check, and the robust accuracy measured then."""

    images: int = 0
    accuracy: float = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"images": self.images, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.images, self.accuracy = int(state["images"]), state["accuracy"]


@dataclass(frozen=True)
class FAST(AT):
    """AT by one step of 1.25 eps from a uniform start, in train mode, Wong et al. (2020), as in their code.

    One-step training can collapse within an epoch: the network stays robust to one step but not to several
    ("catastrophic overfitting").  So accuracy under PGD is measured on a training batch at intervals, and a sudden fall
    stops training at the last checkpoint before it.

    Attributes:
        attack: the one-step attack; ``step_size`` None: 1.25 eps.
        search_mode, smoothing: see :class:`AT`.
        watch_every: number of images between checks; 0: no checks.
        fall: largest fall of the accuracy from one check to the next, as a share; at least four standard errors, as a
            batch has few images.
    """

    attack: Attack = Attack(eps=8 / 255, steps=1)
    search_mode: Literal["eval", "train"] = "train"
    watch_every: int = 10_000
    fall: float = 0.2

    cites: ClassVar[tuple[str, ...]] = ("wong2020",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watch_every < 0 or not 0 < self.fall <= 1:
            raise UserError(f"watch_every must be >= 0 and fall in (0, 1], got {self.watch_every} and {self.fall}")
        if self.attack.steps != 1:
            raise UserError(f"fast is training by one step, got attack.steps {self.attack.steps}; see at for more")

    def inner(self) -> Attack:
        return with_step(self.attack, 1.25)

    def init(self, like: Tensor, generator: torch.Generator) -> CollapseMonitor:
        return CollapseMonitor()

    def after(
        self, model: nn.Module, batch: Batch, found: Tensor, state: CollapseMonitor, loss: Loss, ctx: Context
    ) -> None:
        """Check accuracy under PGD-5 (step eps / 4, as in the code); raise EarlyStop if it fell by over ``fall``."""
        if not self.watch_every or ctx.images - state.images < self.watch_every:
            return
        pgd = replace(self.attack, steps=5, step_size=self.attack.eps / 4)
        with searching(model) as f:
            x_adv = pgd.raise_loss(f, batch.x, batch.y, ctx.generator)
            with torch.no_grad():
                right = ctx.mean(accuracy(f(x_adv), batch.y)).item()
        previous, state.images, state.accuracy = state.accuracy, ctx.images, right
        chance = 4 * math.sqrt((right * (1 - right) + previous * (1 - previous)) / len(batch.x))
        if previous - right > max(self.fall, chance):
            raise EarlyStop(f"accuracy under PGD-5 fell from {previous:.0%} to {right:.0%}: catastrophic overfitting")


LEVELS = 127  # of a byte with a sign


class KeptPerturbations:
    """State of FGSMEP: the last perturbation of every training image, as bytes in units of its largest entry.

    Attributes:
        levels: int8 (N, C, H, W) in the frame of the images themselves; empty before the first step.
        largest: largest entry of each, (N,), in pixels of [0, 1]; 0: there is none yet.
    """

    def __init__(self) -> None:
        self.levels, self.largest = torch.empty(0, dtype=torch.int8), torch.empty(0)

    def show(self, x: Tensor, origin: Origin) -> Tensor:
        """Return the kept perturbations (B, C, H, W) of a batch, moved as its images are; 0 where there is none."""
        self.levels, self.largest = self.levels.to(x.device), self.largest.to(x.device)
        if not len(self.levels):
            self.levels = torch.zeros(origin.total, *x.shape[1:], dtype=torch.int8, device=x.device)
            self.largest = torch.zeros(origin.total, device=x.device)
        kept = self.levels[origin.images].to(x.dtype) * per_sample(self.largest[origin.images].to(x.dtype) / LEVELS, x)
        pixels = origin.pixels.flatten(1)[:, None].expand(-1, x.shape[1], -1)
        moved = kept.flatten(2).gather(2, pixels.clamp_min(0)) * (pixels >= 0)
        return moved.view_as(x)

    def keep(self, delta: Tensor, origin: Origin) -> None:
        """Keep the perturbations of a batch, moved back."""
        pixels = origin.pixels.flatten(1)[:, None].expand(-1, delta.shape[1], -1)
        inside = (pixels >= 0).to(delta.dtype)
        back = torch.zeros_like(delta).flatten(2).scatter_add_(2, pixels.clamp_min(0), delta.flatten(2) * inside)
        largest = back.flatten(1).abs().amax(1)
        levels = (back * (LEVELS / largest.clamp_min(1e-12))[:, None, None]).round().to(torch.int8)
        # At the border of two epochs an image may come twice: all its rows write the last one, in whatever order.
        rows = torch.arange(len(delta), device=delta.device)
        last = (rows * (origin.images[:, None] == origin.images)).amax(1)
        self.levels[origin.images] = levels.view_as(delta)[last]
        self.largest[origin.images] = largest.to(self.largest.dtype)[last]

    def state_dict(self) -> dict[str, Tensor]:
        return {"levels": self.levels, "largest": self.largest}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.levels, self.largest = state["levels"], state["largest"]


@dataclass(frozen=True)
class FGSMEP(AT):
    """AT by one step of eps from the perturbation that each image had in the last epoch, Jia et al. (2022), FGSM-EP.

    So that one step attacks like several.  The first epoch starts from uniform draws.  Perturbations follow crops and
    mirror images, and are kept as bytes: C x H x W bytes an image, in memory and in every checkpoint.  The authors
    search in train mode, which ``search_mode`` can set; their momentum and their regulariser (FGSM-MEP, FGSM-PGI) are
    not part of it.

    Attributes:
        attack: the attack; ``step_size`` None: eps.  Its start is that of an image's first epoch.
        search_mode, smoothing: see :class:`AT`.
    """

    attack: Attack = Attack(eps=8 / 255, steps=1)

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "origin"})
    cites: ClassVar[tuple[str, ...]] = ("jia2022",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images_per_step is not None or self.attack.restarts > 1 or self.attack.steps != 1:
            raise UserError(
                "fgsm-ep goes on from one perturbation by one step: set attack.steps to 1, and leave "
                "images_per_step and attack.restarts out"
            )

    def inner(self) -> Attack:
        return with_step(self.attack, 1.0)

    def init(self, like: Tensor, generator: torch.Generator) -> KeptPerturbations:
        return KeptPerturbations()

    def search(self, model: nn.Module, batch: Batch, state: KeptPerturbations, ctx: Context) -> Tensor:
        assert batch.origin is not None
        attack = self.inner()
        kept = state.show(batch.x, batch.origin)
        known = per_sample(state.largest[batch.origin.images] > 0, batch.x)
        descent = attack.descent()
        start = torch.where(known, descent.constraint(batch.x + kept, batch.x), attack.begin(batch.x, ctx.generator))
        with searching(model, view=ctx.view, training=self.search_mode == "train") as f:
            found = descent(attack.negative_loss(f, batch.y), start, origin=batch.x, generator=ctx.generator)
        state.keep(found - batch.x, batch.origin)
        return found


@dataclass(frozen=True)
class NFGSM(FAST):
    """AT by one step of eps from an image with strong noise, without projection, de Jorge et al. (2022, algorithm 1).

    The noise is uniform in a ball of ``noise`` times eps, and neither it nor the step is cut to the eps-ball, only to
    [0, 1], so training images may be up to ``noise`` + 1 times eps away.  This avoids the collapse of one-step training
    at radii where FAST has it.

    Attributes:
        attack: radius, norm and loss; ``step_size`` None: eps.  Its start is not used.
        search_mode, smoothing: see :class:`AT`.
        watch_every, fall: see :class:`FAST`.
        noise: radius of the noise in units of eps.
    """

    noise: float = 2.0

    cites: ClassVar[tuple[str, ...]] = ("dejorge2022",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise >= 0:
            raise UserError(f"noise is a radius in units of eps, at least 0, got {self.noise}")

    def inner(self) -> Attack:
        return with_step(self.attack, 1.0)

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> Tensor:
        attack, in_range = self.inner(), box()
        start = UniformBall(self.noise * attack.eps, attack.norm)(batch.x, None, ctx.generator)
        step = replace(attack.descent(), constraint=in_range)
        with searching(model, view=ctx.view, training=self.search_mode == "train") as f:
            return step(attack.negative_loss(f, batch.y), in_range(start, batch.x), generator=ctx.generator)
