"""The Inception network of FID, KID and the Inception score: TensorFlow's of 5 December 2015.

Names and shapes are those of torch-fidelity's conversion, so that its published file loads as it is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advebm.core.errors import UserError

NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAME}"
DIGEST = "6726825d"  # first digits of the sha256
SIZE = 299

Kernel = int | tuple[int, int]
Step = Sequence[tuple[int, Kernel]]  # (output channels, kernel) of each convolution of the same input
Branches = Mapping[str, Sequence[Step]]


class Unit(nn.Module):
    """Convolution, batch norm, ReLU; with stride 1 height and width stay the same unless ``pad`` is False."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, *, pad: bool = True) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        around = (size[0] // 2, size[1] // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, size, stride, around, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H', W')``."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches of convolutions and one of pooling, whose channels are concatenated in this order.

    Args:
        inputs: number of input channels.
        branches: steps of each branch; the outputs of a step with two convolutions are concatenated.
        pooled: output channels of the convolution after the pooling; 0: no convolution.
        pool: ``average`` leaves the padding out of the mean, as TensorFlow does; ``max`` has stride 1; ``halve`` is a
            maximum of stride 2, and the last step of every branch then has stride 2, too.
    """

    def __init__(
        self, inputs: int, branches: Branches, pooled: int = 0, pool: Literal["average", "max", "halve"] = "average"
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains = [self._add_branch(name, inputs, steps) for name, steps in branches.items()]
        self.branch_pool = Unit(inputs, pooled, 1) if pooled else nn.Identity()

    def _add_branch(self, branch: str, inputs: int, steps: Sequence[Step]) -> list[list[str]]:
        """Add a branch's units under the names of the published file; return these names, step by step."""
        chain = []
        for number, step in enumerate(steps, 1):
            name = branch if len(steps) == 1 else f"{branch}_{number}"
            names = [name] if len(step) == 1 else [f"{name}a", f"{name}b"]
            stride = 2 if self.pool == "halve" and number == len(steps) else 1
            for name, (outputs, kernel) in zip(names, step, strict=True):
                self.add_module(name, Unit(inputs, outputs, kernel, stride))
            inputs = sum(outputs for outputs, _ in step)
            chain.append(names)
        return chain

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, C, H', W')``."""
        outputs = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            outputs.append(h)
        match self.pool:
            case "average":
                pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            case "max":
                pooled = F.max_pool2d(x, 3, 1, 1)
            case "halve":
                pooled = F.max_pool2d(x, 3, 2)
        return torch.cat([*outputs, self.branch_pool(pooled)], 1)


def _chain(*steps: tuple[int, Kernel]) -> list[Step]:
    return [[step] for step in steps]


def _mixed5(inputs: int, pooled: int) -> Mixed:
    branches = {
        "branch1x1": _chain((64, 1)),
        "branch5x5": _chain((48, 1), (64, 5)),
        "branch3x3dbl": _chain((64, 1), (96, 3), (96, 3)),
    }
    return Mixed(inputs, branches, pooled)


def _mixed6(width: int) -> Mixed:
    across, down = (1, 7), (7, 1)
    branches = {
        "branch1x1": _chain((192, 1)),
        "branch7x7": _chain((width, 1), (width, across), (192, down)),
        "branch7x7dbl": _chain((width, 1), (width, down), (width, across), (width, down), (192, across)),
    }
    return Mixed(768, branches, 192)


def _mixed7(inputs: int, pool: Literal["average", "max"]) -> Mixed:
    fork = [(384, (1, 3)), (384, (3, 1))]
    branches: Branches = {
        "branch1x1": _chain((320, 1)),
        "branch3x3": [*_chain((384, 1)), fork],
        "branch3x3dbl": [*_chain((448, 1), (384, 3)), fork],
    }
    return Mixed(inputs, branches, 192, pool)


class Inception(nn.Module):
    """Map images (B, 3 or 1, H, W) in [0, 1] to the 2048 features of FID; grey images get three equal channels.

    Szegedy et al. (2016), with the pooling of TensorFlow's graph: means without padding, a maximum in the last block.
    Images are rounded to bytes first: FID is defined on 8-bit images, and unrounded ones give another number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, pad=False)
        self.Mixed_5b = _mixed5(192, 32)
        self.Mixed_5c = _mixed5(256, 64)
        self.Mixed_5d = _mixed5(288, 64)
        halves = {"branch3x3": _chain((384, 3)), "branch3x3dbl": _chain((64, 1), (96, 3), (96, 3))}
        self.Mixed_6a = Mixed(288, halves, pool="halve")
        self.Mixed_6b = _mixed6(128)
        self.Mixed_6c = _mixed6(160)
        self.Mixed_6d = _mixed6(160)
        self.Mixed_6e = _mixed6(192)
        halves = {
            "branch3x3": _chain((192, 1), (320, 3)),
            "branch7x7x3": _chain((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
        }
        self.Mixed_7a = Mixed(768, halves, pool="halve")
        self.Mixed_7b = _mixed7(1280, "average")
        self.Mixed_7c = _mixed7(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UserError(f"Inception takes images (B, 3, H, W) or grey (B, 1, H, W), got {tuple(x.shape)}")
        x = resize((x * 255).round().expand(-1, 3, -1, -1))
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3((x - 128) / 128)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Map features ``(B, 2048)`` to the logits ``(B, 1008)`` of the Inception score, which have no biases."""
        return features @ self.fc.weight.T


def resize(x: Tensor, size: int = SIZE) -> Tensor:
    """Resize ``(B, C, H, W)`` to ``(B, C, size, size)``, bilinearly as in TensorFlow 1.

    Output pixel i lies at ``i · old / size``, with no half-pixel centres.  Each side takes a product with one matrix.
    """
    rows, columns = (_weights(old, size).to(x) for old in x.shape[2:])
    return rows @ x @ columns.T


def _weights(old: int, new: int) -> Tensor:
    """Return the share ``(new, old)`` of each old pixel in each new one; positions are float32, as in the graph."""
    positions = torch.arange(new, dtype=torch.float32) * torch.tensor(old / new, dtype=torch.float32)
    low = positions.long().clamp_max(old - 1)
    share = (positions - low)[:, None]
    identity = torch.eye(old)
    return (1 - share) * identity[low] + share * identity[(low + 1).clamp_max(old - 1)]


def load(path: str | Path | None = None) -> Inception:
    """Load the network with its published weights, frozen and in eval mode.

    The first eight digits of the file's sha256 are compared with the published ones before anything is unpickled, and
    no code in the file is run.

    Args:
        path: the file; None: torch.hub's cache, downloaded from torch-fidelity's release if it is not there.

    Raises:
        UserError: the file is missing, is another one, or cannot be downloaded.
    """
    file = _download() if path is None else Path(path)
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; Inception's weights are {URL}") from None
    if not digest.startswith(DIGEST):
        raise UserError(
            f"{file} is not {NAME}: its sha256 begins with {digest[:8]}, not {DIGEST}; delete it and download {URL}"
        )
    with torch.device("meta"):
        network = Inception()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
    return network.requires_grad_(False).eval()


def _download() -> Path:
    """Return the file in torch.hub's cache, after downloading it if it is not there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / NAME
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), DIGEST, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download {URL} (sha256 {DIGEST}…) to {file}: {' '.join(str(error).split())}; download it "
                "where there is a connection and give --features inception:PATH"
            ) from None
    return file
