"""Which points an attack breaks: every run on those that still stand, interrupted and taken up again at will."""

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import advebm
from advebm import energies
from advebm.attacks.base import Adversary, Run, correct, two_classes
from advebm.core import checks, config, files, rng
from advebm.core.errors import UserError
from advebm.core.processes import ALONE, Team
from advebm.descent import value_and_gradient
from advebm.energies import Logits
from advebm.metrics.base import Tell
from advebm.models.batching import as_images, device_of
from advebm.models.inference import View, faster_model, float32
from advebm.models.modes import searching
from advebm.models.precision import Precision, precision_label

STANDS, WRONG = -1, 0


class Verdicts(NamedTuple):
    """What became of each point: -1 it stands, 0 it is wrong as it is, k the k-th of ``attacks`` broke it; (N,)."""

    attacks: tuple[str, ...]
    broken: Tensor
    fast: str = "off"  # how the searches computed the network, see :class:`advebm.models.inference.Backend`

    def standing(self, after: int | None = None) -> Tensor:
        """Which points stand after all attacks, or after the first so many, bool (N,)."""
        return (self.broken == STANDS) | (self.broken > (len(self.attacks) if after is None else after))


def find_verdicts(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Adversary,
    *,
    seed: int = 0,
    batch: int = 500,
    precision: Precision = "float32",
    folder: Path | None = None,
    tell: Tell = lambda done, note: None,
    team: Team = ALONE,
) -> Verdicts:
    """Attack every point that is right, and keep which attack broke it.

    A run goes over the points that still stand, in full batches.  The search sees the network with its batch norms
    folded, in ``precision``; the verdict is that of the network itself, and a point that only the search took for
    broken is searched again by the same run in the network itself.  So ``precision`` changes what a search finds, never
    what counts as found.

    Args:
        model: a classifier, or a critic, which has the classes 0 and 1.
        x: images (N, C, H, W), bytes or in [0, 1], on any device.
        y: their labels, int64 (N,).
        attack: what attacks.
        seed: of all draws; those of a batch depend on the run and on the batch's place in it alone.
        batch: images at a time.
        precision: of the search.
        folder: where the state of a judgement is kept, so that a killed one goes on after its last batch and ends as
            if nothing had happened; a finished one is not done again.
        tell: told how much is done, in images.
        team: processes that share the batches of a run; verdicts are those of one; the main one keeps the state.

    Raises:
        UserError: a damaged state, an attack that left its ball, a loss that so few classes do not have, or a critic
            where there are more than two classes.
    """
    if not len(x):
        raise UserError("there are no images to attack")
    if x.dtype != torch.uint8:
        checks.images(x)
    device = device_of(model)
    with searching(model) as raw, float32():
        sample = as_images(x[:2], device)
        outputs = raw(sample).reshape(len(sample), -1).shape[1]
        f, classes = (two_classes(raw), 2) if outputs == 1 else (raw, outputs)
        if outputs == 1 and int(y.max()) > 1:
            raise UserError("accuracy needs a classifier, the model has one output; choose --metrics without it")
        checks.labels(y, len(x), classes)
        runs = attack.runs(classes) if attack.eps > 0 else []
        if not runs:
            tell(0, "")
        quick = faster_model(model, sample, precision=precision) if runs else raw
        used = quick.way.name if isinstance(quick, View) else "off"
        quick = two_classes(quick) if outputs == 1 else quick
        parts = [slice(i, i + batch) for i in range(0, len(x), batch)]
        right = torch.cat([correct(f, as_images(x[part], device), y[part].to(device)).cpu() for part in parts])
        right = team.all_gather(right)[0]  # where rounding differs, all go by one
        about: dict[str, Any] = {}
        if folder is not None:
            about = {"attack": config.describe(attack), "seed": seed, "batch": batch}
            about["precision"] = precision_label(precision, device)
            outputs_of_sample = [round(v, 2) for v in f(sample).flatten().tolist()]
            about |= {"right": _digest({"right": right}), "outputs": outputs_of_sample}
            about |= {
                "model": _digest(model.state_dict()),
                "data": _digest({"x": x, "y": y}),
                "version": advebm.__version__,
            }
        state = State(folder if team.main else None, about)
        state.run, state.next, state.broken = team.all_gather((state.run, state.next, state.broken))[0]
        if not state.broken:
            state.broken = torch.where(right, STANDS, WRONG).tolist()
        if runs and state.run == state.next == 0:
            state.save(0, 0, [])  # a folder that cannot be written is noticed now
            _check_gradient(f, sample, y[:2].to(device))
        progress = _Progress(tell, len(x), [run.passes for run in runs])
        if state.run < len(runs):
            progress.say(state.run, state.next / max(1, len(state.left(state.run))), "")
        for number in range(state.run, len(runs)):
            left = state.left(number)
            for first in range(state.next, len(left), batch * team.world):
                start, fallen = first + batch * team.rank, list[int]()
                if rows := left[start : start + batch]:
                    part, label = as_images(x[rows], device), y[rows].to(device)
                    note = f"{runs[number].attack}, {state.broken.count(STANDS)} stand"
                    heard = progress.listen(quick, number, first / len(left), len(left) / team.world, note)
                    draws = rng.generator(seed, number, start, device=device)
                    stands = _attack_batch(attack, runs[number], f, quick, heard, part, label, draws).tolist()
                    fallen = [row for row, stood in zip(rows, stands, strict=True) if not stood]
                state.save(number, first + batch * team.world, list(chain(*team.all_gather(fallen))))
            state.save(number + 1, 0, [])
        tell(len(x), f"{state.broken.count(STANDS)} stand")
    attacks = list(dict.fromkeys(run.attack for run in runs))
    table = torch.tensor([WRONG, *(attacks.index(run.attack) + 1 for run in runs), STANDS])
    return Verdicts(tuple(attacks), table[torch.tensor(state.broken, dtype=torch.long)], used)


def _attack_batch(
    attack: Adversary, run: Run, f: Logits, quick: Logits, heard: Logits, x: Tensor, y: Tensor, draws: torch.Generator
) -> Tensor:
    """Which points stand after a run that searched in ``quick``, as ``heard``, and is judged by ``f``, bool (B,)."""
    found = _within(attack, x, run.search(heard, x, y, draws))
    stands = correct(f, found, y)
    left = stands.nonzero().squeeze(1)
    again = left[~correct(quick, found[left], y[left])] if quick is not f and len(left) else left[:0]
    if len(again):  # the search stopped too early there
        found = _within(attack, x[again], run.search(f, x[again], y[again], draws))
        stands[again] = correct(f, found, y[again])
    return stands


def _within(attack: Adversary, x: Tensor, found: Tensor) -> Tensor:
    """What an attack found, if it is an image in the attack's ball."""
    move = (found - x).flatten(1)
    if not torch.isfinite(move).all():
        raise UserError(f"{attack.name} found images that are NaN; see advebm doctor")
    length = move.abs().amax(1) if attack.norm == "linf" else move.norm(dim=1)
    if not (length <= attack.eps * (1 + 1e-4) + 1e-6).all() or not ((found >= 0) & (found <= 1)).all():
        raise UserError(f"{attack.name} left its ball or the box: moves of up to {length.max():.4g}")
    return found


def _check_gradient(f: Logits, x: Tensor, y: Tensor) -> None:
    """An attack that follows a gradient of NaN goes nowhere, and everything would seem to stand."""
    try:
        _, gradient = value_and_gradient(lambda z: energies.conditional(f(z), y), x)
    except RuntimeError:  # no gradient at all: Square needs none, and the others say so themselves
        return
    if not torch.isfinite(gradient).all():
        raise UserError(
            "the model's gradient in the images is NaN or infinite: no attack can follow it; see advebm doctor"
        )


class _Progress:
    """How far a judgement is, counted in forward passes of the search."""

    def __init__(self, tell: Tell, images: int, costs: list[int]) -> None:
        self.tell, self.images, self.costs = tell, images, costs

    def listen(self, f: Logits, number: int, share: float, left: float, note: str) -> Logits:
        """``f``, which says how much is done each time it is called in the run of that number, ``share`` of it done."""
        seen = 0

        def heard(x: Tensor) -> Tensor:
            nonlocal seen
            seen += len(x)
            self.say(number, share + seen / left / self.costs[number], note)
            return f(x)

        return heard

    def say(self, number: int, share: float, note: str) -> None:
        """So large a share of the run of that number is done."""
        passes = sum(self.costs[:number]) + self.costs[number] * min(share, 1)
        self.tell(int(self.images * passes / sum(self.costs)), note)


class State:
    """Where a judgement is: its next run and batch, and the run that broke each point, from 1; in one small file.

    Args:
        folder: of the file; none keeps nothing.
        about: everything that the verdicts depend on; another judgement has another file.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"{name}.json"
        self.about, self.run, self.next = about, 0, 0
        self.broken: list[int] = []
        if self.path is not None and self.path.exists():
            kept = files.read_json(self.path)
            try:
                self.run, self.next, self.broken = kept["run"], kept["next"], kept["broken"]
            except (TypeError, KeyError):
                raise UserError(f"{self.path} is damaged; delete it to judge anew") from None

    def left(self, run: int) -> list[int]:
        """The points that stood when a run began."""
        return [i for i, by in enumerate(self.broken) if by in (STANDS, run + 1)]

    def save(self, run: int, following: int, broken: list[int]) -> None:
        """These points were broken in a run, whose next batch is ``following``; on the disk before the next begins."""
        for i in broken:
            self.broken[i] = run + 1
        self.run, self.next = run, following
        if self.path is not None:
            state = {"about": self.about, "run": run, "next": following, "broken": self.broken}
            files.write(self.path, json.dumps(state))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
