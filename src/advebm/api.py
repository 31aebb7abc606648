"""The public functions.  Images are float32 (B, C, H, W) in [0, 1], labels int64 (B,); inputs are checked.

A function takes a network, which :func:`load` and :func:`wrap` return, and then computes in memory; or a run, and then
works in the run's folder, as the command of its name does.  A run is a :class:`Run`, its folder, or what stands for it
as on the command line; see :func:`open_run`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from advebm import energies, recipes
from advebm.attacks.projected import Attack
from advebm.core import checks, config, rng
from advebm.core.allocator import tune_cpu_allocator as tune_cpu_allocator
from advebm.core.errors import UserError
from advebm.data import pictures
from advebm.data.sources import Data
from advebm.diagnostics.doctor import Findings
from advebm.diagnostics.landscape import Along
from advebm.edits.base import Edit, Edited
from advebm.evaluation import compare as comparison
from advebm.evaluation import evaluate as evaluation
from advebm.evaluation.leaderboard import Leaderboard
from advebm.evaluation.suites import suite as find_suite
from advebm.metrics.base import Metric, Records, SampleSet, Subject
from advebm.metrics.probing import NearestNeighbours, Probe
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.models.batching import batch_size_for, device_of
from advebm.models.inference import BackendName, View, faster_model
from advebm.models.modes import searching
from advebm.models.network import Network, Normalize, Weights
from advebm.reporting import card
from advebm.reporting.build import report as build_report
from advebm.reporting.diagnostics import Diagnosis
from advebm.reporting.diagnostics import diagnose as draw_figures
from advebm.reproduction import experiments
from advebm.runs import find_model
from advebm.runs.find_space import feature_space, find_space
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run, new_folder
from advebm.sampling import edit_job, generate
from advebm.sampling.tune import Quantity
from advebm.training import loop
from advebm.training.sweep import By, Sweep
from advebm.workflows import adopt
from advebm.workflows import edit as edits
from advebm.workflows import evaluate as measuring
from advebm.workflows import sample as drawing
from advebm.workflows.devices import choose_device
from advebm.workflows.doctor import examine_on
from advebm.workflows.evaluate import Comparison
from advebm.workflows.leaderboard import rank
from advebm.workflows.probe import Probed, measure_probe
from advebm.workflows.probe import probe as fit_probe
from advebm.workflows.sample import Tuning
from advebm.workflows.sweep import sweep as run_sweep

FOLD_FROM = 2_000  # gradients of one image in a call of :func:`attack`, from which folding the network pays


@torch.inference_mode(False)
def load(path: Run | str | Path, *, checkpoint: str | int = "latest") -> Network:
    """Load the network of a model of any kind: averaged weights, eval mode, on the CPU.

    Args:
        path: a run, a checkpoint, a published folder, a model of the package such as ``cifar10-at-2h``,
            ``hf:USER/NAME`` on the Hub, a file of public weights, or ``PACKAGE.MODULE:FACTORY``, a user-defined module
            on images in [0, 1], also with weights: ``PACKAGE.MODULE:FACTORY@WEIGHTS``.
        checkpoint: checkpoint of a run: ``latest``, ``best`` or a number of images.

    Returns:
        The network: images (B, C, H, W) in [0, 1] -> logits (B, K).  It knows its data and its threat model.

    Raises:
        UserError: there is no model, or its file is damaged.

    Examples:
        >>> advebm.load("cifar10-at-2h")
        Network cifar10-at-2h: Staged, classifier of 10 classes, 2,797,610 parameters, threat PGD-20 l2 0.5
    """
    return find_model.find_model(path.folder if isinstance(path, Run) else path, checkpoint=str(checkpoint))


@torch.inference_mode(False)
def wrap(module: nn.Module, *, mean: float | Iterable[float] = 0.0, std: float | Iterable[float] = 1.0) -> Network:
    """Wrap your own classifier as a network on images in [0, 1], in eval mode; its logits also serve as features.

    Args:
        module: maps normalised images (B, C, H, W) to logits (B, K), not probabilities.  They may also be an attribute
            or entry ``logits`` of the output, or the only matrix of a tuple; weights are of any floating-point type.
        mean, std: the normalisation it was trained with, per channel or one for all, on the scale of [0, 1]; it becomes
            the first layer.

    Raises:
        UserError: it is no module, ``std`` is not positive, or the normalisation is for images up to 255.

    Examples:
        >>> mine = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
        >>> model = advebm.wrap(mine, mean=0.5, std=0.25)
        >>> model(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 10])
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

    Args:
        model: classifier or critic on images in [0, 1].
        x: images (B, C, H, W) in [0, 1], on the model's device.
        y: classes (B,), int64, for E(x, y); None: E(x).

    Raises:
        UserError: images are outside [0, 1], labels out of range, outputs are probabilities instead of logits, labels
            are given for a critic, or the model is an encoder.

    Examples:
        >>> model, images = advebm.load("runs/digits-at"), advebm.load_data("digits").test.float()
        >>> noise = torch.rand(100, 1, 8, 8)
        >>> bool(advebm.energy(model, images).mean() < advebm.energy(model, noise).mean())
        True
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

    In long searches batch norms are merged into convolutions, which changes outputs by rounding only.

    Args:
        model: classifier on images in [0, 1].
        x, y: images (B, C, H, W) in [0, 1] and their labels (B,).
        eps: radius of the ball, on the scale of [0, 1]; 0.5 is usual for ``l2``, 8/255 for ``linf``.
        norm: ``linf`` or ``l2``.
        steps: number of steps.
        step_size: length of a step in that norm; None: 2.5 ``eps / steps``.
        loss: what is raised: ``cross-entropy``, or the ``energy`` E(x, y).
        restarts: number of random starts, of which the most damaging counts.
        target: classes (B,) that the images should be taken for; None: any but ``y``.
        seed: seed of the random starts.

    Raises:
        UserError: images, labels, a radius or a name that do not fit, or a model that is no classifier.

    Examples:
        >>> model, test = advebm.load("runs/digits-at"), advebm.load_data("digits").test
        >>> x, y = test.float()[:100], test.y[:100]
        >>> x_adv = advebm.attack(model, x, y, eps=0.9, norm="l2")
        >>> bool(advebm.energy(model, x_adv, y).mean() > advebm.energy(model, x, y).mean())
        True
    """
    model = _as_network(model)
    x = _check_images(model, x)
    if not len(x):
        return x
    y = _check_classifier(model, x, y)
    search = Attack(eps=eps, norm=norm, steps=steps, step_size=step_size, loss=loss, restarts=restarts)
    generator = rng.generator(seed, "attack", device=x.device)
    with searching(model) as f:
        if steps * restarts * len(x) >= FOLD_FROM and model.precision == torch.float32:
            f = faster_model(model, x[:2])
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
        settings: settings of the sampler: ``steps``, ``step_size``, ``radius``, ``noise``, ``direction``, ``start``,
            as ``advebm explain cs`` explains them; lengths are on the scale of [0, 1].

    Returns:
        Images, float32 (N, C, H, W) in [0, 1], on the model's device.  To have them in a file, see :func:`draw_set`;
        to look at them, :func:`grid`.

    Raises:
        UserError: a class, a method or a setting that the model or its data do not have, or no data are known.

    Examples:
        >>> model = advebm.load("runs/digits-at")
        >>> images = advebm.sample(model, torch.arange(10), method="cs", steps=10)
        >>> images.shape
        torch.Size([10, 1, 8, 8])
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
    model: nn.Module | Run | str | Path,
    *,
    data: Data | str | None = None,
    threat: Attack | None = None,
    metrics: Iterable[Metric] | None = None,
    suite: str | None = None,
    tier: str = "standard",
    samples: Mapping[str, SampleSet] | None = None,
    features: Network | str | Path | None = None,
    checkpoint: str | int = "latest",
    device: str | None = None,
    seed: int = 0,
) -> Records:
    """Measure a network, or a run and its samples, on the test split of its data.

    Args:
        model: a network or any classifier; or a run, whose ``metrics.json`` the records are appended to.
        data: of a network: its data, a name such as ``digits`` or from :func:`load_data`.  A run has its own.
        threat: the attack; None: as the model was trained to withstand, if that is known, as it is of a run and of what
            :func:`load` returns.
        metrics: what to measure; None: a run's own metrics; of a network its accuracy, clean and under ``threat``.
        suite: the metrics of a paper instead: ``robustbench``, ``jeat``, ``cem``, ``binary-at`` or ``all``.
        tier: of a suite: ``quick`` (512 images), ``standard`` or ``full``.
        samples: of a network: sets of samples by name, for metrics of their quality.  A run has its own.
        features: feature space of sample quality: ``inception``, ``pixels``, a run, or a model; None: of a run the
            model's own features, which favour its samples.
        checkpoint: of a run: ``latest``, ``best`` or a number of images.
        device: of a run: None is the best one available.  A network computes where it is.
        seed: seed of all random numbers.

    Returns:
        The records: ``value`` and its standard error over images, accuracies as shares in [0, 1].

    Raises:
        UserError: what is needed is not known, an option is of the other kind of model, or a name does not exist.

    Examples:
        >>> model = advebm.load("runs/digits-at")
        >>> records = advebm.evaluate(model, data="digits", threat=advebm.Attack(eps=0.5, norm="l2", steps=5))
        >>> [record.name for record in records]
        ['accuracy', 'accuracy under PGD-5 l2 0.5']
    """
    if suite is not None and metrics is not None:
        raise UserError("suite says which metrics; leave metrics out")
    if isinstance(model, nn.Module):
        _only_for("runs", checkpoint=checkpoint != "latest", device=device)
        if data is None:
            raise UserError('no data are known of this model; name them, such as data="cifar10"')
        subject = _make_subject(model, data, threat, samples, features)
        if suite is not None:
            metrics = find_suite(suite, subject.threat, tier)
        return evaluation.evaluate(subject, (Accuracy(), RobustAccuracy()) if metrics is None else metrics, seed=seed)
    _only_for("networks; a run has its own", data=data, samples=samples)
    if isinstance(features, nn.Module):
        raise UserError("records of a run say what judged its samples: give features by name, such as a run's folder")
    changes: list[tuple[str, Any]] = [] if threat is None else [("threat", config.describe(threat, Attack))]
    changes += [] if metrics is None else [("metrics", [config.describe(metric) for metric in metrics])]
    options: dict[str, Any] = {"features": features, "checkpoint": str(checkpoint), "device": device, "seed": seed}
    return measuring.measure(_open(model), changes, suite_name=suite, tier=tier, **options)


def _make_subject(
    model: nn.Module,
    data: Data | str,
    threat: Attack | None,
    samples: Mapping[str, SampleSet] | None,
    features: Network | str | Path | None,
) -> Subject:
    """Return a network with what it is measured on; raise UserError if it gives no logits for the data's classes."""
    data = load_data(data) if isinstance(data, str) else data
    threat = threat or getattr(model, "threat", None)
    if threat is None:
        raise UserError("no threat model is known of this model; give one, such as threat=Attack(eps=8 / 255)")
    space = None
    if isinstance(features, str | Path):
        space = find_space(features).load(device_of(model))
    elif features is not None:
        space = feature_space("given features", features)
    model = _as_network(model)
    subject = Subject(model, data, data.test, threat, samples or {}, space, batch_size_for(data.shape, model))
    x, y = next(subject.batches())
    if not getattr(model, "encoder", False):  # some metrics fit a classifier on an encoder
        _check_classifier(model, x[:16], y[:16], classes=len(data.classes))
    return subject


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
    """Train a recipe, or go on with a run, and return the run; see :func:`advebm.training.loop.train`.

    Args:
        recipe: name of a recipe of the package, or the result of :func:`load_recipe`; ignored with ``resume``.
        folder: folder of the run; None: ``runs/NAME-TIME``.
        options: changes to a named recipe, such as ``{"train.images": 10_000, "objective.attack.eps": "8/255"}``.
        resume: whether to resume the run in ``folder``, with its own recipe.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; None: the best one available.
        track: experiment trackers that show the run, such as ``"tensorboard"`` or ``["tensorboard", "wandb"]``.

    Raises:
        UserError: an unknown recipe or option, a folder that is not empty, or a run that another process trains.
        Diverged: the loss was not finite, and no checkpoint was left to go back to.

    Examples:
        >>> options = {"train.images": 500, "backbone.width": 8}
        >>> advebm.train("digits-standard", folder="runs/short", options=options, device="cpu")
        Run runs/short: digits-standard, 512 of 500 images, 0 sets of samples, 0 records
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


@torch.inference_mode(False)
def sweep(
    recipe: Recipe | str,
    *,
    out: str | Path,
    vary: Mapping[str, Sequence[Any]] | None = None,
    trials: Sequence[Mapping[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
    seeds: int = 1,
    seed: int | None = None,
    jobs: int | None = None,
    halve: int = 0,
    budget: float | None = None,
    by: By = "robust",
    device: str | None = None,
) -> Sweep:
    """Train combinations of options side by side, and sort them by their score on validation images.

    Each trial is a run in ``out/trials``, trained with one thread in a process of its own.  After an interruption the
    same call goes on.  A script that calls this needs the guard ``if __name__ == "__main__":``, as its processes import
    the script.

    Args:
        recipe: name of a recipe of the package, or the result of :func:`load_recipe`.
        out: folder of ``sweep.md``, ``sweep.json``, ``sweep.png`` and the trials.
        vary: values by option, such as ``{"optimizer.lr": [0.05, 0.1]}``; all combinations are tried.
        trials: given combinations, such as ``[{"objective": "trades", "objective.beta": 3}]``.
        options: options of all trials, such as ``{"train.images": 20_000}``.
        seeds: number of seeds of each combination; their mean counts.
        seed: the first seed; None: the recipe's.
        jobs: number of trials side by side; None: as many as cores, one on a GPU.
        halve: number of rounds of successive halving before the last; 2: all train on a quarter of the images, the
            better half of them on a half, and the better half of these on all, each from the beginning.
        budget: FLOP of training that each trial may cost; it sets ``train.images``.
        by: the score that counts: ``robust`` or ``clean`` (accuracy, or AUROC of a critic), or ``fd``.
        device: ``cpu``, ``cuda``, …; None: the best one available.

    Returns:
        The combinations, the best first; ``sweep.best`` is the run of the first.

    Raises:
        UserError: an option, a value or a combination that does not exist, or a folder with other runs.
        Interrupted: Ctrl-C; what is trained is saved.

    Examples:
        >>> options = {"train.images": 256, "backbone.width": 8, "threat.steps": 2}
        >>> found = advebm.sweep(
        ...     "digits-standard", out="lr", vary={"optimizer.lr": [0.01, 0.1]}, options=options, device="cpu"
        ... )
        >>> [row.images for row in found.rows], found.best.finished
        ([256, 256], True)
    """
    given: dict[str, Any] = {"seeds": seeds, "seed": seed, "jobs": jobs, "halve": halve, "budget": budget, "by": by}
    overrides = list((options or {}).items())
    return run_sweep(recipe, overrides, vary=vary or {}, trials=trials, out=Path(out), device=device, **given)


def load_recipe(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe of the package, with options changed.

    Args:
        name: see ``advebm list recipe``.
        options: options by their dotted names, as on the command line; fractions such as ``8/255`` may be texts.

    Raises:
        UserError: an unknown recipe or option, or a value of the wrong type.

    Examples:
        >>> advebm.load_recipe("digits-at", {"train.images": 20_000, "seed": 1})
        Recipe digits-at: data digits, objective at, backbone small-conv, sampler cs, threat l2 0.9, 20,000 images
    """
    return resolve(recipes.find(name), list((options or {}).items()))


@torch.inference_mode(False)
def load_data(name: str, **settings: Any) -> Data:
    """Load training, validation and test images.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, ``folder:PATH``, ``npz:FILE``, ``hf:NAME``, …; see
            ``advebm list source``.
        settings: settings of the source, such as ``path`` or ``size``, in pixels.

    Returns:
        Splits ``train``, ``val``, ``test``, each with images ``x``, uint8 (N, C, H, W), and labels ``y`` (N,);
        ``data.test.float()`` are images in [0, 1].

    Raises:
        UserError: an unknown source or setting, or no images there.

    Examples:
        >>> advebm.load_data("digits").test
        Images: 359 of 1 x 8 x 8, 10 classes
    """
    return config.build({"kind": name, **settings}, "source").load()


def report(run: Run | str | Path, *, beside: Iterable[Run | str | Path] = (), out: str | Path | None = None) -> Path:
    """Write a report of everything that a run contains, one self-contained HTML file, and return its path.

    Args:
        run: the run, or what stands for it; see :func:`open_run`.
        beside: other runs to show for comparison.
        out: the file; None: ``report.html`` in the run's folder.

    Raises:
        UserError: there is no run, or the file cannot be written.

    Examples:
        >>> advebm.report("runs/digits-at", out="report.html")
        PosixPath('report.html')
    """
    first, *others = (_open(r, whole=False) for r in (run, *beside))
    return build_report(first, beside=others, out=None if out is None else Path(out))


def open_run(where: str | Path | Run, options: Mapping[str, Any] | None = None, *, whole: bool = True) -> Run:
    """Return the run that a reference stands for; around any other model make one in ``runs/models``, and say where.

    Args:
        where: a run's folder; or a checkpoint, a published folder, a model of the package, ``hf:USER/NAME``, a file of
            weights, ``PACKAGE.MODULE:FACTORY`` or ``PACKAGE.MODULE:FACTORY@WEIGHTS``.
        options: of a run where its images are now: ``{"data.path": PLACE}``; of a model that does not say what it was
            trained on, options of a recipe, such as ``{"data": "cifar10", "threat.eps": "8/255"}``.
        whole: of a published model, whether its data set is needed, as for measuring; else the images that it brings.

    Raises:
        UserError: nothing is there, or the model's data are not known.

    Examples:
        >>> run = advebm.open_run("runs/digits-at")
        >>> run.recipe.name, run.finished
        ('digits-at', True)
    """
    if isinstance(where, Run):
        return where.with_images_at((options or {}).items()) if options else where
    return adopt.open_run(where, (options or {}).items(), whole=whole)


@torch.inference_mode(False)
def draw_set(
    run: Run | str | Path,
    *,
    method: str | None = None,
    per_class: int = 10,
    classes: Sequence[int] | None = None,
    name: str | None = None,
    replace: bool = False,
    untuned: bool = False,
    checkpoint: str | int = "latest",
    processes: int = 1,
    batch: int | None = None,
    fast: BackendName = "auto",
    trajectory: bool = False,
    device: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> SampleSet:
    """Draw a set of samples into a run's folder, as ``advebm sample`` does; after a stop the same call goes on.

    Args:
        run: the run, or what stands for it; see :func:`open_run`.
        method: ``ta``, ``cs``, ``rcs``, ``langevin``, …; None: the recipe's.
        per_class: images of each class.
        classes: numbers of the classes; None: all.
        name: name of the set; None: ``METHOD-START``, with a number where another set has that name.
        replace: whether to replace a set of that name that was drawn with other settings.
        untuned: whether to use the recipe's settings even if :func:`tune` found others.
        checkpoint: ``latest``, ``best`` or a number of images.
        processes: number of processes; the images do not depend on it.
        batch: images that the network sees at once; None: as many as the memory allows, at most
            500, and fewer of more than 32 x 32 pixels.
        fast: how the network is computed: ``auto``, ``off``, ``fold``, ``compile``, ``bf16`` or ``bf16+compile``.
        trajectory: whether to write a film of one chain for each class, too.
        device: None: the best one available.
        seed: seed of starts and noise.
        settings: settings of the sampler, as for :func:`sample`.

    Returns:
        The set: images ``x``, float32 (N, C, H, W) in [0, 1], intended classes ``y`` (N,), -1 where there are none.

    Raises:
        UserError: a name, class or setting that does not exist, or ``name`` is that of a set with other settings.

    Examples:
        >>> advebm.draw_set("runs/digits-at", method="cs", per_class=2, steps=5, device="cpu")
        SampleSet: 20 images of 1 x 8 x 8, drawn by cs from class, 5 steps
    """
    if per_class < 1:
        raise UserError(f"per_class must be at least 1, got {per_class}")
    options: dict[str, Any] = {"per_class": per_class, "classes": None if classes is None else tuple(classes)}
    options |= {"name": name, "replace": replace, "untuned": untuned, "checkpoint": str(checkpoint), "seed": seed}
    options |= {"processes": processes, "batch": batch, "backend": fast, "trajectory": trajectory, "device": device}
    changes = _settings("sampler", settings)
    return generate.read_set(drawing.sample(_open(run, whole=False), method, changes, **options))


@torch.inference_mode(False)
def tune(
    run: Run | str | Path,
    *,
    method: str | None = None,
    step_size: Sequence[float] | None = None,
    radius: Sequence[float | None] | None = None,
    noise: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    by: Quantity = "KID",
    features: str | Path | None = None,
    per_class: int = 20,
    checkpoint: str | int = "latest",
    device: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Tuning:
    """Search settings of a sampler by a distance to validation images; :func:`draw_set` then takes the best.

    Args:
        run: the run, or what stands for it; see :func:`open_run`.
        method: kind of sampler; None: the recipe's.
        step_size, radius, noise, steps: values to try, lengths on the scale of [0, 1]; None: half, same and double of
            step size and steps, and the sampler's own radius and noise.
        by: the distance, ``KID``, which is unbiased, or ``FD``.
        features: feature space of the distance, as for :func:`evaluate`; None: the model's own features.
        per_class: images of each class in a trial.
        checkpoint: ``latest``, ``best`` or a number of images.
        device: None: the best one available.
        seed: seed of starts and noise.
        settings: settings of the sampler that all trials share.

    Raises:
        UserError: a name or a setting that does not exist, or other processes are at all trials.

    Examples:
        >>> tuning = advebm.tune("runs/digits-at", steps=(5, 10), step_size=(0.1,), per_class=10, device="cpu")
        >>> len(tuning.trials), tuning.trials[0]["value"] <= tuning.trials[1]["value"]
        (2, True)
    """
    if per_class < 1:
        raise UserError(f"per_class must be at least 1, got {per_class}")
    values: dict[str, Sequence[Any] | None] = {"step_size": step_size, "radius": radius, "noise": noise, "steps": steps}
    chosen = {name: listed for name, listed in values.items() if listed is not None}
    options: dict[str, Any] = {"by": by, "features": features, "per_class": per_class, "checkpoint": str(checkpoint)}
    options |= {"device": device, "seed": seed}
    return drawing.tune_sampler(_open(run), method, _settings("sampler", settings), chosen, **options)


@torch.inference_mode(False)
def diagnose(
    runs: Run | str | Path | Sequence[Run | str | Path],
    what: Sequence[str] = (),
    *,
    method: str | None = None,
    images: int = 100,
    along: Along = "random",
    reach: float = 2.0,
    steps: int = 1000,
    checkpoint: str | int = "latest",
    device: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Diagnosis:
    """Draw figures of why runs generate, or do not, into the first run's folder, for its report.

    Args:
        runs: a run, or several on the same data; see :func:`open_run`.
        what: of ``landscape``, ``gradients``, ``energies``, ``neighbours``, ``interpolation``, ``chains``,
            ``saliency``, ``inversion``; empty: all that apply.
        method: sampler of the chains; None: the first run's.
        images: number of test images behind the numbers.
        along: directions of landscapes: ``random``, ``gradient`` or ``pca``.
        reach: extent of landscapes, l2, in pixels of [0, 1].
        steps: length of long chains.
        checkpoint: ``latest``, ``best`` or a number of images.
        device: None: the best one available.
        seed: seed of all random numbers.
        settings: settings of the sampler.

    Raises:
        UserError: an unknown figure, or runs on different data.

    Examples:
        >>> diagnosis = advebm.diagnose("runs/digits-at", ["gradients"], images=20, device="cpu")
        >>> [path.name for path in diagnosis.figures]
        ['gradients.png']
    """
    several = [runs] if isinstance(runs, Run | str | Path) else runs
    opened = [_open(run) for run in several]
    options: dict[str, Any] = {"count": images, "along": along, "reach": reach, "steps": steps, "seed": seed}
    options["sampler"] = drawing.choose_sampler(opened[0], method, _settings("sampler", settings))
    options |= {"checkpoint": str(checkpoint), "device": choose_device(device)}
    return draw_figures(comparison.by_title(opened), what, **options)


@torch.inference_mode(False)
def edit(
    model: nn.Module | Run | str | Path,
    what: str,
    images: Tensor | str | Path | Sequence[str | Path] | None = None,
    goal: Tensor | int | str | None = None,
    *,
    mask: Tensor | str | Path | None = None,
    box: tuple[int, int, int, int] | None = None,
    others: Sequence[nn.Module | Run | str | Path] = (),
    classes: Sequence[int] = (),
    split: Literal["test", "val"] | None = None,
    source: Run | str | Path | None = None,
    count: int = 8,
    fit: bool = False,
    out: str | Path | None = None,
    replace: bool = False,
    film: bool = False,
    checkpoint: str | int = "latest",
    device: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> Edited:
    """Edit images by the energy of a classifier or a critic.

    Args:
        model: a network, which edits a tensor of images; or a run, which also takes files and images of its data.
        what: ``translate``, ``inpaint``, ``paint``, ``denoise``, ``upsample``, ``compose``, ``interpolate`` or
            ``counterfactual``; ``advebm explain inpaint`` explains each.
        images: a tensor (B, C, H, W), uint8 or in [0, 1]; of a run also files, and folders of them.  None: the first
            ``count`` images of the run's ``split``, spoilt first for what restores images; without a split seeds, for
            ``compose`` and ``interpolate``.
        goal: class to move to: a number or a name, or for a tensor of images one number for each, int64 (B,).  None:
            lower E(x), as a critic does.
        mask: bool (H, W), true where pixels are to be made, or a file that is white there: ``inpaint``, ``paint``.
        box: a rectangle ``(left, top, right, bottom)`` in pixels as the mask; None: for ``inpaint`` the middle half.
        others: further models for ``compose``.
        classes: classes for ``compose``, one for each model, or several of the one.
        split: ``test`` or ``val``.
        source: with ``split``: the run whose data are translated.
        count: number of images of the split, or of seeds.
        fit: whether to cut, scale and convert files that the model does not take.
        out: of a run: a folder to write the results to, as the command does; None: nothing is written.
        replace: whether to replace results in ``out``.
        film: whether to write ``film.gif`` there, too.
        checkpoint: of a run: ``latest``, ``best`` or a number of images.
        device: of a run: None is the best one available.  A network computes where it is.
        seed: seed of all random numbers.
        settings: settings of the edit, such as ``steps``, ``step_size``, ``radius`` (l2, scale of [0, 1]).

    Returns:
        Images ``x`` (B, C, H, W) in [0, 1] on the CPU, what the search began with, and numbers of each image.

    Raises:
        UserError: an unknown edit, class or setting, or options that do not go together.

    Examples:
        >>> model, test = advebm.load("runs/digits-at"), advebm.load_data("digits").test
        >>> edited = advebm.edit(model, "inpaint", test.float()[:4], box=(2, 2, 6, 6), steps=10)
        >>> edited.x.shape
        torch.Size([4, 1, 8, 8])
        >>> restored = advebm.edit("runs/digits-at", "denoise", split="test", count=4, device="cpu")
        >>> sorted(restored.numbers)[:2]
        ['PSNR after', 'PSNR before']
    """
    given = {"mask": mask, "box": box, "others": others, "classes": classes, "source": source, "goal": goal}
    in_memory = isinstance(images, Tensor)
    edits.check_options(what, {**given, "image": images if not in_memory else None, "split": split, "count": count})
    if what == "score":
        raise UserError(
            "score changes no image: advebm.energy gives the energies, advebm.metrics.unusual compares them"
        )
    method, hole = edits.find_edit(what, _settings("edit", settings)), None if box is None else ",".join(map(str, box))
    mask = Path(mask) if isinstance(mask, str) else mask
    if isinstance(images, Tensor):
        _only_for("runs and their images, not a tensor", split=split, source=source, fit=fit, out=out, film=film)
        _only_for("results that are written", replace=replace)
        networks = [_find_network(m, checkpoint, device) for m in (model, *others)]
        return _edit_tensor(method, networks, images, goal, classes, mask, hole, seed)
    if isinstance(model, nn.Module):
        raise UserError("a network edits a tensor of images (B, C, H, W); files and splits go with a run")
    if isinstance(goal, Tensor):
        raise UserError("goal is one class, by number or name; a tensor of them goes with a tensor of images")
    if out is None:
        _only_for("results that are written: give out", replace=replace, film=film)
    paths = [images] if isinstance(images, str | Path) else images or ()
    request = edit_job.EditRequest(
        run=_open(model, whole=False),
        others=tuple(_open(other, whole=False) for other in others),
        source=None if source is None else _open(source, whole=False),
        images=tuple(map(Path, paths)),
        split=split,
        count=count,
        fit=fit,
        goal=None if goal is None else str(goal),
        classes=tuple(map(str, classes)),
        mask=mask,
        box=hole,
        seed=seed,
        checkpoint=str(checkpoint),
        device=choose_device(device),
    )
    folder = None if out is None else edits.choose_folder(what, request, Path(out), replace=replace)
    done = edits.edit(request, method)
    if folder is not None:
        done.write(folder, film=film)
    return done.edited


def _edit_tensor(
    method: Edit,
    models: Sequence[nn.Module],
    images: Tensor,
    goal: Tensor | int | str | None,
    classes: Sequence[int],
    mask: Tensor | Path | None,
    box: str | None,
    seed: int,
) -> Edited:
    """Edit a tensor of images by one network, or compose by several."""
    if isinstance(goal, str):
        goal = _known_data(models[0]).number(goal)
    y = torch.full((len(images),), goal) if isinstance(goal, int) else goal
    hole = edit_job.find_hole(method, (images.shape[-2], images.shape[-1]), mask, box)
    if len(models) == 1 and classes:
        models = [models[0]] * len(classes)
    numbers: list[int | None] = [*classes] or [None] * len(models)
    return edit_job.apply_edit(method, models, images, y, classes=numbers, hole=hole, seed=seed)


@torch.inference_mode(False)
def doctor(
    model: nn.Module | Run | str | Path,
    *,
    data: Data | str | None = None,
    threat: Attack | None = None,
    images: int = 300,
    checkpoint: str | int = "latest",
    device: str | None = None,
    seed: int = 0,
) -> Findings:
    """Look for what makes a classifier's energies or robust accuracy wrong, and say what to do; see ``docs/doctor.md``.

    Args:
        model: a classifier on images in [0, 1], which is left as it was; or a run, or any reference for :func:`load`.
        data: labelled data, a name such as ``cifar10`` or from :func:`load_data`; None: those of a loaded model.
        threat: gives the radius (scale of [0, 1]) and norm of attacks; None: that of a loaded model, else linf 8/255.
        images: number of test images to try the model on, at least 50.
        checkpoint: of a run: ``latest``, ``best`` or a number of images.
        device: of a reference: None is the best one available.  A network computes where it is.
        seed: seed of all random numbers.

    Returns:
        The findings, an empty list if nothing is wrong; ``findings.faults`` are those that spoil numbers.

    Raises:
        UserError: no data are known, they have no labels, or too few images; or the model is an encoder.

    Examples:
        >>> softmax = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Softmax(1))
        >>> advebm.doctor(softmax, data="digits").faults[0].name
        'probabilities'
    """
    network = _find_network(model, checkpoint, device)
    data = load_data(data) if isinstance(data, str) else data or _known_data(network)
    title = "the model" if isinstance(model, nn.Module) else str(getattr(model, "folder", model))
    threat = threat or getattr(network, "threat", None) or Attack()
    return examine_on(network, data, threat, title=title, images=images, seed=seed)


@torch.inference_mode(False)
def compare(
    runs: Sequence[Run | str | Path],
    *,
    threat: Attack | None = None,
    features: str | Path | None = None,
    out: str | Path | None = None,
    replace: bool = False,
    device: str | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure runs alike and write one report: clean, PGD-10, PGD-50 and energy-attack accuracy, sample quality, cost.

    What a run's ``metrics.json`` holds already is not measured again.

    Args:
        runs: runs on the same images, or what stands for them; see :func:`open_run`.
        threat: threat model for all; None: the first run's.
        features: feature space of sample quality, as for :func:`evaluate`.
        out: file of the report; None: ``comparison.html``, with a number where that is there already.
        replace: whether to replace the file.
        device: None: the best one available.
        seed: seed of all random numbers.

    Raises:
        UserError: the runs have different test images, or ``out`` is there already.

    Examples:
        >>> comparison = advebm.compare(["runs/digits-at"], out="comparison.html", device="cpu")
        >>> list(comparison.records), comparison.report.name
        (['digits-at'], 'comparison.html')
    """
    options: dict[str, Any] = {"features": features, "seed": seed, "device": device, "replace": replace}
    return measuring.compare_runs(
        [_open(run) for run in runs], threat, out=None if out is None else Path(out), **options
    )


@torch.inference_mode(False)
def leaderboard(
    runs: Sequence[Run | str | Path],
    *,
    options: Mapping[str, Any] | None = None,
    tier: Literal["quick", "standard", "full"] = "quick",
    features: str | Path | None = None,
    out: str | Path | None = None,
    replace: bool = False,
    device: str | None = None,
    seed: int = 0,
) -> Leaderboard:
    """Rank models by one protocol: clean and robust accuracy, FD, class score, detection of outliers, seconds.

    What a run holds already is not measured again.  A model that cannot be opened or measured does not stop the others.

    Args:
        runs: runs, or what stands for them; see :func:`open_run`.
        options: as on the command line: ``data`` of models that do not know theirs; ``threat.eps`` and ``threat.norm``
            (else those of the first model that knows its threat model); ``sampler``, ``sampler.steps``, …
        tier: how much is measured.  ``quick``: PGD-20 on 512 images, 1,000 samples; ``standard``: APGD-CE and APGD-T
            on 1,000, 5,000 samples; ``full``: AutoAttack on all, 50,000 samples.
        features: the judge of all samples, as for :func:`evaluate`; None: ``cifar10-infonce`` for CIFAR-10, else
            ``pixels``.
        out: folder of table and picture; None: ``leaderboard``, with a number if another protocol's is there.
        replace: whether to replace another protocol's there.
        device: None: the best one available.
        seed: seed of all random numbers.

    Returns:
        The rows, the most robust model first; in a notebook shown as a table and a picture.

    Raises:
        UserError: no model can be measured, or an option that does not exist.

    Examples:
        >>> board = advebm.leaderboard(["runs/digits-at"], options={"sampler.steps": 2}, device="cpu")
        >>> board.rows[0].title, round(board.rows[0].numbers["AUROC"]["value"]) <= 1
        ('digits-at', True)
    """
    models = [run if isinstance(run, Run) else str(run) for run in runs]
    given: dict[str, Any] = {"tier": tier, "features": features, "replace": replace, "device": device, "seed": seed}
    return rank(models, list((options or {}).items()), out=None if out is None else Path(out), **given)


@torch.inference_mode(False)
def probe(
    run: Run | str | Path,
    *,
    out: str | Path | None = None,
    c: float = 1.0,
    branch: Literal["clean", "adversarial"] = "clean",
    neighbours: int = 20,
    threat: Attack | None = None,
    checkpoint: str | int = "latest",
    device: str | None = None,
    seed: int = 0,
) -> Probed:
    """Fit a linear classifier on a run's frozen features, and measure it and the nearest neighbours in them.

    Args:
        run: the run, typically of an encoder, or what stands for it; see :func:`open_run`.
        out: folder of the classifier's run; None: ``RUN-probe``.
        c: inverse weight of the l2 penalty.
        branch: of dual batch norms.
        neighbours: number of nearest neighbours that vote.
        threat: threat model of the classifier; None: the run's.
        checkpoint: ``latest``, ``best`` or a number of images.
        device: None: the best one available.
        seed: seed of the attack.

    Raises:
        UserError: the data have no labels, the network no features, or ``out`` is not empty.

    Examples:
        >>> probed = advebm.probe("runs/digits-at", out="runs/probed", device="cpu")
        >>> probed.records[0].name
        'accuracy'
    """
    opened = _open(run)
    options: dict[str, Any] = {"checkpoint": str(checkpoint), "device": choose_device(device)}
    changes = [] if threat is None else [("threat", config.describe(threat, Attack))]
    by = Probe(c, branch=branch)
    probed = fit_probe(opened, None if out is None else Path(out), by=by, overrides=changes, **options)
    records = measure_probe(opened, probed, NearestNeighbours(neighbours, branch), seed=seed, **options)
    return Probed(probed, records)


def export(
    run: Run | str | Path,
    folder: str | Path,
    *,
    weights: Weights = "float32",
    images: int | None = None,
    license: str | None = None,
    checkpoint: str | int = "latest",
) -> Path:
    """Write a run's model by itself, its averaged weights and a card with what was measured; return the folder.

    Args:
        run: the run, or what stands for it; see :func:`open_run`.
        folder: a new or empty one, which :func:`load` then takes.
        weights: ``float32``, ``float16`` or ``bfloat16``.
        images: test images of each class that go along, with Gaussians of the training images, for drawing where the
            data are not; 0: neither; None: 4 of digits and CIFAR, 0 of other data.
        license: identifier of the model's licence, such as ``apache-2.0``; None: the card names none.
        checkpoint: ``latest``, ``best`` or a number of images.

    Raises:
        UserError: a folder that is not empty, or weights that are too large for their type.

    Examples:
        >>> advebm.load(advebm.export("runs/digits-at", "published", weights="float16")).threat.norm
        'l2'
    """
    options: dict[str, Any] = {"weights": weights, "images": _count(images), "license": license}
    options["checkpoint"] = str(checkpoint)
    return card.write_model(_open(run, whole=False), Path(folder), **options)


def push(
    run: Run | str | Path,
    name: str,
    *,
    private: bool = False,
    weights: Weights = "float32",
    images: int | None = None,
    license: str | None = None,
    checkpoint: str | int = "latest",
) -> str:
    """Publish on the Hub what :func:`export` writes, where ``hf:USER/NAME`` finds it; return the page's address.

    Args:
        run: the run, or what stands for it; see :func:`open_run`.
        name: ``USER/NAME``.
        private: for those with access only.
        weights, images, license, checkpoint: as for :func:`export`.

    Raises:
        UserError: nobody is logged in to the Hub, or it cannot be reached.

    Examples:
        >>> advebm.push("runs/digits-at", "USER/NAME", private=True)  # doctest: +SKIP
    """
    options: dict[str, Any] = {"weights": weights, "images": _count(images), "license": license}
    options["checkpoint"] = str(checkpoint)
    return card.push_model(_open(run, whole=False), name, private=private, **options)


@torch.inference_mode(False)
def reproduce(
    name: str,
    *,
    scale: str | None = None,
    seeds: int = 1,
    quick: bool = False,
    rows: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> Path:
    """Carry out an experiment or a table of the papers; what an earlier call did in the same folder is not repeated.

    Args:
        name: an experiment or a table; ``advebm reproduce --list`` lists both.
        scale: of a table: ``full``, ``gpu-30min``, ``cpu-2h``, ``cpu-30min`` or ``digits``.
        seeds: number of training seeds; several give means and standard deviations.
        quick: whether an experiment trains for less, and says so.
        rows: trained models, by the label of the run that they stand for: ``{"at": "model.pt"}``.
        options: options of all recipes, such as ``{"train.images": 5_000}``.
        out: the folder; None: ``runs/NAME`` or ``runs/NAME-SCALE``.

    Returns:
        The path of an experiment's report, or of a table's numbers beside the paper's.

    Raises:
        UserError: an unknown name, scale or option, or a model that does not fit.

    Examples:
        >>> advebm.reproduce("cem-table2", scale="digits")  # doctest: +SKIP
    """
    given: dict[str, Any] = {"seeds": seeds, "quick": quick, "given": rows, "options": list((options or {}).items())}
    return experiments.reproduce(name, None if out is None else Path(out), scale=scale, **given)


def grid(x: Tensor, *, columns: int = 10, tile: int = 64) -> Image.Image:
    """Draw images as a picture, which a notebook shows and ``.save("grid.png")`` writes.

    Args:
        x: images (N, C, H, W), uint8 or floating point in [0, 1].
        columns: images in a row.
        tile: width of an image in the picture, about, in pixels; pixels are enlarged by a whole factor.

    Raises:
        UserError: not images, or none.

    Examples:
        >>> advebm.grid(advebm.load_data("digits").test.x[:20], tile=32).size
        (364, 76)
    """
    x = x if isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 4 else checks.images(x)
    if not len(x):
        raise UserError("there are no images to draw")
    return pictures.sheet(x.detach().cpu(), columns, tile=tile)


def _open(run: Run | str | Path | nn.Module, *, whole: bool = True) -> Run:
    """Return a run; ``whole``: whether the data set of a published model is needed, see :func:`adopt.open_run`."""
    if isinstance(run, nn.Module):
        raise UserError("this works in the folder of a run: give that, or a reference such as PACKAGE.MODULE:FACTORY")
    return run if isinstance(run, Run) else adopt.open_run(run, whole=whole)


def _find_network(model: nn.Module | Run | str | Path, checkpoint: str | int, device: str | None) -> nn.Module:
    """Return a network: a user's own as it is, that of a run or a reference on a device."""
    if isinstance(model, nn.Module):
        _only_for("runs and references; move the network itself", checkpoint=checkpoint != "latest", device=device)
        return _as_network(model)
    where = model.folder if isinstance(model, Run) else model
    return load(where, checkpoint=checkpoint).to(choose_device(device))


def _known_data(model: nn.Module) -> Data:
    """Return the data that a loaded network was trained on; raise UserError if they are not known."""
    origin = getattr(model, "origin", None)
    known = origin.options() if origin is not None else {}
    if "data" not in known:
        raise UserError('no data are known of this model; name them, such as data="cifar10"')
    return config.build(known["data"], "source").load()


def _settings(block: str, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{block}.{name}", value) for name, value in settings.items()]


def _only_for(what: str, **given: Any) -> None:
    """Raise UserError for options that were given, though they are only for something else."""
    if wrong := [name for name, value in given.items() if value is not None and value is not False]:
        raise UserError(f"{', '.join(wrong)}: only for {what}")


def _count(images: int | None) -> int | None:
    if images is not None and images < 0:
        raise UserError(f"images must be at least 0, got {images}")
    return images


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
