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
    joint_norms: list[Tensor] = []
    marginal_norms: list[Tensor] = []

    def record(k: int, x: Tensor, value: Tensor) -> None:
        with searching(model) as f:
            for energy, norms in ((lambda v: energies.joint(f(v), y), joint_norms), (marginal(f), marginal_norms)):
                norms.append(value_and_gradient(energy, x)[1].flatten(1).norm(dim=1).cpu().double())

    sampler(model, y, begin, generator=generator, observe=record)
    return GradientNorms(torch.stack(joint_norms), torch.stack(marginal_norms))


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
        last = self.steps[-1]
        third = [i for i, step in enumerate(self.steps) if 0.5 * last <= step < 0.75 * last]
        fourth = [i for i, step in enumerate(self.steps) if step >= 0.75 * last]
        if not third or not fourth or last == 0:
            raise UserError("drift takes looks in the third and in the last quarter of a run")
        change = self.energy[fourth].mean(0) - self.energy[third].mean(0)
        return change.mean().item(), (change.std() / len(change) ** 0.5).item()


def chain(
    model: nn.Module, sampler: Sampler, y: Tensor, begin: Tensor, generator: torch.Generator, *, looks: int = 60
) -> Chain:
    """Run chains of a sampler and record them at ``looks`` evenly spaced steps, the first and the last included."""
    selected = {round(k * sampler.steps / (looks - 1)) for k in range(looks)}
    steps: list[int] = []
    states: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def record(k: int, x: Tensor, value: Tensor) -> None:
        if k in selected:
            with searching(model) as f:
                energy, gradient = value_and_gradient(marginal(f), x)
            saturated = ((x <= 0) | (x >= 1)).flatten(1).cpu().double().mean(1)
            steps.append(k)
            states.append((energy, gradient.flatten(1).norm(dim=1), saturated, x))

    end = sampler(model, y, begin, generator=generator, observe=record)
    record(sampler.steps, end, end)
    energy, slope, saturated, x = (torch.stack(column).cpu() for column in zip(*states, strict=True))
    return Chain(steps, energy.double(), slope.double(), saturated, x)


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
