"""CutMix: boxes of other images, and labels mixed by area, around another objective."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError
from advebm.data.augment import covered
from advebm.models.modes import searching
from advebm.objectives.at import AT
from advebm.objectives.base import Batch, Context, Objective
from advebm.objectives.standard import Standard
from advebm.objectives.trades import TRADES
from advebm.objectives.wrapper import Wrapper


@dataclass(frozen=True)
class CutMix(Wrapper):
    """Another objective on images with a box from another image of the batch, Yun et al. (2019).

    Labels are mixed by area, in the search and in the loss.  In adversarial training with averaged weights it helps
    against overfitting, Rebuffi et al. (2021).

    Attributes:
        objective: what the mixed images are trained with: ``standard``, ``at`` or one of its kind, or ``trades``.
        alpha: the share of the area that an image keeps is drawn from Beta(alpha, alpha), before the box is cut to the
            image; 1: uniform, as in the paper.
    """

    objective: Objective = AT()
    alpha: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("yun2019", "rebuffi2021")

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Standard | AT | TRADES) or "origin" in self.objective.needs:
            name = type(self.objective).__name__
            raise UserError(
                f"cutmix goes around an objective whose labels can be mixed, standard, AT or TRADES, not {name}"
            )
        if getattr(getattr(self.objective, "attack", None), "loss", None) == "margin":
            raise UserError("the margin is that of one label: set attack.loss to cross-entropy or energy")
        if not self.alpha > 0:
            raise UserError(f"alpha must be > 0, got {self.alpha}")

    def inner(self, batch: Batch, found: tuple[Batch, Any]) -> tuple[Batch, Any]:
        return found

    def search(self, model: nn.Module, batch: Batch, state: Any, ctx: Context) -> tuple[Batch, Any]:
        """Mix the batch; return it, its labels as shares (B, K), and the inner objective's search result on it."""
        with searching(model) as f, torch.no_grad():
            classes = f(batch.x[:1]).shape[1]
        labels = batch.x.new_zeros(len(batch.y), classes).scatter_(1, batch.y[:, None], 1.0)
        mixed = mix(batch._replace(y=labels), self.alpha, ctx.generator)
        return mixed, self.objective.search(model, mixed, state, ctx)

    def adversarial(self, batch: Batch, found: tuple[Batch, Any]) -> Tensor | None:
        """Return None: the attacked images are not those of the batch."""
        return None


def mix(batch: Batch, alpha: float, generator: torch.Generator) -> Batch:
    """Put a box from another image into each; labels are shares (B, K) and are mixed by area.

    The box has the image's shape and a place of its own: around a pixel drawn uniformly, cut to the image.
    """
    count, _, height, width = batch.x.shape
    device = batch.x.device
    kept = draw_beta(alpha, count, generator)
    edge = (1 - kept).sqrt()
    place = torch.rand(2, count, generator=generator, device=device)
    inside = []
    for size, where in ((height, place[0]), (width, place[1])):
        centre, length = (where * size).floor(), (edge * size).floor()
        inside.append(covered(centre - (length / 2).floor(), length, size))
    box = inside[0][:, :, None] & inside[1][:, None, :]
    other = torch.randperm(count, generator=generator, device=device)
    area = box.flatten(1).to(batch.x.dtype).mean(1, keepdim=True)
    x = torch.where(box[:, None], batch.x[other], batch.x)
    return batch._replace(x=x, y=(1 - area) * batch.y + area * batch.y[other])


def draw_beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` numbers from Beta(alpha, alpha), the share of one of two Gamma(alpha) numbers in their sum."""
    gammas = torch._standard_gamma(torch.full((2, count), alpha, device=generator.device), generator=generator)
    return gammas[0] / gammas.sum(0).clamp_min(1e-12)
