"""Scales at which the papers' tables can be computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a table's experiment.  The table itself sets how many images its rows are trained on.

    Attributes:
        about: description.
        size: size of the networks: ``full``, the papers', names recipes ``DATA-METHOD``, others ``DATA-METHOD-SIZE``.
        images: number of test images that attacks run on; None: all.
        samples: number of samples in each set.
        draws: number of sampling seeds where samplers are compared.
        trials: number of samples by which each setting of a sampler is tried, on validation images.
        version: version of AutoAttack.
        changes: options changed in every recipe.
        features: feature space that judges samples; None: that of a standard classifier trained beside the table's.
        outliers: image sets that out-of-distribution detection is measured on.
        restarts: restarts of the worst-case attack on detection.
    """

    about: str
    size: str = "small"
    images: int | None = None
    samples: int = 1000
    draws: int = 3
    trials: int = 250
    version: Literal["quick", "standard"] = "standard"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: str | None = "cifar10-infonce"
    outliers: tuple[Any, ...] = ()
    restarts: int = 1


# Outside images that critics and detectors of CIFAR-10 are trained on.
P0 = {"kind": "classes", "source": "cifar100", "count": 80}
SVHN = {"kind": "hf", "path": "ufldl-stanford/svhn", "subset": "cropped_digits"}
IMAGENET = {"kind": "hf", "path": "benjamin-paine/imagenet-1k-32x32"}
OUTLIERS = (P0, {**P0, "rest": True}, "digits", "uniform", "gaussian")
SCALES = {
    "full": Scale(
        "the papers' networks and lengths, all test images, 50,000 samples; days of GPUs; not run here",
        size="full",
        samples=50_000,
        draws=1,
        trials=5_000,
        features="inception",
        outliers=(SVHN, "cifar100", IMAGENET, "uniform"),
        restarts=5,
    ),
    "gpu-30min": Scale(
        "ResNet-18s, PGD-50, C&W, AutoAttack of 1,000 images, 5,000 samples; for half an hour of an H200, never run",
        images=1000,
        samples=5_000,
        changes={"backbone__depth": 18, "backbone__width": 64},
        outliers=OUTLIERS,
    ),
    "cpu-2h": Scale(
        "ResNet-18s of width 32 for two hours of two cores, AutoAttack's APGDs on 1,000 images, 5,000 samples",
        size="2h",
        images=1000,
        samples=5_000,
        draws=1,
        version="quick",
        outliers=OUTLIERS,
    ),
    "cpu-30min": Scale(
        "ResNet-8s, PGD-50, C&W, AutoAttack's APGDs on 500 images, 1,000 samples; for half an hour of two cores",
        images=500,
        version="quick",
        outliers=OUTLIERS,
    ),
    "digits": Scale(
        "8x8 digits, a network of four convolutions, AutoAttack's APGDs, all 359 test images, 1,000 samples",
        version="quick",
        features=None,
        outliers=("uniform", "gaussian"),
    ),
}
