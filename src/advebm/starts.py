"""Starting points of a search: a Start maps images, labels and a generator to images."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from advebm.core.errors import UserError
from advebm.core.rng import rand, randn
from advebm.descent import lengths, per_sample


class Start(Protocol):
    """``x`` gives the shape, the device and, for some starts, the content; ``y`` gives the classes."""

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return ``(B, C, H, W)`` for ``x (B, C, H, W)``."""


def clean(x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Return the images themselves."""
    return x


def noise(x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Return uniform noise in [0, 1)."""
    return rand(x, generator)


def random_direction(x: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """Draw random directions of norm 1, shaped like ``x``."""
    noise = 2 * rand(x, generator) - 1 if norm == "linf" else randn(x, generator)
    return noise / per_sample(lengths(noise, norm).clamp_min(1e-12), x)


@dataclass(frozen=True)
class UniformBall:
    """A point drawn uniformly from the eps-ball around each image (by volume, also in l2)."""

    eps: float
    norm: Literal["linf", "l2"]

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if self.norm == "linf":
            return x + self.eps * (2 * rand(x, generator) - 1)
        direction = randn(x, generator)
        direction = direction / per_sample(direction.flatten(1).norm(dim=1), x)
        length = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
        return x + self.eps * per_sample(length, x) * direction


@dataclass(frozen=True)
class Gaussian:
    """Each image plus white noise of standard deviation ``spread`` (TRADES uses 0.001)."""

    spread: float

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return x + self.spread * randn(x, generator)


@dataclass(frozen=True)
class ClassGaussians:
    """Seeds drawn from ``N(μ_y, Σ_y)`` and clamped to [0, 1], Santurkar et al. (2019); JEAT section 2.2.

    With one class it is the global Gaussian of "uncond" sampling.  A class of n images gives a covariance of rank
    n - 1 < D, so its factor is the n images themselves rather than a D x D matrix: a draw is
    ``μ + √(1-s) · (X - μ)ᵀ ε / √(n-1) + √s · σ · ε'`` with the images in the rows of X, which has exactly the
    covariance ``(1-s) Σ + s σ² I``, where σ² is the mean variance of a pixel.  This needs no factorisation, and no
    memory beyond the images, which may stay uint8; a class is converted to floating point while it is drawn from.

    Attributes:
        x: images (N, C, H, W): uint8, or floating point in [0, 1].
        members: indices of each class's images in ``x``.
        means: (K, D).
        variances: σ² of each class, (K,).
        shrinkage: s in [0, 1], the share of the white part.
    """

    x: Tensor = field(repr=False)
    members: tuple[Tensor, ...] = field(repr=False)
    means: Tensor = field(repr=False)
    variances: Tensor
    shrinkage: float

    @classmethod
    def fit(cls, x: Tensor, y: Tensor | None = None, *, classes: int = 1, shrinkage: float = 0.01) -> "ClassGaussians":
        """Fit one Gaussian per class, or a single one if ``y`` is None.

        Use the training split: if the test split is included, as in CEM, the seeds leak the images of later
        measurements.
        """
        if not 0 <= shrinkage <= 1:
            raise UserError(f"shrinkage must lie in [0, 1], got {shrinkage}")
        members = (
            tuple((y == k).nonzero().squeeze(1) for k in range(classes)) if y is not None else (torch.arange(len(x)),)
        )
        means, variances = [], []
        for k, index in enumerate(members):
            if len(index) < 2:
                raise UserError(f"class {k} has {len(index)} images to fit on; a Gaussian needs 2")
            variance, mean = _var_mean(x, index)
            if not variance.any():
                raise UserError(
                    f"the {len(index)} images of class {k} are all the same; a Gaussian needs them to differ"
                )
            means.append(mean)
            variances.append(variance.mean())
        return cls(x, members, torch.stack(means), torch.stack(variances), shrinkage)

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Draw seeds for classes ``y (B,)``, on the device of ``x``; for a single Gaussian ``y`` may be None."""
        y = _check_classes(y, len(x), len(self.members))
        white = randn(x.flatten(1), generator)
        seeds = torch.empty_like(white)
        for k in y.unique().tolist():
            rows, mean = (y == k).to(x.device), self.means[k].to(x)
            index = self.members[k]
            draw = torch.randn(int(rows.sum()), len(index), generator=generator, device=x.device, dtype=x.dtype)
            pieces = zip(_pieces(self.x, index), _pieces(self.x, index, draw.T), strict=True)
            total = sum(weights.T @ _rows(self.x, piece).to(x) for piece, weights in pieces)
            coloured = (total - draw.sum(1, keepdim=True) * mean) / (len(index) - 1) ** 0.5
            isotropic = self.variances[k].to(x).sqrt() * white[rows]
            seeds[rows] = mean + (1 - self.shrinkage) ** 0.5 * coloured + self.shrinkage**0.5 * isotropic
        return seeds.view(len(x), *self.x.shape[1:]).clamp(0, 1)


@dataclass(frozen=True)
class Enlarged:
    """Seeds of another start in a low resolution, enlarged to the size of the images.

    Attributes:
        start: the start.
        shape: (C, h, w) of its images.
    """

    start: Start
    shape: tuple[int, ...]

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        return _resize(self.start(x.new_empty(len(x), *self.shape), y, generator), x.shape[1:]).clamp(0, 1)


def shrink(x: Tensor, edge: int) -> Tensor:
    """Return images ``x (N, C, H, W)`` averaged down so that their longer edge has ``edge`` pixels, of the same type.

    Smaller images are returned as they are.
    """
    longest = max(x.shape[2:])
    if longest <= edge:
        return x
    height, width = (max(1, round(length * edge / longest)) for length in x.shape[2:])
    small = torch.empty(len(x), x.shape[1], height, width, dtype=x.dtype)
    for piece in _pieces(x, torch.arange(len(x))):
        pooled = adaptive_avg_pool2d(_rows(x, piece).view(len(piece), *x.shape[1:]), (height, width))
        small[piece] = pooled if x.dtype.is_floating_point else (pooled * 255).round().to(x.dtype)
    return small


PIECE = 2**30  # bytes of the images of a class that are held in floating point at once
COVARIANCE_BYTES = 500_000  # of the covariances of all classes in compact Gaussians, at most
SPECTRUM_EDGE, MEAN_EDGE = 32, 64  # frequencies along an edge, and pixels of a mean's edge, at most


@dataclass(frozen=True)
class CompactGaussians:
    """Class Gaussians in a few hundred kB, which a published model brings along in the place of its training images.

    Images are described by frequencies: the orthonormal discrete cosine transform of rows, columns and channels.  A
    class keeps its mean, the covariance of the frequencies that vary most, and the variances of the others.  Seeds are
    otherwise those of :class:`ClassGaussians`.

    Attributes:
        means: mean image of each class, uint8 (K, C, h, w).
        frequencies: the m frequencies with covariances, the same for all classes, as indices into (C, H, W).
        roots: lower triangles, row by row, of roots L of the covariances L Lᵀ, int8 (K, m (m + 1) / 2).
        scales: the unit of each row of a root, (K, m), in pixels of [0, 1].
        spectra: mean variance of the other frequencies in each part of (C, H, W), float16 (K, C, h, w).
        powers: the unit of each spectrum, (K,).
        shares: share of each class in the training images, (K,).
        shape: (C, H, W) of an image, as a tensor.
    """

    means: Tensor = field(repr=False)
    frequencies: Tensor = field(repr=False)
    roots: Tensor = field(repr=False)
    scales: Tensor = field(repr=False)
    spectra: Tensor = field(repr=False)
    powers: Tensor = field(repr=False)
    shares: Tensor
    shape: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor | None = None, *, classes: int = 1) -> "CompactGaussians":
        """Fit one Gaussian per class to images ``x (N, C, H, W)``, or a single one if ``y`` is None.

        Raises:
            UserError: a class has fewer than 2 images, or only equal ones.
        """
        exact, shape = ClassGaussians.fit(x, y, classes=classes), tuple(x.shape[1:])
        counts = [len(index) for index in exact.members]

        def coefficients(k: int) -> Iterator[Tensor]:
            """Yield the frequencies of a class's images, less their mean, as rows whose products sum to covariances."""
            for piece in _pieces(x, exact.members[k]):
                away = (_rows(x, piece) - exact.means[k]).view(-1, *shape)
                yield cosines(away).flatten(1) / (counts[k] - 1) ** 0.5

        variances = torch.zeros(math.prod(shape))
        for z in itertools.chain.from_iterable(map(coefficients, range(classes))):
            variances += z.square().sum(0)
        room = int(((1 + 8 * COVARIANCE_BYTES / classes) ** 0.5 - 1) / 2)  # m (m + 1) / 2 bytes a class
        frequencies = variances.topk(min(max(room, 1), len(variances))).indices.sort().values
        others = torch.ones(shape)
        others.view(-1)[frequencies] = 0
        pool = lambda image: adaptive_avg_pool2d(image.view(1, *shape), _at_most(shape, SPECTRUM_EDGE)[1:])[0]
        triangles, spectra = [], []
        for k in range(classes):
            covariance, power = torch.zeros(()), torch.zeros(())
            for z in coefficients(k):
                covariance, power = covariance + z[:, frequencies].T @ z[:, frequencies], power + z.square().sum(0)
            triangles.append(_triangular_root(covariance))
            spectra.append(pool(power.view(shape) * others) / pool(others).clamp_min(1e-6))
        roots, spectrum = torch.stack(triangles), torch.stack(spectra)
        scales = roots.abs().amax(2).clamp_min(1e-12) / 127
        rows, columns = torch.tril_indices(len(frequencies), len(frequencies))
        powers = spectrum.amax((1, 2, 3)).clamp_min(1e-12)
        means = adaptive_avg_pool2d(exact.means.view(-1, *shape), _at_most(shape, MEAN_EDGE)[1:])
        return cls(
            means=(means * 255).round().to(torch.uint8),
            frequencies=frequencies,
            roots=(roots / scales[..., None]).round().to(torch.int8)[:, rows, columns],
            scales=scales,
            spectra=(spectrum / powers[:, None, None, None]).half(),
            powers=powers,
            shares=torch.tensor(counts) / sum(counts),
            shape=torch.tensor(shape),
        )

    def start(self, *, by_class: bool, shrinkage: float = 0.01) -> Start:
        """Return the source of seeds: of one Gaussian for each class or, unless ``by_class``, of one for all images."""
        classes = [self._class(k) for k in range(len(self.means))]
        if not by_class and len(classes) > 1:
            weighted = list(zip(self.shares.tolist(), classes, strict=True))
            mean = sum(share * c.mean for share, c in weighted)
            covariance, spectrum = torch.zeros(()), torch.zeros(())
            for share, c in weighted:
                away = cosines((c.mean - mean)[None])[0]
                among = away.flatten()[self.frequencies]
                covariance = covariance + share * (c.root @ c.root.T + torch.outer(among, among))
                spectrum = spectrum + share * (c.spectrum + away.square())
            spectrum.view(-1)[self.frequencies] = 0
            classes = [_Gaussian(mean, self.frequencies, _triangular_root(covariance), spectrum)]
        return _GaussianStart(tuple(classes), shrinkage)

    def _class(self, k: int) -> "_Gaussian":
        shape, m = tuple(self.shape.tolist()), len(self.frequencies)
        root = torch.zeros(m, m)
        root[tuple(torch.tril_indices(m, m))] = self.roots[k].float()
        spectrum = interpolate(self.spectra[k][None].float() * self.powers[k], size=shape[1:], mode="nearest-exact")[0]
        spectrum.view(-1)[self.frequencies] = 0
        mean = _resize(self.means[k][None].float() / 255, shape)[0]
        return _Gaussian(mean, self.frequencies, root * self.scales[k][:, None], spectrum)


def _triangular_root(covariance: Tensor) -> Tensor:
    """Return the lower triangular L with ``L Lᵀ = covariance`` and no negative diagonal; it may be singular."""
    values, vectors = torch.linalg.eigh(covariance)
    root = torch.linalg.qr((vectors * values.clamp_min(0).sqrt()).T).R.T
    return torch.where(root.diagonal() < 0, -root, root)


class _Gaussian(NamedTuple):
    """A Gaussian of images, whose frequencies are independent but for some.

    ``mean`` (C, H, W); ``frequencies`` (m,) those with a covariance, as indices into (C, H, W), and ``root`` (m, m) its
    root; ``spectrum`` (C, H, W) the variances of the others, 0 for those.
    """

    mean: Tensor
    frequencies: Tensor
    root: Tensor
    spectrum: Tensor

    def draw(self, white: Tensor, shrinkage: float, generator: torch.Generator | None) -> Tensor:
        """Draw as many images as ``white (n, C, H, W)`` has, with the covariance shrunk to white noise of its trace."""
        mean, root, spectrum = (part.to(white) for part in (self.mean, self.root, self.spectrum))
        variance = (root.square().sum() + spectrum.sum()) / mean.numel()
        draws = torch.randn(len(white), len(root), generator=generator, device=white.device, dtype=white.dtype)
        z = (((1 - shrinkage) * spectrum + shrinkage * variance).sqrt() * white).flatten(1)
        z[:, self.frequencies.to(z.device)] += (1 - shrinkage) ** 0.5 * draws @ root.T
        return mean + cosines(z.view_as(white), inverse=True)


@dataclass(frozen=True)
class _GaussianStart:
    gaussians: tuple[_Gaussian, ...]
    shrinkage: float

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        y = _check_classes(y, len(x), len(self.gaussians))
        seeds = randn(x, generator)
        for k in y.unique().tolist():
            rows = (y == k).to(x.device)
            seeds[rows] = self.gaussians[k].draw(seeds[rows], self.shrinkage, generator)
        return seeds.clamp(0, 1)


def cosines(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Return the orthonormal discrete cosine transform of images (N, C, H, W) over channels, rows and columns."""
    for dim in (1, 2, 3):
        count = x.shape[dim]
        i = torch.arange(count, device=x.device, dtype=x.dtype)
        matrix = torch.cos(torch.pi / count * i[:, None] * (i + 0.5)) * (2 / count) ** 0.5
        matrix[0] /= 2**0.5
        x = torch.tensordot(x, matrix, dims=([dim], [0 if inverse else 1])).movedim(-1, dim)
    return x


def _at_most(shape: Sequence[int], edge: int) -> tuple[int, int, int]:
    """Return a shape (C, H, W) with both edges cut to ``edge``."""
    return shape[0], min(shape[1], edge), min(shape[2], edge)


def _resize(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return images ``x (N, C, h, w)`` in the size of ``shape``, (C, H, W)."""
    return interpolate(x, size=tuple(shape[1:]), mode="bilinear", align_corners=False)


def _check_classes(y: Tensor | None, count: int, classes: int) -> Tensor:
    """Return the classes of ``count`` seeds on the host, all 0 if there is one class; raise UserError for others."""
    y = torch.zeros(count, dtype=torch.long) if y is None or classes == 1 else y.cpu()
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < classes):
        raise UserError(f"classes 0 to {classes - 1} have seeds, got {int(y.min())} to {int(y.max())}")
    return y


def _pieces(x: Tensor, index: Tensor, of: Tensor | None = None) -> Sequence[Tensor]:
    """Return ``index``, or what belongs to it, in pieces whose images take at most ``PIECE`` bytes in float32."""
    return (index if of is None else of).split(max(1, PIECE // (4 * math.prod(x.shape[1:]))))


def _var_mean(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return variance and mean of each pixel of images at ``index``, (D,) each; Chan et al.'s update over pieces."""
    pieces = _pieces(x, index)
    if len(pieces) == 1:
        return torch.var_mean(_rows(x, index), 0)
    count, squares = 0, torch.zeros(math.prod(x.shape[1:]), dtype=torch.float64)
    mean = torch.zeros_like(squares)
    for piece in pieces:
        rows = _rows(x, piece).double()
        added, away = rows.mean(0), rows.mean(0) - mean
        squares += (rows - added).square().sum(0) + away.square() * (count * len(rows) / (count + len(rows)))
        count += len(rows)
        mean += away * (len(rows) / count)
    return (squares / (count - 1)).float(), mean.float()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the images at ``index`` as floating-point rows in [0, 1], (n, D)."""
    rows = x[index].flatten(1)
    return rows if rows.dtype.is_floating_point else rows.float() / 255


@dataclass
class ImagePool:
    """Real images as starting points, in random order, each used once before any is repeated.

    Attributes:
        x: images (N, C, H, W): uint8, or floating point in [0, 1].
        order: indices of the images to be used next; the call that runs out of them draws more with its generator.
    """

    x: Tensor = field(repr=False)
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long), repr=False)

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Return as many images as ``x`` has, of its type and on its device."""
        while len(self.order) < len(x):
            permutation = torch.randperm(len(self.x), generator=generator, device=x.device)
            self.order = torch.cat([self.order, permutation.cpu()])
        index, self.order = self.order[: len(x)], self.order[len(x) :]
        return _rows(self.x, index).to(x).view(len(x), *self.x.shape[1:])


@dataclass
class ReplayBuffer:
    """Chains that continue over training steps (persistent contrastive divergence), Grathwohl et al. (2020).

    A plain tensor, one buffer per stream, rather than a module's buffer, which distributed training would broadcast.
    """

    chains: Tensor = field(repr=False)  # (N, C, H, W) in [0, 1], on the host

    @classmethod
    def uniform(cls, count: int, shape: tuple[int, ...], generator: torch.Generator) -> "ReplayBuffer":
        """Return a buffer of ``count`` chains of uniform noise; ``shape`` is (C, H, W)."""
        return cls(torch.rand(count, *shape, generator=generator))

    @classmethod
    def empty(cls, count: int, shape: tuple[int, ...]) -> "ReplayBuffer":
        """Return a buffer of ``count`` chains that have not begun: they are NaN until :meth:`put` stores them."""
        return cls(torch.full((count, *shape), math.nan))

    def draw(
        self, count: int, restart: float, generator: torch.Generator, new: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``count`` distinct slots (count,) and their chains; each starts anew with probability ``restart``.

        New chains are uniform noise, or ``new`` (count, C, H, W), which chains that have not begun start from, too.
        Slots are on the host, where the chains are kept, the drawn chains on the generator's device.
        """
        if count > len(self.chains):
            raise UserError(f"{count} chains are asked of a replay buffer of {len(self.chains)}; enlarge the buffer")
        device = generator.device  # chains live on the host, the generator where the model is
        slots = torch.randperm(len(self.chains), generator=generator, device=device)[:count].cpu()
        fresh = torch.rand(count, generator=generator, device=device) < restart
        kept = self.chains[slots].to(device)
        if new is None:
            new = torch.rand(kept.shape, generator=generator, device=device)
        fresh |= kept.flatten(1).isnan().any(1)
        return slots, torch.where(per_sample(fresh, kept), new.to(kept), kept)

    def put(self, slots: Tensor, x: Tensor) -> None:
        self.chains[slots] = x.detach().to(self.chains)

    def state_dict(self) -> dict[str, Tensor]:
        return {"chains": self.chains}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the chains from a checkpoint; raise UserError if their shape differs."""
        if state["chains"].shape != self.chains.shape:
            raise UserError(
                f"the checkpoint holds {tuple(state['chains'].shape)} chains, this run expects "
                f"{tuple(self.chains.shape)}; was the buffer's size changed?"
            )
        self.chains = state["chains"].clone()
