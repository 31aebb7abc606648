"""Energies of the plane: binary adversarial training and maximum likelihood where everything can be seen.

Binary AT = Yin et al. (2022), "Learning energy-based models with adversarial training", whose figure 1 this makes.
Points are (B, 2); the square ``[-SIDE, SIDE]²`` is what is looked at, nothing keeps points inside it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advebm import energies
from advebm.core.errors import UserError, unknown_name
from advebm.core.rng import generator as seeded
from advebm.core.rng import rand, randn
from advebm.descent import Descent, box, free, raw, unit
from advebm.models.modes import searching
from advebm.objectives.langevin import contrast
from advebm.toy import densities

SIDE = 4.0
CELL = 0.2  # side of the cells in which visits are counted
WIDTH = 64  # of the network's two hidden layers
P0 = ("uniform", "concentrated")


class Sine(nn.Module):
    """``sin``: a network of them begins with hills and valleys everywhere, as the paper's D does."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` -> the same shape."""
        return x.sin()


def network(generator: torch.Generator) -> nn.Module:
    """A critic ``(B, 2) -> (B, 1)`` of two hidden layers, all of its weights drawn from ``generator``."""
    first, second, last = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    with torch.no_grad():
        for layer, gain in ((first, 1.0), (second, 1.0), (last, 2.0)):
            layer.weight.copy_(gain * randn(layer.weight, generator) / layer.in_features**0.5)
            layer.bias.copy_(math.pi * (2 * rand(layer.bias, generator) - 1))
        last.bias.zero_()
    return nn.Sequential(first, Sine(), second, Sine(), last)


def contrastive_points(p0: str, count: int, generator: torch.Generator) -> Tensor:
    """Points of p0, (count, 2): ``uniform`` in the square, or ``concentrated`` in its lower left corner."""
    if p0 not in P0:
        raise unknown_name("p0", p0, P0)
    side = 2 * SIDE if p0 == "uniform" else 0.4 * SIDE
    return side * torch.rand(count, 2, generator=generator) - SIDE


@dataclass(frozen=True)
class Method:
    """What tells binary AT from maximum likelihood, table 1 of the paper; the training is the same.

    Attributes:
        search: the steps from p0, or from where the chains were, to contrastive points.
        restart: probability that a contrastive point begins anew from p0 instead of where it was.
        loss: energies of data (B,) and of contrastive points (B,) -> what is minimised, a scalar.
    """

    search: Descent
    restart: float
    loss: Callable[[Tensor, Tensor], Tensor]


def likelihood(positive: Tensor, negative: Tensor) -> Tensor:
    """``mean E(x) - mean E(x')``, whose gradient is that of -log p."""
    return contrast(positive, negative, 0.0)[0]


LANGEVIN = 0.01  # step; with noise √(2 step) the chain's law tends to exp(-E)
METHODS = {
    # eq. 8, unconstrained; 20 steps of 0.3 reach from the corner to the middle of the square
    "binary-at": Method(Descent(20, 0.3, unit, free), 1.0, energies.logistic),
    "mle": Method(Descent(20, LANGEVIN, raw, box(-SIDE, SIDE), (2 * LANGEVIN) ** 0.5), 0.01, likelihood),
}


def find_method(name: str) -> Method:
    """A method by its name.

    Raises:
        UserError: there is none of that name.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


@dataclass(frozen=True)
class Frame:
    """One moment of a training.

    Attributes:
        update: how many updates came before.
        model: as it was, ``(B, 2) -> (B, 1)``; its energy is the negative output.
        began, ended: contrastive points (B, 2) of the next update, before and after their search.
    """

    update: int
    model: nn.Module
    began: Tensor
    ended: Tensor


@dataclass(frozen=True)
class ToyRun:
    """A training that was watched.

    Attributes:
        density, method, p0: names.
        frames: moments, the first before and the last after training.
        visited: (N, N) bool, cells [y, x] of the square that any contrastive point passed through, from its start on.
    """

    density: str
    method: str
    p0: str
    frames: tuple[Frame, ...]
    visited: Tensor


def train_toy(
    density: str,
    method: str = "binary-at",
    p0: str = "uniform",
    *,
    seed: int = 0,
    updates: int = 300,
    batch: int = 192,
    rate: float = 5e-3,
    frames: int = 21,
    watch: Callable[[Frame], None] = lambda frame: None,
) -> ToyRun:
    """Train a critic on draws from a density.

    Args:
        density: of :data:`advebm.toy.densities.DENSITIES`.
        method: of :data:`METHODS`.
        p0: ``uniform`` or ``concentrated``.
        seed: of the network and of every draw.
        updates: steps of Adam; the rate falls linearly to a twentieth.
        batch: points of data, and of contrast, an update.
        rate: of Adam, at first.
        frames: moments to keep, at quadratically growing distances.
        watch: told each of them as it comes; what it raises ends the training.

    Raises:
        UserError: an unknown name, or numbers too small.
    """
    if updates < 1 or batch < 1 or frames < 2:
        raise UserError(f"updates and batch are at least 1 and frames 2, got {updates}, {batch} and {frames}")
    data, how, draws = densities.find_density(density), find_method(method), seeded("toy", seed)
    model = network(draws)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
    kept, moments = [], {round(updates * (k / (frames - 1)) ** 2) for k in range(frames)}
    cells = round(2 * SIDE / CELL)
    visited = torch.zeros(cells, cells, dtype=torch.bool)
    chains = contrastive_points(p0, batch, draws)
    for update in range(updates + 1):
        fresh = torch.rand(batch, 1, generator=draws) < how.restart
        began = torch.where(fresh, contrastive_points(p0, batch, draws), chains)
        chains, path = move_contrastive(model, how, began, draws)
        mark_visited(visited, path)
        if update in moments:
            kept.append(Frame(update, copy.deepcopy(model), began, chains))
            watch(kept[-1])
        if update < updates:
            positive, negative = energies.binary(model(torch.cat([data.sample(batch, draws), chains]))).chunk(2)
            optimizer.zero_grad()
            how.loss(positive, negative).backward()
            optimizer.step()
            schedule.step()
    return ToyRun(density, method, p0, tuple(kept), visited)


def move_contrastive(model: nn.Module, how: Method, began: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contrastive points (B, 2) of a model, and every point on the way there, (·, 2)."""
    path: list[Tensor] = []
    with searching(model) as f:
        low = lambda x: energies.binary(f(x))
        ended = how.search(low, began, generator=draws, observe=lambda k, x, value: path.append(x))
    return ended, torch.cat([*path, ended])


def mark_visited(visited: Tensor, x: Tensor) -> None:
    """Set the cells of ``visited`` (N, N), [y, x], that points (B, 2) lie in; points beyond the square have none."""
    cells = len(visited)
    column, row = ((x + SIDE) * (cells / (2 * SIDE))).floor().long().unbind(1)
    inside = (column >= 0) & (column < cells) & (row >= 0) & (row < cells)
    visited[row[inside], column[inside]] = True


def plane_points(cells: int = round(2 * SIDE / CELL)) -> Tensor:
    """Middles of the cells of the square, (cells, cells, 2), at [row, column] the point (x, y)."""
    middles = (torch.arange(cells) + 0.5) * (2 * SIDE / cells) - SIDE
    return torch.stack(torch.meshgrid(middles, middles, indexing="xy"), 2)


@torch.no_grad()
def energy(model: nn.Module, x: Tensor) -> Tensor:
    """``E(x) = -f(x)`` of points (..., 2), as (...)."""
    return energies.binary(model(x.reshape(-1, 2))).view(x.shape[:-1])


def summarize(result: ToyRun, *, seed: int = 0, count: int = 5_000) -> dict[str, float]:
    """What a training came to, by name; on fresh draws and on the cells of the square.

    The support of the data stands for the smallest region of a given share of its mass: ``D on support`` and its
    ``deviation`` are over the draws of the densest 95 %, off the support are the cells beyond 99.9 %, unvisited those
    of them that no contrastive point passed through (left out where there are none).  These and the ``objective``,
    -log 4 ≈ -1.386 by proposition 1, are binary AT's alone.  ``correlation`` and ``slope`` are those of -E with
    log p over the draws: 1 and 1 for an energy that is the density's, and slope 0 for one that knows the support.
    """
    data, last = densities.find_density(result.density), result.frames[-1]
    x = data.sample(count, seeded("toy-numbers", seed))
    truth, learnt = data.log_density(x), -energy(last.model, x)
    found = {}
    if result.method == "binary-at":
        dense, sparse = truth.quantile(0.05), truth.quantile(0.001)
        points = plane_points()
        d = energy(last.model, points).neg().sigmoid()
        off = data.log_density(points.view(-1, 2)).view(d.shape) < sparse
        on = learnt.sigmoid()[truth >= dense]
        found["D on support"] = on.mean().item()
        found["deviation"] = on.std().item()
        found["D off support"] = d[off].mean().item()
        found["highest off"] = d[off].max().item()
        if (never := off & ~result.visited).any():
            found["highest unvisited"] = d[never].max().item()
        found["objective"] = -energies.logistic(-learnt, energy(last.model, last.ended)).item()
    found["correlation"] = torch.corrcoef(torch.stack([learnt, truth]))[0, 1].item()
    found["slope"] = torch.cov(torch.stack([learnt, truth]))[0, 1].item() / truth.var().item()
    return found
