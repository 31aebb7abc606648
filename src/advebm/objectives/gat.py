"""One detector per class, each trained against images of other classes that are moved towards its class."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.attacks.projected import Attack
from advebm.models.modes import freeze_batch_norms, searching
from advebm.objectives.base import Batch, Context, Loss, Stateless, accuracy
from advebm.objectives.curriculum import auroc


class GATResult(NamedTuple):
    """Images moved towards another class, (B, C, H, W), and that class, (B,)."""

    moved: Tensor
    target: Tensor


@dataclass(frozen=True)
class GAT(Stateless):
    """``-log D_y(x) - log (1 - D_t(x̂))`` with ``D_k = σ(f_k)``: Yin et al. (2020); x̂ raises f_t, of another class t.

    The K detectors of the paper are K networks; here they are K outputs of one.  Each image is a positive of its own
    class and, after the attack, a negative of one other class drawn uniformly, so that on average a detector sees
    as many negatives as positives, as in the authors' code, and one search per batch serves all detectors.  The loss is
    one mean over both sets, that is half the sum of their means.

    Argmax f_k is the paper's generative classifier.  To detect attacks on another classifier, which predicts ŷ: an
    image is judged adversarial where f_ŷ is low.

    Training starts from the weights of standard training, given by ``before`` or ``init``.  Batch norm uses its running
    statistics throughout and never updates them, as in the authors' code.

    Attributes:
        attack: the search for x̂, with the code's settings for CIFAR-10; its ``loss`` is not used.
    """

    attack: Attack = Attack(eps=8 / 255, steps=40, step_size=0.5 / 255)

    cites: ClassVar[tuple[str, ...]] = ("yin2020gat",)

    def search(self, model: nn.Module, batch: Batch, state: None, ctx: Context) -> GATResult:
        with searching(model, view=ctx.view) as f:
            with torch.no_grad():
                classes = f(batch.x[:1]).shape[1]
            shift = torch.randint(1, classes, batch.y.shape, generator=ctx.generator, device=batch.y.device)
            target = (batch.y + shift) % classes
            x_adv = self.attack.minimize(lambda x: energies.joint(f(x), target), batch.x, ctx.generator)
        return GATResult(x_adv, target)

    def loss(self, model: nn.Module, batch: Batch, found: GATResult, state: None, ctx: Context) -> Loss:
        with freeze_batch_norms(model):
            clean, adversarial = model(torch.cat([batch.x, found.moved])).split(len(batch.y))
        positive, negative = energies.joint(clean, batch.y), energies.joint(adversarial, found.target)
        total = energies.logistic(positive, negative) / 2
        with torch.no_grad():
            terms = {
                "loss": total.detach(),
                "accuracy": accuracy(clean, batch.y),
                "energy_joint": positive.mean(),
                "energy_negative": negative.mean(),
                "auroc": auroc(positive, negative),
            }
        return Loss(total, terms)
