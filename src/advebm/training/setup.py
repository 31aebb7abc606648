"""Build and check everything a training run needs, before anything is written."""

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data import disk
from advebm.data.sources import Data, Images
from advebm.models import public_weights, whitening
from advebm.models.factory import Own
from advebm.models.inference import BackendName, View, find_backend, make_view
from advebm.models.layers import Staged
from advebm.models.network import Architecture, Network, transfer
from advebm.models.precision import usable_precision
from advebm.runs.engine import Engine
from advebm.runs.find_model import find_model, load_module_weights
from advebm.runs.recipe import Recipe, design
from advebm.training.batches import BatchSource
from advebm.training.sample_distance import SampleDistance


class Setup(NamedTuple):
    """Everything that a run is trained with.

    Attributes:
        recipe: what to train.
        engine: the device of this process, and communication with the other processes.
        data: the dataset.
        validation: the images that the network is scored on.
        outside: outside images that a critic is scored against; None: there are none.
        batches: the source of training batches.
        architecture: the description that the network is built from.
        model: the network, on the CPU, in float32.
        states: the objective's state for each stream of this process.
        scored: whether the network can be scored on validation images, for example whether they have labels.
        distance: the FD of samples that validation measures; None: ``train.features`` is None.
    """

    recipe: Recipe
    engine: Engine
    data: Data
    validation: Images
    outside: Images | None
    batches: BatchSource
    architecture: Architecture
    model: Network
    states: dict[int, Any]
    scored: bool
    distance: SampleDistance | None

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate."""
        return self.scored or self.distance is not None


def set_up(recipe: Recipe, engine: Engine) -> Setup:
    """Load the images and build the network of a recipe.

    Raises:
        UserError: the recipe does not fit its data, its objective or the number of processes.
    """
    cfg, objective = recipe.train, recipe.objective
    streams = engine.owned(cfg.streams)
    data = recipe.data.load()
    if "labels" in objective.needs and not data.train.labelled:
        raise UserError(f"objective {type(objective).__name__} needs labels, {data.name} has none")
    if cfg.images and cfg.batch > len(data.train):
        there = f"{data.name} has {len(data.train)} training images"
        raise UserError(f"train.batch is {cfg.batch}, but {there}; give --train.batch {len(data.train)} or less")
    if objective.hidden is not None and cfg.streams != engine.world:
        raise UserError(
            f"train.streams is {cfg.streams}, and there are {engine.world} processes: an encoder, which tells images "
            f"of all streams apart, takes a stream a process; set --train.streams {engine.world}"
        )
    if "origin" in objective.needs:
        check_traceable(recipe, data)
    objective.check(len(data.train), recipe.threat)
    validation = _choose(data.val, cfg.validate_with)
    architecture = design(recipe, data)
    model = architecture.build(recipe.seed)
    if cfg.whiten:
        whitening.whiten_first_convolution(model, _choose(data.train, whitening.enough(data.shape)).float())
    batches = BatchSource(recipe, data, engine)
    if objective.hidden is not None:
        scored = objective.validate is not None and len(validation) > 1
    else:
        scored = validation.labelled if objective.outputs != 1 else batches.outside is not None
    outside = None if batches.outside is None else _choose(batches.outside, cfg.validate_with)
    distance = None if cfg.features is None else SampleDistance(recipe, data, batches.outside, engine.device)
    x = torch.empty(cfg.batch // cfg.streams, *data.shape)
    states = {stream: objective.init(x, rng.generator(recipe.seed, "init", stream)) for stream in streams}
    return Setup(recipe, engine, data, validation, outside, batches, architecture, model, states, scored, distance)


def check_traceable(recipe: Recipe, data: Data) -> None:
    """Raise UserError if an objective that keeps something of every image cannot know its image, pixel by pixel."""
    kind, augment = type(recipe.objective).__name__, recipe.data.augment.x
    if recipe.train.streams > 1:
        raise UserError(f"{kind} keeps perturbations in one stream; set train.streams to 1, got {recipe.train.streams}")
    if augment.scale < 1 or augment.policy != "none":
        raise UserError(
            f"{kind} follows pixels through crops and mirror images only; set data.augment.x.scale to 1 and "
            f"data.augment.x.policy to none, got {augment.scale} and {augment.policy}"
        )
    if not disk.fits(len(data.train), data.shape):
        raise UserError(f"{kind} keeps as many bytes as the images of {data.name} have, which do not fit in memory")


def _choose(images: Images, count: int | None) -> Images:
    """Return ``count`` images at random, always the same, as a split may be sorted by class; None: all."""
    if count is None or count >= len(images):
        return images
    return images.take(rng.fixed_permutation(len(images))[:count])


def check_trainable(model: Network, recipe: Recipe) -> None:
    """Switch on recomputation if the recipe asks for it.

    Raises:
        UserError: the network has no parameters, or ``recompute`` is set for a backbone without stages.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("the network has no parameters to train")
    if recipe.train.recompute:
        if not isinstance(model.backbone, Staged):
            raise UserError("recompute needs a backbone with stages (resnet, preact-resnet, wide-resnet, stargan)")
        model.backbone.recompute = True


def load_initial_weights(model: Network, init: str, data: Data, recipe: Recipe) -> None:
    """Load the weights of a run, a published model or a file into a new network.

    The normalisation is loaded with them, unless the recipe sets it.
    """
    original, fresh = copy.deepcopy(model.normalise.state_dict()), []
    if isinstance(recipe.backbone, Own) and Path(init).exists():
        load_module_weights(model, Path(init))
    elif Path(init).is_file():
        fresh = public_weights.load(model, Path(init))
    else:
        fresh = transfer(find_model(init), model)
    for name in ("mean", "std"):
        if getattr(recipe.normalise, name) is not None:
            model.normalise.load_state_dict({**model.normalise.state_dict(), name: original[name]})
    if fresh:
        warnings.warn(f"{init} has another head than {data.name} takes: {', '.join(fresh)} begin fresh", stacklevel=2)


def set_precision(model: Network, asked: str, device: torch.device) -> None:
    """Set a network to the requested precision, or to what takes its place on this device."""
    used = usable_precision(asked, device)
    if used == "float64":
        model.double()
    else:
        model.precision = getattr(torch, used)


def search_view(model: Network, x: Tensor, fast: BackendName, precision: str) -> View | None:
    """Return the faster network for searches, see ``train.fast``, or None.

    ``x`` is a stream's share of a batch, and ``precision`` that of the recipe, whatever takes its place here.
    """
    if fast == "auto" and precision != "bfloat16":
        return None
    return make_view(model, x, find_backend(fast, "bfloat16"), loud=fast != "auto")
