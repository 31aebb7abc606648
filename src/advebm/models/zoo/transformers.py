"""Image classifiers of Hugging Face's transformers, from the Hub or a folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from advebm.core import config
from advebm.core.errors import UserError
from advebm.models.network import Architecture, Network, Normalize
from advebm.models.zoo.base import Pretrained, Resized, assemble, check_size, library_errors, need

PROCESSOR = "preprocessor_config.json"
SAFE = {"trust_remote_code": False}  # else the library asks on the terminal whether to run code of the model's folder


@dataclass(frozen=True)
class Transformers:
    """An image classifier of transformers up to its features, such as a ViT; needs ``pip install transformers``.

    Weights begin as the library draws them; ``--init hf:USER/NAME`` starts from the published ones.

    Attributes:
        name: ``USER/NAME`` on the Hub or a folder; its ``config.json`` says what the network is.
        size: height and width in pixels that images are resized to before the network, through which gradients go
            back to the images; None: images are taken as they are.
        crop: share of the shorter side that is kept of images larger than ``size``.
    """

    name: str
    size: int | None = None
    crop: float = 1.0

    cites: ClassVar[tuple[str, ...]] = ("wolf2020",)

    def __post_init__(self) -> None:
        check_size(self.size, self.crop)

    def build(self, channels: int, size: int) -> tuple[nn.Module, int | None]:
        """Return the module ``(B, C, size, size) -> (B, features)`` and ``features``.

        Of a classifier whose last layer is not one linear layer, logits and None.
        """
        transformers = need("transformers", f"transformers:{self.name}")
        with library_errors(f"transformers cannot make {self.name}"):
            settings = transformers.AutoConfig.from_pretrained(self.name, **SAFE)
            settings.num_channels = channels
            if hasattr(settings, "image_size"):
                settings.image_size = self.size or size
            module, head = split(transformers.AutoModelForImageClassification.from_config(settings, **SAFE).float())
        return Resized(module, self.size, self.crop), None if head is None else head.in_features


def find(options: Mapping[str, Any], weights: Path | None) -> Pretrained:
    """Return a network with the weights of its folder or of the Hub.

    Args:
        options: those of :class:`Transformers`; unless they set ``size``, it is that of the model's image processor.
        weights: None; a file is refused.

    Raises:
        UserError: transformers is not installed, an option is unknown, or a file of weights is given.
    """
    if weights is not None:
        raise UserError(f"transformers takes the folder that save_pretrained wrote, or hf:USER/NAME, not {weights}")
    backbone = config.construct(Transformers, options, where="transformers")
    if Path(backbone.name).is_dir():  # so that a run around it can be opened from any folder
        backbone = replace(backbone, name=str(Path(backbone.name).resolve()))
    need("transformers", f"transformers:{backbone.name}")
    return Pretrained(partial(_load, backbone, "size" in options))


def find_published(where: str | Path) -> Pretrained:
    """Return the network in a folder, or published as ``USER/NAME`` on the Hub."""
    return find({"name": str(where)}, None)


@dataclass(frozen=True)
class Processor:
    """What a model's image processor does to images in [0, 1].

    Attributes:
        mean, std: normalisation of each channel.
        size: height and width of the network's images; None: any.
        crop: share of the shorter side that is kept of larger images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None
    crop: float


def read_processor(settings: Mapping[str, Any]) -> Processor:
    """Return what a ``preprocessor_config.json`` says.

    Raises:
        UserError: images are rescaled other than to [0, 1], shifted, made rectangular, or their channels are reversed.
    """
    for name in ("do_flip_channel_order", "rescale_offset"):
        if settings.get(name):
            raise UserError(f"{PROCESSOR} sets {name}, which networks here cannot do; they take RGB in [0, 1]")
    if settings.get("do_rescale", True) and abs(255 * settings.get("rescale_factor", 1 / 255) - 1) > 1e-3:
        raise UserError(f"{PROCESSOR} rescales bytes by {settings['rescale_factor']:g}; networks here take [0, 1]")
    mean, std = (
        (settings.get("image_mean"), settings.get("image_std")) if settings.get("do_normalize", True) else (0, 1)
    )
    if mean is None or std is None:
        raise UserError(f"{PROCESSOR} has no image_mean and image_std, so it does not say how images are normalised")
    means, stds = (tuple(value) if isinstance(value, list | tuple) else (float(value),) for value in (mean, std))
    if settings.get("include_top"):  # EfficientNet's processor divides by the deviation once more
        stds = tuple(a * b for a, b in zip(stds, settings["image_std"], strict=True))
    size, crop = _edge(settings.get("size")), 1.0
    if not settings.get("do_resize", True):
        size = None
    if settings.get("do_center_crop") and size is not None and settings.get("crop_pct"):  # as PoolFormer's
        size = int(size / settings["crop_pct"])
    if settings.get("do_center_crop") and (kept := _edge(settings.get("crop_size"))) is not None:
        size, crop = kept, 1.0 if size is None else min(1.0, kept / size)
    elif size is not None and settings.get("crop_pct") and size < 384:  # as ConvNeXt's processor
        crop = float(settings["crop_pct"])
    return Processor(means, stds, size, crop)


def _edge(size: Any) -> int | None:
    if isinstance(size, Mapping):
        if size.get("height", 0) != size.get("width", 0):
            sides = f"{size['height']} x {size['width']}"
            raise UserError(f"{PROCESSOR} makes images of {sides}; only squares are resized to")
        return next((int(size[name]) for name in ("height", "shortest_edge") if size.get(name)), None)
    return None if size is None else int(size)


def split(module: Any) -> tuple[nn.Module, nn.Linear | None]:
    """Return a classifier without its last layer, and that layer; None where there is not one linear layer."""
    last = getattr(module, "classifier", None)
    if isinstance(last, nn.Sequential) and len(last) and isinstance(last[-1], nn.Linear):
        head, last[-1] = last[-1], nn.Identity()
        return module, head
    if not isinstance(last, nn.Linear):
        return module, None
    module.classifier = nn.Identity()
    return module, last


def _load(backbone: Transformers, sized: bool) -> tuple[Network, Architecture]:
    transformers = need("transformers", f"transformers:{backbone.name}")
    with library_errors(f"transformers cannot make {backbone.name}"):
        processor = read_processor(transformers.ImageProcessingMixin.get_image_processor_dict(backbone.name)[0])
        if not sized:
            backbone = replace(backbone, size=processor.size, crop=processor.crop)
        classifiers = transformers.AutoModelForImageClassification
        transformers.utils.logging.disable_progress_bar()
        module, found = classifiers.from_pretrained(backbone.name, output_loading_info=True, **SAFE)
    normalise = Normalize(processor.mean, processor.std)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{backbone.name} has no {missing[0]}; train it first: --backbone transformers:{backbone.name}")
    settings = module.config.to_dict()
    size, channels = backbone.size or settings.get("image_size", 224), settings.get("num_channels", 3)
    module, head = split(module.float())
    with library_errors(f"transformers cannot make {backbone.name} for images of {size} x {size}"):
        return assemble(backbone, Resized(module, backbone.size, backbone.crop), head, normalise, channels, size)
