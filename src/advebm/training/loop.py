"""THE training loop: step, report, validate, save, stop?; timed in images.  Methods never appear in it."""

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advebm.core import config, processes, rng
from advebm.core.errors import Diverged, EarlyStop, Interrupted, UserError
from advebm.data.sources import Data
from advebm.models import modes, public_weights
from advebm.models.ema import EMA
from advebm.models.inference import View, Way, fast, view
from advebm.models.layers import Staged
from advebm.models.network import Network, transfer
from advebm.models.precision import precision_label, usable_precision
from advebm.objectives.base import Context
from advebm.runs.checkpoint import Progress
from advebm.runs.engine import Engine
from advebm.runs.find_model import find_model
from advebm.runs.recipe import Recipe, design
from advebm.runs.run import Run, environment
from advebm.training import norm_statistics
from advebm.training.batches import Feed
from advebm.training.energy_shift import EnergyShift
from advebm.training.signals import going_on, stopping
from advebm.training.validate import SELECTED, validate

Report = Callable[[Mapping[str, Any]], None]  # told every line of metrics.jsonl, images counted over all stages


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    report: Report = lambda line: None,
    tick: Callable[[int], None] = lambda images: None,
) -> Run:
    """Train a recipe in a run folder.

    Args:
        recipe: what to compute.
        folder: new or empty; with ``resume``, the one that holds this recipe's run.  Of several processes, the main
            one's.
        resume: go on from the latest checkpoint, with as many processes, to the bit on CPU; only a logged mean may miss
            what its window held before the checkpoint.
        device: ``cpu`` or ``cuda``; None takes the best there is.
        report: called with every line of ``metrics.jsonl``.
        tick: called with the images seen so far, over all stages, after every step.

    Raises:
        UserError: a bad recipe or folder.
        Diverged: non-finite numbers more often than the recipe's ``rollbacks``.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
        Lost: another process of the job is gone.
    """
    engine, cfg, objective = Engine(device), recipe.train, recipe.objective
    folder = engine.share(folder)[0]
    again = f"{processes.command(engine.world)} train --resume"
    if resume:
        begun = Run.open(folder)
        if begun.stopped_early or (begun.finished and begun.processes != engine.world):
            return begun  # nothing is left to share
        begun.check_processes(engine.world)
    streams = engine.owned(cfg.streams)
    data = recipe.data.load()
    if "labels" in objective.needs and not data.train.labelled:
        raise UserError(f"objective {type(objective).__name__} needs labels, {data.name} has none")
    if cfg.batch > len(data.train):
        raise UserError(f"train.batch is {cfg.batch}, but {data.name} has {len(data.train)} training images")
    if objective.hidden is not None and cfg.streams != engine.world:
        raise UserError(
            f"train.streams is {cfg.streams}, and there are {engine.world} processes: an encoder, which tells images "
            f"of all streams apart, takes a stream a process; set --train.streams {engine.world}"
        )
    objective.check(len(data.train), recipe.threat)
    validation = data.val.take(slice(cfg.validate_with))
    architecture = design(recipe, data)
    model = architecture.build(recipe.seed)
    feed, earlier = Feed(recipe, data, engine), sum(stage.train.images for stage in recipe.before)
    if objective.hidden is not None:
        judgeable = objective.validate is not None and len(validation) > 1
    else:
        judgeable = validation.labelled if objective.outputs != 1 else feed.outside is not None
    like = torch.empty(cfg.batch // cfg.streams, *data.shape)
    states = {s: objective.init(like, rng.generator(recipe.seed, "init", s)) for s in streams}
    fresh = not resume or not Run.open(folder).checkpoints.latest()
    if fresh and recipe.init is not None and not recipe.before:
        begin(model, recipe.init, data, recipe)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("the network has no parameters to train")
    if cfg.recompute:
        if not isinstance(model.backbone, Staged):
            raise UserError("recompute needs a backbone with stages (resnet, preact-resnet, wide-resnet, stargan)")
        model.backbone.recompute = True
    if not resume and engine.main:  # from here on nothing is wrong with what was asked for
        Run.create(folder, recipe, {**environment(engine.device, cfg.precision), "processes": engine.world})
    engine.barrier()
    run = Run.open(folder)
    if fresh and recipe.before:
        begin(model, str(prepare(recipe, run, device, report, tick, again).folder), data, recipe)
    model.to(engine.device)
    used = usable_precision(cfg.precision, engine.device)
    if used == "float64":
        model.double()
    else:
        model.precision = getattr(torch, used)
    engine.agree(model)
    ema = EMA(model, cfg.ema) if cfg.ema else None
    optimizer = recipe.optimizer.build(model.parameters())

    with (
        going_on(run, again),
        run.locked(engine.main),
        stopping() as signalled,
        torch.random.fork_rng(devices=[]),
    ):

        def save() -> None:
            meter.check()
            if engine.any(not modes.all_finite(model)):
                raise Diverged(f"weights are not finite after {progress.images:,} images")
            progress.seconds = clock.seconds()
            known = {"data": data.name, "classes": data.classes, "threat": config.describe(recipe.threat)}
            known |= {"recipe": recipe.name, "images": progress.images}
            parts = (model, ema, architecture, optimizer, states, progress)
            run.checkpoints.save(engine, *parts, title=recipe.name, extra=known)

        def tell(line: Mapping[str, Any]) -> None:
            if engine.main:
                run.log({"images": progress.images, **line})
                report({"images": earlier + progress.images, **line})

        progress, meter = Progress(), Meter(engine)
        resumed = bool(run.checkpoints.latest())
        if resumed:
            progress = run.checkpoints.load(model, ema, optimizer, states)
            run.rewind(progress.images, progress.attempt, engine.main)
        clock = Clock(progress)
        if not resumed:
            save()
        now, begun_in = precision_label(cfg.precision, engine.device), run.environment.get("precision", cfg.precision)
        if begun_in != now and progress.images < cfg.images:
            tell({"event": "precision", "reason": f"goes on in {now}; begun in {begun_in}"})
            warnings.warn(f"the run goes on in {now}; it was begun in {begun_in}", RuntimeWarning, stacklevel=2)
        model.train()
        sample = data.train.take(slice(len(like))).float().to(engine.device)
        quick = search_view(model, sample, cfg.fast, used)

        while progress.images < cfg.images:
            try:
                before, notes = progress.images, list[str]()
                logging = Progress(before + cfg.batch).passed(cfg.log_every, before, cfg.images)
                for replay in range(objective.replays):
                    optimizer.zero_grad(set_to_none=True)
                    done, statistics = [], norm_statistics.Statistics(model if cfg.streams > 1 else None)
                    for s in streams:
                        keys = (recipe.seed, progress.attempt, before, s)
                        batch = feed(before, s, keys)
                        generator = rng.generator(*keys, replay, device=engine.device)
                        ctx = Context(generator, before, engine.mean, engine.gather, notes.append)
                        torch.manual_seed(rng.derive(*keys, replay, "global"))  # dropout in modules of one's own
                        with modes.through(model, quick and quick.refresh):
                            found = objective.search(model, batch, states[s], ctx)
                        loss = objective.loss(model, batch, found, states[s], ctx)
                        (loss.total / len(streams)).backward()
                        statistics.next()
                        meter.add(loss.total, loss.terms)
                        done.append((batch, found, states[s], loss, ctx))
                    engine.average_gradients(model.parameters())
                    statistics.settle(engine.average)
                    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or torch.inf)
                    meter.add(norm, {"grad_norm": norm})
                    factor = recipe.schedule(before + cfg.batch // 2, cfg.images)
                    for group in optimizer.param_groups:
                        group["lr"] = recipe.optimizer.lr * progress.rate * factor
                    looking = logging and replay == objective.replays - 1
                    moved = objective.adversarial(done[0][0], done[0][1]) if looking else None
                    shift = EnergyShift(model, done[0][0], moved) if moved is not None else None
                    optimizer.step()
                    shifts = shift.terms() if shift is not None else {}
                    for batch, found, state, loss, ctx in done:
                        objective.after(model, batch, found, state, loss, ctx)
                progress.images += cfg.batch
                if engine.main:
                    tick(earlier + progress.images)
                if ema is not None:
                    ema.update(model, progress.images, cfg.batch)
                for note in notes:
                    tell({"event": "warning", "reason": note})
                    warnings.warn(f"after {progress.images:,} images {note}", RuntimeWarning, stacklevel=2)

                if logging:
                    speed = clock.speed(progress.images)
                    rate = optimizer.param_groups[0]["lr"]
                    used = quick.way.name if quick is not None and quick.searches else "off"  # train mode: the network
                    tell({**meter.take(), **shifts, "train/lr": rate, "perf/img_per_s": speed, "perf/fast": used})
                if judgeable and progress.passed(cfg.validate_every, before, cfg.images):
                    averaged = model if ema is None else ema.module
                    scores = engine.share(validate(averaged, data, validation, recipe, feed.outside, engine))[0]
                    attacked, clean = (scores[name] for name in SELECTED if name in scores)
                    score = (attacked, clean)
                    if score > progress.best:
                        progress.best, progress.best_images = score, progress.images
                    tell(scores)
                    clock.speed(progress.images)  # so that the next reading leaves this time out
                stop = engine.any(signalled())
                best = progress.best_images == progress.images
                if progress.passed(cfg.checkpoint_every, before, cfg.images) or best or stop:
                    save()
                if stop and progress.images < cfg.images:
                    raise Interrupted(f"saved after {progress.images:,} images; {again} {folder}")
            except EarlyStop as reason:
                progress = run.checkpoints.load(model, ema, optimizer, states)
                run.rewind(progress.images, progress.attempt, engine.main)
                tell({"event": "early stop", "reason": str(reason)})
                warnings.warn(f"{reason}: stopped at {progress.images:,} images", RuntimeWarning, stacklevel=2)
                break
            except Diverged as failure:
                if progress.attempt >= cfg.rollbacks:
                    raise Diverged(
                        f"{failure}; stopped after {cfg.rollbacks} rollbacks; last good checkpoint: "
                        f"{run.checkpoints.path()}; try a new run with a lower --optimizer.lr"
                    ) from None
                attempt, rate = progress.attempt + 1, progress.rate * cfg.backoff
                progress = run.checkpoints.load(model, ema, optimizer, states)
                progress.attempt, progress.rate = attempt, rate
                run.rewind(progress.images, attempt, engine.main)
                meter, clock = Meter(engine), Clock(progress)
                tell({"event": "rollback", "attempt": attempt, "reason": str(failure), "rate": rate})
                where = f"rollback {attempt} of {cfg.rollbacks} to {progress.images:,} images, learning rate x {rate:g}"
                warnings.warn(f"{failure}: {where}", RuntimeWarning, stacklevel=2)
    return run


def begin(model: Network, init: str, data: Data, recipe: Recipe) -> None:
    """Put the weights of a run, a published model or a file into a network that has not been trained.

    Its normalisation comes with them, unless the recipe gives one.
    """
    path, own = Path(init), copy.deepcopy(model.normalise.state_dict())
    fresh = public_weights.load(model, path) if path.is_file() else transfer(find_model(init), model)
    for name in ("mean", "std"):
        if getattr(recipe.normalise, name) is not None:
            model.normalise.load_state_dict({**model.normalise.state_dict(), name: own[name]})
    if fresh:
        warnings.warn(f"{init} has another head than {data.name} takes: {', '.join(fresh)} begin fresh", stacklevel=2)


def prepare(
    recipe: Recipe, run: Run, device: str | None, report: Report, tick: Callable[[int], None], again: str
) -> Run:
    """Train what is left of the stages before a recipe, in ``before`` of its run's folder; the last one's run."""
    init = recipe.init
    for number, (stage, folder) in enumerate(zip(recipe.before, run.before, strict=True)):
        begun = (folder / "config.yaml").exists()
        if not begun or not Run.open(folder).finished:
            offset = sum(earlier.train.images for earlier in recipe.before[:number])
            hear: dict[str, Any] = {
                "report": lambda line, offset=offset: report({**line, "images": offset + line["images"]}),
                "tick": lambda images, offset=offset: tick(offset + images),
            }
            try:
                train(dataclasses.replace(stage, init=init), folder, resume=begun, device=device, **hear)
            except Interrupted as stop:
                raise Interrupted(f"{str(stop).partition(';')[0]} of {stage.name}; {again} {run.folder}") from None
        init = str(folder)
    return Run.open(folder)


def search_view(model: Network, x: Tensor, way: Way, precision: str) -> View | None:
    """What searches call instead of the network, see ``train.fast``; ``x`` is a stream's share of a batch."""
    if way == "auto" and precision != "bfloat16":
        return None
    return view(model, x, fast(way, "bfloat16"), loud=way != "auto")


class Meter:
    """Means of what objectives log, kept on the device until they are wanted; remembers a non-finite loss."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sums: dict[str, list[Tensor]] = {}
        self.sound: Tensor | None = None

    def add(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        """One loss; looking at it is left for later, as it would make the device wait."""
        for name, value in terms.items():
            self.sums.setdefault(name, []).append(value.detach())
        finite = total.detach().isfinite()
        self.sound = finite if self.sound is None else self.sound & finite

    def check(self) -> None:
        """Raise :class:`Diverged` if any total since the last look was not finite, in any process."""
        if self.sound is not None and self.engine.any(not bool(self.sound)):
            latest = {name: round(values[-1].item(), 4) for name, values in self.sums.items() if values}
            raise Diverged(f"the loss is not finite: {latest}")

    def take(self) -> dict[str, float]:
        """The means since the last time, over processes, after a check."""
        self.check()
        means = {f"train/{k}": self.engine.mean(torch.stack(v).mean()).item() for k, v in self.sums.items()}
        self.sums, self.sound = {}, None
        return means


class Clock:
    """Seconds of training over all sessions, and images a second since the last look."""

    def __init__(self, progress: Progress) -> None:
        self.offset, self.images = progress.seconds, progress.images
        self.start = self.last = time.perf_counter()

    def seconds(self) -> float:
        """In all sessions so far."""
        return self.offset + time.perf_counter() - self.start

    def speed(self, images: int) -> float:
        """Images a second since the last call."""
        now, seen = time.perf_counter(), images - self.images
        elapsed, self.last, self.images = now - self.last, now, images
        return seen / elapsed
