"""Estimate the cost of a recipe before training: network passes, FLOP and memory."""

import dataclasses
import functools
import math
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.loader import Origin
from advebm.data.sources import Data, DataSpec, Digits, Images, find_spec
from advebm.descent import value_and_gradient
from advebm.models import network
from advebm.models.modes import searching
from advebm.models.network import Architecture, Network
from advebm.models.small import SmallConv
from advebm.objectives.base import Batch, Context, Objective
from advebm.objectives.curriculum import Curriculum, CurriculumState
from advebm.runs.checkpoint import Progress
from advebm.runs.recipe import Recipe, design
from advebm.training.hardware import Machine, describe_device, seconds
from advebm.training.setup import search_view
from advebm.training.validate import validate

LEAST_SECONDS = 0.1  # shortest time in seconds of a timed batch, unless a batch of the recipe's size is faster
ASSUMED_CLASSES = 1000  # assumed if the number of classes is unknown; the head hardly matters for the cost


class Passes(NamedTuple):
    """Number of network passes of each kind per image; or the FLOP of one pass of each kind."""

    forward: float
    teacher: float  # forward passes through a teacher network
    search: float  # backward passes to the images, with frozen weights
    loss: float  # backward passes to the weights
    penalty: float  # backward passes to the images that are differentiated again (R1)

    @property
    def backward(self) -> float:
        return self.search + self.loss + self.penalty

    def times(self, flops: "Passes") -> float:
        """Return the FLOP of these passes, given the FLOP of one pass of each kind."""
        return sum(count * flop for count, flop in zip(self, flops, strict=True))


class ImagesHeld(NamedTuple):
    """Number of images whose activations are in memory at once, divided by the number of images of a step."""

    search: float  # for the largest backward pass of the search
    loss: float  # for the backward pass of the loss
    penalty: float  # the part of ``loss`` that belongs to a gradient penalty


class Memory(NamedTuple):
    """Memory of one process, in bytes."""

    weights: int  # parameters and buffers of the network
    optimizer: int  # state of the optimiser
    average: int  # averaged weights
    step: int  # activations and gradients at their peak


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated cost of one training stage.

    ``least`` and ``most`` bound the passes per training image, for search and loss together; they differ if a
    curriculum increases the number of search steps K.
    """

    recipe: Recipe
    outline: DataSpec  # shape and number of the images
    architecture: Architecture
    parameters: int  # number of trainable parameters
    least: Passes
    most: Passes
    validation: Passes  # per validation image whose attack never ends early, since it stays correctly classified
    validated: int  # number of images over all validations
    sampling: Passes  # per image that validation draws for FD
    drawn: int  # number of these images over all validations
    flops: Passes  # per image, of one pass of each kind
    memory: Memory  # of one process

    @property
    def images(self) -> int:
        return images_in_whole_batches(self.recipe)

    @property
    def training(self) -> tuple[float, float]:
        """Return lower and upper bound of the FLOP of training alone."""
        return self.images * self.least.times(self.flops), self.images * self.most.times(self.flops)

    @property
    def total(self) -> tuple[float, float]:
        """Return lower and upper bound of the FLOP of training and validation together."""
        validation = self.validated * self.validation.times(self.flops) + self.drawn * self.sampling.times(self.flops)
        least, most = self.training
        return least + validation, most + validation


def estimates(recipe: Recipe) -> list[Estimate]:
    """Estimate the cost of each stage of a recipe, the final stage last.

    Nothing is trained, and images are read only if their source does not declare their shape.  Passes are counted by
    running the objective and the validation on a tiny network.  FLOP (2 per multiply-add, of convolutions and linear
    layers) and memory are computed for the recipe's network on the ``meta`` device, that is, on tensors without data.
    A teacher is assumed to be as large as the recipe's network.  Not included: rollbacks, the comparisons that ``fast``
    makes, diagnostics, the weight copies of ``awp`` and ``sam``, and of FD the features and what encoders encode
    besides the samples.  If the image shape cannot be determined, or the network does not accept it, ``UserError`` is
    raised.
    """
    return [estimate(stage) for stage in (*recipe.before, recipe)]


def estimate(recipe: Recipe) -> Estimate:
    """Estimate the cost of one stage."""
    spec = find_spec(recipe.data)
    architecture = design(recipe, blank_data(spec))
    least, most, held = count_training(recipe)
    parameters, flops, memory = measure_network(architecture, recipe, held)
    validation, validated = count_validation(recipe), validated_images(recipe, spec)
    sampling, drawn = Passes(0, 0, 0, 0, 0), 0
    if recipe.train.features is not None:
        sampling, drawn = count_sampling(recipe), count_validations(recipe) * recipe.train.samples
    return Estimate(
        recipe, spec, architecture, parameters, least, most, validation, validated, sampling, drawn, flops, memory
    )


def measure_machine(stage: Estimate, device: str) -> Machine:
    """Measure the speed of a local device on the stage's network, forward and backward to the images.

    Weights and images are random, and the precision is the recipe's.  The batch size is doubled until a batch takes
    ``LEAST_SECONDS``, has the recipe's size, or fills the memory; if not even one image fits, ``UserError`` is raised.
    Training is a little slower than this, since it also updates weights, augments images and validates.
    """
    cfg, flops = stage.recipe.train, stage.flops.forward + stage.flops.search
    share = max(1, cfg.batch // cfg.streams)
    model, x = stage.architecture.build().to(device), torch.rand(share, *stage.outline.shape, device=device)
    if cfg.precision == "float64":
        model, x = model.double(), x.double()
    else:
        model.precision = getattr(torch, cfg.precision)
    rate = 0.0
    view = search_view(model, x, cfg.fast, cfg.precision)
    with searching(model, view=view) as f, suppress(torch.OutOfMemoryError):
        for images in (*(2**k for k in range((share - 1).bit_length())), share):
            search = functools.partial(value_and_gradient, lambda z: f(z).flatten(1).sum(1), x[:images])
            elapsed = seconds(search, device)
            rate = images * flops / elapsed
            if elapsed >= LEAST_SECONDS:
                break
    if not rate:
        raise UserError(f"not even one image of the recipe's size fits into the memory of {device}")
    memory = torch.cuda.get_device_properties(device).total_memory if torch.device(device).type == "cuda" else None
    return Machine(describe_device(device), {cfg.precision: rate}, 1.0, memory)


def passes_per_image(recipe: Recipe) -> tuple[float, float]:
    """Return forward and backward passes per training image, at the largest K of a curriculum."""
    passes, _ = count_step(recipe.objective, recipe.train.images)
    return passes.forward, passes.backward


def images_in_whole_batches(recipe: Recipe) -> int:
    """Return the number of training images, rounded up to whole batches."""
    return math.ceil(recipe.train.images / recipe.train.batch) * recipe.train.batch


def blank_data(spec: DataSpec) -> Data:
    """Return a stand-in dataset with the shape and classes of a source: one black and one white image."""
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, *spec.shape)
    images = Images(x, torch.arange(2))
    return Data("nothing", tuple(map(str, range(spec.classes or ASSUMED_CLASSES))), images, images, images)


# Count passes, on a tiny network --------------------------------------------------------------------------------------


@contextmanager
def count_passes(model: Network) -> Iterator[Counter[str]]:
    """Count the images in each kind of pass of a network, named as in :class:`Passes`; other networks are teachers.

    Also counted: images in the ``largest`` search batch, and in the ``graph`` for weight gradients.
    """
    counts = Counter[str]()

    def forward(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if module is not model:
            counts["teacher"] += len(out) if isinstance(module, Network) else 0
            return
        counts["forward"] += len(out)
        if out.requires_grad:
            frozen = not any(p.requires_grad for p in model.parameters())
            counts["largest"] = max(counts["largest"], len(out) * frozen)
            counts["graph"] += len(out) * (not frozen)

            def backward(gradient: Tensor) -> None:
                counts["penalty" if torch.is_grad_enabled() else "search" if frozen else "loss"] += len(gradient)

            out.register_hook(backward)

    with register_module_forward_hook(forward):
        yield counts


def count_per_image(count: Callable[[int], list[int]]) -> list[float]:
    """Return counts per image, from those of 8 images minus those of 4, so that work done once per step cancels out."""
    return [(more - less) / 4 for less, more in zip(count(4), count(8), strict=True)]


def tiny_architecture(objective: Objective) -> Architecture:
    """Return the tiny network for counting passes: 8 x 8 colour images, and 10 classes if it is a classifier."""
    half = (0.5,) * 3
    return Architecture(SmallConv(1, norm="none"), objective.outputs or 10, 3, 8, half, half, objective.hidden)


def replace_teacher(objective: Any, folder: Path) -> Any:
    """Return the objective with its teacher, or that of an objective it wraps, replaced by a tiny network."""
    options = {field.name for field in dataclasses.fields(objective)}
    if "teacher" in options:
        architecture = tiny_architecture(objective)
        network.save(folder, architecture.build(), architecture)
        objective = dataclasses.replace(objective, teacher=str(folder))
    if "objective" in options:
        objective = dataclasses.replace(objective, objective=replace_teacher(objective.objective, folder))
    return objective


def count_step(objective: Objective, seen: int, level: int | None = None) -> tuple[Passes, ImagesHeld]:
    """Count passes and activations per image of one training step, after ``seen`` images.

    In a curriculum, K is ``level`` (default: the largest).
    """

    def count(images: int) -> list[int]:
        generator, model = rng.generator(0), tiny_architecture(objective).build().train()
        x = torch.rand(images, 3, 8, 8, generator=generator)
        batch = Batch(x, torch.arange(images), view=x, outside=x, extra=x, origin=Origin.of_whole(x))
        state, ctx = objective.init(x, generator), Context(generator, seen)
        if isinstance(state, CurriculumState):
            state.steps, state.since = state.largest if level is None else level, seen
        held = Counter[str]()
        with count_passes(model) as counts:
            for replay in range(objective.replays):
                result = objective.search(model, batch, state, ctx)
                before = counts.copy()
                loss = objective.loss(model, batch, result, state, ctx)
                loss.total.backward()
                held |= counts - before  # the maximum over replays
                if replay < objective.replays - 1:  # the work after the last replay is not counted
                    objective.after(model, batch, result, state, loss, ctx)
        return [*(counts[kind] for kind in Passes._fields), counts["largest"], held["graph"], held["penalty"]]

    with tempfile.TemporaryDirectory() as folder:
        objective = replace_teacher(objective, Path(folder))
        *passes, search, graph, penalty = count_per_image(count)
    return Passes(*passes), ImagesHeld(search, graph, penalty)


def count_training(recipe: Recipe) -> tuple[Passes, Passes, ImagesHeld]:
    """Return lower and upper bound of the passes per training image, and the images held in memory."""
    objective, seen = recipe.objective, recipe.train.images
    longest, held = count_step(objective, seen)
    curriculum = find_curriculum(objective)
    if curriculum is None or not seen:
        return longest, longest, held
    begin = curriculum.start  # passes are linear in K from there
    first, second = (count_step(objective, seen, level)[0] for level in (begin, begin + 1))
    bounds = curriculum.means(images_in_whole_batches(recipe), recipe.train.batch)
    least, most = (Passes(*(a + (k - begin) * (b - a) for a, b in zip(first, second, strict=True))) for k in bounds)
    return least, most, held


def find_curriculum(objective: Any) -> Curriculum | None:
    """Return the curriculum of an objective, or of the objective that it wraps; None if there is none."""
    while not hasattr(objective, "curriculum") and hasattr(objective, "objective"):
        objective = objective.objective
    return getattr(objective, "curriculum", None)


def count_validation(recipe: Recipe) -> Passes:
    """Count the passes per validation image that stays correctly classified."""
    still = dataclasses.replace(recipe.threat, eps=1e-6, step_size=1e-6)
    plain = dataclasses.replace(recipe, threat=still, data=Digits())  # validation uses only the augmentation of data

    def count(n: int) -> list[int]:
        model = tiny_architecture(recipe.objective).build().eval()
        images = noise_images(n)
        images = Images(images.x, model(images.float()).argmax(1))
        data = Data("noise", tuple("0123456789"), images, images, images)
        with count_passes(model) as counts:
            validate(model, data, images, plain, images)
        return [counts[kind] for kind in Passes._fields]

    return Passes(*count_per_image(count))


def noise_images(count: int) -> Images:
    """Return images of noise for the tiny network, all of class 0."""
    x = torch.randint(256, (count, 3, 8, 8), generator=rng.generator(0), dtype=torch.uint8)
    return Images(x, torch.zeros(count, dtype=torch.long))


def count_sampling(recipe: Recipe) -> Passes:
    """Count the passes per image that the recipe's sampler draws."""
    sampler = recipe.sampler

    def count(n: int) -> list[int]:
        model, seeds = tiny_architecture(recipe.objective).build().eval(), noise_images(n)
        negatives = noise_images(getattr(sampler, "count", 1))  # of an encoder's sampler
        bank = sampler.bank(Data("noise", tuple("0123456789"), negatives, negatives, negatives))
        with count_passes(model) as counts:
            sampler(model, seeds.y, seeds.float(), generator=rng.generator(0), bank=bank)
        return [counts[kind] for kind in Passes._fields]

    return Passes(*count_per_image(count))


def validated_images(recipe: Recipe, spec: DataSpec) -> int:
    """Return the number of images over all validations; 0 if there is no validation or the split size is unknown."""
    cfg, objective = recipe.train, recipe.objective
    if objective.hidden is not None:
        validates = objective.validate is not None
    else:
        validates = spec.classes != 1 if objective.outputs != 1 else recipe.outside is not None  # one class: unlabelled
    images = min((n for n in (spec.val, cfg.validate_with) if n is not None), default=0)
    return count_validations(recipe) * validates * images


def count_validations(recipe: Recipe) -> int:
    cfg, steps = recipe.train, range(0, images_in_whole_batches(recipe), recipe.train.batch)
    return sum(Progress(seen).due_after(cfg.batch, cfg.images)(cfg.validate_every) for seen in steps)


# FLOP and memory, on the meta device ----------------------------------------------------------------------------------


class FlopCounter(TorchDispatchMode):
    """Count FLOP of the operations inside it, by torch's formulas, and the peak memory of their results in bytes.

    ``torch.utils.flop_counter.FlopCounterMode`` uses the same formulas, but its module hooks raise an error under
    ``torch.autograd.grad``, which searches and penalties need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak = 0
        self.storages = weakref.WeakValueDictionary[int, UntypedStorage]()  # those alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        storages = [tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.storages.update({storage._cdata: storage for storage in storages})
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages.values()))
        return out


def measure_network(architecture: Architecture, recipe: Recipe, held: ImagesHeld) -> tuple[int, Passes, Memory]:
    """Return parameter count, FLOP per pass of each kind, and memory for steps of ``batch / streams`` images."""
    cfg, shape = recipe.train, architecture.shape
    with torch.device("meta"):
        model = architecture.build().train()
    weights = count_bytes(model.state_dict())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = recipe.optimizer.build(parameters)
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    dtype = getattr(torch, cfg.precision)
    backbone: Any = model.to(dtype).backbone  # instead of autocast, which does not support meta tensors
    backbone.recompute = cfg.recompute
    images = lambda count, **options: torch.empty(count, *shape, dtype=dtype, device="meta", **options)
    shares = (held.search, held.loss - held.penalty, held.penalty)
    searched, trained, penalized = (round(share * cfg.batch / cfg.streams) for share in shares)
    searched, trained = max(1, searched), max(1, trained)

    with FlopCounter() as search, searching(model) as f:
        x = images(searched, requires_grad=True)
        total = f(x).sum()
        forward = search.flops / searched
        torch.autograd.grad(total, x)

    def measure_loss(penalized: int) -> FlopCounter:
        model.zero_grad()
        with FlopCounter() as counter:
            total = model(images(trained)).sum()
            if penalized:
                x = images(penalized, requires_grad=True)
                (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
                total = total + gradient.square().sum()
            total.backward()
        return counter

    loss = measure_loss(0)
    full = measure_loss(penalized) if penalized else loss
    penalty = (full.flops - loss.flops) / penalized - forward if penalized else 0.0
    flops = Passes(forward, forward, search.flops / searched - forward, loss.flops / trained - forward, penalty)
    step = max(search.peak, full.peak + (weights if dtype != torch.float32 else 0))  # gradients are float32
    memory = Memory(weights, count_bytes(optimizer.state_dict()), weights * bool(cfg.ema), step)
    return sum(p.numel() for p in parameters), flops, memory


def count_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
