"""What can be seen of training: changes of the energy, JEAT eq. 15, and what a step costs."""

import torch
from torch import Tensor, nn

from advebm import energies, seeds
from advebm.modes import searching
from advebm.objectives.base import Batch, Context
from advebm.objectives.curriculum import Level
from advebm.training.recipe import Recipe, design


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


def passes(recipe: Recipe, images: int = 4) -> tuple[float, float]:
    """Forward and backward passes of the network that a recipe's objective takes an image, counted on one batch.

    Of a search that grows, at its longest.
    """
    data, counts = recipe.data.load(), [0, 0]
    model = design(recipe, data).build(recipe.seed).train()

    def backward(gradient: Tensor) -> None:
        counts[1] += len(gradient)

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        counts[0] += len(out)
        if out.requires_grad:
            out.register_hook(backward)

    model.register_forward_hook(forward)
    part = data.train.take(slice(images))
    x, objective, generator = part.float(), recipe.objective, seeds.generator(recipe.seed)
    batch = Batch(x, part.y, view=x, outside=x, extra=x)
    state = objective.init(x, generator)
    if isinstance(state, Level):
        state.steps = state.largest
    ctx = Context(generator, recipe.train.images)
    for replay in range(objective.replays):
        found = objective.search(model, batch, state, ctx)
        loss = objective.loss(model, batch, found, state, ctx)
        loss.total.backward()
        if replay < objective.replays - 1:  # what is done after a step is not part of it
            objective.after(model, batch, found, state, loss, ctx)
    return counts[0] / images, counts[1] / images
