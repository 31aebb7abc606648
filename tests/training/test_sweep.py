"""Sweeps: combinations, equal budgets, halving, resuming, faults of single trials, and what trials are judged on."""

import functools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import advebm
from advebm import cli
from advebm.cli.sweep import parse_vary
from advebm.core import files
from advebm.core.errors import Interrupted, UserError
from advebm.data.sources import Data, Digits
from advebm.metrics.base import Subject
from advebm.metrics.robustness import measure_accuracy
from advebm.reporting import sweep as pages
from advebm.runs.run import Run
from advebm.training import loop
from advebm.training.cost import estimate
from advebm.training.sweep import (
    Result,
    Row,
    Sweep,
    Trial,
    best_first,
    better_half,
    combine,
    images_for,
    short_names,
    training_flops,
    trial_name,
    value_text,
    with_images,
)
from advebm.workflows import sweep as workflow
from advebm.workflows.train import train_or_resume
from tests.helpers import tiny

SMALL = {"backbone.width": 8, "threat.steps": 2, "train.images": 512, "train.checkpoint_every": 128, "train.batch": 32}
SMALL["train.ema"] = 64


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)


@pytest.fixture
def trained(monkeypatch):
    """Train in this process, which is quicker; the names of the trials in the order in which they were trained."""
    names = []

    def in_turn(trials, jobs, device, told, ended):
        for trial in trials:
            names.append(trial.folder.name)
            try:
                train_or_resume(*trial, fit=functools.partial(loop.train, device=device))
            except UserError as error:
                ended(trial, str(error))
            else:
                ended(trial, "")

    monkeypatch.setattr(workflow, "run_side_by_side", in_turn)
    return names


def sweep(out="out", recipe="digits-standard", options=(), **rest):
    return advebm.sweep(recipe, out=out, options={**SMALL, **dict(options)}, device="cpu", **rest)


# Combinations ---------------------------------------------------------------------------------------------------------


def test_combinations():
    assert combine({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    assert combine({"a": [1, 1]}) == [{"a": 1}]
    assert combine({}, [{"a": 1, "b": 2}, {"c": 3}]) == [{"a": 1, "b": 2}, {"c": 3}]
    assert combine({}, [{}, {"a": 1}]) == [{}, {"a": 1}]  # the recipe itself
    assert combine({"d": [0, 1]}, [{"a": 1}, {"c": 3}]) == [
        {"a": 1, "d": 0},
        {"a": 1, "d": 1},
        {"c": 3, "d": 0},
        {"c": 3, "d": 1},
    ]
    for vary, given, text in (
        ({}, [], "nothing varies"),
        ({}, [{}], "nothing varies"),
        ({"a": []}, [], "no values"),
        ({"a": [1]}, [{"a": 2}], "varies in"),
    ):
        with pytest.raises(UserError, match=text):
            combine(vary, given)


def test_names():
    assert short_names(
        ["optimizer.lr", "objective", "objective.attack.steps", "threat.steps", "objective.attack.eps"]
    ) == {
        "optimizer.lr": "lr",
        "objective": "objective",
        "objective.attack.steps": "attack.steps",
        "threat.steps": "threat.steps",
        "objective.attack.eps": "eps",
    }
    assert trial_name({"a.eps": "8/255", "b": [1, 2]}, 3, 640) == "a.eps=8-255,b=-1,-2-,seed=3,images=640"
    long = [trial_name({"option": "x" * 200 + end}, 0, 1) for end in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) < 200


def test_what_the_command_line_takes(capsys):
    Path("wrong.yaml").write_text("optimizer.lr: 0.1")
    recipe = ["--recipe", "digits-at"]
    for words, text in (
        (["--out", "x"], "sweep takes --recipe NAME or --config FILE"),
        (recipe, "required: --out"),
        ([*recipe, "--out", "x"], "nothing varies"),
        ([*recipe, "--out", "x", "--trials", "wrong.yaml"], "wrong.yaml takes a list of combinations"),
        ([*recipe, "--out", "x", "--trials", "none.yaml"], "cannot read none.yaml"),
        ([*recipe, "--out", "x", "--vary", "optimizer.lr"], "--vary takes OPTION=VALUE,VALUE"),
    ):
        assert cli.main(["sweep", *words]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    assert not Path("x").exists()


def test_values_of_options():
    assert parse_vary(["optimizer.lr=0.1,0.2", "--objective=at,trades", "backbone.widths=[[1,2],[3,4]]"]) == {
        "optimizer.lr": ["0.1", "0.2"],
        "objective": ["at", "trades"],
        "backbone.widths": [[1, 2], [3, 4]],
    }
    for texts in (["optimizer.lr"], ["a=1", "a=2"], ["a=[1"]):
        with pytest.raises(UserError, match=r"--vary"):
            parse_vary(texts)


# Equal budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-standard", "digits-at", "digits-trades", "digits-binary-at"])
@pytest.mark.parametrize("flops", [3e10, 1.7e12])
def test_costs_at_one_budget_differ_by_less_than_a_batch(name, flops):
    """By the passes that a dry run counts; those of ``binary-at`` grow with the length, as its K does."""
    recipe = advebm.load_recipe(name)
    images = images_for(recipe, flops)
    cost = lambda n: estimate(with_images(recipe, n)).training[1]
    assert images % recipe.train.batch == 0
    assert cost(images) <= flops * (1 + 1e-6) < cost(images + recipe.train.batch)


def test_the_stages_before_are_paid_for_first():
    recipe = advebm.load_recipe("digits-gat")
    (before,) = recipe.before
    alone = training_flops(before)
    batch = training_flops(with_images(recipe, recipe.train.batch)) - alone
    assert alone > batch > 0
    assert images_for(recipe, alone + 10.5 * batch) == 10 * recipe.train.batch
    with pytest.raises(UserError, match=r"pays for no batch: .* and the stages before"):
        images_for(recipe, alone)


def test_flops_of_training_are_those_of_its_passes():
    """A step of K searches K + 1 forward, K backward to the images and 1 to the weights; not those of validation."""
    recipe = tiny(train__images=1280)
    stage = estimate(recipe)
    passes = 3 * stage.flops.forward + 2 * stage.flops.search + stage.flops.loss  # K = 2
    assert training_flops(recipe) == pytest.approx(1280 * passes)
    assert training_flops(tiny(train__images=1280, threat__steps=9, optimizer__lr=7, seed=2)) == training_flops(recipe)
    assert training_flops(tiny(train__images=1280, objective__attack__steps=3)) > training_flops(recipe)


def test_a_budget_sets_the_number_of_images(trained):
    flops = 2.5e9
    found = sweep("out", "digits-at", vary={"objective.attack.steps": [1, 6]}, budget=flops, halve=0)
    images = {row.options["objective.attack.steps"]: row.images for row in found.rows}
    recipes = {row.images: row.trials[0].recipe for row in found.rows}
    batch = {n: training_flops(with_images(recipe, recipe.train.batch)) for n, recipe in recipes.items()}
    assert images[1] > 2 * images[6] > 0
    assert all(0 <= flops - row.flops < batch[row.images] for row in found.rows)
    assert [Run.open(row.trials[0].folder).images for row in found.rows] == [row.images for row in found.rows]
    assert "at most 2.5e+09 FLOP" in Path("out/sweep.md").read_text()
    with pytest.raises(UserError, match=r"leave train\.images out"):
        sweep("other", vary={"train.images": [128, 256]}, budget=flops)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_validation_images(trained):
    """Counted again from the averaged weights of each seed; the errors by their formulas."""
    found = sweep(
        vary={"optimizer.lr": [0.02]},
        seeds=2,
        seed=5,
        options={"train.validate_with": 100, "train.validate_every": 128},
    )
    (row,) = found.rows
    assert [trial.recipe.seed for trial in row.trials] == [5, 6]
    clean = []
    for trial in row.trials:
        run = Run.open(trial.folder)
        data = run.data
        kept = data.val.take(torch.randperm(len(data.val), generator=torch.Generator().manual_seed(0))[:100])
        logits = run.model()[0](kept.float())
        clean.append((logits.argmax(1) == kept.y).double().mean().item())
    values = row.describe()
    assert values["mean"]["clean"] == pytest.approx(statistics.fmean(clean))
    p = values["mean"]["robust"]
    assert 0 < p < values["mean"]["clean"]
    assert values["count"] == 100
    assert values["error"]["robust"] == pytest.approx(math.sqrt(p * (1 - p) / 100))
    (cells,) = found.table()[1]
    deviation = 100 * abs(clean[0] - clean[1]) / math.sqrt(2)
    mean, error = 100 * statistics.fmean(clean), 100 * values["error"]["clean"]
    assert cells[2] == f"{mean:.1f} ± {error:.1f} %, sd {deviation:.1f}"
    subject = Subject(run.model()[0], data, kept, run.recipe.threat)
    assert measure_accuracy(subject, None, torch.Generator().manual_seed(0))[0] == clean[-1]


def test_test_images_are_not_looked_at(trained, monkeypatch):
    class Untouchable:
        def __getattr__(self, name):
            pytest.fail(f"{name} of the test images")

    load = Digits.load
    monkeypatch.setattr(Data, "digest", lambda self: "")  # which a run records of all of its images
    monkeypatch.setattr(Digits, "load", lambda self: load(self)._replace(test=Untouchable()))
    found = sweep(vary={"optimizer.lr": [0.02, 0.05]})
    assert all(row.complete for row in found.rows)
    with pytest.raises(pytest.fail.Exception, match="test images"):
        len(Digits().load().test.x)


def row(name, robust, clean=0.5, rung=0, seeds=1, **rest):
    trials = tuple(Trial(tiny(seed=i), Path(f"{name}-{rung}-{i}")) for i in range(seeds))
    made = Row({"optimizer.lr": name}, trials, 1e9, 100, rung, **rest)
    for trial, value in zip(trials, [] if robust is None else robust, strict=False):
        made.results[trial.folder] = Result({"val/robust_accuracy": value, "val/accuracy": clean}, 1.0, "")
    return made


def test_order():
    rows = [
        row("low", [0.3]),
        row("high", [0.4]),
        row("none", None),
        row("tie", [0.4], clean=0.6),
        row("half", [0.9], seeds=2),
        row("early", [0.1], rung=1),
    ]
    names = lambda rows: [r.options["optimizer.lr"] for r in rows]
    assert names(best_first(rows, "robust")) == ["early", "tie", "high", "low", "half", "none"]
    assert names(best_first(rows[:2], "clean")) == ["high", "low"]
    distances = [
        Row({"a": v}, (Trial(tiny(), Path(v)),), 1.0, 9, 0, {Path(v): Result({"val/fd": float(v)}, 1.0, "")})
        for v in "213"
    ]
    assert [r.options["a"] for r in best_first(distances, "fd")] == ["1", "2", "3"]
    assert names(better_half(rows[:4], "robust")) == ["tie", "high"]
    assert names(better_half([*rows[:2], row("c", [0.2])], "robust")) == ["high", "low"]
    assert names(better_half([row("none", None), row("half", [0.9], seeds=2), rows[0]], "robust")) == ["low"]


def test_what_cannot_be_compared_is_refused(trained):
    for vary, text in (
        ({"threat.eps": [0.1, 0.2]}, "differ in threat"),
        ({"train.validate_with": [10, 20]}, "differ in train.validate_with"),
        ({"data.split_seed": [0, 1]}, "differ in data"),
        ({"optimizer.lr": ["a"]}, "optimizer.lr takes a number"),
        ({"optimizer.speed": [1]}, "'speed' is unknown"),
        ({"seed": [0, 1]}, "seed says"),
        ({"optimizer.momentum": [0.9, 0]}, r"^optimizer\.momentum=0: .*nesterov needs momentum"),
    ):
        with pytest.raises(UserError, match=text):
            sweep(vary=vary)
    with pytest.raises(UserError, match="two trials would have the same folder"):
        sweep(vary={"optimizer.lr": ["1/20", "1 /20"]})
    with pytest.raises(UserError, match=r"give --train\.features"):
        sweep(vary={"optimizer.lr": [1]}, by="fd")
    for wrong in ({"seeds": 0}, {"jobs": 0}, {"halve": -1}, {"by": "best"}):
        with pytest.raises(UserError, match=next(iter(wrong)) if "by" not in wrong else "no score 'best'"):
            sweep(vary={"optimizer.lr": [1]}, **wrong)
    assert not trained
    assert not list(Path().glob("out/trials/*"))


# Halving and resuming -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_better_half_goes_on_at_twice_the_length(trained):
    """Five rates, of which two learn; a round's schedule ends with the round."""
    rates = [1e-6, 0.05, 1e-7, 0.1, 1e-8]
    found = sweep(vary={"optimizer.lr": rates}, halve=2, options={"train.images": 2048, "train.log_every": 128})
    rounds = {n: [name for name in trained if name.endswith(f"images={n}")] for n in (512, 1024, 2048)}
    assert {n: len(names) for n, names in rounds.items()} == {512: 5, 1024: 3, 2048: 2}
    assert len(trained) == 10
    assert {row.options["optimizer.lr"] for row in found.rows[:2]} == {0.05, 0.1}
    assert [row.rung for row in found.rows] == [2, 2, 1, 1, 1, 0, 0, 0, 0, 0]
    run = Run.open(Path("out/trials") / rounds[512][1])
    rates = [line["train/lr"] for line in run.history() if "train/lr" in line]
    assert rates[-1] < 0.15 * max(rates)
    assert "Successive halving" in Path("out/sweep.md").read_text()
    assert Path("out/sweep.png").read_bytes().startswith(b"\x89PNG")
    again = sweep(
        vary={"optimizer.lr": [1e-6, 0.05, 1e-7, 0.1, 1e-8]},
        halve=2,
        options={"train.images": 2048, "train.log_every": 128},
    )
    assert len(trained) == 10
    assert [r.describe() for r in again.rows] == [r.describe() for r in found.rows]


def test_a_single_combination_skips_the_rounds(trained):
    sweep(vary={"optimizer.lr": [0.02]}, halve=2)
    assert trained == ["optimizer.lr=0.02,seed=0,images=512"]


def test_only_what_is_missing_is_trained(trained):
    """Values and seeds are added; a run that was stopped goes on; another recipe is refused."""
    first = sweep(vary={"optimizer.lr": [0.02, 0.05]})
    assert len(trained) == 2
    sweep(vary={"optimizer.lr": [0.02, 0.05]})
    assert len(trained) == 2
    more = sweep(vary={"optimizer.lr": [0.02, 0.05, 0.1]}, seeds=2)
    assert len(trained) == 2 + 4
    assert len(set(trained)) == 6
    assert more.rows[0].trials[0].folder.is_dir()
    folder = first.rows[0].trials[0].folder
    whole = load_file(folder / "checkpoints" / "512" / "model.safetensors")
    (folder / "checkpoints" / "LATEST").write_text("384\n")
    sweep(vary={"optimizer.lr": [0.02, 0.05]})
    assert trained[6:] == [folder.name]
    again = load_file(folder / "checkpoints" / "512" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    with pytest.raises(UserError, match="holds a run of another recipe"):
        sweep(vary={"optimizer.lr": [0.02]}, options={"backbone.width": 4})
    with files.locked(Path("out/.lock"), ""), pytest.raises(UserError, match="another sweep is at work in out"):
        sweep(vary={"optimizer.lr": [0.02, 0.05]})


# In processes of their own --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trials_are_ordinary_runs_and_the_planted_optimum_wins(capsys):
    """To the bit what training by itself makes, with one thread; at the other rates nothing is learned."""
    path = Path("more.yaml")
    path.write_text(
        "- {optimizer.lr: 1.0e-7}\n- {optimizer.lr: 0.05}\n- {optimizer.lr: 1.0e-6, optimizer.weight_decay: 0}\n"
    )
    words = [f"--{name}={value}" for name, value in SMALL.items() if "." in name]
    words += ["--recipe", "digits-standard", "--trials", "more.yaml", "--out", "out", "--device", "cpu", "--jobs", "2"]
    assert cli.main(["sweep", *words]) == 0
    out, err = capsys.readouterr()
    assert out.index("0.05") < min(out.index("1e-07"), out.index("1e-06"))
    assert "180 validation images" in out
    assert "3 of 3 trials to train, 2 side by side" in err
    plain = json.loads(Path("out/sweep.json").read_text())
    assert plain["rows"][0]["options"] == {"optimizer.lr": 0.05}
    assert plain["rows"][0]["mean"]["clean"] > 0.5 > plain["rows"][1]["mean"]["clean"]
    run = Run.open(plain["rows"][0]["seeds"][0]["run"])
    assert run.environment["threads"] == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = advebm.train("digits-standard", folder="alone", options={**SMALL, "optimizer.lr": 0.05}, device="cpu")
    finally:
        torch.set_num_threads(threads)
    weights = [load_file(r.checkpoints.path() / "ema.safetensors") for r in (run, alone)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert plain["rows"][0]["seeds"][0]["scores"]["val/accuracy"] == alone.history()[-1]["val/accuracy"]
    page = Path("out/sweep.md").read_text()
    assert f"advebm evaluate '{run.folder}'" in page or f"advebm evaluate {run.folder}" in page


FAULTY = """
import multiprocessing
import os
from dataclasses import dataclass
from advebm.objectives import Loss, Standard

@dataclass(frozen=True)
class Faulty(Standard):
    fault: str = "none"
    def loss(self, model, batch, found, state, ctx):
        if self.fault == "error":
            raise RuntimeError("no such thing")
        if self.fault == "kill" and multiprocessing.parent_process():
            os.kill(os.getpid(), 9)
        loss = super().loss(model, batch, found, state, ctx)
        return Loss(loss.total * float("nan"), loss.terms) if self.fault == "nan" else loss
"""


@pytest.mark.slow
def test_a_trial_that_fails_leaves_the_others(monkeypatch):
    Path("faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    vary = {"objective.fault": ["error", "kill", "nan", "none"]}
    options = {"objective": "faulty:Faulty", "train.rollbacks": 0}
    found = sweep(vary=vary, options=options, jobs=2)
    notes = {row.options["objective.fault"]: row.note for row in found.rows}
    assert found.rows[0].options == {"objective.fault": "none"}
    assert found.rows[0].complete
    assert notes["none"] == ""
    assert notes["error"] == "RuntimeError: no such thing"
    assert [row.flops is None for row in found.rows] == [
        row.options["objective.fault"] == "error" for row in found.rows
    ]
    assert notes["kill"] == "its process was killed by signal 9"
    assert "the loss is not finite" in notes["nan"]
    assert all(text in Path("out/sweep.md").read_text() for text in notes.values())
    launched = []
    monkeypatch.setattr(workflow, "run_side_by_side", lambda trials, *_: launched.extend(t.folder.name for t in trials))
    again = sweep(vary=vary, options=options)
    assert ["error" in launched[0], "kill" in launched[1], len(launched)] == [True, True, 2]
    assert "the loss is not finite" in {row.options["objective.fault"]: row.note for row in again.rows}["nan"]
    assert again.best.folder == found.rows[0].trials[0].folder


def test_interrupted_trials_save_and_go_on(monkeypatch):
    """As by Ctrl-C once the first images are trained on."""

    def interrupt(*_):
        raise KeyboardInterrupt

    long = {"train.images": 200_000, "train.checkpoint_every": 200_000, "train.validate_every": 200_000}
    side_by_side = workflow.run_side_by_side
    monkeypatch.setattr(
        workflow,
        "run_side_by_side",
        lambda trials, jobs, device, told, ended: side_by_side(trials, jobs, device, interrupt, ended),
    )
    with pytest.raises(Interrupted, match="1 trials unfinished; the same command goes on"):
        sweep(vary={"optimizer.lr": [0.02]}, options=long)
    (folder,) = Path("out/trials").iterdir()
    run = Run.open(folder)
    assert 0 < run.images < 200_000
    with run.locked():  # its process has ended
        pass


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on():
    """Its trials end with it at once, so that none is busy; each goes on at its checkpoint, to the same weights."""
    options = {**SMALL, "train.images": 20_000, "train.checkpoint_every": 640, "train.validate_every": 20_000}
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--recipe", "digits-standard", "--vary", "optimizer.lr=0.02,0.05", "--device", "cpu", "--jobs", "2"]
    command = [sys.executable, "-m", "advebm", "sweep", *words, "--out"]
    killed = subprocess.Popen([*command, "out"], stderr=subprocess.DEVNULL)
    begun = lambda: [Run(folder).images for folder in Path("out/trials").glob("*") if (folder / "checkpoints").is_dir()]
    until = time.monotonic() + 120
    while len(begun()) < 2 or min(begun()) < 640:
        assert killed.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    time.sleep(1)
    seen = begun()
    assert all(640 <= images < 20_000 for images in seen), seen
    time.sleep(1)
    assert begun() == seen
    for out in ("out", "whole"):
        subprocess.run([*command, out], check=True, stderr=subprocess.DEVNULL)
    for folder in Path("out/trials").iterdir():
        runs = [Run(Path(out) / "trials" / folder.name) for out in ("out", "whole")]
        weights = [load_file(run.checkpoints.path() / "ema.safetensors") for run in runs]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
        assert runs[0].history()[-1]["val/accuracy"] == runs[1].history()[-1]["val/accuracy"]


# Page and picture -----------------------------------------------------------------------------------------------------


def test_the_picture_shows_what_varies(monkeypatch):
    shown = []
    monkeypatch.setattr(pages, "png", lambda figure, **_: shown.append(figure) or b"")
    about = {"device": "cpu", "system": "", "cores": 2, "torch": "", "advebm": "", "started": "2026-01-01"}
    rows = [row("0.1", [0.4, 0.5], seeds=2), row("8/255", [0.2, 0.3], seeds=2), row("0.02", None, seeds=2)]
    rows[2].faults[rows[2].trials[0].folder] = "diverged"
    pages.draw(Sweep(best_first(rows, "robust"), "robust", None, about, Path()))
    (axis,) = shown[0].axes
    assert shown[0].get_suptitle() == "Best: lr=0.1"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.02", "8/255", "0.1"]
    dots = {
        tuple(line.get_xdata()): list(line.get_ydata())
        for line in axis.lines
        if line.get_marker() == "o" and len(line.get_xdata())
    }
    assert dots == {(2, 2): [40.0, 50.0], (1, 1): pytest.approx([20.0, 30.0])}
    assert [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "x"] == [[0]]
    rows[1].flops = 2e9
    pages.draw(Sweep(best_first(rows, "robust"), "robust", None, about, Path()))
    assert len(shown[1].axes) == 2
    assert pages.draw(Sweep([rows[2]], "robust", None, about, Path())) is None


def test_values_that_have_options_are_told_by_their_kind(monkeypatch):
    attack = {"norm": "l2", "steps": 2}
    values = [{"kind": "cutmix", "objective": {"kind": "at", "attack": attack}}, {"kind": "fast", "fall": 0.1}, "at"]
    texts = ["cutmix, objective (at, attack (norm l2, steps 2))", "fast, fall 0.1", "at"]
    assert list(map(value_text, values)) == texts
    name = "objective=cutmix,-objective-at,-attack-norm-l2,-steps-2-,seed=0,images=1"
    assert trial_name({"objective": values[0]}, 0, 1) == name
    shown, rows = [], [row("0.1", [0.5]) for _ in values]
    for made, value in zip(rows, values, strict=True):
        made.options.clear()
        made.options["objective"] = value
    monkeypatch.setattr(pages, "png", lambda figure, **_: shown.append(figure) or b"")
    about = {"device": "cpu", "system": "", "cores": 2, "torch": "", "advebm": "", "started": "2026-01-01"}
    found = Sweep(rows, "robust", None, about, Path())
    pages.draw(found)
    assert shown[0].get_suptitle() == f"Best: objective={texts[0]}"
    assert [text.get_text() for text in shown[0].axes[0].get_xticklabels()] == ["at", "cutmix …", "fast …"]
    assert [line[0] for line in found.table()[1]] == texts


def test_the_recipe_itself_can_be_a_combination(monkeypatch):
    shown = []
    monkeypatch.setattr(pages, "png", lambda figure, **_: shown.append(figure) or b"")
    about = {"device": "cpu", "system": "", "cores": 2, "torch": "", "advebm": "", "started": "2026-01-01"}
    itself, ten, five = row("0.1", [0.5]), row("10", [0.4]), row("5", [0.3])
    found = Sweep([itself, ten, five], "robust", None, about, Path())
    assert not any("as in the recipe" in line for line in pages.legend(found))
    itself.options.clear()
    pages.draw(found)
    assert shown[0].get_suptitle() == "Best: the recipe itself"
    assert [text.get_text() for text in shown[0].axes[0].get_xticklabels()] == ["5", "10", "recipe's"]
    assert any("as in the recipe" in line for line in pages.legend(found))
