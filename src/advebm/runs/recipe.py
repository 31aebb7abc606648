"""Recipes: the complete configuration of a run."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from advebm import recipes
from advebm.attacks.base import ball_text
from advebm.attacks.projected import Attack
from advebm.core import config
from advebm.core.errors import Notice, UserError
from advebm.data.negatives import GaussianImages
from advebm.data.sources import Data, Source, Unlabelled
from advebm.metrics.base import Metric
from advebm.models.inference import BackendName
from advebm.models.network import Architecture, Backbone, Head
from advebm.models.precision import usable_precision
from advebm.objectives.base import Objective
from advebm.objectives.langevin import SGLD
from advebm.runs.optim import SGD, Cosine, Optimizer, Schedule
from advebm.samplers.base import Sampler

# Sources that take their images from others, or make them of others' images
WRAPPERS = ("part", "classes", "unlabelled", "gaussians", "low-resolution", "mixture")
OTHER_IMAGES = ("outside", "extra")  # sources besides the data, which each stage has for itself


@dataclasses.dataclass(frozen=True)
class Training:
    """Length of training, batches, precision and periods.  All periods are in images.

    Attributes:
        images: number of images to train on, rounded up to whole batches; 0 keeps the weights of ``init`` unchanged.
        batch: images per optimiser step, over all streams and processes.
        streams: number of equal shares of a batch, each with its own random numbers, chains and batch-norm statistics.
            Each process works on its streams in turn, so results do not depend on the number of processes.  Running
            statistics are updated once per batch, by the mean over its streams.  Encoders, whose loss compares images
            of all streams, need exactly one stream per process.
        ema: half-life of the weight average in images; 0: no average.
        precision: precision of the network in searches and losses, ``float32`` or ``bfloat16`` (autocast); weights,
            images, updates and all measurements stay float32.  ``float64`` applies to weights and losses, also in
            checkpoints, to compare runs closely; images and what is computed from the run later stay float32.
        fast: how searches in eval mode compute the network, see :class:`advebm.models.inference.Backend`: ``off`` (as
            in losses), ``fold``, ``compile``, ``bf16`` or ``bf16+compile``; ``auto`` is ``bf16`` if ``precision`` is
            bfloat16 (``fold`` where that is not multiplied in hardware), else ``off``, which is bit-identical.
        whiten: whether the first convolution of a new network begins with filters that whiten patches of the training
            images (Jordan, 2024), as many of the strongest components as fit into half of its channels; the weights of
            ``init`` replace them.
        recompute: whether losses store only the input of each block of the backbone and recompute the rest for the
            gradient (activation checkpointing): less memory, one more forward pass, the same numbers.
        clip: largest gradient norm; None: no limit.
        log_every, validate_every, checkpoint_every: periods in images.
        validate_with: number of validation images scored each time, clean and attacked; None: all.
        select: which checkpoint is the best.  ``robustness``: that of the highest score under the recipe's threat
            (accuracy of a classifier, AUROC of a critic, contrastive accuracy of an encoder); if equal, the clean score
            decides.  ``fd``: that of the lowest FD in ``features``, as the authors' codes of AT-EBMs and DAT select by
            FID; if equal, the score under the threat decides.
        features: the feature space in which each validation logs ``val/fd``, the FD between images drawn by the
            recipe's sampler and all validation images: a run or model other than this one, which would favour its own
            samples, ``inception`` or ``pixels``.  None: validation draws no images.
        samples: number of images drawn for ``val/fd``.  Fewer give a larger FD, so compare it at one number only.
        rollbacks: number of times that training may return to the last checkpoint after a non-finite loss before the
            run stops.  Each time, random numbers change and the learning rate is multiplied by ``backoff``.
    """

    images: int = 100_000
    batch: int = 128
    streams: int = 1
    ema: int = 5_000
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    fast: BackendName = "auto"
    whiten: bool = False
    recompute: bool = False
    clip: float | None = 1.0
    log_every: int = 2_000
    validate_every: int = 10_000
    validate_with: int | None = None
    select: Literal["robustness", "fd"] = "robustness"
    features: str | None = None
    samples: int = 1_000
    checkpoint_every: int = 20_000
    rollbacks: int = 3
    backoff: float = 0.5

    def __post_init__(self) -> None:
        config.check_choices(self)
        if self.images < 0:
            raise UserError(f"images must be at least 0, got {self.images}")
        for name in ("batch", "streams", "log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.streams:
            raise UserError(f"batch {self.batch} cannot be cut into {self.streams} equal streams")
        if min(self.ema, self.rollbacks) < 0 or not 0 < self.backoff <= 1:
            got = f"{self.ema}, {self.rollbacks}, {self.backoff}"
            raise UserError(f"ema and rollbacks must be >= 0 and backoff must lie in (0, 1], got {got}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip must be > 0 or none, got {self.clip}")
        if self.validate_with is not None and self.validate_with < 1:
            raise UserError(f"validate_with must be at least 1 or none, got {self.validate_with}")
        if self.samples < 2:
            raise UserError(f"samples must be at least 2, got {self.samples}")
        if self.select == "fd" and self.features is None:
            raise UserError(
                "train.select fd needs a feature space for FD; give --train.features RUN (a classifier of these data, "
                "not the run itself, which would favour its own samples), a model of the package, inception or pixels"
            )

    @property
    def cites(self) -> tuple[str, ...]:
        """Return the keys of ``citations.bib`` for the options in use."""
        return ("jordan2024airbench",) if self.whiten else ()


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """The network's first layer, ``(x - mean) / std``, with one value for all channels or one per channel.

    Attributes:
        mean, std: on the scale of [0, 1].  None: those of the training split.  (0.5 and 0.5 give inputs in [-1, 1]; 0
            and 1 leave the images unchanged.)
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The complete configuration of a run.

    Attributes:
        name: name of the recipe, also used for run folders.
        data: the dataset.
        backbone: the network between normalisation and head.
        objective: the training method.
        threat: the threat model and its attack, used in validation and evaluation.
        sampler: the default sampler, whose settings carry over to other algorithms.  A sampler of an encoder takes
            temperature and cosine from the objective unless they are set here.
        metrics: what ``evaluate`` measures.
        optimizer, schedule, train: how the objective is minimised.
        seed: seed of everything random except the split of the data.
        init: source of the initial weights: a run, a published model (a folder or ``hf:USER/NAME``), or a weight file.
            A head for a different number of classes is initialised randomly.
        outside: images from outside the data distribution, for objectives that need them.
        extra: further images, used without labels, for objectives that need them.
        normalise: the network's first layer.
        before: stages to train before this one, each starting from the weights of the previous one: names of recipes,
            or blocks.  Options that a block omits are taken from this recipe, except ``init``, ``outside``, ``extra``,
            ``train.select`` and ``train.features``.  A stage that is named is that recipe, with this one's ``seed``,
            ``train.precision`` and ``train.fast``, and its options of ``data`` where the file of the stage has none.
    """

    name: str
    data: Source
    backbone: Backbone
    objective: Objective
    threat: Attack
    sampler: Sampler
    metrics: tuple[Metric, ...]
    optimizer: Optimizer = SGD()
    schedule: Schedule = Cosine()
    train: Training = Training()
    seed: int = 0
    init: str | None = None
    outside: Source | None = None
    extra: Source | None = None
    normalise: Normalisation = Normalisation()
    before: "tuple[Recipe, ...]" = ()  # as a whole: Python 3.10 does not look into tuple["Recipe", ...]

    def __repr__(self) -> str:
        plain = config.describe(self)
        kinds = ", ".join(f"{role} {plain[role]['kind']}" for role in ("data", "objective", "backbone", "sampler"))
        ball = ball_text(self.threat.eps, self.threat.norm)
        return f"Recipe {self.name}: {kinds}, threat {ball}, {self.train.images:,} images"

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise UserError(f"a name is part of a folder's, without /, got {self.name!r}")
        for role in ("outside", "extra"):
            needed = role in self.objective.needs
            if needed != (getattr(self, role) is not None):
                kind = type(self.objective).__name__
                fix = f"give them with --{role} KIND" if needed else f"leave {role} out"
                raise UserError(f"objective {kind} {'needs' if needed else 'takes no'} {role} images; {fix}")
        object.__setattr__(self, "sampler", self.sampler.trained_by(self.objective))
        kind, method = type(self.objective).__name__, type(self.sampler).__name__
        if (encoder := self.objective.hidden is not None) != self.sampler.encoder:
            source, trains = ("logits", "an encoder") if encoder else ("an encoder", "none")
            fix = "np-langevin, np-pgd or maxent" if encoder else "cs, or langevin for a critic"
            raise UserError(
                f"sampler {method} draws from {source}, and objective {kind} trains {trains}; --sampler {fix}"
            )
        if self.objective.outputs == 1 and self.sampler.conditional:
            raise UserError(
                f"sampler {method} draws from classes, and objective {kind} trains a critic, which has none; "
                "give --sampler ascent or langevin"
            )

    def computed_on(self, device: str) -> "Recipe":
        """Return the recipe with float32 instead of bfloat16 in all stages if the device does not support bfloat16.

        Searches are then folded where ``fast`` is ``auto``, as training has it.
        """
        precision: Any = usable_precision(self.train.precision, torch.device(device))
        train = dataclasses.replace(self.train, precision=precision)
        if precision != self.train.precision and train.fast == "auto":
            train = dataclasses.replace(train, fast="fold")
        before = tuple(stage.computed_on(device) for stage in self.before)
        return dataclasses.replace(self, train=train, before=before)

    def with_sampler(self, kind: str, changes: Iterable[tuple[str, Any]] = ()) -> "Recipe":
        """Return the recipe with another kind of sampler, which keeps the settings that mean the same, and changes.

        ``sgld`` takes step and noise of the chains of training (``objective.negatives``) and, where these begin anew at
        each training step, also their number of steps and their start; it does not limit a pixel's step as they may.
        """
        plain, chains = config.describe(self), getattr(self.objective, "negatives", None)
        own: dict[str, Any] = {}
        if kind == "sgld" and plain["sampler"]["kind"] != kind and isinstance(chains, SGLD):
            own = {"step_size": chains.step_size, "noise": chains.noise}
            if not chains.buffer:
                own |= {"steps": chains.steps, "start": chains.start}
            if own.get("start") == "outside" and "labels" in self.objective.needs and self._outside_is_gaussians():
                own |= {"start": "class", "shrinkage": Sampler.shrinkage}
        return resolve(plain, [("sampler", kind), *((f"sampler.{k}", v) for k, v in own.items()), *changes])

    def _outside_is_gaussians(self) -> bool:
        """Return whether the outside images are drawn from Gaussians of the data's own classes, wherever these are."""
        if not isinstance(self.outside, GaussianImages):
            return False
        fitted, own = ({**config.describe(source), "augment": None} for source in (self.outside.source, self.data))
        if None in (fitted.get("path"), own.get("path")):
            fitted["path"] = own["path"] = None
        return fitted == own

    def unlabelled(self) -> "Recipe":
        """Return the recipe without labels, with seeds from one global Gaussian instead of one per class.

        Raises:
            UserError: the objective needs labels.
        """
        if "labels" in self.objective.needs:
            raise UserError(f"objective {type(self.objective).__name__} needs labels; leave --labels out")
        start = "global" if self.sampler.start == "class" else self.sampler.start
        sampler = dataclasses.replace(self.sampler, start=start)
        before = tuple(stage.unlabelled() for stage in self.before)
        return dataclasses.replace(self, data=Unlabelled(self.data), sampler=sampler, before=before)


def resolve(plain: Mapping[str, Any], overrides: Iterable[tuple[str, Any]] = ()) -> Recipe:
    """Build a recipe from plain data and overrides such as ``("objective.attack.eps", "8/255")``.

    Overrides of a kind (``objective.kind`` or ``objective``) are applied first and keep the options that both kinds
    have; a mapping replaces the whole block.  The others are applied after all defaults are filled in, those of a whole
    list before those of options inside it, and those of the objective first.  Stages in ``before``, which may be
    overridden as a whole, then take missing options from the recipe, and last come overrides such as ``before.0.…``.

    Raises:
        UserError: an unknown name or option, or a value of the wrong type.
    """
    roles = {
        f.name: role for f in dataclasses.fields(Recipe) if (role := config.role_of(f.type)) and f.name != "metrics"
    }
    plain, rest, overrides = _unset_shared(plain), [], list(overrides)
    _say_whose_threat(plain, overrides)
    before = dict(overrides).get("before", plain.pop("before", None)) or ()
    if isinstance(before, str) and before.lower() in ("none", "null"):
        before = ()
    if isinstance(before, str):
        try:
            before = yaml.safe_load(before)
        except yaml.YAMLError:
            raise UserError(f"before takes a list of stages such as [RECIPE], got {before!r}") from None
    if not isinstance(before, list | tuple):
        raise UserError(f"recipe.before takes a list of stages, got {before!r}")
    for dotted, value in [pair for pair in overrides if not pair[0].startswith("before")]:
        block = dotted.removesuffix(".kind")
        if block in roles and isinstance(value, Mapping):
            plain[block] = value
        elif block in roles and str(value).lower() in ("none", "null"):
            plain[block] = None
        elif block in roles:
            old = plain.get(block)
            plain[block] = config.switch(old if isinstance(old, Mapping) else {}, roles[block], value)
        else:
            rest.append((dotted, value))
    own = [pair for pair in rest if pair[0].startswith("objective.") and "objective" in plain]
    if own:  # first, as they may say which other images the objective needs
        plain["objective"] = _apply(_fill_objective(plain), own, _fill_objective)["objective"]
    described = _apply(_fill_defaults(plain), [pair for pair in rest if pair not in own], _fill_defaults)
    described["before"] = [_complete_stage(stage, described, f"before.{i}") for i, stage in enumerate(before)]
    for dotted, value in [pair for pair in overrides if pair[0].startswith("before.")]:
        described = config.override(described, dotted, value)
    return config.construct(Recipe, described, where="recipe")


def _say_whose_threat(plain: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> None:
    """Say that the threat model remains that of a recipe's own data, if only the data are changed."""
    threat, data, changed = plain.get("threat"), plain.get("data"), dict(overrides)
    if not isinstance(threat, Mapping) or "eps" not in threat or not {"data", "data.kind"} & changed.keys():
        return
    kind = data.get("kind") if isinstance(data, Mapping) else data
    given = changed.get("data", changed.get("data.kind"))
    new = given.get("kind") if isinstance(given, Mapping) else str(given).partition(":")[0]
    if new != kind and new not in WRAPPERS and not any(name.partition(".")[0] == "threat" for name in changed):
        attack = config.construct(Attack, {k: v for k, v in threat.items() if k != "kind"}, where="threat")
        warnings.warn(
            f"{plain.get('name')} was made for {kind}: its threat, {ball_text(attack.eps, attack.norm)}, may not fit "
            "other images; set --threat.eps and --objective.attack.eps",
            Notice,
            stacklevel=3,
        )


def _complete_stage(stage: Any, final: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a stage with its missing options, also those inside blocks of the same kind, taken from the final one."""
    if isinstance(stage, str):
        stage = _named_stage(stage)
    if not isinstance(stage, Mapping) or "name" not in stage:
        what = "the name of a recipe, or a block with a name and the options that differ"
        raise UserError(f"recipe.{where} takes {what}, got {stage!r}")
    if stage.get("before") or stage.get("init"):
        raise UserError(f"recipe.{where} is a stage: it begins with the stage before it and has no init or before")
    inherited = {k: v for k, v in final.items() if k not in ("before", "init", *OTHER_IMAGES)}
    # The next stage begins with the latest checkpoint, so none is selected by FD
    inherited["train"] = {k: v for k, v in final["train"].items() if k not in ("select", "features")}
    return _fill_defaults(config.merge(inherited, stage), f"recipe.{where}")


def _named_stage(name: str) -> dict[str, Any]:
    """Return a recipe of the package as a stage: all of its options but those that it takes from the final recipe."""
    plain = recipes.find(name)
    before = plain.pop("before", [])
    full = {k: v for k, v in _fill_defaults(plain).items() if k not in ("seed", "sampler", "metrics", *OTHER_IMAGES)}
    train = {k: v for k, v in full["train"].items() if k not in ("precision", "fast")}
    return {**full, "train": train, "data": plain["data"], "before": before}


def _apply(
    described: dict[str, Any], overrides: Sequence[tuple[str, Any]], fill: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Apply overrides, those of a whole block or list, whose defaults are then filled in, before those inside it."""
    for dotted, value in sorted(overrides, key=lambda pair: pair[0].count(".")):
        described = config.override(described, dotted, value)
        if any(inner.startswith(f"{dotted}.") for inner, _ in overrides):
            described = fill(described)
    return described


def _fill_objective(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objective alone, with every default."""
    objective = config.build(plain["objective"], "objective", where="recipe.objective")
    return {"objective": config.describe(objective, Objective)}


def _fill_defaults(plain: Mapping[str, Any], where: str = "recipe") -> dict[str, Any]:
    """Fill in every default, except those that the sampler takes from the objective."""
    return _unset_shared(config.describe(config.construct(Recipe, plain, where=where)))


def _unset_shared(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Unset sampler options equal to those of the objective, so that they follow later changes of the objective."""
    sampler, objective = plain.get("sampler"), plain.get("objective")
    if not (isinstance(sampler, Mapping) and isinstance(objective, Mapping)):
        return dict(plain)
    pairs = (("tau", "temperature"), ("cosine", "cosine"))
    shared = [ours for ours, theirs in pairs if ours in sampler and sampler[ours] == objective.get(theirs)]
    return {**plain, "sampler": {**sampler, **dict.fromkeys(shared)}}


def design(recipe: Recipe, data: Data) -> Architecture:
    """Return the architecture (normalisation, backbone, head) that the recipe needs for these images."""
    channels, height, width = data.shape
    measured, fixed = data.statistics(), (recipe.normalise.mean, recipe.normalise.std)
    mean, std = (a if b is None else b * channels if len(b) == 1 else b for a, b in zip(measured, fixed, strict=True))
    outputs = recipe.objective.outputs or len(data.classes)
    wide = None if width == height else width
    head: Head = getattr(recipe.objective, "head", "simclr")
    return Architecture(recipe.backbone, outputs, channels, height, mean, std, recipe.objective.hidden, wide, head)


def read(path: Path) -> dict[str, Any]:
    """Load a recipe file (YAML) as plain data, completed from its ``base`` if it names one."""
    try:
        plain = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise UserError(f"{path} holds no options; a recipe is a block such as data:, objective:, train:")
    return recipes.complete(plain)


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML that :func:`read` and :func:`resolve` turn into the same recipe."""
    return yaml.safe_dump(config.describe(recipe), sort_keys=False, allow_unicode=True)
