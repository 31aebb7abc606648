"""Experiment trackers: what they are sent, where they write, how a run goes on, and what does not depend on them."""

import importlib
import io
import json
import os
import sqlite3
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate import tracking as accelerate_tracking
from PIL import Image
from safetensors.torch import load_file

import advebm
from advebm import cli, recipes
from advebm.core import config
from advebm.core.errors import Interrupted, UserError
from advebm.runs import tracking
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.training.loop import train
from tests.helpers import tiny
from tests.training.test_loop import exploding, staged

foreign = pytest.mark.filterwarnings("default")  # what trackers warn about is not ours


def short(**options):
    """Twelve batches of digits with three validations that draw samples."""
    periods = {"train__images": 1_536, "train__log_every": 256, "train__validate_every": 512}
    periods |= {"train__checkpoint_every": 512, "train__ema": 0}
    samples = {"train__features": "pixels", "train__samples": 60, "sampler__steps": 1}
    return tiny("digits-standard", **{**periods, **samples, **options})


class Recorder(accelerate_tracking.GeneralTracker):
    """A tracker that keeps what it is sent."""

    name = "recorder"
    requires_logging_directory = True
    made: "list[Recorder]" = []  # noqa: RUF012
    fails_at: float = float("inf")

    def __init__(self, project, folder, **options):
        super().__init__()
        self.project, self.folder, self.options = project, folder, options
        self.lines, self.shown, self.hyperparameters, self.state = [], [], None, "new"
        Recorder.made.append(self)

    @property
    def tracker(self):
        return self

    def start(self):
        print("this is no result")
        self.state = "started"

    def store_init_configuration(self, values):
        self.hyperparameters = values

    def log(self, values, step=None, **rest):
        if step >= Recorder.fails_at:
            raise OSError("the disk is full\nand more")
        self.lines.append((step, values))

    def log_images(self, values, step=None, **rest):
        self.shown.append((step, values))

    def finish(self):
        self.state = f"finished with {os.environ.get('RECORDER')}"


@pytest.fixture
def recorders(monkeypatch):
    """All recorders made in a test, with ``recorder`` among the known trackers."""
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def numbers(run):
    """The scalars of metrics.jsonl, by step and name."""
    lines = [line for line in run.history() if "event" not in line]
    named = [(line["images"], name, value) for line in lines for name, value in line.items() if name != "images"]
    return {(step, name): value for step, name, value in named if not isinstance(value, str)}


def sent(recorder):
    return {(step, name): value for step, values in recorder.lines for name, value in values.items()}


def test_every_number_the_samples_and_the_recipe_are_sent(tmp_path, recorders):
    run = train(short(), tmp_path / "run", device="cpu", track=["recorder"])
    (recorder,) = recorders
    assert sent(recorder) == numbers(run)
    assert {name for _, name in sent(recorder)} >= {"train/loss", "train/lr", "val/accuracy", "val/fd"}
    assert recorder.folder == str(run.folder / "tracking" / "recorder")
    assert recorder.state == "finished with None"
    assert recorder.hyperparameters["train.images"] == 1_536
    assert recorder.hyperparameters["metrics.0.kind"] == config.describe(run.recipe)["metrics"][0]["kind"]
    assert all(value is None or isinstance(value, str | int | float) for value in recorder.hyperparameters.values())
    assert [step for step, _ in recorder.shown] == [512, 1024, 1536]
    assert [set(values) for _, values in recorder.shown] == [{"samples"}] * 3
    assert recorder.shown[0][1]["samples"][0].size == (6 * 72 + 8, 10 * 72 + 8)  # six of each class, enlarged by 8


def test_no_samples_are_sent_where_validation_draws_none(tmp_path, recorders):
    train(short(train__features=None), tmp_path / "run", device="cpu", track="recorder")
    assert recorders[0].lines
    assert not recorders[0].shown


def test_weights_and_recipe_do_not_depend_on_trackers(tmp_path, recorders):
    runs = [train(short(), tmp_path / f"{k}", device="cpu", track=names) for k, names in enumerate([(), "recorder"])]
    a, b = (load_file(run.checkpoints.path() / "model.safetensors") for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert runs[0].recipe == runs[1].recipe
    assert len(recorders) == 1
    assert not (runs[0].folder / "tracking").exists()


def test_stages_share_one_axis(tmp_path, recorders):
    told = []
    train(staged(), tmp_path / "run", device="cpu", track="recorder", report=told.append)
    (recorder,) = recorders
    assert [step for step, _ in recorder.lines] == [line["images"] for line in told if "event" not in line]
    assert recorder.lines[-1][0] == 2048


def test_samples_of_every_stage_are_on_that_axis(tmp_path, recorders):
    standard = {"objective": {"kind": "standard"}}
    sampling = {"name": "second", **standard, "train": {"features": "pixels"}}
    plain = {**recipes.find("digits-standard"), "before": [{"name": "first", **standard}, sampling]}
    short_stage = {"train.images": 512, "train.validate_every": 512, "train.samples": 20, "sampler.steps": 1}
    recipe = resolve(plain, [*short_stage.items(), ("backbone.width", 8), ("train.features", "pixels")])
    train(recipe, tmp_path / "run", device="cpu", track="recorder")
    assert [step for step, _ in recorders[0].shown] == [1024, 1536]


def test_events_are_no_numbers(tmp_path, recorders):
    with pytest.warns(RuntimeWarning, match="rollback 1"):
        run = train(exploding(), tmp_path / "run", device="cpu", track="recorder")
    assert any(line.get("event") == "rollback" for line in run.history())
    assert not {"attempt", "rate"} & {name for _, name in sent(recorders[0])}


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(tmp_path, recorders, monkeypatch):
    monkeypatch.setattr(Recorder, "fails_at", 1_000)
    with pytest.warns(RuntimeWarning, match="tracker recorder failed and is left out from now on: the disk is full$"):
        run = train(short(), tmp_path / "run", device="cpu", track="recorder")
    assert run.finished
    assert [step for step, _ in recorders[0].lines] == [256, 512, 512, 768]


def test_it_is_finished_when_training_is_not(tmp_path, recorders, monkeypatch):
    def fail(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "settings_for", lambda *_: tracking.Settings(environment={"RECORDER": "a variable"}))
    with pytest.raises(KeyboardInterrupt):
        train(short(), tmp_path / "run", device="cpu", track="recorder", report=fail)
    assert recorders[0].state == "finished with a variable"
    assert "RECORDER" not in os.environ


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, recorders, monkeypatch):
    def refuse(self):
        raise RuntimeError("no key\nand a page of help")

    monkeypatch.setattr(Recorder, "start", refuse)
    message = r"tracker recorder did not start: no key; .* advebm train --resume \S+run$"
    with pytest.raises(UserError, match=message):
        train(short(), tmp_path / "run", device="cpu", track="recorder")
    assert train(short(), tmp_path / "run", device="cpu", resume=True).finished


def test_other_processes_than_the_main_one_start_none(tmp_path, recorders, small_run):
    with tracking.tracking(("recorder",), small_run, main=False) as tracker:
        tracker.log({"images": 1, "train/loss": 1.0})
        tracker.show(1, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    assert not recorders


def test_results_alone_are_on_stdout(tmp_path, recorders, capsys):
    options = ["--train.images", "256", "--backbone.width", "8", "--device", "cpu", "--track", "recorder"]
    assert not cli.main(["train", "--recipe", "digits-standard", "--out", str(tmp_path / "run"), *options])
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'run'}\n"
    assert "this is no result" in err


def test_the_command_line_and_python_take_trackers_also_to_go_on(tmp_path, recorders, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["other"])
    monkeypatch.setitem(
        accelerate_tracking.LOGGER_TYPE_TO_CLASS, "other", type("Other", (Recorder,), {"name": "other"})
    )
    short_options = {"train.images": 256, "backbone.width": 8}
    run = advebm.train("digits-standard", folder=tmp_path / "a", options=short_options, device="cpu", track="recorder")
    assert [r.name for r in recorders] == ["recorder"]
    assert not cli.main(["train", "--resume", str(run.folder), "--device", "cpu", "--track", "recorder,other"])
    assert [r.name for r in recorders] == ["recorder", "recorder", "other"]
    advebm.train("digits-standard", folder=run.folder, resume=True, device="cpu", track=["other", "other"])
    assert [r.name for r in recorders][3:] == ["other"]


def test_the_command_that_resumes_names_them(tmp_path, recorders):
    def interrupt(line):
        os.kill(os.getpid(), 2)

    with pytest.raises(Interrupted, match=r"; advebm train --track recorder --resume \S+run$"):
        train(short(), tmp_path / "run", device="cpu", track="recorder", report=interrupt)


@pytest.mark.parametrize(
    ("track", "message"),
    [
        (
            "tensorbord",
            r"no tracker 'tensorbord' \(did you mean 'tensorboard'\?\); there is aim, .*tensorboard, .*wandb",
        ),
        ("", "no tracker ''; there is aim"),
        ("recorder,wandb", "tracker wandb is not installed: pip install wandb"),
    ],
)
def test_trackers_that_are_not_there_are_one_line_before_anything_is_written(
    tmp_path, recorders, monkeypatch, track, message, capsys
):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    command = ["train", "--recipe", "digits-standard", "--out", str(tmp_path / "run"), "--track", track]
    assert cli.main(command) == 2
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err.startswith("advebm: error: ")
    with pytest.raises(UserError, match=message):
        tracking.find_trackers(track)


def test_a_folder_and_offline_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "COMET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    given = lambda name: tracking.settings_for(name, tmp_path, "title", None)
    assert given("wandb").environment == {"WANDB_MODE": "offline"}
    assert given("wandb").options["dir"] == str(tmp_path)
    assert given("mlflow").environment == {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    assert given("mlflow").options["logging_dir"] == f"{tmp_path}/artifacts"
    assert given("comet_ml").options == {"online": False}
    assert given("swanlab").environment["SWANLAB_MODE"] == "offline"
    assert given("clearml").environment["CLEARML_OFFLINE_MODE"] == "1"
    with tracking.variables({"WANDB_MODE": "offline"}):
        assert os.environ["WANDB_MODE"] == "offline"
    assert "WANDB_MODE" not in os.environ
    for name, value in {"WANDB_MODE": "online", "WANDB_PROJECT": "p", "MLFLOW_TRACKING_URI": "u"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMET_API_KEY", "k")
    assert given("wandb").project == "p"
    assert given("mlflow").options["logging_dir"] is None
    assert given("comet_ml").options == {"online": True}
    with tracking.variables({"WANDB_MODE": "offline"}):
        assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["WANDB_MODE"] == "online"


def test_a_tracked_run_is_known_again(tmp_path, recorders, monkeypatch):
    """By the identity that it had, and with its configuration where a tracker takes that each time."""
    monkeypatch.setattr(tracking, "settings_for", lambda *_: tracking.Settings(identity=("id", "folder")))
    recipe = short(train__images=512)
    run = train(recipe, tmp_path / "run", device="cpu", track="recorder")
    train(recipe, run.folder, device="cpu", track="recorder", resume=True)
    first, second = recorders
    assert first.options == {}
    assert second.options == {"id": first.folder}
    assert second.hyperparameters == first.hyperparameters
    assert json.loads((run.folder / "tracking" / "started.json").read_text()) == {"recorder": first.folder}
    monkeypatch.setattr(tracking, "CONFIGURED_ONCE", ("recorder",))
    train(recipe, run.folder, device="cpu", track="recorder", resume=True)
    assert recorders[2].hyperparameters is None


def test_images_seen_are_counted_over_stages(tmp_path):
    run = train(staged(), tmp_path / "run", device="cpu")
    assert tracking.images_seen(run) == 2048
    assert tracking.images_seen(Run.open(run.before[0])) == 1024


def test_pictures_have_a_row_a_class():
    x = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 1, 8, 8)
    rows = np.asarray(tracking.draw_grid(x, torch.arange(30) % 3))
    assert rows.shape == (3 * 72 + 8, 10 * 72 + 8, 3)
    assert rows[8, [8, 80], 0].tolist() == [0, 3]  # the first row: 0, 3, 6, …
    assert rows[80, 8, 0] == 1
    without = np.asarray(tracking.draw_grid(x, torch.full((30,), -1)))
    assert without.shape == rows.shape
    assert without[8, [8, 80], 0].tolist() == [0, 1]
    many = np.asarray(tracking.draw_grid(x, torch.arange(30)))
    assert many.shape == (10 * 72 + 8, 72 + 8, 3)


@pytest.fixture
def interrupted(tmp_path):
    """Train with a tracker to an interruption, after steps that no checkpoint has, and then to the end."""

    def both(name):
        def fail(line):
            if line["images"] > 1_300:
                raise KeyboardInterrupt

        recipe = short()
        with pytest.raises(KeyboardInterrupt):
            train(
                recipe, tmp_path / "run", device="cpu", track=name, report=lambda line: told.append(line) or fail(line)
            )
        return train(recipe, tmp_path / "run", resume=True, device="cpu", track=name)

    told: list = []
    return both


@foreign
def test_tensorboard_shows_the_run_and_goes_on(interrupted):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = interrupted("tensorboard")
    folder = run.folder / "tracking" / "tensorboard"
    board = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    found = [(e.step, name, e.value) for name in board.Tags()["scalars"] for e in board.Scalars(name)]
    assert {(step, name): value for step, name, value in found} == pytest.approx(numbers(run), rel=1e-6)
    assert len(found) == len(numbers(run))  # what is computed again is shown once
    pictures = board.Images("samples")
    assert [e.step for e in pictures] == [512, 1024, 1536]
    assert Image.open(io.BytesIO(pictures[0].encoded_image_string)).size == (440, 728)
    (file,) = folder.glob("*/hparams.yml")  # once, though it was started twice
    assert yaml.safe_load(file.read_text())["objective.kind"] == "standard"


@foreign
def test_trackio_shows_the_run_and_goes_on(interrupted, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    for module in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, module)  # it fixes its folder at its first import
    run = interrupted("trackio")
    (path,) = (run.folder / "tracking" / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
        runs = database.execute("select distinct run_name, run_id from metrics").fetchall()
        ((kept,),) = database.execute("select config from configs").fetchall()
    assert [name for name, _ in runs] == ["run"]
    lines = [(step, json.loads(values)) for step, values in rows]
    shown = [step for step, values in lines if "samples" in values]
    assert shown == [512, 1024, 1536]
    found = {(step, k): v for step, values in lines for k, v in values.items() if k != "samples"}
    assert found == pytest.approx(numbers(run))
    assert json.loads(kept)["objective.kind"] == "standard"
    assert len(list((run.folder / "tracking" / "trackio" / "media").rglob("*.png"))) == 3
    assert "TRACKIO_DIR" not in os.environ


@foreign
def test_mlflow_goes_on_with_one_run(interrupted, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = interrupted("mlflow")
    folder = run.folder / "tracking" / "mlflow"
    client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "advebm"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["objective.kind"] == "standard"
    steps = {m.step for m in client.get_metric_history(found.info.run_id, "val/fd")}
    assert steps == {512, 1024, 1536}
    assert len(list(folder.rglob("samples*.png"))) == 3
