"""What can be seen of training: changes of the energy, JEAT eq. 15."""

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.models.modes import searching
from advebm.objectives.base import Batch


class EnergyShift:
    """Change of E(x, y) and E(x) by the attack, and of the attacked images' energies by the update of the weights.

    ``Δ_x E = E(x̂) - E(x)`` before the update, ``Δ_θ E = E'(x̂) - E(x̂)`` across it, in eval mode.  Made before the
    optimiser's step; :meth:`terms` is called after it.
    """

    def __init__(self, model: nn.Module, batch: Batch, moved: Tensor) -> None:
        self.model, self.y, self.moved = model, batch.y, moved.detach()
        self.clean, self.before = self._energies(batch.x), self._energies(self.moved)

    def terms(self) -> dict[str, float]:
        """Mean and deviation over the images of each change, as ``shift/attack_joint``, ``…_sd`` and so on."""
        after, found = self._energies(self.moved), {}
        for change, to, of in (("attack", self.before, self.clean), ("update", after, self.before)):
            for name in to:
                difference = to[name] - of[name]
                found[f"shift/{change}_{name}"] = difference.mean().item()
                found[f"shift/{change}_{name}_sd"] = difference.std(correction=0).item()
        return found

    @torch.no_grad()
    def _energies(self, x: Tensor) -> dict[str, Tensor]:
        with searching(self.model) as f:
            logits = f(x)
        return {"joint": energies.joint(logits, self.y), "marginal": energies.marginal(logits)}
