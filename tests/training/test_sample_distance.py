"""FD of samples in training: its value, which images it sees, and the checkpoint that it selects."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from advebm.core import console, rng
from advebm.core.errors import Diverged, UserError
from advebm.data.sources import Data, Digits, Images
from advebm.models import network
from advebm.runs.engine import Engine
from advebm.runs.find_model import find_model
from advebm.runs.recipe import dump, read, resolve
from advebm.runs.run import Run
from advebm.samplers.classifier import CS, Langevin
from advebm.sampling import generate
from advebm.training import sample_distance, setup, trainer
from advebm.training.loop import train
from advebm.training.sample_distance import SampleDistance, balanced_classes
from advebm.training.validate import rank
from tests.helpers import tiny
from tests.references import distances as reference

CPU = torch.device("cpu")
OUTSIDE = {"outside__count": 500, "sampler__start": "outside"}
PIXELS = {"train__select": "fd", "train__features": "pixels", "sampler__steps": 2}


def short(name="digits-at", **options):
    """Twelve batches of digits with four validations."""
    periods = {"train__images": 1_536, "train__validate_every": 384, "train__checkpoint_every": 256}
    return tiny(name, **{**PIXELS, **periods, "train__samples": 60, **options})


def measured(run):
    return {line["images"]: line["val/fd"] for line in run.history() if "val/fd" in line}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(short(), tmp_path_factory.mktemp("fd") / "run", device="cpu")


@pytest.fixture
def scripted(monkeypatch):
    """Validations with numbers that a test gives: FD, robust and clean accuracy of each."""

    def script(numbers):
        left = iter(numbers)
        current = []

        def score(*_):
            current[:] = [next(left)]
            return dict(zip(("val/robust_accuracy", "val/accuracy"), current[0][1:], strict=True))

        monkeypatch.setattr(trainer, "validate", score)
        monkeypatch.setattr(SampleDistance, "__call__", lambda *_: current[0][0])

    return script


def test_the_number_is_that_of_samples_of_the_averaged_network_and_validation_images(tmp_path, small_run):
    """Against a reference, in float64: three chunks of samples of the checkpoint, in features of another run."""
    judge = str(small_run.folder)
    options = {"train__features": judge, "train__samples": 1_005, "train__images": 384, "sampler__steps": 10}
    run = train(short(**options), tmp_path / "run", device="cpu")
    data, recipe, folder = run.data, run.recipe, run.checkpoints.path()
    y, seed = torch.arange(1_005) % 10, rng.derive_seed(recipe.seed, "val", "samples")

    def fd(model):
        samples = generate.generate(model, recipe.sampler, data, y, seed=seed).x
        features = lambda x: find_model(judge).features(x).detach().double().numpy()
        return reference.frechet(features((samples * 255).round() / 255), features(data.val.float()))

    averaged, raw = (network.load(folder, ema=ema)[0] for ema in (True, False))
    assert measured(run)[384] == pytest.approx(fd(averaged), rel=1e-5)
    assert measured(run)[384] != pytest.approx(fd(raw), rel=1e-4)


def weights(run, name):
    return load_file(run.checkpoints.path() / f"{name}.safetensors")


def test_the_best_checkpoint_is_that_of_the_lowest_fd(tmp_path, scripted):
    """Not of the best accuracy, which decides only where the FD is the same; far above 1, as FD is."""
    scripted([(30, 0.1, 0.9), (20, 0.2, 0.9), (40, 0.9, 0.9), (20, 0.3, 0.2), (20, 0.3, 0.9), (20.5, 1, 1)])
    recipe = short("digits-standard", train__images=768, train__validate_every=128)
    run = train(recipe, tmp_path / "run", device="cpu")
    assert run.checkpoints.path("best").name == "512"


def test_fd_is_logged_but_does_not_select_unless_asked(tmp_path, scripted):
    scripted([(30, 0.1, 0.9), (20, 0.2, 0.9), (40, 0.9, 0.9), (20, 0.3, 0.2)])
    recipe = short("digits-standard", train__images=512, train__validate_every=128, train__select="robustness")
    run = train(recipe, tmp_path / "run", device="cpu")
    assert run.checkpoints.path("best").name == "384"
    assert list(measured(run).values()) == [30, 20, 40, 20]


def test_ranks():
    scores = {"val/auroc": 0.9, "val/adversarial_auroc": 0.6, "val/fd": 7.0}
    assert rank(scores, "fd") == (-7.0, 0.6)
    assert rank(scores, "robustness") == (0.6, 0.9)
    assert rank({"val/fd": 7.0}, "fd") == (-7.0, 0.0)
    assert rank({"val/fd": 7.0}, "robustness") is None
    assert console.training_note({"val/fd": 7.25}, {}) == "FD 7.25"


def interrupted(recipe, folder, images):
    """A run that ends without saving after that many images, as if killed."""

    def kill(seen):
        if seen >= images:
            raise MemoryError("killed")

    with pytest.raises(MemoryError):
        train(recipe, folder, device="cpu", tick=kill)
    return Run.open(folder)


def test_a_resumed_run_measures_and_selects_what_an_uninterrupted_one_does(tmp_path, run):
    killed = interrupted(run.recipe, tmp_path / "killed", 1_280)
    assert 384 <= killed.images < 1_280
    assert killed.checkpoints.path("best").name in map(str, measured(run))
    train(killed.recipe, killed.folder, resume=True, device="cpu")
    assert measured(killed) == measured(run)
    assert len(set(measured(run).values())) == 4
    assert weights(killed, "ema").keys() == weights(run, "ema").keys()
    assert all(torch.equal(weights(killed, "ema")[k], v) for k, v in weights(run, "ema").items())
    states = [json.loads((r.checkpoints.path() / "state/progress.json").read_text()) for r in (killed, run)]
    assert states[0] | {"seconds": 0} == states[1] | {"seconds": 0}
    lowest = min(measured(run), key=measured(run).get)
    assert states[0]["best_images"] == lowest
    assert states[0]["best"][0] == -measured(run)[lowest]


def test_a_run_that_began_before_there_was_a_choice_goes_on(tmp_path):
    """Its progress says -1 for scores that are still to come, and its recipe nothing of FD."""
    recipe = short(train__select="robustness", train__features="none", train__samples=1_000)
    killed = interrupted(recipe, tmp_path / "old", 384)
    state = killed.checkpoints.path() / "state"
    progress = json.loads((state / "progress.json").read_text())
    assert progress["best"] is None
    (state / "progress.json").write_text(json.dumps(progress | {"best": [-1.0, -1.0]}))
    digests = json.loads((state / "sha256.json").read_text())
    digests["state/progress.json"] = hashlib.sha256((state / "progress.json").read_bytes()).hexdigest()
    (state / "sha256.json").write_text(json.dumps(digests))
    config = killed.folder / "config.yaml"
    new = ("  select:", "  features:", "  samples:")
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith(new)))
    old = Run.open(killed.folder)
    assert old.recipe == recipe
    train(old.recipe, old.folder, resume=True, device="cpu")
    scores = {line["images"]: line["val/robust_accuracy"] for line in old.history() if "val/accuracy" in line}
    assert old.checkpoints.path("best").name == str(max(scores, key=scores.get))


class Half:
    """One of two processes; what the other one gathers is known already, or not yet."""

    world = 2

    def __init__(self, rank, other=None):
        self.rank, self.other, self.own = rank, other, None

    def all_gather(self, thing):
        self.own = thing
        return [thing, thing] if self.other is None else [self.other, thing]


def test_processes_share_the_samples(run):
    distance = SampleDistance(short(train__samples=1_200), run.data, None, CPU)
    model, first = run.model()[0], Half(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_distance, "frechet_distance", lambda *_: 0.0)
        distance(model, first)
    assert sorted(first.own) == [0, 2]
    assert distance(model, Half(1, first.own)) == distance(model)


def poisoned(data, *names):
    """The data with noise in place of the images of some splits."""
    noise = lambda images: Images(torch.randint(256, images.x.shape, dtype=torch.uint8), images.y)
    return data._replace(**{name: noise(getattr(data, name)) for name in names})


def test_test_images_are_not_looked_at(monkeypatch):
    """Of the data and of the outside images, from whose validation images chains begin."""
    recipe = short("digits-binary-at", **OUTSIDE, train__samples=700)
    model = setup.set_up(recipe, Engine("cpu")).model

    def fd(*spoilt):
        for source in (type(recipe.data), type(recipe.outside)):
            load = source.load
            monkeypatch.setattr(source, "load", lambda self, load=load: poisoned(load(self), *spoilt))
        number = setup.set_up(recipe, Engine("cpu")).distance(model)
        monkeypatch.undo()
        return number

    assert fd("test") == fd()
    assert fd("val") != pytest.approx(fd(), rel=0.1)


def test_chains_begin_from_outside_validation_images():
    recipe, data = short("digits-binary-at", **OUTSIDE, sampler__steps=0, train__samples=180), Digits().load()
    distance = SampleDistance(recipe, data, data.val, CPU)
    model = setup.set_up(recipe, Engine("cpu")).model
    assert distance(model) == pytest.approx(0, abs=1e-4)  # each image once, without a step


def test_each_class_has_as_many_samples():
    data = Digits().load()
    assert balanced_classes(CS(), data, 25).tolist() == [*range(10), *range(10), *range(5)]
    assert balanced_classes(Langevin(start="global"), data, 3).tolist() == [-1, -1, -1]


def test_samples_that_are_not_finite_are_a_divergence(run):
    distance = SampleDistance(run.recipe, run.data, None, CPU)
    model = run.model()[0]
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(Diverged, match="samples drawn for validation are not finite"):
        distance(model)


@pytest.mark.parametrize("name", ["digits-binary-at", "digits-infonce", "digits-acl"])
def test_critics_and_encoders_are_selected_too(tmp_path, name):
    recipe = short(name, train__images=256, train__validate_every=128, train__checkpoint_every=128, train__batch=64)
    run = train(recipe, tmp_path / "run", device="cpu")
    numbers = measured(run)
    assert list(numbers) == [128, 256]
    assert numbers[128] != numbers[256]
    assert run.checkpoints.path("best").name == str(min(numbers, key=numbers.get))


def test_images_without_labels_are_enough(tmp_path):
    """Nothing else can be measured of a density of images whose labels are unknown."""
    np.savez(tmp_path / "bare.npz", x=np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8))
    options = {"objective": "mle", "objective__negatives__steps": 2, "objective__negatives__buffer": 150}
    options |= {"backbone__norm": "group", "sampler__start": "noise", "sampler__kind": "langevin"}
    recipe = short(
        "digits-standard", data=f"npz:{tmp_path / 'bare.npz'}", train__images=256, train__validate_every=128, **options
    )
    run = train(recipe, tmp_path / "run", device="cpu")
    lines = [line for line in run.history() if "val/fd" in line]
    assert [line.keys() for line in lines] == [{"images", "val/fd"}] * 2
    assert run.checkpoints.path("best").name in ("128", "256")


def test_earlier_stages_are_not_selected_by_fd(tmp_path):
    """The next stage begins with their latest checkpoint.  One that asks for it gets it, and so it is written."""
    recipe = tiny("digits-dat", **PIXELS)
    assert recipe.train.select == "fd"
    assert recipe.before[0].train.features is None
    assert recipe.before[0].train.select == "robustness"
    asked = tiny("digits-dat", before__0__train__select="fd", before__0__train__features="pixels")
    (tmp_path / "c.yaml").write_text(dump(asked))
    assert resolve(read(tmp_path / "c.yaml")).before[0].train.select == "fd"


def without_validation(data: Data) -> Data:
    return data._replace(val=data.val.take(slice(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train__features": "none"}, r"fd needs a feature space for FD; give --train.features RUN"),
        ({"train__select": "fid"}, r"train.select is one of robustness, fd, got 'fid'"),
        ({"train__samples": 1}, "samples must be at least 2, got 1"),
        ({"train__features": "nowhere"}, "there is no run or model at nowhere"),
        ({"sampler__fit": "test"}, "never looks at test images; set sampler.fit to train"),
        ({"sampler__start": "buffer"}, "not the replay buffer; set sampler.start to noise"),
        ({"sampler__start": "outside"}, "chains start from outside images, and there are none"),
        (
            {"data": "unlabelled", "name": "digits-infonce", "sampler__start": "class"},
            "has no labels to fit a Gaussian",
        ),
        ({"name": "digits-infonce", "sampler__kind": "maxent", "train__samples": 501}, "draw another number of images"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(short(**{"name": "digits-at", **options}), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_too_few_validation_images_are_refused(tmp_path, run):
    with pytest.raises(UserError, match="takes 2 or more validation images, digits has 1"):
        SampleDistance(run.recipe, without_validation(run.data), None, CPU)
    recipe, data = short("digits-binary-at", **OUTSIDE), run.data
    with pytest.raises(UserError, match="validation images of outside, and it has none"):
        SampleDistance(recipe, data, data.val.take(slice(0)), CPU)


def test_a_run_does_not_go_on_in_other_features(tmp_path):
    killed = interrupted(short(), tmp_path / "run", 768)
    environment = json.loads((killed.folder / "env.json").read_text())
    assert environment["judge"] == "pixels"
    for judge, stays in (("/elsewhere/pixels", True), ("/runs/judge@6016", False)):
        (killed.folder / "env.json").write_text(json.dumps(environment | {"judge": judge}))
        if stays:
            interrupted_again = Run.open(killed.folder)
            interrupted_again.check_judge("pixels")
        else:
            with pytest.raises(UserError, match=r"in the features of /runs/judge@6016 so far, .* is now pixels"):
                train(killed.recipe, killed.folder, resume=True, device="cpu")
