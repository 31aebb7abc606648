"""What goes around an objective leaves to it what it does not do itself."""

import dataclasses

import pytest
import torch

from advebm.attacks.projected import Attack
from advebm.core import rng
from advebm.objectives.at import AT
from advebm.objectives.awp import AWP, SAM
from advebm.objectives.base import Batch, Context, Loss, Objective
from advebm.objectives.rst import RST
from advebm.objectives.wrapper import Wrapper

CALLS = []


@dataclasses.dataclass(frozen=True)
class Spy(AT):
    """Adversarial training that says what it was asked."""

    attack: Attack = Attack(eps=0.1, steps=1)

    def check(self, images, threat):
        CALLS.append(("check", images, threat))

    def init(self, like, generator):
        CALLS.append(("init", len(like)))
        return ["state"]

    def after(self, model, batch, found, state, loss, ctx):
        CALLS.append(("after", len(batch.x), found, state, loss))


@dataclasses.dataclass(frozen=True)
class Plain(Wrapper):
    """Around an objective, and nothing more."""

    objective: Objective = Spy()


MEMBERS = [name for name in vars(Objective) if not name.startswith("_")]


def test_all_members_of_an_objective_are_forwarded():
    assert {name for name in MEMBERS if name not in vars(Wrapper)} == set()


@pytest.mark.parametrize("name", ["needs", "outputs", "hidden", "replays", "validate"])
def test_what_an_objective_is_the_wrapper_is(name):
    values = {"needs": frozenset({"view"}), "outputs": 1, "hidden": 7, "replays": 3, "validate": print}
    other = type("Other", (), values)()
    assert getattr(Plain(other), name) == values[name]


@pytest.mark.parametrize("wrap", [Plain, AWP, SAM, RST], ids=lambda wrap: wrap.__name__)
def test_the_inner_objective_does_the_rest(wrap, net, batch, tmp_path, monkeypatch):
    """On its own batch and with its own search result, whatever the wrapper's search gives besides."""
    CALLS.clear()
    monkeypatch.setattr("advebm.objectives.rst._load_teacher", lambda where: net)
    objective = RST("teacher", Spy()) if wrap is RST else wrap(objective=Spy())
    batch = Batch(batch.x, batch.y, extra=batch.x.flip(0)) if wrap is RST else batch
    size = len(batch.x) * (2 if wrap is RST else 1)
    objective.check(5, Attack())
    state, ctx = objective.init(batch.x, rng.generator(0)), Context(rng.generator(1))
    found = objective.search(net, batch, state, ctx)
    whole, inner = objective.inner(batch, found)
    assert (whole.x.shape[0], inner.shape[0]) == (size, size)
    loss = objective.loss(net, batch, found, state, ctx)
    objective.after(net, batch, found, state, loss, ctx)
    assert isinstance(loss, Loss)
    assert CALLS[0] == ("check", 5, Attack())
    assert CALLS[1] == ("init", size)
    assert CALLS[2][:2] == ("after", size)
    assert CALLS[2][2] is inner
    assert CALLS[2][3:] == (state, loss)
    assert torch.equal(objective.adversarial(batch, found), inner[: len(batch.x)])
