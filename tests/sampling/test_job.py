"""Sets of samples on the disk: the same bytes whatever stops, processes and chunks; nothing half-written is whole."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from advebm.cli import main
from advebm.core import files
from advebm.core.errors import UserError
from advebm.samplers.classifier import CS, TA, Langevin
from advebm.sampling import generate, job
from advebm.sampling.job import SampleJob, draw_set
from advebm.training.loop import train
from tests.helpers import few_samples, linked, tiny

QUICK = CS(steps=2, step_size=0.1, noise=0.02)


@pytest.fixture
def run(small_run, tmp_path):
    return linked(small_run, tmp_path)


def wanted(run, **options):
    number = run.checkpoints.path().name
    return SampleJob(**{"run": run, "name": "set", "sampler": QUICK, "per_class": 110, "checkpoint": number, **options})


def content(folder):
    return (
        (folder / "images.npz").read_bytes(),
        (folder / "manifest.json").read_text(),
        (folder / "grid.png").read_bytes(),
    )


def stop_after(monkeypatch, count):
    """Interrupt a drawing after some chunks."""
    whole, done = job.WorkerState.draw, []

    def draw_some(desk, number):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(number)
        whole(desk, number)

    monkeypatch.setattr(job.WorkerState, "draw", draw_some)
    return done


def test_what_is_on_the_disk_is_what_generate_gives(run):
    folder = draw_set(wanted(run))
    data, model = run.recipe.data.load(), run.model()[0]
    y = torch.arange(10).repeat_interleave(110)
    expected = generate.generate(model, QUICK, data, y)
    samples = generate.read_set(folder)
    assert torch.equal(samples.y, y)
    assert (samples.x - expected.x).abs().max() <= 0.5 / 255 + 1e-6
    with np.load(folder / "images.npz") as arrays:
        assert (arrays["x"].dtype, arrays["x"].shape, arrays["y"].dtype) == (np.uint8, (1100, 1, 8, 8), np.int64)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["count"], manifest["seed"], manifest["chunk"], len(manifest["weights"])) == (1100, 0, 500, 64)
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "film.png", "grid.png", "images.npz", "manifest.json"]
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (728, 728)


def test_a_stopped_drawing_goes_on_to_the_same_bytes(run, monkeypatch):
    whole = content(draw_set(wanted(run, name="whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            draw_set(wanted(run))
    assert "set" not in run.samples()
    told = []
    with monkeypatch.context() as patch:
        done = stop_after(patch, 9)
        folder = draw_set(wanted(run), progress=told.append)
    assert done == [2]
    assert told == [1000, 1100]
    assert content(folder) == whole


@pytest.mark.parametrize("other", [{"seed": 1}, {"sampler": TA(steps=2)}, {"per_class": 101}, {"batch": 100}], ids=str)
def test_chunks_of_another_plan_are_dropped(run, monkeypatch, other):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            draw_set(wanted(run, **other))
    done = stop_after(monkeypatch, 9)
    draw_set(wanted(run))
    assert done == [0, 1, 2]


@pytest.mark.slow
def test_killed_with_processes_it_goes_on_alone_to_the_same_bytes(run):
    options = ["--per-class", "160", "--name", "set", "--sampler.noise", "0.02", "--device", "cpu"]
    command = [sys.executable, "-m", "advebm", "sample", str(run.folder), *options]
    child = subprocess.Popen([*command, "--processes", "2"], stderr=subprocess.DEVNULL)
    parts = run.folder / "samples" / "set" / "parts"
    deadline = time.monotonic() + 400
    while not list(parts.glob("*.npy")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert 1 <= len(list(parts.glob("*.npy"))) < 4
    assert not run.samples()
    sampler = replace(run.recipe.sampler, noise=0.02)
    whole = draw_set(wanted(run, name="whole", sampler=sampler, per_class=160))
    assert content(draw_set(wanted(run, sampler=sampler, per_class=160))) == content(whole)


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(run):
    draw_set(wanted(run))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (20_000, 40_000):  # below a chunk; below all images
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(
                UserError, match=r"cannot write .*(000000.npy|images.npz): File too large; make room there"
            ):
                draw_set(wanted(run))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not run.samples()
        assert not list((run.folder / "samples").rglob("*.tmp"))
    draw_set(wanted(run))
    assert generate.read_set(run.samples()["set"]).x.shape == (1100, 1, 8, 8)


def test_a_damaged_chunk_is_drawn_again(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            draw_set(wanted(run))
    wanted(run).part(0).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"000000.npy was damaged .* and is removed; the same command goes on"):
        draw_set(wanted(run))
    assert content(draw_set(wanted(run))) == content(draw_set(wanted(run, name="whole")))


def test_only_one_draws_a_set_at_a_time(run):
    folder = run.folder / "samples" / "set"
    folder.mkdir(parents=True)
    with (
        files.locked(folder / ".lock", "busy"),
        pytest.raises(UserError, match=r"another process is drawing .*set"),
    ):
        draw_set(wanted(run))


def test_some_classes(run):
    folder = draw_set(wanted(run, classes=(7, 2), per_class=3))
    assert generate.read_set(folder).y.tolist() == [7, 7, 7, 2, 2, 2]
    with pytest.raises(UserError, match="digits has classes 0 to 9, got 3, 10"):
        draw_set(wanted(run, classes=(3, 10)))
    with pytest.raises(UserError, match="langevin-global draws from no class; leave the classes out"):
        draw_set(wanted(run, classes=(3,), sampler=Langevin(start="global")))


def test_a_trajectory_is_an_animation_of_every_step(run):
    folder = draw_set(wanted(run, per_class=1, sampler=CS(steps=5, step_size=0.1)), trajectory=True)
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == 6
    assert json.loads((folder / "manifest.json").read_text())["film"] == [0, 1, 2, 3, 4, 5]


def test_items_are_dealt_in_endless_shuffles():
    row = generate.deal_images(7, 0, 30, 3)
    for k in range(4):
        assert sorted(row[7 * k : 7 * k + 7].tolist()) == list(range(7))
    assert len({tuple(row[7 * k : 7 * k + 7].tolist()) for k in range(4)}) == 4
    assert torch.equal(torch.cat([generate.deal_images(7, 0, 11, 3), generate.deal_images(7, 11, 19, 3)]), row)
    assert not torch.equal(generate.deal_images(7, 0, 30, 4), row)


def test_chains_of_a_replay_buffer_go_on(tmp_path):
    run = train(
        tiny("digits-jeat", **{"objective.negatives.buffer": 300, "train.images": 300}), tmp_path / "run", device="cpu"
    )
    (stream,) = (run.checkpoints.path() / "state").glob("stream-*.pt")
    chains = torch.load(stream, weights_only=True)["chains"].clamp(0, 1)
    x = generate.read_set(draw_set(wanted(run, sampler=Langevin(steps=0, start="buffer"), per_class=5))).x
    assert len({image.numpy().tobytes() for image in x}) == 50
    assert torch.cdist(x.flatten(1), chains.flatten(1)).amin(1).max() < 0.5 / 255 * 8 + 1e-6
    with pytest.raises(UserError, match="keeps no replay buffer; runs of jeat, jem"):
        train(tiny(**{"train.images": 128}), tmp_path / "at", device="cpu").chains()


def test_a_set_that_is_written_over_is_not_whole_until_it_is(run):
    folder = draw_set(wanted(run))
    samples = generate.read_set(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            generate.write_set(folder, samples, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not run.samples()


def test_outside_images_are_each_dealt_once_over_the_chunks(run):
    data, model = run.recipe.data.load(), run.model()[0]
    y = torch.full((len(data.train),), -1)
    outside = data._replace(test=data.train)  # 1,258 images for three chunks
    x = generate.generate(model, Langevin(steps=0, start="outside"), data, y, outside=outside).x
    dealt, real = (sorted(image.numpy().tobytes() for image in images) for images in (x, data.train.float()))
    assert dealt == real


@few_samples
def test_methods_are_compared_from_the_same_seeds(run, capsys):
    arguments = ["--per-class", "2", "--steps", "1", "--seeds", "2", "--sampler.step_size", "1e-9", "--device", "cpu"]
    assert main(["sample", str(run.folder), "--compare", "ta,cs", *arguments]) == 0
    told = capsys.readouterr()
    assert "± " in told.out
    assert told.err.count("judging") == 1, "all seeds by one look at the training images"
    x = {p.name: generate.read_set(p).x for p in (run.folder / "comparison").iterdir() if p.is_dir()}
    assert set(x) == {"ta-0", "cs-0", "ta-1", "cs-1"}
    assert torch.equal(x["ta-0"], x["cs-0"])
    assert not torch.equal(x["ta-0"], x["ta-1"])
    records = json.loads((run.folder / "comparison" / "comparison.json").read_text())
    assert {r["name"] for r in records["cs"]} >= {"FD (own features)", "class score (own features)"}
    assert all(r["seeds"] == 2 for r in records["cs"])
    distance = next(r for r in records["cs"] if r["name"].startswith("FD"))
    assert distance["error"] > 1e-3 * distance["value"], "the deviation over two sets of seeds"
    assert (run.folder / "figures" / "comparison.png").exists()


@few_samples
def test_a_method_is_compared_with_itself_after_several_numbers_of_steps(run, capsys):
    arguments = ["--per-class", "2", "--steps", "0,2,5", "--sampler.noise", "0", "--device", "cpu"]
    assert main(["sample", str(run.folder), "--compare", "ta", *arguments]) == 0
    assert re.findall(r"ta-\d-steps", capsys.readouterr().out)
    sets = {k: generate.read_set(run.folder / "comparison" / f"ta-{k}-steps-0") for k in (0, 2, 5)}
    assert {k: drawn.manifest["sampler"]["steps"] for k, drawn in sets.items()} == {0: 0, 2: 2, 5: 5}
    model, sampler = run.model()[0], run.recipe.sampler
    moved = {k: (sets[k].x - sets[0].x).flatten(1).norm(dim=1) for k in (2, 5)}
    assert (moved[2] <= 2 * sampler.step_size + 0.1).all()
    assert (moved[5] > moved[2]).float().mean() > 0.9
    scores = {k: model(drawn.x).gather(1, drawn.y[:, None]).mean() for k, drawn in sets.items()}
    assert scores[0] < scores[2] < scores[5], "chains go on from the same seeds"


@few_samples
def test_compared_methods_are_as_tuned_and_other_seeds_are_named(run, capsys):
    arguments = ["tune-sampler", str(run.folder), "--method", "ta", "--step-size", "0.03", "--steps", "1"]
    assert main([*arguments, "--per-class", "2", "--device", "cpu"]) == 0
    arguments = ["sample", str(run.folder), "--compare", "ta,sgld", "--per-class", "2", "--device", "cpu"]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "seeds differ: ta from class, sgld from noise; --sampler.start sets all" in said
    manifest = lambda name: json.loads((run.folder / "comparison" / name / "manifest.json").read_text())
    assert (manifest("ta-0")["sampler"]["step_size"], manifest("ta-0")["tuned"]["split"]) == (0.03, "val")
    assert "tuned" not in manifest("sgld-0")
    assert main([*arguments[:3], "ta", *arguments[4:], "--untuned"]) == 0
    assert manifest("ta-0")["sampler"]["step_size"] == run.recipe.sampler.step_size


MISTAKES = {
    "steps": (["--steps", "0"], "--steps is one number of at least 1, got '0'"),
    "two steps": (["--steps", "4,8"], "got '4,8'; several, and 0, go with --compare"),
    "no steps": (["--steps", "-1"], "--steps takes numbers such as 0,3,7, got '-1'"),
    "batch": (["--batch", "0"], "--batch must be at least 1, got 0"),
    "processes": (["--processes", "0"], "--processes must be at least 1"),
    "classes": (["--classes", "one"], "--classes takes numbers such as 0,3,7, got 'one'"),
    "class": (["--classes", "10"], "digits has classes 0 to 9, got 10"),
    "method": (["--compare", "ta,css"], "no sampler 'css' (did you mean 'cs'?)"),
    "seeds": (["--seeds", "2"], "--seeds and --features go with --compare"),
    "name": (["--compare", "ta", "--name", "x"], "--compare names the methods"),
    "buffer": (["--method", "sgld", "--sampler.start", "buffer"], "keeps no replay buffer"),
    "outside": (["--sampler.start", "outside"], "chains start from outside images, and there are none"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(run, capsys, case):
    arguments, message = MISTAKES[case]
    assert main(["sample", str(run.folder), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert not run.samples()
