"""The public functions.  Images are float32 (B, C, H, W) in [0, 1], labels int64 (B,); inputs are checked here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advebm import energies, recipes
from advebm.attacks.projected import Attack
from advebm.core import checks, config, rng
from advebm.core.allocator import tune_cpu_allocator as tune_cpu_allocator
from advebm.core.errors import UserError
from advebm.data.sources import Data
from advebm.descent import Energy
from advebm.evaluation import evaluate as evaluation
from advebm.metrics.base import Metric, Record, SampleSet, Subject
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.models.batching import batch_size_for, device_of
from advebm.models.modes import searching
from advebm.models.network import Network, Normalize
from advebm.reporting.build import report as build_report
from advebm.runs import find_model
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run, new_folder
from advebm.sampling import generate
from advebm.training import loop


def load(path: str | Path, *, checkpoint: str | int = "latest") -> Network:
    """The network of a run, a checkpoint or a published model's folder: averaged weights, eval mode, on the CPU.

    Args:
        path: the folder, ``hf:USER/NAME`` for a model published on the Hub, or ``PACKAGE.MODULE:FACTORY`` for a module
            of your own on images in [0, 1].
        checkpoint: of a run: ``latest``, ``best`` or a number of images.

    Raises:
        UserError: nothing there, or a damaged file.
    """
    return find_model.find_model(path, checkpoint=str(checkpoint))


def wrap(module: nn.Module, *, mean: float | Iterable[float] = 0.0, std: float | Iterable[float] = 1.0) -> Network:
    """Your own classifier as a network on images in [0, 1], in eval mode; its logits are its features too.

    Args:
        module: normalised images (B, C, H, W) -> logits (B, K): logits, not probabilities.
        mean, std: the normalisation it was trained with, a value a channel or one for all; it becomes the first layer.
    """
    means, stds = ((float(v),) if isinstance(v, int | float) else tuple(v) for v in (mean, std))
    return Network(Normalize(means, stds), module, nn.Identity()).eval()


def energy(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
    """``E(x)``, or ``E(x, y)`` where labels are given: (B,), nats, low on data, known up to a constant.

    A model with one output is read as a critic, ``E(x) = -f(x)``, JEAT eq. 12 otherwise.

    Raises:
        UserError: images outside [0, 1], labels out of range, probabilities instead of logits.
    """
    checks.no_encoder(model)
    with searching(model) as f, torch.no_grad():
        out = f(checks.images(x))
        if out.ndim == 1 or out.shape[1] == 1:
            if y is not None:
                raise UserError("a critic has one output and no classes; leave out y")
            return energies.binary(out)
        checks.logits(out, len(x))
        return energies.marginal(out) if y is None else energies.joint(out, checks.labels(y, len(x), out.shape[1]))


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 20,
    step_size: float | None = None,
    loss: Literal["cross-entropy", "energy"] = "cross-entropy",
    restarts: int = 1,
    target: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Adversarial images within ``eps`` of ``x``, by projected gradient descent; see :class:`Attack`.

    Args:
        model: classifier on images in [0, 1].
        x, y: images and their labels.
        eps, norm, steps, step_size, loss, restarts: as in :class:`Attack`.
        target: classes (B,) to be taken for, instead of merely leaving ``y``.
        seed: of the random starts.
    """
    _check_classifier(model, x, y)
    search = Attack(eps=eps, norm=norm, steps=steps, step_size=step_size, loss=loss, restarts=restarts)
    generator = rng.generator(seed, "attack", device=x.device)
    with searching(model) as f:
        lowered: Energy = search.negative_loss(f, y)
        if target is not None:
            goal = checks.labels(target, len(x), f(x[:1]).shape[1])
            read = energies.joint if loss == "energy" else energies.conditional
            lowered = lambda v: read(f(v), goal)
        return search.minimize(lowered, x, generator)


def sample(
    model: nn.Module,
    y: Tensor,
    *,
    data: Data | str,
    method: str = "cs",
    outside: Data | str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Tensor:
    """Images (N, C, H, W) of classes ``y (N,)``, from a classifier, or by ``ascent`` or ``langevin`` from a critic.

    From an encoder by ``np-langevin``, ``np-pgd`` or ``maxent``; a module of your own passes as one.

    Args:
        model: classifier, or critic, on images in [0, 1].
        y: the class of each image; only their number counts where neither energy nor seeds are of a class.
        data: on whose training split the seeds are fitted; a name such as ``digits`` or what :func:`load_data` gave.
        method: ``ta``, ``cs``, ``rcs``, ``langevin``, …; see ``advebm list sampler``.
        outside: whose test images chains begin from, with ``start="outside"``: a name such as ``patches``, or data.
        seed: of seeds and noise.
        settings: of the sampler: ``steps``, ``step_size``, ``radius``, ``noise``, ``direction``, ``start``.
    """
    sampler = config.build({"kind": method, **settings}, "sampler")
    data = load_data(data) if isinstance(data, str) else data
    outside = load_data(outside) if isinstance(outside, str) else outside
    two = torch.rand(2, *data.shape).to(device_of(model))
    with searching(model) as f, torch.no_grad():
        critic = f(two).numel() == len(two)
    if sampler.encoder and (critic or not getattr(model, "encoder", True)):
        raise UserError(f"{method} draws from an encoder, and the model is none; choose cs, or langevin for a critic")
    if not sampler.encoder and (sampler.conditional or not critic):
        _check_classifier(model, two)
    if sampler.conditional or sampler.start == "class":
        checks.labels(y, None, len(data.classes))
    else:
        y = torch.full_like(y, -1)
    return generate.generate(model, sampler, data, y, outside=outside, seed=seed).x


def evaluate(
    model: nn.Module,
    *,
    data: Data | str,
    threat: Attack,
    metrics: Iterable[Metric] | None = None,
    samples: Mapping[str, SampleSet] | None = None,
    features: Network | str | None = None,
    seed: int = 0,
) -> list[Record]:
    """Records of a model on the test split: accuracy, clean and under ``threat``, unless other metrics are given.

    Sample quality is measured on ``samples`` by name, in the features of the classifier ``features`` or in what
    :func:`advebm.evaluation.evaluate.find_space` reads: ``"inception"``, ``"pixels"``, a run or model.
    """
    data = load_data(data) if isinstance(data, str) else data
    space = None
    if isinstance(features, str):
        space = evaluation.find_space(features).load(device_of(model))
    elif features is not None:
        space = evaluation.feature_space("given features", features)
    subject = Subject(model, data, data.test, threat, samples or {}, space, batch_size_for(data.shape))
    x, y = next(subject.batches())
    if not getattr(model, "encoder", False):  # of which some metrics make classifiers
        _check_classifier(model, x[:16], y[:16])
    return evaluation.evaluate(subject, (Accuracy(), RobustAccuracy()) if metrics is None else metrics, seed=seed)


def train(
    recipe: Recipe | str,
    *,
    folder: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str | None = None,
) -> Run:
    """Train a recipe; see :func:`advebm.training.loop.train`.

    Args:
        recipe: a name of the package or what :func:`load_recipe` gave; with ``resume``, the run's own is used.
        folder: of the run; ``runs/NAME-TIME`` by default.
        options: ``{"train.images": 10_000, "objective.attack.eps": "8/255"}``, on top of a named recipe.
        resume: go on with the run in ``folder``, by its own recipe.
        device: None takes the best there is.
    """
    if options and (resume or isinstance(recipe, Recipe)):
        raise UserError("options go with the name of a recipe; a Recipe and a run that is resumed have their own")
    if resume:
        if folder is None:
            raise UserError("resume needs the folder of the run")
        recipe = Run.open(folder).recipe
    recipe = load_recipe(recipe, options) if isinstance(recipe, str) else recipe
    return loop.train(recipe, Path(folder or new_folder(Path("runs"), recipe.name)), resume=resume, device=device)


def load_recipe(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of the package, with options changed."""
    return resolve(recipes.find(name), list((options or {}).items()))


def load_data(name: str, **settings: Any) -> Data:
    """Training, validation and test images: ``load_data("digits")``."""
    return config.build({"kind": name, **settings}, "source").load()


def report(run: Run | str | Path, *, beside: Iterable[Run | str | Path] = (), out: str | Path | None = None) -> Path:
    """Write the run's ``report.html``, with other runs ``beside`` it for comparison, and return where it is."""
    first, *others = (r if isinstance(r, Run) else Run.open(r) for r in (run, *beside))
    return build_report(first, beside=others, out=None if out is None else Path(out))


def _check_classifier(model: nn.Module, x: Tensor, y: Tensor | None = None) -> None:
    checks.images(x)
    checks.no_encoder(model)
    with searching(model) as f, torch.no_grad():
        out = checks.logits(f(x), len(x))
    if out.shape[1] < 2:
        raise UserError("this needs a classifier; the model has one output")
    if y is not None:
        checks.labels(y, len(x), out.shape[1])
