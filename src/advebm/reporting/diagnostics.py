"""Diagnostics of trained runs as figures: ``advebm diagnose``.

Each figure function takes a :class:`FigureContext` and returns a picture, an explanation, and numbers over many images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from advebm.attacks.projected import Attack
from advebm.core.errors import UserError, unknown_name
from advebm.core.rng import generator
from advebm.data import ood_sets, pictures
from advebm.data.sources import Data, to_float
from advebm.diagnostics import landscape, paths, probes
from advebm.diagnostics.landscape import Along
from advebm.metrics import similarity
from advebm.models.batching import device_of
from advebm.models.modes import searching
from advebm.models.network import Network
from advebm.reporting import figure_store
from advebm.reporting.figures import STYLE, png
from advebm.runs.run import Run
from advebm.samplers.base import Sampler, joint_or_marginal
from advebm.sampling.generate import classes_to_draw, generate
from advebm.sampling.job import start_images

PLAIN: Any = {**STYLE, "axes.grid": False}


@dataclasses.dataclass(frozen=True)
class FigureContext:
    """The models, images and settings that figures are made from.

    Attributes:
        models: models by title, all of one data set; the figures are saved in the run of the first.
        data: the data set.
        sampler: sampler of all chains.
        threat: attack of the first run's threat model.
        outside: images that chains start from: outside images or replay chains; None: the sampler's own seeds.
        others: images from outside the data set, whose energies are shown; None: not shown.
        count: number of test images that numbers are computed on.
        along: directions of landscapes.
        reach: largest l2 distance in landscapes, in pixels of [0, 1].
        steps: length of long chains.
        seed: seed of all random numbers.
    """

    models: Mapping[str, Network]
    data: Data
    sampler: Sampler
    threat: Attack
    outside: Data | None
    others: Data | None = None
    count: int = 100
    along: Along = "random"
    reach: float = 2.0
    steps: int = 1000
    seed: int = 0

    @property
    def first(self) -> Network:
        return next(iter(self.models.values()))

    def test(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return ``count`` test images (float) and labels, the same for every model, on the models' device."""
        pick = torch.randperm(len(self.data.test), generator=generator(self.seed, "sitting"))
        part = self.data.test.take(pick[: self.count if count is None else count])
        device = device_of(self.first)
        return part.float().to(device), part.y.to(device)

    def seeds(self, y: Tensor, name: str) -> Tensor:
        """Return the starting images of the sampler's chains for classes ``y``."""
        device = device_of(self.first)
        like = torch.empty(len(y), *self.data.shape, device=device)
        start = self.sampler.prepare(self.data, self.outside)
        return start(like, y.to(device), generator(self.seed, name, device=device))

    def random(self, name: str) -> torch.Generator:
        """Return a generator on the models' device, seeded by ``seed`` and ``name``."""
        return generator(self.seed, name, device=device_of(self.first))


class FigureResult(NamedTuple):
    """A figure: PNG bytes, a title, an explanation of how to read it, and its numbers."""

    picture: bytes
    title: str
    text: str
    numbers: dict[str, Any]


def landscapes(s: FigureContext) -> FigureResult:
    """Plot E(x, y) around one test image as contours and in 3-D; measure offsets and curvatures of many images."""
    x, y = s.test()
    planes, lies = {}, {}
    few = lambda: to_float(ood_sets.choose_images(s.data.train.x, 2000, generator(0, "landscape"))).to(x)
    images = few() if s.along == "pca" else None
    for title, model in s.models.items():
        with searching(model) as f:
            generous = s.random("landscape")
            energy = joint_or_marginal(f, x, y)
            ways = landscape.directions(s.along, x, energy, generous, images=images)
            of = lambda index, f=f: joint_or_marginal(f, x, y[index])
            planes[title] = landscape.plane(of, x, *ways, reach=s.reach)
            lies[title] = landscape.measure_landscape(planes[title], s.reach)
    middle = {title: values[0] for title, values in planes.items()}
    low = min(float(v.min()) for v in middle.values())
    high = float(np.median([float(v.max()) for v in middle.values()]))
    levels, n = np.linspace(low, max(high, low + 1e-6), 21), next(iter(middle.values())).shape[0]
    axis_values = np.linspace(-s.reach, s.reach, n)
    with plt.rc_context(PLAIN):
        figure = plt.figure(figsize=(3.1 * len(middle) + 0.8, 6.0), layout="constrained")
        flat = []
        for i, (title, values) in enumerate(middle.items()):
            axis = figure.add_subplot(2, len(middle), i + 1)
            drawn = axis.contourf(axis_values, axis_values, values, levels=levels, cmap="viridis", extend="both")
            axis.plot(0, 0, "w+", ms=9)
            a, b = divmod(int(values.argmin()), n)
            axis.plot(axis_values[b], axis_values[a], "r.", ms=9)
            axis.set(
                title=title, aspect="equal", xlabel="pixels along 2nd", ylabel="pixels along 1st" if i == 0 else ""
            )
            flat.append(axis)
            solid: Any = figure.add_subplot(2, len(middle), len(middle) + i + 1, projection="3d")
            across, down = np.meshgrid(axis_values, axis_values)
            clipped = values.clamp(levels[0], levels[-1]).numpy()
            solid.plot_surface(across, down, clipped, cmap="viridis", vmin=levels[0], vmax=levels[-1], lw=0)
            solid.set_zlim(levels[0], levels[-1])
            solid.tick_params(labelsize=6)
        figure.colorbar(drawn, ax=flat, shrink=0.8, label="E(x, y) - E of the image, nats")
        picture = png(figure, tight=False)
    numbers = {
        title: {
            "offset of the minimum (pixels)": _mean(found.offset),
            "depth of the minimum (nats)": _mean(found.depth),
            "minimum on the border (share)": _mean(found.edge),
            "curvature (nats / pixel²)": _mean(found.curvature),
            "slope (nats / pixel)": _mean(found.tilt),
        }
        for title, found in lies.items()
    }
    text = (
        f"Two {s.along} directions around one test image (white cross; red: the lowest point), one scale for all, cut "
        f"off above the typical highest value. Numbers are means over {len(x)} test images ± standard error."
    )
    return FigureResult(picture, "Energy landscape", text, numbers)


def gradients(s: FigureContext) -> FigureResult:
    """Plot the gradient norms of E(x, y) and E(x) at each step of generation, and the share of E(x, y)."""
    y = torch.arange(len(s.data.classes)).repeat_interleave(max(1, s.count // len(s.data.classes)))
    begin, numbers = s.seeds(y, "gradients"), {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(s.models), figsize=(3.4 * len(s.models) + 0.6, 4.8), squeeze=False)
        for column, (title, model) in zip(axes.T, s.models.items(), strict=True):
            found = paths.slopes(model, s.sampler, y.to(begin.device), begin, s.random("gradients"))
            for values, name in ((found.joint, "∇E(x, y)"), (found.marginal, "∇E(x)")):
                _band(column[0], range(len(values)), values, name)
            _band(column[1], range(len(found.share)), found.share, "share of ∇E(x, y)")
            column[1].axhline(0.5, color="#999999", lw=0.8, ls="--")
            column[0].set(title=title, ylabel="nats / pixel")
            column[0].legend(frameon=False)
            column[1].set(xlabel="step", ylabel="share")
            numbers[title] = {"share at the first step": _mean(found.share[0]), "at the last": _mean(found.share[-1])}
        picture = png(figure)
    text = (
        f"Along {len(y)} chains of {type(s.sampler).__name__}: mean and deviation of the gradients' lengths, and "
        "‖∇E(x, y)‖ / (‖∇E(x, y)‖ + ‖∇E(x)‖) (Zhu et al., 2021, figures 12 and 13)."
    )
    return FigureResult(picture, "Gradients during generation", text, numbers)


def populations(s: FigureContext) -> FigureResult:
    """Plot histograms of E(x) of test, adversarial, generated, noise and other images, one panel for each model."""
    x, y = s.test(max(s.count, 200))
    labels = classes_to_draw(s.sampler, s.data, max(1, len(x) // len(s.data.classes)))
    numbers = {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(s.models), figsize=(4.6 * len(s.models), 3.3), squeeze=False)
        for axis, (title, model) in zip(axes.flat, s.models.items(), strict=True):
            sets = {
                "test": x,
                "generated": generate(model, s.sampler, s.data, labels, outside=s.outside, seed=s.seed).x,
            }
            with searching(model) as f:
                if f(x[:1]).numel() > 1:
                    sets["adversarial"] = s.threat.raise_loss(f, x, y, s.random("adversarial"))
            for noise in (ood_sets.UniformNoise(), ood_sets.ClassGaussianNoise()):
                sets[noise.name] = noise.draw(s.data, len(x), s.random(noise.name))
            if s.others is not None and s.others.shape == s.data.shape:
                sets[f"outside: {s.others.name}"] = s.others.test.x[: len(x)]
            found = probes.populations(model, sets)
            together = torch.cat(list(found.values()))
            edges = np.linspace(float(together.quantile(0.002)), float(together.quantile(0.998)) + 1e-6, 45)
            for name, values in found.items():
                density, _ = np.histogram(values.numpy(), edges, density=True)
                axis.stairs(density, edges, label=name, lw=1.4)
            axis.set(title=title, xlabel="E(x), nats; low = like data", yticks=[])
            numbers[title] = {name: _mean(values) for name, values in found.items()}
        axes.flat[0].legend(frameon=False, fontsize=7)
        picture = png(figure)
    text = (
        f"Histograms of E(x) of {len(x)} images each; adversarial ones by {s.threat.name}. Compare within a model only."
    )
    return FigureResult(picture, "Energies of kinds of images", text, numbers)


def neighbours(s: FigureContext) -> FigureResult:
    """Show the first model's samples with their nearest training images by l2 and SSIM; measure whether it copies."""
    labels = classes_to_draw(s.sampler, s.data, max(1, s.count // len(s.data.classes)))
    x = generate(s.first, s.sampler, s.data, labels, outside=s.outside, seed=s.seed).x
    train = s.data.train.x
    few = x[:: max(1, len(x) // 10)][:10]
    blocks = []
    for distances in (similarity.l2, similarity.dissimilarity):
        near = similarity.nearest(few, train, 6, distances)
        rows = zip(few, near.which, strict=True)
        found = torch.stack([torch.cat([one[None], train[i].float() / 255]) for one, i in rows])
        blocks.append(found)
    held_out = similarity.nearest(s.test(len(x))[0].cpu(), train, 1).distance.flatten()
    own = similarity.nearest(x, train, 1).distance.flatten()
    share, ratio = similarity.copies(own, held_out)
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), width_ratios=(1, 1, 1.1))
        for axis, found, name in zip(axes, blocks, ("by l2", "by SSIM"), strict=False):
            _images(axis, found, f"nearest {name}; first: generated")
        edges = np.linspace(0, float(max(own.max(), held_out.max())), 30)
        for values, name in ((held_out, "test images"), (own, "generated images")):
            axes[2].hist(values.numpy(), edges, density=True, histtype="step", lw=1.4, label=name)
        axes[2].set(xlabel="l2 distance to the nearest training image, pixels", yticks=[])
        axes[2].legend(frameon=False)
        picture = png(figure)
    text = (
        f"{100 * share:.1f} % of {len(x)} generated images lie nearer to a training image than the nearest 1 % of "
        f"{len(held_out)} test images do; ratio of the median distances {ratio:.2f} (below 1: nearer than real ones)."
    )
    numbers = {"nearer than 1 % of test images (share)": share, "ratio of median distances": ratio}
    return FigureResult(picture, "Nearest training images", text, numbers)


def interpolation(s: FigureContext) -> FigureResult:
    """Show images generated from interpolated seeds, one row for each of the first 10 classes."""
    y = torch.arange(min(10, len(s.data.classes)))
    first, second = s.seeds(y, "interpolation"), s.seeds(y, "interpolation, the other")
    spread = s.seeds(y.repeat_interleave(64), "interpolation, centre").view(len(y), 64, *s.data.shape)
    between = paths.between(first, second, spread.mean(1), 9)
    quiet = dataclasses.replace(s.sampler, noise=0.0, temperature=0.0 if s.sampler.temperature is not None else None)
    rows, bank = {}, quiet.bank(s.data)
    for title, model in s.models.items():
        flat = between.flatten(0, 1)
        labels, draws = y.repeat_interleave(9).to(flat.device), s.random("interpolation, negatives")
        rows[title] = quiet(model, labels, flat, generator=draws, bank=bank).view_as(between).cpu()
    numbers = {}
    for title, found in rows.items():
        steps = (found[:, 1:] - found[:, :-1]).flatten(2).norm(dim=2)
        ends = (found[:, -1] - found[:, 0]).flatten(1).norm(dim=1)
        numbers[title] = {"largest step / distance of the ends": _mean(steps.amax(1) / ends.clamp_min(1e-9))}
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, 1 + len(rows), figsize=(3.4 * (1 + len(rows)), 4.2), squeeze=False)
        for axis, (title, found) in zip(axes.flat, {"seeds": between.cpu(), **rows}.items(), strict=True):
            _images(axis, found, title)
        picture = png(figure)
    text = "Each row goes from one seed of a class to another, without noise; a jump is a border between basins."
    return FigureResult(picture, "Between two seeds", text, numbers)


def chains(s: FigureContext) -> FigureResult:
    """Plot long chains: their energies beside the data's, gradients, share of pixels at 0 or 1, and images."""
    y = torch.arange(len(s.data.classes)).repeat_interleave(max(2, 40 // len(s.data.classes)))
    long = dataclasses.replace(s.sampler, steps=max(8, s.steps))
    begin, numbers, rows = s.seeds(y, "chains"), {}, {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.1))
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        for colour, (title, model) in zip(colours, s.models.items(), strict=False):
            found = paths.chain(model, long, y.to(begin.device), begin, s.random("chains"))
            data = probes.populations(model, {"data": s.test()[0]})["data"].mean().item()
            _band(axes[0], found.steps, found.energy, title, colour)
            axes[0].axhline(data, color=colour, lw=0.8, ls="--")
            _band(axes[1], found.steps, found.slope, title, colour)
            _band(axes[2], found.steps, found.saturated, title, colour)
            drift, error = found.drift()
            numbers[title] = {
                "drift of E(x), third to last quarter (nats)": [drift, error],
                "r: mean slope (nats / pixel)": found.slope.mean().item(),
                "d: E of data - E of chains at the end (nats)": found.strength(data)[-1].item(),
                f"d after {s.sampler.steps} steps": _nearest(found, s.sampler.steps, data),
                "pixels on the border at the end (share)": found.saturated[-1].mean().item(),
            }
            shown = sorted({int(i) for i in np.linspace(0, len(found.steps) - 1, 9)})
            rows[title] = found.x[shown].transpose(0, 1)[:: len(y) // min(len(s.data.classes), 10)][:10]
        axes[0].set(title="E(x), dashed: test images", xlabel="step", ylabel="nats")
        axes[1].set(title="‖∇E(x)‖", xlabel="step", ylabel="nats / pixel")
        axes[2].set(title="pixels at 0 or 1", xlabel="step", ylabel="share")
        axes[0].legend(frameon=False)
        above = png(figure)
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, len(rows), figsize=(4.6 * len(rows), 4.6), squeeze=False)
        for axis, (title, found_rows) in zip(axes.flat, rows.items(), strict=True):
            _images(axis, found_rows, f"{title}: steps 0 to {long.steps}")
        picture = pictures.stack_pngs([above, png(figure)])
    text = (
        f"{len(y)} chains of {type(s.sampler).__name__} run {long.steps} steps instead of {s.sampler.steps}. A steady "
        "state has no drift: its number lies within twice its error of 0. r and d as in Nijkamp et al. (2019)."
    )
    return FigureResult(picture, "Long chains", text, numbers)


def saliency(s: FigureContext) -> FigureResult:
    """Show input gradients of every model on the same test images."""
    x, y = s.test(8)
    rows = {"images": x}
    for title, model in s.models.items():
        gradient = probes.saliency(model, x, y)
        scale = gradient.flatten(1).abs().quantile(0.99, dim=1).view(-1, 1, 1, 1).clamp_min(1e-12)
        rows[title] = (0.5 + 0.5 * gradient / scale).clamp(0, 1)
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.25 * len(rows)))
        for axis, (title, found) in zip(axes, rows.items(), strict=True):
            _images(axis, found[None].cpu(), title, left=True)
        picture = png(figure)
    many, labels = s.test()
    numbers = {}
    for title, model in s.models.items():
        g = probes.saliency(model, many, labels).flatten(1)
        centred = (many - many.mean(0)).flatten(1)
        numbers[title] = {
            "cosine with the image's difference from the mean": _mean(torch.cosine_similarity(g, centred))
        }
    text = (
        "-∇E(x, y), each scaled by itself, grey is 0 (Tsipras et al., 2019): what would make the image more like its "
        f"class. The cosine is over {len(many)} test images."
    )
    return FigureResult(picture, "Input gradients", text, numbers)


def inversion(s: FigureContext) -> FigureResult:
    """Show images that are reconstructed from the features of test images, starting from noise."""
    x, _ = s.test(16)
    begin = torch.rand(x.shape, generator=s.random("inversion"), device=x.device)
    rows, numbers = {"images": x}, {}
    for title, model in s.models.items():
        found, left = probes.invert(model, x, begin)
        rows[title] = found
        away = (found - x).flatten(1).norm(dim=1) / (begin - x).flatten(1).norm(dim=1)
        numbers[title] = {
            "distance left in features (share)": _mean(left),
            "distance left in pixels (share)": _mean(away),
            "SSIM with the image": _mean(similarity.ssim(found.cpu(), x.cpu()).diagonal()),
        }
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.25 * len(rows)))
        for axis, (title, images) in zip(axes, rows.items(), strict=True):
            _images(axis, images[None, :8].cpu(), title, left=True)
        picture = png(figure)
    text = (
        "From noise down ‖g(x) - g(x*)‖², g the features (Engstrom et al., 2019); shares are of the noise's distance."
    )
    return FigureResult(picture, "Images from features", text, numbers)


FIGURES: Mapping[str, Callable[[FigureContext], FigureResult]] = MappingProxyType(
    {
        "landscape": landscapes,
        "gradients": gradients,
        "energies": populations,
        "neighbours": neighbours,
        "interpolation": interpolation,
        "chains": chains,
        "saliency": saliency,
        "inversion": inversion,
    }
)


ENCODER_FIGURES = ("neighbours", "interpolation", "inversion")  # these need no logits


def diagnose(
    runs: Mapping[str, Run],
    what: Sequence[str] = (),
    *,
    sampler: Sampler | None = None,
    checkpoint: str = "latest",
    device: str = "cpu",
    progress: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> tuple[dict[str, dict[str, Any]], list[Path]]:
    """Draw figures of runs into the first one's folder, for its report.  Return numbers by figure, and the files.

    Args:
        runs: runs by title, all on the same data.
        what: names of :data:`FIGURES`; empty: all that apply to these models.
        sampler: sampler of chains; default: the first run's.
        checkpoint: checkpoint of every run.
        device: where to compute.
        progress: called with the name of each figure.
        options: settings of :class:`FigureContext`: ``count``, ``along``, ``reach``, ``steps``, ``seed``.

    Raises:
        UserError: an unknown figure, runs on different data, a mix of encoders and other networks, or a figure, a
            sampler or a ``count`` that does not fit the models.
    """
    for name in what:
        if name not in FIGURES:
            raise unknown_name("diagnostic", name, FIGURES)
    first = next(iter(runs.values()))
    recipe, data = first.recipe, first.data
    for title, run in runs.items():
        other = run.data
        if other.shape != data.shape or other.classes != data.classes:
            raise UserError(f"{title} is of {other.name}, {recipe.name} of {data.name}; diagnose runs on the same data")
    models = {title: run.model(checkpoint)[0].to(device) for title, run in runs.items()}
    chosen = sampler or recipe.sampler
    critics = any(run.recipe.objective.outputs == 1 for run in runs.values())
    if critics and chosen.conditional:
        raise UserError(
            f"{type(chosen).__name__} draws from classes, and one of the runs is a critic; choose --method langevin"
        )
    encoders = {title for title, model in models.items() if model.encoder}
    if encoders and len(encoders) < len(models):
        raise UserError(f"{', '.join(sorted(encoders))}: encoders are diagnosed beside encoders only")
    if encoders and (unfit := [name for name in what if name not in ENCODER_FIGURES]):
        raise UserError(
            f"{unfit[0]} looks at energies of logits, and encoders have none; {', '.join(ENCODER_FIGURES)} do not"
        )
    beginnings = start_images(first, chosen, checkpoint)
    if chosen.start == "outside":
        beyond = beginnings
    else:
        beyond = None if recipe.outside is None else recipe.outside.load()
    sitting = FigureContext(models, data, chosen, recipe.threat, beginnings, beyond, **options)
    if sitting.count < 2:
        raise UserError(f"numbers are taken over at least 2 images, got {sitting.count}")
    numbers, written = {}, []
    everything = ENCODER_FIGURES if encoders else [n for n in FIGURES if not (critics and n == "gradients")]
    for name in what or everything:
        progress(name)
        portrait = FIGURES[name](sitting)
        numbers[name] = portrait.numbers
        written.append(figure_store.save_figure(first, name, *portrait))
    return numbers, written


def _mean(values: Tensor) -> list[float]:
    """Return the mean and its standard error."""
    values = values.double()
    return [values.mean().item(), (values.std() / len(values) ** 0.5).item()]


def _nearest(found: paths.Chain, step: int, data: float) -> float:
    k = min(range(len(found.steps)), key=lambda i: abs(found.steps[i] - step))
    return found.strength(data)[k].item()


def _band(axis: Any, x: Sequence[int], values: Tensor, label: str, colour: str | None = None) -> None:
    """Plot mean and standard deviation of ``values`` over the second dimension."""
    centre, spread = values.mean(1), values.std(1)
    (line,) = axis.plot(x, centre, label=label, color=colour)
    axis.fill_between(x, centre - spread, centre + spread, alpha=0.15, color=line.get_color(), lw=0)


def _images(axis: Any, rows: Tensor, title: str, *, left: bool = False) -> None:
    axis.imshow(np.asarray(pictures.grid(rows.cpu().float())), cmap="gray", vmin=0, vmax=255, interpolation="none")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if left:
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    else:
        axis.set_title(title)
