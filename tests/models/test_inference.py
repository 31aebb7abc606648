"""The network as it is searched: folded, lowered, compiled; and what that may not change."""

import dataclasses
import functools
import resource
import subprocess
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from advebm import energies
from advebm.attacks.projected import Attack
from advebm.cli import main
from advebm.core import allocator, config, rng
from advebm.core.errors import Interrupted, UserError
from advebm.data.loader import Origin
from advebm.descent import value_and_gradient
from advebm.metrics.base import Subject
from advebm.metrics.robustness import RobustAccuracy
from advebm.metrics.verdicts import find_verdicts
from advebm.models import precision
from advebm.models.inference import BACKENDS, Backend, View, find_backend, fold, make_view
from advebm.models.modes import searching
from advebm.models.network import Architecture
from advebm.models.resnet import PreActResNet, ResNet
from advebm.models.small import SmallConv
from advebm.models.wide_resnet import WideResNet
from advebm.objectives.at import AT
from advebm.objectives.base import Batch, Context
from advebm.objectives.curriculum import Curriculum
from advebm.objectives.langevin import SGLD
from advebm.samplers.classifier import CS, TA
from advebm.sampling import generate
from advebm.training.loop import train
from tests.helpers import Plain, default, tiny

BACKBONES = {
    "small-conv": SmallConv(width=4),
    "without norm": SmallConv(width=4, norm="none"),
    "with features": SmallConv(width=4, features=16),
    "resnet-8": ResNet(8, width=8),
    "resnet-50": ResNet(50, width=2),
    "group norm": ResNet(8, width=8, norm="group"),
    "preact-resnet": PreActResNet(width=8),
    "wide-resnet": WideResNet(10, 1),
}


@pytest.fixture(autouse=True)
def hardware(monkeypatch):
    """With bfloat16 arithmetic, whatever this machine has; test_precision.py has what should happen without."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)


def network(backbone, seed=0):
    """With running statistics, scales and shifts like those of a trained network."""
    model = Architecture(backbone, 5, 3, 8, (0.4,) * 3, (0.3,) * 3).build(seed)
    disturb(model, seed)
    return model


def disturb(model, seed):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)


def images(n=8, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def gradient(f, x):
    return value_and_gradient(lambda z: energies.marginal(f(z)), x)[1]


# Ways -----------------------------------------------------------------------------------------------------------------


def test_ways_have_names():
    assert list(BACKENDS) == ["off", "fold", "compile", "bf16", "bf16+compile"]
    assert all(way.name == name == find_backend(name).name for name, way in BACKENDS.items())
    assert find_backend("auto") == Backend()
    assert find_backend("auto", "bfloat16") == BACKENDS["bf16"]
    with pytest.raises(UserError, match=r"no fast 'bf61' \(did you mean 'bf16'"):
        find_backend("bf61")


def test_off_may_stand_in_yaml_without_quotes():
    assert tiny(train__fast=False).train.fast == "off"
    with pytest.raises(UserError, match="fast is one of auto, off"):
        tiny(train__fast=True)


# Folding --------------------------------------------------------------------------------------------------------------


def test_a_folded_convolution_by_hand():
    conv, norm = nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, eps=0.01)
    module = nn.Sequential(conv, norm)
    disturb(module, 0)
    module.eval()
    (copied,) = fold(module)[1]
    for _ in range(2):
        scale = norm.weight / (norm.running_var + 0.01) ** 0.5
        expected = (scale[:, None, None, None] * conv.weight, scale * (conv.bias - norm.running_mean) + norm.bias)
        torch.testing.assert_close((copied.layer.weight, copied.layer.bias), tuple(v.detach() for v in expected))
        disturb(module, 1)
        copied.refresh()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folded_network_is_the_same_function(name):
    model, x = network(BACKBONES[name]), images()
    made = make_view(model, x, Backend())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (made is None) == (not norms)
    if made is None:
        return
    left = [m for m in made.body.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = {"wide-resnet": 4, "preact-resnet": 9}.get(name, 0)  # those that follow a sum or open a block
    assert len(left) == expected < len(norms)
    assert set(left) <= set(norms)
    with searching(model) as f:
        assert f is model
        torch.testing.assert_close(made(x), f(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient(made, x), gradient(f, x), rtol=1e-3, atol=1e-5)


def test_a_search_sees_the_weights_as_they_are(generator):
    model, x = network(ResNet(8, width=8)).train(), images()
    made = make_view(model, x, Backend())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()  # running statistics move, too
        optimizer.step()
        with searching(model, view=made) as f:
            assert f is made
            torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-5)
        assert model.training
        assert all(p.requires_grad for p in model.parameters())


def test_only_searches_in_eval_mode_that_are_given_a_view_call_it():
    model = network(SmallConv(width=4))
    made = make_view(model, images(), Backend())
    with searching(model, view=made, training=True) as f:
        assert f is model
    with searching(model, view=made) as f:
        assert f is made
    with searching(model, view=None) as f:
        assert f is model
    with searching(model) as f:
        assert f is model


class Twice(nn.Module):
    """One convolution before two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.conv(self.one(self.conv(x)))).mean((2, 3))


class Seen(nn.Module):
    """A convolution whose output somebody else uses, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        out = self.conv(x)
        return (self.norm(out) + out).mean((2, 3))


class Hooked(nn.Sequential):
    """A convolution whose weight is computed anew in every call."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self[0].register_forward_hook(lambda module, args, out: 2 * out)


def batchwise():
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())


@pytest.mark.parametrize("make", [Twice, Seen, Hooked, batchwise])
def test_norms_that_are_not_the_convolutions_own_stay(make):
    torch.manual_seed(0)
    model, x = make().eval(), images()
    disturb(nn.Sequential(*(m for m in model.modules() if getattr(m, "running_mean", None) is not None)), 0)
    folded, copies = fold(model)
    assert copies == []
    torch.testing.assert_close(folded(x), model(x))
    assert make_view(model, x, Backend()) is None


def test_a_norm_with_branches_is_not_folded():
    model = network(SmallConv(width=4, norm="dual"))
    assert make_view(model, images(), Backend()) is None
    assert make_view(model, images(), BACKENDS["bf16"]).backend == Backend(fold=False, precision="bfloat16")


# Low precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_low_precision_is_the_backbones_alone(name):
    model, x = network(BACKBONES[name]), images()
    made, full = make_view(model, x, BACKENDS["bf16"]), {k: v.clone() for k, v in model.state_dict().items()}
    assert {c.layer.weight.dtype for c in made.copies} == {torch.bfloat16}
    assert len(made.copies) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.backbone.modules())
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with searching(model) as f, torch.no_grad():
        low, high = made(x), f(x)
    assert seen[0] == (torch.float32, torch.float32)
    assert (low - high).norm() < 0.03 * high.norm()
    assert not torch.equal(low, high)
    assert not torch.equal(low, low.bfloat16().float())
    with searching(model) as f:
        pair = [gradient(g, x) for g in (made, f)]
    assert pair[0].dtype == torch.float32
    assert torch.cosine_similarity(*(g.flatten(1) for g in pair)).mean() > 0.94
    assert all(torch.equal(v, full[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_training_in_low_precision_computes_as_an_unfolded_view(name):
    """To the bit: the head in float32, the backbone under autocast."""
    model, x = network(BACKBONES[name]).eval(), images()
    view = View(model, Backend(fold=False))
    view.lower()
    model.precision = torch.bfloat16
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    assert torch.equal(model(x), view(x))
    assert model(x.half()).dtype == model(x.bfloat16()).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)] * 4


@pytest.mark.parametrize("way", ["off", "fold", "bf16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_activations_and_their_gradients_are_channels_last(name, way):
    """But for the gradient that comes from a flattened map."""
    model, x = network(BACKBONES[name]), images()
    f, layouts, gradients = make_view(model, x, BACKENDS[way]) or model.eval(), [], []

    def is_channels_last(t):
        return t.is_contiguous(memory_format=torch.channels_last)

    def note(module, inputs, out):
        layouts.append(is_channels_last(out))
        out.register_hook(lambda g: gradients.append(is_channels_last(g)))

    for m in f.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(note)
    gradient(f, x)
    assert len(layouts) == len(gradients) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert all(layouts)
    assert all(gradients[isinstance(BACKBONES[name], SmallConv) :])  # the first is that of the last layer


def test_a_lowered_view_follows_the_weights():
    model, x = network(ResNet(8, width=8)), images()
    made = make_view(model, x, BACKENDS["bf16"])
    before = made(x)
    disturb(model, 1)
    assert torch.equal(made(x), before)
    with searching(model, view=made) as f:
        again = f(x)
    fresh = make_view(model, x, BACKENDS["bf16"])(x)
    assert torch.equal(again, fresh)
    assert not torch.equal(again, before)


# What does not apply --------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return (self.conv(x) if x.sum() > 0 else -self.conv(x)).mean((2, 3))


def test_what_was_asked_for_and_does_not_apply_is_one_line():
    x = images()
    with pytest.warns(
        RuntimeWarning, match=r"fast fold does not apply: .*control flow.*; searches run with fast off"
    ) as said:
        assert make_view(Branching(), x, BACKENDS["fold"], loud=True) is None
    assert len(said) == 1
    with pytest.warns(RuntimeWarning, match="there is no batch norm after a convolution"):
        assert make_view(network(SmallConv(width=4, norm="none")), x, BACKENDS["fold"], loud=True) is None
    assert make_view(Branching(), x, BACKENDS["bf16"], loud=True).backend == Backend(fold=False, precision="bfloat16")
    assert make_view(Branching(), x, BACKENDS["off"], loud=True) is None
    assert make_view(Branching(), x, BACKENDS["fold"]) is None


def test_hardware_without_bfloat16_folds(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)
    with pytest.warns(RuntimeWarning, match="this cpu does not multiply in bfloat16; searches run with fast fold"):
        made = make_view(network(SmallConv(width=4)), images(), BACKENDS["bf16"], loud=True)
    assert made.backend == Backend()


def test_what_has_no_gradient_to_try_is_only_folded():
    class Steps(nn.Sequential):
        def forward(self, x):
            return (super().forward(x) > 0).float().mean((2, 3))

    model = Steps(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)).eval()
    with pytest.warns(RuntimeWarning, match=r"fast bf16 .* no gradient with respect to the images.* with fast fold"):
        made = make_view(model, images(), BACKENDS["bf16"], loud=True)
    assert made.backend == Backend()


# Compiling ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """The calls of compiled functions, each with its graph: traced by dynamo, run by torch, as compiling takes long."""
    calls = []

    def backend(graph, example):
        def run(*arguments):
            calls.append(graph)
            return graph.forward(*arguments)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield calls
    torch._dynamo.reset()


WHOLE = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch compiles energy and gradient separately"
)


@WHOLE
def test_network_energy_and_gradient_are_one_compiled_function_for_one_shape(graphs):
    model, x = network(ResNet(8, width=8)), images()
    made = make_view(model, x, BACKENDS["compile"], loud=True)
    assert made.backend.name == "compile"
    for change in (1, 2):
        graphs.clear()
        disturb(model, change)
        with searching(model) as f:
            expected = gradient(f, x)
        assert not graphs
        with searching(model, view=made) as f:
            torch.testing.assert_close(gradient(f, x), expected, rtol=1e-3, atol=1e-5)
            (graph,) = graphs
            called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            assert sum("conv2d" in name for name in called) == 9
            assert any("grad" in name for name in called)
            with torch.no_grad():
                f(x)
            gradient(f, x[:3])
            with searching(model) as other:
                gradient(other, x)  # another network's search, within this one
            assert len(graphs) == 1
            gradient(f, x)
            assert len(graphs) == 2
        gradient(made, x)
        assert len(graphs) == 2


def test_chains_and_attacks_are_the_same_compiled(graphs):
    """To the bit, as the same kernels run: with labels, classes and momentum of their own at each call."""
    model, x = network(ResNet(8, width=8)), images()
    eager, made = (make_view(model, x, BACKENDS[way]) for way in ("fold", "compile"))
    searches = (
        lambda view, y: AT(Attack(0.1, steps=2)).search(model, Batch(x, y), None, Context(rng.generator(0), view=view)),
        lambda view, y: CS(steps=2, momentum=0.5, noise=0.1, step_decay=0.5)(
            model, y, x, generator=rng.generator(1), view=view
        ),
        lambda view, y: TA(steps=2, step_size=0.1)(model, y, x, generator=rng.generator(1), view=view),
    )
    for search in searches:
        for labels in (torch.arange(8) % 5, torch.arange(8) % 3):
            expected = search(eager, labels)
            graphs.clear()
            found = search(made, labels)
            assert torch.equal(found, expected)
            assert not torch.equal(found, x)
            assert graphs
            assert len(graphs) % 2 == 0  # the same in each of two steps


def test_an_energy_that_cannot_be_compiled_is_computed_as_it_is(graphs, monkeypatch):
    model, x = network(ResNet(8, width=8)), images()
    made = make_view(model, x, BACKENDS["compile"])

    def fail(energy, x):
        raise torch._dynamo.exc.TorchRuntimeError("no fake implementation\nand much else")

    monkeypatch.setattr(made, "compute", fail)
    with searching(model, view=made) as f:
        with pytest.warns(RuntimeWarning, match="^not compiled: no fake implementation; searches run with fast fold$"):
            first = gradient(f, x)
        assert torch.equal(gradient(f, x), first)
    assert made.backend == Backend()
    with searching(model, view=made) as f:
        assert torch.equal(gradient(f, x), first)


def test_without_a_compiler_it_runs_as_it_is(monkeypatch):
    def compile(function, **options):
        def fail(*arguments):
            raise RuntimeError("no C++ compiler\nand much else")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.warns(RuntimeWarning, match=r"fast bf16\+compile .*: no C\+\+ compiler; searches run with fast bf16$"):
        made = make_view(network(SmallConv(width=4)), images(), BACKENDS["bf16+compile"], loud=True)
    assert made.backend == BACKENDS["bf16"]


# What a fast search may not change ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(small_run):
    return small_run.model()[0], small_run.recipe.data.load()


@pytest.mark.parametrize("way", ["fold", "bf16"])
def test_robust_accuracy_and_attained_loss_agree_with_float32(trained, way):
    """Judged by the float32 network: within one image of 359 and a thousandth of the loss."""
    model, data = trained
    x, y = data.test.float(), data.test.y
    attack, found = Attack(0.9, "l2", steps=20), {}
    for name in ("off", way):
        made = make_view(model, x, BACKENDS[name])
        with searching(model, view=made) as f:
            moved = attack.minimize(attack.negative_loss(f, y), x, rng.generator(0))
        with searching(model) as f, torch.no_grad():
            out = f(moved)
        found[name] = ((out.argmax(1) == y).sum().item(), energies.conditional(out, y).mean().item())
    right, loss = zip(*found.values(), strict=True)
    assert 20 < right[0] < 340, "an attack that breaks some and not all"
    assert abs(right[1] - right[0]) <= 1
    assert loss[1] == pytest.approx(loss[0], rel=1e-3)
    assert found[way] != found["off"] or way == "fold"


@pytest.mark.parametrize("way", ["fold", "bf16"])
def test_samples_have_the_same_statistics(trained, way):
    """Energies within a hundredth of their deviation, pixels within a two-hundredth of a grey level's range."""
    model, data = trained
    y, found = torch.arange(10).repeat_interleave(20), []
    sampler = CS(steps=25, step_size=0.1, noise=0.005)
    for name in ("off", way):
        drawn = generate.generate(model, sampler, data, y, backend=name)
        assert drawn.manifest["fast"] == name
        with searching(model) as f, torch.no_grad():
            energy = energies.joint(f(drawn.x), y)
        found.append((drawn.x, energy))
    (x, energy), (others, their) = found
    assert abs(energy.mean() - their.mean()) < 0.01 * energy.std()
    assert abs(energy.std() - their.std()) < 0.02 * energy.std()
    assert (x.mean(0) - others.mean(0)).abs().max() < 0.005
    assert (x.std(0) - others.std(0)).abs().max() < 0.01
    assert torch.equal(x, others) is False or way == "fold"


def test_langevin_chains_have_the_same_statistics(trained):
    model, data = trained
    chains, found = SGLD(steps=20, step_size=0.05, noise=0.01, buffer=0), []
    for name in ("off", "bf16"):
        made = make_view(model, data.test.float()[:200], BACKENDS[name])
        with searching(model, view=made) as f:
            batch = Batch(data.test.float()[:200], data.test.y[:200])
            _, x = chains(lambda z: energies.marginal(f(z)), batch, None, rng.generator(0))
        with searching(model) as f, torch.no_grad():
            found.append(energies.marginal(f(x)))
    assert abs(found[0].mean() - found[1].mean()) < 0.02 * found[0].std()
    assert abs(found[0].std() - found[1].std()) < 0.03 * found[0].std()


def test_records_say_how_searches_ran(trained):
    model, data = trained
    subject = Subject(model, data, data.val, Attack(0.9, "l2", steps=3))
    for asked, way in (("float32", "fold"), ("bfloat16", "bf16")):
        (record,) = RobustAccuracy(precision=asked)(subject, rng.generator(0))
        assert record.settings["fast"] == way
    found = find_verdicts(Plain(model), data.val.x, data.val.y, Attack(0.9, "l2", steps=3))
    assert found.fast == "fold"
    assert find_verdicts(model, data.val.x, data.val.y, Attack(eps=0.0)).fast == "off"


# Training -------------------------------------------------------------------------------------------------------------


def searched(kind, net, batch, *views):
    """What an objective's second search finds by each view, from the same random numbers; skips if it has none."""
    if kind in ("rst", "noise", "standard", "free", "oe", "infonce"):
        pytest.skip("it has no search of its own")
    objective = default("objective", kind)
    if objective.outputs == 1:
        net[4] = nn.Linear(8 * 36, 1).double()
    batch = batch._replace(origin=Origin.of_whole(batch.x))
    if "curriculum" in {field.name for field in dataclasses.fields(objective)}:
        objective = dataclasses.replace(objective, curriculum=Curriculum(steps=2, start=2))
    if isinstance(getattr(objective, "negatives", None), SGLD):
        objective = type(objective)(negatives=SGLD(steps=2, buffer=8))
    for make in views:
        view = make()
        for _ in range(2):
            state = objective.init(batch.x, rng.generator(0))
            found = objective.search(net, batch, state, Context(rng.generator(1), view=view))
        yield flat(found)


IN_TRAIN_MODE = {"fast", "n-fgsm"}  # which search without a view


@pytest.mark.parametrize("kind", sorted(config.KINDS["objective"]))
def test_every_inner_loop_goes_through_the_view(kind, net, batch):
    """With the same random numbers it finds the same points, but for rounding in float64."""
    calls = []

    def watched():
        quick = make_view(net, batch.x, Backend()).refresh()
        return lambda x: calls.append(1) or quick(x)

    found = searched(kind, net, batch, lambda: None, lambda: SimpleNamespace(refresh=watched, compiled=None))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)
    assert calls or kind in IN_TRAIN_MODE


@pytest.mark.parametrize("kind", sorted(set(config.KINDS["objective"]) - IN_TRAIN_MODE))
def test_every_inner_loop_is_compiled_once_and_as_a_whole(kind, net, batch, graphs):
    """Its points are the same to the bit, and a second search compiles nothing."""
    torch._dynamo.utils.counters.clear()
    views = [functools.partial(make_view, net, batch.x, BACKENDS[way]) for way in ("fold", "compile")]
    expected, found = searched(kind, net, batch, *views)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return  # it compiles energy and gradient separately
    assert not torch._dynamo.utils.counters["graph_break"]
    calls = Counter(map(id, graphs[1:]))  # without the trial that making the view is
    assert len(calls) == 1 + (kind in ("dat", "jeat", "ratio"))  # which search two energies
    assert all(count % 2 == 0 for count in calls.values())


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else []
    return [tensor for part in parts for tensor in flat(part)]


def weights(run):
    return run.model()[0].state_dict()


def test_a_way_that_no_search_takes_is_told(tmp_path):
    """By an objective whose searches are in train mode, or that asks for no view; not where it is the default."""
    own = {"objective__search_mode": "train", "train__images": 1_000}  # the batch's statistics
    with pytest.warns(RuntimeWarning, match=r"train.fast fold is not used: AT does not search in eval mode"):
        run = train(tiny(train__fast="fold", **own), tmp_path / "a", device="cpu")
    assert run.history()[0]["perf/fast"] == "off"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(tiny(**own), tmp_path / "b", device="cpu")


def test_training_says_how_it_searched_and_float32_keeps_every_bit(tmp_path):
    ways = {"auto": "off", "off": "off", "fold": "fold", "bf16": "bf16"}
    runs = {way: train(tiny(train__fast=way, train__images=2_000), tmp_path / way, device="cpu") for way in ways}
    for way, run in runs.items():
        lines = [line for line in run.history() if "train/loss" in line]
        assert {line["perf/fast"] for line in lines} == {ways[way]}
        assert all(p.dtype == torch.float32 for p in weights(run).values() if p.is_floating_point())
    state = {way: weights(run) for way, run in runs.items()}
    assert all(torch.equal(v, state["off"][k]) for k, v in state["auto"].items())
    assert not any(torch.equal(state[way]["head.weight"], state["off"]["head.weight"]) for way in ("fold", "bf16"))
    recipe = tiny(train__precision="bfloat16", train__images=1_000)
    assert train(recipe, tmp_path / "low", device="cpu").history()[0]["perf/fast"] == "bf16"


def test_training_in_low_precision_resumes_to_the_bit(tmp_path, monkeypatch):
    options = {"train__precision": "bfloat16", "train__images": 3_000, "train__checkpoint_every": 1_000}
    whole = train(tiny(**options), tmp_path / "whole", device="cpu")

    def stop(line):
        if line["images"] >= 1_500:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(tiny(**options), tmp_path / "cut", device="cpu", report=stop)
    cut = train(tiny(**options), tmp_path / "cut", resume=True, device="cpu")
    assert all(torch.equal(v, weights(whole)[k]) for k, v in weights(cut).items())


def test_the_command_line_names_the_way(capsys, small_run):
    assert main(["train", "--recipe", "digits-at", "--fast", "bf16", "--print_config"]) == 0
    assert "fast: bf16" in capsys.readouterr().out
    assert main(["train", "--resume", str(small_run.folder), "--fast", "bf16"]) == 2
    assert "a resumed run keeps its own recipe" in capsys.readouterr().err
    assert main(["sample", str(small_run.folder), "--fast", "bf61", "--name", "none"]) == 2
    assert "no fast 'bf61'" in capsys.readouterr().err
    assert "none" not in small_run.samples()


# Memory ---------------------------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, numpy
from advebm.core.allocator import tune_cpu_allocator
tuned = sys.argv[1] == "tuned" and tune_cpu_allocator()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    arrays = [numpy.ones(3 * 2**17) for _ in range(8)]  # of 3 MiB, as activations come and go
    del arrays
print(int(tuned), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_the_tuned_allocator_keeps_its_memory():
    def faults(how):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return map(int, done.stdout.split())

    (_, before), (tuned, after) = faults("default"), faults("tuned")
    if not tuned:
        pytest.skip("another C library")
    pages = 8 * 3 * 2**20 / resource.getpagesize()
    assert before > 10 * pages  # half of what is allocated is fresh
    assert after < 2 * pages


def test_elsewhere_than_on_glibc_nothing_is_tuned(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.tune_cpu_allocator() is False


def test_a_view_is_not_part_of_the_network():
    model = network(SmallConv(width=4))
    names = set(model.state_dict())
    made = make_view(model, images(), BACKENDS["bf16"])
    assert isinstance(made, View)
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training or all(m.training for m in model.modules())
