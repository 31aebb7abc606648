"""The public functions.  Images are float32 (B, C, H, W) in [0, 1], labels int64 (B,); inputs are checked."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from advebm import energies, recipes
from advebm.attacks.projected import Attack
from advebm.core import checks, config, rng
from advebm.core.allocator import tune_cpu_allocator as tune_cpu_allocator
from advebm.core.errors import UserError
from advebm.data.sources import Data
from advebm.evaluation import evaluate as evaluation
from advebm.metrics.base import Metric, Record, SampleSet, Subject
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.models.batching import batch_size_for, device_of
from advebm.models.inference import View
from advebm.models.modes import searching
from advebm.models.network import Network, Normalize
from advebm.reporting.build import report as build_report
from advebm.runs import find_model
from advebm.runs.find_space import feature_space, find_space
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run, new_folder
from advebm.sampling import generate
from advebm.training import loop
from advebm.workflows.adopt import open_run


@torch.inference_mode(False)
def load(path: str | Path, *, checkpoint: str | int = "latest") -> Network:
    """Load the network of a model of any kind: averaged weights, eval mode, on the CPU.

    Args:
        path: a run, a checkpoint, a published folder, a model of the package such as ``cifar10-at-2h``,
            ``hf:USER/NAME`` on the Hub, a file of public weights, or ``PACKAGE.MODULE:FACTORY``, a user-defined module
            on images in [0, 1], also with weights: ``PACKAGE.MODULE:FACTORY@WEIGHTS``.
        checkpoint: checkpoint of a run: ``latest``, ``best`` or a number of images.

    Raises:
        UserError: there is no model, or its file is damaged.
    """
    return find_model.find_model(path, checkpoint=str(checkpoint))


@torch.inference_mode(False)
def wrap(module: nn.Module, *, mean: float | Iterable[float] = 0.0, std: float | Iterable[float] = 1.0) -> Network:
    """Wrap your own classifier as a network on images in [0, 1], in eval mode; its logits also serve as features.

    Args:
        module: maps normalised images (B, C, H, W) to logits (B, K), not probabilities.  They may also be an attribute
            or entry ``logits`` of the output, or the only matrix of a tuple; weights are of any floating-point type.
        mean, std: the normalisation it was trained with, per channel or one for all; it becomes the first layer.
    """
    _check_module(module)
    means, stds = (tuple(np.atleast_1d(np.asarray(v, float)).tolist()) for v in (mean, std))
    if max(means) > 2:
        raise UserError(f"images lie in [0, 1], and a mean of {max(means):g} is for images up to 255; divide by 255")
    return Network(Normalize(means, stds).to(device_of(module)), module, nn.Identity()).eval()


@torch.inference_mode(False)
def energy(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return ``E(x)``, or ``E(x, y)`` if labels are given: (B,), in nats, low on data, known up to a constant.

    A model with one output is a critic, with ``E(x) = -f(x)``; a classifier's energy is JEAT eq. 12.

    Raises:
        UserError: images are outside [0, 1], labels out of range, outputs are probabilities instead of logits, labels
            are given for a critic, or the model is an encoder.
    """
    checks.no_encoder(model)
    model = _as_network(model)
    x = _check_images(model, x)
    with searching(model) as f, torch.no_grad():
        outputs = checks.outputs(f, x, "the model")
        if outputs.ndim == 1 or outputs.shape[1:] == (1,):
            if y is not None:
                raise UserError("a critic has one output and no classes; leave out y")
            return energies.binary(outputs)
        logits = checks.logits(outputs, len(x))
        if y is None:
            return energies.marginal(logits)
        return energies.joint(logits, checks.labels(y, len(x), logits.shape[1]))


@torch.inference_mode(False)
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
    """Return adversarial images within ``eps`` of ``x``, by projected gradient descent; see :class:`Attack`.

    Args:
        model: classifier on images in [0, 1].
        x, y: images and their labels.
        eps, norm, steps, step_size, loss, restarts: as in :class:`Attack`.
        target: classes (B,) that the images should be taken for; None: any but ``y``.
        seed: seed of the random starts.
    """
    model = _as_network(model)
    x = _check_images(model, x)
    if not len(x):
        return x
    y = _check_classifier(model, x, y)
    search = Attack(eps=eps, norm=norm, steps=steps, step_size=step_size, loss=loss, restarts=restarts)
    generator = rng.generator(seed, "attack", device=x.device)
    with searching(model) as f:
        if target is None:
            return search.raise_loss(f, x, y, generator)
        target = checks.labels(target, len(x), f(x[:1]).shape[1])
        energy_of = energies.joint if loss == "energy" else energies.conditional
        return search.minimize(lambda v: energy_of(f(v), target), x, generator)


@torch.inference_mode(False)
def sample(
    model: nn.Module,
    y: Tensor,
    *,
    data: Data | str | None = None,
    method: str | None = None,
    outside: Data | str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Tensor:
    """Draw images (N, C, H, W) of classes ``y (N,)`` from a classifier, a critic or an encoder.

    A model that :func:`load` returned knows its data and its sampler: ``sample(load("cifar10-at-2h"), y)`` is enough.

    A critic takes the methods ``ascent`` and ``langevin``, an encoder ``np-langevin``, ``np-pgd`` and ``maxent``.  A
    user-defined module is accepted as an encoder.

    Args:
        model: classifier, critic or encoder on images in [0, 1].
        y: the class of each image; if neither energy nor start depends on the class, only the length of ``y`` matters.
        data: data whose training split the starts are fitted on: a name such as ``digits``, or from :func:`load_data`.
            None: those of a loaded model, or the Gaussians that it brings.
        method: ``ta``, ``cs``, ``rcs``, ``langevin``, …; see ``advebm list sampler``.  None: the sampler of a loaded
            model with its settings, else ``cs``.
        outside: data whose test images chains start from if ``start="outside"``: a name such as ``patches``, or data.
        seed: seed of starts and noise.
        settings: settings of the sampler: ``steps``, ``step_size``, ``radius``, ``noise``, ``direction``, ``start``.
    """
    origin = getattr(model, "origin", None)
    known = origin.options() if origin is not None and (data is None or method is None) else {}
    own = known.get("sampler", {"kind": "cs"}) if method is None else {"kind": method}
    sampler = config.build({**own, **settings}, "sampler")
    model = model if sampler.encoder else _as_network(model)
    if data is None:
        if "data" not in known:
            raise UserError('no data are known of this model; name them, such as data="cifar10"')
        data = config.build(known["data"], "source").load()
    data = load_data(data) if isinstance(data, str) else data
    outside = load_data(outside) if isinstance(outside, str) else outside
    probe = torch.rand(2, *data.shape).to(device_of(model))
    with searching(model) as f, torch.no_grad():
        critic = f(probe).numel() == len(probe)
    if sampler.encoder and (critic or not getattr(model, "encoder", True)):
        raise UserError(f"{method} draws from an encoder, and the model is none; choose cs, or langevin for a critic")
    if not sampler.encoder and (sampler.conditional or not critic):
        _check_classifier(model, probe, torch.zeros(2, dtype=torch.long))
    if sampler.conditional or sampler.start == "class":
        y = checks.labels(y, None, len(data.classes))
    else:
        y = torch.full_like(y, -1)
    return generate.generate(model, sampler, data, y, outside=outside, seed=seed).x


@torch.inference_mode(False)
def evaluate(
    model: nn.Module,
    *,
    data: Data | str,
    threat: Attack | None = None,
    metrics: Iterable[Metric] | None = None,
    samples: Mapping[str, SampleSet] | None = None,
    features: Network | str | None = None,
    seed: int = 0,
) -> list[Record]:
    """Measure a model on the test split; by default its accuracy, clean and under ``threat``.

    Without ``threat`` a model is attacked as it was trained to withstand, if that is known, as it is of what
    :func:`load` returns.

    The metric of sample quality judges ``samples``, sets by name, in the feature space ``features``: a classifier, or a
    text for :func:`advebm.runs.find_space.find_space`: ``"inception"``, ``"pixels"``, a run or a model.
    """
    data = load_data(data) if isinstance(data, str) else data
    threat = threat or getattr(model, "threat", None)
    if threat is None:
        raise UserError("no threat model is known of this model; give one, such as threat=Attack(eps=8 / 255)")
    space = None
    if isinstance(features, str):
        space = find_space(features).load(device_of(model))
    elif features is not None:
        space = feature_space("given features", features)
    model = _as_network(model)
    subject = Subject(model, data, data.test, threat, samples or {}, space, batch_size_for(data.shape))
    x, y = next(subject.batches())
    if not getattr(model, "encoder", False):  # some metrics fit a classifier on an encoder
        _check_classifier(model, x[:16], y[:16], classes=len(data.classes))
    return evaluation.evaluate(subject, (Accuracy(), RobustAccuracy()) if metrics is None else metrics, seed=seed)


@torch.inference_mode(False)
def train(
    recipe: Recipe | str,
    *,
    folder: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str | None = None,
    track: str | Sequence[str] = (),
) -> Run:
    """Train a recipe and return its run; see :func:`advebm.training.loop.train`.

    Args:
        recipe: name of a recipe of the package, or the result of :func:`load_recipe`; ignored with ``resume``.
        folder: folder of the run; None: ``runs/NAME-TIME``.
        options: changes to a named recipe, such as ``{"train.images": 10_000, "objective.attack.eps": "8/255"}``.
        resume: whether to resume the run in ``folder``, with its own recipe.
        device: None: the best one available.
        track: experiment trackers that show the run, such as ``"tensorboard"`` or ``["tensorboard", "wandb"]``.
    """
    if options and (resume or isinstance(recipe, Recipe)):
        raise UserError("options go with the name of a recipe; a Recipe and a run that is resumed have their own")
    if resume:
        if folder is None:
            raise UserError("resume needs the folder of the run")
        recipe = Run.open(folder).recipe
    recipe = load_recipe(recipe, options) if isinstance(recipe, str) else recipe
    folder = Path(folder or new_folder(Path("runs"), recipe.name))
    return loop.train(recipe, folder, resume=resume, device=device, track=track)


def load_recipe(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe of the package, with options changed."""
    return resolve(recipes.find(name), list((options or {}).items()))


@torch.inference_mode(False)
def load_data(name: str, **settings: Any) -> Data:
    """Load training, validation and test images: ``load_data("digits")``, ``load_data("folder:PATH", size=64)``."""
    return config.build({"kind": name, **settings}, "source").load()


def report(run: Run | str | Path, *, beside: Iterable[Run | str | Path] = (), out: str | Path | None = None) -> Path:
    """Write the run's ``report.html``, with other runs ``beside`` it for comparison, and return its path."""
    first, *others = (r if isinstance(r, Run) else open_run(r) for r in (run, *beside))
    return build_report(first, beside=others, out=None if out is None else Path(out))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = "; advebm.load loads a model" if isinstance(model, str | Path | Run) else ""
        raise UserError(f"a model is a torch module, got {model!r:.80}{hint}")


def _as_network(model: nn.Module) -> nn.Module:
    """Return a user's own module as a network, in the mode it is in; ours as they are."""
    _check_module(model)
    if isinstance(model, Network | View):
        return model
    return Network(Normalize((0.0,), (1.0,)).to(device_of(model)), model, nn.Identity())


def _check_images(model: nn.Module, x: Tensor) -> Tensor:
    """Return images as float32, or as float64 if that is the type of both images and weights."""
    kinds = {x.dtype, *(p.dtype for p in model.parameters())} if isinstance(x, Tensor) else set()
    return checks.images(x) if kinds == {torch.float64} else checks.images(x).float()


def _check_classifier(model: nn.Module, x: Tensor, y: Tensor, classes: int | None = None) -> Tensor:
    """Return the labels; raise UserError if the model gives no logits, or if labels do not fit them."""
    checks.no_encoder(model)
    with searching(model) as f, torch.no_grad():
        outputs = checks.logits(checks.outputs(f, x, "the model"), len(x)).shape[1]
    if outputs < 2:
        raise UserError("this needs a classifier; the model has one output")
    if classes is not None and outputs != classes:
        raise UserError(f"the model has {outputs} outputs, the data have {classes} classes")
    return checks.labels(y, len(x), outputs)
