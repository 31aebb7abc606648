import argparse
import os
import re

import pytest
import torch
from safetensors import torch as safetensors
from torch import nn

from advebm.core.errors import UserError
from advebm.models import network, public_weights
from advebm.models.network import Architecture, Network, Normalize
from advebm.models.resnet import PreActResNet, ResNet
from advebm.models.small import SmallConv
from advebm.models.wide_resnet import WideResNet
from tests.references import foreign_networks as theirs

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.25, 0.3)

EIGHT, EIGHTEEN, FIFTY = (1, 1, 1), (2, 2, 2, 2), (3, 4, 6, 3)
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
}


def foreign_net(name, generator, **options):
    net = theirs.randomise(PAIRS[name][0](**options), generator)
    if name.startswith("preact"):
        theirs.settle(net, torch.rand(16, 3, 16, 16, generator=generator))
    return net


def ours(backbone, *, outputs=10, mean=MEAN, std=STD, channels=3):
    return Architecture(backbone, outputs, channels, 8, mean[:channels], std[:channels]).build(5).eval()


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
    net, model = foreign_net(name, generator), ours(PAIRS[name][1])
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert public_weights.load(model, tmp_path / "net.pt") == []
    agree(model, lambda x: normalised(net, x), images(generator))
    counters = {v.item() for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counters == ({1} if name.startswith("preact") else {7})


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
    "pre for post": ("preact-resnet", ResNet(width=8), "--backbone preact-resnet --backbone.width 8"),
    "bottleneck": ("resnet-50", ResNet(width=4), "--backbone resnet --backbone.depth 50 --backbone.width 4"),
    "three stages": ("resnet-8", ResNet(18, 8), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "no norm": ("resnet-8", ResNet(8, 8, norm="none"), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "group norm": ("resnet-8", ResNet(8, 8, norm="group"), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "dual norm": ("resnet-8", ResNet(8, 8, norm="dual"), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
    "small": ("resnet-8", SmallConv(width=4), "--backbone resnet --backbone.depth 8 --backbone.width 8"),
}


@pytest.mark.parametrize("case", FITS)
def test_weights_of_another_network_name_the_backbone_that_they_fit(case, tmp_path, generator):
    name, backbone, fix = FITS[case]
    torch.save(foreign_net(name, generator).state_dict(), tmp_path / "net.pt")
    message = refused(ours(backbone), tmp_path / "net.pt", "does not fit the model")
    assert f"likely fix: {fix} --backbone.norm batch (the model is " in message
    options = dict(re.findall(r"--backbone\.(depth|width|widen) (\d+)", message.partition("(the model")[0]))
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
    refused(ours(PreActResNet(8)), file(bare), "shortcuts take a block's bare input")

    state = foreign_net("preact-resnet", generator).state_dict()
    open_end = {name: value for name, value in state.items() if not name.startswith("bn.")}
    refused(ours(PreActResNet(8)), file(open_end), "no norm after the last block")

    net = foreign_net("resnet-8", generator)
    refused(ours(ResNet(8, 8, activation="silu")), file(net), "compute with ReLU, the model with SiLU")
    grouped = {k: v for k, v in net.state_dict().items() if not k.endswith(("running_mean", "running_var", "tracked"))}
    refused(ours(ResNet(8, 8, norm="group")), file(grouped), "no running statistics of batch norm")

    cosine = theirs.randomise(theirs.WideResNet(10, 1, bias=False), generator)
    refused(ours(WideResNet(10, 1)), file(cosine), "no biases in its head: such heads take normalised features")

    deepmind = {"init_conv.weight": torch.zeros(16, 3, 3, 3), "layer.0.block.0.conv_0.weight": torch.zeros(1)}
    refused(ours(WideResNet(10, 1)), file(deepmind), "strided convolutions pad one side only")


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("bare", [False, True])
def test_running_means_tell_what_a_shortcut_takes(bare, size, generator):
    """Whatever the order of the entries."""
    net = theirs.randomise(theirs.PreActResNet(EIGHTEEN, 8, bare=bare), generator)
    state = theirs.settle(net, torch.rand(16, 3, size, size, generator=generator)).state_dict()
    for names in (list(state), sorted(state), sorted(state, reverse=True)):
        named, _ = public_weights._rename({name: state[name] for name in names}, public_weights.PREACT)
        assert public_weights._has_bare_shortcuts(named) == bare
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh, _ = public_weights._rename(theirs.PreActResNet(EIGHTEEN, 8).state_dict(), public_weights.PREACT)
    assert not public_weights._has_bare_shortcuts(fresh), "statistics that nothing has moved tell nothing"


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
