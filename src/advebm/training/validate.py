"""Score a network on validation images, clean and attacked."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from advebm import energies
from advebm.core import processes, rng
from advebm.core.errors import Diverged
from advebm.data.sources import Data, Images
from advebm.descent import Energy
from advebm.metrics.base import Subject
from advebm.metrics.ood import auroc
from advebm.metrics.robustness import measure_accuracy
from advebm.models.batching import batch_size_for
from advebm.models.modes import searching
from advebm.objectives.base import Batch
from advebm.runs.recipe import Recipe

# The scores that checkpoints are selected by, attacked before clean, of a classifier, a critic and an encoder
SELECTED = (
    *("val/robust_accuracy", "val/accuracy"),
    *("val/adversarial_auroc", "val/auroc"),
    *("val/robust_contrastive_accuracy", "val/contrastive_accuracy"),
)


def rank(scores: Mapping[str, float], select: Literal["robustness", "fd"]) -> tuple[float, float] | None:
    """Return what checkpoints are compared by, see ``train.select``: larger is better, the second number breaks ties.

    These are the scores under attack and clean, or with ``fd`` minus the FD and the score under attack, 0 if there is
    none.  None: nothing was measured that tells.
    """
    found = [scores[name] for name in SELECTED if name in scores]
    if select == "fd":
        return -scores["val/fd"], found[0] if found else 0.0
    return (found[0], found[1]) if found else None


def validate(
    model: nn.Module,
    data: Data,
    split: Images,
    recipe: Recipe,
    outside: Images | None = None,
    team: processes.Team = processes.ALONE,
) -> dict[str, float]:
    """Score a network on validation images, clean and under the recipe's threat model, with fixed random numbers.

    A classifier is scored by accuracy.  A critic is scored by AUROC against ``outside`` images, which are the ones
    attacked.  An encoder is scored by its objective, on two augmentations of each image.  The processes of a ``team``
    share the images of a classifier; for critics and encoders each one computes everything.

    Raises:
        Diverged: a critic's energies, or an encoder's losses, are not finite.
    """
    subject = Subject(model, data, split, recipe.threat, batch=batch_size_for(data.shape, model), team=team)
    generator = rng.generator(recipe.seed, "val", device=subject.device)
    if (validate_pair := recipe.objective.validate) is not None:
        augment, x = recipe.data.augment, subject.on_device(split.x)
        first, second = augment.x(x, generator), (augment.view or augment.x)(x, generator)
        pair = Batch(first, torch.full((len(x),), -1), view=second)
        scores = validate_pair(model, pair, recipe.threat, generator)
        if not all(map(math.isfinite, scores.values())):
            raise Diverged("the loss of validation images is not finite")
        return scores
    if recipe.objective.outputs == 1 and outside is not None:
        with searching(model) as f:
            energy: Energy = lambda x: energies.binary(f(x))
            score = lambda x: torch.cat([energy(part).detach() for part in x.split(subject.batch)])
            x = subject.on_device(outside.x)
            x_adv = torch.cat([recipe.threat.minimize(energy, part, generator) for part in x.split(subject.batch)])
            inside, clean, attacked = score(subject.on_device(split.x)), score(x), score(x_adv)
        if not torch.cat([inside, clean, attacked]).isfinite().all():
            raise Diverged("the energies of validation images are not finite")
        return {"val/auroc": auroc(inside, clean).value, "val/adversarial_auroc": auroc(inside, attacked).value}
    attacks = {"val/accuracy": None, "val/robust_accuracy": recipe.threat}
    return {name: measure_accuracy(subject, attack, generator)[0] for name, attack in attacks.items()}
