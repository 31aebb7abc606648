import argparse
import contextlib
import os
import re
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import torch as safetensors
from torch import nn

from advebm.core.errors import Notice, UserError
from advebm.models import network, public_weights
from advebm.models.network import Architecture, Network, Normalize
from advebm.models.resnet import PreActResNet, ResNet
from advebm.models.small import SmallConv
from advebm.models.stargan import StarGAN
from advebm.models.wide_resnet import WideResNet
from tests.references import foreign_networks as theirs

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.25, 0.3)

EIGHT, TWENTY, EIGHTEEN, FIFTY = (1, 1, 1), (3, 3, 3), (2, 2, 2, 2), (3, 4, 6, 3)
TORCHVISION = {"skip": "downsample", "head": "fc", "imagenet": True}
PAIRS = {
    "resnet-8": (lambda **o: theirs.ResNet(EIGHT, 8, **o), ResNet(depth=8, width=8)),
    "resnet-18": (lambda **o: theirs.ResNet(EIGHTEEN, 8, **o), ResNet(width=8)),
    "resnet-18-torchvision": (
        lambda **o: theirs.ResNet(EIGHTEEN, 8, skip="downsample", head="fc", **o),
        ResNet(width=8),
    ),
    "resnet-50": (lambda **o: theirs.ResNet(FIFTY, 4, expansion=4, **o), ResNet(depth=50, width=4)),
    "preact-resnet": (lambda **o: theirs.PreActResNet(EIGHTEEN, 8, **o), PreActResNet(width=8)),
    "preact-layers": (lambda **o: theirs.PreActResNet(EIGHT, 16, closing="bn1", **o), WideResNet(10, 1)),
    "wide-resnet": (lambda **o: theirs.WideResNet(16, 2, **o), WideResNet(16, 2)),
    "wide-resnet-1": (lambda **o: theirs.WideResNet(10, 1, **o), WideResNet(10, 1)),
    "resnet-20": (lambda **o: theirs.ResNet(TWENTY, 4, skip="downsample", head="fc", **o), ResNet(20, 4)),
    "resnet-20-padding": (lambda **o: theirs.ResNet(TWENTY, 4, skip=None, **o), ResNet(20, 4, shortcut="padding")),
    "resnet-34": (lambda **o: theirs.ResNet(FIFTY, 4, **o), ResNet(34, 4)),
    "resnet-18-imagenet": (
        lambda **o: theirs.ResNet(EIGHTEEN, 8, **TORCHVISION, **o),
        ResNet(18, 8, stem="imagenet"),
    ),
    "resnet-50-imagenet": (
        lambda **o: theirs.ResNet(FIFTY, 4, expansion=4, **TORCHVISION, **o),
        ResNet(50, 4, stem="imagenet"),
    ),
    "resnet-50-2-imagenet": (
        lambda **o: theirs.ResNet(FIFTY, 4, expansion=4, widen=2, **TORCHVISION, **o),
        ResNet(50, 4, stem="imagenet", widen=2),
    ),
    "preact-resnet-34": (lambda **o: theirs.PreActResNet(FIFTY, 4, **o), PreActResNet(34, 4)),
    "preact-wong2020": (
        lambda **o: theirs.PreActResNet(EIGHTEEN, 8, closing="", bare=True, **o),
        PreActResNet(width=8, variant="wong2020"),
    ),
    "preact-fast-adversarial": (
        lambda **o: theirs.PreActResNet(EIGHTEEN, 8, bare=True, **o),
        PreActResNet(width=8, variant="fast-adversarial"),
    ),
    "preact-pytorch-cifar": (
        lambda **o: theirs.PreActResNet(EIGHTEEN, 8, closing="", **o),
        PreActResNet(width=8, variant="pytorch-cifar"),
    ),
    "deepmind-preact": (
        lambda **o: theirs.DeepMindPreAct(EIGHTEEN, 8, **o),
        PreActResNet(width=8, activation="silu", variant="deepmind"),
    ),
    "deepmind-wide": (
        lambda **o: theirs.DeepMindWide(16, 2, **o),
        WideResNet(16, 2, activation="silu", variant="deepmind"),
    ),
    "deepmind-wide-1": (
        lambda **o: theirs.DeepMindWide(10, 1, **o),
        WideResNet(10, 1, activation="silu", variant="deepmind"),
    ),
    "jem": (
        lambda **o: theirs.JEM(16, 2, **o),
        WideResNet(16, 2, norm="none", activation="leaky_relu", variant="jem"),
    ),
    "stargan": (lambda **o: theirs.Discriminator(32, 4, 12, **o), StarGAN(widest=12, width=4)),
}
UNUSED = {"jem": "left out 4 entries of energy_output, f.linear, which no output uses"}


def size_of(name):
    return 32 if name == "stargan" or "imagenet" in name else 8


def images_for(name, generator):
    return images(generator, 32 if name == "stargan" else 36 if "imagenet" in name else 12)


def left_out(name):
    return pytest.warns(Notice, match=UNUSED[name]) if name in UNUSED else contextlib.nullcontext()


def foreign_net(name, generator, **options):
    net = theirs.randomise(PAIRS[name][0](**options), generator)
    if name.startswith("preact"):
        theirs.settle(net, torch.rand(16, 3, 16, 16, generator=generator))
    return net


def ours(backbone, *, outputs=10, mean=MEAN, std=STD, channels=3, size=8):
    return Architecture(backbone, outputs, channels, size, mean[:channels], std[:channels]).build(5).eval()


def images(generator, size=12):
    return torch.rand(4, 3, size, size, generator=generator)


def agree(model, net, x):
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-2


def normalised(net, x, mean=MEAN, std=STD):
    return net(Normalize(mean, std)(x))


@pytest.mark.parametrize("name", PAIRS)
def test_logits_are_those_of_the_foreign_network(name, tmp_path, generator):
    net, model = foreign_net(name, generator), ours(PAIRS[name][1], size=size_of(name))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with left_out(name):
        assert public_weights.load(model, tmp_path / "net.pt") == []
    agree(model, lambda x: normalised(net, x), images_for(name, generator))
    counters = {v.item() for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counters == (set() if name in ("jem", "stargan") else {1} if name.startswith("preact") else {7})


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def wrapped(layout):
    """A file of a network that normalises by (0.1, 0.2, 0.3) and (0.4, 0.5, 0.6), as a code base would write it."""
    return lambda net: theirs.Normalised(net, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), layout).state_dict()


NORMALISED = {
    "sequential": wrapped("sequential"),
    "named sequential": lambda net: {"state_dict": wrapped("named")(net)},
    "buffers": lambda net: {k.removeprefix("model."): v for k, v in wrapped("buffers")(net).items()},
    "robustness": lambda net: {"model": with_prefix("module.", wrapped("robustness")(net)), "epoch": 3},
    "flat constants": lambda net: {
        **net.state_dict(),
        "mu": torch.tensor([0.1, 0.2, 0.3]),
        "sigma": wrapped("named")(net)["normalize.std"],
    },
}


@pytest.mark.parametrize("name", ["resnet-18", "wide-resnet"])
@pytest.mark.parametrize("wrapping", NORMALISED)
def test_constants_of_a_normalisation_in_the_file_replace_ours(wrapping, name, tmp_path, generator):
    net, model = foreign_net(name, generator), ours(PAIRS[name][1])
    torch.save(NORMALISED[wrapping](net), tmp_path / "net.pt")
    assert public_weights.load(model, tmp_path / "net.pt") == []
    agree(model, lambda x: normalised(net, x, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), images(generator))
    assert model.normalise.mean.shape == (1, 3, 1, 1)


def test_one_constant_for_all_channels(tmp_path, generator):
    net, model = foreign_net("resnet-8", generator), ours(PAIRS["resnet-8"][1])
    torch.save({**net.state_dict(), "mean": torch.tensor(0.5), "std": torch.tensor([0.25])}, tmp_path / "net.pt")
    public_weights.load(model, tmp_path / "net.pt")
    agree(model, lambda x: net((x - 0.5) / 0.25), images(generator))


WRAPPINGS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 7, "arch": "ResNet18"},
    "data parallel": lambda state: {"net": with_prefix("module.", state), "acc": 0.5, "model": "ResNet18"},
    "compiled": lambda state: {"model_state_dict": with_prefix("_orig_mod.", state), "optimizer": {"lr": 1}},
    "both": lambda state: with_prefix("module._orig_mod.model.", state),
    "averaged model": lambda state: {"model_ema": {"n_averaged": torch.tensor(3), **with_prefix("module.", state)}},
    "average first": lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "ema_state_dict": state},
    "no average": lambda state: {"ema": None, "model": state},
    "nested": lambda state: {"model": {"state_dict": state}},
    "sequential": lambda state: with_prefix("1.", state),
    "old counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(wrapping, tmp_path, generator):
    net, model = foreign_net("resnet-8", generator), ours(PAIRS["resnet-8"][1])
    torch.save(WRAPPINGS[wrapping](net.state_dict()), tmp_path / "net.pth")
    assert public_weights.load(model, tmp_path / "net.pth") == []
    if wrapping == "half":
        net.load_state_dict(net.half().state_dict())
        net.float()
    agree(model, lambda x: normalised(net, x), images(generator))
    assert all(v.dtype == torch.float32 for v in model.parameters())


@pytest.mark.parametrize("name", ["shortcut", "downsample.0"])
def test_other_names_of_a_shortcut(name, tmp_path, generator):
    net, model = foreign_net("preact-resnet", generator), ours(PAIRS["preact-resnet"][1])
    state = {key.replace("shortcut.0", name): value for key, value in net.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    public_weights.load(model, tmp_path / "net.pt")
    agree(model, lambda x: normalised(net, x), images(generator))


@pytest.mark.parametrize("name", ["preact-resnet", "wide-resnet"])
def test_safetensors_and_old_torch_files(name, tmp_path, generator):
    net = foreign_net(name, generator)
    safetensors.save_file(with_prefix("module.", net.state_dict()), tmp_path / "net.safetensors")
    torch.save(net.state_dict(), tmp_path / "net.t7", _use_new_zipfile_serialization=False)
    for file in ("net.safetensors", "net.t7"):
        model = ours(PAIRS[name][1])
        public_weights.load(model, tmp_path / file)
        agree(model, lambda x: normalised(net, x), images(generator))


@pytest.mark.parametrize("options", [{}, {"norm": "group"}, {"norm": "dual", "activation": "silu"}, {"norm": "none"}])
def test_our_own_names(options, tmp_path, generator):
    arch = Architecture(ResNet(8, 8, **options), 10, 3, 8, MEAN, STD)
    net, model = theirs.randomise(arch.build(1), generator), arch.build(2).eval()
    net.normalise.std.fill_(0.5)
    network.save(tmp_path, net, arch)
    torch.save({"model": with_prefix("module.", net.state_dict())}, tmp_path / "net.pt")
    for file in ("model.safetensors", "net.pt"):
        model = arch.build(2).eval()
        assert public_weights.load(model, tmp_path / file) == []
        agree(model, net, images(generator))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_a_module_of_ones_own(prefix, tmp_path, generator):
    """Even if there are constants among its buffers, or prefixes in its names, that mean something elsewhere."""
    make = lambda: theirs.Normalised(theirs.ResNet(EIGHT, 4), (0.1,), (0.5,), "named")
    module = theirs.randomise(make(), generator)
    torch.save(with_prefix(prefix, module.state_dict()), tmp_path / "net.pt")
    model = Network(Normalize((0.0,), (1.0,)), theirs.randomise(make(), generator), nn.Identity()).eval()
    assert public_weights.load(model, tmp_path / "net.pt") == []
    agree(model, module, images(generator))
    assert model.normalise.std.item() == 1
    torch.save(model.state_dict(), tmp_path / "net.pt")
    assert public_weights.load(model, tmp_path / "net.pt") == []


def test_a_normalisation_in_front_of_a_module_of_ones_own(tmp_path, generator):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 5))
    constants = {"mean": torch.tensor([0.1, 0.2, 0.3]), "std": torch.tensor([0.4, 0.5, 0.6])}
    inside = with_prefix("model.", module.state_dict())
    torch.save({"state_dict": inside | with_prefix("normalize.", constants)}, tmp_path / "net.pt")
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 5))
    model = Network(Normalize(MEAN, STD), other, nn.Identity()).eval()
    assert public_weights.load(model, tmp_path / "net.pt") == []
    agree(model, lambda x: normalised(module, x, *(tuple(c.tolist()) for c in constants.values())), images(generator))


def test_a_file_in_a_files_own_names_for_the_small_network(tmp_path, generator):
    arch = Architecture(SmallConv(width=4), 10, 3, 8, MEAN, STD)
    net, model = arch.build(1).eval(), arch.build(2).eval()
    torch.save({"state_dict": with_prefix("module.", net.state_dict())}, tmp_path / "net.pt")
    public_weights.load(model, tmp_path / "net.pt")
    agree(model, net, images(generator, 8))


@pytest.mark.parametrize("name", ["resnet-8", "preact-resnet", "wide-resnet"])
def test_a_head_for_other_classes_stays_fresh(name, tmp_path, generator):
    net, model = foreign_net(name, generator, classes=100), ours(PAIRS[name][1])
    head, x = model.head.weight.clone(), images(generator)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert public_weights.load(model, tmp_path / "net.pt") == ["head.bias", "head.weight"]
    assert torch.equal(model.head.weight, head)
    last = net.fc if name == "wide-resnet" else net.linear
    last.weight, last.bias = model.head.weight, model.head.bias
    agree(model, lambda x: normalised(net, x), x)


def test_blocks_that_no_output_depends_on_are_left_out_and_told(tmp_path, generator):
    net = theirs.randomise(theirs.WideResNet(16, 2, sub_block=True), generator)
    model = ours(WideResNet(16, 2))
    torch.save(with_prefix("module.", net.state_dict()), tmp_path / "net.pt")
    count = sum("sub_block1" in name for name in net.state_dict())
    with pytest.warns(UserWarning, match=f"left out {count} entries of sub_block1, which no output uses"):
        public_weights.load(model, tmp_path / "net.pt")
    agree(model, lambda x: normalised(net, x), images(generator))


def refused(model, path, message):
    """The message of the error, one line; the model is as it was."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        public_weights.load(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


FITS = {
    "deeper": ("wide-resnet", WideResNet(10, 2), "--backbone wide-resnet --backbone.depth 16 --backbone.widen 2"),
    "wider": ("wide-resnet-1", WideResNet(10, 2), "--backbone wide-resnet --backbone.depth 10 --backbone.widen 1"),
    "post for pre": ("resnet-18", PreActResNet(width=8), "--backbone resnet --backbone.depth 18 --backbone.width 8"),
    "pre for post": (
        "preact-resnet",
        ResNet(width=8),
        "--backbone preact-resnet --backbone.depth 18 --backbone.width 8",
    ),
    "bottleneck": ("resnet-50", ResNet(width=4), "--backbone resnet --backbone.depth 50 --backbone.width 4"),
    "three stages": ("resnet-8", ResNet(18, 8), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "no norm": ("resnet-8", ResNet(8, 8, norm="none"), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "group norm": ("resnet-8", ResNet(8, 8, norm="group"), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "dual norm": ("resnet-8", ResNet(8, 8, norm="dual"), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "small": ("resnet-8", SmallConv(width=4), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "projection": (
        "resnet-20-padding",
        ResNet(20, 4),
        "--backbone resnet --backbone.depth 20 --backbone.width 4; --backbone.shortcut padding",
    ),
    "small images": (
        "resnet-50-2-imagenet",
        ResNet(50, 4, widen=2),
        "--backbone resnet --backbone.depth 50 --backbone.width 4 --backbone.widen 2; --backbone.stem imagenet",
    ),
    "shallow": (
        "deepmind-wide",
        WideResNet(10, 2),
        "--backbone wide-resnet --backbone.depth 16 --backbone.widen 2; --backbone.variant deepmind",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_weights_of_another_network_name_the_backbone_that_they_fit(case, tmp_path, generator):
    name, backbone, fix = FITS[case]
    torch.save(foreign_net(name, generator).state_dict(), tmp_path / "net.pt")
    message = refused(ours(backbone), tmp_path / "net.pt", "does not fit the model")
    norm, _, more = fix.partition("; ")
    assert f"likely fix: {norm} --backbone.norm batch{more and ' ' + more} (the model is " in message
    options = dict(re.findall(r"--backbone\.(\w+) ([\w-]+)", message.partition("(the model")[0]))
    wanted = PAIRS[name][1]
    assert options == {k: str(v) for k, v in vars(wanted).items() if k in options}


def test_what_differs_is_listed_with_shapes(tmp_path, generator):
    state = foreign_net("resnet-8", generator).state_dict()
    state["surplus.weight"] = torch.zeros(3)
    del state["layer2.0.bn2.bias"]
    torch.save(state, tmp_path / "net.pt")
    message = refused(ours(ResNet(8, 8)), tmp_path / "net.pt", "has the names of public ResNets")
    assert f"{len(state) - 1} of {len(state)} entries do; " in message
    assert "missing: backbone.stages.1.0.residual.4.bias; unexpected: surplus.weight" in message
    assert "likely fix" not in message
    message = refused(ours(ResNet(8, 4)), tmp_path / "net.pt", "does not fit")
    assert "of another shape: conv1.weight (8, 3, 3, 3), not (4, 3, 3, 3), bn1.weight (8,), not (4,)" in message
    assert re.search(r"not \(4,\), … \(\d+ in all\); likely fix", message)
    refused(ours(ResNet(8, 8), channels=1), tmp_path / "net.pt", r"conv1.weight \(8, 3, 3, 3\), not \(8, 1, 3, 3\)$")


def test_features_of_another_width_are_no_head_for_other_classes(tmp_path, generator):
    state = foreign_net("resnet-8", generator).state_dict()
    state["linear.weight"] = torch.zeros(100, 64)
    torch.save(state, tmp_path / "net.pt")
    refused(ours(ResNet(8, 8)), tmp_path / "net.pt", r"linear.weight \(100, 64\), not \(10, 32\)")


def test_other_functions_with_fitting_names_are_refused(tmp_path, generator):
    """Equal names and shapes are not enough: each of these would load, and compute something else."""

    def file(net):
        torch.save(net.state_dict() if isinstance(net, nn.Module) else net, tmp_path / "net.pt")
        return tmp_path / "net.pt"

    bare = theirs.randomise(theirs.PreActResNet(EIGHTEEN, 8, bare=True), generator)
    theirs.settle(bare, torch.rand(16, 3, 16, 16, generator=generator))
    message = "shortcuts take a block's bare input, the model's its activated one; .*variant fast-adversarial$"
    refused(ours(PreActResNet(width=8)), file(bare), message)
    bare = theirs.randomise(theirs.PreActResNet(EIGHT, 16, closing="bn1", bare=True), generator)
    theirs.settle(bare, torch.rand(16, 3, 16, 16, generator=generator))
    refused(ours(WideResNet(10, 1)), file(bare), "shortcuts take a block's bare input, the model's its activated one$")

    state = foreign_net("preact-resnet", generator).state_dict()
    refused(ours(PreActResNet(width=8, variant="fast-adversarial")), file(state), "activated input.*variant standard$")
    open_end = {name: value for name, value in state.items() if not name.startswith("bn.")}
    message = r"missing: backbone.closing.0.weight.*--backbone.variant wong2020\|pytorch-cifar \(the model is"
    refused(ours(PreActResNet(width=8)), file(open_end), message)
    for names, other in ((open_end, "wong2020"), (foreign_net("preact-wong2020", generator), "pytorch-cifar")):
        refused(ours(PreActResNet(width=8, variant=other)), file(names), "by its running means its shortcuts take")

    net = foreign_net("resnet-8", generator)
    refused(ours(ResNet(8, 8, activation="silu")), file(net), "compute with ReLU, the model with SiLU")
    grouped = {k: v for k, v in net.state_dict().items() if not k.endswith(("running_mean", "running_var", "tracked"))}
    refused(ours(ResNet(8, 8, norm="group")), file(grouped), "no running statistics of batch norm")

    cosine = theirs.randomise(theirs.WideResNet(10, 1, bias=False), generator)
    refused(ours(WideResNet(10, 1)), file(cosine), "no biases in its head: such heads take normalised features")

    for name in ("deepmind-wide", "wide-resnet"):
        other = "standard" if name == "deepmind-wide" else "deepmind"
        wide = WideResNet(16, 2, activation=PAIRS[name][1].activation, variant=other)
        message = f"pad, stride or shorten otherwise than the model; .* {PAIRS[name][1].variant}$"
        refused(ours(wide), file(foreign_net(name, generator)), message)
    late = WideResNet(16, 2, norm="none", activation="leaky_relu")
    refused(ours(late), file(foreign_net("jem", generator)), "pad, stride or shorten otherwise .* jem$")
    relu = replace(PAIRS["deepmind-preact"][1], activation="relu")
    refused(ours(relu), file(foreign_net("deepmind-preact", generator)), "compute with SiLU, the model with ReLU")
    relu = replace(PAIRS["jem"][1], activation="relu")
    refused(ours(relu), file(foreign_net("jem", generator)), "compute with LeakyReLU, the model with ReLU")
    normed = {**foreign_net("jem", generator).state_dict(), "f.layer1.0.bn2.weight": torch.zeros(32)}
    refused(ours(PAIRS["jem"][1]), file(normed), "norms: of such networks only the one without norm is known")


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("bare", [False, True])
def test_running_means_tell_what_a_shortcut_takes(bare, size, generator):
    """Whatever the order of the entries."""
    net = theirs.randomise(theirs.PreActResNet(EIGHTEEN, 8, bare=bare), generator)
    state = theirs.settle(net, torch.rand(16, 3, size, size, generator=generator)).state_dict()
    for names in (list(state), sorted(state), sorted(state, reverse=True)):
        named, _ = public_weights._rename({name: state[name] for name in names}, public_weights.PREACT, {})
        assert public_weights._has_bare_shortcuts(named) is bare
        ends = {name: value for name, value in named.items() if "closing" not in name}
        assert public_weights._has_bare_shortcuts(ends) is bare
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh, _ = public_weights._rename(theirs.PreActResNet(EIGHTEEN, 8).state_dict(), public_weights.PREACT, {})
    assert public_weights._has_bare_shortcuts(fresh) is None, "statistics that nothing has moved tell nothing"


def test_mean_of_an_activation_by_sampling(generator):
    norm = {"n.bias": torch.tensor([-1.0, 0.0, 2.0, 0.5]), "n.weight": torch.tensor([1.0, 2.0, 0.5, -1.5])}
    z = torch.randn(1_000_000, 4, generator=generator, dtype=torch.float64)
    expected = (norm["n.bias"] + norm["n.weight"] * z).relu().mean(0)
    torch.testing.assert_close(public_weights._mean_activation(norm, "n"), expected, rtol=0, atol=0.01)


CONSTANTS = [
    ({"mean": torch.zeros(3)}, "only one of the two constants of a normalisation, normalise.mean"),
    ({"mu": torch.zeros(4), "sigma": torch.ones(4)}, "normalises 4 channels, the model's images have 3"),
    ({"mu": torch.zeros(3), "sigma": torch.tensor([1.0, 0.0, 1.0])}, r"cannot normalise by std \[1.0, 0.0, 1.0\]"),
    ({"mu": torch.full((3,), torch.nan), "sigma": torch.ones(3)}, "cannot normalise by mean"),
    ({"mean": torch.zeros(3), "mu": torch.ones(3), "std": torch.ones(3)}, "unexpected: mu$"),
]


@pytest.mark.parametrize(("constants", "message"), CONSTANTS)
def test_bad_constants_are_refused(constants, message, tmp_path, generator):
    torch.save({**foreign_net("resnet-8", generator).state_dict(), **constants}, tmp_path / "net.pt")
    refused(ours(ResNet(8, 8)), tmp_path / "net.pt", message)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "x": Evil(tmp_path / "evil")}, tmp_path / "evil.pt")
    message = r"evil.pt holds posix.mkdir, which only running code of the file could read; if you trust it"
    refused(ours(ResNet(8, 8)), tmp_path / "evil.pt", message)
    assert not (tmp_path / "evil").exists()
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pt")
    with pytest.raises(UserError, match=r"holds argparse.Namespace, which only"):
        public_weights.read(tmp_path / "args.pt")


def test_files_that_are_no_state_dict(tmp_path, generator):
    state = foreign_net("resnet-8", generator).state_dict()
    whole, model = tmp_path / "net.pt", ours(ResNet(8, 8))
    torch.save(state, whole)
    safetensors.save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for file in ("net.pt", "net.safetensors", "old.pt"):
        (tmp_path / f"short-{file}").write_bytes((tmp_path / file).read_bytes()[:-300])
        refused(model, tmp_path / f"short-{file}", f"short-{file} is damaged")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "empty.pt").write_bytes(b"")
    for file in ("noise.pt", "empty.pt"):
        refused(model, tmp_path / file, f"{file} is damaged")
    refused(model, tmp_path / "nowhere.pt", "no weights at")
    refused(model, tmp_path, "no weights at")
    others = [
        (torch.zeros(3), "holds no state_dict, but a Tensor"),
        ({}, "holds no state_dict, but an empty dict"),
        ({"state_dict": {}}, "holds no state_dict, but an empty dict"),
        ({"epoch": 3, **state}, "holds no state_dict: epoch are no tensors, nor one of ema_state_dict, "),
        ({"encoder.weight": torch.zeros(3)}, "names that are not known: encoder.weight"),
    ]
    for content, message in others:
        torch.save(content, tmp_path / "other.pt")
        refused(model, tmp_path / "other.pt", message)


def test_read_takes_off_what_wraps_a_state_dict(tmp_path, generator):
    net = foreign_net("resnet-8", generator)
    torch.save({"model": with_prefix("module.", wrapped("robustness")(net))}, tmp_path / "net.pt")
    names = set(public_weights.read(tmp_path / "net.pt"))
    constants = {f"{owner}.new_{kind}" for owner in ("normalizer", "attacker.normalize") for kind in ("mean", "std")}
    assert names == {*net.state_dict(), *constants}
    other = wrapped("robustness")(net)
    other["attacker.model.conv1.weight"] = other["model.conv1.weight"] + 1
    torch.save(other, tmp_path / "net.pt")
    assert "attacker.model.conv1.weight" in public_weights.read(tmp_path / "net.pt")


# Networks built from a file ------------------------------------------------------------------------------------------

HALF, NONE = ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
CONSTANTS_OF = {"jem": HALF, "stargan": IMAGENET, **dict.fromkeys([n for n in PAIRS if "deepmind" in n], CIFAR10)}


def built(path, *args, **options):
    """What build returns, and the texts of its notices."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model, architecture = public_weights.build(path, *args, **options)
    assert {w.category for w in seen} <= {Notice}
    assert architecture.mean == pytest.approx(model.normalise.mean.flatten().tolist())
    return model, architecture, [str(w.message) for w in seen]


@pytest.mark.parametrize("name", PAIRS)
def test_a_file_says_its_network(name, tmp_path, generator):
    net = foreign_net(name, generator)
    torch.save({"state_dict": with_prefix("module.", net.state_dict()), "best": 1}, tmp_path / "net.pt")
    model, architecture, told = built(tmp_path / "net.pt")
    assert architecture.backbone == PAIRS[name][1]
    mean, std = CONSTANTS_OF.get(name, NONE)
    assert (architecture.outputs, architecture.mean, architecture.std) == (10, mean, std)
    assert architecture.size == (224 if "imagenet" in name else 32)
    assert any("no normalisation" in text for text in told)
    assert any("does not say its activation; SiLU" in text for text in told) == ("deepmind" in name)
    assert any("no shortcut weights" in text for text in told) == ("padding" in name)
    agree(model, lambda x: normalised(net, x, mean, std), images_for(name, generator))


@pytest.mark.parametrize("name", PAIRS)
def test_a_stated_network_is_checked_by_name(name, tmp_path, generator):
    net, backbone = foreign_net(name, generator), PAIRS[name][1]
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model, architecture, told = built(tmp_path / "net.pt", backbone, MEAN, STD)
    assert (architecture.backbone, architecture.mean, architecture.std) == (backbone, MEAN, STD)
    assert len(told) == (name == "jem")
    agree(model, lambda x: normalised(net, x), images_for(name, generator))
    with pytest.raises(UserError, match="does not fit the model") as error:
        public_weights.build(tmp_path / "net.pt", ResNet(44, 4), MEAN, STD)
    assert "\n" not in str(error.value)
    assert "likely fix" in str(error.value)


@pytest.mark.parametrize("name", PAIRS)
def test_a_file_with_a_part_missing_is_refused_in_a_line(name, tmp_path, generator):
    """Whichever block the file ends after."""
    state = list(foreign_net(name, generator).state_dict().items())
    torch.save(dict(state), tmp_path / "net.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "net.pt").read_bytes()[:-300])
    for count in (1, len(state) // 3, len(state) - 3):
        torch.save(dict(state[:count]), tmp_path / f"{count}.pt")
    for path in tmp_path.glob("[s0-9]*.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)
            with pytest.raises(UserError) as error:
                public_weights.build(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)


def test_swish_where_the_code_base_has_it(tmp_path, generator):
    """No file tells; whoever names the network has to."""
    net = foreign_net("wide-resnet", generator)
    torch.save(net.state_dict(), tmp_path / "wide.pt")
    swish = WideResNet(16, 2, activation="silu")
    model, *_ = built(tmp_path / "wide.pt", swish, MEAN, STD)
    expected = ours(swish)
    expected.load_state_dict(model.state_dict())
    agree(model, expected, images(generator))
    refused(ours(swish), tmp_path / "wide.pt", "compute with ReLU, the model with SiLU")
    with pytest.raises(UserError, match="compute with ReLU or SiLU, the model with LeakyReLU"):
        public_weights.build(tmp_path / "wide.pt", WideResNet(16, 2, activation="leaky_relu"), MEAN, STD)
    net = foreign_net("deepmind-wide", generator, act=torch.relu)
    torch.save(net.state_dict(), tmp_path / "deep.pt")
    model, *_ = built(tmp_path / "deep.pt", WideResNet(16, 2, variant="deepmind"), MEAN, STD)
    agree(model, lambda x: normalised(net, x), images(generator))
    torch.save(foreign_net("resnet-8", generator).state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(UserError, match="compute with ReLU, the model with SiLU"):
        public_weights.build(tmp_path / "resnet.pt", ResNet(8, 8, activation="silu"), MEAN, STD)


def test_constants_that_are_not_in_the_file(tmp_path, generator):
    path, net = tmp_path / "net.pt", foreign_net("deepmind-wide-1", generator, classes=100)
    torch.save(net.state_dict(), path)
    model, architecture, told = built(path)
    assert (architecture.mean, architecture.std) == CIFAR100
    assert "RobustBench it is by mean 0.5071, 0.4865, 0.4409 and deviation 0.2673, 0.2564, 0.2762" in told[0]
    agree(model, lambda x: normalised(net, x, *CIFAR100), images(generator))
    torch.save(foreign_net("deepmind-wide-1", generator, classes=7).state_dict(), path)
    with pytest.raises(UserError, match="not known for 7 classes and 3 channels; give mean and std"):
        public_weights.build(path)
    model, architecture, told = built(path, mean=(0.5,), std=(0.25,))
    assert (architecture.mean, architecture.std) == ((0.5,) * 3, (0.25,) * 3)
    assert len(told) == 1
    for mean, std, message in [
        ((0.5,), None, "mean and std go together"),
        (None, (0.5,), "mean and std go together"),
        ((0.5,) * 3, (0.5,) * 2, "mean and std have one value or 3"),
    ]:
        with pytest.raises(UserError, match=message):
            public_weights.build(path, mean=mean, std=std)
    torch.save({**foreign_net("resnet-8", generator).state_dict(), "mu": torch.zeros(3), "sigma": torch.ones(3)}, path)
    with pytest.raises(UserError, match="holds its own normalisation; leave mean and std out"):
        public_weights.build(path, mean=MEAN, std=STD)
    assert built(path)[1].mean == (0.0,) * 3


@pytest.mark.parametrize(
    ("closing", "names"), [("bn", "standard and fast-adversarial"), ("", "wong2020 and pytorch-cifar")]
)
def test_statistics_that_do_not_tell_a_variant(closing, names, tmp_path, generator):
    """Those of no training: the file is not loaded as what it may not be, unless it is said which one it is."""
    net = theirs.PreActResNet(EIGHTEEN, 8, closing=closing).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(UserError, match=f"fits preact-resnet of variant {names}, and its running stat") as error:
        public_weights.build(tmp_path / "net.pt")
    assert re.search(r"likely fix: say it, as in preact-resnet:variant=\w+@\S+net.pt$", str(error.value))
    backbone = PreActResNet(width=8, variant="pytorch-cifar" if not closing else "standard")
    model, *_ = built(tmp_path / "net.pt", backbone, MEAN, STD)
    agree(model, lambda x: normalised(net, x), images(generator))


def test_other_norms_of_a_variant_are_refused(tmp_path, generator):
    state = foreign_net("preact-pytorch-cifar", generator).state_dict()
    grouped = {k: v for k, v in state.items() if not k.endswith(("running_mean", "running_var", "tracked"))}
    bare = {k: v for k, v in grouped.items() if ".bn" not in k}
    for content in (grouped, bare):
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(UserError, match="no running statistics of batch norm"):
            public_weights.build(tmp_path / "net.pt")


def test_our_own_names_for_a_stated_network(tmp_path, generator):
    arch = Architecture(SmallConv(width=4, activation="silu"), 10, 3, 32, MEAN, STD)
    model = theirs.randomise(arch.build(1), generator)
    model.normalise.load_state_dict({"mean": torch.full((1, 3, 1, 1), 0.5), "std": torch.full((1, 3, 1, 1), 0.25)})
    network.save(tmp_path, model, arch)
    again, architecture, told = built(tmp_path / "model.safetensors", arch.backbone)
    assert (architecture.mean, told) == ((0.5,) * 3, [])
    agree(again, model, images(generator, 32))
    with pytest.raises(UserError, match="says too little of its network"):
        public_weights.build(tmp_path / "model.safetensors")


def test_averaged_weights_inside_data_parallel(tmp_path, generator):
    """As DAT writes them, with the counter of the average under the prefix."""
    net, model = foreign_net("wide-resnet", generator), ours(PAIRS["wide-resnet"][1])
    state = {"module.n_averaged": torch.tensor(3), **with_prefix("module.module.", net.state_dict())}
    torch.save(state, tmp_path / "net.pt")
    public_weights.load(model, tmp_path / "net.pt")
    agree(model, lambda x: normalised(net, x), images(generator))
