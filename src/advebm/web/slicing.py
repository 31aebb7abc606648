"""The tab Landscape: the energy in a plane, with the path of a chain drawn on it."""

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from matplotlib import patheffects
from PIL.Image import Image
from torch import Tensor

from advebm.core.errors import UserError, unknown_name
from advebm.core.rng import generator
from advebm.diagnostics import landscape
from advebm.models.modes import searching
from advebm.samplers.base import Sampler, joint_or_marginal
from advebm.web import views
from advebm.web.inputs import parse_integer
from advebm.web.jobs import Job
from advebm.web.studio import Studio

PlaneKind = Literal["path", "gradient", "random"]
GRID_POINTS = 25  # points along each direction; must be odd
STEPS = 500  # upper limit of the tab


class LandscapeShown(NamedTuple):
    """What a slice of the energy landscape shows: its figure, images along the path, a sentence."""

    figure: Image | None
    film: Image
    note: str


class Plane(NamedTuple):
    """A plane and the projection of a path onto it.

    Attributes:
        centre: centre of the plane, (C, H, W).
        first, second: orthogonal directions of length 1, (C, H, W).
        at: coordinates of the path's points, (N, 2), pixels of [0, 1].
        share: share of the path's summed squared distances from the centre that lies within the plane.
    """

    centre: Tensor
    first: Tensor
    second: Tensor
    at: Tensor
    share: float


def leading_directions(path: Tensor) -> tuple[Tensor, Tensor]:
    """Return two directions of a plane for a path (N, C, H, W): from its first to its last point, and its widest bend.

    The second is the first principal component of the path after the first direction is removed.
    """
    flat = path.flatten(1).double()
    first = flat[-1] - flat[0]
    if len(path) < 3 or not first.any():
        raise UserError("a path that does not move spans no plane; take more steps")
    first = first / first.norm()
    remainder = flat - flat[0]
    remainder = remainder - (remainder @ first)[:, None] * first
    _, _, axes = torch.linalg.svd(remainder - remainder.mean(0), full_matrices=False)
    second = axes[0] - (axes[0] @ first) * first
    return first.view_as(path[0]).to(path), (second / second.norm()).view_as(path[0]).to(path)


def project_path(path: Tensor, centre: Tensor, first: Tensor, second: Tensor) -> Plane:
    """Project a path (N, C, H, W) onto the plane through ``centre`` with orthonormal directions."""
    away = (path - centre).flatten(1).double()
    at = torch.stack([away @ first.flatten().double(), away @ second.flatten().double()], 1)
    share = at.square().sum() / away.square().sum().clamp_min(1e-12)
    return Plane(centre, first, second, at, share.item())


def slice_energy(studio: Studio, sampler: Sampler, kind: str, through: str, seed: Any, job: Job) -> LandscapeShown:
    """Run a chain and measure E(x, y), of a critic E(x), in a plane around its path.

    The centre is the midpoint of the chain's two ends for ``path``, the chain's end for ``gradient`` and ``random``.
    """
    if through not in get_args(PlaneKind):
        raise unknown_name("plane", through, get_args(PlaneKind))
    parse_integer(sampler.steps, "K, the number of steps", 2, STEPS)
    y, number = studio.labels(kind, 1), parse_integer(seed, "the seed", 0, 2**31)
    points: list[Tensor] = []
    with studio.search(job) as model, searching(model) as f:
        initial, draws = studio.seeds(sampler, y, number)
        y = y.to(initial.device)
        end = sampler(model, y, initial, generator=draws, observe=lambda k, x, value: points.append(x))
        path = torch.cat([*points, end])
        frame_steps = sorted({round(k) for k in np.linspace(0, len(path) - 1, 9)})
        film = views.film_sheet(path[frame_steps][None])
        job.tell(LandscapeShown(None, film, "the chain is drawn; measuring the energy around it"))
        energy = joint_or_marginal(f, end, y)
        if through == "path":
            centre = (path[0] + path[-1]) / 2
            first, second = leading_directions(path)
        else:
            centre = path[-1]
            directions = landscape.directions(through, end, energy, generator(number, "page-plane", device=end.device))  # type: ignore[arg-type]
            first, second = directions[0][0], directions[1][0]
        plane = project_path(path, centre, first, second)
        reach = 1.25 * max(plane.at.abs().max().item(), 0.2)
        energy_of = lambda index: joint_or_marginal(f, end, y.expand(len(index)))
        values = landscape.plane(energy_of, centre[None], first[None], second[None], reach=reach, count=GRID_POINTS)[0]
    symbol = "E(x)" if studio.critic else f"E(x, {studio.name(int(y))})"
    where = "middle" if through == "path" else "end"
    note = (
        f"{symbol} up to an l2 distance of {reach:.2g} from the {where} of the path (pixel values in [0, 1]); "
        f"the plane captures {100 * plane.share:.0f} % of the path's squared distances from there"
    )
    return LandscapeShown(draw_slice(values, reach, plane.at, symbol), film, note)


def draw_slice(values: Tensor, reach: float, at: Tensor, symbol: str) -> Image:
    """Draw contours of the values (n, n) of :func:`advebm.diagnostics.landscape.plane`, and a path (N, 2) on them."""
    axis_values = np.linspace(-reach, reach, len(values))
    with views.figure(size=(6.4, 5.2), **{"axes.grid": False}) as (figure, axis):
        contours = axis.contourf(axis_values, axis_values, values.T, levels=24, cmap="viridis")
        figure.colorbar(contours, ax=axis, label=f"{symbol}, nats, 0 at the centre")
        axis.plot(*at.T, color="white", lw=1.2)
        axis.scatter(at[:, 0], at[:, 1], s=8, c=np.arange(len(at)), cmap="autumn_r", zorder=3)
        side = -1 if at[:, 1].mean() > at[[0, -1], 1].mean() else 1  # avoid the path
        edge = [patheffects.withStroke(linewidth=2, foreground="#333333")]
        for name, point in (("start", at[0]), ("image", at[-1])):
            options: Any = {"textcoords": "offset points", "ha": "center", "va": "center", "path_effects": edge}
            axis.annotate(name, (point[0].item(), point[1].item()), (0, 12 * side), color="white", **options)
        axis.set(xlabel="first direction (pixels of [0, 1], l2)", ylabel="second direction", aspect="equal")
        return views.to_picture(figure)
