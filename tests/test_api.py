import pytest
import torch
from torch import nn

import advebm
from advebm.core.errors import UserError
from advebm.runs.find_space import ClassifierFeatures
from tests.helpers import few_samples


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
    from advebm.metrics.base import SampleSet
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
