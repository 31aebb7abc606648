"""Randomness is an argument: every draw takes a generator that is derived from names and numbers.

A generator seeded from (seed, attempt, images seen, stream) makes resuming exact without saving any random
state, lets a rolled-back run draw anew, and gives each stream its own numbers whatever process owns it.
"""

import hashlib

import torch
from torch import Tensor


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from a tuple of numbers and names; other keys give an unrelated seed."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device``, seeded with :func:`derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(*keys))


def randn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of the shape, type and device of ``like``."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def rand(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) of the shape, type and device of ``like``."""
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
