"""Attacks beside the authors' AutoAttack and torchattacks, which are imported where they are used.

The authors' code is not on PyPI: ``AUTOATTACK_SRC`` names the folder of a checkout; without it, PyPI's ``pyautoattack``
is taken, which is checked to be the same text.
"""

import importlib
import os
import re
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advebm.attacks.apgd import APGD
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.base import Adversary, is_correct
from advebm.attacks.cw import CW
from advebm.attacks.fab import FAB
from advebm.attacks.projected import Attack
from advebm.attacks.square import Square
from advebm.metrics.verdicts import find_verdicts
from advebm.models.modes import searching
from tests.agreement.rows import Row, peer

NORMS = {"linf": "Linf", "l2": "L2"}


class Official:
    """The authors' code, or PyPI's copy of it, whose wrapper has other names for the same options."""

    def __init__(self) -> None:
        self.source = os.environ.get("AUTOATTACK_SRC", "")
        self.name = "auto-attack (checkout)" if self.source else peer("pyautoattack")
        if self.source and self.source not in sys.path:
            sys.path.insert(0, self.source)
            if find_spec("pyautoattack") is not None:
                changed = ", ".join(differences(Path(self.source))) or "nothing"
                print(f"pyautoattack's algorithms differ from {self.source} in: {changed}")

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        norm: str,
        *,
        names: tuple[str, ...] = (),
        queries: int = 0,
    ) -> Tensor:
        """Which points stand after the attacks of those names, or after the standard ones, bool (N,)."""
        only: dict[str, Any] = {"version": "custom"} if names else {"version": "standard"}
        ball = {"norm": NORMS[norm], "eps": eps, "device": "cpu", "seed": 0}
        if self.source:
            only |= {"attacks_to_run": list(names)} if names else {}
            found = importlib.import_module("autoattack").AutoAttack(model, verbose=False, **ball, **only)
        else:
            only |= {"attacks": list(names)} if names else {}
            found = importlib.import_module("pyautoattack").AutoAttack(model, **ball, **only)
        if names:
            found.apgd.n_restarts = found.fab.n_restarts = 1
            found.fab.n_target_classes = found.apgd_targeted.n_target_classes = 9
            found.square.n_queries = queries
        moved = found.run_standard_evaluation(x, y, **{"bs" if self.source else "batch_size": len(x)})
        with torch.no_grad():
            return model(moved if self.source else moved[0]).argmax(1) == y


def differences(source: Path) -> list[str]:
    """Files of the authors' package whose code is not PyPI's; imports, comments and blank lines aside."""
    spec = find_spec("pyautoattack")
    theirs = Path(spec.origin).parent if spec and spec.origin else Path()

    def code(path: Path) -> list[str]:
        lines = (re.sub(r"#.*", "", line).rstrip() for line in path.read_text().splitlines())
        return [line for line in lines if line.strip() and not re.match(r"\s*(from|import) ", line)]

    names = ("autopgd_base", "fab_base", "fab_pt", "fab_projections", "square")  # the wrapper has other names
    return [n for n in names if code(source / "autoattack" / f"{n}.py") != code(theirs / f"{n}.py")]


def same_draws(title: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str) -> list[Row]:
    """Each attack from the very same random starts, on the points that are right: verdicts point by point.

    Ours are given a generator that draws the numbers theirs draw.  Square draws in another order, so its random numbers
    differ; of it only the accuracies can be compared.
    """
    official = Official()
    with searching(model) as f:
        right = is_correct(f, x, y)
    x, y = x[right], y[right]
    ours: dict[str, Adversary] = {
        "apgd-ce": APGD(eps, norm),
        "apgd-dlr": APGD(eps, norm, loss="dlr"),
        "apgd-t": APGD(eps, norm, loss="targeted-dlr"),
        "fab-t": FAB(eps, norm),
        "square": Square(eps, norm, queries=1000),
    }
    rows = []
    for name, attack in ours.items():
        with searching(model) as f:
            mine = is_correct(f, attack.find(f, x, y, torch.Generator().manual_seed(0)), y)
        theirs = official.attack(model, x, y, eps, norm, names=(name,), queries=1000)
        metric = f"{title}: {name} {norm} {eps:.3g}, accuracy on {len(x)} right points"
        rows.append(Row(metric, official.name, _share(theirs), _share(mine), int((mine != theirs).sum()), "points"))
    return rows


def standard(title: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, batch: int) -> list[Row]:
    """All of AutoAttack, own random numbers, batch by batch in turn: accuracy, points that differ, and time."""
    official = Official()
    mine, theirs, ratios, spent = [], [], [], [0.0, 0.0]
    for start in range(0, len(x), batch):
        part, labels = x[start : start + batch], y[start : start + batch]
        begun = time.perf_counter()
        mine.append(find_verdicts(model, part, labels, AutoAttack(eps, norm), seed=start, batch=batch).standing())
        between = time.perf_counter()
        theirs.append(official.attack(model, part, labels, eps, norm))
        ended = time.perf_counter()
        ratios.append((ended - between) / (between - begun))
        spent = [spent[0] + between - begun, spent[1] + ended - between]
        print(f"  {title}: {start + len(part)}/{len(x)}, ours {spent[0]:.0f} s, theirs {spent[1]:.0f} s", flush=True)
    ours, peers = torch.cat(mine), torch.cat(theirs)
    metric = f"{title}: AutoAttack standard {norm} {eps:.3g}, accuracy on {len(x)} images"
    return [
        Row(metric, official.name, _share(peers), _share(ours), int((ours != peers).sum()), "points"),
        Row(
            f"{title}: its time, s",
            official.name,
            spent[1],
            spent[0],
            statistics.median(ratios),
            "x, median over batches",
        ),
    ]


def torchattacks(title: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Row]:
    """PGD without a random start, pixel by pixel; and C&W, on images inside (0, 1) for the peer's sake."""
    theirs, who = importlib.import_module("torchattacks"), peer("torchattacks")
    with searching(model) as f:
        attack = Attack(eps, steps=10, step_size=eps / 4, start="clean")
        mine = attack.minimize(attack.negative_loss(f, y), x, None)
    other = theirs.PGD(model, eps=eps, alpha=eps / 4, steps=10, random_start=False)(x, y)
    share = ((mine - other).abs() > 1e-6).double().mean().item()  # a gradient of 0 has either sign after rounding
    rows = [Row(f"{title}: PGD-10 from the images, share of pixels that differ", who, 0.0, share, share)]
    inside = x.clamp(0.01, 0.99)
    with searching(model) as f:
        mine = CW(c=1.0, steps=50).find(f, inside, y, torch.Generator())
    other = theirs.CW(model, c=1, kappa=0, steps=50, lr=0.01)(inside, y)
    for what, of in (("accuracy", _accuracy), ("mean l2 of its moves", _moved)):
        values = of(model, inside, y, other), of(model, inside, y, mine)
        rows.append(Row(f"{title}: C&W c=1, 50 steps, {what}", who, *values, values[1] - values[0]))
    return rows


def _accuracy(model: nn.Module, x: Tensor, y: Tensor, found: Tensor) -> float:
    with torch.no_grad():
        return _share(model(found).argmax(1) == y)


def _moved(model: nn.Module, x: Tensor, y: Tensor, found: Tensor) -> float:
    return (found - x).flatten(1).norm(dim=1).mean().item()


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()
