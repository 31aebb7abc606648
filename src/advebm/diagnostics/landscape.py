"""Energy landscapes around images: on planes of two directions (JEAT figure 2), and as numbers over many images."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from advebm.core.errors import UserError
from advebm.core.floats import widen
from advebm.core.rng import randn
from advebm.descent import Energy, per_sample, value_and_gradient
from advebm.models.batching import batch_size_for

Along = Literal["random", "gradient", "pca"]


class LandscapeStatistics(NamedTuple):
    """Shape of the energy around images in their planes; tensors (B,), float64 except ``edge``.

    Attributes:
        offset: l2 distance of the plane's lowest point from the image, in pixels of [0, 1].
        depth: energy of the image minus that of the lowest point, nats.
        edge: bool, whether the lowest point lies on the plane's border, so that the true minimum is further away.
        curvature: mean of the second derivatives along both directions at the image, nats / pixel².
        tilt: length of the gradient within the plane at the image, nats / pixel.
    """

    offset: Tensor
    depth: Tensor
    edge: Tensor
    curvature: Tensor
    tilt: Tensor


def directions(
    along: Along, x: Tensor, energy: Energy, generator: torch.Generator, *, images: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return two orthogonal directions of l2 norm 1 for each image, each (B, C, H, W).

    Args:
        along: ``random`` (Gaussian), ``gradient`` (of the energy, and a random one), or ``pca`` (the first two
            principal components of ``images``, the same for all).
        x: images (B, C, H, W).
        energy: energy whose gradient at ``x`` is used.
        generator: source of random directions.
        images: (N, C, H, W) with N >= 3, needed for ``pca``.
    """
    if along == "pca":
        if images is None or len(images) < 3:
            raise UserError("principal components take at least 3 images")
        away = widen(images.flatten(1))
        away = away - away.mean(0)
        _, shares = torch.linalg.eigh(away @ away.T)  # (N, N), however many pixels; in ascending order
        axes = [_normalise((share @ away)[None])[0] for share in (shares[:, -1], shares[:, -2])]
        axes = [axis * axis[axis.abs().argmax()].sign() for axis in axes]  # makes signs unique
        first, second = (axis.view(1, *x.shape[1:]).expand_as(x).to(x) for axis in axes)
        return first, second
    first = _normalise(value_and_gradient(energy, x)[1] if along == "gradient" else randn(x, generator))
    second = randn(x, generator)
    second = second - per_sample((second * first).flatten(1).sum(1), x) * first
    return first, _normalise(second)


def plane(
    energy_of: Callable[[Tensor], Energy], x: Tensor, first: Tensor, second: Tensor, *, reach: float, count: int = 25
) -> Tensor:
    """Return ``E(x + a·first + b·second) - E(x)`` for a, b from -reach to reach: (B, count, count), a down, b across.

    Points are not clamped, so pixels may lie outside [0, 1].  The batch size follows from the size of the images.

    Args:
        energy_of: takes indices (N,) into ``x``, ascending and with repetitions, and returns an energy for N images
            that belong to those rows.
        x, first, second: (B, C, H, W).
        reach: largest l2 distance along a direction, in pixels of [0, 1].
        count: number of points along a direction, at least 3 and odd, so that the middle one is the image.
    """
    if count < 3 or count % 2 == 0:
        raise UserError(f"a plane has an odd number of points along a direction, at least 3, got {count}")
    steps = torch.linspace(-reach, reach, count, dtype=x.dtype, device=x.device)
    points, parts = torch.cartesian_prod(steps, steps), []
    with torch.no_grad():
        for rows in torch.arange(len(x) * len(points), device=x.device).split(batch_size_for(x.shape[1:])):
            image, point = rows // len(points), rows % len(points)
            a, b = (per_sample(offsets, x) for offsets in points[point].T)
            parts.append(energy_of(image)(x[image] + a * first[image] + b * second[image]))
    values = torch.cat(parts).view(-1, count, count)
    return (values - values[:, count // 2, count // 2, None, None]).cpu().double()


def measure_landscape(values: Tensor, reach: float) -> LandscapeStatistics:
    """Locate the lowest point of planes (B, n, n) of :func:`plane` and measure slope and curvature at the image.

    Derivatives are central differences over one step of the grid.
    """
    n = values.shape[1]
    m, h = n // 2, 2 * reach / (n - 1)
    minimum, index = values.flatten(1).min(1)
    a, b = index // n - m, index % n - m
    centre = values[:, m, m]
    down, up, left, right = values[:, m + 1, m], values[:, m - 1, m], values[:, m, m - 1], values[:, m, m + 1]
    curvature = (down + up + left + right - 4 * centre) / (2 * h**2)
    tilt = ((down - up) ** 2 + (right - left) ** 2).sqrt() / (2 * h)
    offset = h * (a.double() ** 2 + b.double() ** 2).sqrt()
    return LandscapeStatistics(offset, centre - minimum, (a.abs() == m) | (b.abs() == m), curvature, tilt)


def _normalise(direction: Tensor) -> Tensor:
    return direction / per_sample(direction.flatten(1).norm(dim=1), direction).clamp_min(1e-12)
