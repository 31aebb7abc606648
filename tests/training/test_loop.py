"""The loop: it learns, resumes to the bit, survives signals, rolls back, refuses bad folders."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from advebm import recipes
from advebm.cli import main
from advebm.core import console
from advebm.core.errors import Diverged, Interrupted, UserError
from advebm.core.rng import rand
from advebm.data.npz import Npz
from advebm.data.sources import Digits
from advebm.models.factory import Own
from advebm.objectives.base import Batch, Context, Loss
from advebm.objectives.standard import Standard
from advebm.runs.checkpoint import Progress
from advebm.runs.engine import Engine
from advebm.runs.optim import SGD, Cosine, Cyclic, Steps
from advebm.runs.recipe import dump, resolve
from advebm.runs.run import Run
from advebm.training import setup, trainer, validate
from advebm.training.loop import train
from tests.helpers import tiny

RNG = np.random.default_rng(0)


def weights(run, name="model"):
    return load_file(run.checkpoints.path() / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_folder_holds_what_every_stage_needs(small_run):
    assert {"config.yaml", "env.json", "metrics.jsonl", "checkpoints"} <= {p.name for p in small_run.folder.iterdir()}
    assert small_run.recipe == tiny()
    path = small_run.checkpoints.path()
    assert path.name == "6016"  # 47 batches of 128
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert files == {"model.safetensors", "ema.safetensors", "config.json", "README.md"} | {
        f"state/{n}" for n in ("optimizer.pt", "progress.json", "sha256.json")
    }
    assert len(small_run.checkpoints.names()) <= 3
    assert not list((small_run.folder / "checkpoints").glob(".*"))


def test_training_learns_and_logs(small_run):
    lines = small_run.history()
    logged = [line for line in lines if "train/loss" in line]
    assert [line["images"] for line in logged] == [1024, 2048, 3072, 4096, 5120, 6016]
    assert logged[-1]["train/loss"] < logged[0]["train/loss"] - 0.5
    scores = [line for line in lines if "val/accuracy" in line]
    assert [line["images"] for line in scores] == [3072, 6016]
    assert scores[-1]["val/accuracy"] > 0.8
    assert scores[-1]["val/robust_accuracy"] < scores[-1]["val/accuracy"]
    assert logged[0]["perf/img_per_s"] > 0


def test_best_is_the_checkpoint_of_the_best_validation_score(small_run):
    scores = {line["images"]: line["val/robust_accuracy"] for line in small_run.history() if "val/accuracy" in line}
    assert small_run.checkpoints.path("best").name == str(max(scores, key=scores.get))
    model = small_run.model("best")[0]
    data = small_run.recipe.data.load()
    measured = validate.validate(model, data, data.val, small_run.recipe)
    assert measured["val/robust_accuracy"] == max(scores.values())


def test_the_seed_decides_everything(tmp_path):
    recipe = tiny("digits-standard", train__images=1000)
    runs = [train(r, tmp_path / n, device="cpu") for n, r in (("a", recipe), ("b", recipe))]
    other = train(dataclasses.replace(recipe, seed=1), tmp_path / "c", device="cpu")
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(other))


def test_averaged_weights_are_what_is_validated_and_loaded(small_run):
    assert not same(weights(small_run), weights(small_run, "ema"))
    loaded = small_run.model()[0].state_dict()
    assert same(loaded, weights(small_run, "ema"))


def test_streams_are_shares_of_one_batch(tmp_path):
    """Without batch norm or noise, two streams accumulate the gradient of one batch."""
    options = {"backbone__norm": "group", "train__images": 512, "train__clip": "none"}
    one = train(tiny("digits-standard", **options), tmp_path / "one", device="cpu")
    two = train(tiny("digits-standard", train__streams=2, **options), tmp_path / "two", device="cpu")
    for a, b in zip(weights(one).values(), weights(two).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_train_the_same_network(tmp_path):
    recipe = resolve(recipes.find("digits-at"), [("backbone", {"kind": "resnet", "depth": 8, "width": 4})])
    short = dataclasses.replace(recipe.train, images=256, batch=64)
    plain, again = (
        train(dataclasses.replace(recipe, train=dataclasses.replace(short, recompute=on)), tmp_path / str(on))
        for on in (False, True)
    )
    assert same(weights(plain), weights(again))
    with pytest.raises(UserError, match="recompute needs a backbone with stages"):
        train(tiny(train__recompute=True), tmp_path / "small", device="cpu")


def command(*arguments):
    return [sys.executable, "-m", "advebm", *map(str, arguments)]


def write_config(path, recipe):
    path.write_text(dump(recipe))
    return path


def start(config, folder):
    return subprocess.Popen(
        command("train", "--config", config, "--out", folder, "--device", "cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder, images, process):
    deadline = time.monotonic() + 120
    latest = folder / "checkpoints" / "LATEST"
    while not (latest.exists() and int(latest.read_text() or 0) >= images):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_and_resume_give_the_weights_of_an_uninterrupted_run(tmp_path):
    """Adversarial training with random starts, augmentation, EMA and momentum; killed twice, at whatever moment."""
    recipe = tiny(train__images=16_000, train__checkpoint_every=1_000, data__augment__x__crop=1)
    config = write_config(tmp_path / "c.yaml", recipe)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    folder = tmp_path / "killed"
    first = start(config, folder)
    wait_for(folder, 2_000, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = subprocess.Popen(
        command("train", "--resume", folder, "--device", "cpu"), stderr=subprocess.PIPE, text=True
    )
    wait_for(folder, 6_000, second)
    second.kill()
    second.communicate()
    killed = Run.open(folder)
    assert int(killed.checkpoints.path().name) < recipe.train.images, "killed too late to show anything"
    train(killed.recipe, folder, resume=True, device="cpu")
    for name in ("model", "ema"):
        assert same(weights(whole, name), weights(killed, name))
    numbers = lambda run: [
        {k: v for k, v in line.items() if k != "perf/img_per_s"} for line in run.history() if "val/accuracy" in line
    ]
    assert numbers(whole) == numbers(killed)
    images = [line["images"] for line in killed.history() if "train/loss" in line]
    assert images == sorted(set(images))


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_prints_the_command_that_resumes(tmp_path, sign):
    recipe = tiny(train__images=200_000, train__checkpoint_every=1_000_000, train__validate_every=1_000_000)
    folder = tmp_path / "run"
    process = start(write_config(tmp_path / "c.yaml", recipe), folder)
    wait_for(folder, 0, process)
    time.sleep(1.5)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"advebm train --resume {folder}" in err
    assert "Traceback" not in err
    assert int(Run.open(folder).checkpoints.path().name) > 0


def test_interrupted_in_the_same_process(tmp_path):
    """Stopping between two checkpoints loses nothing: the rest gives the weights of an uninterrupted run."""
    recipe = tiny("digits-standard", train__images=2_000)
    handler = signal.getsignal(signal.SIGINT)
    whole = train(recipe, tmp_path / "whole", device="cpu")

    def interrupt(line):
        if line["images"] > 1_000:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="--resume"):
        train(recipe, tmp_path / "stopped", device="cpu", report=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    run = train(recipe, tmp_path / "stopped", resume=True, device="cpu")
    assert same(weights(whole), weights(run))


@dataclasses.dataclass(frozen=True)
class Exploding(Standard):
    """Standard training whose loss is not finite after ``at`` images: once, or ``forever``."""

    at: int = 1_500
    forever: bool = False

    def loss(self, model, batch: Batch, found, state, ctx: Context) -> Loss:
        loss = super().loss(model, batch, found, state, ctx)
        draw = rand(torch.empty(()), ctx.generator).item()
        SEEN.append((ctx.images, draw))
        first = len([images for images, _ in SEEN if images >= self.at]) == 1
        explode = first or (self.forever and ctx.images >= self.at)
        return Loss(loss.total * math.inf if explode else loss.total, loss.terms)


SEEN: list[tuple[int, float]] = []


def exploding(**options):
    SEEN.clear()
    base = tiny("digits-standard", train__images=3_000, train__checkpoint_every=500)
    return dataclasses.replace(base, objective=Exploding(**options))


def test_a_non_finite_loss_rolls_back_loudly_with_a_lower_rate(tmp_path):
    SEEN.clear()
    recipe = dataclasses.replace(exploding(), schedule=Steps())
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, rollbacks=100))
    with pytest.warns(
        RuntimeWarning, match=r"the loss is not finite.*rollback 1 of 100 to 1,536 images, learning rate x 0.5"
    ):
        run = train(recipe, tmp_path / "run", device="cpu")
    events = [line for line in run.history() if line.get("event") == "rollback"]
    assert events[0]["images"] == 1536
    first = [draw for images, draw in SEEN if images == 1536]
    assert first[0] != first[1], "a rolled-back run must draw anew"
    assert run.checkpoints.path().name == "3072"
    state = json.loads((run.checkpoints.path() / "state" / "progress.json").read_text())
    assert state["attempt"] == len(events)
    assert state["rate"] == 0.5 ** len(events)
    rates = [line["train/lr"] for line in run.history() if "train/lr" in line]
    assert rates[-1] == pytest.approx(recipe.optimizer.lr * state["rate"])
    assert all(torch.isfinite(v).all() for v in weights(run).values())


def test_it_stops_after_the_allowed_rollbacks_and_keeps_the_last_good_checkpoint(tmp_path):
    SEEN.clear()
    with pytest.warns(RuntimeWarning), pytest.raises(Diverged, match=r"3 rollbacks; last good checkpoint: .*1536"):
        train(exploding(forever=True), tmp_path / "run", device="cpu")
    run = Run.open(tmp_path / "run")
    assert all(torch.isfinite(v).all() for v in weights(run).values())
    assert run.checkpoints.names()[-1] == "1536"


def test_two_trainings_of_one_run_are_refused(small_run):
    with small_run.locked(), pytest.raises(UserError, match="another process is training"):
        train(small_run.recipe, small_run.folder, resume=True, device="cpu")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = train(tiny("digits-standard", train__images=300), tmp_path / "run", device="cpu")
    before = weights(run)
    train(run.recipe, run.folder, resume=True, device="cpu")
    assert same(before, weights(run))


@pytest.fixture
def copy(small_run, tmp_path):
    import shutil

    return Run(Path(shutil.copytree(small_run.folder, tmp_path / "copy")))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema.safetensors", "state/optimizer.pt", "state/progress.json", "config.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_checkpoints_are_named_with_the_way_out(copy, file, damage):
    path = copy.checkpoints.path() / file
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"damaged: {file}.*echo \d+ > .*LATEST"):
        train(copy.recipe, copy.folder, resume=True, device="cpu")
    previous = copy.checkpoints.names()[-2]
    (copy.folder / "checkpoints" / "LATEST").write_text(previous + "\n")
    assert copy.model()[1].outputs == 10


def test_bad_folders_are_refused_and_nothing_is_left(tmp_path, small_run):
    recipe = tiny("digits-standard")
    with pytest.raises(UserError, match="not empty; to go on with it: advebm train --resume"):
        train(recipe, small_run.folder, device="cpu")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        train(recipe, file, device="cpu")
    with pytest.raises(UserError, match="cannot write"):
        train(recipe, file / "below", device="cpu")
    with pytest.raises(UserError, match="there is no run at"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"in .* there is tiny"):
        Run.open(small_run.folder.parent / "tinny")
    with pytest.raises(UserError, match="1258 training images"):
        train(tiny("digits-standard", train__batch=2000), tmp_path / "big", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path):
    """A limit on file size stands for a full disk; the checkpoint before it stays the latest."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
        "from advebm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    config = write_config(tmp_path / "c.yaml", tiny("digits-standard", train__images=500))
    arguments = ["train", "--config", config, "--out", tmp_path / "run", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    checkpoints = Run(tmp_path / "run").checkpoints
    assert checkpoints.names() == ["0"]  # without momentum the first one is small enough
    assert checkpoints.path().name == "0"
    assert {p.name for p in checkpoints.folder.iterdir()} == {"0", "LATEST"}


def test_schedules_by_hand():
    cosine = Cosine(warmup=0.2)
    assert [cosine(i, 100) for i in (0, 10, 20, 60, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    steps = Steps(at=(0.5, 0.75), factor=0.1, warmup=0.1)
    assert [steps(i, 100) for i in (5, 20, 50, 80)] == pytest.approx([0.5, 1, 0.1, 0.01])
    assert Steps()(99, 100) == 1
    assert [Cyclic(peak=0.4)(i, 100) for i in (0, 20, 40, 45, 70, 100)] == pytest.approx([0, 0.5, 1, 55 / 60, 0.5, 0])
    with pytest.raises(UserError, match="nesterov needs momentum"):
        SGD(momentum=0)
    with pytest.raises(UserError, match="lr must be > 0"):
        SGD(lr=-1)


def test_a_period_is_passed_once():
    passed = [Progress(i).due_after(30, 240)(100) for i in range(0, 240, 30)]
    assert passed == [False, False, False, True, False, False, True, True]


def test_a_kill_between_two_writes_of_a_checkpoint_loses_nothing(tmp_path):
    """The states a kill can leave: a draft, a renamed folder that LATEST does not name yet, no LATEST at all."""
    recipe = tiny("digits-standard", train__images=1_500, train__checkpoint_every=500, train__log_every=100)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    run = Run.create(tmp_path / "first", recipe, {})
    (run.folder / "checkpoints" / "0" / "state").mkdir(parents=True)  # renamed, not named
    train(recipe, run.folder, resume=True, device="cpu")
    assert same(weights(whole), weights(run))
    folder = run.folder / "checkpoints"
    names = run.checkpoints.names()
    (folder / "LATEST").write_text(names[-2] + "\n")  # the newest is there, but LATEST was not replaced
    (folder / ".1536.tmp" / "state").mkdir(parents=True)
    train(recipe, run.folder, resume=True, device="cpu")
    assert same(weights(whole), weights(run))
    assert not list(folder.glob(".*"))
    assert [line["images"] for line in run.history()] == [line["images"] for line in whole.history()]


def test_resuming_from_the_first_checkpoint_does_not_write_it_again(tmp_path):
    recipe = tiny("digits-standard", train__images=300, train__checkpoint_every=10_000, train__validate_every=10_000)
    run = train(recipe, tmp_path / "run", device="cpu")
    folder = run.folder / "checkpoints"
    assert run.checkpoints.names() == ["0", "384"]
    (folder / "LATEST").write_text("0\n")
    before = (folder / "0").stat().st_mtime_ns
    train(recipe, run.folder, resume=True, device="cpu")
    assert (folder / "0").stat().st_mtime_ns == before


def test_a_lost_pointer_is_no_reason_to_start_again(copy):
    (copy.folder / "checkpoints" / "LATEST").unlink()
    with pytest.raises(UserError, match=r"LATEST is damaged.*to go on from 6016: echo"):
        train(copy.recipe, copy.folder, resume=True, device="cpu")


def test_rewinding_forgets_later_images_and_later_attempts(tmp_path):
    run = Run.create(tmp_path / "run", tiny(), {})
    lines = [{"images": 1}, {"images": 2}, {"images": 2, "event": "rollback", "attempt": 1}, {"images": 3}]
    for line in lines:
        run.log(line)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"images": 4, "tra')
    assert run.history() == lines
    run.rewind(2, 1)
    assert run.history() == lines[:3]
    run.rewind(2, 0)
    assert run.history() == lines[:2]


def test_equal_robustness_is_decided_by_clean_accuracy(tmp_path, monkeypatch):
    scores = iter([(0.5, 0.8), (0.5, 0.9), (0.5, 0.7), (0.4, 1.0), (0.1, 1.0)])
    named = lambda *_: dict(zip(("val/robust_accuracy", "val/accuracy"), next(scores), strict=True))
    monkeypatch.setattr(trainer, "validate", named)
    recipe = tiny("digits-standard", train__images=640, train__validate_every=128, train__checkpoint_every=128)
    run = train(recipe, tmp_path / "run", device="cpu")
    assert run.checkpoints.path("best").name == "256"
    assert run.checkpoints.names() == ["256", "512", "640"]


def test_training_in_low_precision_learns_and_keeps_float32_weights(tmp_path):
    run = train(tiny(train__precision="bfloat16"), tmp_path / "run", device="cpu")
    lines = [line for line in run.history() if "train/loss" in line]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.5
    assert {v.dtype for k, v in weights(run).items() if "num_batches" not in k} == {torch.float32}
    assert run.model()[0].precision == torch.float32
    with pytest.raises(UserError, match="precision is one of float32, bfloat16"):
        tiny(train__precision="float16")


def test_training_may_begin_with_the_weights_of_a_run(tmp_path, small_run):
    """All of them for the same classes; all but the head for others; none of another network, and then no folder."""
    averaged = weights(small_run, "ema")
    begin = {"train__images": 128, "backbone__width": 8, "init": str(small_run.folder), "optimizer__lr": 1e-12}
    run = train(tiny("digits-standard", **begin), tmp_path / "same", device="cpu")
    learned = [name for name in averaged if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(weights(run)[name], averaged[name]) for name in learned)
    images = torch.randint(256, (300, 8, 8), dtype=torch.uint8)
    np.savez(tmp_path / "three.npz", x=images.numpy(), y=np.arange(300) % 3)
    base = tiny("digits-standard", **begin)
    other = dataclasses.replace(base, data=Npz(str(tmp_path / "three.npz")))
    with pytest.warns(UserWarning, match=r"another head than three takes: head.bias, head.weight begin fresh"):
        run = train(other, tmp_path / "other", device="cpu")
    now = weights(run)
    assert now["head.weight"].shape == (3, averaged["head.weight"].shape[1])
    body = [name for name in learned if not name.startswith("head")]
    assert all(torch.allclose(now[name], averaged[name]) for name in body)
    with pytest.raises(UserError, match="the weights belong to another network"):
        train(tiny("digits-standard", **{**begin, "backbone__width": 4}), tmp_path / "no", device="cpu")
    with pytest.raises(UserError, match="there is no run or model at nowhere"):
        train(tiny("digits-standard", init="nowhere"), tmp_path / "no", device="cpu")
    colours = np.repeat(images.numpy()[..., None], 3, 3)
    np.savez(tmp_path / "colour.npz", x=colours, y=np.arange(300) % 3)
    other = dataclasses.replace(base, data=Npz(str(tmp_path / "colour.npz")))
    with pytest.raises(UserError, match=r"the images have 3 channels \(colour\), the weights .* of 1 \(grey\)"):
        train(other, tmp_path / "no", device="cpu")
    assert not (tmp_path / "no").exists()


def test_no_images_take_over_the_weights_as_they_are(tmp_path, small_run):
    recipe = tiny(init=str(small_run.folder), train__images=0)
    run = train(recipe, tmp_path / "taken", device="cpu")
    assert run.checkpoints.names() == ["0"]
    assert same(weights(run), weights(small_run, "ema"))
    # killed before its first checkpoint, it still begins with those weights
    shutil.rmtree(run.folder / "checkpoints")
    assert same(weights(train(recipe, run.folder, resume=True, device="cpu")), weights(small_run, "ema"))
    with pytest.raises(UserError, match="images must be at least 0, got -1"):
        tiny(train__images=-1)


@dataclasses.dataclass(frozen=True)
class Looks(Standard):
    """Checks, in a real run, that every role arrives as the recipe says."""

    seen: ClassVar[list[Batch]] = []
    needs: ClassVar[frozenset[str]] = frozenset({"labels", "view", "outside", "extra"})

    def search(self, model, batch, state, ctx):
        self.seen.append(batch)
        return batch.x


def test_every_role_has_its_own_images_and_augmentation(tmp_path):
    """x is mirrored at random, the view is always itself, outside are bright images, extra is the data in another
    order."""
    bright = RNG.integers(200, 256, (300, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bright.npz", x=bright, y=np.arange(300) % 2)
    roles = {
        "objective": f"{__name__}:Looks",
        "outside": f"npz:{tmp_path / 'bright.npz'}",
        "extra": "digits",
    }
    plain = {**recipes.find("digits-standard"), "backbone": {"kind": "small-conv", "width": 8}}
    recipe = resolve(
        {**plain, **roles}, [("data.augment.x.flip", True), ("data.augment.view", {}), ("train.images", 256)]
    )
    Looks.seen.clear()
    train(recipe, tmp_path / "run", device="cpu")
    first, second = Looks.seen
    mirrored = (first.x == first.view.flip(3)).flatten(1).all(1)
    plain = (first.x == first.view).flatten(1).all(1)
    assert (mirrored | plain).all()
    assert 30 < plain.sum() < 98
    assert first.outside.shape == first.x.shape
    assert first.outside.min() > 0.75
    digits = recipe.data.load().train.float()
    assert all((digits == image).flatten(1).all(1).any() for image in [*first.extra[:10], *first.view])
    assert not torch.equal(first.extra, first.view)
    assert not torch.equal(first.outside, second.outside)


def test_roles_are_given_exactly_where_they_are_needed(tmp_path):
    with pytest.raises(UserError, match="objective Looks needs outside images; give them with --outside KIND"):
        tiny("digits-standard", objective=f"{__name__}:Looks")
    with pytest.raises(UserError, match="objective Standard takes no extra images; leave extra out"):
        tiny("digits-standard", extra="digits")
    np.savez(tmp_path / "large.npz", x=RNG.integers(0, 256, (90, 9, 9), dtype=np.uint8), y=np.arange(90) % 2)
    roles = {
        "objective": f"{__name__}:Looks",
        "outside": f"npz:{tmp_path / 'large.npz'}",
        "extra": "digits",
    }
    with pytest.raises(UserError, match=r"the images of --outside are \(1, 9, 9\), those of digits \(1, 8, 8\)"):
        train(resolve({**recipes.find("digits-standard"), **roles}), tmp_path / "no", device="cpu")
    assert not (tmp_path / "no").exists()


def staged(**options):
    """Standard training of 1,024 images, then adversarial training of as many."""
    plain = {**recipes.find("digits-at"), "before": [{"name": "warm", "objective": {"kind": "standard"}}]}
    short = {"backbone.width": 8, "train.images": 1024, "train.validate_every": 1024, "train.checkpoint_every": 256}
    return resolve(plain, [*short.items(), *((k.replace("__", "."), v) for k, v in options.items())])


def test_stages_follow_one_another(tmp_path):
    """A stage takes what it leaves out from the recipe; the second begins where the first ended, as by hand."""
    recipe = staged(before__0__seed=3)
    stage = recipe.before[0]
    assert (stage.objective, stage.name, stage.seed, stage.before) == (Standard(), "warm", 3, ())
    assert (stage.backbone, stage.train) == (recipe.backbone, recipe.train)
    assert resolve(yaml.safe_load(dump(recipe))) == recipe
    told = []
    run = train(recipe, tmp_path / "run", device="cpu", report=lambda line: told.append(line["images"]))
    assert told == sorted(told)
    assert told[-1] == 2048
    first = Run.open(run.folder / "before" / "0-warm")
    assert first.recipe.objective == Standard()
    by_hand = dataclasses.replace(recipe, before=(), init=str(first.folder))
    assert same(weights(run), weights(train(by_hand, tmp_path / "hand", device="cpu")))


def test_an_interrupted_stage_goes_on(tmp_path, monkeypatch):
    whole = weights(train(staged(), tmp_path / "whole", device="cpu"))

    def interrupt(line):
        if line["images"] >= threshold:
            os.kill(os.getpid(), signal.SIGINT)

    for threshold in (512, 1500):
        folder = tmp_path / str(threshold)
        with pytest.raises(Interrupted, match=f"advebm train --resume {folder}$"):
            train(staged(train__log_every=128), folder, device="cpu", report=interrupt)
        assert same(weights(train(Run.open(folder).recipe, folder, resume=True, device="cpu")), whole)


def test_stages_may_be_given_as_an_option():
    """As a list or as text, and they take what they leave out from the recipe with its other options."""
    stage = {"name": "first", "train": {"images": 640}}
    given, text = (
        resolve(recipes.find("digits-at"), [("before", before), ("backbone.width", 24), ("before.0.train.ema", 7)])
        for before in ([stage], "[{name: first, train: {images: 640}}]")
    )
    assert given == text
    assert (given.before[0].name, given.before[0].train.images, given.before[0].train.ema) == ("first", 640, 7)
    assert given.before[0].backbone == given.backbone
    assert resolve(recipes.find("digits-at"), [("before", "none")]).before == ()
    with pytest.raises(UserError, match="before takes a list of stages"):
        resolve(recipes.find("digits-at"), [("before", "[{")])


def test_a_stage_may_be_named(tmp_path):
    """It is that recipe, but for where its data are, the seed, and how it is computed."""
    shared = [("data.path", str(tmp_path)), ("seed", 3), ("train.precision", "float32")]
    own = [("before", "[cifar10-at-5min]"), ("train.clip", None), ("data.augment.view", {"crop": 4})]
    final = resolve(recipes.find("cifar10-at-2h"), [*shared, *own])
    alone = resolve(recipes.find("cifar10-at-5min"), shared)
    assert final.train.clip is None
    assert final.before == (dataclasses.replace(alone, sampler=final.sampler, metrics=final.metrics),)


def test_stages_are_an_option_of_the_command(capsys):
    assert main(["train", "--recipe", "digits-at", "--before", "[{name: first}]", "--print-config"]) == 0
    assert "name: first" in capsys.readouterr().out


def test_bad_stages_are_refused():
    plain = recipes.find("digits-at")
    for stage, message in (
        ({"objective": "standard"}, "takes the name of a recipe, or a block with a name"),
        ("digits-art", "did you mean 'digits-at'"),
        ("digits-dat", "begins with the stage before it"),
        ({"name": "a", "init": "x"}, "begins with the stage before it"),
        ({"name": "a", "objectiv": "standard"}, "did you mean 'objective'"),
        ({"name": "../a"}, "a name is part of a folder's, without /"),
    ):
        with pytest.raises(UserError, match=message):
            resolve({**plain, "before": [stage]})
    with pytest.raises(UserError, match="before takes a list of stages, got 3"):
        resolve({**plain, "before": 3})
    assert resolve({**plain, "before": None}).before == ()


def test_a_normalisation_that_is_asked_for_survives_init(tmp_path, small_run):
    init = {"init": str(small_run.folder), "train__images": 0}
    own = small_run.model()[0].normalise
    taken = train(tiny(**init), tmp_path / "taken", device="cpu").model()[0].normalise
    assert torch.equal(taken.mean, own.mean)
    asked = train(tiny(**init, normalise__mean="0", normalise__std="1"), tmp_path / "asked", device="cpu")
    assert asked.model()[0].normalise.mean.flatten().tolist() == [0.0]
    assert asked.model()[0].normalise.std.flatten().tolist() == [1.0]


def test_dropout_in_ones_own_module_is_seeded_too(tmp_path, monkeypatch):
    """The same weights whatever the process drew before, and what it draws afterwards is left alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    layers = "nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 10)"
    (tmp_path / "dropping.py").write_text(f"from torch import nn\ndef make(): return nn.Sequential({layers})\n")
    short = {"train__images": 256, "train__validate_every": 256}
    runs = []
    for draws in (0, 3):
        torch.rand(draws)
        state = torch.get_rng_state()
        own = dataclasses.replace(tiny("digits-standard", **short), backbone=Own("dropping:make"))
        runs.append(weights(train(own, tmp_path / str(draws), device="cpu")))
        assert torch.equal(torch.get_rng_state(), state)
    assert same(*runs)


def test_lines_tell_the_speed_of_late(monkeypatch, capsys):
    """A stage may be slower than the one before, a search that grows than it was; the last line is of all."""
    monkeypatch.setattr(console, "_ComputingOn", SimpleNamespace(said="", pending=""))
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with console.bar("long", 100_000, 10_000) as tell:
        for done in (*range(12_000, 27_000, 2_000), *range(26_200, 28_200, 200), 100_000):
            now[0] += 20.0
            tell(done)
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "long 12,000/100,000 100/s, 880 s left"
    assert lines[8] == "long 26,200/100,000 85/s, 868 s left", "five fast windows of six"
    assert lines[-2] == "long 28,000/100,000 10/s, 7200 s left"
    assert lines[-1] == "long 100,000/100,000 237/s, 380.0 s"


def test_what_was_done_earlier_is_no_speed(monkeypatch, capsys):
    monkeypatch.setattr(console, "_ComputingOn", SimpleNamespace(said="", pending=""))
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with console.bar("gone on with", 1000) as tell:
        now[0] = 5.0
        tell(200)
        now[0] = 25.0
        tell(300)
    assert "300/1,000 5/s, 140 s left" in " ".join(capsys.readouterr().err.split())


def test_part_of_a_sorted_validation_split_has_all_classes(monkeypatch):
    """Folders are read class by class, and the first images of their splits are of one class."""
    data = Digits().load()
    by_class = data._replace(val=data.val.take(data.val.y.argsort(stable=True)))
    monkeypatch.setattr(Digits, "load", lambda self: by_class)
    prepared = setup.set_up(tiny("digits-at", train__validate_with=40), Engine("cpu"))
    assert len(prepared.validation) == 40
    assert prepared.validation.y.unique().numel() == 10
    again = setup.set_up(tiny("digits-at", train__validate_with=40), Engine("cpu"))
    assert torch.equal(prepared.validation.x, again.validation.x)
    whole = setup.set_up(tiny("digits-at", train__validate_with=None), Engine("cpu"))
    assert torch.equal(whole.validation.y, by_class.val.y)
