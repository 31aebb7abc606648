import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advebm import energies
from advebm.attacks.projected import Attack
from advebm.core import config, rng
from advebm.core.errors import UserError
from advebm.models import network
from advebm.models.inference import Backend, make_view
from advebm.models.modes import DualBatchNorm2d, freeze_batch_norms, searching, using
from advebm.models.network import Architecture
from advebm.models.resnet import PreActResNet, ResNet
from advebm.models.small import SmallConv
from advebm.models.stargan import StarGAN
from advebm.models.wide_resnet import WideResNet
from advebm.objectives.at import AT
from advebm.objectives.awp import AWP
from advebm.objectives.base import Batch, Context, r1
from tests.references import networks

NORMS = ["batch", "group", "dual", "none"]
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "leaky_relu": lambda x: F.leaky_relu(x, 0.2)}

FAMILIES = {
    "resnet-8": (ResNet, {"depth": 8, "width": 8}),
    "resnet-18": (ResNet, {"depth": 18, "width": 8}),
    "resnet-50": (ResNet, {"depth": 50, "width": 8}),
    "preact-resnet": (PreActResNet, {"width": 8}),
    "wide-resnet": (WideResNet, {"depth": 16, "widen": 2}),
    "wide-resnet-1": (WideResNet, {"depth": 10, "widen": 1}),
    "resnet-14-padding": (ResNet, {"depth": 14, "width": 8, "shortcut": "padding"}),
    "resnet-34": (ResNet, {"depth": 34, "width": 8}),
    "resnet-18-imagenet": (ResNet, {"depth": 18, "width": 8, "stem": "imagenet"}),
    "resnet-50-2-imagenet": (ResNet, {"depth": 50, "width": 8, "stem": "imagenet", "widen": 2}),
    "preact-resnet-34": (PreActResNet, {"depth": 34, "width": 8}),
    "preact-wong2020": (PreActResNet, {"width": 8, "variant": "wong2020"}),
    "preact-fast-adversarial": (PreActResNet, {"width": 8, "variant": "fast-adversarial"}),
    "preact-pytorch-cifar": (PreActResNet, {"width": 8, "variant": "pytorch-cifar"}),
    "preact-deepmind": (PreActResNet, {"width": 8, "variant": "deepmind"}),
    "wide-resnet-deepmind": (WideResNet, {"depth": 16, "widen": 2, "variant": "deepmind"}),
    "wide-resnet-jem": (WideResNet, {"depth": 16, "widen": 2, "variant": "jem"}),
}
# blocks a stage, channels a stage returns, the block of the reference
LAYERS = {
    "resnet-8": ((1, 1, 1), (8, 16, 32), networks.basic),
    "resnet-18": ((2, 2, 2, 2), (8, 16, 32, 64), networks.basic),
    "resnet-50": ((3, 4, 6, 3), (32, 64, 128, 256), networks.bottleneck),
    "preact-resnet": ((2, 2, 2, 2), (8, 16, 32, 64), networks.preactivation),
    "wide-resnet": ((2, 2, 2), (32, 64, 128), networks.preactivation),
    "wide-resnet-1": ((1, 1, 1), (16, 32, 64), networks.preactivation),
    "resnet-14-padding": ((2, 2, 2), (8, 16, 32), networks.padded),
    "resnet-34": ((3, 4, 6, 3), (8, 16, 32, 64), networks.basic),
    "resnet-18-imagenet": ((2, 2, 2, 2), (8, 16, 32, 64), networks.basic),
    "resnet-50-2-imagenet": ((3, 4, 6, 3), (32, 64, 128, 256), networks.bottleneck),
    "preact-resnet-34": ((3, 4, 6, 3), (8, 16, 32, 64), networks.preactivation),
    "preact-wong2020": ((2, 2, 2, 2), (8, 16, 32, 64), partial(networks.preactivation, bare=True)),
    "preact-fast-adversarial": ((2, 2, 2, 2), (8, 16, 32, 64), partial(networks.preactivation, bare=True)),
    "preact-pytorch-cifar": ((2, 2, 2, 2), (8, 16, 32, 64), networks.preactivation),
    "preact-deepmind": ((2, 2, 2, 2), (8, 16, 32, 64), partial(networks.preactivation, bare=True, same=True)),
    "wide-resnet-deepmind": ((2, 2, 2), (32, 64, 128), partial(networks.preactivation, same=True)),
    "wide-resnet-jem": ((2, 2, 2), (32, 64, 128), partial(networks.preactivation, bare=True, late=True)),
}
OPEN = ("preact-wong2020", "preact-pytorch-cifar")  # nothing between the last block and the pooling


def least(name):
    """The smallest images that a family takes."""
    return 32 if "imagenet" in name else 8


def architecture(name, size=8, channels=3, **options):
    cls, small = FAMILIES[name]
    size = max(size, least(name))
    return Architecture(cls(**small, **options), 10, channels, size, (0.4,) * channels, (0.25,) * channels)


def build(name, size=8, channels=3, **options):
    return architecture(name, size, channels, **options).build().double()


def shake(model, generator):
    """Weights, biases and statistics that no forward pass could leave as they were."""
    for key, value in model.state_dict().items():
        if key.endswith("running_var") or (key.endswith(".weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim == 1 and value.dtype.is_floating_point:
            value.normal_(0, 0.3, generator=generator)
    return model.eval()


def images(generator, size=8, channels=3, count=4):
    return torch.rand(count, channels, size, size, dtype=torch.float64, generator=generator)


PUBLISHED = [
    (ResNet(depth=8), 78_042),
    (ResNet(), 11_173_962),
    (ResNet(depth=50), 23_520_842),
    (PreActResNet(), 11_172_170),
    (WideResNet(depth=16, widen=1), 175_066),
    (WideResNet(), 36_479_194),
    (WideResNet(depth=34), 46_160_474),
]


@pytest.mark.parametrize(("backbone", "count"), PUBLISHED, ids=lambda v: f"{v}"[:40])
def test_parameters_are_those_published_for_ten_classes(backbone, count):
    with torch.device("meta"):
        model = Architecture(backbone, 10, 3, 32, (0.5,) * 3, (0.5,) * 3).build()
    assert sum(p.numel() for p in model.parameters()) == count == by_hand(backbone)


# parameters that torchvision's pages say for 1000 classes, and the CIFAR networks of He et al. (2016) for 10
PUBLIC = [
    (ResNet(18, stem="imagenet"), 1000, 11_689_512),
    (ResNet(34, stem="imagenet"), 1000, 21_797_672),
    (ResNet(50, stem="imagenet"), 1000, 25_557_032),
    (ResNet(101, stem="imagenet"), 1000, 44_549_160),
    (ResNet(152, stem="imagenet"), 1000, 60_192_808),
    (ResNet(50, stem="imagenet", widen=2), 1000, 68_883_240),
    (ResNet(20, shortcut="padding"), 10, 269_722),
    (ResNet(32, shortcut="padding"), 10, 464_154),
    (ResNet(44, shortcut="padding"), 10, 658_586),
    (ResNet(56, shortcut="padding"), 10, 853_018),
    (ResNet(110, shortcut="padding"), 10, 1_727_962),
    (ResNet(20), 10, 272_474),
]


@pytest.mark.parametrize(("backbone", "outputs", "count"), PUBLIC, ids=lambda v: f"{v}"[:90])
def test_parameters_are_those_of_public_networks(backbone, outputs, count):
    with torch.device("meta"):
        model = Architecture(backbone, outputs, 3, 32, (0.5,) * 3, (0.5,) * 3).build()
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_no_norm_after_a_convolution_is_left_when_folded(name, generator):
    model = shake(architecture(name).build(1), generator)
    x = images(generator, least(name)).float()
    view = make_view(model, x, Backend())
    left = [key for key, m in view.body.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any("residual" in key or "shortcut" in key for key in left)
    openings = 0 if FAMILIES[name][0] is ResNet else sum(LAYERS[name][0]) + (name not in OPEN)
    assert (
        openings - 1 <= len(left) <= openings
    )  # where nothing else uses it, the first opens on the stem's convolution
    torch.testing.assert_close(view(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["deepmind", "jem"])
def test_a_variant_is_another_function_of_the_same_weights(variant, generator):
    """What it changes is not small: a file that is loaded as another variant gives other logits."""
    plain, other = build("wide-resnet"), build("wide-resnet", variant=variant)
    shake(plain, generator)
    other.load_state_dict(plain.state_dict())
    x = images(generator)
    assert (other.eval()(x) - plain(x)).abs().max() > 0.01


def by_hand(backbone):
    """The layer lists of the papers, summed: weights of convolutions, two numbers a channel of a norm, the head.

    ResNet-8 of width 16: stem 432 + 32; blocks 2 · 2304 + 64, 4608 + 9216 + 512 + 3 · 64 and 18432 + 36864 + 2048 +
    3 · 128; head 650: 78,042.  WRN-16-1: stem 432; convolutions 4 · 2304, 4608 + 3 · 9216 + 512 and 18432 + 3 · 36864 +
    2048; norms 2 (4 · 16 + 16 + 3 · 32 + 32 + 3 · 64 + 64) = 928; head 650: 175,066.
    """
    if isinstance(backbone, WideResNet):
        convs, n, k = 2 * (backbone.depth - 4) // 6, 16 * backbone.widen, backbone.widen
        total = 3 * 16 * 9 + 16 * n * 9 + (convs - 1) * n * n * 9 + (16 * n if k > 1 else 0)
        for w in (n, 2 * n):  # to 2 w channels: one convolution widens, the others keep, the shortcut widens
            total += w * 2 * w * 9 + (convs - 1) * (2 * w) ** 2 * 9 + w * 2 * w
        # the first norm of a stage has its inputs, the others its outputs; the closing one has 4 n
        return total + 2 * (16 + n + 2 * n + (convs - 1) * 7 * n + 4 * n) + 4 * n * 10 + 10
    if isinstance(backbone, PreActResNet):
        convs = 3 * 64 * 9 + 4 * 64**2 * 9 + sum(w * 2 * w * 10 + 3 * (2 * w) ** 2 * 9 for w in (64, 128, 256))
        return convs + 2 * (4 * 64 + 64 + 3 * 128 + 128 + 3 * 256 + 256 + 3 * 512 + 512) + 5130
    if backbone.depth == 8:
        return 464 + 4_672 + 14_528 + 57_728 + 650
    stem = 3 * 64 * 9 + 2 * 64
    if backbone.depth == 18:
        first = 4 * (64**2 * 9 + 2 * 64)
        # two blocks to 2 w channels: w · 2w · 9 and three of (2w)² · 9, 1x1 shortcut, five norms
        return stem + first + sum(w * 2 * w * 10 + 3 * (2 * w) ** 2 * 9 + 5 * 2 * 2 * w for w in (64, 128, 256)) + 5130
    total = stem
    for inputs, w, blocks in ((64, 64, 3), (256, 128, 4), (512, 256, 6), (1024, 512, 3)):
        total += inputs * w + w * w * 9 + w * 4 * w + inputs * 4 * w + 2 * (w + w + 4 * w + 4 * w)
        total += (blocks - 1) * (4 * w * w + w * w * 9 + w * 4 * w + 2 * (w + w + 4 * w))
    return total + 2048 * 10 + 10


@pytest.mark.parametrize(("norm", "activation"), [("batch", "relu"), ("group", "silu"), ("none", "leaky_relu")])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_an_independent_derivation(name, norm, activation, generator):
    model = shake(build(name, norm=norm, activation=activation), generator)
    counts, _, block = LAYERS[name]
    for size in (8, 16) if "deepmind" in name else (8, 13):
        x, imagenet = images(generator, size), "imagenet" in name
        expected = networks.logits(
            model.state_dict(), x, counts, block, ACTIVATIONS[activation], name not in OPEN, imagenet
        )
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        assert expected.std() > 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_parameter(name, norm, activation, generator):
    model = build(name, norm=norm, activation=activation, channels=1)
    model(images(generator, channels=1)).logsumexp(1).sum().backward()
    for key, p in model.named_parameters():
        if "branches.adversarial" in key:
            assert p.grad is None
        else:
            assert p.grad.abs().max() > 0, key


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_images_do_not_see_each_other_in_eval_mode(name, norm, generator):
    model = shake(build(name, norm=norm), generator)
    x = images(generator)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [8, 16, 28, 32])
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_halve_the_size_and_end_in_the_features(name, size, generator):
    model, x = shake(build(name, size), generator), images(generator, size, count=2)
    maps, widths = model.feature_maps(x), LAYERS[name][1]
    first = math.ceil(size / 4) if "imagenet" in name else size
    sizes = [first]
    for _ in widths[1:]:
        sizes.append(sizes[-1] // 2 if name == "preact-deepmind" else math.ceil(sizes[-1] / 2))
    assert [m.shape for m in maps] == [(2, c, s, s) for c, s in zip(widths, sizes, strict=True)]
    assert model.features(x).shape == (2, widths[-1])
    torch.testing.assert_close(model.backbone.closing(maps[-1]).mean((2, 3)), model.features(x))


def test_the_small_network_has_no_stages(generator):
    model = Architecture(SmallConv(width=4), 10, 3, 8, (0.5,) * 3, (0.5,) * 3).build()
    with pytest.raises(UserError, match="no stages; resnet, preact-resnet and wide-resnet have"):
        model.feature_maps(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_adversarial_branch_is_a_network_of_its_own(name, generator):
    """With the statistics of a plain batch norm in one branch, that branch is the plain network."""
    plain, dual = shake(build(name), generator), shake(build(name, norm="dual"), generator)
    ours = [m for m in dual.modules() if isinstance(m, DualBatchNorm2d)]
    theirs = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    for mine, norm in zip(ours, theirs, strict=True):
        mine.branches["adversarial"].load_state_dict(norm.state_dict())
    dual.head.load_state_dict(plain.head.state_dict())
    x = images(generator)
    with using(dual, "adversarial"):
        torch.testing.assert_close(dual(x), plain(x), rtol=1e-10, atol=1e-10)
    assert (dual(x) - plain(x)).abs().max() > 0.01


def test_the_small_network_has_branches_too(generator):
    model = Architecture(SmallConv(width=4, norm="dual"), 10, 3, 8, (0.5,) * 3, (0.5,) * 3).build().double()
    shake(model, generator)
    clean = model(x := images(generator))
    with using(model, "adversarial"):
        assert (model(x) - clean).abs().max() > 0.01


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_load(name, norm, tmp_path, generator):
    arch = architecture(name, norm=norm)
    model, x = shake(arch.build(1), generator), images(generator).float()
    network.save(tmp_path, model, arch)
    again, read = network.load(tmp_path)
    assert read == arch
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_options_can_be_said_as_text():
    assert config.build({"kind": "resnet", "depth": "50", "width": "none"}, "backbone") == ResNet(50)
    assert config.build({"kind": "wide-resnet", "depth": "34", "widen": "2"}, "backbone") == WideResNet(34, 2)


def test_a_wide_network_counts_its_depth_itself():
    """No depth of a ResNet is one of WRN, and none of WRN is one of a ResNet."""
    small = {"kind": "resnet", "depth": 8, "width": 24, "norm": "none"}
    assert config.build(config.switch(small, "backbone", "wide-resnet"), "backbone") == WideResNet(norm="none")
    assert config.switch({"kind": "wide-resnet", "depth": 16}, "backbone", "resnet") == {"kind": "resnet"}
    assert config.switch(small, "backbone", "preact-resnet") == {"kind": "preact-resnet", "width": 24, "norm": "none"}
    wide = {"kind": "resnet", "depth": 50, "widen": 2}
    assert config.switch(wide, "backbone", "wide-resnet") == {"kind": "wide-resnet"}
    jem = {"kind": "wide-resnet", "variant": "jem", "norm": "none"}
    assert config.switch(jem, "backbone", "preact-resnet") == {"kind": "preact-resnet", "norm": "none"}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_begin_as_documented(name, norm):
    """Convolutions N(0, 2 / (k² outputs)), with biases (of 0) only if there is no norm; norms 1 and 0."""
    model = build(name, norm=norm)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        n, fan = conv.weight.numel(), conv.out_channels * conv.kernel_size[0] ** 2
        scaled = conv.weight.square().mean() * fan / 2  # mean of n squares of N(0, 1): 1 ± √(2 / n)
        assert abs(scaled - 1) < 5 * math.sqrt(2 / n)
        assert (conv.bias is not None) == (norm == "none")
        assert conv.bias is None or not conv.bias.any()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            assert (m.weight == 1).all()
            assert not m.bias.any()
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.backbone.parameters() if p.ndim == 4)


BAD = [
    (lambda: WideResNet(depth=27), r"depth is 6n \+ 4, so one of 10, 16, 22, 28, 34, ..., got 27"),
    (lambda: WideResNet(depth=4), "depth is 6n .* got 4"),
    (lambda: WideResNet(widen=0), "widen must be at least 1, got 0"),
    (lambda: ResNet(depth=9), "depth is one of 8, 14, 18, 20, 32, 34, 44, 50, 56, 101, 110, 152, got 9"),
    (lambda: ResNet(depth=18, widen=2), "widen is for bottlenecks, which depth 18 has none of; width makes it wider"),
    (lambda: ResNet(depth=50, widen=0), "widen must be at least 1, got 0"),
    (lambda: ResNet(stem="image"), "stem is one of cifar, imagenet, got 'image'"),
    (lambda: ResNet(stem="imagenet").build(3, 31), "resnet takes images of at least 32 pixels, got 31"),
    (lambda: PreActResNet(depth=50), "depth is 18 or 34, got 50"),
    (lambda: PreActResNet(variant="jem"), "variant is one of standard, wong2020, fast-adversarial, pytorch-cifar, dee"),
    (lambda: WideResNet(variant="deepmind").build(3, 30), "deepmind takes images of 8, 12, 16, … pixels, got 30"),
    (lambda: ResNet(width=0), "width must be at least 1, got 0"),
    (lambda: PreActResNet(width=0), "width must be at least 1, got 0"),
    (lambda: ResNet(norm="layer"), "norm is one of batch, group, dual, none, got 'layer'"),
    (lambda: WideResNet(activation="gelu"), "activation is one of silu, relu, leaky_relu, got 'gelu'"),
    (lambda: PreActResNet(norm="batsh"), "did you mean 'batch'"),
    (lambda: ResNet().build(3, 7), "resnet takes images of at least 8 pixels, got 7"),
    (lambda: PreActResNet().build(3, 4), "preact-resnet takes images of at least 8 pixels, got 4"),
    (lambda: WideResNet().build(3, 4), "wide-resnet takes images of at least 8 pixels, got 4"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[-24:] for _, message in BAD])
def test_bad_backbones_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# Activations computed again ------------------------------------------------------------------------------------------


def losses(model, x, y, kind):
    """Losses as objectives take them, whose weights, modes or branches are others once the gradient is computed."""
    match kind:
        case "two forwards":
            moving = F.cross_entropy(model(x.flip(0)), y)
            with freeze_batch_norms(model):
                return moving + F.cross_entropy(model(x), y)
        case "branches":
            with using(model, "adversarial"):
                attacked = F.cross_entropy(model(x), y)
            return attacked + 2 * F.cross_entropy(model(x.flip(0)), y)
        case "r1":
            return r1(lambda z: energies.marginal(model(z)), x)
        case "awp":
            objective, batch, ctx = AWP(AT(Attack(eps=0.1, steps=2)), 0.1), Batch(x, y), Context(rng.generator(0))
            return objective.loss(model, batch, objective.search(model, batch, None, ctx), None, ctx).total


@pytest.mark.parametrize("kind", ["two forwards", "branches", "r1", "awp"])
@pytest.mark.parametrize("name", ["resnet-8", "preact-resnet"])
def test_activations_computed_again_change_no_gradient_and_no_statistic(name, kind):
    generator = torch.Generator().manual_seed(0)
    plain = shake(build(name, norm="dual" if kind == "branches" else "batch"), generator).train()
    again = copy.deepcopy(plain)
    again.backbone.recompute = True
    x, y = images(generator), torch.arange(4)
    for model in (plain, again):
        losses(model, x, y, kind).backward()
    for (key, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-12, msg=key)
    for (key, a), b in zip(plain.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg=key)
    assert all(m.training for m in again.modules())
    assert all(m.branch == "clean" for m in again.modules() if isinstance(m, DualBatchNorm2d))


def kept(model, x):
    """Bytes that a loss keeps for its gradient."""
    seen = {}
    keep = lambda t: seen.setdefault((t.data_ptr(), t.numel()), t.nbytes) and t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x).sum()
    return sum(seen.values()) - sum(p.nbytes for p in model.parameters())


def test_activations_computed_again_are_not_kept():
    model = build("resnet-18").train()
    x = images(torch.Generator().manual_seed(0), count=32)
    before = kept(model, x)
    model.backbone.recompute = True
    assert kept(model, x) < before / 3
    with searching(model) as f:  # gradients of images alone: nothing is computed twice
        calls = []
        hooks = [
            block.register_forward_pre_hook(lambda *_: calls.append(1)) for s in model.backbone.stages for block in s
        ]
        leaf = x.requires_grad_()
        f(leaf).sum().backward()
        for hook in hooks:
            hook.remove()
    assert len(calls) == 8


class TestStarGAN:
    def test_has_the_published_number_of_parameters(self):
        """The authors' training prints 20,852,290 for the discriminator of 2 domains at 256 pixels."""
        with torch.device("meta"):
            module, width = StarGAN().build(3, 256)
            head = nn.Linear(width, 2)
        assert sum(p.numel() for m in (module, head) for p in m.parameters()) == 20_852_290
        channels = [stage.residual[-1].out_channels for stage in module.stages]
        assert (module.stem.out_channels, channels, width) == (64, [128, 256, 512, 512, 512, 512], 512)
        with torch.device("meta"):
            small, _ = StarGAN().build(3, 64)
        assert (small.stem.out_channels, len(small.stages)) == (256, 4)

    def test_agrees_with_functional_torch(self, generator):
        module, width = StarGAN(width=4, widest=8).build(3, 16)
        x = torch.rand(2, 3, 16, 16, generator=generator)
        w = {name: p.detach() for name, p in module.named_parameters()}
        act, pool = lambda z: torch.where(z > 0, z, 0.2 * z), lambda z: F.avg_pool2d(z, 2)
        conv = lambda z, name, padding=1: F.conv2d(z, w[f"{name}.weight"], w.get(f"{name}.bias"), padding=padding)
        z = conv(x, "stem")
        for i, wider in enumerate((True, False)):
            short = conv(z, f"stages.{i}.shortcut", 0) if wider else z
            assert wider or f"stages.{i}.shortcut.weight" not in w
            long = conv(act(pool(conv(act(z), f"stages.{i}.residual.1"))), f"stages.{i}.residual.4")
            z = (pool(short) + long) / math.sqrt(2)
        out = act(conv(act(z), "closing.1", 0)).flatten(1)
        torch.testing.assert_close(module(x), out, rtol=1e-4, atol=1e-5)
        assert out.shape == (2, width)
        assert not any("shortcut.bias" in name for name in w)

    def test_begins_by_fan_in(self):
        module, _ = StarGAN(width=64, widest=128).build(3, 8)
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                assert (p == 0).all()
            elif p[0].numel() > 500:
                assert p.std().item() == pytest.approx(math.sqrt(2 / p[0].numel()), rel=0.05)

    @pytest.mark.parametrize("size", [4, 48, 2048])
    def test_other_sizes_are_refused(self, size):
        with pytest.raises(UserError, match=r"8, 16, …, 1024 pixels"):
            StarGAN().build(3, size)

    def test_a_step_of_binary_at_with_r1(self, generator):
        from advebm.objectives.base import Batch, Context
        from advebm.objectives.binary import BinaryAT
        from advebm.objectives.curriculum import Curriculum

        model = Architecture(StarGAN(width=8, widest=16), 1, 3, 32, (0.5,) * 3, (0.5,) * 3).build()
        objective = BinaryAT(Curriculum(steps=2, start=2), step_size=0.5, r1=30.0)
        x, outside = torch.rand(2, 2, 3, 32, 32, generator=generator)
        ctx = Context(generator=generator, images=0)
        state = objective.init(x, generator)
        found = objective.search(model, Batch(x, None, outside=outside), state, ctx)
        objective.loss(model, Batch(x, None, outside=outside), found, state, ctx).total.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
