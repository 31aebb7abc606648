"""What a recipe costs before it has run: passes through the network, FLOP, memory."""

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
from advebm.objectives.curriculum import Curriculum, Level
from advebm.runs.checkpoint import Progress
from advebm.runs.recipe import Recipe, design
from advebm.training.hardware import Machine, describe_device, seconds
from advebm.training.setup import search_view
from advebm.training.validate import validate

TIMED = 0.1  # seconds that a batch which is timed takes at least, if a step has so many images
CLASSES = 1000  # of a folder that is not there; a head of so many outputs hardly counts


class Passes(NamedTuple):
    """Passes of each kind through the network, for an image; or the FLOP of one.

    Attributes:
        forward: of images.
        teacher: of images through a teacher.
        search: backward to images, with frozen weights.
        loss: backward to the weights.
        penalty: backward to images, to be differentiated once more (R1).
    """

    forward: float
    teacher: float
    search: float
    loss: float
    penalty: float

    @property
    def backward(self) -> float:
        """Of all kinds."""
        return self.search + self.loss + self.penalty

    def times(self, flops: "Passes") -> float:
        """FLOP of these passes, from those of one of each kind."""
        return sum(count * each for count, each in zip(self, flops, strict=True))

    def towards(self, other: "Passes", share: float) -> "Passes":
        """On the line through this (0) and the other (1)."""
        return Passes(*(a + share * (b - a) for a, b in zip(self, other, strict=True)))


class ImagesHeld(NamedTuple):
    """Images that a backward pass needs the activations of at once, for each image of a step.

    Attributes:
        search: in the largest search.
        loss: in the loss.
        penalty: those of the loss that are in a penalty on the gradient.
    """

    search: float
    loss: float
    penalty: float


class Memory(NamedTuple):
    """Bytes, of one process.

    Attributes:
        weights: of the network.
        optimizer: its state.
        average: the averaged weights.
        step: activations and gradients, at the most.
    """

    weights: int
    optimizer: int
    average: int
    step: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a stage takes.

    Attributes:
        recipe: the stage.
        outline: of its images.
        architecture: of its network.
        parameters: how many.
        least, most: passes of search and loss, for an image trained on; they differ where K grows.
        validation: passes for an image validated on that is right and stays so.
        validated: images validated on, each time counted.
        flops: of a pass, an image.
        memory: what is held.
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
        """Trained on, in whole batches."""
        return whole_batches(self.recipe)

    @property
    def total(self) -> tuple[float, float]:
        """FLOP of training and validation, the least and the most."""
        checked = self.validated * self.validation.times(self.flops)
        least, most = (self.images * passes.times(self.flops) + checked for passes in (self.least, self.most))
        return least, most


def estimates(recipe: Recipe) -> list[Estimate]:
    """A recipe's stages, the final one last.

    Nothing is trained, and images are read only where their source does not declare what they are.  Passes are counted
    while objective and validation work on a network of a few weights; FLOP, a multiplication and an addition each of
    convolutions and linear layers, and memory are those of the recipe's network on tensors without numbers.  A teacher
    is taken for a network like the recipe's.  Left out: rollbacks, what ``fast`` looks at now and then, instruments,
    and the copies of the weights that ``awp`` makes.

    Raises:
        UserError: images whose shape is not known before they are read, or that the network does not take.
    """
    return [estimate(stage) for stage in (*recipe.before, recipe)]


def estimate(recipe: Recipe) -> Estimate:
    """Of one stage."""
    found = find_spec(recipe.data)
    architecture = design(recipe, blank_data(found))
    least, most, held = count_training(recipe)
    parameters, flops, memory = measure_network(architecture, recipe, held)
    times = (count_validation(recipe), validated_images(recipe, found))
    return Estimate(recipe, found, architecture, parameters, least, most, *times, flops, memory)


def measured_here(stage: Estimate, device: str) -> Machine:
    """This machine, as fast as it searches the stage's network, forward and backward to images, in its precision.

    Timed on random weights and images, which get twice as many until they take long enough to be timed, or are as many
    as a step has, or fill the memory.  Training does a little more: it moves weights, augments and validates.
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
            if took >= TIMED:
                break
    if not took:
        raise UserError(f"not even one image of the recipe's size fits into the memory of {device}")
    memory = torch.cuda.get_device_properties(device).total_memory if torch.device(device).type == "cuda" else None
    return Machine(describe_device(device), {cfg.precision: count * flops / took}, 1.0, memory)


def passes_per_image(recipe: Recipe) -> tuple[float, float]:
    """Forward and backward passes through the network that an image takes; of a growing search, at its longest."""
    with with_stub_teacher(recipe.objective) as objective:
        found, _ = count_step(objective, recipe.train.images)
    return found.forward, found.backward


def whole_batches(recipe: Recipe) -> int:
    """Images trained on, in whole batches."""
    return math.ceil(recipe.train.images / recipe.train.batch) * recipe.train.batch


def blank_data(found: DataSpec) -> Data:
    """A black and a white image in the place of a source's."""
    x = torch.zeros(2, *found.shape, dtype=torch.uint8)
    x[1] = 255
    images = Images(x, torch.arange(2))
    return Data("nothing", tuple(map(str, range(found.classes or CLASSES))), images, images, images)


# Passes, on a network of a few weights --------------------------------------------------------------------------------


class PassCounter:
    """Counts images through networks while :func:`count_passes`."""

    def __init__(self) -> None:
        self.forward = self.teacher = self.search = self.loss = self.penalty = 0
        self.widest = self.graph = 0  # images in the largest search, and in graphs that reach weights

    def passes(self, images: int) -> Passes:
        """For each of so many images."""
        return Passes(*(getattr(self, name) / images for name in Passes._fields))

    def back(self, count: int, frozen: bool, gradient: Tensor) -> None:
        """A gradient comes back to the outputs of so many images."""
        kind = "penalty" if torch.is_grad_enabled() else "search" if frozen else "loss"
        setattr(self, kind, getattr(self, kind) + count)


@contextmanager
def count_passes(model: Network) -> Iterator[PassCounter]:
    """Count the passes of a network; other networks are teachers."""
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
    """The network that passes are counted on: of colour images of 8 pixels, with 10 classes if it has classes."""
    half = (0.5,) * 3
    return Architecture(SmallConv(1, norm="none"), objective.outputs or 10, 3, 8, half, half, objective.hidden)


@contextmanager
def with_stub_teacher(objective: Objective) -> Iterator[Objective]:
    """An objective whose teacher, if it has one, need not be there."""
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
    """What an image of a step takes after ``seen`` images; K of a growing search is ``level``, or its largest.

    Counted as what four more images take, which leaves out what is done once a step.
    """
    counts = []
    for images in (4, 8):
        generator, model = rng.generator(0), tiny_architecture(objective).build().train()
        x = torch.rand(images, 3, 8, 8, generator=generator)
        batch = Batch(x, torch.arange(images), view=x, outside=x, extra=x)
        state = objective.init(x, generator)
        if isinstance(state, Level):
            state.steps, state.since = state.largest if level is None else level, seen
        ctx, graph, penalty = Context(generator, seen), 0, 0
        with count_passes(model) as tally:
            for replay in range(objective.replays):
                found = objective.search(model, batch, state, ctx)
                before = tally.graph, tally.penalty
                loss = objective.loss(model, batch, found, state, ctx)
                loss.total.backward()
                graph, penalty = max(graph, tally.graph - before[0]), max(penalty, tally.penalty - before[1])
                if replay < objective.replays - 1:  # what is done after a step is not part of it
                    objective.after(model, batch, found, state, loss, ctx)
        counts.append((*tally.passes(4), tally.widest / 4, graph / 4, penalty / 4))
    each = [more - less for less, more in zip(*counts, strict=True)]
    return Passes(*each[:5]), ImagesHeld(*each[5:])


def count_training(recipe: Recipe) -> tuple[Passes, Passes, ImagesHeld]:
    """Passes for an image, the least and the most, and what is held."""
    seen = recipe.train.images
    with with_stub_teacher(recipe.objective) as objective:
        longest, held = count_step(objective, seen)
        curriculum = find_curriculum(objective)
        if curriculum is None or not seen:
            return longest, longest, held
        first, second = (count_step(objective, seen, level)[0] for level in (0, 1))
    least, most = (first.towards(second, k) for k in curriculum.means(whole_batches(recipe), recipe.train.batch))
    return least, most, held


def find_curriculum(objective: Any) -> Curriculum | None:
    """The curriculum of an objective, or of the one inside it."""
    found = getattr(objective, "curriculum", None)
    inner = getattr(objective, "objective", None)
    return found if isinstance(found, Curriculum) or inner is None else find_curriculum(inner)


def count_validation(recipe: Recipe) -> Passes:
    """What an image validated on takes that is right and stays so, counted as for :func:`count_step`."""
    still = dataclasses.replace(recipe.threat, eps=1e-6, step_size=1e-6)
    plain = dataclasses.replace(recipe, threat=still, data=Digits())  # of which only the augmentation is looked at
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
    """Images validated on, each time counted; none where their number is not known."""
    cfg, objective = recipe.train, recipe.objective
    if objective.hidden is not None:
        judged = objective.validate is not None
    else:
        judged = found.classes != 1 if objective.outputs != 1 else recipe.outside is not None  # one class: no labels
    steps = range(0, whole_batches(recipe), cfg.batch)
    times = sum(Progress(seen).due_after(cfg.batch, cfg.images)(cfg.validate_every) for seen in steps)
    return times * judged * min((n for n in (found.val, cfg.validate_with) if n is not None), default=0)


# FLOP and memory, on tensors without numbers --------------------------------------------------------------------------


class FlopCounter(TorchDispatchMode):
    """FLOP of what runs within it, by torch's own formulas, and the most bytes of its tensors alive at once.

    ``torch.utils.flop_counter.FlopCounterMode`` has the formulas too, but tracks modules by hooks that raise under
    ``torch.autograd.grad``, which searches and penalties take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation, carried out and counted."""
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
    """Parameters, FLOP of a pass of each kind, and memory where a step has ``batch / streams`` images."""
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
    backbone: Any = model.to(dtype).backbone  # in place of autocast, which does not know such tensors
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
    """Bytes."""
    return sum(v.numel() * v.element_size() for v in tensors)
