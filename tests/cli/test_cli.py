"""The command line as people use it, in this process where that is the same and in a fresh one where it is not."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from advebm import cli, recipes
from advebm.cli import catalog
from advebm.core import citations, config
from advebm.runs.recipe import dump
from advebm.runs.run import Run
from tests.helpers import few_samples, tiny


def call(*arguments, capsys):
    status = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def refused(*arguments, capsys):
    status, out, err = call(*arguments, capsys=capsys)
    assert status == 2
    assert out == ""
    lines = [line for line in err.strip().splitlines() if "reading images and weights" not in line]  # after 2 s
    assert len(lines) == 1, err
    assert lines[0].startswith("advebm: error: ")
    return lines[0]


@pytest.fixture
def run(small_run, tmp_path):
    import shutil

    return Run(Path(shutil.copytree(small_run.folder, tmp_path / "run")))


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["train", "--help"], ["list", "sampler"], ["--version"]])
def test_help_and_list_are_quick_and_import_no_torch(arguments):
    code = (
        "import sys, time; begun = time.perf_counter(); from advebm.cli import main\n"
        f"try: status = main({arguments!r})\n"
        "except SystemExit as done: status = done.code\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "print(f'{status} {heavy} {time.perf_counter() - begun}', file=sys.stderr)"
    )
    fastest = 9.0
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        status, heavy, seconds = re.fullmatch(r"(\w+) (.*) ([\d.e-]+)", done.stderr.strip()).groups()
        assert (status, heavy) == ("0", "set()")
        assert len(done.stdout) > 5
        fastest = min(fastest, float(seconds))
    assert fastest < 1


def test_list_is_a_screenful_of_where_to_begin(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    out = call("list", capsys=capsys)[1]
    lines = out.splitlines()
    assert len(lines) < 35
    assert max(map(len, lines)) <= 80
    assert len(set(recipes.RECOMMENDED)) == 10
    assert [line.split()[0] for line in lines[1:11]] == list(recipes.RECOMMENDED)
    assert "run here" not in out
    assert re.search(r"^  cifar10-at-2h +resnet for cifar10, trained against l2 0\.5$", out, re.M)
    assert re.search(r"^  cifar10-infonce +resnet for cifar10, a linear probe, for --features$", out, re.M)
    assert re.search(rf"^  recipe +{len(recipes.names())}  ", out, re.M)
    for role, kinds in config.KINDS.items():
        assert re.search(rf"^  {role} +{len(kinds)}  \S", out, re.M), role


def test_list_of_a_kind_shows_each_with_a_line(capsys):
    for what, names in {"recipe": recipes.names(), **config.KINDS}.items():
        status, out, _ = call("list", f"{what}s", capsys=capsys)
        assert status == 0
        assert out.startswith(what)
        assert len(out.splitlines()) == 1 + len(names)
        for name in names:
            assert re.search(rf"^  {name} +\S.{{10}}", out, re.M), name


def test_list_marks_what_has_been_run_here(capsys, monkeypatch, tmp_path, small_run):
    monkeypatch.chdir(tmp_path)
    eps = small_run.recipe.threat.eps

    def record(value: float, eps: float | None = None, text: str = "", **settings: object) -> dict[str, Any]:
        attack = None if eps is None else {"kind": "pgd", "norm": "l2", "eps": eps, "steps": 20}
        text = text or ("accuracy" if eps is None else f"accuracy under PGD-20 l2 {eps}")
        settings = {**settings, **({"attack": attack} if attack else {})}
        return {"name": text, "value": value, "error": 0.0, "count": 10, "settings": settings, "series": {}}

    def make(folder: str, records: object, seconds: int) -> None:
        path = tmp_path / "runs" / folder
        path.mkdir(parents=True)
        text = re.sub("(?m)^name: .*$", "name: digits-at", (small_run.folder / "config.yaml").read_text())
        (path / "config.yaml").write_text(text)
        os.utime(path / "config.yaml", (seconds, seconds))
        if records is not None:
            (path / "metrics.json").write_text(json.dumps(records))

    def shown(*words: str) -> str:
        (line,) = (line for line in call(*words, capsys=capsys)[1].splitlines() if "run here" in line)
        return line.partition("run here: ")[2]

    make("fresh", None, 30)
    assert shown("list") == "runs/fresh"
    others = [record(0.4, text="accuracy under fog", corruption="fog"), record(0.7, text="E(x) of test images")]
    make("study/first", [record(0.8), record(0.9), *others], 10)
    assert shown("list") == "runs/study/first, accuracy 90.0 ± 0.0 %", "a measured one before a newer one"
    others += [record(0.3, eps, f"accuracy under PGD-20 l2 {eps}, after APGD", part="APGD")]
    others += [record(0.1, eps * 2), record(0.2, eps, targeted=True)]
    make("second", [record(0.9), record(0.5, eps), record(0.6, eps), record(0.8), *others], 20)
    number = f"accuracy under PGD-20 l2 {eps} 60.0 ± 0.0 %"
    assert shown("list") == shown("list", "recipe") == shown("explain", "digits-at") == f"runs/second, {number}"
    make("damaged", ["no record"], 40)
    assert shown("list") == "runs/damaged"
    (tmp_path / "runs" / "damaged" / "config.yaml").write_text("name: digits-at\nthreat: [")
    assert shown("list") == "runs/damaged"
    (tmp_path / "runs" / "damaged" / "config.yaml").write_bytes(b"\xff")
    assert shown("list") == f"runs/second, {number}"


@few_samples
def test_train_sample_evaluate_report(tmp_path, capsys):
    """All four stages by hand, each from the files of the one before."""
    config = tmp_path / "c.yaml"
    config.write_text(dump(tiny()))
    folder = tmp_path / "run"
    status, out, err = call(
        "train", "--config", config, "--out", folder, "--train.images", 3000, "--device", "cpu", capsys=capsys
    )
    assert (status, out.strip()) == (0, str(folder))
    assert "left" in err or "3,000/3,000" in err
    assert Run.open(folder).recipe.train.images == 3000
    status, out, _ = call("sample", folder, "--method", "ta", "--per-class", 4, "--sampler.steps=3", capsys=capsys)
    assert (status, out.strip()) == (0, str(folder / "samples" / "ta-class" / "grid.png"))
    manifest = json.loads((folder / "samples" / "ta-class" / "manifest.json").read_text())
    assert manifest["sampler"] == {**manifest["sampler"], "kind": "ta", "steps": 3, "step_size": 0.1, "start": "class"}
    assert manifest["count"] == 40
    with np.load(folder / "samples" / "ta-class" / "images.npz") as arrays:
        assert arrays["x"].shape == (40, 1, 8, 8)
        assert arrays["x"].dtype == np.uint8
        assert arrays["y"].tolist() == [k for k in range(10) for _ in range(4)]
    with Image.open(folder / "samples" / "ta-class" / "grid.png") as grid:
        assert 600 < grid.height == pytest.approx(grid.width * 10 / 4, rel=0.02)
    status, out, _ = call("evaluate", folder, "--threat.steps", 2, capsys=capsys)
    assert status == 0
    assert re.search(r"accuracy under PGD-2 l2 0\.9 .*%.*359", out)
    assert "FD (own features)" in out
    table, classes = out.strip().split("\n\n")
    assert len(Run.open(folder).records()) == len(table.splitlines()) - 1
    assert classes.split()[:5] == ["intended", "class", "(own", "features)", "ta-class"]
    assert len(classes.splitlines()) == 1 + 10
    status, out, _ = call("evaluate", folder, "--json", "--features", folder, capsys=capsys)
    printed = [json.loads(line) for line in out.splitlines()]
    records = Run.open(folder).records()
    assert [r["value"] for r in records[-len(printed) :]] == [r["value"] for r in printed]
    assert all(r["count"] > 0 and r["error"] >= 0 for r in records)
    assert records[-1]["checkpoint"] == "3072"
    status, out, _ = call("report", folder, capsys=capsys)
    page = (folder / "report.html").read_text()
    assert out.strip() == str(folder / "report.html")
    assert page.count("data:image/png;base64,") >= 6
    assert not re.search(r"(src|href)=.https?:", page)


MINE = """
from torch import nn

def classifier():
    layers = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 2))

def ten(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
def small(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
def text(): return "no module"
def asks(width): return ten()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own, and 200 mixed images of two classes in different sizes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    rng = np.random.default_rng(0)
    for i in range(200):
        kind = ("red", "blue")[i % 2]
        pixels = rng.integers(0, 120, (16 + i % 7, 16 + i % 5, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 100
        path = tmp_path / "pictures" / kind / f"{i}.{('png', 'jpg')[i % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return ["--recipe", "digits-at", "--data", "folder:pictures", "--data.size", "16"]


def test_ones_own_module_and_folder_from_nothing_to_a_report(mine, tmp_path, capsys):
    """The commands of the README: everything in one, and a trained module taken over as it is."""
    short = ["--train.images", "2560", "--train.batch", "64", "--train.ema", "0", "--device", "cpu"]
    folder = tmp_path / "runs" / "mine"
    status, out, err = call("run", *mine, "--model", "mine:classifier", *short, "--out", folder, capsys=capsys)
    assert status == 0, err
    assert re.search(r"^accuracy +(100|9\d)\.\d ± ", out, re.M), out
    assert "FD (own features)" in out
    assert out.strip().endswith(str(folder / "report.html"))
    assert (folder / "samples" / "cs-class" / "grid.png").exists()
    assert Run.open(folder).recipe.backbone.path == "mine:classifier"
    taken = ["train", *mine, "--model", "mine:classifier", "--init", folder, "--train.images", 0, "--train.batch", 64]
    status, out, err = call(*taken, "--device", "cpu", "--out", "taken", capsys=capsys)
    assert (status, out) == (0, "taken\n"), err
    one, two = (Run.open(Path(r)).model()[0].state_dict() for r in (folder, "taken"))
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("mine:ten", r"returns \(2, 10\) for 2 images, there have to be 2 logits an image"),
        ("mine:small", "does not take images of 3 x 16 x 16"),
        ("mine:text", "mine:text returns a str, not a torch module"),
        ("mine:asks", "mine:asks is called without arguments: missing a required argument: 'width'"),
        ("mine:nothing", "'mine:nothing' cannot be imported"),
        ("nobody:here", "'nobody:here' cannot be imported"),
        ("mine", "is package.module:factory, got 'mine'"),
    ],
)
def test_modules_that_do_not_fit_are_one_line(mine, tmp_path, capsys, factory, message):
    train = ["train", *mine, "--train.batch", 64, "--device", "cpu", "--out", "out", "--model", factory]
    assert re.search(message, refused(*train, capsys=capsys))
    assert not (tmp_path / "out").exists()


def test_print_config_is_a_config(tmp_path, capsys):
    status, out, _ = call(
        "train", "--recipe", "digits-at", "--objective", "noise", "--seed", 4, "--print_config", capsys=capsys
    )
    assert status == 0
    plain = yaml.safe_load(out)
    assert plain["objective"] == {"kind": "noise", "std": 24 / 255}
    assert plain["seed"] == 4
    config = tmp_path / "c.yaml"
    config.write_text(out)
    assert call("train", "--config", config, "--print-config", capsys=capsys)[1] == out


def test_resume_goes_on(run, capsys):
    latest = run.checkpoints.path().name
    status, out, _ = call("train", "--resume", run.folder, "--device", "cpu", capsys=capsys)
    assert (status, out.strip()) == (0, str(run.folder))
    assert run.checkpoints.path().name == latest


AT = ["train", "--recipe", "digits-at"]
MISTAKES = {
    "misspelt option": (
        [*AT, "--objective.attack.epz", "0.1"],
        r"'epz' is unknown \(did you mean 'eps'\?\); there is eps,",
    ),
    "unknown recipe": (
        ["train", "--recipe", "digits-att"],
        r"no recipe 'digits-att' \(did you mean 'digits-at'\?\); there is",
    ),
    "no recipe": (["train"], "train takes --recipe NAME, --config FILE or --resume RUN"),
    "two recipes": ([*AT, "--config", "x.yaml"], "not allowed with argument"),
    "negative eps": ([*AT, "--objective.attack.eps", "-0.1"], "eps is a radius >= 0 .* got -0.1"),
    "eps in bytes": ([*AT, "--threat.norm", "linf", "--threat.eps", "8"], "write 8/255, not 8"),
    "unknown kind": (
        [*AT, "--objective", "trade"],
        "no objective 'trade'.*there is acl, .*at, awp, .*fast, .*standard, trades",
    ),
    "unknown command": (["trian"], r"no command 'trian' \(did you mean 'train'\?\)"),
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown flag": ([*AT, "--epochs", "3"], "unexpected '--epochs'; options of a recipe have a dot, as in --data"),
    "flag without value": ([*AT, "--train.images"], "--train.images needs a value"),
    "missing config": (["train", "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    "missing run": (["sample", "nowhere"], "there is no run or model at nowhere"),
    "missing run to resume": (["train", "--resume", "nowhere"], "there is no run at nowhere"),
    "missing run to report": (["report", "nowhere"], "there is no run or model at nowhere"),
    "options on resume": (["train", "--resume", "nowhere", "--train.images", "5"], "keeps its own recipe"),
    "options that do not apply": (["report", "x", "--train.images", "5"], r"this command takes --data\."),
    "unknown device": ([*AT, "--device", "gpu7"], "there is no device 'gpu7'"),
    "seed that is no number": ([*AT, "--seed", "x"], "invalid int value: 'x'"),
    "unknown list": (["list", "objectivs"], "did you mean"),
    "misspelt plain option": (["train", "--recip", "digits-at"], r"unexpected '--recip' \(did you mean '--recipe'\?\)"),
    "option of another command": (["demo", "--seeds", "1"], r"unexpected '--seeds' \(did you mean '--seed'\?\)"),
    "validation split too small": (
        [*AT, "--data.val", "0.0001"],
        r"1797 images of 10 classes are too few to cut shares of 0.2, 0.0001 .*--data.val",
    ),
    "momentum": (
        [*AT, "--optimizer.momentum", "-1", "--optimizer.nesterov", "no"],
        r"momentum must lie in \[0, 1\)",
    ),
    "list that is none": ([*AT, "--optimizer", "adam", "--optimizer.betas", "[0.9, {"], "takes a list such as 1,2,3"),
    "empty module": ([*AT, "--data", ":"], "cannot be imported"),
    "shrinkage": ([*AT, "--sampler.shrinkage", "7"], "shrinkage must lie in"),
    "long name": ([*AT, "--device", "cpu", "--out", "x" * 300], "cannot write"),
    "infinite rate": ([*AT, "--optimizer.lr", "inf"], "takes a number"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(mistake, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[mistake]
    assert re.search(message, refused(*arguments, capsys=capsys))
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_a_run_are_one_line(run, tmp_path, capsys):
    cases = [
        (["sample", run.folder, "--sampler.stepz", 1], r"'stepz' is unknown \(did you mean 'steps'\?\)"),
        (["sample", run.folder, "--method", "css"], r"no sampler 'css' \(did you mean 'cs'\?\)"),
        (["sample", run.folder, "--per-class", 0], "at least 1, got 0"),
        (["sample", run.folder, "--checkpoint", "77"], "there is no checkpoint '77' in .*; there is [0-9, ]+$"),
        (["sample", run.folder, "--train.images", "5"], "this command takes --sampler"),
        (["evaluate", run.folder, "--features", tmp_path / "no"], "there is no run or model at"),
        (["evaluate", run.folder, "--metrics.7.bins", 3], "not an item of a list of 5"),
        (["report", run.folder, "--beside", tmp_path], "there is no run or model at"),
        (["train", "--recipe", "digits-at", "--out", run.folder], "is not empty; to go on with it"),
        (["train", "--recipe", "digits-at", "--out", run.folder / "config.yaml"], "is a file"),
    ]
    for arguments, message in cases:
        assert re.search(message, refused(*arguments, capsys=capsys)), arguments
    assert not (run.folder / "samples").exists()


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1,\n", "objective: {kind: at}\n", "\x00"])
def test_files_that_are_no_recipe_are_one_line(text, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    refused("train", "--config", config, "--out", tmp_path / "run", capsys=capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "nonsense", "999999", "../../etc"])
def test_a_damaged_pointer_is_one_line(text, run, capsys):
    (run.folder / "checkpoints" / "LATEST").write_text(text)
    for arguments in (["sample", run.folder], ["train", "--resume", run.folder], ["evaluate", run.folder]):
        assert "checkpoint" in refused(*arguments, capsys=capsys)


def test_a_damaged_checkpoint_is_one_line(run, capsys):
    path = run.checkpoints.path() / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    for arguments in (["sample", run.folder], ["train", "--resume", run.folder], ["evaluate", run.folder]):
        assert "is damaged: ema.safetensors" in refused(*arguments, capsys=capsys)


def test_damaged_samples_are_one_line(run, capsys):
    assert call("sample", run.folder, "--per-class", 2, "--sampler.steps", 1, capsys=capsys)[0] == 0
    images = run.folder / "samples" / "cs-class" / "images.npz"
    images.write_bytes(images.read_bytes()[:100])
    assert "images.npz is damaged" in refused("report", run.folder, capsys=capsys)


def test_a_folder_that_cannot_be_written_is_one_line(capsys):
    if not Path("/proc/version").exists():
        pytest.skip("needs a folder that nobody can write to, such as /proc")
    message = refused("train", "--recipe", "digits-standard", "--out", "/proc/advebm", "--device", "cpu", capsys=capsys)
    assert "cannot write /proc/advebm" in message


def test_a_read_only_run_folder_is_one_line(run, capsys, monkeypatch):
    """Permissions do not stop root, so the system call is made to fail instead."""
    from advebm.core import files

    def read_only(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "fsync", read_only)
    assert "cannot write" in refused("report", run.folder, capsys=capsys)
    status, out, err = call("evaluate", run.folder, "--threat.steps", 1, capsys=capsys)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"advebm: error: cannot write .*metrics.json: Permission denied; .*", err.splitlines()[-1])
    assert not (run.folder / "report.html").exists()
    assert not list(run.folder.glob(".*.tmp"))


@pytest.mark.slow
@few_samples
def test_the_demo_prints_its_table(tmp_path, capsys, monkeypatch):
    """The real demo with a fraction of the training: every stage, the table, the report."""
    from advebm.workflows import demo

    monkeypatch.setattr(recipes, "find", lambda name, find=recipes.find: {**find(name), "train": {"images": 2000}})
    monkeypatch.setattr(demo, "PER_CLASS", 5)
    status, out, err = call("demo", "--out", tmp_path, capsys=capsys)
    assert status == 0, err
    assert re.search(r"accuracy +clean +attacked \(PGD-20 l2 0\.9\)", out)
    assert re.search(r"digits-at +[\d.]+ ± [\d.]+ % +[\d.]+ ± [\d.]+ %", out)
    for name in demo.SETS:
        assert re.search(rf"{name} +digits-standard \* ", out)
        assert re.search(rf"{name} +digits-at +\d", out)
    assert "accuracy under attack" in " ".join(out.split())
    assert "E(x) of" not in out
    (report,) = tmp_path.glob("demo-*/report.html")
    assert str(report) in out
    assert "[5/5] report" in err
    assert f"{report.parent / 'digits-at'}" in out.splitlines()[-1]
    assert out.splitlines()[-1].startswith("next: advebm ")
    monkeypatch.setattr(demo.evaluate, "evaluate_run", lambda *a, **k: [])  # it is measured already
    status, out, err = call("demo", "--resume", report.parent, "--all", capsys=capsys)
    assert (status, "E(x) of uniform noise" in out) == (0, True), err


def test_options_may_stand_anywhere(run, capsys):
    arguments = ["sample", "--sampler.steps", 1, run.folder, "--per-class", 1, "--sampler.start=global"]
    assert call(*arguments, capsys=capsys)[0] == 0
    assert (run.folder / "samples" / "cs-global" / "grid.png").exists()


@few_samples
def test_few_samples_do_not_cost_the_other_records(run, capsys):
    call("sample", run.folder, "--per-class", 1, "--sampler.steps", 1, "--name", "few", capsys=capsys)
    status, out, _ = call(
        "evaluate", run.folder, "--threat.steps", 1, "--metrics", "accuracy,sample-quality", capsys=capsys
    )
    assert status == 0
    assert "accuracy" in out
    assert len([r for r in run.records() if r["settings"].get("samples") == "few"]) == 8
    call("sample", run.folder, "--checkpoint", "best", "--per-class", 1, "--sampler.steps", 1, capsys=capsys)
    manifest = json.loads((run.folder / "samples" / "cs-class" / "manifest.json").read_text())
    assert manifest["checkpoint"] == run.checkpoints.path("best").name


def test_samples_of_another_checkpoint_are_noticed(run):
    from advebm.evaluation.evaluate import evaluate_run
    from advebm.workflows.sample import draw_set

    other = run.checkpoints.names()[0]
    draw_set(run, "old", run.recipe.sampler, 1, checkpoint=other)
    recipe = __import__("dataclasses").replace(run.recipe, metrics=())
    with pytest.warns(UserWarning, match=f"samples old were drawn from checkpoint {other}, not 6016"):
        assert evaluate_run(run, recipe=recipe) == []


def test_metrics_can_be_chosen(capsys):
    _, out, _ = call(
        "train", "--recipe", "digits-at", "--metrics", "accuracy,energies", "--print_config", capsys=capsys
    )
    assert [m["kind"] for m in yaml.safe_load(out)["metrics"]] == ["accuracy", "energies"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.json", "[1]"),
        ("metrics.json", "{}"),
        ("metrics.json", "[{}]"),
        ("samples/cs-class/manifest.json", "{}"),
        ("samples/cs-class/manifest.json", "[]"),
        ("samples/cs-class/images.npz", "not an archive"),
        ("config.yaml", "data: 5"),
        ("config.yaml", "\x00"),
    ],
)
def test_damaged_files_of_a_run_are_one_line(run, capsys, file, text):
    call("sample", run.folder, "--per-class", 1, "--sampler.steps", 1, capsys=capsys)
    (run.folder / file).write_text(text)
    refused("report", run.folder, capsys=capsys)


def test_damaged_lines_of_the_log_are_left_out(run, capsys):
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"a": 1}\n{"images": 9, "tr')
    assert call("report", run.folder, capsys=capsys)[0] == 0
    assert call("train", "--resume", run.folder, "--device", "cpu", capsys=capsys)[0] == 0


def test_two_runs_of_one_recipe_keep_their_own_numbers(run, small_run, tmp_path, capsys):
    for folder, value in ((run.folder, 0.25), (tmp_path / "other", 0.75)):
        if folder != run.folder:
            __import__("shutil").copytree(small_run.folder, folder)
        record = {"name": "accuracy", "value": value, "error": 0.0, "count": 4, "settings": {}, "series": {}}
        (folder / "metrics.json").write_text(json.dumps([record]))
    call("report", run.folder, "--beside", tmp_path / "other", capsys=capsys)
    page = (run.folder / "report.html").read_text()
    assert "classifies 25.0 % of 4 test images correctly" in page
    assert "75.0 ± 0.0 %" in page
    assert page.count("<h3>") == 2


@pytest.mark.parametrize("name", ["../evil", "a/b", ".", ""])
def test_samples_stay_in_the_run(run, capsys, name):
    if name:
        assert "--name is the name of a folder" in refused("sample", run.folder, "--name", name, capsys=capsys)
    assert not (run.folder / "samples").exists()


EVERY_KIND = sorted({kind for role, kinds in config.KINDS.items() if role != "outlier" for kind in kinds})


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_is_explained(kind, capsys):
    assert cli.main(["explain", kind]) == 0
    out = capsys.readouterr().out
    for role, kinds in config.KINDS.items():
        if kind in kinds and role != "outlier":
            cls = config.lookup(role, kind)
            assert f"{kind}: {role} (" in out
            for field in dataclasses.fields(cls):
                assert not field.init or re.search(rf"^  {field.name}\b", out, re.M), field.name


def test_every_option_is_explained():
    """In the docstring of its class or of a base, as explain prints it; none only refers to another class."""
    for role, kinds in config.KINDS.items():
        for kind in kinds:
            cls = config.lookup(role, kind)
            for field in dataclasses.fields(cls):
                text = catalog._meanings(cls).get(field.name, "")
                if field.init:
                    assert len(text) > 1, (role, kind, field.name)
                    assert not re.match("see [A-Z]", text), (role, kind, text)


def test_an_explanation_has_options_sources_and_recipes(capsys):
    cli.main(["explain", "acl"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "Attributes" not in out
    assert "``" not in out
    assert "set by --objective.NAME" in out
    assert re.search(r"^  attack\.eps +8/255 +radius, for pixel values in \[0, 1\]", out, re.M)
    assert re.search(r"^  attack\.step_size +2/255 +for pixel values", out, re.M), "the method's own default"
    assert re.search(r"^  temperature +0\.5 +τ in f = ", out, re.M), "as InfoNCE has it"
    assert re.search(r"^  negatives  .*(\n {10}.*)*are not\s+valid", out, re.M), "what ACL adds to it"
    assert "van den Oord, Aäron; Li" in out
    assert "cifar10-acl-small, digits-acl" in out
    cli.main(["explain", "patches"])
    assert "set by --data.NAME or --outside.NAME or --extra.NAME" in capsys.readouterr().out
    cli.main(["explain", "own"])
    assert re.search(r"^  path +required +\S", capsys.readouterr().out, re.M)
    cli.main(["explain", "gaussian"])
    assert capsys.readouterr().out.startswith("gaussian: outlier (")
    cli.main(["explain", "cifar10-at-2h"])
    assert "ResNet-18 of width 32" in capsys.readouterr().out
    for word in ("jetat", "qqq"):
        assert cli.main(["explain", word]) == 2
        near = re.search("near it are (.*); see", capsys.readouterr().err)[1].split(", ")
        assert len(near) == 5
        assert word == "qqq" or near[:3] == ["jeat", "weat", "prejeat"]


def test_titles_are_written_as_they_are_printed():
    for key in citations._entries():
        (line,) = citations.titles([key])
        assert not re.search(r"[\\{}]|\.\.|[?!]\.", line), line
        assert re.search(r", .*\. .*[.?!] \d{4}$", line), line
    found = citations.titles(["oord2018", "binkowski2018", "zhang2019", "unknown"])
    assert "Aäron" in found[0]
    assert found[1].startswith("Bińkowski, Mikołaj; ")
    assert "Robustness and Accuracy. 2019" in found[2]
    assert found[3] == "unknown"
