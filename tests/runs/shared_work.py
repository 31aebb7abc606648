"""What test_processes.py has done twice: by this process, and by two under ``torchrun -m tests.runs.shared_work``."""

import atexit
import contextlib
import io
import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed
from torch import nn

from advebm import cli, recipes
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.projected import Attack
from advebm.core.errors import Interrupted
from advebm.data.augment import Augment
from advebm.data.sources import Augmentations
from advebm.metrics import verdicts
from advebm.runs.checkpoint import Checkpoints
from advebm.runs.engine import Engine
from advebm.runs.recipe import Recipe, resolve
from advebm.runs.run import Run
from advebm.sampling import job
from advebm.training import gradient_exchange
from advebm.training.gradient_exchange import GradientExchange
from advebm.training.loop import train

TINY = {
    "backbone.width": 4,
    "threat.steps": 2,
    "train.batch": 16,
    "train.images": 320,
    "train.ema": 50,
    "train.log_every": 160,
    "train.validate_every": 320,
    "train.validate_with": 20,
}
EXACT = {"train.precision": "float64", "train.streams": 2}
ADAM = {"optimizer": "adam", "optimizer.lr": 3e-3}
L2 = {"objective.attack.norm": "l2", "objective.attack.eps": 0.5, "objective.attack.steps": 2}
ENCODER = {**L2, "objective.attack.start": "clean", "objective.hidden": 8, "objective.outputs": 6, "train.clip": None}
ADVERSARIAL = {"objective": "adversarial-infonce", "optimizer.lr": 1e-2, **ENCODER}


@dataclass(frozen=True)
class Turned(Augment):
    """A second view without anything random, so that one process sees what two see."""

    def __call__(self, x, generator):
        return x.transpose(2, 3).contiguous()


def encoder(**options: object) -> Recipe:
    """An encoder's recipe, whose views are the same whatever stream they are of."""
    options = {k.replace("__", "."): v for k, v in options.items()}
    recipe = make("digits-infonce", {**EXACT, "backbone.norm": "none", **ADVERSARIAL, **options})
    return replace(recipe, data=replace(recipe.data, augment=Augmentations(view=Turned())))


def make(name: str, options: dict[str, object]) -> Recipe:
    """A recipe of the package, cut down to twenty steps of a tiny network."""
    return resolve(recipes.find(name), [*TINY.items(), *options.items()])


def objectives() -> dict[str, Recipe]:
    """What two processes compute as one does."""
    plain = {**EXACT, "backbone.norm": "none"}
    chains = {"objective.negatives.steps": 2, "objective.negatives.buffer": 24}
    curve = {
        "outside": "noise",
        "objective.curriculum.steps": 3,
        "objective.curriculum.window": 32,
        "objective.step_size": 0.3,
    }
    fixed = {"objective.curriculum.start": 3}
    return {
        "at": make("digits-at", {**plain, **L2, **ADAM}),
        "trades": make("digits-trades", {**plain, **L2, **ADAM}),
        "jem": make("digits-jem", {**plain, **chains}),
        "binary-at": make("digits-binary-at", {**plain, **curve, "objective.curriculum.images_per_step": 64}),
        "at, one stream": make("digits-at", {**plain, **L2, **ADAM, "objective.attack.start": "clean"}),
        "binary-at, one stream": make("digits-binary-at", {**plain, **curve, **fixed}),
        "nt-xent": encoder(objective__consistency=1.0),
        "infonce": encoder(objective__form="infonce", objective__temperature=0.1),
        "drift": encoder(objective__langevin=0.0),
        "batch norm": make("digits-trades", {**EXACT, **L2}),
        "dual": make("digits-at", {**EXACT, **L2, "backbone.norm": "dual", "data.augment.x.crop": 1}),
    }


def stopped() -> Recipe:
    """Chains, noise, crops, moving statistics, averaged weights and samples to select by, in float32."""
    options = {"objective.negatives.steps": 2, "objective.negatives.buffer": 24, "data.augment.x.crop": 1}
    options |= {"train.select": "fd", "train.features": "pixels", "train.samples": 520, "sampler.steps": 2}
    period = {"train.images": 960, "train.checkpoint_every": 160, "train.validate_every": 320}
    return make("digits-jem", {"backbone.norm": "batch", "train.streams": 2, **options, **period})


def dual() -> Recipe:
    """An encoder whose halves have statistics of their own."""
    options = {"objective.hidden": 8, "objective.attack.steps": 1, "train.streams": 2, "train.validate_every": 160}
    return make("digits-acl", options)


def command(*words: object) -> tuple[int, str]:
    """A command's status and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = cli.main([*map(str, words)])
    return status, printed.getvalue()


def measure(run: Run, engine: Engine, folder: Path) -> dict[str, list[int]]:
    """The verdicts of two attacks on what a network says of digits, in batches of 6."""
    split, model = run.recipe.data.load().test, run.model()[0]
    with torch.no_grad():
        y = model(split.x.float() / 255).argmax(1)
    y[::5] = (y[::5] + 1) % 10
    noise = Attack(eps=2.0, norm="l2", steps=1, step_size=1e-6, restarts=2)  # its draws are all there is to it
    attacks = {"noise": noise, "auto": AutoAttack(eps=0.1, version="quick")}
    found = {}
    for name, attack in attacks.items():
        count = 40 if name == "noise" else 8
        options = {"batch": 6 if name == "noise" else 3, "folder": folder / name, "team": engine}
        found[name] = verdicts.find_verdicts(model, split.x[:count], y[:count], attack, **options).broken.tolist()
    return found


def work(folder: Path, engine: Engine) -> dict[str, object]:
    """Everything but what is about two processes alone."""
    alone = engine.world == 1
    counts = {"chunks": 0, "batches": 0}

    def counted(name, f):
        def call(*arguments):
            counts[name] += 1
            return f(*arguments)

        return call

    for name, recipe in objectives().items():
        one = alone and (recipe.objective.hidden is not None or "one stream" in name)  # a batch at once, not in shares
        recipe = replace(recipe, train=replace(recipe.train, streams=1)) if one else recipe
        train(recipe, folder / name, device="cpu")
    draw, attacked = job.WorkerState.draw, verdicts._attack_batch
    job.WorkerState.draw, verdicts._attack_batch = counted("chunks", draw), counted("batches", attacked)
    try:
        run = folder / "batch norm"
        sampled = command("sample", run, "--per-class", 110, "--steps", 2, "--device", "cpu")
        evaluated = command("evaluate", run, "--metrics", "accuracy,robust-accuracy,energies", "--device", "cpu")
        broken = measure(Run.open(run), engine, folder / "verdicts")
    finally:
        job.WorkerState.draw, verdicts._attack_batch = draw, attacked
    return {**counts, "broken": broken, "sample": sampled, "evaluate": evaluated}


def leaving(folder: Path) -> None:
    """Say whether this process ends with connections to the other, and with which threads."""
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    known = {"connected": torch.distributed.is_initialized(), "threads": threads}
    (folder / f"leaving-{os.environ['RANK']}.json").write_text(json.dumps(known))


def main(folder: Path) -> None:
    """The part of one of two processes."""
    torch.set_num_threads(1)
    gradient_exchange.BUCKET = 512  # bytes, so that several buckets are sent
    atexit.register(leaving, folder)  # called after what the engine registers
    engine = Engine("cpu")
    known = work(folder, engine)
    train(dual(), folder / ("acl" if engine.main else "elsewhere"), device="cpu")

    def stop(line):
        if line["images"] > 300:
            os.kill(os.getpid(), signal.SIGTERM)  # to the main process alone

    for name in ("whole", "stopped"):
        try:
            train(stopped(), folder / name, device="cpu", report=stop if name == "stopped" else lambda line: None)
        except Interrupted as reason:
            known["stop"] = str(reason)
            train(stopped(), folder / name, resume=True, device="cpu")
    train(stopped(), folder / "killed", resume=True, device="cpu")

    lone = nn.Linear(2, 2)  # of which each process begins with another, and uses another part
    nn.init.constant_(lone.weight, float(engine.rank))
    engine.broadcast(lone)
    known["agreed"] = lone.weight.tolist()
    pair = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    GradientExchange(pair, engine).backward(pair[engine.rank].sum())
    known["gradients"] = [p.grad if p.grad is None else p.grad.item() for p in pair]
    known["shared"] = engine.all_gather(engine.rank)
    known["rows"] = engine.gather(torch.full((1,), float(engine.rank))).tolist()
    (folder / f"known-{engine.rank}.json").write_text(json.dumps(known))


def killed(words: list[str]) -> int:
    """A command during which the second process is killed, once, when the checkpoint of 160 images is whole."""
    save = Checkpoints.save

    def last(checkpoints: Checkpoints, engine: Engine, *parts: object, **about: object) -> None:
        save(checkpoints, engine, *parts, **about)
        is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if engine.rank == 1 and checkpoints.latest() == "160" and is_first:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = last
    return cli.main(words)


if __name__ == "__main__":
    sys.exit(killed(sys.argv[2:]) if sys.argv[1] == "kill" else main(Path(sys.argv[1])))
