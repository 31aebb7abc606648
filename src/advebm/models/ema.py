"""An exponential moving average of a network: weights and batch-norm statistics."""

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Average a model at every step: ``average ← decay · average + (1 - decay) · model``.

    Parameters and floating-point buffers are averaged, other buffers copied.  The decay is given as a half-life in
    images, so that it does not depend on the batch size: after ``half_life`` images a value's weight has halved.  At
    the start the half-life is at most a tenth of the images seen, so that the random first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, half_life: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.half_life = half_life

    @torch.no_grad()
    def update(self, model: nn.Module, images: int, batch: int) -> None:
        """Update the average after a step on ``batch`` images; ``images`` have been seen in all, these included."""
        half_life = min(self.half_life, images / 10)
        keep = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if average.dtype.is_floating_point:
                average.lerp_(value, 1 - keep)
            else:
                average.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()
