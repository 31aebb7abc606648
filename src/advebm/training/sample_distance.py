"""FD of samples during training, by which checkpoints can be selected; test images are never used."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advebm.core import rng
from advebm.core.errors import Diverged, UserError
from advebm.core.processes import ALONE, Team
from advebm.data.sources import Data, Images
from advebm.metrics.distances import Moments, frechet_distance
from advebm.models.batching import batch_size_for
from advebm.runs.find_space import find_space
from advebm.runs.recipe import Recipe
from advebm.samplers.base import Sampler
from advebm.sampling import generate


class SampleDistance:
    """FD between images that a recipe's sampler draws from a network and all validation images of the recipe's data.

    ``train.samples`` images are drawn, in equal numbers of each class if the sampler depends on classes, from the same
    random numbers each time.  Chains with ``start: outside`` begin from validation images of the outside source.  The
    FD is that of :func:`advebm.metrics.distances.frechet_distance`, in the features that ``train.features`` names.

    Attributes:
        judge: name of the weights of the feature network.
    """

    def __init__(self, recipe: Recipe, data: Data, outside: Images | None, device: torch.device) -> None:
        """Prepare the sampler and compute the features of the validation images.

        Args:
            recipe: gives the sampler, the feature space and the number of samples.
            data: the dataset.
            outside: validation images of the outside source; None: there is none.
            device: the device of the networks.

        Raises:
            UserError: there is no feature network of this name or it does not fit the images, there are too few
                validation images, or the sampler needs what training cannot give it.
        """
        cfg, self.sampler = recipe.train, recipe.sampler
        self.data, self.device, self.seed = data, device, rng.derive_seed(recipe.seed, "val", "samples")
        _check_sampler(self.sampler)
        if (count := len(data.val)) < 2:
            what = f"{data.name} has {count}"
            raise UserError(f"FD in training takes 2 or more validation images, {what}; set train.features to none")
        if self.sampler.start == "outside" and outside is not None and not len(outside):
            raise UserError(
                "chains start from validation images of outside, and it has none; set sampler.start to noise"
            )
        self.y = balanced_classes(self.sampler, data, cfg.samples)
        generate.check_groups(self.sampler, len(self.y), batch_size_for(data.shape))
        pool = None if outside is None else Data("outside", (), outside, outside, outside)
        self.start, self.bank = self.sampler.prepare(data, pool), self.sampler.bank(data)
        space = find_space(str(cfg.features))
        self.judge, self.space = space.judge, space.load(device)
        self.real = Moments.of(self._features(data.val.x))

    def __call__(
        self, model: nn.Module, team: Team = ALONE, show: Callable[[Tensor, Tensor], None] = lambda x, y: None
    ) -> float:
        """Return the FD of a network's samples.

        Args:
            model: the network.
            team: processes that share the work.
            show: called in the main process with the first samples, uint8 (N, C, H, W), and their classes (N,).

        Raises:
            Diverged: a sample is not finite.
        """
        view = generate.sampling_view(model, self.data, len(self.y), "auto")
        options: dict[str, Any] = {"shape": self.data.shape, "seed": self.seed, "view": view, "bank": self.bank}
        drawn: dict[int, Tensor | None] = {}
        for number in range(team.rank, generate.count_chunks(len(self.y)), team.world):
            x = generate.draw_chunk(model, self.sampler, self.start, self.y, number, **options)
            drawn[number] = self._features(generate.to_bytes(x)) if x.isfinite().all() else None
            if number == 0 and drawn[number] is not None:
                show(generate.to_bytes(x), self.y[: len(x)])
        parts = {number: features for share in team.all_gather(drawn) for number, features in share.items()}
        finite = [features for _, features in sorted(parts.items()) if features is not None]
        if len(finite) < len(parts):  # raised in all processes
            raise Diverged("samples drawn for validation are not finite")
        return frechet_distance(Moments.of(torch.cat(finite)), self.real)

    def _features(self, x: Tensor) -> Tensor:
        return self.space.of(x, self.device, batch_size_for(self.data.shape))


def balanced_classes(sampler: Sampler, data: Data, count: int) -> Tensor:
    """Return classes 0, 1, …, K - 1, 0, 1, … of ``count`` samples, int64; all -1 if the sampler depends on no class."""
    classes = len(data.classes)
    return generate.classes_to_draw(sampler, data, math.ceil(count / classes)).view(classes, -1).T.flatten()[:count]


def _check_sampler(sampler: Sampler) -> None:
    if sampler.fit == "test":
        raise UserError(
            "FD in training never looks at test images; set sampler.fit to train, or train.features to none"
        )
    if sampler.start == "buffer":
        raise UserError(
            "FD in training takes chains of their own, not the replay buffer; set sampler.start to noise, or "
            "train.features to none"
        )
