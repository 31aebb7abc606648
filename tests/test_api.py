import base64
import io
import re
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import advebm
from advebm import cli
from advebm.core.errors import UserError
from advebm.data.sources import Images
from advebm.diagnostics.doctor import Finding, Findings
from advebm.edits import Compose, Inpaint
from advebm.metrics.base import Record, Records, SampleSet
from advebm.metrics.robustness import RobustAccuracy
from advebm.metrics.verdicts import Verdicts
from advebm.runs.find_space import ClassifierFeatures
from advebm.runs.run import Run
from tests.helpers import few_samples, linked


@pytest.fixture(scope="module")
def model(small_run):
    return advebm.load(small_run.folder)


@pytest.fixture(scope="module")
def test_images():
    data = advebm.load_data("digits")
    return data.test.float()[:50], data.test.y[:50]


def test_the_public_names_are_there():
    for name in advebm.__all__:
        assert callable(getattr(advebm, name))
        assert getattr(advebm, name).__doc__
    assert set(advebm.__all__) <= set(dir(advebm))
    with pytest.raises(AttributeError, match="there is Attack, attack"):
        _ = advebm.energie


def test_energies_agree_with_the_logits(model, test_images):
    x, y = test_images
    logits = model(x)
    torch.testing.assert_close(advebm.energy(model, x), -logits.logsumexp(1).detach())
    torch.testing.assert_close(advebm.energy(model, x, y), -logits[range(50), y].detach())


def test_a_critic_has_an_energy(test_images):
    critic = advebm.wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    x, y = test_images
    torch.testing.assert_close(advebm.energy(critic, x), -critic(x).squeeze(1).detach())
    with pytest.raises(UserError, match="a critic has one output"):
        advebm.energy(critic, x, y)
    with pytest.raises(UserError, match="needs a classifier"):
        advebm.attack(critic, x, torch.zeros_like(y), eps=0.1)


def test_attacks_break_images_within_their_radius(model, test_images):
    x, y = test_images
    found = advebm.attack(model, x, y, eps=1.5, norm="l2", steps=10)
    right = lambda v: (model(v).argmax(1) == y).float().mean().item()
    assert right(found) < right(x) - 0.3
    assert (found - x).flatten(1).norm(dim=1).max() <= 1.5 + 1e-5
    assert torch.equal(found, advebm.attack(model, x, y, eps=1.5, norm="l2", steps=10))
    assert not torch.equal(found, advebm.attack(model, x, y, eps=1.5, norm="l2", steps=10, seed=1))
    target = (y + 1) % 10
    aimed = advebm.attack(model, x, y, eps=2.5, norm="l2", steps=20, target=target)
    assert (model(aimed).argmax(1) == target).float().mean() > 0.5
    assert not model.training


def test_samples_from_python(model):
    y = torch.arange(10)
    x = advebm.sample(model, y, data="digits", method="cs", steps=10, step_size=0.2, start="global")
    assert x.shape == (10, 1, 8, 8)
    assert advebm.energy(model, x, y).mean() < advebm.energy(model, torch.rand(10, 1, 8, 8), y).mean() - 1


def test_evaluate_from_python(model):
    records = advebm.evaluate(model, data="digits", threat=advebm.Attack(eps=0.5, norm="l2", steps=3))
    assert [r.name for r in records] == ["accuracy", "accuracy under PGD-3 l2 0.5"]
    assert records[0].value > records[1].value > 0


def test_your_own_module(test_images):
    x, y = test_images
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    wrapped = advebm.wrap(own, mean=[0.3], std=[0.4])
    torch.testing.assert_close(wrapped(x), own((x - 0.3) / 0.4))
    assert advebm.attack(wrapped, x, y, eps=0.1).shape == x.shape
    assert len(advebm.evaluate(wrapped, data="digits", threat=advebm.Attack(eps=0.1))) == 2


@few_samples
def test_sample_quality_from_python(model):
    from advebm.metrics.quality import SampleQuality

    data = advebm.load_data("digits")
    sets = {
        "test images": SampleSet(data.test.float(), data.test.y, {}),
        "noise": SampleSet(torch.rand(50, 1, 8, 8), data.test.y[:50], {}),
    }
    threat = advebm.Attack(eps=0.5, norm="l2")
    records = advebm.evaluate(model, data=data, threat=threat, metrics=[SampleQuality()], samples=sets, features=model)
    value = {(r.name.split()[0], r.settings["samples"]): r.value for r in records}
    assert value["FD", "test images"] < 0.3 * value["FD", "noise"]
    assert abs(value["KID", "test images"]) < 0.1 * value["KID", "noise"]
    assert value["intended", "test images"] > 0.8 > value["intended", "noise"]


def test_empty_batches_are_fine(model):
    assert advebm.energy(model, torch.empty(0, 1, 8, 8)).shape == (0,)


def test_training_from_python(tmp_path):
    run = advebm.train(
        "digits-standard", folder=tmp_path / "r", options={"train.images": 500, "backbone.width": 8}, device="cpu"
    )
    assert run.recipe.train.images == 500
    assert advebm.train("digits-standard", folder=run.folder, resume=True, device="cpu").recipe == run.recipe
    assert advebm.report(run).exists()
    assert advebm.report(run.folder, out=tmp_path / "other.html").stat().st_size > 10_000


def bad(x, y):
    probabilities = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))
    logits = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return {
        "bytes": (lambda: advebm.energy(logits, (x * 255).byte()), "divide bytes by 255"),
        "0 to 255": (lambda: advebm.energy(logits, x * 255), r"lie in \[0, 1\], got \[0, 255\]; divide by 255"),
        "normalised": (lambda: advebm.energy(logits, 2 * x - 1), r"got \[-1, 1\]; undo the normalisation"),
        "not a number": (lambda: advebm.energy(logits, x * float("nan")), "some are NaN"),
        "no batch": (lambda: advebm.energy(logits, x[0]), r"\(batch, channels, height, width\), got shape"),
        "a list": (lambda: advebm.energy(logits, [1]), "got list"),
        "probabilities": (lambda: advebm.energy(probabilities, x), "probabilities .* remove the softmax"),
        "probabilities attacked": (lambda: advebm.attack(probabilities, x, y, eps=0.1), "remove the softmax"),
        "probabilities evaluated": (
            lambda: advebm.evaluate(probabilities, data="digits", threat=advebm.Attack()),
            "remove the softmax",
        ),
        "label out of range": (lambda: advebm.energy(logits, x, y + 5), "labels must lie in 0 to 9, got 5 to 14"),
        "label of another type": (lambda: advebm.energy(logits, x, y.float()), "labels are int64"),
        "too few labels": (lambda: advebm.attack(logits, x, y[:3], eps=0.1), r"labels are a tensor \(50,\)"),
        "target out of range": (
            lambda: advebm.attack(logits, x, y, eps=0.1, target=y + 5),
            "labels must lie in 0 to 9",
        ),
        "unknown norm": (lambda: advebm.attack(logits, x, y, eps=0.1, norm="l3"), "norm is one of linf, l2, got 'l3'"),
        "unknown loss": (lambda: advebm.Attack(loss="energie"), "did you mean 'energy'"),
        "probabilities sampled": (lambda: advebm.sample(probabilities, y, data="digits"), "remove the softmax"),
        "a number for labels": (lambda: advebm.sample(logits, 3, data="digits"), "got int"),
        "channels": (
            lambda: advebm.wrap(logits, mean=(0.1,) * 3, std=(1,) * 3)(x),
            "normalises 3 channels, the images have 1",
        ),
        "options of a recipe": (
            lambda: advebm.train(advebm.load_recipe("digits-at"), options={"train.images": 5}),
            "options go with the name",
        ),
        "negative eps": (lambda: advebm.attack(logits, x, y, eps=-1), "radius >= 0"),
        "maps": (lambda: advebm.energy(nn.Conv2d(1, 2, 3), x), "a classifier returns logits"),
        "class to sample": (
            lambda: advebm.sample(logits, torch.tensor([10]), data="digits"),
            "labels must lie in 0 to 9, got 10",
        ),
        "unknown method": (lambda: advebm.sample(logits, y, data="digits", method="css"), "did you mean 'cs'"),
        "unknown setting": (lambda: advebm.sample(logits, y, data="digits", stepz=3), "did you mean 'steps'"),
        "unknown recipe": (lambda: advebm.train("digit-at"), "did you mean 'digits-at'"),
        "no model": (lambda: advebm.load("nowhere"), "there is no run or model at nowhere"),
        "resume nothing": (lambda: advebm.train("digits-at", resume=True), "needs the folder"),
    }


@pytest.mark.parametrize("mistake", bad(None, None))
def test_mistakes_are_explained(mistake, test_images):
    action, message = bad(*test_images)[mistake]
    with pytest.raises(UserError, match=message):
        action()


def test_a_module_of_ones_own_is_found_by_its_name(tmp_path, monkeypatch, test_images):
    """``module:factory`` is the module on images in [0, 1] as they are, in eval mode; files come first."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "from torch import nn\ndef linear(): return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))\n"
    (tmp_path / "ones_own.py").write_text(code + "def text(): return 'no module'\n")
    found = advebm.load("ones_own:linear")
    x, _ = test_images
    weight, bias = (found.backbone[2].weight, found.backbone[2].bias)
    torch.testing.assert_close(found(x), x.flatten(1) @ weight.T + bias)
    assert not any(module.training for module in found.modules())
    assert ClassifierFeatures("ones_own:linear").judge == "ones_own:linear"
    for name, message in (
        ("ones_own:text", "returns a str, not a torch module"),
        ("ones_own:missing", "cannot be imported"),
        ("ones_own", "no run or model at ones_own"),
    ):
        with pytest.raises(UserError, match=message):
            advebm.load(name)


# What objects show of themselves --------------------------------------------------------------------------------------


def test_reprs_are_one_line(model, small_run):
    data = advebm.load_data("digits")
    assert repr(data) == (
        "Data digits: 1,258 + 180 + 359 images of 1 x 8 x 8 (train + val + test), 10 classes: "
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    )
    assert repr(data.test) == "Images: 359 of 1 x 8 x 8, 10 classes"
    unlabelled = Images(data.test.x, torch.full((359,), -1))
    assert repr(unlabelled) == "Images: 359 of 1 x 8 x 8, no labels"
    assert re.fullmatch(
        rf"Network {small_run.folder}: \w+, classifier of 10 classes, [\d,]+ parameters, threat PGD-3 l2 0.9",
        repr(model),
    )
    assert repr(advebm.wrap(nn.Linear(2, 3))) == "Network: Linear, classifier, 9 parameters"
    assert re.match(rf"Run {small_run.folder}: digits-at, 6,016 of 6,000 images, \d+ sets of samples", repr(small_run))
    assert "objective at" in repr(small_run.recipe)
    assert "\n" not in repr(small_run) + repr(small_run.recipe) + repr(model)
    record = Record("accuracy", 0.5, 0.1, 25, {"samples": "cs-class"})
    assert repr(record) == "accuracy, cs-class: 50.0 ± 10.0 % (n = 25)"
    assert repr(Records([record, record])) == f"{record!r}\n{record!r}"
    verdicts = Verdicts(("APGD", "FAB"), torch.tensor([-1, -1, -1, 0, 1, 1]))
    assert repr(verdicts) == (
        "Verdicts: 3 of 6 images stand; 1 wrong without attack, 2 broken by APGD, 0 broken by FAB"
    )


def test_a_repr_of_a_damaged_run_is_its_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("name: [")
    assert repr(Run(tmp_path)) == f"Run {tmp_path}"


def shown_picture(html):
    return Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', html)[1])))


def test_notebooks_show_images(model):
    x, y = torch.rand(23, 1, 8, 8), torch.arange(23) % 3
    page = SampleSet(x, y, {"sampler": {"kind": "cs", "start": "class", "steps": 5}})._repr_html_()
    assert "drawn by cs from class, 5 steps" in page
    assert shown_picture(page).size == ((8 * 9 + 1) * 6, (3 * 9 + 1) * 6)  # three rows of at most eight
    assert shown_picture(SampleSet(x, -torch.ones(23), {})._repr_html_()).size == ((10 * 9 + 1) * 8, (3 * 9 + 1) * 8)
    assert "<img" not in SampleSet(x[:0], y[:0], {})._repr_html_()
    picture = np.asarray(advebm.grid(x, columns=5, tile=8))
    torch.testing.assert_close(
        torch.tensor(picture[10:18, 1:9]).int(), (x[5, 0] * 255).round().int()
    )  # the second row begins with the sixth image
    assert np.array_equal(picture, np.asarray(advebm.grid((x * 255).round().byte(), columns=5, tile=8)))
    edited = advebm.edit(model, "inpaint", x, box=(2, 2, 6, 6), steps=2)
    assert shown_picture(edited._repr_html_()).size == ((10 * 9 + 1) * 8, (2 * 9 + 1) * 8)
    with pytest.raises(UserError, match="no images to draw"):
        advebm.grid(x[:0])


def test_what_notebooks_show_is_escaped(tmp_path, small_run):
    evil = "<script>&"
    assert evil not in (page := Records([Record(evil, 1.0, 0.0, 1, {"samples": evil})])._repr_html_())
    assert page.count("&lt;script&gt;&amp;") == 2
    finding = Finding(evil, "fault", evil, evil)
    assert evil not in (page := Findings([finding])._repr_html_())
    assert page.count("&lt;script&gt;&amp;") == 3
    assert evil not in advebm.load_data("digits")._replace(name=evil)._repr_html_()
    run = linked(small_run, tmp_path)
    run.append([{"name": evil, "value": 1.0, "error": 0.0, "count": 1, "settings": {}, "series": {}}])
    (tmp_path / "samples" / "a&b").mkdir(parents=True)
    (tmp_path / "samples" / "a&b" / "manifest.json").write_text("{}")
    advebm.grid(torch.rand(4, 1, 8, 8)).save(tmp_path / "samples" / "a&b" / "grid.png")
    page = run._repr_html_()
    assert evil not in page
    assert "&lt;script&gt;&amp;" in page
    assert page.count("a&amp;b") == 2
    assert shown_picture(page).width == (4 * 9 + 1) * 8
    assert Findings()._repr_html_().startswith("<div>no faults found by 16 checks")


# Networks and runs ----------------------------------------------------------------------------------------------------


def test_edits_of_a_tensor_are_those_of_the_class(model, test_images):
    x, y = test_images
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:6, 1:5] = True
    ours = advebm.edit(model, "inpaint", x[:6], y[:6], box=(1, 2, 5, 6), steps=5)
    theirs = Inpaint(steps=5)(model, x[:6], y[:6], hole=hole)
    assert torch.equal(ours.x, theirs.x)
    assert torch.equal(advebm.edit(model, "inpaint", x[:6], y[:6], mask=hole, steps=5).x, theirs.x)
    assert torch.equal(ours.x[..., ~hole], x[:6][..., ~hole])
    moved = advebm.edit(model, "translate", x[:6], "3", steps=20)
    assert moved.numbers["confidence after"].mean() > moved.numbers["confidence before"].mean()
    assert torch.equal(moved.x, advebm.edit(model, "translate", x[:6], 3, steps=20).x)
    assert torch.equal(moved.x, advebm.edit(model, "translate", x[:6], torch.full((6,), 3), steps=20).x)
    both = advebm.edit(model, "compose", x[:6], classes=(3, 8), steps=5)
    assert torch.equal(both.x, Compose(steps=5)([model, model], x[:6], (3, 8)).x)
    assert torch.equal(both.x, advebm.edit(model, "compose", x[:6], others=[model], classes=(3, 8), steps=5).x)


def test_edits_of_a_run_are_those_of_the_command(small_run, tmp_path, capsys):
    run = linked(small_run, tmp_path)
    ours = advebm.edit(run, "denoise", split="test", count=4, steps=5, device="cpu", out=tmp_path / "ours")
    command = (
        f"edit denoise {run.folder} --split test --count 4 --edit.steps 5 --device cpu --out {tmp_path / 'theirs'}"
    )
    assert not cli.main(command.split())
    written, again = (np.load(tmp_path / name / "images.npz")["x"] for name in ("ours", "theirs"))
    assert np.array_equal(written, again)
    assert np.array_equal(written, (ours.x * 255).round().byte().numpy())
    with pytest.raises(UserError, match="is there already"):
        advebm.edit(run, "denoise", split="test", count=4, out=tmp_path / "ours")
    before = sorted(tmp_path.rglob("*"))
    advebm.edit(run, "denoise", tmp_path / "ours" / "results", steps=1, device="cpu")
    assert sorted(tmp_path.rglob("*")) == before  # without out nothing is written


@few_samples
def test_a_run_is_drawn_from_and_measured_in_its_folder(small_run, tmp_path):
    run = linked(small_run, tmp_path)
    drawn = advebm.draw_set(run, method="ta", classes=(3, 8), per_class=2, steps=3, device="cpu", name="mine")
    assert drawn.y.tolist() == [3, 3, 8, 8]
    assert drawn.manifest["sampler"]["steps"] == 3
    assert list(run.samples()) == ["mine"]
    threat = advebm.Attack(eps=0.5, norm="l2", steps=2)
    records = advebm.evaluate(run, threat=threat, metrics=[RobustAccuracy()], device="cpu")
    assert [r.name for r in records] == ["accuracy under PGD-2 l2 0.5"] == [r["name"] for r in run.records()]
    network = advebm.evaluate(advebm.load(run.folder), data="digits", threat=threat)
    assert records[0].value == network[1].value
    suite = advebm.evaluate(advebm.load(run.folder), data="digits", threat=threat, suite="cem", tier="quick")
    assert {"accuracy", "accuracy under PGD-2 l2 0.5"} < {r.name for r in suite}


def test_tuning_tries_what_is_given_and_drawing_takes_it(small_run, tmp_path):
    run = linked(small_run, tmp_path)
    tuning = advebm.tune(run, step_size=(0.05, 0.2), steps=(3,), per_class=5, device="cpu", noise=(0.0,))
    assert sorted(t["sampler"]["step_size"] for t in tuning.trials) == [0.05, 0.2]
    assert tuning.best.is_file()
    assert tuning.figure.is_file()
    assert len(re.findall("<tr>", tuning._repr_html_())) == 3
    best = tuning.trials[0]["sampler"]["step_size"]
    assert f"step_size {best:.3g}" in repr(tuning)
    drawn = advebm.draw_set(run, per_class=1, device="cpu")
    assert drawn.manifest["sampler"]["step_size"] == best
    assert advebm.draw_set(run, per_class=1, device="cpu", untuned=True).manifest["sampler"]["step_size"] == 0.1


def test_the_doctor_finds_the_same_by_reference_and_by_network(small_run, capsys):
    by_name, by_run = (advebm.doctor(model, images=60, device="cpu") for model in (small_run.folder, small_run))
    network = advebm.doctor(advebm.load(small_run.folder), images=60)
    assert by_name == by_run == network
    assert capsys.readouterr().err.count("60 test images of digits at l2 0.9") == 3
    assert by_name.faults == []


def test_importing_is_quick_and_loads_no_torch():
    code = "import sys, advebm; dir(advebm); assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, advebm; advebm.load; assert not {'sklearn', 'gradio', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_typed():
    assert (resources.files("advebm") / "py.typed").is_file()


def wrong(model, x, run):
    return {
        "a split of a network": (lambda: advebm.edit(model, "denoise", split="test"), "takes? a tensor|edits a tensor"),
        "a file beside a tensor": (lambda: advebm.edit(model, "denoise", x, split="test"), "split: only for runs"),
        "an unknown edit": (lambda: advebm.edit(model, "denoize", x), "did you mean 'denoise'"),
        "score": (lambda: advebm.edit(model, "score", x), "score changes no image"),
        "an unknown setting": (lambda: advebm.edit(model, "denoise", x, stepz=3), "did you mean 'steps'"),
        "a mask for denoising": (lambda: advebm.edit(model, "denoise", x, mask=x[0] > 0.5), "is for inpaint, paint"),
        "an unknown class": (lambda: advebm.edit(model, "translate", x, "cat"), "no class 'cat'"),
        "film of nothing": (lambda: advebm.edit(run, "denoise", split="test", film=True), "film: only for results"),
        "data of a run": (lambda: advebm.evaluate(run, data="digits"), "data: only for networks"),
        "a device of a network": (lambda: advebm.evaluate(model, data="digits", device="cpu"), "device: only for runs"),
        "no data": (lambda: advebm.evaluate(model), "no data are known"),
        "suite and metrics": (lambda: advebm.evaluate(run, suite="cem", metrics=[]), "leave metrics out"),
        "an unknown suite": (lambda: advebm.evaluate(model, data="digits", suite="jeet"), "did you mean 'jeat'"),
        "a network for a run": (lambda: advebm.draw_set(model), "works in the folder of a run"),
        "no images": (lambda: advebm.draw_set(run, per_class=0), "per_class must be at least 1"),
        "a name that tuning does not know": (lambda: advebm.tune(run, by="FID"), "FID"),
        "an unknown figure": (lambda: advebm.diagnose(run, ["landscapes"]), "did you mean 'landscape'"),
        "no run": (lambda: advebm.report("nowhere"), "nowhere"),
        "a table without a scale": (lambda: advebm.reproduce("cem-table2"), "is a table; say how large"),
        "minus one image": (lambda: advebm.export(run, "x", images=-1), "images must be at least 0"),
        "a module without data": (lambda: advebm.doctor(nn.Linear(1, 2)), "no data are known"),
    }


@pytest.mark.parametrize("mistake", wrong(None, torch.zeros(1, 1, 8, 8), None))
def test_mistakes_with_runs_are_explained(mistake, model, small_run, test_images):
    action, message = wrong(model, test_images[0][:2], small_run)[mistake]
    with pytest.raises(UserError, match=message):
        action()
