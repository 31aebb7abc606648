"""Pictures of trained two-dimensional models, from :class:`advebm.toy.train.ToyRun`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from advebm import energies
from advebm.core import files
from advebm.core.rng import generator
from advebm.data import pictures
from advebm.descent import value_and_gradient
from advebm.reporting.figures import STYLE, png
from advebm.toy import densities, train

EDGE = 0.45  # level of the contour drawn for D; the contour at the plateau of 1/2 would be ragged
POINTS = 250  # number of data points, and of p0's points, in a picture
DATA, CONTRAST = "#35c4ff", "#ff2d2d"
PLANE: Any = {**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False, "font.size": 8}


def draw_density(
    density: str, folder: Path, *, method: str | None = None, p0: str | None = None, seed: int = 0
) -> tuple[list[train.ToyRun], list[Path]]:
    """Train on a density and write pictures into ``folder``.  Return the trainings and the files.

    If ``method`` or ``p0`` is given, run one training and draw its film and animation.  Otherwise train binary AT with
    both p0 and maximum likelihood, and draw comparisons as well.
    """
    settings = [("binary-at", "uniform"), ("binary-at", "concentrated"), ("mle", "uniform")]
    if method or p0:
        settings = [(method or "binary-at", p0 or "uniform")]
    plays = [train.train_toy(density, *setting, seed=seed) for setting in settings]
    images = {f"{density}-{play.method}-{play.p0}.png": film(play) for play in plays}
    images[f"{density}-{plays[0].method}-{plays[0].p0}.gif"] = animation(plays[0])
    if len(plays) == 3:
        uniform, concentrated, likelihood = plays
        images[f"{density}-p0.png"] = before_and_after([uniform, concentrated])
        images[f"{density}-density.png"] = density_or_support(uniform, likelihood)
    for name, content in images.items():
        files.write(folder / name, content)
    return plays, [folder / name for name in images]


def film(play: train.ToyRun, count: int = 6) -> bytes:
    """Draw ``count`` evenly chosen frames of a training from left to right."""
    last = len(play.frames) - 1
    frames = [play.frames[round(k * last / (count - 1))] for k in range(count)]
    with plt.rc_context(PLANE):
        figure, axes = plt.subplots(1, count, figsize=(2.2 * count, 2.6))
        for axis, frame in zip(axes, frames, strict=True):
            panel(axis, play, frame)
            axis.set_title(f"update {frame.update}")
        figure.suptitle(f"{play.density}: {_caption(play)}")
        return png(figure)


def before_and_after(plays: Sequence[train.ToyRun]) -> bytes:
    """Draw D before and after training for each p0, with p0's points before and after their search: figure 1."""
    with plt.rc_context(PLANE):
        figure, axes = plt.subplots(1, 2 * len(plays), figsize=(2.9 * 2 * len(plays), 3.1))
        for k, play in enumerate(plays):
            for axis, frame, when in zip(axes[2 * k :], (play.frames[0], play.frames[-1]), "ab", strict=False):
                panel(axis, play, frame, moved=when == "b")
                axis.set_title(f"{k + 1}{when}  p0 {play.p0}, {'after' if when == 'b' else 'before'}")
        figure.suptitle(f"{play.density}: D, its normalised gradient; blue data, red p0, in b moved; white D = {EDGE}")
        return png(figure)


def density_or_support(adversarial: train.ToyRun, likelihood: train.ToyRun) -> bytes:
    """Draw the true log-density, the energies of binary AT and maximum likelihood, and both energies against it."""
    density = densities.find_density(adversarial.density)
    points = train.plane_points(81)
    truth = density.log_density(points.view(-1, 2)).view(points.shape[:2])
    data = density.sample(1_000, generator("toy-picture", 0))
    names = {"log p": truth}
    names |= {f"-E, {p.method}": -train.energy(p.frames[-1].model, points) for p in (adversarial, likelihood)}
    with plt.rc_context(PLANE):
        figure, axes = plt.subplots(1, 4, figsize=(11.6, 3.0))
        for axis, (name, values) in zip(axes, names.items(), strict=False):
            span = 8.0 if "binary" not in name else float(values.max() - values.min())
            values = (values - values.max()).clamp_min(-span)
            contours = axis.contourf(points[..., 0], points[..., 1], values, levels=16, cmap="viridis")
            figure.colorbar(contours, ax=axis, shrink=0.8, format="%.2g")
            axis.set_title(f"{name} (highest 0)")
            _square(axis)
        true = density.log_density(data)
        for play, colour in ((likelihood, "#2e8b57"), (adversarial, "#a23b72")):
            learnt = -train.energy(play.frames[-1].model, data)
            axes[3].scatter(true, learnt - learnt.mean() + true.mean(), s=2, color=colour, label=play.method)
        axes[3].axline((float(true.mean()), float(true.mean())), slope=1, color="#999999", lw=0.8, ls="--")
        axes[3].spines[["left", "bottom"]].set_visible(True)
        axes[3].set(xlabel="log p of data (nats)", ylabel="-E, of equal mean", title="density: slope 1; support: 0")
        axes[3].legend(frameon=False, markerscale=4)
        figure.suptitle(f"{adversarial.density}: what each energy knows")
        return png(figure)


def animation(play: train.ToyRun) -> bytes:
    """Return a GIF of the training, which pauses on the last frame."""
    frames = []
    with plt.rc_context(PLANE):
        for frame in play.frames:
            figure, axis = plt.subplots(figsize=(3.2, 3.3))
            panel(axis, play, frame)
            axis.set_title(f"{play.density}, {play.method}, update {frame.update}")
            frames.append(Image.open(io.BytesIO(png(figure))).convert("RGB"))
    return pictures.encode_gif(frames, 150)


def panel(axis: Axes, play: train.ToyRun, frame: train.Frame, *, moved: bool = True) -> None:
    """Draw D (binary AT) or the density divided by its maximum, the normalised gradient of -E, and the points."""
    points = train.plane_points(81)
    energy = train.energy(frame.model, points)
    binary = play.method == "binary-at"
    height = torch.sigmoid(-energy) if binary else torch.exp(energy.min() - energy)
    levels = torch.linspace(0, 1, 21).tolist()
    axis.contourf(points[..., 0], points[..., 1], height, levels=levels, cmap="viridis")
    if binary:
        axis.contour(points[..., 0], points[..., 1], height, levels=[EDGE], colors="white", linewidths=1)
    arrows = train.plane_points(17).view(-1, 2)
    _, gradient = value_and_gradient(lambda x: energies.binary(frame.model(x)), arrows)
    ahead = -gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
    axis.quiver(*arrows.T, *ahead.T, scale=26, width=0.005, color="white", alpha=0.7)
    data = densities.find_density(play.density).sample(POINTS, generator("toy-picture", 0))
    _dots(axis, data, DATA)
    _dots(axis, (frame.ended if moved else frame.began)[:POINTS], CONTRAST)
    _square(axis)


def _dots(axis: Axes, x: Tensor, colour: str) -> None:
    axis.scatter(x[:, 0], x[:, 1], s=3, color=colour, linewidths=0)


def _square(axis: Axes) -> None:
    axis.set(xlim=(-train.SIDE, train.SIDE), ylim=(-train.SIDE, train.SIDE), aspect="equal", xticks=[], yticks=[])


def _caption(play: train.ToyRun) -> str:
    if play.method == "binary-at":
        return f"D by binary AT, p0 {play.p0}; blue data, red p0 after its ascent; white D = {EDGE}"
    return f"density by maximum likelihood, chains from p0 {play.p0}; blue data, red chains"
