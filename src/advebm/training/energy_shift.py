"""Measure how the attack and the weight update change the energy during training, JEAT eq. 15."""

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.models.modes import searching
from advebm.objectives.base import Batch


class EnergyShift:
    """Changes of E(x, y) and E(x) caused by the attack (x -> x̂) and by the weight update (E -> E').

    ``Δ_x E = E(x̂) - E(x)`` before the update, ``Δ_θ E = E'(x̂) - E(x̂)`` across it, in eval mode.  Construct it before
    the optimiser's step, and call :meth:`terms` after it.
    """

    def __init__(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> None:
        self.model, self.y, self.x_adv = model, batch.y, x_adv.detach()
        self.clean, self.before = self._energies(batch.x), self._energies(self.x_adv)

    def terms(self) -> dict[str, float]:
        """Return mean and standard deviation of each change over the images: ``shift/attack_joint``, ``…_sd``, …"""
        after, terms = self._energies(self.x_adv), {}
        for change, end, start in (("attack", self.before, self.clean), ("update", after, self.before)):
            for name in end:
                difference = end[name] - start[name]
                terms[f"shift/{change}_{name}"] = difference.mean().item()
                terms[f"shift/{change}_{name}_sd"] = difference.std(correction=0).item()
        return terms

    @torch.no_grad()
    def _energies(self, x: Tensor) -> dict[str, Tensor]:
        with searching(self.model) as f:
            logits = f(x)
        return {"joint": energies.joint(logits, self.y), "marginal": energies.marginal(logits)}
