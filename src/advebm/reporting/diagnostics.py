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
from advebm.core import notebook
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
from advebm.reporting.figures import STYLE, png, show_images
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
    planes, measures = {}, {}
    images = None
    if s.along == "pca":
        images = to_float(ood_sets.choose_images(s.data.train.x, 2000, generator(0, "landscape"))).to(x)
    for title, model in s.models.items():
        with searching(model) as f:
            energy = joint_or_marginal(f, x, y)
            directions = landscape.directions(s.along, x, energy, s.random("landscape"), images=images)
            energy_of = lambda index, f=f: joint_or_marginal(f, x, y[index])
            planes[title] = landscape.plane(energy_of, x, *directions, reach=s.reach)
            measures[title] = landscape.measure_landscape(planes[title], s.reach)
    first_planes = {title: values[0] for title, values in planes.items()}
    low = min(float(v.min()) for v in first_planes.values())
    high = float(np.median([float(v.max()) for v in first_planes.values()]))
    levels, n = np.linspace(low, max(high, low + 1e-6), 21), next(iter(first_planes.values())).shape[0]
    axis_values = np.linspace(-s.reach, s.reach, n)
    with plt.rc_context(PLAIN):
        figure = plt.figure(figsize=(3.1 * len(first_planes) + 0.8, 6.0), layout="constrained")
        contour_axes = []
        for i, (title, values) in enumerate(first_planes.items()):
            axis = figure.add_subplot(2, len(first_planes), i + 1)
            contours = axis.contourf(axis_values, axis_values, values, levels=levels, cmap="viridis", extend="both")
            axis.plot(0, 0, "w+", ms=9)
            a, b = divmod(int(values.argmin()), n)
            axis.plot(axis_values[b], axis_values[a], "r.", ms=9)
            axis.set(
                title=title, aspect="equal", xlabel="pixels along 2nd", ylabel="pixels along 1st" if i == 0 else ""
            )
            contour_axes.append(axis)
            surface_axis: Any = figure.add_subplot(2, len(first_planes), len(first_planes) + i + 1, projection="3d")
            across, down = np.meshgrid(axis_values, axis_values)
            clipped = values.clamp(levels[0], levels[-1]).numpy()
            surface_axis.plot_surface(across, down, clipped, cmap="viridis", vmin=levels[0], vmax=levels[-1], lw=0)
            surface_axis.set_zlim(levels[0], levels[-1])
            surface_axis.tick_params(labelsize=6)
        figure.colorbar(contours, ax=contour_axes, shrink=0.8, label="E(x, y) - E of the image, nats")
        picture = png(figure, tight=False)
    numbers = {
        title: {
            "offset of the minimum (pixels)": _mean(m.offset),
            "depth of the minimum (nats)": _mean(m.depth),
            "minimum on the border (share)": _mean(m.edge),
            "curvature (nats / pixel²)": _mean(m.curvature),
            "slope (nats / pixel)": _mean(m.tilt),
        }
        for title, m in measures.items()
    }
    text = (
        f"Two {s.along} directions around one test image (white cross; red: the lowest point), one scale for all, cut "
        f"off above the typical highest value. Numbers are means over {len(x)} test images ± standard error."
    )
    return FigureResult(picture, "Energy landscape", text, numbers)


def gradients(s: FigureContext) -> FigureResult:
    """Plot the gradient norms of E(x, y) and E(x) at each step of generation, and the share of E(x, y)."""
    y = torch.arange(len(s.data.classes)).repeat_interleave(max(1, s.count // len(s.data.classes)))
    initial, numbers = s.seeds(y, "gradients"), {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(s.models), figsize=(3.4 * len(s.models) + 0.6, 4.8), squeeze=False)
        for column, (title, model) in zip(axes.T, s.models.items(), strict=True):
            slopes = paths.slopes(model, s.sampler, y.to(initial.device), initial, s.random("gradients"))
            for values, name in ((slopes.joint, "∇E(x, y)"), (slopes.marginal, "∇E(x)")):
                _plot_band(column[0], range(len(values)), values, name)
            _plot_band(column[1], range(len(slopes.share)), slopes.share, "share of ∇E(x, y)")
            column[1].axhline(0.5, color="#999999", lw=0.8, ls="--")
            column[0].set(title=title, ylabel="nats / pixel")
            column[0].legend(frameon=False)
            column[1].set(xlabel="step", ylabel="share")
            numbers[title] = {"share at the first step": _mean(slopes.share[0]), "at the last": _mean(slopes.share[-1])}
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
            energies = probes.populations(model, sets)
            pooled = torch.cat(list(energies.values()))
            edges = np.linspace(float(pooled.quantile(0.002)), float(pooled.quantile(0.998)) + 1e-6, 45)
            for name, values in energies.items():
                density, _ = np.histogram(values.numpy(), edges, density=True)
                axis.stairs(density, edges, label=name, lw=1.4)
            axis.set(title=title, xlabel="E(x), nats; low = like data", yticks=[])
            numbers[title] = {name: _mean(values) for name, values in energies.items()}
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
    shown = x[:: max(1, len(x) // 10)][:10]
    blocks = []
    for distances in (similarity.l2, similarity.dissimilarity):
        nearest = zip(shown, similarity.nearest(shown, train, 6, distances).which, strict=True)
        blocks.append(torch.stack([torch.cat([image[None], train[i].float() / 255]) for image, i in nearest]))
    held_out = similarity.nearest(s.test(len(x))[0].cpu(), train, 1).distance.flatten()
    generated = similarity.nearest(x, train, 1).distance.flatten()
    share, ratio = similarity.copies(generated, held_out)
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, 3, figsize=(11, 4.6), width_ratios=(1, 1, 1.1))
        for axis, images, name in zip(axes, blocks, ("by l2", "by SSIM"), strict=False):
            show_images(axis, images.cpu().float(), f"nearest {name}; first: generated")
        edges = np.linspace(0, float(max(generated.max(), held_out.max())), 30)
        for values, name in ((held_out, "test images"), (generated, "generated images")):
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
    centres = s.seeds(y.repeat_interleave(64), "interpolation, centre").view(len(y), 64, *s.data.shape)
    between = paths.between(first, second, centres.mean(1), 9)
    temperature = None if s.sampler.temperature is None else 0.0
    noiseless = dataclasses.replace(s.sampler, noise=0.0, temperature=temperature)
    rows, bank = {}, noiseless.bank(s.data)
    for title, model in s.models.items():
        flat = between.flatten(0, 1)
        labels, draws = y.repeat_interleave(9).to(flat.device), s.random("interpolation, negatives")
        rows[title] = noiseless(model, labels, flat, generator=draws, bank=bank).view_as(between).cpu()
    numbers = {}
    for title, images in rows.items():
        steps = (images[:, 1:] - images[:, :-1]).flatten(2).norm(dim=2)
        ends = (images[:, -1] - images[:, 0]).flatten(1).norm(dim=1)
        numbers[title] = {"largest step / distance of the ends": _mean(steps.amax(1) / ends.clamp_min(1e-9))}
    picture = _plot_panels({"seeds": between, **rows}, (3.4, 4.2))
    text = "Each row goes from one seed of a class to another, without noise; a jump is a border between basins."
    return FigureResult(picture, "Between two seeds", text, numbers)


def chains(s: FigureContext) -> FigureResult:
    """Plot long chains: their energies beside the data's, gradients, share of pixels at 0 or 1, and images."""
    y = torch.arange(len(s.data.classes)).repeat_interleave(max(2, 40 // len(s.data.classes)))
    long = dataclasses.replace(s.sampler, steps=max(8, s.steps))
    initial, numbers, rows = s.seeds(y, "chains"), {}, {}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.1))
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        for colour, (title, model) in zip(colours, s.models.items(), strict=False):
            chain = paths.chain(model, long, y.to(initial.device), initial, s.random("chains"))
            data = probes.populations(model, {"data": s.test()[0]})["data"].mean().item()
            _plot_band(axes[0], chain.steps, chain.energy, title, colour)
            axes[0].axhline(data, color=colour, lw=0.8, ls="--")
            _plot_band(axes[1], chain.steps, chain.slope, title, colour)
            _plot_band(axes[2], chain.steps, chain.saturated, title, colour)
            drift, error = chain.drift()
            numbers[title] = {
                "drift of E(x), third to last quarter (nats)": [drift, error],
                "r: mean slope (nats / pixel)": chain.slope.mean().item(),
                "d: E of data - E of chains at the end (nats)": chain.strength(data)[-1].item(),
                f"d after {s.sampler.steps} steps": _strength_at(chain, s.sampler.steps, data),
                "pixels on the border at the end (share)": chain.saturated[-1].mean().item(),
            }
            frames = sorted({int(i) for i in np.linspace(0, len(chain.steps) - 1, 9)})
            rows[title] = chain.x[frames].transpose(0, 1)[:: len(y) // min(len(s.data.classes), 10)][:10]
        axes[0].set(title="E(x), dashed: test images", xlabel="step", ylabel="nats")
        axes[1].set(title="‖∇E(x)‖", xlabel="step", ylabel="nats / pixel")
        axes[2].set(title="pixels at 0 or 1", xlabel="step", ylabel="share")
        axes[0].legend(frameon=False)
        curves = png(figure)
    panels = {f"{title}: steps 0 to {long.steps}": images for title, images in rows.items()}
    picture = pictures.stack_pngs([curves, _plot_panels(panels, (4.6, 4.6))])
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
    picture = _plot_rows(rows)
    x, y = s.test()
    centred = (x - x.mean(0)).flatten(1)
    numbers = {}
    for title, model in s.models.items():
        cosine = torch.cosine_similarity(probes.saliency(model, x, y).flatten(1), centred)
        numbers[title] = {"cosine with the image's difference from the mean": _mean(cosine)}
    text = (
        "-∇E(x, y), each scaled by itself, grey is 0 (Tsipras et al., 2019): what would make the image more like its "
        f"class. The cosine is over {len(x)} test images."
    )
    return FigureResult(picture, "Input gradients", text, numbers)


def inversion(s: FigureContext) -> FigureResult:
    """Show images that are reconstructed from the features of test images, starting from noise."""
    x, _ = s.test(16)
    initial = torch.rand(x.shape, generator=s.random("inversion"), device=x.device)
    rows, numbers = {"images": x}, {}
    for title, model in s.models.items():
        inverted, feature_error = probes.invert(model, x, initial)
        rows[title] = inverted
        pixel_error = (inverted - x).flatten(1).norm(dim=1) / (initial - x).flatten(1).norm(dim=1)
        numbers[title] = {
            "distance left in features (share)": _mean(feature_error),
            "distance left in pixels (share)": _mean(pixel_error),
            "SSIM with the image": _mean(similarity.ssim(inverted.cpu(), x.cpu()).diagonal()),
        }
    picture = _plot_rows({title: images[:8] for title, images in rows.items()})
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


class Diagnosis(NamedTuple):
    """Figures of runs, and the numbers behind them.

    Attributes:
        numbers: numbers by the name of the figure, and in it by the title of a run; a pair is a mean and its standard
            error.
        figures: paths of the figures, PNG files.
    """

    numbers: dict[str, dict[str, Any]]
    figures: list[Path]

    def __repr__(self) -> str:
        return "Diagnosis: " + ", ".join(map(str, self.figures))

    def _repr_html_(self) -> str:
        return "".join(
            notebook.line(path.stem) + notebook.picture(path.read_bytes(), path.stem) for path in self.figures
        )


def diagnose(
    runs: Mapping[str, Run],
    what: Sequence[str] = (),
    *,
    sampler: Sampler | None = None,
    checkpoint: str = "latest",
    device: str = "cpu",
    progress: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> Diagnosis:
    """Draw figures of runs into the first one's folder, for its report.

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
        run_data = run.data
        if run_data.shape != data.shape or run_data.classes != data.classes:
            names = f"{title} is of {run_data.name}, {recipe.name} of {data.name}"
            raise UserError(f"{names}; diagnose runs on the same data")
    models = {title: run.model(checkpoint)[0].to(device) for title, run in runs.items()}
    sampler = sampler or recipe.sampler
    critics = any(run.recipe.objective.outputs == 1 for run in runs.values())
    if critics and sampler.conditional:
        raise UserError(
            f"{type(sampler).__name__} draws from classes, and one of the runs is a critic; choose --method langevin"
        )
    encoders = {title for title, model in models.items() if model.encoder}
    if encoders and len(encoders) < len(models):
        raise UserError(f"{', '.join(sorted(encoders))}: encoders are diagnosed beside encoders only")
    if encoders and (unfit := [name for name in what if name not in ENCODER_FIGURES]):
        raise UserError(
            f"{unfit[0]} looks at energies of logits, and encoders have none; {', '.join(ENCODER_FIGURES)} do not"
        )
    initial = start_images(first, sampler, checkpoint)
    others = initial
    if sampler.start != "outside":
        others = None if recipe.outside is None else recipe.outside.load()
    context = FigureContext(models, data, sampler, recipe.threat, initial, others, **options)
    if context.count < 2:
        raise UserError(f"numbers are taken over at least 2 images, got {context.count}")
    numbers, paths = {}, []
    applicable = ENCODER_FIGURES if encoders else [n for n in FIGURES if not (critics and n == "gradients")]
    for name in what or applicable:
        progress(name)
        result = FIGURES[name](context)
        numbers[name] = result.numbers
        paths.append(figure_store.save_figure(first, name, *result))
    return Diagnosis(numbers, paths)


def _mean(values: Tensor) -> list[float]:
    """Return the mean and its standard error."""
    values = values.double()
    return [values.mean().item(), (values.std() / len(values) ** 0.5).item()]


def _strength_at(chain: paths.Chain, step: int, data: float) -> float:
    k = min(range(len(chain.steps)), key=lambda i: abs(chain.steps[i] - step))
    return chain.strength(data)[k].item()


def _plot_band(axis: Any, x: Sequence[int], values: Tensor, label: str, colour: str | None = None) -> None:
    """Plot mean and standard deviation of ``values`` over the second dimension."""
    centre, spread = values.mean(1), values.std(1)
    (line,) = axis.plot(x, centre, label=label, color=colour)
    axis.fill_between(x, centre - spread, centre + spread, alpha=0.15, color=line.get_color(), lw=0)


def _plot_rows(rows: Mapping[str, Tensor]) -> bytes:
    """Plot a row of images (N, C, H, W) for each title."""
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(len(rows), 1, figsize=(8, 1.25 * len(rows)))
        for axis, (title, images) in zip(axes, rows.items(), strict=True):
            show_images(axis, images[None].cpu().float())
            axis.set_ylabel(title, rotation=0, ha="right", va="center")
        return png(figure)


def _plot_panels(panels: Mapping[str, Tensor], size: tuple[float, float]) -> bytes:
    """Plot images (rows, columns, C, H, W) side by side, each in a panel of ``size`` below its title."""
    with plt.rc_context(PLAIN):
        figure, axes = plt.subplots(1, len(panels), figsize=(size[0] * len(panels), size[1]), squeeze=False)
        for axis, (title, images) in zip(axes.flat, panels.items(), strict=True):
            show_images(axis, images.cpu().float(), title)
        return png(figure)
