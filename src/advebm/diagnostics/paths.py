"""Measurements along sampling chains: gradients of both energies, long chains, interpolation between two seeds."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core.errors import UserError
from advebm.descent import value_and_gradient
from advebm.models.modes import searching
from advebm.samplers.base import Sampler, marginal


class GradientNorms(NamedTuple):
    """l2 norms of the input gradients of E(x, y) and E(x) along chains, each (steps, B), nats / pixel."""

    joint: Tensor
    marginal: Tensor

    @property
    def share(self) -> Tensor:
        """``‖∇E(x, y)‖ / (‖∇E(x, y)‖ + ‖∇E(x)‖)``: one half if they are equal."""
        return self.joint / (self.joint + self.marginal).clamp_min(1e-12)


def slopes(model: nn.Module, sampler: Sampler, y: Tensor, begin: Tensor, generator: torch.Generator) -> GradientNorms:
    """Measure a classifier's gradients of ``E(x, y)`` and ``E(x)`` along a sampler's chains, JEAT figures 12 and 13."""
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
    return GradientNorms(torch.stack(joint), torch.stack(both))


class Chain(NamedTuple):
    """States of B chains at selected steps.

    Attributes:
        steps: the selected steps.
        energy: ``E(x)`` at these steps, (len(steps), B), nats.
        slope: ``‖∇E(x)‖``, (len(steps), B), nats / pixel: r of Nijkamp et al. (2019), before it is averaged.
        saturated: share of pixel values that are 0 or 1, (len(steps), B).
        x: the images, (len(steps), B, C, H, W).
    """

    steps: list[int]
    energy: Tensor
    slope: Tensor
    saturated: Tensor
    x: Tensor

    def strength(self, data: float) -> Tensor:
        """Return d of Nijkamp et al. (2019): mean energy ``data`` of real images minus that of chains, at each step."""
        return data - self.energy.mean(1)

    def drift(self) -> tuple[float, float]:
        """Return the change of mean energy from the third to the last quarter of the steps, and its standard error.

        The error is over chains.  If 0 lies within twice the error, the chains may have reached a steady state;
        otherwise they have not.
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
    """Run chains of a sampler and record them at ``looks`` evenly spaced steps, the first and the last included."""
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
    """Interpolate from ``first`` to ``second`` (B, C, H, W): (B, count, C, H, W) with both ends, clamped to [0, 1].

    ``μ + cos(t) (a - μ) + sin(t) (b - μ)`` for t from 0 to π/2 has the distribution of the ends a and b if these are
    Gaussian with mean ``centre`` μ; on a straight line the variance would be halved in the middle.
    """
    if count < 2:
        raise UserError(f"an interpolation has at least its 2 ends, got {count}")
    angle = torch.linspace(0, torch.pi / 2, count, dtype=first.dtype, device=first.device).view(1, -1, 1, 1, 1)
    a, b = ((x - centre)[:, None] for x in (first, second))
    return (centre[:, None] + angle.cos() * a + angle.sin() * b).clamp(0, 1)
