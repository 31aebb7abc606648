"""Published models that bring what drawing and editing need, without their data set."""

import json
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch

import advebm
from advebm import cli
from advebm.core.config import describe
from advebm.core.errors import UserError
from advebm.data.sources import Images
from advebm.models import excerpt
from advebm.models.excerpt import Published
from advebm.models.hub import EXCERPT
from advebm.reporting.card import write_model
from advebm.runs.run import Run
from advebm.samplers.classifier import CS
from advebm.sampling.generate import read_set


@pytest.fixture
def published(small_run, tmp_path, monkeypatch):
    """A published model of digits, in a folder to which the package's digits are not at hand."""
    folder = write_model(small_run, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def without_digits(monkeypatch):
    def load(self):
        raise UserError("there are no digits here")

    monkeypatch.setattr("advebm.data.sources.Digits.load", load)


def test_it_draws_without_its_data(published, without_digits, small_run):
    y = torch.tensor([3, 3, 1])
    model = advebm.load(published)
    x = advebm.sample(model, y, seed=5)
    assert x.shape == (3, 1, 8, 8)
    assert torch.equal(x, advebm.sample(advebm.load(published), y, seed=5, **_settings(small_run.recipe.sampler)))
    assert not torch.equal(x, advebm.sample(model, y, seed=5, method="cs", steps=1))
    with pytest.raises(UserError, match=r"no data are known of this model; name them"):
        advebm.sample(advebm.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))), y)


def _settings(sampler):
    plain = describe(sampler)
    return {"method": plain.pop("kind"), **plain}


def test_commands_that_draw_need_no_data_and_the_others_say_so(published, without_digits, capsys):
    assert cli.main(["sample", "model", "--per-class", "1", "--steps", "1"]) == 0
    assert cli.main(["edit", "inpaint", "model", "--split", "test", "--count", "2", "--edit.steps", "1"]) == 0
    (folder,) = Path("runs/models").iterdir()
    (samples,) = Run.open(folder).samples().values()
    assert read_set(samples).manifest["fast"] == "fold"
    for command in (["evaluate", "model"], ["tune-sampler", "model"], ["sample", "model", "--compare", "cs,ta"]):
        assert cli.main(command) == 2
        assert "there are no digits here" in capsys.readouterr().err


def test_what_is_evaluated_is_the_whole_data_set_and_the_samples_drawn_before(published):
    """One run of the model, whether its data are read or not."""
    cli.main(["sample", "model", "--per-class", "2", "--steps", "1"])
    cli.main(["evaluate", "model", "--metrics", "accuracy"])
    (folder,) = Path("runs/models").iterdir()
    (record,) = Run.open(folder).records()
    assert record["count"] == len(advebm.load_data("digits").test)


def test_gaussians_come_from_the_training_images_and_images_from_the_test_split(published):
    data, brought = advebm.load_data("digits"), Published(str(published)).load()
    assert brought.classes == data.classes
    assert len(brought.train) == 0
    assert brought.test.y.tolist() == 4 * list(range(10))
    for k in (0, 7):
        expected = data.test.x[data.test.y == k][:4]
        assert torch.equal(brought.test.x[brought.test.y == k], expected)
        mean = data.train.x[data.train.y == k].float().mean(0)
        assert (brought.gaussians.means[k].float() - mean).abs().max() <= 0.5
    whole = Published(str(published), whole=True).load()
    assert torch.equal(whole.train.x, data.train.x)
    assert torch.equal(whole.gaussians.roots, brought.gaussians.roots)


def test_other_images_are_not_taken_for_its_data_set(published):
    plain = json.loads((published / "config.json").read_text())
    plain["options"]["data"]["split_seed"] = 1
    (published / "config.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"images of digits are not those that .*model was trained on"):
        Published(str(published), whole=True).load()


def test_gaussians_of_test_images_need_their_labels():
    """Also where the training images have labels."""
    data = advebm.load_data("digits")
    part = data._replace(test=Images(data.test.x, data.test.y.clone().index_fill_(0, torch.tensor([0]), -1)))
    assert CS().prepare(part) is not None
    with pytest.raises(UserError, match="has no labels to fit a Gaussian a class on"):
        CS(fit="test").prepare(part)


def test_images_of_ones_own_are_published_only_if_asked(tmp_path, small_run):
    assert excerpt.is_public({"kind": "cifar10"})
    assert excerpt.is_public({"kind": "part", "source": {"kind": "digits"}})
    assert not excerpt.is_public({"kind": "folder", "path": "scans"})
    assert not excerpt.is_public({"kind": "unlabelled", "source": {"kind": "npz", "path": "scans.npz"}})
    assert not (write_model(small_run, tmp_path / "none", images=0) / EXCERPT).exists()
    two = Published(str(write_model(small_run, tmp_path / "two", images=2))).load()
    assert len(two.test) == 20
    assert two.name == "digits (20 test images)"


def test_a_run_around_a_published_model_is_published_with_what_it_brought(published, without_digits, tmp_path):
    cli.main(["sample", "model", "--per-class", "1", "--steps", "1"])
    (made,) = Path("runs/models").iterdir()
    again = write_model(Run.open(made), tmp_path / "again")
    first, second = (Published(str(folder)).load() for folder in (published, again))
    assert second.name == first.name
    assert torch.equal(second.test.x, first.test.x)
    assert torch.equal(second.gaussians.roots, first.gaussians.roots)
    about, original = (json.loads((folder / "config.json").read_text()) for folder in (again, published))
    assert about["options"]["data"]["kind"] == "digits"
    assert about["images_digest"] == original["images_digest"]


def test_test_images_do_not_become_seeds(published):
    with pytest.raises(UserError, match="brings Gaussians of training images; set fit to train"):
        CS(fit="test").prepare(Published(str(published)).load())


@pytest.mark.parametrize("damage", ["cut", "missing", "extra", "shape", "roots", "frequencies", "classes"])
def test_a_damaged_excerpt_is_named(published, damage):
    path = published / EXCERPT
    tensors = safetensors.load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        safetensors.save_file({k: v for k, v in tensors.items() if k != "means"}, path)
    elif damage == "extra":
        safetensors.save_file({**tensors, "components": torch.zeros(1)}, path)
    elif damage == "shape":
        safetensors.save_file({**tensors, "images": torch.zeros(40, 1, 4, 4, dtype=torch.uint8)}, path)
    elif damage == "roots":
        safetensors.save_file({**tensors, "roots": tensors["roots"][:, 1:].contiguous()}, path)
    elif damage == "frequencies":
        safetensors.save_file({**tensors, "frequencies": tensors["frequencies"] + 1}, path)
    else:
        safetensors.save_file({**tensors, "means": tensors["means"][:3].contiguous()}, path)
    with pytest.raises(UserError, match=r"excerpt.safetensors is damaged"):
        Published(str(published)).load()


def test_the_model_of_the_package_draws_at_once(tmp_path, monkeypatch, capsys):
    """Without a name, data and network: what a newcomer types first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    assert cli.main(["sample", "--per-class", "1", "--steps", "2"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name == "grid.png"
    samples = read_set(path.parent)
    assert samples.x.shape == (10, 3, 32, 32)
    assert samples.y.tolist() == list(range(10))


def test_a_model_whose_excerpt_was_removed_needs_its_data(published, without_digits, capsys):
    (published / EXCERPT).unlink()
    assert cli.main(["sample", "model"]) == 2
    assert "there are no digits here" in capsys.readouterr().err
    assert not Path("runs").exists()
