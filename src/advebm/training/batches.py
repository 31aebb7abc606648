"""Load the batches that an objective needs, from the dataset and from other image sources."""

import warnings

import torch

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.augment import Augment
from advebm.data.loader import Loader
from advebm.data.ood_sets import count_shared
from advebm.data.sources import Data, Images
from advebm.objectives.base import Batch
from advebm.runs.engine import Engine
from advebm.runs.recipe import Recipe


class BatchSource:
    """The batches of a run: images, labels, second views, and outside or extra images, as its objective needs them."""

    def __init__(self, recipe: Recipe, data: Data, engine: Engine) -> None:
        def loader(images: Images, augment: tuple[Augment, ...], role: str = "") -> Loader:
            return Loader(images, recipe.seed, recipe.train.batch, recipe.train.streams, augment, engine.device, role)

        self.device, needs, roles = engine.device, recipe.objective.needs, recipe.data.augment
        self.labels, self.traced = "labels" in needs, "origin" in needs
        self.loader = loader(data.train, (roles.x, roles.view or roles.x) if "view" in needs else (roles.x,))
        self.others: dict[str, Loader] = {}
        self.outside: Images | None = None  # all validation images of the outside source
        for role, source in (("outside", recipe.outside), ("extra", recipe.extra)):
            if source is None:
                continue
            dataset = source.load()
            if dataset.shape != data.shape:
                raise UserError(f"the images of --{role} are {dataset.shape}, those of {data.name} {data.shape}")
            self.others[role] = loader(dataset.train, (source.augment.x,), role)
            if role == "outside":
                self.outside = dataset.val
                if (shared := count_shared(dataset.train.x, data)) and engine.main:
                    what = f"{shared:,} of the {len(dataset.train):,} images of --outside are images of {data.name}"
                    warnings.warn(f"{what} itself; the objective takes them for what is not", stacklevel=3)

    def __call__(self, seen: int, stream: int, keys: tuple[int, ...]) -> Batch:
        """Return a stream's share of the batch that follows ``seen`` images; ``keys`` seed its augmentations."""
        views, y = self.loader(seen, stream, rng.generator(*keys, "data", device=self.device))
        others = {
            role: loader(seen, stream, rng.generator(*keys, role, device=self.device))[0][0]
            for role, loader in self.others.items()
        }
        y = y if self.labels else torch.full_like(y, -1)  # hide labels from objectives that do not ask for them
        view = views[1] if len(views) > 1 else None
        origin = None
        if self.traced:
            origin = self.loader.trace(seen, stream, rng.generator(*keys, "data", device=self.device))  # the same draws
        return Batch(views[0], y, view=view, origin=origin, **others)
