"""Evaluations: suites, models without a run, images from a folder, on the command line."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from advebm import cli
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.cw import CW
from advebm.attacks.projected import Attack
from advebm.core.config import KINDS, build, describe
from advebm.core.errors import UserError
from advebm.data.folders import read_folder
from advebm.evaluation import suites
from advebm.metrics.robustness import Accuracy, RobustAccuracy
from advebm.models import network
from advebm.runs.run import Run
from advebm.sampling import generate
from advebm.workflows.adopt import adopt
from advebm.workflows.evaluate import import_samples
from advebm.workflows.sample import draw_set
from tests.helpers import few_samples


@pytest.fixture
def run(small_run, tmp_path):
    return Run(Path(shutil.copytree(small_run.folder, tmp_path / "run")))


def module() -> nn.Module:
    """A classifier of digits, as somebody else would hand it over: it normalises by itself."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


THREAT = Attack(eps=0.1, steps=3)


def test_suites_stay_in_the_ball_of_the_threat():
    threat = Attack(eps=0.5, norm="l2", steps=3)
    for name in suites.SUITES:
        for tier in suites.TIERS:
            attacks = [m.attack for m in suites.suite(name, threat, tier) if isinstance(m, RobustAccuracy)]
            assert all((a.eps, a.norm) == (0.5, "l2") for a in attacks if not isinstance(a, CW))
    assert suites.suite("robustbench", THREAT) == (Accuracy(), RobustAccuracy(AutoAttack(0.1)))
    (_, quick) = suites.suite("robustbench", THREAT, "quick")
    assert (quick.attack.version, quick.images) == ("quick", 512)
    pgd, energy, cw, auto = (m.attack for m in suites.suite("jeat", THREAT) if isinstance(m, RobustAccuracy))
    assert (pgd.steps, pgd.step_size, pgd.restarts, pgd.loss, energy.loss) == (50, 0.025, 5, "cross-entropy", "energy")
    assert (cw.c, auto.version) == (0.2, "standard")
    everything = suites.suite("all", THREAT)
    assert len(set(everything)) == len(everything)
    assert {type(m) for name in suites.SUITES for m in suites.suite(name, THREAT)} == {type(m) for m in everything}
    with pytest.raises(UserError, match=r"no suite 'robustbensh' \(did you mean"):
        suites.suite("robustbensh", THREAT)
    with pytest.raises(UserError, match="no tier 'long'"):
        suites.suite("cem", THREAT, "long")


def test_metrics_of_suites_can_be_written_down():
    for metric in suites.suite("all", THREAT):
        assert build(describe(metric), "metric") == metric


def test_a_module_without_a_run_is_evaluated(tmp_path, monkeypatch, capsys):
    out = tmp_path / "taken"
    arguments = f"evaluate --model {__name__}:module --data digits --threat.eps 0.1 --out {out} --device cpu"
    assert cli.main([*arguments.split(), "--suite", "robustbench", "--tier", "quick"]) == 0
    assert "AutoAttack quick linf 25.5/255" in capsys.readouterr().out
    run, test = Run.open(out), Run.open(out).recipe.data.load().test
    with torch.no_grad():
        expected = (module()(test.float()).argmax(1) == test.y).float().mean().item()
    records = {r["name"]: r["value"] for r in run.records()}
    assert records["accuracy"] == pytest.approx(expected)
    assert records["accuracy under AutoAttack quick linf 25.5/255"] <= expected
    assert list((out / "verdicts").glob("*.json"))
    assert cli.main(["report", str(out)]) == 0
    assert cli.main([*arguments.split(), "--metrics", "accuracy"]) == 0  # the same folder again
    assert "go on" not in capsys.readouterr().err
    other = arguments.replace("--data digits", "--data digits --data.test 0.3")
    assert cli.main(other.split()) == 2
    assert "holds another model or other data" in capsys.readouterr().err


def test_nothing_is_left_of_a_misspelt_command(tmp_path, capsys):
    start = f"evaluate --model tests.evaluation.test_evaluate:module --data digits --out {tmp_path / 'no'} "
    for words, said in (
        ("--suite robustbensh", "no suite 'robustbensh'"),
        ("--tier quick", "--tier goes with --suite"),
        (f"--samples {tmp_path / 'none'}", "there is no folder"),
    ):
        assert cli.main((start + words).split()) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_models_folder_becomes_a_run(run, tmp_path):
    folder = run.checkpoints.path()
    taken = adopt(str(folder), tmp_path / "taken", [("data", "digits")])
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(taken.model()[0](x), network.load(folder)[0](x))
    two = pictures(tmp_path / "two", ["train/a", "train/b", "test/a", "test/b"], count=20)
    with pytest.raises(UserError, match="is for 10 classes of 1 x 8 x 8, two has 2 classes of 3 x 8 x 8"):
        adopt(str(folder), tmp_path / "no", [("data", f"folder:{two}"), ("data.size", 8)])
    assert not (tmp_path / "no").exists()


def test_a_model_is_not_a_run(run, capsys):
    both = ["evaluate", str(run.folder), "--model", "tests.evaluation.test_evaluate:module", "--data", "digits"]
    assert cli.main(both) == 2
    assert cli.main(["evaluate"]) == 2
    assert "takes a RUN, or --model" in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", "tests.evaluation.test_evaluate:module"]) == 2
    assert "says nothing of its images: give --data" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run.folder), "--data", "digits"]) == 2
    assert "has its own data" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run.folder), "--suite", "cem", "--metrics", "accuracy"]) == 2
    assert "leave --metrics out" in capsys.readouterr().err


def pictures(folder, names, count=6, size=8):
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            Image.new("L", (size, size), 40 * k + i).save(folder / name / f"{k}.png")
    return folder


@few_samples
def test_images_from_a_folder_are_judged_as_samples(run, tmp_path, capsys):
    folder = pictures(tmp_path / "mine", ["0", "3"])
    flat = pictures(tmp_path / "flat", ["."])
    arguments = ["evaluate", run.folder, "--samples", folder, "--samples", flat, "--metrics", "sample-quality"]
    assert cli.main([str(a) for a in [*arguments, "--device", "cpu"]]) == 0
    records = run.records()
    assert {r["settings"]["samples"] for r in records if r["name"].startswith("FD")} == {"mine", "flat"}
    assert {r["settings"]["samples"] for r in records if r["name"].startswith("intended")} == {"mine"}
    assert generate.read_set(run.folder / "samples" / "mine").y.tolist() == 6 * [0] + 6 * [3]
    flat_set = generate.read_set(run.folder / "samples" / "flat")
    assert flat_set.y.tolist() == 6 * [-1]
    torch.testing.assert_close(flat_set.x[1], torch.full((1, 8, 8), 40 / 255))
    assert cli.main(["report", str(run.folder)]) == 0
    other = pictures(tmp_path / "elsewhere" / "mine", ["."])
    with pytest.raises(UserError, match="has samples called mine already"):
        import_samples(run, other)


@few_samples
def test_sets_that_were_drawn_elsewhere_are_judged(run, tmp_path):
    drawn = draw_set(run, "here", run.recipe.sampler, 2)
    elsewhere = Path(shutil.copytree(drawn, tmp_path / "there"))
    for folder in (drawn, elsewhere, elsewhere):
        import_samples(run, folder)
    here, there = (generate.read_set(run.folder / "samples" / name) for name in ("here", "there"))
    assert torch.equal(here.x, there.x)
    assert torch.equal(here.y, there.y)
    assert there.manifest == {**here.manifest, "images": str(elsewhere), "film": []}
    generate.write_set(
        tmp_path / "small", generate.SampleSet(torch.rand(4, 1, 6, 6), torch.zeros(4), here.manifest), 10
    )
    with pytest.raises(UserError, match="holds images of 1 x 6 x 6, digits has 1 x 8 x 8"):
        import_samples(run, tmp_path / "small")
    generate.write_set(tmp_path / "more", here._replace(y=here.y + 1), 11)
    with pytest.raises(UserError, match="holds images of class 10, and the 10 classes of digits begin with 0"):
        import_samples(run, tmp_path / "more")
    assert set(run.samples()) == {"here", "there"}


def test_images_of_another_size_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"are 9x9, those of the data 8x8; resize them first"):
        import_samples(run, pictures(tmp_path / "large", ["."], size=9))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        read_folder(tmp_path / "empty", ("0",), (1, 8, 8))
    assert not (run.folder / "samples" / "large").exists()


def test_every_metric_has_its_place_in_a_suite():
    """But for the curve, which a figure of training runs shows, measures of encoders, and those of edits."""
    kinds = {describe(m)["kind"] for m in suites.suite("all", THREAT)}
    assert set(KINDS["metric"]) - kinds == {
        "robustness-curve",
        "linear-probe",
        "knn",
        "restoration",
        "counterfactuals",
    }
