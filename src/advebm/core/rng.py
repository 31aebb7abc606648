"""Random generators that are derived from names and numbers and passed to every random draw.

A generator seeded from (seed, attempt, images seen, stream) makes resuming exact without saving any random state,
gives a run new numbers after a rollback, and gives each stream its own numbers whichever process works on it.
"""

import hashlib

import torch
from torch import Tensor


def derive_seed(*keys: int | str) -> int:
    """Return a 63-bit seed for a tuple of numbers and names; different keys give unrelated seeds."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator on ``device``, seeded with :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(*keys))


def fixed_permutation(count: int) -> Tensor:
    """Return a random permutation of ``range(count)``, the same one at every call."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def randn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers of the shape, type and device of ``like``."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def rand(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return uniform numbers in [0, 1) of the shape, type and device of ``like``."""
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
