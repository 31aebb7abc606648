"""Binary adversarial training (binary AT) and maximum likelihood on two-dimensional data.

Binary AT = Yin et al. (2022), "Learning energy-based models with adversarial training", whose figure 1 this makes.
Points are (B, 2); pictures and counts cover the square ``[-SIDE, SIDE]²``, which points of binary AT may leave.
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
from advebm.descent import Descent, Energy, box, free, raw, unit
from advebm.models.modes import searching
from advebm.objectives.langevin import contrast
from advebm.toy import densities

SIDE = 4.0
CELL = 0.2  # side of the cells of the grid in which visited places are marked
WIDTH = 64  # units in each of the network's two hidden layers
P0 = ("uniform", "concentrated")


class Sine(nn.Module):
    """``sin`` as activation: an untrained network then has hills and valleys everywhere, as the paper's D."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def network(generator: torch.Generator) -> nn.Module:
    """Return a critic ``(B, 2) -> (B, 1)`` with two hidden layers, its weights drawn from ``generator``."""
    first, second, last = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    with torch.no_grad():
        for layer, gain in ((first, 1.0), (second, 1.0), (last, 2.0)):
            layer.weight.copy_(gain * randn(layer.weight, generator) / layer.in_features**0.5)
            layer.bias.copy_(math.pi * (2 * rand(layer.bias, generator) - 1))
        last.bias.zero_()
    return nn.Sequential(first, Sine(), second, Sine(), last)


def contrastive_points(p0: str, count: int, generator: torch.Generator) -> Tensor:
    """Draw points (count, 2) of p0: ``uniform`` in the square, or ``concentrated`` in its lower left corner."""
    if p0 not in P0:
        raise unknown_name("p0", p0, P0)
    side = 2 * SIDE if p0 == "uniform" else 0.4 * SIDE
    return side * torch.rand(count, 2, generator=generator) - SIDE


@dataclass(frozen=True)
class Method:
    """The settings in which binary AT and maximum likelihood differ, table 1 of the paper.

    Attributes:
        search: descent from p0, or from the previous contrastive points, to the new contrastive points.
        restart: probability that a contrastive point starts from p0 instead of its previous position.
        loss: maps energies of data (B,) and of contrastive points (B,) to the scalar that is minimised.
    """

    search: Descent
    restart: float
    loss: Callable[[Tensor, Tensor], Tensor]


def likelihood(positive: Tensor, negative: Tensor) -> Tensor:
    """Return ``mean E(x) - mean E(x')``, whose gradient estimates that of -log p."""
    return contrast(positive, negative, 0.0)[0]


LANGEVIN = 0.01  # step size; with noise √(2 step) the chain approximately samples exp(-E)
METHODS = {
    # eq. 8, unconstrained; 20 steps of 0.3 reach from the corner to the middle of the square
    "binary-at": Method(Descent(20, 0.3, unit, free), 1.0, energies.logistic),
    "mle": Method(Descent(20, LANGEVIN, raw, box(-SIDE, SIDE), (2 * LANGEVIN) ** 0.5), 0.01, likelihood),
}


@dataclass(frozen=True)
class Frame:
    """State of a training at one moment.

    Attributes:
        update: number of updates done so far.
        model: copy of the model, ``(B, 2) -> (B, 1)``; its energy is the negative output.
        began, ended: contrastive points (B, 2) of the next update, before and after their search.
    """

    update: int
    model: nn.Module
    began: Tensor
    ended: Tensor


@dataclass(frozen=True)
class ToyRun:
    """A finished training with recorded frames.

    Attributes:
        density, method, p0: names.
        frames: recorded frames, the first before and the last after training.
        visited: (N, N) bool, cells [y, x] of the square in which any contrastive point was, starting points included.
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
    """Train a critic on samples of a density.

    Args:
        density: a name in :data:`advebm.toy.densities.DENSITIES`.
        method: a name in :data:`METHODS`.
        p0: ``uniform`` or ``concentrated``.
        seed: seed of the network and of all random numbers.
        updates: number of Adam steps; the learning rate falls linearly to a twentieth.
        batch: number of data points, and of contrastive points, in an update.
        rate: initial learning rate of Adam.
        frames: number of frames to keep, at the most: dense at first, their update numbers grow quadratically.
        watch: called with each frame when it is recorded; an exception from it ends the training.

    Raises:
        UserError: an unknown name, ``updates`` or ``batch`` below 1, ``frames`` below 2.
    """
    if updates < 1 or batch < 1 or frames < 2:
        raise UserError(f"updates and batch must be at least 1 and frames 2, got {updates}, {batch} and {frames}")
    data = densities.find_density(density)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    settings, draws = METHODS[method], seeded("toy", seed)
    model = network(draws)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, updates)
    history, moments = [], {round(updates * (k / (frames - 1)) ** 2) for k in range(frames)}
    cells = round(2 * SIDE / CELL)
    visited = torch.zeros(cells, cells, dtype=torch.bool)
    chains = contrastive_points(p0, batch, draws)
    for update in range(updates + 1):
        fresh = torch.rand(batch, 1, generator=draws) < settings.restart
        began = torch.where(fresh, contrastive_points(p0, batch, draws), chains)
        chains, path = move_contrastive(model, settings, began, draws)
        mark_visited(visited, path)
        if update in moments:
            history.append(Frame(update, copy.deepcopy(model), began, chains))
            watch(history[-1])
        if update < updates:
            positive, negative = energies.binary(model(torch.cat([data.sample(batch, draws), chains]))).chunk(2)
            optimizer.zero_grad()
            settings.loss(positive, negative).backward()
            optimizer.step()
            schedule.step()
    return ToyRun(density, method, p0, tuple(history), visited)


def move_contrastive(model: nn.Module, how: Method, began: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a model's contrastive points (B, 2), and all points of the search from start to end, (·, 2)."""
    path: list[Tensor] = []
    with searching(model) as f:
        energy: Energy = lambda x: energies.binary(f(x))
        ended = how.search(energy, began, generator=draws, observe=lambda k, x, value: path.append(x))
    return ended, torch.cat([*path, ended])


def mark_visited(visited: Tensor, x: Tensor) -> None:
    """Set the cells of ``visited`` (N, N), [y, x], that contain points (B, 2); ignore points outside the square."""
    cells = len(visited)
    column, row = ((x + SIDE) * (cells / (2 * SIDE))).floor().long().unbind(1)
    inside = (column >= 0) & (column < cells) & (row >= 0) & (row < cells)
    visited[row[inside], column[inside]] = True


def plane_points(cells: int = round(2 * SIDE / CELL)) -> Tensor:
    """Return the centres of the cells of the square, (cells, cells, 2): (x, y) at [row, column]."""
    middles = (torch.arange(cells) + 0.5) * (2 * SIDE / cells) - SIDE
    return torch.stack(torch.meshgrid(middles, middles, indexing="xy"), 2)


@torch.no_grad()
def energy(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``E(x) = -f(x)`` of points: (..., 2) -> (...)."""
    return energies.binary(model(x.reshape(-1, 2))).view(x.shape[:-1])


def summarize(result: ToyRun, *, seed: int = 0, count: int = 5_000) -> dict[str, float]:
    """Return the numbers of a training by name, from ``count`` new samples and the cells of the square.

    The support of the data is approximated by the smallest region that contains a given share of its mass.  ``D on
    support`` and ``deviation`` are the mean and standard deviation of D over the densest 95 % of the samples.  ``D off
    support`` and ``highest off`` are the mean and maximum over cells outside the 99.9 % region, and ``highest
    unvisited`` is the maximum over those that no contrastive point visited (left out if there are none).  These, and
    the ``objective``, whose optimum is -log 4 ≈ -1.386 by proposition 1, exist for binary AT only.  ``correlation`` and
    ``slope`` are those of -E against log p over the samples: 1 and 1 if the energy is that of the density, slope 0 if
    it only tells the support.
    """
    data, last = densities.find_density(result.density), result.frames[-1]
    x = data.sample(count, seeded("toy-numbers", seed))
    truth, learnt = data.log_density(x), -energy(last.model, x)
    numbers: dict[str, float] = {}
    if result.method == "binary-at":
        dense, sparse = truth.quantile(0.05), truth.quantile(0.001)
        points = plane_points()
        d = energy(last.model, points).neg().sigmoid()
        off = data.log_density(points.view(-1, 2)).view(d.shape) < sparse
        on = learnt.sigmoid()[truth >= dense]
        numbers |= {"D on support": on.mean().item(), "deviation": on.std().item()}
        numbers |= {"D off support": d[off].mean().item(), "highest off": d[off].max().item()}
        if (unvisited := off & ~result.visited).any():
            numbers["highest unvisited"] = d[unvisited].max().item()
        numbers["objective"] = -energies.logistic(-learnt, energy(last.model, last.ended)).item()
    pair = torch.stack([learnt, truth])
    slope = torch.cov(pair)[0, 1].item() / truth.var().item()
    return numbers | {"correlation": torch.corrcoef(pair)[0, 1].item(), "slope": slope}
