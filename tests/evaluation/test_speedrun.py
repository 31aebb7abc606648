"""Speed-runs: recipes trained and measured alike, on the digits."""

import json
import statistics

import pytest
import torch

from advebm.core.errors import UserError
from advebm.evaluation import speedrun
from advebm.training.cost import estimates
from advebm.workflows import speedrun as workflow
from advebm.workflows.train import train_or_resume
from tests.helpers import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three short runs: one recipe with two seeds, and another with two stages."""
    folder = tmp_path_factory.mktemp("runs")
    stage = {"name": "first", "train": {"images": 640, "ema": 0}}
    recipes = [
        tiny(seed=0, train__images=1280, train__validate_every=640),
        tiny(seed=1, train__images=1280, train__validate_every=640),
        tiny(name="digits-at", train__images=1280, train__validate_every=640, before=[stage]),
    ]
    return [train_or_resume(recipe, folder / str(i)) for i, recipe in enumerate(recipes)]


def test_runs_of_a_recipe_are_its_seeds_and_are_measured_as_evaluate_does(trained, tmp_path, monkeypatch):
    found = workflow.run_recipes([str(run.folder) for run in trained], out=tmp_path, tier="quick", device="cpu")
    assert [len(entry.runs) for entry in found.entries] == [2, 1]
    assert found.entries[0].images == 1280
    assert found.entries[1].images == 1920
    for entry in found.entries:
        assert entry.flops == sum(stage.training[1] for stage in estimates(entry.recipe))
        for run, records in zip(entry.runs, entry.records, strict=True):
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
    values = [100 * records[0]["value"] for records in found.entries[0].records]
    assert f"{statistics.fmean(values):.1f} ±" in rows[0][4]
    assert rows[0][4].endswith(f"sd {statistics.stdev(values):.1f}")
    assert rows[0][0] == "digits-at x 2"
    plain = json.loads((tmp_path / "speedrun.json").read_text())
    assert [len(entry["records"]) for entry in plain["entries"]] == [2, 1]
    assert (tmp_path / "speedrun.png").read_bytes().startswith(b"\x89PNG")
    assert "± one standard error over images; means of the seeds" in (tmp_path / "speedrun.md").read_text()

    def measured_again(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("advebm.evaluation.evaluate.evaluate_run", measured_again)
    again = workflow.run_recipes([str(run.folder) for run in trained], out=tmp_path, tier="quick", device="cpu")
    assert again.table() == found.table()


def test_curves_begin_after_the_stages_before(trained):
    from advebm.reporting.speedrun import learning_curves

    stages = [estimate.training[1] for estimate in estimates(trained[2].recipe)]
    (curve,) = learning_curves(speedrun.Entry(trained[2].recipe, [trained[2]], stages))
    assert [point[0] for point in curve] == pytest.approx([stages[0] + stages[1] / 2, sum(stages)])


def test_a_recipe_is_trained_with_each_seed(tmp_path, monkeypatch):
    trainings = []

    def train(recipe, folder):
        trainings.append((recipe.name, recipe.seed, folder.name))
        raise UserError("stop here")

    monkeypatch.setattr(workflow, "train_or_resume", train)
    with pytest.raises(UserError, match="stop here"):
        workflow.run_recipes(["digits-at"], out=tmp_path, seeds=2, device="cpu")
    assert trainings == [("digits-at", 0, "digits-at-seed-0")]


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a recipe of the package nor the folder of a run"):
        workflow.run_recipes(["digits-att"], out=tmp_path)
    with pytest.raises(UserError, match="tier"):
        workflow.run_recipes(["digits-at"], out=tmp_path, tier="huge")
    with pytest.raises(UserError, match="seeds must be at least 1"):
        workflow.run_recipes(["digits-at"], out=tmp_path, seeds=0)


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
