"""What a recipe is said to cost is what it costs: passes of real training, closed forms, memory of the allocator."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from advebm import cli, recipes
from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.sources import Classes, DataSpec, Digits, Part, Unlabelled, find_spec
from advebm.metrics.base import Subject
from advebm.metrics.robustness import measure_accuracy
from advebm.models import precision
from advebm.models.network import Architecture
from advebm.models.small import SmallConv
from advebm.objectives.base import Batch, Context
from advebm.objectives.curriculum import Curriculum
from advebm.runs.engine import Engine
from advebm.runs.recipe import design, resolve
from advebm.sampling import generate
from advebm.training import cost, hardware, loop, setup, trainer
from advebm.training.cost import ImagesHeld, Passes, blank_data, estimate, estimates
from advebm.training.hardware import PUBLISHED, Machine

COUNTS = {"forward": 0, "backward": 0}


class Counter(torch.autograd.Function):
    """Counts the images that pass, forwards and backwards."""

    @staticmethod
    def forward(ctx, x):
        COUNTS["forward"] += len(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        COUNTS["backward"] += len(gradient)
        return gradient


class Counting(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return Counter.apply(self.body(x))


@dataclasses.dataclass(frozen=True)
class Counted:
    """A backbone that counts."""

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        body, width = SmallConv(2, norm="none").build(channels, size)
        return Counting(body), width


@dataclasses.dataclass(frozen=True)
class Flat:
    """The pixels as they are: with its head a linear network."""

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        return nn.Flatten(), channels * size * size


@dataclasses.dataclass(frozen=True)
class TwoLayers:
    """A convolution of stride 2 and a linear layer."""

    def build(self, channels: int, size: int) -> tuple[nn.Module, int]:
        half = size // 2
        layers = (nn.Conv2d(channels, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * half * half, 7), nn.ReLU())
        return nn.Sequential(*layers), 7


def recipe(name: str, **options: object):
    short = {"train.images": 32, "train.batch": 16, **{k.replace("__", "."): v for k, v in options.items()}}
    return resolve(recipes.find(name), list(short.items()))


NOISE = {"outside": {"kind": "noise", "count": 100}}
CASES = {
    "digits-at": {"objective__attack__steps": 3},
    "digits-trades": {"objective__attack__steps": 3},
    "digits-jem": {"objective__negatives": {"steps": 4, "buffer": 32}},
    "digits-free": {"objective__replays": 3},
    "digits-binary-at": {"objective__curriculum": {"start": 4, "steps": 4}, "objective__inside_steps": 2} | NOISE,
    "digits-acl": {"objective__attack__steps": 2},
    "digits-trades-awp": {"objective__warmup": 0},
    "digits-ratio": NOISE,
}
GROWING = {"start": 1, "steps": 4, "gate": "none", "images_per_step": 40}  # by the clock alone, so K is known


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train, and say which passes the network has counted; what looks at it from outside is left out."""

    def count(short):
        monkeypatch.setattr(trainer, "validate", lambda *a, **k: {"val/robust_accuracy": 0.0, "val/accuracy": 0.0})
        monkeypatch.setattr(trainer, "EnergyShift", lambda *a: SimpleNamespace(terms=dict))
        COUNTS.update(forward=0, backward=0)
        loop.train(short, tmp_path / "run", device="cpu")
        return dict(COUNTS)

    return count


@pytest.mark.parametrize("name", CASES)
def test_passes_are_those_of_two_steps_of_training(name, trained):
    short = recipe(name, backbone="tests.training.test_cost:Counted", **CASES[name])
    found, told = trained(short), estimate(short)
    assert told.least == told.most
    assert found == {"forward": 32 * told.most.forward, "backward": 32 * told.most.backward}
    assert found["forward"] > 0


def test_passes_of_a_growing_search_are_those_of_training(trained):
    options = {"objective__curriculum": GROWING, "train__images": 128} | NOISE
    short = recipe("digits-binary-at", backbone="tests.training.test_cost:Counted", **options)
    found, told = trained(short), estimate(short)
    assert told.least == told.most
    assert found == {"forward": 128 * told.most.forward, "backward": 128 * told.most.backward}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [  # forward, of a teacher, to images, to weights, to be differentiated again
        ("digits-at", {"objective__attack__steps": 3}, (4, 0, 3, 1, 0)),
        ("digits-free", {"objective__replays": 3}, (3, 0, 0, 3, 0)),
        ("digits-trades-awp", {"objective__warmup": 0}, (12, 0, 7, 4, 0)),  # the KL's target, then both images twice
        ("digits-rst-awp", {}, (24, 1, 14, 8, 0)),  # the same of twice the images
        ("digits-binary-at", {"objective__curriculum": {"start": 4, "steps": 4}}, (7, 0, 4, 2, 1)),
    ],
)
def test_passes_are_told_apart(name, options, expected):
    least, most, held = cost.count_training(recipe(name, **options))
    assert least == most == expected
    assert held == {"digits-at": (1, 1, 0), "digits-free": (0, 1, 0), "digits-binary-at": (1, 3, 1)}.get(name, held)


@pytest.mark.parametrize("gate", [0.8, None])
@pytest.mark.parametrize("images_per_step", [None, 300, 70])
@pytest.mark.parametrize(("start", "window", "images"), [(0, 100, 1600), (3, 33, 160)])
def test_means_of_a_curriculum_are_those_of_its_extremes(gate, images_per_step, start, window, images):
    """An AUROC that is always 1 and one that is always 0, step by step."""
    if gate is None and images_per_step is None:
        return
    curriculum, found = Curriculum(8, start, gate, window, images_per_step), []
    for auroc in (0.0, 1.0):
        level, seen = curriculum.init(), []
        for at in range(0, images, 16):
            curriculum.advance(level, at)
            seen.append(level.steps)
            level.note(torch.tensor([auroc]), at)
        found.append(sum(seen) / len(seen))
    assert curriculum.means(images, 16) == pytest.approx(tuple(found), abs=1e-12)


def test_validation_is_counted_at_its_most():
    """A network that is right on every image, and stays so, against a count of its own."""
    short = recipe("digits-at", backbone="tests.training.test_cost:Counted", threat__steps=5, train__validate_every=16)
    told, data = estimate(short), Digits().load()
    assert told.validated == 2 * len(data.val)  # after each of two steps
    model = design(short, data).build().eval()
    taken = []
    for count in (20, 50):
        images = data.val.take(slice(count))
        images = dataclasses.replace(images, y=model(images.float()).argmax(1))
        subject = Subject(model, data, images, dataclasses.replace(short.threat, eps=1e-7))
        COUNTS.update(forward=0, backward=0)
        for attack in (None, subject.threat):
            assert measure_accuracy(subject, attack, rng.generator(0))[0] == 1.0
        taken.append(tuple(COUNTS.values()))
    forward, backward = ((more - less) / 30 for less, more in zip(*taken, strict=True))
    assert (told.validation.forward, told.validation.backward) == (forward, backward) == (8, 5)
    assert estimate(recipe("digits-binary-at", train__validate_with=7)).validated == 7


@pytest.mark.parametrize(
    ("name", "sampler"), [("digits-at", "rcs"), ("digits-binary-at", "ascent"), ("digits-infonce", "np-pgd")]
)
def test_samples_are_counted_as_they_are_drawn(name, sampler, monkeypatch):
    """By the difference of 20 images, as some of the work is done once for all."""
    options = {"backbone": "tests.training.test_cost:Counted", "sampler__kind": sampler, "sampler__steps": 3}
    options |= {"train__features": "pixels", "train__samples": 40, "train__validate_every": 16}
    options |= {"outside__count": 500} if name == "digits-binary-at" else {}
    monkeypatch.setattr(generate, "sampling_view", lambda *_: None)  # which tries the network out
    taken = []
    for samples in (20, 40):
        prepared = setup.set_up(recipe(name, **{**options, "train__samples": samples}), Engine("cpu"))
        COUNTS.update(forward=0, backward=0)
        prepared.distance(prepared.model)
        taken.append(tuple(COUNTS.values()))
    told, without = (estimate(recipe(name, **{**options, "train__features": f})) for f in ("pixels", "none"))
    forward, backward = ((more - less) / 20 for less, more in zip(*taken, strict=True))
    assert (told.sampling.forward, told.sampling.backward) == (forward, backward)
    assert backward == 3
    assert (told.drawn, without.drawn) == (2 * 40, 0)  # after each of two steps
    assert told.total[0] - without.total[0] == pytest.approx(80 * told.sampling.times(told.flops))


# FLOP --------------------------------------------------------------------------------------------------------------


def flops(backbone, held):
    return cost.measure_network(Architecture(backbone, 5, 2, 8, (0.5, 0.5), (0.5, 0.5)), recipe("digits-at"), held)


def test_flops_of_a_linear_network():
    """``2 D K`` for each product with the weights; the gradient's penalty needs two of them."""
    once = 2 * (2 * 8 * 8) * 5
    _, found, _ = flops(Flat(), ImagesHeld(1, 2, 1))
    assert found == Passes(forward=once, teacher=once, search=once, loss=once, penalty=2 * once)


def test_flops_of_a_convolution():
    """A multiplication and an addition for each weight and place; no gradient goes to the first layer's input."""
    first = 2 * (3 * 3 * 2 * 6) * (4 * 4)
    rest = 2 * (6 * 4 * 4 * 7) + 2 * (7 * 5)
    count, found, _ = flops(TwoLayers(), ImagesHeld(1, 1, 0))
    assert found == Passes(first + rest, first + rest, first + rest, first + 2 * rest, 0.0)
    assert count == (3 * 3 * 2 * 6 + 6) + (96 * 7 + 7) + (7 * 5 + 5)


def test_flops_of_published_networks():
    """0.56 billion multiplications for a ResNet-18 on 32 x 32 pixels, as everywhere."""
    told = estimate(recipe("cifar10-weat"))
    assert told.parameters == 11_173_962
    assert told.flops.forward == pytest.approx(2 * 0.5557e9, rel=1e-3)


def test_recomputed_activations_cost_a_pass_and_save_memory():
    name = "cifar10-standard-small"
    plain, again = (estimate(recipe(name, train__batch=128, train__recompute=flag)) for flag in (False, True))
    extra = again.flops.loss - plain.flops.loss
    assert 0.8 * plain.flops.forward < extra <= plain.flops.forward
    assert again.flops.search == plain.flops.search
    assert again.memory.step < 0.75 * plain.memory.step


# Memory ------------------------------------------------------------------------------------------------------------


def allocated(short, data: DataSpec) -> int:
    """The most bytes that the allocator had given out during a step, for tensors that the step made."""
    model = design(short, blank_data(data)).build().train()
    model.precision = getattr(torch, short.train.precision)
    generator, count = rng.generator(0), short.train.batch
    x = torch.rand(count, *data.shape, generator=generator)
    batch = Batch(x, torch.arange(count) % 10, x, x, x)
    state, ctx = short.objective.init(x, generator), Context(generator)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        found = short.objective.search(model, batch, state, ctx)
        short.objective.loss(model, batch, found, state, ctx).total.backward()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["digits-binary-at", "cifar10-trades-small"])
def test_memory_is_the_allocators(name, precision):
    """Within a quarter, in both precisions: one with R1, one with two branches in the loss."""
    options = {"objective__curriculum__start": 2} if "binary" in name else {"objective__attack__steps": 1}
    short = recipe(name, train__batch=32, train__precision=precision, **options)
    told = estimate(short)
    assert told.memory.step == pytest.approx(allocated(short, told.outline), rel=0.25)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lars"])
def test_what_is_kept_is_counted_to_the_byte(optimizer):
    short = recipe("digits-at", optimizer=optimizer)
    model = design(short, short.data.load()).build()
    made = short.optimizer.build(model.parameters())
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    made.step()
    state = [v for values in made.state.values() for v in values.values() if isinstance(v, Tensor)]
    bytes_of = lambda tensors: sum(v.numel() * v.element_size() for v in tensors)
    weights = bytes_of(model.state_dict().values())
    assert estimate(short).memory[:3] == (weights, bytes_of(state), weights)
    assert estimate(dataclasses.replace(short, train=dataclasses.replace(short.train, ema=0))).memory.average == 0


# Hours, machines, images ---------------------------------------------------------------------------------------------


def test_hours_grow_with_the_images_and_fall_with_the_rate():
    once, twice = (estimate(recipe("digits-at", train__images=n, train__validate_every=n)) for n in (1600, 3200))
    assert twice.validated == once.validated == 180
    checked = once.validated * once.validation.times(once.flops)
    assert twice.total[0] - checked == pytest.approx(2 * (once.total[0] - checked))
    slow = Machine("slow", {"float32": 1e9, "bfloat16": 4e9}, 0.5)
    assert slow.hours(3600 * 1e9, "float32") == 2.0
    assert slow.hours(3600 * 1e9, "bfloat16") == 0.5
    assert slow._replace(share=0.25).hours(3600 * 1e9, "float32") == 4.0


def test_total_is_made_of_its_parts():
    told = estimate(recipe("digits-rst-awp"))
    assert told.most.teacher == 1  # a forward pass of the extra images
    fields = Passes._fields
    per_image = sum(getattr(told.most, name) * getattr(told.flops, name) for name in fields)
    checked = sum(getattr(told.validation, name) * getattr(told.flops, name) for name in fields)
    assert told.total[1] == pytest.approx(told.images * per_image + told.validated * checked)


def test_published_machines_are_in_proportion():
    assert PUBLISHED["a100"].rates == {"float32": 156e12, "bfloat16": 312e12}
    for found in PUBLISHED.values():
        assert found.rates["bfloat16"] == pytest.approx(2 * found.rates["float32"])
        assert found.memory >= 24e9


def test_machines_by_name():
    assert hardware.find_machine("h200") is PUBLISHED["h200"]
    with pytest.raises(UserError, match=r"no machine 'h20' \(did you mean 'h200'"):
        hardware.find_machine("h20")


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_this_machine_is_timed_on_the_recipes_network(monkeypatch, kind):
    """Forward and backward to a step's images, of which as many are taken as the FLOP allow."""
    seen = []

    def clock(compute, device):
        seen.append(compute()[1])
        if len(seen[-1]) > room[0]:
            raise torch.OutOfMemoryError
        return 0.01 * len(seen[-1])

    monkeypatch.setattr(cost, "seconds", clock)
    for limit, fit, count in ((0.1, 1000, 16), (9.9, 1000, 100), (0.0, 1000, 1), (9.9, 50, 32)):
        room = [fit]
        monkeypatch.setattr(cost, "LEAST_SECONDS", limit)
        stage = estimate(recipe("digits-at", train__precision=kind, train__batch=100))
        found = cost.measure_machine(stage, "cpu")
        each = stage.flops.forward + stage.flops.search
        assert found.rates == {kind: pytest.approx(each / 0.01)}
        assert max(len(x) for x in seen if len(x) <= fit) == count
        assert seen[-1].shape[1:] == (1, 8, 8)
        assert seen[-1].dtype == getattr(torch, kind)
        assert found.hours(each, kind) == pytest.approx(0.01 / 3600)
        seen.clear()
    room = [0]
    with pytest.raises(UserError, match="not even one image"):
        cost.measure_machine(stage, "cpu")


@pytest.mark.parametrize(("has", "kind"), [(True, "bfloat16"), (False, "float32")])
def test_a_dry_run_is_of_the_precision_that_training_would_have(monkeypatch, capsys, has, kind):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: has)
    monkeypatch.setattr(cost, "seconds", lambda compute, device: 1.0)
    assert cli.main(["train", "--recipe", "cifar10-at-small", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"TFLOP/s in {kind}, timed" in out
    assert "images a second" in out


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setattr(hardware, "rates", lambda dtype, device, repeats: {"gemm": 2e12, "conv": 3e12})
    for has, line in ((True, "bfloat16: 2 TFLOP/s in products, 3 in convolutions"), (False, "float32 is used in its")):
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device, has=has: has)
        text = hardware.report("cpu")
        assert line in text
        assert "float32: 2 TFLOP/s" in text
        assert f"{torch.get_num_threads()} thread" in text


def test_sources_say_what_they_are_without_being_read(tmp_path, monkeypatch):
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    assert find_spec(recipe("cifar100-at").data) == DataSpec((3, 32, 32), 100, 48_000, 2_000)
    part = recipe("cifar10-rst-awp-small")
    assert find_spec(part.data) == find_spec(part.extra) == DataSpec((3, 32, 32), 10, 24_000, 2_000)
    data, told = Part(share=0.25).load(), find_spec(Part(share=0.25))
    assert told == DataSpec(data.shape, 10, told.train, len(data.val))
    assert told.train == pytest.approx(len(data.train), abs=5)  # which is rounded class by class
    assert find_spec(Part(share=0.25, rest=True)).train == pytest.approx(1258 - len(data.train), abs=5)
    assert find_spec(Classes(recipe("cifar100-at").data, 20, rest=True)) == DataSpec((3, 32, 32), 80)
    assert find_spec(Unlabelled()).classes == 1
    folder = recipe("celeba-hq256-binary-at", data__path=str(tmp_path / "nothing")).data
    assert find_spec(folder) == DataSpec((3, 256, 256))
    with pytest.raises(UserError, match="there is no data at nowhere"):
        estimate(recipe("digits-at", data={"kind": "npz", "path": "nowhere.npz"}))
    with pytest.raises(UserError, match="size of the images of 'some/set' is not known"):
        estimate(recipe("digits-at", data={"kind": "hf", "path": "some/set"}))


# All of it -----------------------------------------------------------------------------------------------------------

SOME = [
    *("digits-dat", "digits-rst-awp", "digits-infonce", "cifar10-jem-small", "cifar10-acl", "cifar100-oe"),
    *("lsun-church64-binary-at", "imagenet256-standard"),
]  # python -m tests.recipes goes through all


@pytest.mark.parametrize("name", SOME)
def test_recipes_can_be_estimated_without_their_images(name, monkeypatch):
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    whole = resolve(recipes.find(name))
    stages = estimates(whole)
    assert [stage.recipe for stage in stages] == [*whole.before, whole]
    for stage in stages:
        least, most = stage.total
        assert 0 < least <= most < math.inf
        assert (least < most) == (name in ("digits-dat", "lsun-church64-binary-at") and stage.recipe == whole)


@pytest.mark.parametrize("verb", ["train", "run"])
def test_a_dry_run_prints_and_leaves_nothing(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    assert cli.main([verb, "--recipe", "cifar10-dat", "--backbone.depth", "10", "--dry-run", "h200"]) == 0
    out = capsys.readouterr().out
    assert "cifar10-dat-at" in out
    assert "15,000,064 (313 epochs)" in out
    assert "hours: on H200, 25% of 495 TFLOP/s in float32" in out
    assert not list(tmp_path.iterdir())
    assert cli.main([verb, "--recipe", "digits-at", "--dry-run", "h20"]) == 2
    assert "did you mean 'h200'" in capsys.readouterr().err


def test_a_rate_that_nobody_knows_is_said(capsys):
    assert cli.main(["train", "--recipe", "digits-at", "--train.precision", "float64", "--dry-run", "a100"]) == 2
    assert "no rate of float64 is known, only of float32 and bfloat16" in capsys.readouterr().err


def test_a_dry_run_says_what_does_not_fit_and_what_it_assumed(capsys):
    options = ["--train.batch", "4096", "--train.images", "4096", "--dry-run", "rtx4090"]
    assert cli.main(["train", "--recipe", "imagenet256-standard", *options]) == 0
    out = capsys.readouterr().out
    assert "are more than the 24 there are" in out
    assert "the images are not there; 1,000 classes are assumed" in out
