"""What happens along chains: gradients of both energies, long runs, and runs between two seeds."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core.errors import UserError
from advebm.descent import value_and_gradient
from advebm.models.modes import searching
from advebm.samplers.base import Sampler, marginal


class Slopes(NamedTuple):
    """Lengths of input gradients along chains, each (steps, B), nats / pixel."""

    joint: Tensor
    marginal: Tensor

    @property
    def share(self) -> Tensor:
        """``‖∇E(x, y)‖ / (‖∇E(x, y)‖ + ‖∇E(x)‖)``, one half where they are equal."""
        return self.joint / (self.joint + self.marginal).clamp_min(1e-12)


def slopes(model: nn.Module, sampler: Sampler, y: Tensor, begin: Tensor, generator: torch.Generator) -> Slopes:
    """Gradients of ``E(x, y)`` and ``E(x)`` at each step of a sampler's own chains, JEAT figures 12 and 13."""
    with searching(model) as f:
        if f(begin[:1]).numel() == 1:
            raise UserError("gradients of E(x, y) and E(x) take a classifier; a critic has one energy")
    joint: list[Tensor] = []
    both: list[Tensor] = []

    def look(k: int, x: Tensor, value: Tensor) -> None:
        with searching(model) as f:
            for energy, found in ((lambda v: energies.joint(f(v), y), joint), (marginal(f), both)):
                found.append(value_and_gradient(energy, x)[1].flatten(1).norm(dim=1).double().cpu())

    sampler(model, y, begin, generator=generator, observe=look)
    return Slopes(torch.stack(joint), torch.stack(both))


class Chain(NamedTuple):
    """Chains at the steps that were looked at.

    Attributes:
        steps: which.
        energy: ``E(x)`` there, (len(steps), B), nats.
        slope: ``‖∇E(x)‖``, nats / pixel: r of Nijkamp et al. (2019), before it is averaged.
        saturated: share of pixels that lie on the border of [0, 1].
        x: the chains, (len(steps), B, C, H, W).
    """

    steps: list[int]
    energy: Tensor
    slope: Tensor
    saturated: Tensor
    x: Tensor

    def strength(self, data: float) -> Tensor:
        """d of Nijkamp et al. (2019): mean energy of data minus that of the chains, at each step."""
        return data - self.energy.mean(1)

    def drift(self) -> tuple[float, float]:
        """Change of the mean energy from the third to the last quarter of the run, and its standard error over chains.

        Within twice its error of 0 the chains may have a steady state; far from it they have none yet.
        """
        last, quarter = self.steps[-1], [s / self.steps[-1] for s in self.steps]
        third = [i for i, s in enumerate(quarter) if 0.5 <= s < 0.75]
        fourth = [i for i, s in enumerate(quarter) if s >= 0.75]
        if not third or not fourth or last == 0:
            raise UserError("drift takes looks in the third and in the last quarter of a run")
        change = self.energy[fourth].mean(0) - self.energy[third].mean(0)
        return change.mean().item(), (change.std() / len(change) ** 0.5).item()


def chain(
    model: nn.Module, sampler: Sampler, y: Tensor, begin: Tensor, generator: torch.Generator, *, looks: int = 60
) -> Chain:
    """Chains of a sampler, looked at ``looks`` times at equal distances, the first and the last point among them."""
    when = sorted({round(k * sampler.steps / (looks - 1)) for k in range(looks)})
    seen: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def look(k: int, x: Tensor, value: Tensor) -> None:
        if k in when:
            with searching(model) as f:
                energy, gradient = value_and_gradient(marginal(f), x)
            border = ((x <= 0) | (x >= 1)).flatten(1).double().mean(1)
            seen.append((k, energy, gradient.flatten(1).norm(dim=1), border, x))

    end = sampler(model, y, begin, generator=generator, observe=look)
    look(sampler.steps, end, end)
    columns = [torch.stack([s[i] for s in seen]).cpu() for i in range(1, 5)]  # type: ignore[misc]
    return Chain([s[0] for s in seen], columns[0].double(), columns[1].double(), columns[2], columns[3])


def between(first: Tensor, second: Tensor, centre: Tensor, count: int) -> Tensor:
    """Seeds on the way from ``first`` to ``second`` (B, C, H, W): (B, count, C, H, W), ends included.

    ``μ + cos(t) (a - μ) + sin(t) (b - μ)`` for t from 0 to π/2 is distributed as the ends are, if these are Gaussian
    about ``centre`` μ; a straight line would lose half of the variance in the middle.
    """
    if count < 2:
        raise UserError(f"an interpolation has at least its 2 ends, got {count}")
    angle = torch.linspace(0, torch.pi / 2, count, dtype=first.dtype, device=first.device).view(1, -1, 1, 1, 1)
    a, b = ((x - centre)[:, None] for x in (first, second))
    return (centre[:, None] + angle.cos() * a + angle.sin() * b).clamp(0, 1)
