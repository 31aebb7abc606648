"""Measure several models by one protocol, each in its own run; table and picture are written after every model."""

import copy
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advebm.attacks.projected import Attack
from advebm.core import config, console, files
from advebm.core.errors import UserError
from advebm.data.sources import Data
from advebm.evaluation import compare
from advebm.evaluation.leaderboard import (
    SAMPLER,
    Leaderboard,
    Protocol,
    Row,
    default_features,
    find_tier,
    is_judge,
    measure_seconds,
    most_robust_first,
)
from advebm.reporting import leaderboard as pages
from advebm.runs.find_model import trained_threat
from advebm.runs.find_space import find_space
from advebm.runs.recipe import resolve
from advebm.runs.run import Run, environment
from advebm.workflows.adopt import open_each
from advebm.workflows.devices import choose_device
from advebm.workflows.sample import draw_set, is_drawn

Overrides = Iterable[tuple[str, Any]]
FAULTS = (UserError, RuntimeError)  # of a model that is left out: wrong input, and what torch raises


def rank(
    models: Sequence[str | Run],
    overrides: Overrides = (),
    *,
    tier: str = "quick",
    features: str | Path | None = None,
    out: Path | None = None,
    replace: bool = False,
    device: str | None = None,
    seed: int = 0,
) -> Leaderboard:
    """Measure models by one protocol; what their runs hold already is not measured again.

    A model that cannot be opened or measured is told of, and its row says why; the others are measured all the same.

    Args:
        models: runs, or references to models, see :func:`advebm.workflows.adopt.open_run`.
        overrides: options of ``data``, for models that do not know theirs; ``threat.eps`` and ``threat.norm``; options
            of ``sampler``.
        tier: how much is measured, see :data:`advebm.evaluation.leaderboard.TIERS`.
        features: judge of the samples, as ``--features`` names it; None: the one that the package brings for the data,
            or else pixels.
        out: folder of ``leaderboard.json``, ``leaderboard.md`` and ``leaderboard.png``; None: ``leaderboard``, or with
            a number if there is one of another protocol.
        replace: whether to replace one of another protocol.
        device: None: the best one available.
        seed: seed of all random numbers.

    Raises:
        UserError: no model can be measured, an unknown tier or option, or a leaderboard of another protocol in ``out``.
    """
    find_tier(tier)
    overrides, device = list(overrides), choose_device(device)
    given = {str(m.folder) if isinstance(m, Run) else m: m for m in models}
    rows = {where: Row(where, where) for where in given}

    def fail(where: str, error: Exception) -> None:
        rows[where].why = textwrap.shorten(str(error), 300, placeholder=" …")
        console.say(f"{rows[where].title}: {rows[where].why}")

    of_data = [pair for pair in overrides if pair[0].partition(".")[0] == "data"]
    runs = {where: model for where, model in given.items() if isinstance(model, Run)}
    runs |= open_each([where for where in given if where not in runs], of_data, failed=fail)
    runs = {where: runs[where] for where in given if where in runs}
    names = [run.recipe.name for run in runs.values()]
    for where, name in zip(runs, names, strict=True):
        rows[where].title = name if names.count(name) == 1 else where
    runs = share_data(runs, fail)
    if not runs:
        raise UserError(f"no model can be measured: {'; '.join(f'{where}: {row.why}' for where, row in rows.items())}")
    shared = next(iter(runs.values())).data
    features = str(features or default_features(shared))
    find_space(features).load(device)  # fail now, not after the attacks
    protocol = choose_protocol(list(runs.values()), [p for p in overrides if p not in of_data], tier, features, seed)
    empty = Leaderboard(protocol, [], shared, {}, Path()).describe()
    ours = json.loads(json.dumps({name: empty[name] for name in ("protocol", "images")}))

    def taken(path: Path) -> bool:
        there = files.read_json(path / "leaderboard.json", default=ours)
        return not isinstance(there, dict) or {name: there.get(name) for name in ours} != ours

    out = files.new_path(out or Path("leaderboard"), named=out is not None, replace=replace, taken=taken)
    about = environment(torch.device(device))

    def write() -> Leaderboard:
        board = Leaderboard(protocol, most_robust_first(rows.values()), shared, about, out)
        pages.write(board)
        return board

    left: dict[str, float] = {}
    with console.bar("models timed", len(runs), 0) as tell:
        for done, (where, run) in enumerate(runs.items(), 1):
            try:
                left[where] = estimate(run, rows[where], protocol, device)
            except FAULTS as error:
                fail(where, error)
            tell(done)
    for number, where in enumerate(list(left), 1):
        own, rest = (_span(seconds) for seconds in (left[where], sum(left.values())))
        console.say(f"{rows[where].title}, {number} of {len(left)}: up to {own}; all that is left: up to {rest}")
        try:
            measure(runs[where], rows[where], protocol, device)
        except FAULTS as error:
            fail(where, error)
        left[where] = 0.0
        board = write()
    return board if left else write()


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:,.0f} min"


def share_data(runs: Mapping[str, Run], fail: Callable[[str, Exception], None]) -> dict[str, Run]:
    """Return copies of runs that share the images of the first, without those whose test images are others.

    So all chains start from Gaussians of the same training images, which are also what samples are compared with.
    """
    shared: Data | None = None
    copies: dict[str, Run] = {}
    for where, run in runs.items():
        try:
            own, architecture = run.data, run.model()[1]
            if architecture.hidden is not None or architecture.outputs != len(own.classes):
                raise UserError(f"it is no classifier of {len(own.classes)} classes; leaderboards are of classifiers")
            shared = own._replace(gaussians=None) if shared is None else shared
            if own.classes != shared.classes or not torch.equal(own.test.x, shared.test.x):
                raise UserError(f"it has other test images or classes than {next(iter(copies))}")
        except UserError as error:
            fail(where, error)
            continue
        copies[where] = copy.copy(run)
        copies[where].data = shared
    return copies


def choose_protocol(runs: Sequence[Run], overrides: Overrides, tier: str, features: str, seed: int) -> Protocol:
    """Return the protocol; the threat model is that of the first run that knows what its model was trained for."""
    overrides = list(overrides)
    for name, _ in overrides:
        if name.partition(".")[0] == "threat" and name not in ("threat.eps", "threat.norm"):
            raise UserError(f"the tier says which attack: --threat.eps and --threat.norm are its ball, got --{name}")
    known = (trained_threat(run.recipe) for run in runs)
    threat = next(filter(None, known), runs[0].recipe.threat)
    plain = {**config.describe(runs[0].recipe), "threat": config.describe(threat, Attack)}
    recipe = resolve({**plain, "sampler": config.describe(SAMPLER)}, overrides)
    return Protocol.of(tier, recipe.threat, recipe.sampler, features, seed)


def estimate(run: Run, row: Row, protocol: Protocol, device: str) -> float:
    """Return about how many seconds all that is missing takes at most, from the time that drawing takes."""
    row.parameters = sum(p.numel() for p in run.model()[0].parameters())
    record = measure_seconds(run, protocol, device)
    row.add([record])
    attacks, draws = protocol.gradients(run.data)
    metrics = protocol.metrics()
    attacks *= compare.current_records(run, metrics, seed=protocol.seed).keys() != metrics.keys()
    draws *= not (is_judge(run, protocol.features) or is_drawn(run, **sample_set(run, protocol, device)))
    return (attacks + draws) * record["value"] / record["count"] / max(1, protocol.sampler.steps)


def measure(run: Run, row: Row, protocol: Protocol, device: str) -> None:
    """Measure what the run does not hold yet, and put it into the row."""
    shown: dict[str, Any] = {"device": device, "seed": protocol.seed, "bar": console.bar}
    shown["progress"] = lambda name: console.say(f"{row.title}: {name}")
    row.add(compare.measure(run, protocol.metrics(), sets=(), **shown))
    if is_judge(run, protocol.features):
        row.why = "it is the judge, so its samples are not judged"
        return
    plan = sample_set(run, protocol, device)
    if not is_drawn(run, **plan):
        draw_set(run, **plan)
    row.samples = run.samples()[protocol.set_name]
    found = compare.measure(run, protocol.quality(), features=protocol.features, sets=(protocol.set_name,), **shown)
    row.add([*found, *compare.records_beside(run, found[0], ("class score",))])


def sample_set(run: Run, protocol: Protocol, device: str) -> dict[str, Any]:
    """Return what :func:`draw_set` is told of the set of a run."""
    plan = {"name": protocol.set_name, "sampler": protocol.sampler, "per_class": protocol.per_class(run.data)}
    return {**plan, "seed": protocol.seed, "device": device, "about": {"starts_of": run.data.digest()}}
