"""Models by one protocol: numbers, order, resuming, models that fail, table and picture."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.transforms import Bbox

import advebm
from advebm import cli, recipes
from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.evaluation import compare, leaderboard
from advebm.evaluation.leaderboard import SAMPLER, Protocol, Row, Tier, most_robust_first
from advebm.metrics.base import Subject
from advebm.metrics.ood import ClassGaussianNoise, EnergyScore, GaussianNoise, OutOfDistribution, UniformNoise
from advebm.metrics.quality import SampleQuality
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.metrics.spaces import Pixels
from advebm.reporting import leaderboard as pages
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.starts import CompactGaussians
from advebm.training.loop import train
from advebm.workflows import leaderboard as workflow
from tests.helpers import few_samples, linked

FEW = {"sampler.steps": 2}
pytestmark = few_samples


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """An empty folder, and a tier that takes a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    tier = Tier(lambda ball: Attack(ball.eps, ball.norm, steps=3), 100, 40, 50)
    monkeypatch.setattr(leaderboard, "TIERS", {"quick": tier})


@pytest.fixture
def runs(small_run, tmp_path):
    """The same short training at its end and at its beginning."""
    for name in ("trained", "raw"):
        (tmp_path / name).mkdir()
    trained = linked(small_run, tmp_path / "trained")
    raw = tmp_path / "raw"
    (raw / "config.yaml").write_text((small_run.folder / "config.yaml").read_text().replace("digits-at", "digits-raw"))
    shutil.copytree(small_run.folder / "checkpoints", raw / "checkpoints")
    (raw / "checkpoints" / "LATEST").write_text(Run(raw).checkpoints.names()[0])
    return trained, Run(raw)


def rank(models, **rest):
    return advebm.leaderboard(models, **{"options": FEW, "device": "cpu", "out": "board", **rest})


def test_numbers_are_those_of_evaluate_on_the_same_images(runs):
    """Each measured again in memory, from the network, the images and the set that was drawn."""
    trained, raw = runs
    board = rank([raw, trained])
    assert [row.title for row in board.rows] == ["digits-at", "digits-raw"]
    for row, run in zip(board.rows, (trained, raw), strict=True):
        model, data = run.model()[0], run.data
        samples = {"s": generate.read_set(run.samples()["leaderboard-quick-cs-class"])}
        subject = Subject(model, data, data.test, run.recipe.threat, samples, Pixels().load("cpu"))
        attack = Attack(run.recipe.threat.eps, run.recipe.threat.norm, steps=3)
        detection = OutOfDistribution(
            (EnergyScore(),), (UniformNoise(), GaussianNoise(), ClassGaussianNoise()), 50, 0.0
        )
        metrics = [Accuracy(), RobustAccuracy(attack, images=100), SampleQuality(), detection]
        found = {r.name: r for r in compare.evaluate.evaluate(subject, metrics)}
        aurocs = [r.value for name, r in found.items() if name.startswith("AUROC")]
        assert len(aurocs) == 3
        assert row.numbers["AUROC"]["value"] == min(aurocs)
        expected = {"clean": "accuracy", "robust": "accuracy under PGD-3 l2 0.9", "FD": "FD (pixels)"}
        for column, name in expected.items():
            assert row.numbers[column]["value"] == pytest.approx(found[name].value, rel=1e-6), column
            assert row.numbers[column]["count"] == found[name].count
        assert row.numbers["robust"]["count"] == 100
        assert len(samples["s"].x) == row.numbers["FD"]["count"] == 40
        assert row.parameters == sum(p.numel() for p in model.parameters())
        assert row.numbers["seconds"]["value"] > 0


def test_starts_attack_and_judge_are_the_same_for_all(runs):
    """Without a step all models have the same samples and FD, whatever a run keeps for validation."""
    config = runs[1].folder / "config.yaml"
    assert config.read_text().count("val: 0.1\n") == 1
    config.write_text(config.read_text().replace("val: 0.1\n", "val: 0.3\n"))
    board = rank(list(runs), options={"sampler.steps": 0, "threat.eps": 0.25, "threat.norm": "l2"})
    first, second = board.rows
    assert first.numbers["FD"]["value"] == second.numbers["FD"]["value"]
    assert {row.numbers["robust"]["name"] for row in board.rows} == {"accuracy under PGD-3 l2 0.25"}
    assert first.numbers["clean"]["value"] != second.numbers["clean"]["value"]


def test_what_is_measured_is_not_measured_again(runs, monkeypatch):
    measured, drawn = [], []
    evaluate_run, draw_set = compare.evaluate.evaluate_run, workflow.draw_set
    count = lambda run, recipe, **rest: measured.extend(recipe.metrics) or evaluate_run(run, recipe=recipe, **rest)
    monkeypatch.setattr(compare.evaluate, "evaluate_run", count)
    monkeypatch.setattr(workflow, "draw_set", lambda run, **plan: drawn.append(run.folder) or draw_set(run, **plan))
    trained, raw = runs
    first = rank([trained])
    assert (len(measured), len(drawn)) == (4, 1)
    assert rank([trained]).describe()["rows"] == first.describe()["rows"]
    assert (len(measured), len(drawn)) == (4, 1)
    both = rank([trained, raw])
    assert (len(measured), len(drawn)) == (8, 2)
    assert both.rows[0].describe() == first.rows[0].describe()
    before = raw.records()
    rank([trained, raw], options={"sampler.steps": 3}, replace=True)  # only the samples are others
    assert [type(m) for m in measured[8:]] == [SampleQuality] * 2
    assert raw.records()[: len(before)] == before


def test_a_stopped_one_goes_on(runs, monkeypatch):
    """Stopped after the accuracies of the second model: its table has them not yet, the same call then draws alone."""
    trained, raw = runs
    draw_set = workflow.draw_set

    def stop(run, **plan):
        if run.folder == raw.folder:
            raise KeyboardInterrupt
        return draw_set(run, **plan)

    monkeypatch.setattr(workflow, "draw_set", stop)
    with pytest.raises(KeyboardInterrupt):
        rank([trained, raw])
    kept = json.loads(Path("board/leaderboard.json").read_text())["rows"]
    assert {row["title"]: "FD" in row["numbers"] for row in kept} == {"digits-at": True, "digits-raw": False}
    names = [r["name"] for r in raw.records()]
    monkeypatch.setattr(workflow, "draw_set", draw_set)
    board = rank([trained, raw])
    assert all(names.count(r["name"]) == 1 for r in raw.records() if r["name"] in names)
    assert "FD" in board.rows[1].numbers


def broken(monkeypatch):
    """Modules beside the tests: one with three classes, one that raises an error once it is attacked."""
    Path("three_classes.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def three(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
        "class Fails(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        if x.requires_grad: raise RuntimeError('no gradient here')\n"
        "        return self.layer(x.flatten(1))\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))


def test_a_model_that_fails_leaves_the_others(runs, monkeypatch, capsys):
    broken(monkeypatch)
    trained = runs[0]
    board = rank(["nowhere", "three_classes:three", "three_classes:Fails", str(trained.folder)])
    assert board.rows[0].title == "digits-at"
    assert not board.rows[0].why
    assert board.rows[0].numbers.keys() == {"clean", "robust", "AUROC", "seconds", "FD"}
    why = {row.model: row.why for row in board.rows[1:]}
    assert why["nowhere"].startswith("there is no run or model at nowhere")
    assert "10" in why["three_classes:three"]
    assert "no gradient here" in why["three_classes:Fails"]
    told = capsys.readouterr().err
    assert told.count("there is no run or model at nowhere") == 1
    assert told.index("nowhere") < told.index("Accuracy"), "references are checked before anything is measured"
    page = Path("board/leaderboard.md").read_text()
    assert all(text.splitlines()[0][:40] in page for text in why.values())
    with pytest.raises(UserError, match="no model can be measured: nowhere: there is no run"):
        rank(["nowhere"])


def test_other_test_images_are_refused(runs, tmp_path):
    trained = runs[0]
    other = tmp_path / "other"
    other.mkdir()
    text = (trained.folder / "config.yaml").read_text()
    assert "split_seed: 0" in text
    (other / "config.yaml").write_text(text.replace("split_seed: 0", "split_seed: 1"))
    (other / "checkpoints").symlink_to(trained.folder / "checkpoints")
    board = rank([str(trained.folder), str(other)])
    assert [bool(row.why) for row in board.rows] == [False, True]
    assert "other test images or classes than" in board.rows[1].why


def test_gaussians_that_a_model_brings_are_not_used(runs):
    trained = Run(runs[0].folder)
    trained.data = trained.data._replace(gaussians=CompactGaussians.fit(trained.data.train.x))
    assert workflow.share_data({"a": trained}, pytest.fail)["a"].data.gaussians is None
    assert trained.data.gaussians is not None, "the run that was given stays as it is"


def test_critics_have_no_row_of_numbers(runs, tmp_path):
    options = {"backbone.width": 8, "train.images": 128, "train.validate_every": 1000, "outside": "noise"}
    critic = train(resolve(recipes.find("digits-binary-at"), list(options.items())), tmp_path / "critic", device="cpu")
    board = rank([critic, runs[0]])
    assert [bool(row.numbers) for row in board.rows] == [True, False]
    assert "no classifier of 10 classes" in board.rows[1].why


def test_a_model_is_not_judged_by_itself(runs):
    """Not by its folder either, nor by a copy of its weights."""
    trained, raw = runs
    copy = shutil.copytree(trained.folder, "copy")
    board = rank([trained, raw], features=copy)
    judged = {row.title: row for row in board.rows}
    assert "FD" not in judged["digits-at"].numbers
    assert "judge" in judged["digits-at"].why
    assert judged["digits-raw"].numbers["FD"]["name"] == "FD (features of copy)"
    assert judged["digits-raw"].numbers["class score"]["value"] >= 1


def test_the_judge_of_the_package_is_that_of_its_data(small_run, monkeypatch):
    for name, about in {"robust": {"data": "cifar10"}, "judge": {"data": "cifar10", "probed": "infonce"}}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(about))
    monkeypatch.setattr(leaderboard, "bundled_models", lambda: {name: Path(name) for name in ("robust", "judge")})
    data = small_run.data
    assert leaderboard.default_features(data) == "pixels"
    assert leaderboard.default_features(data._replace(name="cifar10")) == "judge"


def test_the_threat_is_that_of_the_first_model_that_knows_one(runs):
    trained, raw = runs
    told = workflow.choose_protocol([trained, raw], [], "quick", "pixels", 0)
    assert told.attack == Attack(0.9, "l2", steps=3)
    plain = Run(raw.folder)
    plain.recipe = dataclasses.replace(raw.recipe, objective=advebm.load_recipe("digits-standard").objective)
    plain.recipe = dataclasses.replace(plain.recipe, threat=Attack(0.1, "linf"))
    assert workflow.choose_protocol([plain, trained], [], "quick", "pixels", 0).attack == told.attack
    changed = workflow.choose_protocol([trained], [("threat.eps", "0.5"), ("sampler", "ta")], "quick", "pixels", 0)
    assert changed.attack.eps == 0.5
    assert (type(changed.sampler).__name__, changed.sampler.steps) == ("TA", SAMPLER.steps)
    with pytest.raises(UserError, match=r"the tier says which attack.*--threat\.steps"):
        workflow.choose_protocol([trained], [("threat.steps", 7)], "quick", "pixels", 0)


def test_rows_are_sorted_by_robust_accuracy():
    row = lambda name, value: Row(name, name, numbers={} if value is None else {"robust": {"value": value}})
    rows = [row("a", None), row("b", 0.0), row("c", 0.5), row("d", None), row("e", 0.3)]
    assert "".join(r.title for r in most_robust_first(rows)) == "cebad"


def test_the_estimate_counts_gradients(small_run):
    """PGD-3 on 100 images and 40 samples of 16 steps; then nothing is left of what is measured."""
    protocol = Protocol.of("quick", small_run.recipe.threat, SAMPLER, "pixels")
    assert protocol.gradients(small_run.data) == (300, 640)


def test_a_leaderboard_of_another_protocol_is_kept(runs):
    trained = runs[0]
    rank([trained], out=None)
    rank([trained], out=None)
    assert not Path("leaderboard-2").exists()
    assert rank([trained], out=None, seed=1).folder == Path("leaderboard-2")
    with pytest.raises(UserError, match="is there already"):
        rank([trained], out="leaderboard", seed=2)
    assert rank([trained], out="leaderboard", seed=2, replace=True).protocol.seed == 2


def test_the_command_prints_the_table_and_writes_the_files(runs, capsys):
    trained, raw = runs
    command = ["leaderboard", raw.folder, trained.folder, "--device", "cpu", "--out", "b", "--sampler.steps", 2]
    assert cli.main([str(word) for word in command]) == 0
    out, err = capsys.readouterr()
    assert out.index("digits-at") < out.index("digits-raw")
    assert "FD, n = 40" in out
    assert "all that is left: up to" in err
    plain = json.loads(Path("b/leaderboard.json").read_text())
    assert plain["protocol"]["attack"]["steps"] == 3
    assert plain["rows"][0]["numbers"]["robust"]["interval"][0] < plain["rows"][0]["numbers"]["robust"]["value"]
    page = Path("b/leaderboard.md").read_text()
    assert "lower is better" in page
    assert "features of `pixels`" in page
    assert Path("b/leaderboard.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["leaderboard", str(trained.folder), "--tier", "slow"]) == 2
    assert "no tier 'slow'" in capsys.readouterr().err


def test_models_that_no_other_beats():
    points = {"a": (60, 5.0), "b": (50, 4.0), "c": (55, 6.0), "d": (40, 4.0)}
    assert pages.undominated(points) == ["a", "b"]


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_titles_of_a_dozen_models_do_not_overlap(spread, generator):
    places = torch.randn(12, 2, generator=generator) * torch.tensor([spread, 0.1 * spread]) + torch.tensor([50.0, 8.0])
    points = {f"cifar10-model-{i}": (float(x), float(y)) for i, (x, y) in enumerate(places)}
    figure, axis = plt.subplots(figsize=(6, 6))
    axis.set(xlim=(10, 90), ylim=(4, 12))
    figure.canvas.draw()
    texts = pages.label_points(axis, points, dict.fromkeys(points, (0.5, 0.05)))
    boxes = [text.get_window_extent() for text in texts]
    plt.close(figure)
    assert [text.get_text() for text in texts] == list(points)
    assert all(Bbox.intersection(a, b) is None for a, b in itertools.combinations(boxes, 2))
