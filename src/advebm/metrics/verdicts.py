"""Which images an attack breaks; each of its runs attacks only those not broken before; resumable if interrupted."""

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
from advebm.attacks.base import Adversary, AttackRun, critic_as_classifier, is_correct
from advebm.core import checks, config, files, rng
from advebm.core.errors import UserError
from advebm.core.processes import ALONE, Team
from advebm.descent import value_and_gradient
from advebm.energies import Logits
from advebm.metrics.base import ProgressCallback
from advebm.models.batching import as_images, device_of
from advebm.models.inference import View, faster_model
from advebm.models.modes import searching
from advebm.models.precision import Precision, float32, precision_label

STANDS, WRONG = -1, 0  # not broken by any run; misclassified without an attack


class Verdicts(NamedTuple):
    """The result of an attack for each image."""

    attacks: tuple[str, ...]  # names of the attacks, in order
    broken: Tensor  # (N,): -1 not broken, 0 misclassified without an attack, k broken by the k-th of ``attacks``
    fast: str = "off"  # how searches computed the network, see :class:`advebm.models.inference.Backend`

    def __repr__(self) -> str:
        counts = {"wrong without attack": int((self.broken == WRONG).sum())}
        counts |= {f"broken by {name}": int((self.broken == k).sum()) for k, name in enumerate(self.attacks, 1)}
        rest = ", ".join(f"{count:,} {what}" for what, count in counts.items())
        return f"Verdicts: {int(self.standing().sum()):,} of {len(self.broken):,} images stand; {rest}"

    def standing(self, after: int | None = None) -> Tensor:
        """Return which images are still right after the first ``after`` attacks, bool (N,).  None: after all."""
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
    tell: ProgressCallback = lambda done, note: None,
    team: Team = ALONE,
) -> Verdicts:
    """Attack every correctly classified image, and record which attack broke it.

    Each run (one start towards one target) attacks the images not yet broken, in full batches.  The search uses a
    faster version of the network, with batch norms folded, in ``precision``.  The network itself decides whether an
    image is broken; if only the faster version was fooled, the run is repeated on that image with the network itself.
    So ``precision`` affects what a search finds, but never what counts as broken.

    Args:
        model: a classifier, or a critic (one output), treated as a classifier of the classes 0 and 1.
        x, y: images (N, C, H, W), uint8 or in [0, 1], on any device, and labels, int64 (N,).
        attack: the attack; ``eps`` 0 attacks nothing.
        seed: seed of all draws; for a batch they depend only on the seed, the run and the position of the batch.
        batch, precision: batch size, and precision of the search.
        folder: where progress is saved, so that an interrupted call resumes after its last batch with the same result,
            and a finished one is not repeated.  None: progress is not saved.
        tell: called with the amount done, in images, and a note.
        team: processes that divide the batches of a run; the results equal those of one process.  The main process
            saves the progress.

    Raises:
        UserError: no images, a damaged progress file, an attack that left its ball or gave NaN, a gradient that is not
            finite, a loss that needs more classes, or labels above 1 for a critic.
    """
    if not len(x):
        raise UserError("there are no images to attack")
    if x.dtype != torch.uint8:
        x = checks.images(x)
    device = device_of(model)
    with searching(model) as raw, float32():
        sample = as_images(x[:2], device)
        outputs = raw(sample).reshape(len(sample), -1).shape[1]
        f, classes = (critic_as_classifier(raw), 2) if outputs == 1 else (raw, outputs)
        if outputs == 1 and int(y.max()) > 1:
            raise UserError("accuracy needs a classifier, the model has one output; choose --metrics without it")
        y = checks.labels(y, len(x), classes)
        runs = attack.runs(classes) if attack.eps > 0 else []
        if not runs:
            tell(0, "")
        fast = faster_model(model, sample, precision=precision) if runs else raw
        backend = fast.backend.name if isinstance(fast, View) else "off"
        fast = critic_as_classifier(fast) if outputs == 1 else fast
        parts = [slice(i, i + batch) for i in range(0, len(x), batch)]
        right = torch.cat([is_correct(f, as_images(x[part], device), y[part].to(device)).cpu() for part in parts])
        right = team.all_gather(right)[0]  # rounding may differ between processes: all use that of rank 0
        about: dict[str, Any] = {}
        if folder is not None:
            about = {
                "attack": config.describe(attack),
                "seed": seed,
                "batch": batch,
                "precision": precision_label(precision, device),
                "right": _hash({"right": right}),
                "outputs": [round(v, 2) for v in f(sample).flatten().tolist()],
                "model": _hash(model.state_dict()),
                "data": _hash({"x": x, "y": y}),
                "version": advebm.__version__,
            }
        state = State(folder if team.main else None, about)
        state.run, state.next, state.broken = team.all_gather((state.run, state.next, state.broken))[0]
        if not state.broken:
            state.broken = torch.where(right, STANDS, WRONG).tolist()
        if runs and state.run == state.next == 0:
            state.save(0, 0, [])  # fail now if the folder cannot be written
            _check_gradient(f, sample, y[:2].to(device))
        progress = _Progress(tell, len(x), [run.passes for run in runs])
        if state.run < len(runs):
            progress.say(state.run, state.next / max(1, len(state.left(state.run))), "")
        for number in range(state.run, len(runs)):
            left = state.left(number)
            for first in range(state.next, len(left), batch * team.world):
                start, broken = first + batch * team.rank, list[int]()
                if rows := left[start : start + batch]:
                    images, labels = as_images(x[rows], device), y[rows].to(device)
                    note = f"{runs[number].attack}, {state.broken.count(STANDS)} stand"
                    reporting = progress.report_calls(fast, number, first / len(left), len(left) / team.world, note)
                    draws = rng.generator(seed, number, start, device=device)
                    stands = _attack_batch(attack, runs[number], f, fast, reporting, images, labels, draws).tolist()
                    broken = [row for row, stood in zip(rows, stands, strict=True) if not stood]
                state.save(number, first + batch * team.world, list(chain(*team.all_gather(broken))))
            state.save(number + 1, 0, [])
        tell(len(x), f"{state.broken.count(STANDS)} stand")
    attacks = list(dict.fromkeys(run.attack for run in runs))
    table = torch.tensor([WRONG, *(attacks.index(run.attack) + 1 for run in runs), STANDS])
    return Verdicts(tuple(attacks), table[torch.tensor(state.broken, dtype=torch.long)], backend)


def _attack_batch(
    attack: Adversary,
    run: AttackRun,
    f: Logits,
    fast: Logits,
    reporting: Logits,
    x: Tensor,
    y: Tensor,
    draws: torch.Generator,
) -> Tensor:
    """Return which images survive a run, judged by ``f``, bool (B,); ``reporting`` is ``fast`` with reports."""
    x_adv = run.search(reporting, x, y, draws)
    _check_ball(attack, x, x_adv)
    stands = is_correct(f, x_adv, y)
    left = stands.nonzero().squeeze(1)
    again = left[~is_correct(fast, x_adv[left], y[left])] if fast is not f and len(left) else left[:0]
    if len(again):  # broken only according to the faster network
        x_adv = run.search(f, x[again], y[again], draws)
        _check_ball(attack, x[again], x_adv)
        stands[again] = is_correct(f, x_adv, y[again])
    return stands


def _check_ball(attack: Adversary, x: Tensor, x_adv: Tensor) -> None:
    """Raise UserError if ``x_adv`` is NaN or lies outside the attack's ball around ``x`` or [0, 1]."""
    move = (x_adv - x).flatten(1)
    if not torch.isfinite(move).all():
        raise UserError(f"{attack.name} found images that are NaN; see advebm doctor")
    length = move.abs().amax(1) if attack.norm == "linf" else move.norm(dim=1)
    if not (length <= attack.eps * (1 + 1e-4) + 1e-6).all() or not ((x_adv >= 0) & (x_adv <= 1)).all():
        raise UserError(f"{attack.name} left its ball or the box: moves of up to {length.max():.4g}")


def _check_gradient(f: Logits, x: Tensor, y: Tensor) -> None:
    """Raise UserError if gradients are not finite: attacks would not move, and every image would seem robust."""
    try:
        _, gradient = value_and_gradient(lambda z: energies.conditional(f(z), y), x)
    except (RuntimeError, UserError):  # no gradient at all: Square needs none, other attacks raise an error themselves
        return
    if not torch.isfinite(gradient).all():
        raise UserError(
            "the model's gradient in the images is NaN or infinite: no attack can follow it; see advebm doctor"
        )


class _Progress:
    """Progress of :func:`find_verdicts`, measured in forward passes of the searches."""

    def __init__(self, tell: ProgressCallback, images: int, costs: list[int]) -> None:
        self.tell, self.images, self.costs = tell, images, costs

    def report_calls(self, f: Logits, number: int, share: float, left: float, note: str) -> Logits:
        """Return ``f``, made to report progress at each call.

        ``share`` of the run with index ``number`` is done; the run attacks ``left`` images in each process.
        """
        passes = 0

        def reporting(x: Tensor) -> Tensor:
            nonlocal passes
            passes += len(x)
            self.say(number, share + passes / left / self.costs[number], note)
            return f(x)

        return reporting

    def say(self, number: int, share: float, note: str) -> None:
        passes = sum(self.costs[:number]) + self.costs[number] * min(share, 1)
        self.tell(int(self.images * passes / sum(self.costs)), note)


class State:
    """Saved progress, a small JSON file: next run, next batch, and for each image the run (from 1) that broke it.

    Args:
        folder: folder of the file.  None: nothing is read or saved.
        about: everything that the verdicts depend on; its hash is the file's name.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"{name}.json"
        self.about, self.run, self.next = about, 0, 0
        self.broken: list[int] = []
        if self.path is not None and self.path.exists():
            saved = files.read_json(self.path)
            try:
                self.run, self.next, self.broken = saved["run"], saved["next"], saved["broken"]
            except (TypeError, KeyError):
                raise UserError(f"{self.path} is damaged; delete it to judge anew") from None

    def left(self, run: int) -> list[int]:
        """Return the indices of the images not broken when the run with index ``run`` began."""
        return [i for i, by in enumerate(self.broken) if by in (STANDS, run + 1)]

    def save(self, run: int, following: int, broken: list[int]) -> None:
        """Mark images as broken by the run with index ``run``, and save that its next batch starts at ``following``."""
        for i in broken:
            self.broken[i] = run + 1
        self.run, self.next = run, following
        if self.path is not None:
            state = {"about": self.about, "run": run, "next": following, "broken": self.broken}
            files.write(self.path, json.dumps(state))


def _hash(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
