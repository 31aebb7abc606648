"""A short, small object of every kind in ``KINDS``, small networks and batches of digits: for tests over all kinds."""

import copy

import pytest
import torch

from advebm.core import config
from advebm.core.config import KINDS
from advebm.data.loader import Origin
from advebm.data.sources import Data, Digits, Images, to_float
from advebm.models.network import Architecture
from advebm.models.small import SmallConv
from advebm.objectives.base import Batch
from tests.helpers import default

SHORT = {"steps": 2, "queries": 9, "searches": 2, "images": 3, "noise": 12, "count": 8, "iterations": 20}
SHORT |= {"start": 2, "buffer": 16, "targets": 2, "overlap": 12, "groups": 4, "restarts": 1, "watch_every": 1}
OTHERS = {
    "objective": [
        {"kind": "at", "attack": {"eps": 0.5, "norm": "l2", "restarts": 2}, "search_mode": "train"},
        {"kind": "at", "attack": {"start": "gaussian", "loss": "margin"}},
        {"kind": "infonce", "form": "infonce", "negatives": {"queue": 16, "hardness": 0.5}},
        {"kind": "adversarial-infonce", "langevin": 0.01, "consistency": 1.0, "negatives": {"queue": 16}},
        {"kind": "binary-at", "inside_steps": 2, "radius": 1.0, "curriculum": {"window": 1}},
        {"kind": "dat", "r1": 0.1, "curriculum": {"window": 1}},
        {"kind": "mle", "negatives": {"buffer": 0, "clamp": True}},
    ],
    "sampler": [
        {"kind": "cs", "direction": "adam", "start": "global", "radius": 1.0},
        {"kind": "cs", "direction": "sign", "start": "outside", "momentum": 0.9, "noise": 0.1, "noise_decay": 0.5},
        {"kind": "np-langevin", "negatives": "data"},
        {"kind": "np-langevin", "negatives": "batch", "start": "noise"},
    ],
    "edit": [
        {"kind": "inpaint", "fill": "noise"},
        {"kind": "denoise", "noise": "salt-and-pepper"},
        {"kind": "interpolate", "ends": "moved", "way": "linear"},
    ],
    "adversary": [
        {"kind": "pgd", "norm": "l2", "restarts": 2, "momentum": 0.5},
        {"kind": "apgd", "loss": "targeted-dlr", "norm": "l2"},
        {"kind": "fab", "norm": "l2", "restarts": 2},
        {"kind": "square", "norm": "l2"},
    ],
    "metric": [{"kind": "counterfactuals", "towards": "random"}],
}


def shorten(plain):
    """Plain data of a method with few steps and images."""
    if isinstance(plain, list):
        return [shorten(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    small = {k: min(v, SHORT[k]) if k in SHORT and type(v) is int else shorten(v) for k, v in plain.items()}
    return small


def kinds(role, skip=()):
    """A short object of every kind of a role, and of the variants above, as parameters of a test."""
    parameters = [pytest.param(role, kind, None, id=kind) for kind in KINDS[role] if kind not in skip]
    for number, plain in enumerate(OTHERS.get(role, [])):
        if plain["kind"] not in skip:
            parameters.append(pytest.param(role, plain["kind"], plain, id=f"{plain['kind']}-{number}"))
    return pytest.mark.parametrize(("role", "kind", "plain"), parameters)


def build(role, kind, plain):
    thing = default(role, kind) if plain is None else config.build(plain, role)
    return config.build(shorten(config.describe(thing)), role)


def few_digits():
    """Digits, a few of each class."""
    whole = Digits().load()

    def cut(split, each):
        rows = torch.stack([(split.y == k).nonzero().squeeze(1)[:each] for k in range(10)], 1).flatten()
        return Images(split.x[rows], split.y[rows])

    return Data("digits", whole.classes, cut(whole.train, 5), cut(whole.val, 1), cut(whole.test, 2))


def small_networks():
    """A classifier, a critic and an encoder with both branches, on the host."""
    backbone, common = SmallConv(width=4), (1, 8, (0.3,), (0.4,))
    dual = SmallConv(width=4, norm="dual")
    return {
        "classifier": Architecture(backbone, 10, *common).build(),
        "critic": Architecture(backbone, 1, *common).build(1),
        "encoder": Architecture(dual, 8, *common, hidden=8).build(2),
    }


def place(model, device):
    return copy.deepcopy(model).to(device)


def batch_of(data, count, device):
    x = [to_float(data.train.x[i * count : (i + 1) * count]).to(device) for i in range(4)]
    origin = Origin.of_whole(x[0])
    return Batch(x[0], data.train.y[:count].to(device), view=x[1], outside=x[2], extra=x[3], origin=origin)
