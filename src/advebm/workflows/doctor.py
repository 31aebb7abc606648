"""What is looked at in a model, and in this machine."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from advebm import recipes
from advebm.attacks.base import radius_text
from advebm.core import config, console
from advebm.core.errors import UserError
from advebm.data.sources import find_spec
from advebm.diagnostics.doctor import Finding, examine_split
from advebm.diagnostics.kernels import KNOWN, Verdict, check, convolutions
from advebm.models import network
from advebm.runs.find_model import find_model, is_factory
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.workflows.devices import choose_device

Overrides = Iterable[tuple[str, Any]]

# A recipe of which only images and threat are looked at.
IMAGES_ALONE: dict[str, Any] = {"name": "doctor", "threat": {}, "backbone": "small-conv", "objective": "standard"}
IMAGES_ALONE |= {"sampler": "ta", "metrics": []}
BATCH = 16  # images of the convolutions that are checked


def examine_model(
    model: str, overrides: Overrides = (), *, images: int, checkpoint: str, seed: int, device: str | None
) -> list[Finding]:
    """Faults of a run's model on its own images, or of any model on images that ``overrides`` name."""
    overrides = list(overrides)
    if (Path(model) / "config.yaml").is_file():
        plain = config.describe(Run.open(model).recipe)
    elif "data" in dict(overrides):
        plain = IMAGES_ALONE
    else:
        raise UserError(f"{model} is not a run, which knows its images: give --data NAME, as in --data cifar10")
    recipe = resolve(plain, overrides)
    found = find_model(model, checkpoint=checkpoint).to(choose_device(device))
    data, threat = recipe.data.load(), recipe.threat
    count = min(images, len(data.test))
    console.say(f"{model} on {count} test images of {data.name} at {radius_text(threat.eps, threat.norm)}")
    return examine_split(found, data.test, threat=threat, count=count, seed=seed, progress=console.say)


@dataclasses.dataclass(frozen=True)
class MachineCheck:
    """What came of checking a CPU's convolutions.

    Attributes:
        models: whose convolutions were checked.
        convolutions: how many there are.
        verdicts: on those that were checked; time may have been up before the last.
        known: on the kernel that is known to be wrong on some CPUs; the package's networks avoid it.
    """

    models: tuple[str, ...]
    convolutions: int
    verdicts: tuple[Verdict, ...]
    known: Verdict

    @property
    def wrong(self) -> tuple[Verdict, ...]:
        """Convolutions that are computed wrongly."""
        return tuple(verdict for verdict in self.verdicts if verdict.wrong)

    @property
    def error(self) -> float | None:
        """The largest error of those that are right, in float32; None where there are none."""
        errors = [max(v.errors) for v in self.verdicts if not v.wrong and v.convolution.dtype == "float32"]
        return max(errors) if errors else None


def check_machine(model: str | None = None, overrides: Overrides = (), *, checkpoint: str = "latest") -> MachineCheck:
    """Check this CPU's convolutions, of a model or of CIFAR-10 recipes, by those of float64."""
    models, shape = _models(model, list(overrides), checkpoint)
    found = dict.fromkeys(c for m in models.values() for c in convolutions(m, shape, BATCH, "bfloat16"))
    with console.bar("convolutions", len(found), 0) as tell:
        verdicts = tuple(check(list(found), progress=tell))
    (known,) = check([KNOWN])  # in a process of its own: it may damage what comes after it, even where it is right
    return MachineCheck(tuple(models), len(found), verdicts, known)


def _models(
    model: str | None, overrides: list[tuple[str, Any]], checkpoint: str
) -> tuple[dict[str, nn.Module], tuple[int, ...]]:
    """The networks to check, by name, and the shape of their images."""
    if model is None:
        names = ("cifar10-at-small", "cifar10-at-2h")
        return {name: resolve(recipes.find(name)).backbone.build(3, 32)[0].eval() for name in names}, (3, 32, 32)
    found = find_model(model, checkpoint=checkpoint)
    if "data" in dict(overrides):
        shape: tuple[int, ...] = find_spec(resolve(IMAGES_ALONE, overrides).data).shape
    elif is_factory(model):
        raise UserError(f"{model} says nothing of its images: give --data NAME, as in --data cifar10")
    else:
        architecture = network.read_architecture(*network.locate(model)[:1], foreign=True)
        shape = (architecture.channels, architecture.size, architecture.size)
    return {model: found}, shape
