"""Why a model generates, or does not: measurements on a model, its energies and its chains.  No pictures here."""

from torch import Tensor

from advebm import energies
from advebm.descent import Energy
from advebm.energies import Logits
from advebm.samplers import marginal


def joint_or_marginal(f: Logits, x: Tensor, y: Tensor) -> Energy:
    """``E(x, y)`` of a classifier, ``E(x)`` of a critic, which has no classes; ``x (B, C, H, W)`` tells which it is."""
    if f(x[:1]).numel() == 1:
        return marginal(f)
    return lambda v: energies.joint(f(v), y)
