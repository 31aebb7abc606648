"""A trained run, loaded for the page, with one search at a time."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from advebm import energies
from advebm.core import config
from advebm.core.errors import UserError, unknown_name
from advebm.core.rng import generator
from advebm.data.sources import to_float
from advebm.models.batching import batch_size_for, device_of
from advebm.models.modes import searching
from advebm.models.network import Network
from advebm.runs.run import Run
from advebm.samplers.base import Sampler, marginal
from advebm.samplers.critic import Ascent
from advebm.sampling.generate import deal_images
from advebm.sampling.job import start_images
from advebm.sampling.tune import find_tuned
from advebm.starts import ImagePool, Start
from advebm.web.inputs import parse_integer
from advebm.web.jobs import Job

EVERY = "every class"
FAIRLY_SURE = 0.6  # probability of an image that is clearly right, and that an attack within the threat may change
CANDIDATES = 32  # first test images, among which those to show first are looked for


class Studio:
    """A run with its network and images.

    Attributes:
        title: name on the page.
        run: the run.
        model: the network, in eval mode.
        data: the run's data.
        critic: whether the network has one output and no classes.
    """

    def __init__(self, title: str, run: Run, *, checkpoint: str = "latest", device: str = "cpu") -> None:
        self.model: Network = run.model(checkpoint)[0].to(device).requires_grad_(False)
        if self.model.encoder:
            what = f"{run.folder} is an encoder, which has no logits"
            raise UserError(f"{what}; probe it first: advebm probe {run.folder}")
        self.title, self.run, self.data = title, run, run.data
        with searching(self.model) as f, torch.no_grad():
            self.critic = f(torch.rand(2, *self.data.shape, device=device)).numel() == 2
        self._checkpoint = run.checkpoints.path(checkpoint).name
        self._buffer = True
        try:
            run.chains(self._checkpoint)
        except UserError:
            self._buffer = False
        self._lock = threading.Lock()
        self._starts: dict[tuple[str, str, float], Start] = {}
        self._kept: dict[str, Any] = {}
        self._examples, self._likely = self._find_examples()

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @contextmanager
    def search(self, job: Job) -> Iterator[Network]:
        """Provide the network for one search at a time; a forward pass raises once the job is stopped."""
        with job.turn(self._lock):
            hook = self.model.register_forward_pre_hook(job.check)
            try:
                yield self.model
            finally:
                hook.remove()

    def about(self) -> str:
        recipe, shape = self.run.recipe, " x ".join(map(str, self.data.shape))
        kind = "critic" if self.critic else f"{len(self.data.classes)} classes"
        seen = int(self._checkpoint)
        trained = f" · after {seen:,} training images" if seen else ""  # 0: trained elsewhere
        return f"{recipe.name} · {self.data.name}, {kind}, images {shape}{trained}"

    def keep(self, name: str, make: Callable[[], Any], job: Job) -> Any:
        """Return what ``make`` returned when this was first called with ``name``; the first job is told to wait."""
        if name not in self._kept:
            job.tell("preparing")
            self._kept[name] = make()
        return self._kept[name]

    # Classes and images -------------------------------------------------------------------------------------------

    def labels(self, name: str, count: int) -> Tensor:
        """Return labels (count,): of one class, or of every class in turn; -1 for a critic."""
        if self.critic:
            return torch.full((count,), -1)
        if name == EVERY:
            return torch.arange(count) % len(self.data.classes)
        return torch.full((count,), self.data.number(name))

    def image(self, number: float) -> tuple[Tensor, int]:
        """Return a test image (C, H, W) in [0, 1] and its label, -1 if it has none."""
        count = len(self.data.test)
        index = parse_integer(number, "the number of a test image", 0, count - 1)
        return to_float(self.data.test.x[index]), int(self.data.test.y[index])

    def example(self, place: int) -> int:
        """Return the number of a test image, of those that a classifier takes for their class if there are any.

        Of these the last, ``place`` -1, is the one whose probability is nearest to :data:`FAIRLY_SURE`.
        """
        return self._examples[place % len(self._examples)]

    def second_class(self, number: int) -> str:
        """Return the class that a classifier finds second most likely for an example."""
        return self.name(int(self._likely[number, 1]))

    def _find_examples(self) -> tuple[list[int], Tensor]:
        """Return the numbers for :meth:`example`, and the two likeliest classes of the first test images (N, 2)."""
        first = self.data.test.take(slice(CANDIDATES))
        everything = list(range(len(first)))
        if self.critic or not everything:
            return everything, torch.full((len(first), 2), -1)
        share, likely = self.probabilities(first.float()).topk(2)
        numbers = (likely[:, 0] == first.y).nonzero().flatten().tolist() or everything
        last = min(numbers, key=lambda number: abs(share[number, 0].item() - FAIRLY_SURE))
        return [*(number for number in numbers if number != last), last], likely

    def name(self, label: int) -> str:
        return self.data.classes[label] if 0 <= label < len(self.data.classes) else "no label"

    # Samplers -----------------------------------------------------------------------------------------------------

    def methods(self) -> list[str]:
        """Return the kinds of samplers that fit the model, the run's own first."""
        own = config.describe(self.sampler())["kind"]
        samplers = {kind: config.build(kind, "sampler") for kind in config.KINDS["sampler"]}
        fitting = [k for k, s in samplers.items() if not s.encoder and not (self.critic and s.conditional)]
        return [own, *(kind for kind in fitting if kind != own)]

    def starts(self, sampler: Sampler) -> list[str]:
        """Return the kinds of starts that a sampler's chains can have with this run."""
        fitted = len(self.data.train) > 0 or self.data.gaussians is not None  # there are Gaussians to draw from
        kinds = ["global", "noise"] if fitted else ["noise"]
        if fitted and not self.critic and self.data.labelled and not isinstance(sampler, Ascent):
            kinds.insert(0, "class")
        if self.run.recipe.outside is not None:
            kinds.append("outside")
        if self._buffer:
            kinds.append("buffer")
        return kinds

    def sampler(self, method: str | None = None) -> Sampler:
        """Return the run's sampler, or another method with its settings; prefer those tuned for this checkpoint.

        A start that the run does not offer is replaced by ``global``, or by ``noise`` without training images.
        """
        recipe, sampler = self.run.recipe, self.run.recipe.sampler
        if method not in (None, config.describe(sampler)["kind"]):
            if method not in config.KINDS["sampler"]:
                raise unknown_name("method", method, config.KINDS["sampler"])
            sampler = recipe.with_sampler(method).sampler
        tuned = find_tuned(self.run, sampler)
        if tuned is not None and tuned[1].get("checkpoint") == self._checkpoint:
            return tuned[0]
        offered = self.starts(sampler)
        if sampler.start in offered:
            return sampler
        return dataclasses.replace(sampler, start="global" if "global" in offered else "noise")

    def seeds(self, sampler: Sampler, y: Tensor, seed: int) -> tuple[Tensor, torch.Generator]:
        """Return start images (B, C, H, W) of chains of classes ``y (B,)``, and the generator of their noise."""
        key = sampler.start, sampler.fit, sampler.shrinkage
        if key not in self._starts:
            self._starts[key] = sampler.prepare(self.data, start_images(self.run, sampler, self._checkpoint))
        start = self._starts[key]
        if isinstance(start, ImagePool):
            start = dataclasses.replace(start, order=deal_images(len(start.x), 0, len(y), seed))
        draws = generator(seed, "page", device=self.device)
        y = y.to(self.device)
        return start(torch.empty(len(y), *self.data.shape, device=self.device), y, draws), draws

    # Outputs of the model, within a search ------------------------------------------------------------------------

    def compute(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return ``function(f, *tensors)``, computed in batches, on the CPU; ``tensors`` are (B, C, H, W) and (B,)."""
        size = batch_size_for(self.data.shape, self.model)
        with searching(self.model) as f, torch.no_grad():
            parts = zip(*(values.to(self.device).split(size) for values in tensors), strict=True)
            return torch.cat([function(f, *part).cpu() for part in parts])

    def energy(self, x: Tensor) -> Tensor:
        """Return ``E(x)`` (B,) of images, on the CPU."""
        return self.compute(lambda f, z: marginal(f)(z), x)

    def probabilities(self, x: Tensor) -> Tensor:
        """Return ``p(y|x)`` (B, K) of a classifier, on the CPU."""
        return self.compute(lambda f, z: f(z).softmax(1), x)

    def joint(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``E(x, y)`` (B,) of a classifier, on the CPU."""
        return self.compute(lambda f, z, k: energies.joint(f(z), k), x, y)

    def descended(self, sampler: Sampler, x: Tensor, y: Tensor) -> Tensor:
        """Return the energy (B,) that a sampler descends, on the CPU."""
        return self.compute(lambda f, z, k: sampler.energy(f, k)(z), x, y)
