"""What makes the host wait for the device: nothing in a step of a search, a stated few in a step of training.

Counted on the tagged device of tests/tagged_device.py: numbers and masks that the host reads, copies to and from it,
and tensors that are made on the host.  docs/scaling.md states these numbers.
"""

import dataclasses

import pytest
import torch

from advebm import recipes
from advebm.core import rng
from advebm.data.augment import Augment
from advebm.data.sources import to_float
from advebm.models.modes import searching
from advebm.models.network import Architecture
from advebm.models.small import SmallConv
from advebm.objectives.base import Context
from advebm.runs.recipe import resolve
from advebm.training.loop import train
from advebm.training.trainer import Trainer
from tests.kinds import batch_of, build, kinds, place
from tests.tagged_device import tagged_device

FEW, MANY = 8, 16  # steps of a search


def waits(prepare):
    """What makes the host wait in the function that ``prepare`` returns, in order."""
    with tagged_device() as tags:
        compute = prepare()
        tags.waits.clear()
        compute()
        return tags.waits


def per_step(prepare):
    """Waits a step of a search, whose number of steps ``prepare`` takes."""
    few, many = (len(waits(lambda count=count: prepare(count))) for count in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def test_waits_are_seen():
    with tagged_device() as tags:
        x = torch.rand(4, device="cuda")
        host, index = torch.rand(4), torch.tensor([1, 2])
        calls = [
            x[0].item,
            x.tolist,
            x.cpu,
            lambda: bool(x.sum() > 0),
            lambda: f"{x[0]:.3f}",
            lambda: x[x > 0.5],
            lambda: x.nonzero(),
            lambda: torch.equal(x, x),
            lambda: x.masked_select(x > 0.5),
            lambda: x[index],
            lambda: host.to("cuda"),
            lambda: host.copy_(x),
            lambda: x.new_tensor([1.0]),
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: x.unique(),
        ]
        for call in calls:
            tags.waits.clear()
            call()
            assert len(tags.waits) == 1, call
        quiet = [
            lambda: x * 2 + torch.tensor(1.0),
            lambda: torch.where(x > 0.5, x, 0.0),
            lambda: x.masked_fill(x > 0.5, 0.0),
            lambda: torch.zeros(3, device="cuda"),
            lambda: x.new_full((), 2.0),
            lambda: x.new_zeros(2).to(x),
            lambda: torch.rand(2, generator=torch.Generator("cuda"), device="cuda"),
            lambda: host.sum().item(),
            lambda: x.sort().values[:2].sum(),
        ]
        tags.waits.clear()
        for call in quiet:
            call()
        assert tags.waits == []


@kinds("sampler")
def test_samplers_wait_for_no_step(role, kind, plain, data, networks):
    def prepare(count):
        sampler = dataclasses.replace(build(role, kind, plain), steps=count)
        model = place(networks["encoder" if sampler.encoder else "classifier"], "cuda")
        x, y = to_float(data.train.x[:10]).to("cuda"), data.train.y[:10].to("cuda")
        bank, draws = sampler.bank(data), rng.generator("noise", device="cuda")
        return lambda: sampler(model, y, x, generator=draws, bank=bank)

    images_drawn_anew = 1 if kind == "np-langevin" and plain and plain["negatives"] == "data" else 0
    assert per_step(prepare) == 2 * images_drawn_anew  # which images, and the images


@kinds("edit")
def test_edits_wait_for_no_step(role, kind, plain, data, networks):
    """Films have a fixed number of images."""
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:5, 3:6] = True

    def prepare(count):
        edit = dataclasses.replace(build(role, kind, plain), steps=count)
        model, x = place(networks["classifier"], "cuda"), data.test.x[:4]
        if kind == "compose":
            return lambda: edit([model, model], x, [3, None])
        x = torch.nn.functional.avg_pool2d(to_float(x), edit.factor) if kind == "upsample" else x
        mask, draws = None if kind == "upsample" else hole, rng.generator("edit", device="cuda")
        return lambda: edit(model, x, data.test.y[:4], hole=mask, generator=draws, frames=2)

    assert per_step(prepare) == 0


LOOKS = {"pgd": 0, "cw": 0, "apgd": 0.25, "square": 2}  # of 8 and 16 steps, apgd looks in every fifth


@kinds("adversary", skip=("autoattack", "fab"))
def test_attacks_wait_for_no_step(role, kind, plain, data, networks):
    """APGD looks for finished points now and then, Square at each query, which also reads where its window is."""

    def prepare(count):
        attack = dataclasses.replace(build(role, kind, plain), **{"queries" if kind == "square" else "steps": count})
        attack = attack if kind == "cw" else dataclasses.replace(attack, eps=1e-4)  # so that all images stand
        model, x = place(networks["classifier"], "cuda"), to_float(data.test.x).to("cuda")
        y, draws = model(x).argmax(1), rng.generator("attack", device="cuda")

        def search():
            with searching(model) as f:
                attack.runs(10)[0].search(f, x, y, draws)

        return search

    extra = 3 if kind == "square" and plain else 0  # with l2 two windows, and which way two bumps point
    assert per_step(prepare) == LOOKS[kind] + extra


STATED = {"jeat": 3, "jem": 3, "mle": 3, "dat": 1, "binary-at": 1, "binary-mle": 1}  # waits a step of training
FIRST = {"jeat": 2, "jem": 2, "mle": 2}  # those before the gradients are queued: chains to go on with


@kinds("objective", skip=("rst",))
def test_training_waits_a_stated_few_times(role, kind, plain, data):
    objective = build(role, kind, plain)
    if kind in ("fast", "n-fgsm"):
        objective = dataclasses.replace(objective, watch_every=0)
    norm = "dual" if objective.hidden is not None else "batch"
    described = (objective.outputs or 10, 1, 8, (0.3,), (0.4,), objective.hidden)

    def prepare():
        model = Architecture(SmallConv(width=4, norm=norm), *described).build().to("cuda").train()
        batch, state = batch_of(data, 8, "cuda"), objective.init(torch.empty(8, *data.shape), rng.generator("state"))

        def step(number):
            ctx = Context(rng.generator("step", number, device="cuda"), images=8 * number)
            found = objective.search(model, batch, state, ctx)
            loss = objective.loss(model, batch, found, state, ctx)
            loss.total.backward()
            objective.after(model, batch, found, state, loss, ctx)

        for number in range(2):
            step(number)  # the states of streams begin on the host
        return lambda: step(2)

    names = [name for name, _ in waits(prepare)]
    without_buffer = kind == "mle" and plain is not None
    assert names.index("backward") == (0 if without_buffer else FIRST.get(kind, 0))
    assert len(names) - 1 == (0 if without_buffer else STATED.get(kind, 0))


AUGMENTED = {
    "crop and flip": (Augment(crop=1, flip=True, cutout=2), 0),
    "boxes": (Augment(scale=0.5), 0),
    "colours": (Augment(jitter=0.5, grey=0.2), 1),
    "policy": (Augment(policy="autoaugment"), 1),
    "idbh": (Augment(cropshift=2, flip=True, erase=0.5), 0),
    "color-shape": (Augment(policy="color-shape"), 1),
}


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmentations_wait_at_most_once(name):
    augment, expected = AUGMENTED[name]

    def prepare():
        x, draws = torch.rand(64, 3, 8, 8, device="cuda"), rng.generator("augment", device="cuda")
        augment(x, draws)  # tables are copied to the device once
        return lambda: augment(x, draws)

    assert len(waits(prepare)) == expected


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("digits-at", {"train.streams": 2, "optimizer": "adam"}, 0),
        ("digits-trades-awp", {"optimizer": "lars"}, 0),
        ("digits-free", {}, 0),
        ("digits-infonce", {"objective.negatives.queue": 16, "data.augment.x.jitter": 0.0}, 0),
        ("digits-binary-at", {"outside": "noise", "objective.curriculum.window": 16}, 1),
    ],
)
def test_the_loop_adds_no_wait(name, options, expected, tmp_path, monkeypatch):
    """Batches, schedules, clipping, optimisers, averages and means: steps between two logs."""
    short = {"train.images": 96, "train.batch": 16, "train.log_every": 96, "train.validate_every": 96}
    short |= {"train.checkpoint_every": 96, "train.validate_with": 6, "threat.steps": 1, "backbone.width": 4}
    short |= {"data.val": 0.02}
    recipe, step, found = resolve(recipes.find(name), [*short.items(), *options.items()]), Trainer.step, []

    with tagged_device() as tags:

        def counted(trainer, **options):
            begun = len(tags.waits)
            step(trainer, **options)
            found.append([kind for kind, _ in tags.waits[begun:]])

        monkeypatch.setattr(Trainer, "step", counted)
        train(recipe, tmp_path / "run", device="cuda")
    for kinds_of_wait in found[1:-1]:
        first = kinds_of_wait.index("backward")
        assert first == 0, "before the gradients are queued"
        assert len([kind for kind in kinds_of_wait if kind != "backward"]) == expected
