"""Starting points of a search: a Start maps images, labels and a generator to images."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

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
            variance, mean = torch.var_mean(_rows(x, index), 0)
            if not variance.any():
                raise UserError(
                    f"the {len(index)} images of class {k} are all the same; a Gaussian needs them to differ"
                )
            means.append(mean)
            variances.append(variance.mean())
        return cls(x, members, torch.stack(means), torch.stack(variances), shrinkage)

    def __call__(self, x: Tensor, y: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Draw seeds for classes ``y (B,)``, on the device of ``x``; for a single Gaussian ``y`` may be None."""
        y = torch.zeros(len(x), dtype=torch.long) if y is None or len(self.members) == 1 else y.cpu()
        if len(y) and not (int(y.min()) >= 0 and int(y.max()) < len(self.members)):
            raise UserError(f"classes 0 to {len(self.members) - 1} have seeds, got {int(y.min())} to {int(y.max())}")
        white = randn(x.flatten(1), generator)
        seeds = torch.empty_like(white)
        for k in y.unique().tolist():
            rows, mean = (y == k).to(x.device), self.means[k].to(x)
            images = _rows(self.x, self.members[k]).to(x)
            draw = torch.randn(int(rows.sum()), len(images), generator=generator, device=x.device, dtype=x.dtype)
            coloured = (draw @ images - draw.sum(1, keepdim=True) * mean) / (len(images) - 1) ** 0.5
            isotropic = self.variances[k].to(x).sqrt() * white[rows]
            seeds[rows] = mean + (1 - self.shrinkage) ** 0.5 * coloured + self.shrinkage**0.5 * isotropic
        return seeds.view(len(x), *self.x.shape[1:]).clamp(0, 1)


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

    def draw(self, count: int, restart: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return ``count`` distinct slots (count,) and their chains; each is new noise with probability ``restart``."""
        if count > len(self.chains):
            raise UserError(f"{count} chains are asked of a replay buffer of {len(self.chains)}; enlarge the buffer")
        device = generator.device  # chains live on the host, the generator where the model is
        slots = torch.randperm(len(self.chains), generator=generator, device=device)[:count].cpu()
        fresh = (torch.rand(count, generator=generator, device=device) < restart).cpu()
        noise = torch.rand(self.chains[slots].shape, generator=generator, device=device).cpu()
        return slots, torch.where(per_sample(fresh, noise), noise, self.chains[slots])

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
