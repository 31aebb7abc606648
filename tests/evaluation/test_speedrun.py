"""Speed-runs: recipes trained and measured alike, on the digits."""

import json
import statistics

import numpy as np
import pytest
import torch

from advebm import recipes
from advebm.core.errors import UserError
from advebm.evaluation import speedrun
from advebm.metrics.robustness import RobustAccuracy
from advebm.reporting.speedrun import learning_curves
from advebm.samplers.classifier import CS
from advebm.training.cost import estimates
from advebm.workflows import speedrun as workflow
from advebm.workflows.train import train_or_resume
from tests.helpers import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four short runs: two seeds of a recipe, and two of one with two stages."""
    folder = tmp_path_factory.mktemp("runs")
    stage = {"name": "first", "train": {"images": 640, "ema": 0}}
    recipes = [
        tiny(seed=seed, train__images=1280, train__validate_every=640, **more)
        for more in ({}, {"before": [stage]})
        for seed in (0, 1)
    ]
    return [train_or_resume(recipe, folder / str(i)) for i, recipe in enumerate(recipes)]


def test_runs_of_a_recipe_are_its_seeds_and_are_measured_on_test_images(trained, tmp_path, monkeypatch):
    found = workflow.run_recipes([str(run.folder) for run in trained], out=tmp_path, tier="quick", device="cpu")
    assert [len(entry.runs) for entry in found.entries] == [2, 2]
    assert [entry.images for entry in found.entries] == [1280, 1920]
    for entry in found.entries:
        assert entry.flops == sum(stage.training[1] for stage in estimates(entry.recipe))
        for run in entry.runs:
            records = entry.records[run.recipe.seed]
            model, images = run.model()[0].eval(), run.data.test
            with torch.no_grad():
                expected = (model(images.float()).argmax(1) == images.y).double().mean().item()
            (clean,) = [record for record in records if record["name"] == "accuracy"]
            (robust,) = [record for record in records if "under" in record["name"]]
            assert clean["value"] == pytest.approx(expected)
            assert robust["value"] < expected
            assert robust["count"] == len(run.data.test)
    heads, rows = found.table()
    assert heads[:4] == ["recipe", "images", "TFLOP", "seconds"]
    values = [100 * records[0]["value"] for records in found.entries[0].records.values()]
    assert f"{statistics.fmean(values):.1f} ±" in rows[0][4]
    assert rows[0][4].endswith(f"sd {statistics.stdev(values):.1f}")
    assert [row[0] for row in rows] == [f"{trained[i].folder} x 2" for i in (0, 2)]  # recipes of one name
    plain = json.loads((tmp_path / "speedrun.json").read_text())
    assert [[len(run["records"]) for run in entry["runs"]] for entry in plain["entries"]] == [[2, 2], [2, 2]]
    assert (tmp_path / "speedrun.png").read_bytes().startswith(b"\x89PNG")
    assert "± one standard error over images; means of the seeds" in (tmp_path / "speedrun.md").read_text()

    def measured_again(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("advebm.evaluation.evaluate.evaluate_run", measured_again)
    again = workflow.run_recipes([str(run.folder) for run in trained], out=tmp_path, tier="quick", device="cpu")
    assert again.table() == found.table()


def test_a_run_that_cannot_be_measured_is_told_of_and_the_others_are_measured(trained, tmp_path, monkeypatch):
    def measure(run, *rest):
        if run.recipe.seed == 0:
            raise RuntimeError("out of memory")
        return [{"name": "accuracy", "value": 0.5, "error": 0.1, "count": 4, "settings": {}}]

    monkeypatch.setattr(workflow, "measure", measure)
    found = workflow.run_recipes([str(run.folder) for run in trained[:2]], out=tmp_path, device="cpu")
    (heads, (row,)) = found.table()
    assert dict(zip(heads, row, strict=True))["but"] == "seed 0: out of memory"
    assert dict(zip(heads, row, strict=True))["clean, n = 4"] == "50.0 ± 10.0 %"
    (entry,) = json.loads((tmp_path / "speedrun.json").read_text())["entries"]
    assert [len(run["records"]) for run in entry["runs"]] == [0, 1]


def test_curves_begin_after_the_stages_before(trained):
    stages = [estimate.training[1] for estimate in estimates(trained[2].recipe)]
    (curve,) = learning_curves(speedrun.Entry(trained[2].recipe, [trained[2]], stages))
    assert [point[0] for point in curve] == pytest.approx([stages[0] + stages[1] / 2, sum(stages)])


def test_a_recipe_is_trained_with_each_seed_on_the_device(trained, tmp_path, monkeypatch):
    trainings = []

    def train(recipe, folder, fit):
        trainings.append((recipe.name, recipe.seed, folder.name, fit.keywords["device"]))
        return trained[recipe.seed]

    monkeypatch.setattr(workflow, "train_or_resume", train)
    workflow.run_recipes(["digits-at"], out=tmp_path, seeds=2, tier="quick", device="cpu")
    assert trainings == [("digits-at", s, f"digits-at-seed-{s}", "cpu") for s in (0, 1)]


def test_without_names_there_are_recipes_for_either_device():
    assert {*workflow.ON_CPU, *workflow.ON_GPU} <= set(recipes.names())


def test_samples_are_drawn_and_judged(trained, tmp_path, monkeypatch):
    small = speedrun.Tier(lambda threat: [RobustAccuracy(threat)], 100)
    monkeypatch.setattr(workflow, "find_tier", lambda name: small)
    monkeypatch.setattr(speedrun, "find_tier", lambda name: small)
    monkeypatch.setattr(workflow, "SAMPLERS", (CS(steps=2),))
    found = workflow.run_recipes([str(trained[0].folder)], out=tmp_path, features="pixels", device="cpu")
    heads, _ = found.table()
    assert [head.partition(",")[0] for head in heads[6:]] == ["FD cs", "recall cs"]  # pixels name no class


def test_what_cannot_be_run_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="neither a recipe of the package nor a run's folder"):
        workflow.run_recipes(["digits-att"], out=tmp_path)
    with pytest.raises(UserError, match="tier"):
        workflow.run_recipes(["digits-at"], out=tmp_path, tier="huge")
    with pytest.raises(UserError, match="seeds must be at least 1"):
        workflow.run_recipes(["digits-at"], out=tmp_path, seeds=0)
    with pytest.raises(UserError, match="have the same recipe and seed"):
        workflow.run_recipes([str(trained[0].folder)] * 2, out=tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 8), np.uint8)
    np.savez(tmp_path / "other.npz", x=pixels, y=np.arange(200) % 10)
    other = tiny(data={"kind": "npz", "path": str(tmp_path / "other.npz")}, train__images=128)
    runs = [trained[0].folder, train_or_resume(other, tmp_path / "other").folder]
    with pytest.raises(UserError, match="one data set, and these have"):
        workflow.run_recipes([*map(str, runs)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_protocol_of_the_standard_tier():
    """What docs/budgets.md promises."""
    recipe = tiny()
    clean, pgd, apgds, everything = speedrun.accuracies("standard", recipe.threat).values()
    assert type(clean).__name__ == "Accuracy"
    assert pgd.attack == recipe.threat
    assert pgd.images is None
    assert (apgds.attack.version, apgds.images) == ("quick", 2_000)
    assert (everything.attack.version, everything.images) == ("standard", 500)
    assert apgds.attack.eps == everything.attack.eps == recipe.threat.eps
    assert speedrun.TIERS["standard"].samples == 1_000
