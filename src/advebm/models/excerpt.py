"""What a published model brings of its data: Gaussians to draw from, and a few test images to edit."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
import torch
from safetensors import SafetensorError

from advebm.core import config, files
from advebm.core.errors import UserError
from advebm.data.sources import UNLABELLED, Augmentations, Data, Images
from advebm.models.hub import EXCERPT
from advebm.models.network import locate
from advebm.starts import CompactGaussians

PUBLIC = ("digits", "mnist-5k", "cifar10", "cifar100")  # data sets of which everybody may have images
IMAGES_BYTES = 500_000  # of the test images, at most


@dataclass(frozen=True)
class Published:
    """The data of a published model: the test images that it brings, as validation and test images.

    Chains start from the model's own Gaussians of its training images, which are not there themselves.

    Attributes:
        model: the model: a folder, a model of the package or ``hf:USER/NAME``.
        whole: whether to read the data set that the model was trained on instead, where that is at hand.
        path: where that data set is; the same as ``whole``.
    """

    model: str
    whole: bool = False
    path: str | None = None

    @property
    def augment(self) -> Augmentations:
        return Augmentations()

    def load(self) -> Data:
        """Return the data.

        Raises:
            UserError: the model brings none; or the whole set is not found, or is not that of the model.
        """
        folder = locate(self.model)[0]
        excerpt = read_excerpt(folder)
        if not (self.whole or self.path):
            return excerpt
        options = original_data(folder)
        data: Data = config.build({**options, **({"path": self.path} if self.path else {})}, "source").load()
        if _read_about(folder).get("images_digest") not in (None, data.digest()):
            raise UserError(f"the images of {data.name} are not those that {self.model} was trained on")
        return data._replace(gaussians=excerpt.gaussians)


def has_excerpt(folder: Path) -> bool:
    return (folder / EXCERPT).is_file()


def original_data(folder: Path) -> dict[str, Any]:
    """Return the options of the data set that a published model was trained on.

    Raises:
        UserError: the model does not say, or names code to be imported.
    """
    about = _read_about(folder)
    options = (about.get("options") or {}).get("data") or about.get("data")
    if options is None or (isinstance(options, Mapping) and options.get("kind") == "published"):
        raise UserError(f"{folder} does not say what its model was trained on; give --data NAME")
    plain: dict[str, Any] = config.describe(config.build(options, "source", foreign=False))
    return plain


def is_public(source: Mapping[str, Any]) -> bool:
    """Return whether a source, given by its options, reads a public data set, so that images of it may be published."""
    inner = source.get("source")
    return source["kind"] in PUBLIC or (isinstance(inner, Mapping) and is_public(inner))


def write_excerpt(folder: Path, data: Data, per_class: int) -> int:
    """Write Gaussians of the training images and the first test images of each class; return the number of these.

    Args:
        folder: folder of a published model.
        data: its data; Gaussians that it has are kept.
        per_class: test images of each class, as far as they fit into :data:`IMAGES_BYTES`.
    """
    gaussians = data.gaussians
    if gaussians is None:
        labels = data.train.y if data.train.labelled else None
        gaussians = CompactGaussians.fit(data.train.x, labels, classes=1 if labels is None else len(data.classes))
    test = data.test
    ranks = torch.empty_like(test.y)
    for k in test.y.unique():
        members = test.y == k
        ranks[members] = torch.arange(int(members.sum()))
    first = (ranks < per_class).nonzero().squeeze(1)
    order = first[torch.argsort(ranks[first] * (len(data.classes) + 1) + test.y[first], stable=True)]
    images = test.take(order[: max(1, IMAGES_BYTES // test.x[0].numel())])
    tensors = {name: value.contiguous() for name, value in vars(gaussians).items()}
    tensors |= {"images": images.x.contiguous(), "labels": images.y.contiguous()}
    files.write(folder / EXCERPT, safetensors.save(tensors))
    return len(images)


def read_excerpt(folder: Path) -> Data:
    """Return the data that a published model brings.

    Raises:
        UserError: it brings none, or its file is damaged.
    """
    path = folder / EXCERPT
    if not path.is_file():
        raise UserError(f"{folder} brings no images; say where its data are: --data NAME --data.path DIR")
    try:
        tensors = safetensors.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    expected = {"images", "labels", *(field.name for field in fields(CompactGaussians))}
    if differing := expected ^ tensors.keys():
        what = ", ".join(f"{'extra' if name in tensors else 'missing'} {name}" for name in sorted(differing))
        raise UserError(f"{path} is damaged, or of another version of advebm; export the model again ({what})")
    images = Images(tensors.pop("images"), tensors.pop("labels"))
    gaussians = CompactGaussians(**tensors)
    about = _read_about(folder)
    name, classes = str(about.get("data", "images")), tuple(map(str, about.get("classes", ())))
    shape = tuple(images.x.shape[1:])
    if images.x.dtype != torch.uint8 or tuple(gaussians.shape.tolist()) != shape:
        raise UserError(f"{path} is damaged: images of {shape}, Gaussians of {tuple(gaussians.shape.tolist())}")
    m = len(gaussians.frequencies)
    if gaussians.roots.shape[1:] != (m * (m + 1) // 2,) or not set(gaussians.frequencies.tolist()) <= set(
        range(images.x[0].numel())
    ):
        raise UserError(f"{path} is damaged: {m} frequencies and {tuple(gaussians.roots.shape)} values of their roots")
    if len(gaussians.means) not in (1, len(classes)) or int(images.y.max()) >= len(classes):
        raise UserError(f"{path} is damaged: {len(gaussians.means)} Gaussians for {len(classes)} classes")
    few = f"{name} ({len(images)} test image{'s' * (len(images) != 1)})"
    return Data(few, classes or UNLABELLED, images.take(slice(0)), images, images, gaussians)


def _read_about(folder: Path) -> dict[str, Any]:
    about = files.read_json(folder / "config.json")
    if not isinstance(about, dict):
        raise UserError(f"{folder / 'config.json'} is damaged")
    return about
