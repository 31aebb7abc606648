"""Look for faults in a model, or in the convolutions of this machine's CPU."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from advebm import recipes
from advebm.attacks.base import ball_text
from advebm.attacks.projected import Attack
from advebm.core import console
from advebm.core.errors import UserError
from advebm.data.sources import Data, Images, find_spec
from advebm.diagnostics.doctor import FEWEST, Findings, examine_split
from advebm.diagnostics.kernels import KNOWN_WRONG, Verdict, check, convolutions
from advebm.runs.find_model import find_reference
from advebm.runs.recipe import resolve
from advebm.workflows.devices import choose_device

Overrides = Iterable[tuple[str, Any]]

# A recipe of which only the data and the threat are used.
IMAGES_ALONE: dict[str, Any] = {"name": "doctor", "threat": {}, "backbone": "small-conv", "objective": "standard"}
IMAGES_ALONE |= {"sampler": "ta", "metrics": []}
BATCH = 16  # batch size of the checked convolutions


def examine_model(
    model: str, overrides: Overrides = (), *, images: int, checkpoint: str, seed: int, device: str | None
) -> Findings:
    """Examine a run's model on the run's test images, or any model on the data that ``overrides`` name."""
    overrides, reference = list(overrides), find_reference(model)
    known = {k: v for k, v in reference.options().items() if k in ("data", "threat")}
    if "data" not in known and "data" not in dict(overrides):
        raise UserError(f"{model} says nothing of its images: give --data NAME, as in --data cifar10")
    recipe = resolve({**IMAGES_ALONE, **known}, overrides)
    module = reference.load(checkpoint).to(choose_device(device))
    return examine_on(module, recipe.data.load(), recipe.threat, title=model, images=images, seed=seed)


def examine_on(
    module: nn.Module, data: Data, threat: Attack, *, title: str = "the model", images: int = 300, seed: int = 0
) -> Findings:
    """Examine a module on up to ``images`` test images, or on images of all splits where there are too few of these."""
    split, kind = data.test, "test"
    if len(split) < FEWEST <= sum(map(len, data.splits)):
        parts = (data.test, data.val, data.train)
        few = [part.take(slice(FEWEST)) for part in parts]
        split = Images(torch.cat([part.x for part in few]), torch.cat([part.y for part in few])).take(slice(FEWEST))
        kind = "test, validation and training"
    count = min(images, len(split))
    console.say(f"{title} on {count} {kind} images of {data.name} at {ball_text(threat.eps, threat.norm)}")
    return examine_split(module, split, threat=threat, count=count, seed=seed, progress=console.say)


@dataclasses.dataclass(frozen=True)
class MachineCheck:
    """Results of checking a CPU's convolutions.

    Attributes:
        models: names of the models whose convolutions were checked.
        convolutions: number of distinct convolutions in these models.
        verdicts: one for each convolution that was checked before the time limit.
        known: verdict on a kernel known to be wrong on some CPUs; the package's networks avoid it.
    """

    models: tuple[str, ...]
    convolutions: int
    verdicts: tuple[Verdict, ...]
    known: Verdict

    @property
    def wrong(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.wrong)

    @property
    def error(self) -> float | None:
        """Return the largest error of the correct float32 convolutions; None if there are none."""
        errors = [max(v.errors) for v in self.verdicts if not v.wrong and v.convolution.dtype == "float32"]
        return max(errors) if errors else None


def check_machine(model: str | None = None, overrides: Overrides = (), *, checkpoint: str = "latest") -> MachineCheck:
    """Compare this CPU's convolutions with float64: those of ``model``, default: of two CIFAR-10 recipes."""
    models, shape = _networks_to_check(model, list(overrides), checkpoint)
    distinct = dict.fromkeys(c for m in models.values() for c in convolutions(m, shape, BATCH, "bfloat16"))
    with console.bar("convolutions", len(distinct), 0) as progress:
        verdicts = tuple(check(list(distinct), progress=progress))
    (known,) = check([KNOWN_WRONG])  # in a separate process: even a correct run of it may corrupt later ones
    return MachineCheck(tuple(models), len(distinct), verdicts, known)


def _networks_to_check(
    model: str | None, overrides: list[tuple[str, Any]], checkpoint: str
) -> tuple[dict[str, nn.Module], tuple[int, ...]]:
    """Return the networks to check, by name, and the shape (C, H, W) of their images."""
    if model is None:
        names = ("cifar10-at-small", "cifar10-at-2h")
        return {name: resolve(recipes.find(name)).backbone.build(3, 32)[0].eval() for name in names}, (3, 32, 32)
    reference = find_reference(model)
    architecture = reference.architecture(checkpoint)
    if "data" in dict(overrides):
        shape: tuple[int, ...] = find_spec(resolve(IMAGES_ALONE, overrides).data).shape
    elif architecture is None:
        raise UserError(f"{model} says nothing of its images: give --data NAME, as in --data cifar10")
    else:
        shape = architecture.shape
    return {model: reference.load(checkpoint)}, shape
