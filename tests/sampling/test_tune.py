"""The search over a sampler's settings: on validation images, resumable, shared, and used by what is drawn later."""

import json

import pytest
import torch

from advebm.cli import main
from advebm.core import files
from advebm.core.errors import UserError
from advebm.runs.find_space import feature_space
from advebm.samplers.classifier import CS, JEAT17, TA, Langevin
from advebm.sampling import generate
from advebm.sampling import tune as tuning
from advebm.sampling.tune import find_tuned, response_curves, settings_grid, tune
from tests.helpers import linked
from tests.references import distances as reference


@pytest.fixture
def run(small_run, tmp_path):
    return linked(small_run, tmp_path)


@pytest.fixture
def space(run):
    return feature_space("own features", run.model()[0])


SETTINGS = [CS(steps=2, step_size=0.1, noise=noise) for noise in (0.5, 0.0, 0.1)]


def test_a_grid_is_all_combinations():
    found = settings_grid(CS(steps=3, step_size=0.2, radius=1.0), {"noise": [0.0, 0.1]})
    assert len(found) == 3 * 3 * 2
    assert {s.steps for s in found} == {2, 3, 6}
    assert {round(s.step_size, 6) for s in found} == {0.1, 0.2, 0.4}
    assert {s.radius for s in found} == {1.0}
    assert len(settings_grid(CS(steps=1), {"step_size": [0.1], "radius": [None, 2.0]})) == 4  # half of one step is one
    with pytest.raises(UserError, match="tuning searches step_size, radius, noise, steps, got 'momentum'"):
        settings_grid(CS(), {"momentum": [0.5]})
    with pytest.raises(UserError, match="a temperature is of Langevin dynamics"):
        settings_grid(JEAT17(), {"noise": [0.1]})


@pytest.mark.parametrize("by", ["KID", "FD"])
def test_the_best_is_nearest_to_the_validation_images(run, space, by):
    trials = tune(run, SETTINGS, space, by=by, per_class=12, seed=3)
    values = []
    for sampler in SETTINGS:
        data, y = run.recipe.data.load(), torch.arange(10).repeat_interleave(12)
        x = generate.generate(run.model()[0], sampler, data, y, seed=3).x
        with torch.no_grad():
            drawn, real = (space.extract(v).double().numpy() for v in (x, data.val.float()))
        values.append(reference.kernel(drawn, real) if by == "KID" else reference.frechet(drawn, real))
    assert [t["value"] for t in trials] == pytest.approx(sorted(values), rel=1e-4)
    best, how = find_tuned(run, CS())
    assert best == SETTINGS[min(range(3), key=values.__getitem__)]
    assert (how["split"], how["trials"], how["reference_count"]) == ("val", 3, 180)
    assert f"{by} (own features) on validation images" == how["name"]


def test_trials_are_done_once_and_shared(run, space, monkeypatch):
    tune(run, SETTINGS[:1], space, per_class=3)
    (first,) = (run.folder / "tuning").glob("*.json")
    begun = first.read_text()
    tuning.result_path(run, SETTINGS[0]).unlink()
    other = tuning._trial_path(run, SETTINGS[1], {k: v for k, v in json.loads(begun).items() if k not in NOT_ASKED})
    with files.locked(other.with_suffix(".lock"), "busy"):  # somebody else is at the second
        assert len(tune(run, SETTINGS, space, per_class=3)) == 2
    assert find_tuned(run, CS()) is None
    drawn = []
    whole = generate.generate_along
    monkeypatch.setattr(generate, "generate_along", lambda *a, **k: drawn.append(a[1]) or whole(*a, **k))
    assert len(tune(run, SETTINGS, space, per_class=3)) == 3
    assert drawn == [SETTINGS[1]]
    assert find_tuned(run, CS()) is not None
    assert first.read_text() == begun
    tune(run, SETTINGS, space, per_class=4)
    assert len(drawn) == 4


NOT_ASKED = ("sampler", "name", "value")


@pytest.mark.parametrize(
    ("changes", "chains"), [({}, [6]), ({"noise": 0.1}, [6]), ({"step_decay": 0.5}, [2, 4, 6]), ({"radius": 0.3}, [6])]
)
def test_numbers_of_steps_share_chains(run, space, monkeypatch, changes, chains):
    """Each trial has the value of a chain of its own; annealed chains of other lengths are other chains."""
    drawn = []
    whole = generate.generate_along
    monkeypatch.setattr(generate, "generate_along", lambda *a, **k: drawn.append(a[1].steps) or whole(*a, **k))
    samplers = [CS(steps=k, step_size=0.1, **changes) for k in (2, 4, 6)]
    told = []
    trials = tune(run, samplers, space, per_class=3, progress=told.append)
    together = {t["sampler"]["steps"]: t["value"] for t in trials}
    assert drawn == chains
    assert tuning.count_steps(samplers) == sum(chains)
    assert set(range(chains[0] + 1)) <= set(told), "every step is told"
    assert told == sorted(told)
    assert told[-1] == sum(chains)
    for path in (run.folder / "tuning").glob("*.json"):
        path.unlink()
    for sampler in samplers:
        (alone,) = tune(run, [sampler], space, per_class=3)
        assert together[sampler.steps] == pytest.approx(alone["value"], rel=1e-6)
    assert len(set(together.values())) == 3


def test_test_images_are_not_looked_at(run, space):
    with pytest.raises(UserError, match="tuning never looks at test images; set fit to train"):
        tune(run, [CS(fit="test")], space)


def test_response_curves():
    trial = lambda value, **settings: {"value": value, "sampler": {**NOTHING, **settings}}
    trials = [trial(3.0, radius=None), trial(1.0, radius=None), trial(2.0, radius=None), trial(5.0, radius=1.0)]
    assert response_curves(trials) == {"radius": [(1.0, 5.0, 5.0), (None, 1.0, 2.0)]}


NOTHING = {"step_size": 0.1, "noise": 0.0, "steps": 3, "radius": 1.0}


def test_what_was_found_is_used_and_said(run, capsys):
    arguments = ["--step-size", "0.03", "--steps", "2,3", "--per-class", "2", "--device", "cpu"]
    assert main(["tune-sampler", str(run.folder), *arguments]) == 0
    assert (run.folder / "figures" / "tuning.png").exists()
    best, _ = find_tuned(run, run.recipe.sampler)

    def drawn(*arguments):
        assert main(["sample", str(run.folder), "--per-class", "1", "--name", "set", "--replace", *arguments]) == 0
        return json.loads((run.folder / "samples" / "set" / "manifest.json").read_text())

    manifest = drawn()
    assert (manifest["sampler"]["step_size"], manifest["sampler"]["steps"]) == (0.03, best.steps)
    assert manifest["tuned"]["split"] == "val"
    changed = drawn("--sampler.noise", "0.1")
    assert (changed["sampler"]["step_size"], changed["sampler"]["noise"]) == (0.03, 0.1)
    assert changed["tuned"]["changed"] == ["sampler.noise"]
    for arguments in (["--untuned"], ["--method", "ta"], ["--sampler.start", "global"]):
        manifest = drawn(*arguments)
        assert manifest["sampler"]["step_size"] == run.recipe.sampler.step_size
        assert "tuned" not in manifest
    tuning.result_path(run, run.recipe.sampler).write_text("{}")
    assert main(["sample", str(run.folder)]) == 2
    assert ".json is damaged" in " ".join(capsys.readouterr().err.split())


def test_kinds_without_classes_are_tuned_too(run, space):
    assert (
        len(tune(run, settings_grid(Langevin(steps=1, start="global"), {"step_size": [0.1]}), space, per_class=2)) == 2
    )
    assert type(find_tuned(run, Langevin(start="global"))[0]) is Langevin
    assert find_tuned(run, Langevin()) is None


def test_the_best_of_another_method_or_start_is_kept_beside(run, space):
    for sampler in (CS(steps=1), TA(steps=2), CS(steps=3, start="global")):
        tune(run, [sampler], space, per_class=2)
    found = [find_tuned(run, like)[0].steps for like in (CS(), TA(), CS(start="global"))]
    assert found == [1, 2, 3]
