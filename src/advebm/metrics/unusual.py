"""How unusual images are for a model, compared with images of its data."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from advebm.core import checks
from advebm.edits.base import outputs
from advebm.metrics.ood import EnergyScore, Score
from advebm.models.batching import as_images, device_of
from advebm.models.modes import searching


class Unusual(NamedTuple):
    """Scores (B,), higher for images less like the data, and the share (B,) of known images that score lower."""

    score: Tensor
    share: Tensor


def unusual(model: nn.Module, x: Tensor, known: Tensor, score: Score | None = None, *, batch: int = 500) -> Unusual:
    """Compare images ``x`` with held-out images of the data, ``known (N, C, H, W)``; default score: the energy."""
    checks.no_encoder(model)
    device, score = device_of(model), score or EnergyScore()
    with searching(model) as f:
        outputs(f, as_images(x[:1], device))
        scores, known_scores = (
            torch.cat([score(f, as_images(part, device)).detach().cpu() for part in images.split(batch)])
            for images in (x, known)
        )
    share = torch.searchsorted(known_scores.sort().values, scores).double() / len(known_scores)
    return Unusual(scores, share)
