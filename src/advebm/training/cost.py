"""Estimate the cost of a recipe before training: network passes, FLOP and memory."""

import contextlib
import dataclasses
import functools
import itertools
import math
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from advebm.core import rng
from advebm.core.errors import UserError
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
    """Number of network passes of each kind per image; or the FLOP of one pass of each kind.

    Attributes:
        forward: forward passes.
        teacher: forward passes through a teacher network.
        search: backward passes to the images, with frozen weights.
        loss: backward passes to the weights.
        penalty: backward passes to the images that are differentiated again (R1).
    """

    forward: float
    teacher: float
    search: float
    loss: float
    penalty: float

    @property
    def backward(self) -> float:
        return self.search + self.loss + self.penalty

    def times(self, flops: "Passes") -> float:
        """Return the FLOP of these passes, given the FLOP of one pass of each kind."""
        return sum(count * each for count, each in zip(self, flops, strict=True))

    def towards(self, other: "Passes", share: float) -> "Passes":
        """Interpolate linearly from this (``share`` 0) to ``other`` (1), or extrapolate beyond."""
        return Passes(*(a + share * (b - a) for a, b in zip(self, other, strict=True)))


class ImagesHeld(NamedTuple):
    """Number of images whose activations are in memory at once, divided by the number of images of a step.

    Attributes:
        search: for the largest backward pass of the search.
        loss: for the backward pass of the loss.
        penalty: the part of ``loss`` that belongs to a gradient penalty.
    """

    search: float
    loss: float
    penalty: float


class Memory(NamedTuple):
    """Memory of one process, in bytes.

    Attributes:
        weights: parameters and buffers of the network.
        optimizer: state of the optimiser.
        average: averaged weights.
        step: activations and gradients at their peak.
    """

    weights: int
    optimizer: int
    average: int
    step: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated cost of one training stage.

    Attributes:
        recipe: the stage.
        outline: shape and number of its images.
        architecture: its network.
        parameters: number of trainable parameters.
        least, most: lower and upper bound of the passes per training image, for search and loss together; they differ
            if a curriculum increases the number of search steps K.
        validation: passes per validation image that is classified correctly even under attack, so that no attack on it
            ends early.
        validated: number of images over all validations.
        flops: FLOP per image of one pass of each kind.
        memory: memory of one process.
    """

    recipe: Recipe
    outline: DataSpec
    architecture: Architecture
    parameters: int
    least: Passes
    most: Passes
    validation: Passes
    validated: int
    flops: Passes
    memory: Memory

    @property
    def images(self) -> int:
        return images_in_whole_batches(self.recipe)

    @property
    def total(self) -> tuple[float, float]:
        """Return lower and upper bound of the FLOP of training and validation together."""
        checked = self.validated * self.validation.times(self.flops)
        least, most = (self.images * passes.times(self.flops) + checked for passes in (self.least, self.most))
        return least, most


def estimates(recipe: Recipe) -> list[Estimate]:
    """Estimate the cost of each stage of a recipe, the final stage last.

    Nothing is trained, and images are read only if their source does not declare their shape.  Passes are counted by
    running the objective and the validation on a tiny network.  FLOP (2 per multiply-add, of convolutions and linear
    layers) and memory are computed for the recipe's network on the ``meta`` device, that is, on tensors without data.
    A teacher is assumed to be as large as the recipe's network.  Not included: rollbacks, the comparisons that ``fast``
    makes, diagnostics, and the weight copies of ``awp``.

    Raises:
        UserError: the image shape cannot be determined, or the network does not accept it.
    """
    return [estimate(stage) for stage in (*recipe.before, recipe)]


def estimate(recipe: Recipe) -> Estimate:
    """Estimate the cost of one stage."""
    found = find_spec(recipe.data)
    architecture = design(recipe, blank_data(found))
    least, most, held = count_training(recipe)
    parameters, flops, memory = measure_network(architecture, recipe, held)
    times = (count_validation(recipe), validated_images(recipe, found))
    return Estimate(recipe, found, architecture, parameters, least, most, *times, flops, memory)


def measure_machine(stage: Estimate, device: str) -> Machine:
    """Measure the speed of a local device on the stage's network, forward and backward to the images.

    Weights and images are random, and the precision is the recipe's.  The batch size is doubled until a batch
    takes ``LEAST_SECONDS``, has the recipe's size, or fills the memory.  Training is a little slower than this, since
    it also updates weights, augments images and validates.

    Raises:
        UserError: not even one image fits into the memory.
    """
    cfg, flops = stage.recipe.train, stage.flops.forward + stage.flops.search
    most, count, took = max(1, cfg.batch // cfg.streams), 0, 0.0
    model = stage.architecture.build().to(device)
    x = torch.rand(most, *stage.outline.shape, device=device)
    if cfg.precision == "float64":
        model, x = model.double(), x.double()
    else:
        model.precision = getattr(torch, cfg.precision)
    quick = search_view(model, x, cfg.fast, cfg.precision)
    with searching(model, view=quick) as f, contextlib.suppress(torch.OutOfMemoryError):
        for images in (*itertools.takewhile(most.__gt__, (2**k for k in itertools.count())), most):
            search = functools.partial(value_and_gradient, lambda z: f(z).flatten(1).sum(1), x[:images])
            took, count = seconds(search, device), images
            if took >= LEAST_SECONDS:
                break
    if not took:
        raise UserError(f"not even one image of the recipe's size fits into the memory of {device}")
    memory = torch.cuda.get_device_properties(device).total_memory if torch.device(device).type == "cuda" else None
    return Machine(describe_device(device), {cfg.precision: count * flops / took}, 1.0, memory)


def passes_per_image(recipe: Recipe) -> tuple[float, float]:
    """Return forward and backward passes per training image, at the largest K of a curriculum."""
    with with_stub_teacher(recipe.objective) as objective:
        found, _ = count_step(objective, recipe.train.images)
    return found.forward, found.backward


def images_in_whole_batches(recipe: Recipe) -> int:
    """Return the number of training images, rounded up to whole batches."""
    return math.ceil(recipe.train.images / recipe.train.batch) * recipe.train.batch


def blank_data(found: DataSpec) -> Data:
    """Return a stand-in dataset with the shape and classes of a source: one black and one white image."""
    x = torch.zeros(2, *found.shape, dtype=torch.uint8)
    x[1] = 255
    images = Images(x, torch.arange(2))
    return Data("nothing", tuple(map(str, range(found.classes or ASSUMED_CLASSES))), images, images, images)


# Count passes, on a tiny network --------------------------------------------------------------------------------------


class PassCounter:
    """Counters of the passes inside :func:`count_passes`, in images."""

    def __init__(self) -> None:
        self.forward = self.teacher = self.search = self.loss = self.penalty = 0
        self.widest = self.graph = 0  # images in the largest search batch, and in graphs for weight gradients

    def passes(self, images: int) -> Passes:
        """Return the passes per image, for a step of ``images`` images."""
        return Passes(*(getattr(self, name) / images for name in Passes._fields))

    def back(self, count: int, frozen: bool, gradient: Tensor) -> None:
        """Count a backward pass of ``count`` images; called when the gradient reaches the network's outputs."""
        kind = "penalty" if torch.is_grad_enabled() else "search" if frozen else "loss"
        setattr(self, kind, getattr(self, kind) + count)


@contextmanager
def count_passes(model: Network) -> Iterator[PassCounter]:
    """Count the passes of a network; all other networks count as teachers."""
    tally = PassCounter()

    def forward(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if not isinstance(module, Network):
            return
        count = len(out)
        if module is not model:
            tally.teacher += count
            return
        tally.forward += count
        if out.requires_grad:
            frozen = not any(p.requires_grad for p in module.parameters())
            tally.widest = max(tally.widest, count * frozen)
            tally.graph += count * (not frozen)
            out.register_hook(functools.partial(tally.back, count, frozen))

    handle = register_module_forward_hook(forward)
    try:
        yield tally
    finally:
        handle.remove()


def tiny_architecture(objective: Objective) -> Architecture:
    """Return the tiny network for counting passes: 8 x 8 colour images, and 10 classes if it is a classifier."""
    half = (0.5,) * 3
    return Architecture(SmallConv(1, norm="none"), objective.outputs or 10, 3, 8, half, half, objective.hidden)


@contextmanager
def with_stub_teacher(objective: Objective) -> Iterator[Objective]:
    """Yield the objective with its teacher, if it has one, replaced by a tiny network."""
    with tempfile.TemporaryDirectory() as folder:

        def other(of: Any) -> Any:
            changes: dict[str, Any] = {}
            for name in (f.name for f in dataclasses.fields(of)):
                if name == "teacher":
                    architecture = tiny_architecture(of)
                    network.save(Path(folder), architecture.build(), architecture)
                    changes[name] = folder
                elif name == "objective":
                    changes[name] = other(getattr(of, name))
            return dataclasses.replace(of, **changes) if changes else of

        yield other(objective)


def count_step(objective: Objective, seen: int, level: int | None = None) -> tuple[Passes, ImagesHeld]:
    """Count passes and activations per image of one training step, after ``seen`` images.

    A step of 4 images is subtracted from one of 8, so work done once per step cancels out.  In a curriculum, K is
    ``level`` (default: the largest).
    """
    counts = []
    for images in (4, 8):
        generator, model = rng.generator(0), tiny_architecture(objective).build().train()
        x = torch.rand(images, 3, 8, 8, generator=generator)
        batch = Batch(x, torch.arange(images), view=x, outside=x, extra=x)
        state = objective.init(x, generator)
        if isinstance(state, CurriculumState):
            state.steps, state.since = state.largest if level is None else level, seen
        ctx, graph, penalty = Context(generator, seen), 0, 0
        with count_passes(model) as tally:
            for replay in range(objective.replays):
                found = objective.search(model, batch, state, ctx)
                before = tally.graph, tally.penalty
                loss = objective.loss(model, batch, found, state, ctx)
                loss.total.backward()
                graph, penalty = max(graph, tally.graph - before[0]), max(penalty, tally.penalty - before[1])
                if replay < objective.replays - 1:  # the work after the last replay is not counted
                    objective.after(model, batch, found, state, loss, ctx)
        counts.append((*tally.passes(4), tally.widest / 4, graph / 4, penalty / 4))
    each = [more - less for less, more in zip(*counts, strict=True)]
    return Passes(*each[:5]), ImagesHeld(*each[5:])


def count_training(recipe: Recipe) -> tuple[Passes, Passes, ImagesHeld]:
    """Return lower and upper bound of the passes per training image, and the images held in memory."""
    seen = recipe.train.images
    with with_stub_teacher(recipe.objective) as objective:
        longest, held = count_step(objective, seen)
        curriculum = find_curriculum(objective)
        if curriculum is None or not seen:
            return longest, longest, held
        first, second = (count_step(objective, seen, level)[0] for level in (0, 1))
    least, most = (
        first.towards(second, k) for k in curriculum.means(images_in_whole_batches(recipe), recipe.train.batch)
    )
    return least, most, held


def find_curriculum(objective: Any) -> Curriculum | None:
    """Return the curriculum of an objective, or of the objective that it wraps; None if there is none."""
    found = getattr(objective, "curriculum", None)
    inner = getattr(objective, "objective", None)
    return found if isinstance(found, Curriculum) or inner is None else find_curriculum(inner)


def count_validation(recipe: Recipe) -> Passes:
    """Count the passes per validation image that stays correctly classified, with the method of :func:`count_step`."""
    still = dataclasses.replace(recipe.threat, eps=1e-6, step_size=1e-6)
    plain = dataclasses.replace(recipe, threat=still, data=Digits())  # validation uses only the augmentation of data
    found = []
    for count in (4, 8):
        model = tiny_architecture(recipe.objective).build().eval()
        x = torch.randint(256, (count, 3, 8, 8), generator=rng.generator(0), dtype=torch.uint8)
        images = Images(x, model(x.float() / 255).argmax(1))
        data = Data("noise", tuple("0123456789"), images, images, images)
        with count_passes(model) as tally:
            validate(model, data, images, plain, images)
        found.append(tally.passes(4))
    return Passes(*(more - less for less, more in zip(*found, strict=True)))


def validated_images(recipe: Recipe, found: DataSpec) -> int:
    """Return the number of images over all validations; 0 if there is no validation or the split size is unknown."""
    cfg, objective = recipe.train, recipe.objective
    if objective.hidden is not None:
        judged = objective.validate is not None
    else:
        judged = found.classes != 1 if objective.outputs != 1 else recipe.outside is not None  # one class: unlabelled
    steps = range(0, images_in_whole_batches(recipe), cfg.batch)
    times = sum(Progress(seen).due_after(cfg.batch, cfg.images)(cfg.validate_every) for seen in steps)
    return times * judged * min((n for n in (found.val, cfg.validate_with) if n is not None), default=0)


# FLOP and memory, on the meta device ----------------------------------------------------------------------------------


class FlopCounter(TorchDispatchMode):
    """Count FLOP of the operations inside it, by torch's formulas, and the peak memory of their results in bytes.

    ``torch.utils.flop_counter.FlopCounterMode`` uses the same formulas, but its module hooks raise an error under
    ``torch.autograd.grad``, which searches and penalties need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (flops := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += flops(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def measure_network(architecture: Architecture, recipe: Recipe, held: ImagesHeld) -> tuple[int, Passes, Memory]:
    """Return parameter count, FLOP per pass of each kind, and memory for steps of ``batch / streams`` images."""
    cfg, shape = recipe.train, (architecture.channels, architecture.size, architecture.size)
    with torch.device("meta"):
        model = architecture.build().train()
    weights = count_bytes(model.state_dict().values())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = recipe.optimizer.build(parameters)
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    kept = count_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    counts = [max(1, round(share * cfg.batch / cfg.streams)) for share in (held.search, held.loss - held.penalty)]
    punished = round(held.penalty * cfg.batch / cfg.streams)

    dtype = getattr(torch, cfg.precision)
    backbone: Any = model.to(dtype).backbone  # instead of autocast, which does not support meta tensors
    backbone.recompute = cfg.recompute
    images = lambda count, **options: torch.empty(count, *shape, dtype=dtype, device="meta", **options)

    def loss(penalty: int) -> FlopCounter:
        model.zero_grad()
        with FlopCounter() as counter:
            total = model(images(counts[1])).sum()
            if penalty:
                x = images(penalty, requires_grad=True)
                (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
                total = total + gradient.square().sum()
            total.backward()
        return counter

    with FlopCounter() as search, searching(model) as f:
        x = images(counts[0], requires_grad=True)
        total = f(x).sum()
        forward = search.flops / counts[0]
        torch.autograd.grad(total, x)
    bare = loss(0)
    full = loss(punished) if punished else bare
    flops = Passes(
        forward=forward,
        teacher=forward,
        search=search.flops / counts[0] - forward,
        loss=bare.flops / counts[1] - forward,
        penalty=(full.flops - bare.flops) / punished - forward if punished else 0.0,
    )
    most = max(search.most, full.most + (weights if dtype != torch.float32 else 0))  # gradients are float32
    return sum(p.numel() for p in parameters), flops, Memory(weights, kept, weights * bool(cfg.ema), most)


def count_bytes(tensors: Any) -> int:
    return sum(v.numel() * v.element_size() for v in tensors)
