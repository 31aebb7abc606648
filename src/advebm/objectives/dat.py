"""Dual adversarial training: a robust classifier whose marginal energy is adversarially trained as well."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.attacks.projected import Attack
from advebm.core.config import check_choices
from advebm.core.errors import UserError
from advebm.descent import Descent, box, unit
from advebm.models.modes import freeze_batch_norms, searching
from advebm.objectives.base import Batch, Context, Loss, Stateless, accuracy, r1
from advebm.objectives.curriculum import Curriculum, CurriculumState, auroc


class DATResult(NamedTuple):
    """Attacked images for the classifier and contrast images for the energy, (B, C, H, W) each."""

    moved: Tensor
    contrast: Tensor


@dataclass(frozen=True)
class DAT(Stateless):
    """``CE(x̂, y) + BCE(1 at s(x), 0 at s(x_out'))``, ``s = logsumexp f = -E(x)``: Yin et al. (2025), as in their code.

    With R1 the loss is ``mean CE + ½ [mean -log σ(s(x)) + mean -log(1 - σ(s(x_out')))] + r1 · ½ mean ‖∇s(x)‖²``: the
    BCE is one mean over both sets, as in ``binary-at``.

    x_out' (contrast images) are outside images after K unit steps that raise the logit of the class of the image they
    are paired with, within [0, 1] but in no ball.  K grows as the model learns to tell data from contrast images.  s
    tells data from other images; it is not a log-density.

    It is a second training stage: start from weights trained with ``at``, given by ``before`` or ``init``.  Batch norm
    uses its running statistics throughout and never updates them.  The classifier gets images augmented by
    ``augment.x``, like the first stage; the energy gets images augmented by ``augment.view``, less distorted in the
    paper.

    Attributes:
        attack: the search for x̂; radius, steps and start are those of the authors' code for CIFAR-10.
        ascend: what contrast images raise: ``class``, f_y as in the code, or ``marginal``, s as in the paper.  The
            AUROC that K depends on is computed from the same quantity.
        step_size: length of a unit step, in pixels of [0, 1].
        curriculum: how K grows; the code's gate is 0.8, or 0.7 for better samples, over 1,000 images.
        r1: weight of ``½ E‖∇s‖²`` at the data; the paper needs none, as training on x̂ keeps gradients small.
    """

    attack: Attack = Attack(eps=0.5, norm="l2", steps=10, step_size=0.1, start="clean")
    ascend: Literal["class", "marginal"] = "class"
    step_size: float = 0.1
    curriculum: Curriculum = Curriculum(steps=50)
    r1: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"labels", "view", "outside"})
    cites: ClassVar[tuple[str, ...]] = ("yin2025dat", "binary-at")

    def __post_init__(self) -> None:
        check_choices(self)
        if not (self.step_size > 0 and self.r1 >= 0):
            raise UserError(f"step_size must be > 0 and r1 >= 0, got {self.step_size} and {self.r1}")

    def init(self, like: Tensor, generator: torch.Generator) -> CurriculumState:
        return self.curriculum.init()

    def search(self, model: nn.Module, batch: Batch, state: CurriculumState, ctx: Context) -> DATResult:
        """Return adversarial images of the data, and outside images moved towards the data; advance K before."""
        assert batch.outside is not None
        self.curriculum.advance(state, ctx.images)
        descent = Descent(state.steps, self.step_size, unit, box())
        with searching(model, view=ctx.view) as f:
            x_adv = self.attack.raise_loss(f, batch.x, batch.y, ctx.generator)
            return DATResult(x_adv, descent(lambda x: self._energy(f(x), batch.y), batch.outside))

    def loss(self, model: nn.Module, batch: Batch, found: DATResult, state: CurriculumState, ctx: Context) -> Loss:
        """Return the sum of both terms, plus the weighted R1 penalty, which takes a double backward pass."""
        assert batch.view is not None
        with freeze_batch_norms(model):
            x = torch.cat([found.moved, batch.view, found.contrast])
            logits, data, contrast = model(x).split(len(batch.y))
            penalty = r1(lambda x: energies.marginal(model(x)), batch.view) if self.r1 else None
        real, fake = energies.marginal(data), energies.marginal(contrast)
        binary = energies.logistic(real, fake) / 2
        total = energies.conditional(logits, batch.y).mean() + binary
        terms = {"binary": binary.detach()}
        if penalty is not None:
            total, terms["r1"] = total + self.r1 * penalty, penalty.detach()
        with torch.no_grad():
            terms |= {
                "loss": total.detach(),
                "accuracy": accuracy(logits, batch.y),
                "energy_joint": energies.joint(logits, batch.y).mean(),
                "energy_marginal": energies.marginal(logits).mean(),
                "energy_data": real.mean(),
                "energy_negative": fake.mean(),
                "auroc": auroc(self._energy(data, batch.y), self._energy(contrast, batch.y)),
                "steps": torch.full_like(total, state.steps),
            }
        return Loss(total, terms)

    def after(
        self, model: nn.Module, batch: Batch, found: DATResult, state: CurriculumState, loss: Loss, ctx: Context
    ) -> None:
        state.note(loss.terms["auroc"][None], ctx.images)

    def adversarial(self, batch: Batch, found: DATResult) -> Tensor:
        return found.moved

    def _energy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the energy (B,) that contrast images descend, from logits (B, K)."""
        return energies.joint(logits, y) if self.ascend == "class" else energies.marginal(logits)
