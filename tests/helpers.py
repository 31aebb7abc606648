import dataclasses
from collections.abc import Callable

import pytest
from torch import Tensor, nn

from advebm import recipes
from advebm.core import config
from advebm.reproduction import applications, binary, experiment, experiments, study, supervised, tables, unsupervised
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run

few_samples = pytest.mark.filterwarnings(
    "ignore:F.*fewer give a larger one"
)  # tests draw fewer than there are dimensions


def tiny(name: str = "digits-at", **options: object) -> Recipe:
    """A recipe of the package, cut down to a second or two."""
    short = {
        "backbone.width": 8,
        "objective.attack.steps": 2,
        "threat.steps": 3,
        "train.images": 6_000,
        "train.log_every": 1_000,
        "train.validate_every": 3_000,
        "train.checkpoint_every": 2_000,
    }
    if name != "digits-at":
        del short["objective.attack.steps"]
    return resolve(recipes.find(name), [*short.items(), *((k.replace("__", "."), v) for k, v in options.items())])


def default(role: str, kind: str) -> object:
    """A method object with every option at its default; what has none is a path or a name."""
    cls = config.lookup(role, kind)
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    assert set(needed) <= {"path", "name", "teacher", "model"}, (
        "a method works with its defaults, or names what it needs"
    )
    return config.build({"kind": kind, **dict.fromkeys(needed, "some.where:file")}, role)


class Plain(nn.Module):
    """A function of images as a model without weights."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


def patch_experiments(monkeypatch, name, value):
    """Put something in the place of what experiments share, in each module of them that has it."""
    known = False
    for module in (study, experiment, supervised, binary, applications, unsupervised, experiments, tables):
        if callable(getattr(module, name, None)):  # not a module of that name
            monkeypatch.setattr(module, name, value)
            known = True
    assert known, f"nothing is called {name}"


def linked(run, folder):
    """A run under another folder, so that what is drawn and measured there is a test's own."""
    for name in ("config.yaml", "checkpoints", "env.json"):
        (folder / name).symlink_to(run.folder / name)
    return Run(folder)
