"""Image quality beside other implementations, which are imported where they are used and are no dependency.

``pip install --no-deps torch-fidelity==0.4.0 prdc==0.2`` somewhere on the path.  torch-fidelity imports torchvision as
a whole, but the modules that compute do not need it: they are imported from a package that is left empty.
"""

import statistics
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advebm.metrics.distances import Moments, frechet_distance, inception_score, kernel_distance
from advebm.metrics.overlap import density_coverage, precision_recall
from advebm.models.inception import Inception
from tests.agreement.rows import Row, peer
from tests.references import distances as reference
from tests.references import quality as made_up

FIDELITY = "torch-fidelity"


@contextmanager
def fidelity() -> Iterator[Any]:
    """torch-fidelity's modules by name, without its package and without ``utils``, which want torchvision."""
    spec = find_spec("torch_fidelity")
    if spec is None:
        raise ModuleNotFoundError("pip install --no-deps torch-fidelity==0.4.0")
    package, utils = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.utils")
    package.__path__ = list(spec.submodule_search_locations or [])
    utils.__getattr__ = lambda name: None  # type: ignore[method-assign]
    before = set(sys.modules)
    sys.modules.update({package.__name__: package, utils.__name__: utils})
    try:
        yield lambda name: import_module(f"torch_fidelity.{name}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity" and name not in before]:
            del sys.modules[name]


def row(metric: str, package: str, theirs: float, ours: float) -> Row:
    """With the plain difference."""
    return Row(metric, peer(package), theirs, ours, ours - theirs)


def networks() -> tuple[Inception, Any]:
    """Ours, and torch-fidelity's, with the same made-up weights."""
    ours = Inception().eval()
    weights = {name: torch.from_numpy(v) for name, v in made_up.weights(ours.state_dict()).items()}
    ours.load_state_dict(weights)
    with fidelity() as module:
        theirs = module("feature_extractor_inceptionv3")
        theirs.load_state_dict_from_url = lambda *args, **options: weights
        return ours, theirs.FeatureExtractorInceptionV3("made up", ["2048", "logits_unbiased"])


@torch.no_grad()
def inception(sizes: tuple[int, ...] = (32, 299), count: int = 4) -> list[Row]:
    """Features and logits of random bytes: the largest difference, relative to the largest value."""
    ours, theirs = networks()
    rows = []
    for size in sizes:
        x = torch.from_numpy(made_up.bytes_of((count, 3, size, size), seed=size))
        features = ours(x / 255)
        pairs = zip(("features", "logits"), theirs(x), (features, ours.logits(features)), strict=True)
        for name, a, b in pairs:
            largest = a.abs().max()
            difference = ((a - b).abs().max() / largest).item()
            title = f"Inception {name}, {size} x {size}, relative"
            rows.append(Row(title, peer(FIDELITY), largest.item(), b.abs().max().item(), difference))
    return rows


@torch.no_grad()
def made_up_features() -> tuple[list[float], list[float]]:
    """What torch-fidelity's network gives for the image of tests/metrics/test_quality.py: features and logits."""
    x = torch.from_numpy(made_up.bytes_of((1, 3, 20, 26), seed=1))
    features, logits = networks()[1](x)
    return features[0, ::256].tolist(), logits[0, ::126].tolist()


def sets(count: int = 1000, dimensions: int = 64) -> tuple[Tensor, Tensor]:
    """Two sets of features that overlap in part, float64."""
    g = torch.Generator().manual_seed(0)
    real = torch.randn(count, dimensions, generator=g, dtype=torch.float64)
    turn = torch.eye(dimensions) + 0.05 * torch.randn(dimensions, dimensions, generator=g)
    fake = 0.9 * torch.randn(count, dimensions, generator=g, dtype=torch.float64) @ turn.double() + 0.05
    return real, fake


def statistics_of_features() -> list[Row]:
    """Fréchet and kernel distance, score, precision and recall on the same features by torch-fidelity."""
    real, fake = sets()
    logits = fake[:, :10] * 3
    rows = []
    with fidelity() as module:
        fid, kid, isc, prc = (module(f"metric_{name}") for name in ("fid", "kid", "isc", "prc"))
        moments = [fid.fid_features_to_statistics(f) for f in (real, fake)]
        theirs = fid.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"]
        rows.append(row("Fréchet distance", FIDELITY, theirs, frechet_distance(Moments.of(real), Moments.of(fake))))
        options = {"kid_subsets": 1, "kid_subset_size": len(real), "verbose": False}
        theirs = kid.kid_features_to_metric(real, fake, **options)["kernel_inception_distance_mean"]
        rows.append(row("kernel distance", FIDELITY, theirs, kernel_distance(real, fake)))
        for count in (len(logits), len(logits) - 7):  # parts that are equal, and parts that are not
            found = isc.isc_features_to_metric(logits[:count], splits=10, shuffle=False)
            for name, theirs, ours in zip(
                ("mean", "deviation"), found.values(), inception_score(logits[:count]), strict=True
            ):
                rows.append(row(f"Inception score of {count}, {name}", FIDELITY, theirs, ours))
        found = prc.prc_features_to_metric(fake, real, verbose=False)
        precision, recall = precision_recall(real, fake)
        rows += [row("precision", FIDELITY, found["precision"], precision)]
        rows += [row("recall", FIDELITY, found["recall"], recall)]
    return rows


def overlap() -> list[Row]:
    """Precision, recall, density and coverage by the package of Naeem et al."""
    from prdc import compute_prdc

    real, fake = sets()
    ours: dict[str, float] = {}
    with redirect_stdout(None):
        theirs = {k: compute_prdc(real.numpy(), fake.numpy(), nearest_k=k) for k in (3, 5)}
    ours["precision"], ours["recall"] = precision_recall(real, fake, k=3)
    ours["density"], ours["coverage"] = density_coverage(real, fake, k=5)
    k_of = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
    return [row(f"{name}, k = {k}", "prdc", float(theirs[k][name]), ours[name]) for name, k in k_of.items()]


def rows() -> list[Row]:
    """All comparisons; some 5 seconds on one core."""
    return [*inception(), *statistics_of_features(), *overlap()]


def frechet_speed(count: int = 10_000, dimensions: int = 2048, rounds: int = 3) -> list[Row]:
    """The distance between two sets of moments beside a matrix root by scipy, in turns: time, and the difference.

    The moments are there before; computing them costs both alike.
    """
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(dimensions, dimensions, generator=g) / dimensions**0.5
    real = torch.randn(count, dimensions, generator=g).relu() @ mix
    fake = torch.randn(count, dimensions, generator=g).relu() @ mix * 1.1 + 0.01
    moments = [Moments.of(f) for f in (real, fake)]
    gaussians = [(f.mean(0), np.cov(f, rowvar=False)) for f in (real.double().numpy(), fake.double().numpy())]
    seconds, values = ([], []), [0.0, 0.0]
    for _ in range(rounds):
        for i, compute in enumerate(
            (
                lambda: reference.frechet_of_gaussians(*gaussians[0], *gaussians[1]),
                lambda: frechet_distance(*moments),
            )
        ):
            begun = time.perf_counter()
            values[i] = float(compute())
            seconds[i].append(time.perf_counter() - begun)
    theirs, ours = map(statistics.median, seconds)
    title, who = f"Fréchet distance, 2 x {count} x {dimensions}", f"{peer('scipy')} sqrtm"
    return [
        Row(title, who, *values, values[1] - values[0]),
        Row(f"its time, s, median of {rounds} in turns", who, theirs, ours, theirs / ours, "x"),
    ]
