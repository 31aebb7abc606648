"""Out-of-distribution images, to be distinguished from the data: noise, or the test split of another source."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from advebm.core.errors import UserError
from advebm.data.sources import Data, Source, to_float


class Outlier(Protocol):
    """A frozen dataclass: a :class:`Noise`, or a source of other images, of which the test split is used."""


class Noise:
    """Images that are drawn at random rather than read."""

    name: ClassVar[str]

    def draw(self, data: Data, count: int, generator: torch.Generator) -> Tensor:
        """Return float32 (count, C, H, W) in [0, 1], of the data's shape, on the generator's device."""
        raise NotImplementedError


@dataclass(frozen=True)
class UniformNoise(Noise):
    """Pixels uniform in [0, 1), each on its own."""

    name = "uniform"

    def draw(self, data: Data, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, *data.shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Normal pixels, each on its own, clamped to [0, 1].

    Attributes:
        mean, std: before clamping, for pixels in [0, 1].
    """

    mean: float = 0.5
    std: float = 0.25

    name = "gaussian"

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UserError(f"std is a deviation > 0, got {self.std}")

    def draw(self, data: Data, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, *data.shape, generator=generator, device=generator.device)
        return (self.mean + self.std * noise).clamp(0, 1)


@dataclass(frozen=True)
class ClassGaussianNoise(Noise):
    """Draws from Gaussians fitted to the training images of each class, the seeds of Santurkar et al. (2019).

    Up to shrinkage and clamping they have the data's mean and covariance, so they are the hardest of the noises.
    Classes are drawn uniformly; for images without labels there is a single Gaussian.
    """

    name = "class-gaussian"
    cites: ClassVar[tuple[str, ...]] = ("santurkar2019",)

    def draw(self, data: Data, count: int, generator: torch.Generator) -> Tensor:
        classes, where = len(data.classes), generator.device
        y = torch.randint(classes, (count,), generator=generator, device=where)
        return data.gaussian_seeds()(torch.empty(count, *data.shape, device=where), y, generator)


def draw_outliers(outlier: Outlier, data: Data, count: int, generator: torch.Generator) -> tuple[str, Tensor]:
    """Return a set's name and at most ``count`` of its images, float32 (M, C, H, W) in [0, 1], of the data's shape.

    For a source these are distinct images of its test split, converted by :func:`fit_shape`; there may be fewer.

    Raises:
        UserError: more than half of the images drawn from a source are in the data.
    """
    if isinstance(outlier, Noise):
        return outlier.name, outlier.draw(data, count, generator)
    other = cast(Source, outlier).load()
    x = choose_images(other.test.x, count, generator)
    if (known := count_shared(x, data)) > len(x) / 2:
        raise UserError(
            f"{known} of {len(x)} images of {other.name} are images of {data.name} itself, which is the "
            "in-distribution data; give another source"
        )
    return other.name, fit_shape(to_float(x), data.shape)


def choose_images(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` distinct images, or all if there are fewer, in random order: files may be sorted by class."""
    return x[torch.randperm(len(x), generator=generator, device=generator.device)[:count].to(x.device)]


def count_shared(x: Tensor, data: Data) -> int:
    """Return how many of the images ``x``, uint8 (N, C, H, W), are in any split of the data, byte for byte."""
    if tuple(x.shape[1:]) != data.shape:
        return 0
    content = lambda image: hashlib.sha256(image.tobytes()).digest()  # not the bytes, which may fill the memory
    given = [content(image) for image in x.numpy()]
    wanted = set(given)
    own = {found for split in data.splits for image in split.x.numpy() if (found := content(image)) in wanted}
    return sum(found in own for found in given)


def fit_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Convert images (N, C, H, W) in [0, 1] to another shape (C, H, W): resize bilinearly, with antialiasing.

    Grey images are repeated over the channels; colour images become grey by averaging over the channels.
    """
    channels, *size = shape
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(x.shape[2:]) != size:
        x = interpolate(x, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    return x.contiguous()
