"""The benchmarks run, and both sides of a row do the same work."""

import time
import zipfile

import pytest
import torch
from benchmarks import __main__ as benchmark
from benchmarks import gpu_check, tasks
from benchmarks.__main__ import ROWS, contestants
from benchmarks.tasks import TASKS, Setting

from advebm.data.readers import CIFAR10 as CLASSES
from advebm.data.readers import Cifar10
from advebm.data.sources import Data, Images
from advebm.runs.run import Run
from advebm.training.loop import train
from tests.helpers import tiny

PLAIN = {"sgld": "JEM loop", "binary-at": "AT-EBMs loop", "trades": "TRADES loop", "jem": "JEM loop"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks") / "run"
    return str(train(tiny(train__images=1_000), folder, device="cpu").folder)


@pytest.mark.parametrize("task", sorted({row.setting["task"] for row in ROWS}))
def test_both_sides_of_a_row_run(task, run):
    size = {"fid": 16, "sampling": 8}.get(task, 8)
    setting = Setting(task, "", batch=64 if task == "fid" else 8, steps=0 if task == "autoattack" else 2, size=size)
    if task in ("autoattack", "sampling"):
        setting = setting._replace(run=run)
    sides = ["advebm off", "advebm fold", PLAIN.get(task, "scipy sqrtm" if task == "fid" else "plain loop")]
    found = []
    for who in sides[: 2 if task == "autoattack" else 3]:  # AutoAttack's authors' code is not there
        torch.manual_seed(0)
        contest = TASKS[task](setting._replace(who=who))
        contest.turn()
        found.append(contest.quality())
        assert contest.work > 0
    assert all(one.keys() == found[0].keys() for one in found)
    for name, value in found[0].items():
        spread = {"deviation": 0.2, "accuracy": 0.3}.get(name, 0.05)  # 8 images from other random starts
        assert [one[name] for one in found] == pytest.approx([value] * len(found), abs=spread)


def test_steps_of_the_plain_loops_change_weights():
    for task in ("at", "trades", "jem", "binary-at"):
        for who in ("advebm off", "loop"):
            made = []
            original = tasks.network
            try:
                tasks.network = lambda *a, **k: made.append(original(*a, **k)) or made[-1]
                contest = TASKS[task](Setting(task, who, batch=8, steps=1, size=8))
            finally:
                tasks.network = original
            weights = [p.detach().clone() for p in made[0][0].parameters()]
            contest.turn()
            assert any((p != w).any() for p, w in zip(made[0][0].parameters(), weights, strict=True)), (task, who)


def test_every_row_has_sides():
    for row in ROWS:
        sides = contestants(row, "CIFAR", "DIGITS", "cpu", quick=True)
        assert set(row.peers) <= set(sides)
        assert {s.run for s in sides.values()} <= {"", "CIFAR", "DIGITS"}


@pytest.mark.parametrize("has", [True, False])
def test_nothing_is_measured_in_emulated_bfloat16(monkeypatch, has):
    monkeypatch.setattr(benchmark, "multiplies_bfloat16", lambda device: has)
    for row in ROWS:
        sides = contestants(row, "CIFAR", "DIGITS", "cpu", quick=False)
        assert any("bf16" in name for name in sides) == (has and any("bf16" in way for way in row.ours))
        assert any(name.startswith("advebm") for name in sides)


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch):
    """Images are packed and read again, a network is trained on them, attacked, drawn from and reported."""
    draw = torch.Generator().manual_seed(0)
    few = lambda n: Images(torch.randint(256, (n, 3, 32, 32), generator=draw, dtype=torch.uint8), torch.arange(n) % 10)
    data = Data("cifar10", CLASSES, few(300), few(40), few(60))
    monkeypatch.setattr(Cifar10, "load", lambda self: data)
    gpu_check.pack(tmp_path / "images.zip", tests=50)
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        archive.extractall(tmp_path / "images")
    check = gpu_check.Check("cpu", tmp_path / "out", time.monotonic() + 400, True)
    check.out.mkdir()
    name = "AT step, PGD-7, ResNet-18, batch 256"
    monkeypatch.setattr(gpu_check, "ROWS", {name: (gpu_check.ROWS[name][0], ("plain loop", "advebm fold", "nobody"))})
    found = gpu_check.speeds(check, 0.0)
    assert found[name]["advebm fold"]["seconds"] > 0
    assert gpu_check._rate(found) == 256 / found[name]["advebm fold"]["seconds"]
    trained = gpu_check.train(check, tmp_path / "images", 500.0)
    assert trained["status"] == 0
    assert [point["images"] for point in trained["points"]] == [256]
    assert trained["seconds to"].keys() == {"40%", "45%"}
    run = Run.open(check.out / "run")
    assert torch.equal(run.data.val.x[run.data.val.y.argsort(stable=True)], data.val.x[data.val.y.argsort(stable=True)])
    assert len(run.data.test) == 50
    closing = gpu_check.close(check)["APGD-CE and APGD-T"]
    assert closing["advebm fold"]["accuracy"] <= 1
    assert (check.out / "grid.png").exists()
    assert (check.out / "report.html").exists()
    assert gpu_check.speeds(check, 1e9) == {name: {"left out": "no time"}}
