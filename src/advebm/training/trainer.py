"""The operations of the training loop: a step, logging, validation, checkpoints and rollbacks."""

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advebm.core import config, rng
from advebm.core.errors import Diverged
from advebm.models import modes
from advebm.models.ema import EMA
from advebm.models.inference import View
from advebm.models.precision import precision_label
from advebm.objectives.base import Batch, Context, Loss
from advebm.runs.checkpoint import Progress
from advebm.runs.engine import Engine
from advebm.runs.run import Run
from advebm.training import norm_statistics
from advebm.training.energy_shift import EnergyShift
from advebm.training.gradient_exchange import GradientExchange
from advebm.training.setup import Setup, search_view, set_precision
from advebm.training.validate import rank, validate

Report = Callable[[Mapping[str, Any]], None]  # called with every line of metrics.jsonl, images counted over all stages
Show = Callable[[int, Tensor, Tensor], None]  # called with images seen, samples in uint8 (N, C, H, W) and classes (N,)


class Share(NamedTuple):
    """A stream's share of a step, after its gradients have been computed."""

    batch: Batch
    found: Any
    state: Any
    loss: Loss
    ctx: Context


class Trainer:
    """A run in training.

    Attributes:
        run: the run folder that everything is written to.
        model: the network that is trained.
        ema: the averaged network, which is validated and published in its place; None if the recipe has none.
        gradients: how gradients are computed and averaged over processes.
        optimizer: the optimiser of the network.
        progress: images seen, number of rollbacks, best scores.
        means: running means of the logged values, and whether every loss was finite.
        clock: training time.
        view: the faster network that searches call; None if they call the network itself.
    """

    def __init__(self, run: Run, setup: Setup, report: Report, show: Show) -> None:
        """Move the network to its device and precision, with the same weights in all processes."""
        self.run, self.setup, self.report, self.show = run, setup, report, show
        self.recipe, self.engine, self.states = setup.recipe, setup.engine, setup.states
        self.cfg, self.objective = setup.recipe.train, setup.recipe.objective
        self.seen_before = sum(stage.train.images for stage in setup.recipe.before)
        self.model = setup.model.to(self.engine.device)
        set_precision(self.model, self.cfg.precision, self.engine.device)
        self.engine.broadcast(self.model)
        self.ema = EMA(self.model, self.cfg.ema) if self.cfg.ema else None
        self.gradients = GradientExchange(self.model.parameters(), self.engine)
        self.optimizer = self.recipe.optimizer.build(self.model.parameters())
        self.progress, self.means = Progress(), RunningMeans(self.engine)
        self.clock = Clock(self.progress)
        self.view: View | None = None
        self.notes: list[str] = []
        self.warned = False  # whether the warning about an unused view was given
        self.shifts: dict[str, float] = {}

    def begin(self) -> None:
        """Load the latest checkpoint, or write the first one, and create the view for searches."""
        if self.run.checkpoints.latest():
            self.load()
        else:
            self.save()
        now = precision_label(self.cfg.precision, self.engine.device)
        before = self.run.environment.get("precision", self.cfg.precision)
        if before != now and self.progress.images < self.cfg.images:
            self.write({"event": "precision", "reason": f"goes on in {now}; begun in {before}"})
            warnings.warn(f"the run goes on in {now}; it was begun in {before}", RuntimeWarning, stacklevel=2)
        self.model.train()
        share = self.setup.data.train.take(slice(self.cfg.batch // self.cfg.streams))
        self.view = search_view(self.model, share.float().to(self.engine.device), self.cfg.fast, self.cfg.precision)

    @property
    def finished(self) -> bool:
        return self.progress.images >= self.cfg.images

    def step(self, *, measure_shift: bool = False) -> None:
        """Train on the next batch: search, loss and update, once per replay of the objective.

        With ``measure_shift``, energies before and after the attack and the last update are compared for :meth:`log`.
        """
        seen, self.shifts = self.progress.images, {}
        for replay in range(self.objective.replays):
            shares = self._take_gradients(seen, replay)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip or torch.inf)
            self.means.add(norm, {"grad_norm": norm})
            factor = self.recipe.schedule(seen + self.cfg.batch // 2, self.cfg.images)
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.optimizer.lr * self.progress.rate * factor
            x_adv = None
            if measure_shift and replay == self.objective.replays - 1:
                x_adv = self.objective.adversarial(shares[0].batch, shares[0].found)
            shift = EnergyShift(self.model, shares[0].batch, x_adv) if x_adv is not None else None
            self.optimizer.step()
            self.shifts = shift.terms() if shift is not None else {}
            for share in shares:
                self.objective.after(self.model, *share)
        self.progress.images += self.cfg.batch
        if self.ema is not None:
            self.ema.update(self.model, self.progress.images, self.cfg.batch)

    def _take_gradients(self, seen: int, replay: int) -> list[Share]:
        """Compute gradients of the mean loss over all streams, and return the shares of this process's streams."""
        self.optimizer.zero_grad(set_to_none=True)
        shares, engine, last = list[Share](), self.engine, list(self.states)[-1]
        statistics = norm_statistics.Statistics(self.model if self.cfg.streams > 1 else None)
        for stream, state in self.states.items():
            keys = (self.recipe.seed, self.progress.attempt, seen, stream)
            batch = self.setup.batches(seen, stream, keys)
            generator = rng.generator(*keys, replay, device=engine.device)
            ctx = Context(generator, seen, engine.mean, engine.gather, self.notes.append, self.view)
            torch.manual_seed(rng.derive_seed(*keys, replay, "global"))  # for dropout in user-defined modules
            result = self.objective.search(self.model, batch, state, ctx)
            loss = self.objective.loss(self.model, batch, result, state, ctx)
            self.gradients.backward(loss.total / len(self.states), exchange=stream == last)
            statistics.next()
            self.means.add(loss.total, loss.terms)
            shares.append(Share(batch, result, state, loss, ctx))
        statistics.settle(engine.average)
        return shares

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``, and report it, in the main process."""
        if self.engine.main:
            self.run.log({"images": self.progress.images, **line})
            self.report({"images": self.seen_before + self.progress.images, **line})

    def warn(self) -> None:
        """Log and emit the warnings that the objective recorded in the last step."""
        for note in self.notes:
            self.write({"event": "warning", "reason": note})
            warnings.warn(f"after {self.progress.images:,} images {note}", RuntimeWarning, stacklevel=2)
        self.notes.clear()

    def log(self) -> None:
        """Log the means since the last call, and the speed; raise :class:`Diverged` if a loss was not finite."""
        speed, rate = self.clock.speed(self.progress.images), self.optimizer.param_groups[0]["lr"]
        is_used = self.view is not None and self.view.searches > 0  # searches in train mode do not use it
        if self.cfg.fast not in ("auto", "off") and self.view is not None and not is_used and not self.warned:
            self.warned = True
            reason = f"{type(self.objective).__name__} does not search in eval mode with view=ctx.view"
            warnings.warn(f"train.fast {self.cfg.fast} is not used: {reason}", RuntimeWarning, stacklevel=2)
        name = self.view.backend.name if self.view is not None and is_used else "off"
        self.write({**self.means.take(), **self.shifts, "train/lr": rate, "perf/img_per_s": speed, "perf/fast": name})

    def validate(self) -> None:
        """Score the averaged network (or the network itself) and its samples, and note whether it is the best so far.

        Raises:
            Diverged: energies, losses or samples are not finite.
        """
        model, setup, scores = self.model if self.ema is None else self.ema.module, self.setup, dict[str, float]()
        if setup.scored:
            scores = validate(model, setup.data, setup.validation, self.recipe, setup.outside, self.engine)
        if setup.distance is not None:
            seen = self.seen_before + self.progress.images
            scores["val/fd"] = setup.distance(model, self.engine, lambda x, y: self.show(seen, x, y))
        scores = self.engine.all_gather(scores)[0]
        ranked, best = rank(scores, self.cfg.select), self.progress.best
        if ranked is not None and (best is None or ranked > best):
            self.progress.best, self.progress.best_images = ranked, self.progress.images
        self.write(scores)
        self.clock.speed(self.progress.images)  # excludes validation time from the next reading

    def save(self) -> None:
        """Write a checkpoint; raise :class:`Diverged` if a loss since the last log, or a weight, is not finite."""
        self.means.check()
        if self.engine.any(not modes.all_finite(self.model)):
            raise Diverged(f"weights are not finite after {self.progress.images:,} images")
        self.progress.seconds = self.clock.seconds()
        data, recipe = self.setup.data, self.recipe
        metadata = {"data": data.name, "classes": data.classes, "threat": config.describe(recipe.threat)}
        metadata |= {"recipe": recipe.name, "images": self.progress.images}
        parts = (self.model, self.ema, self.setup.architecture, self.optimizer, self.states, self.progress)
        self.run.checkpoints.save(self.engine, *parts, title=recipe.name, extra=metadata)

    def load(self, *, attempt: int | None = None) -> None:
        """Restore the latest checkpoint, and remove later lines from ``metrics.jsonl``.

        Lines of attempts after ``attempt`` (default: the checkpoint's) are removed as well.
        """
        self.progress = self.run.checkpoints.load(self.model, self.ema, self.optimizer, self.states)
        self.means, self.clock = RunningMeans(self.engine), Clock(self.progress)
        self.notes.clear()
        self.run.rewind(self.progress.images, self.progress.attempt if attempt is None else attempt, self.engine.main)

    def stop_early(self, reason: Exception) -> None:
        """End the run at the latest checkpoint, at the request of the objective."""
        self.load()
        self.write({"event": "early stop", "reason": str(reason)})
        warnings.warn(f"{reason}: stopped at {self.progress.images:,} images", RuntimeWarning, stacklevel=2)

    def rollback(self, failure: Diverged) -> None:
        """Restore the latest checkpoint, and continue with other random numbers and a lower learning rate.

        Raises:
            Diverged: there were ``rollbacks`` rollbacks already.
        """
        cfg = self.cfg
        if self.progress.attempt >= cfg.rollbacks:
            raise Diverged(
                f"{failure}; stopped after {cfg.rollbacks} rollbacks; last good checkpoint: "
                f"{self.run.checkpoints.path()}; try a new run with a lower --optimizer.lr"
            ) from None
        attempt, rate = self.progress.attempt + 1, self.progress.rate * cfg.backoff
        self.load(attempt=attempt)
        self.progress.attempt, self.progress.rate = attempt, rate
        self.write({"event": "rollback", "attempt": attempt, "reason": str(failure), "rate": rate})
        where = f"rollback {attempt} of {cfg.rollbacks} to {self.progress.images:,} images, learning rate x {rate:g}"
        warnings.warn(f"{failure}: {where}", RuntimeWarning, stacklevel=2)


class RunningMeans:
    """Means of the values that objectives log, kept on the device until they are read; records non-finite losses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sums: dict[str, list[Tensor]] = {}
        self.finite: Tensor | None = None

    def add(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Add one loss and its terms, without reading their values, which would synchronise the device."""
        for name, value in terms.items():
            self.sums.setdefault(name, []).append(value.detach())
        finite = total.detach().isfinite()
        self.finite = finite if self.finite is None else self.finite & finite

    def check(self) -> None:
        """Raise :class:`Diverged` if a loss since the last :meth:`take` was not finite, in any process."""
        if self.finite is not None and self.engine.any(not bool(self.finite)):
            latest = {name: round(values[-1].item(), 4) for name, values in self.sums.items() if values}
            raise Diverged(f"the loss is not finite: {latest}")

    def take(self) -> dict[str, float]:
        """Return the means since the last call, averaged over processes, after a :meth:`check`."""
        self.check()
        means = {f"train/{k}": self.engine.mean(torch.stack(v).mean()).item() for k, v in self.sums.items()}
        self.sums, self.finite = {}, None
        return means


class Clock:
    """Training time in seconds over all sessions, and speed in images per second."""

    def __init__(self, progress: Progress) -> None:
        self.offset, self.images = progress.seconds, progress.images
        self.start = self.last = time.perf_counter()

    def seconds(self) -> float:
        return self.offset + time.perf_counter() - self.start

    def speed(self, images: int) -> float:
        """Return images per second since the last call."""
        now, seen = time.perf_counter(), images - self.images
        elapsed, self.last, self.images = now - self.last, now, images
        return seen / elapsed
