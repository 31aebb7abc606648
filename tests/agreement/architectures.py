"""Networks beside the public code that they come from: logits of random weights that are saved there and loaded here.

``ARCHITECTURES_SRC`` names a folder of checkouts, each called OWNER+REPOSITORY.  Of each the one file with the network
is imported; what is not there is left out and named.
"""

import contextlib
import importlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advebm.core.errors import Notice
from advebm.models import public_weights
from advebm.models.wide_resnet import WideResNet
from tests.agreement.rows import Row
from tests.references import foreign_networks

ROBUSTBENCH = "RobustBench+robustbench", "robustbench/model_zoo/architectures"
ROBUSTNESS, HAT, DAT = "MadryLab+robustness", "imrahulr+hat", "xuwangyin+DAT"
BASIC, DEEP = [2, 2, 2, 2], [3, 4, 6, 3]
DAT_CONSTANTS = {  # as in its code
    "mean": (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
    "std": (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
}


class Peer(NamedTuple):
    """A network of public code.

    Attributes:
        title: what it is.
        repository: OWNER+REPOSITORY.
        file: the module with its class.
        make: builds it from that module.
        inside: it normalises images itself.
        stated: what its file does not say, for :func:`public_weights.build`.
        size: of the images.
        weights: a file with trained weights in the repository, in place of random ones.
    """

    title: str
    repository: str
    file: str
    make: Callable[[Any], nn.Module]
    inside: bool = False
    stated: dict[str, Any] = {}  # noqa: RUF012
    size: int = 32
    weights: str = ""


class Heads(nn.Module):
    """JEM's network as its training script makes it of the body in its module."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.f, width = body, body.linear.in_features
        self.energy_output, self.class_output = nn.Linear(width, 1), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.class_output(self.f(x))


class Classify(nn.Module):
    """A network whose logits are those of its ``classify``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.classify(x)


def robustbench(title: str, file: str, make: Callable[[Any], nn.Module], **more: Any) -> Peer:
    """A network of RobustBench's."""
    return Peer(f"RobustBench {title}", ROBUSTBENCH[0], f"{ROBUSTBENCH[1]}/{file}.py", make, **more)


def robustness(title: str, kind: str, name: str, **more: Any) -> Peer:
    """A network of the robustness library."""
    return Peer(title, ROBUSTNESS, f"robustness/{kind}_models/resnet.py", lambda m: getattr(m, name)(), **more)


def peers() -> Iterator[Peer]:
    """All networks, each as its code base has it."""
    for classes in (10, 100):
        constants = f"CIFAR{classes}"

        def options(m: Any, classes: int = classes, constants: str = constants) -> dict[str, Any]:
            mean, std = getattr(m, f"{constants}_MEAN"), getattr(m, f"{constants}_STD")
            return {"num_classes": classes, "activation_fn": m.Swish, "mean": mean, "std": std}

        title = f"Gowal2020, Rebuffi2021, Wang2023: WRN-28-10, {classes} classes"
        make = lambda m, options=options: m.DMWideResNet(depth=28, width=10, **options(m))
        yield robustbench(title, "dm_wide_resnet", make, inside=True)
        title = f"Rebuffi2021, Rade2021: PreActResNet-18, {classes} classes"
        make = lambda m, options=options: m.DMPreActResNet(depth=18, **options(m))
        yield robustbench(title, "dm_wide_resnet", make, inside=True)
    yield Peer(
        "Rade2021, its own code: WRN-28-10",
        HAT,
        "core/models/wideresnetwithswish.py",
        lambda m: m.wideresnetwithswish("wrn-28-10-swish"),
        inside=True,
    )
    yield Peer(
        "Rade2021, its own code: PreActResNet-34",
        HAT,
        "core/models/preact_resnetwithswish.py",
        lambda m: m.preact_resnetwithswish("preact-resnet34-swish"),
        inside=True,
    )
    for title, options in (
        ("Rice2020: PreActResNet-18", {"bn_before_fc": True, "out_shortcut": True}),
        ("Wong2020: PreActResNet-18", {}),
    ):
        make = lambda m, options=options: m.PreActResNet(m.PreActBlock, BASIC, **options)
        yield robustbench(title, "resnet", make)
    yield robustbench("Addepalli2022: ResNet-18", "resnet", lambda m: m.ResNet18())
    yield robustbench("Engstrom2019 on CIFAR-10: ResNet-50", "resnet", lambda m: m.ResNet50())
    yield robustbench("WRN-28-10 with sub_block1", "wide_resnet", lambda m: m.WideResNet(28, 10, 10, sub_block1=True))
    yield Peer(
        "Wong2020, its own code: PreActResNet-18",
        "locuslab+fast_adversarial",
        "CIFAR10/preact_resnet.py",
        lambda m: m.PreActResNet18(),
    )
    for depth in (18, 34):
        make = lambda m, depth=depth: getattr(m, f"PreActResNet{depth}")()
        yield Peer(f"pytorch-cifar: PreActResNet-{depth}", "kuangliu+pytorch-cifar", "models/preact_resnet.py", make)
    for depth in (18, 34, 50, 101, 152):
        make = lambda m, depth=depth: getattr(m, f"ResNet{depth}")()
        yield Peer(f"pytorch-cifar: ResNet-{depth}", "kuangliu+pytorch-cifar", "models/resnet.py", make)
    for depth in (20, 32, 44, 56, 110):
        make = lambda m, depth=depth: getattr(m, f"resnet{depth}")()
        yield Peer(f"akamaster: ResNet-{depth}", "akamaster+pytorch_resnet_cifar10", "resnet.py", make)
    for depth, key in ((20, "12fca82f"), (32, "d509ac18"), (44, "014dd654"), (56, "4bfd9763")):
        make = lambda m, depth=depth: getattr(m, f"resnet{depth}")()
        weights = f"pretrained_models/resnet{depth}-{key}.th"
        title = f"akamaster: ResNet-{depth}, its trained weights"
        yield Peer(title, "akamaster+pytorch_resnet_cifar10", "resnet.py", make, weights=weights)
    for depth in (20, 32, 44, 56):
        make = lambda m, depth=depth: getattr(m, f"cifar10_resnet{depth}")()
        yield Peer(
            f"chenyaofo: ResNet-{depth}", "chenyaofo+pytorch-cifar-models", "pytorch_cifar_models/resnet.py", make
        )
    yield robustness("robustness, CIFAR-10: ResNet-50", "cifar", "ResNet50")
    for name in ("resnet18", "resnet50", "wide_resnet50_2", "wide_resnet50_4"):
        yield robustness(f"robustness, ImageNet: {name}", "imagenet", name, size=224)
    file = "rebm/models/wide_resnet_innoutrobustness.py"
    make = lambda m: m.WideResNet34x10(use_batchnorm=False)
    yield Peer("DAT: WRN-34-10, fixed batch norm", DAT, file, make, inside=True, stated=DAT_CONSTANTS)
    swish = {**DAT_CONSTANTS, "backbone": WideResNet(28, 2, activation="silu")}
    make = lambda m: m.WideResNet28x2(activation="swish")
    yield Peer("DAT: WRN-28-2 with swish", DAT, file, make, inside=True, stated=swish)
    file = "InNOutRobustness/utils/models/ebm_wrn.py"
    yield Peer("DAT: JEM's WRN-28-10 without norm", DAT, file, lambda m: Classify(m.EBM(28, 10)))
    make = lambda m: Heads(m.Wide_ResNet(28, 10))
    yield Peer("JEM: WRN-28-10 without norm", "wgrathwohl+JEM", "wideresnet.py", make)
    file = "models/robustness_resnet_cifar10.py"
    yield Peer("AT-EBMs, CIFAR-10: ResNet-50", "xuwangyin+AT-EBMs", file, lambda m: m.resnet50())
    make = lambda m: m.Discriminator(num_classes=1000)
    yield Peer("AT-EBMs, 256 pixels: its discriminator", "xuwangyin+stargan-v2", "core/model.py", make, size=256)


def rows() -> Iterator[Row]:
    """A row a network: the standard deviation of its logits there and here, and their largest difference."""
    source = os.environ.get("ARCHITECTURES_SRC", "")
    if not source:
        print("architectures: left out, as ARCHITECTURES_SRC names no folder of checkouts")
        return
    for peer in peers():
        root = Path(source) / peer.repository
        if not (root / peer.file).is_file():
            print(f"{peer.title}: left out, as there is no {root / peer.file}")
            continue
        yield compare(peer, root)


def compare(peer: Peer, root: Path) -> Row:
    """Draw weights in their network, save its state_dict, load it here, and compare logits, all in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16 if peer.size == 32 else 2, 3, peer.size, peer.size, generator=generator)
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(), imported(root, peer.file) as module:
        torch.manual_seed(0)
        net = peer.make(module)
    saved = net.net if isinstance(net, Classify) else net
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        if peer.weights:
            file = root / peer.weights
            saved.load_state_dict(public_weights.read(file))
        else:
            file = Path(folder) / "net.pt"
            foreign_networks.settle(foreign_networks.randomise(saved, generator), x)
            torch.save({"state_dict": nn.DataParallel(saved).state_dict()}, file)
        model, architecture = public_weights.build(file, **peer.stated)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (architecture.mean, architecture.std))
    x = x[:4].double()
    with torch.no_grad():
        theirs, ours = net.double().eval()(x if peer.inside else (x - mean) / std), model.double()(x)
    difference = (ours - theirs).abs().max().item()
    owner, _, name = peer.repository.partition("+")
    return Row(f"logits, {peer.title}", name or owner, theirs.std().item(), ours.std().item(), difference)


@contextlib.contextmanager
def imported(root: Path, file: str) -> Iterator[ModuleType]:
    """Import one file of a checkout: the packages above it stay empty, what it imports from the checkout is found."""
    before, parts = set(sys.modules), Path(file).with_suffix("").parts
    for count in range(1, len(parts)):
        name = ".".join(parts[:count])
        sys.modules[name] = empty(name, __path__=[str(root.joinpath(*parts[:count]))])
    if find_spec("munch") is None:  # AT-EBMs' module imports it for what is not needed here
        sys.modules["munch"] = empty("munch", Munch=dict)
    sys.path.insert(0, str(root))
    try:
        yield importlib.import_module(".".join(parts))
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in (parts[0], "norms", "munch"):
                del sys.modules[name]


def empty(name: str, **content: Any) -> ModuleType:
    """A module with that content."""
    module = ModuleType(name)
    vars(module).update(content)
    return module
