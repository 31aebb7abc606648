import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import nn

from advebm import recipes
from advebm.attacks.projected import Attack
from advebm.core import config
from advebm.core.errors import UserError
from advebm.data import ood_sets
from advebm.data.ood_sets import ClassGaussianNoise, GaussianNoise, UniformNoise
from advebm.data.sources import Augmentations, Data, Digits, Images, Part
from advebm.evaluation import evaluate
from advebm.metrics.base import Subject
from advebm.metrics.detectors import Detectors
from advebm.metrics.ood import (
    ODIN,
    EnergyScore,
    MaxLogit,
    MaxSoftmax,
    OutOfDistribution,
    aupr,
    auroc,
    fpr95,
    lowest_scores,
)
from advebm.reporting import figures
from advebm.reporting.build import report
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from tests.helpers import Plain

SCORES = [EnergyScore(), MaxSoftmax(), MaxLogit(), ODIN(), ODIN(temperature=1.0, step=0.05)]


# Two sets of scores ---------------------------------------------------------------------------------------------------


def scores(kind, generator):
    inside = torch.randn(70, generator=generator, dtype=torch.float64)
    outside = torch.randn(53, generator=generator, dtype=torch.float64) + 0.8
    return (inside, outside) if kind == "distinct" else ((2 * inside).round(), (2 * outside).round())


@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_measures_agree_with_scikit_learn(kind, generator):
    inside, outside = scores(kind, generator)
    value, y = torch.cat([inside, outside]).numpy(), np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    assert auroc(inside, outside).value == pytest.approx(roc_auc_score(y, value), abs=1e-12)
    assert aupr(inside, outside).value == pytest.approx(average_precision_score(y, value), abs=1e-12)
    assert aupr(inside, outside, positive="id").value == pytest.approx(
        average_precision_score(1 - y, -value), abs=1e-12
    )
    for recall, labels, sign in (("ood", y, 1), ("id", 1 - y, -1)):
        fpr, tpr, _ = roc_curve(labels, sign * value, drop_intermediate=False)
        assert fpr95(inside, outside, recall=recall).value == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)


@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_the_error_of_auroc_is_delongs(kind, generator):
    """By the definition: variances of the mean of the kernel over one set, for each member of the other."""
    inside, outside = scores(kind, generator)
    kernel = np.array([[1.0 if o > i else 0.5 if o == i else 0.0 for i in inside] for o in outside])
    m, n = kernel.shape
    variance = kernel.mean(1).var(ddof=1) / m + kernel.mean(0).var(ddof=1) / n
    assert auroc(inside, outside) == pytest.approx((kernel.mean(), math.sqrt(variance)), abs=1e-12)


@pytest.mark.parametrize(
    "measure",
    [
        auroc,
        aupr,
        lambda i, o: aupr(i, o, positive="id"),
        lambda i, o: fpr95(i, o, recall="ood"),
        lambda i, o: fpr95(i, o, recall="id"),
    ],
)
def test_errors_are_the_spread_over_new_draws(measure, generator):
    draw = lambda count, shift: torch.randn(count, generator=generator, dtype=torch.float64) + shift
    found = [measure(draw(400, 0.0), draw(200, 1.5)) for _ in range(80)]
    spread, claimed = np.std([f.value for f in found], ddof=1), np.mean([f.error for f in found])
    assert claimed == pytest.approx(spread, rel=0.35)


def test_out_of_distribution_is_the_positive_class():
    low, high = torch.arange(30.0), torch.arange(30.0, 90.0)
    for measure in (auroc, aupr, lambda i, o: aupr(i, o, positive="id")):
        assert measure(low, high).value == 1
        assert measure(high, low).value < 0.6
    assert auroc(high, low).value == 0
    assert [fpr95(low, high, recall=r).value for r in ("ood", "id")] == [0, 0]
    assert [fpr95(high, low, recall=r).value for r in ("ood", "id")] == [1, 1]


def test_the_two_rates_at_95_percent_by_hand():
    """20 images of the data at 0 ... 19; 40 outliers at 10 ... 49: 38 of them, and 19 of the data, are 95 %."""
    inside, outside = torch.arange(20.0), torch.arange(10.0, 50.0)
    assert fpr95(inside, outside, recall="ood").value == 8 / 20  # the threshold 12 is reached by 12 ... 19
    assert fpr95(inside, outside, recall="id").value == 9 / 40  # the threshold 18 is not passed by 10 ... 18


@pytest.mark.parametrize("bad", [torch.tensor([0.0, torch.nan]), torch.tensor([]), torch.ones(3, 2), torch.ones(1)])
def test_scores_that_are_none_are_refused(bad):
    for pair in ((bad, torch.ones(5)), (torch.ones(5), bad)):
        for measure in (auroc, aupr, lambda i, o: fpr95(i, o, recall="id")):
            with pytest.raises(UserError, match="at least 2 finite numbers"):
                measure(*pair)


# Scores of images -----------------------------------------------------------------------------------------------------


class Prototypes(nn.Module):
    """Logits that grow along one axis a class; a grey image has none of them."""

    def forward(self, x):
        return 8 * (x.flatten(1)[:, :5] - 0.5)


def examples():
    """Sure members of five classes, and grey images."""
    x = torch.full((5, 1, 4, 4), 0.5)
    x.flatten(1)[range(5), range(5)] = 1.0
    return x, torch.full((5, 1, 4, 4), 0.5)


@pytest.mark.parametrize("score", SCORES, ids=lambda s: s.name)
def test_what_is_obviously_not_of_the_data_scores_higher(score):
    inside, outside = (score(Prototypes(), x) for x in examples())
    assert inside.shape == (5,)
    assert (outside > inside).all()
    assert auroc(inside, outside).value == 1


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_scores_of_a_critic(shape):
    critic = lambda x: (4 * x.flatten(1).mean(1)).reshape(shape)
    x = torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    for score in (EnergyScore(), MaxLogit()):
        assert score(critic, x).tolist() == [-1, -2, -4]
    for score in (MaxSoftmax(), ODIN()):
        with pytest.raises(UserError, match="use energy or max-logit"):
            score(critic, x)


def test_scores_by_their_formulas(net, batch):
    f = net.eval()
    with torch.no_grad():
        out = f(batch.x)
        p = out.softmax(1).amax(1)
        torch.testing.assert_close(EnergyScore()(f, batch.x), -out.exp().sum(1).log())
        torch.testing.assert_close(MaxSoftmax()(f, batch.x), ((1 - p) / p).log())
        torch.testing.assert_close(MaxLogit()(f, batch.x), -out.amax(1))
        torch.testing.assert_close(ODIN(1.0, 0.0)(f, batch.x), MaxSoftmax()(f, batch.x))


def test_odin_is_the_papers_step_and_temperature(net, batch):
    """``x - ε sign(-∇ log S_ŷ(x; T))``, then the confidence at T."""
    f, t, step = net.eval(), 3.0, 0.004
    x = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((f(x) / t).log_softmax(1).amax(1).sum(), x)
    moved = (batch.x - step * (-gradient).sign()).requires_grad_()
    p = (f(moved) / t).softmax(1).amax(1)
    torch.testing.assert_close(ODIN(t, step)(f, batch.x), ((1 - p) / p).log())
    (expected,) = torch.autograd.grad(((1 - p) / p).log().sum(), moved)
    (found,) = torch.autograd.grad(ODIN(t, step)(f, x).sum(), x)
    torch.testing.assert_close(found, expected)  # what an attack on it follows
    assert (ODIN(t, step)(f, batch.x) < ODIN(t, 0.0)(f, batch.x)).all()


def test_confidences_that_round_to_one_are_told_apart():
    f = lambda x: torch.stack([x[:, 0, 0, 0], torch.zeros(len(x))], 1)
    found = MaxSoftmax()(f, torch.tensor([40.0, 80.0, 160.0]).view(3, 1, 1, 1))
    assert found.tolist() == [-40, -80, -160]


# Sets of outliers -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grey:
    """Test images of one level each, of this shape."""

    levels: tuple[int, ...]
    shape: tuple[int, ...] = (1, 4, 4)
    name: str = "grey"
    augment = Augmentations()

    def load(self):
        x = torch.tensor(self.levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *self.shape).contiguous()
        split = Images(x, torch.arange(len(x)) % 2)
        return Data(self.name, ("a", "b"), split, split, split)


def test_noises_have_the_moments_they_name(generator):
    data = Digits().load()
    name, x = ood_sets.draw_outliers(UniformNoise(), data, 500, generator)
    assert (name, x.shape, x.dtype) == ("uniform", (500, 1, 8, 8), torch.float32)
    assert x.mean().item() == pytest.approx(0.5, abs=0.01)
    assert x.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    name, x = ood_sets.draw_outliers(GaussianNoise(0.4, 0.1), data, 500, generator)
    assert name == "gaussian"
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.4, 0.1), abs=0.01)
    wide = GaussianNoise(0.5, 2.0).draw(data, 9, generator)
    assert (wide.min().item(), wide.max().item()) == (0, 1)
    name, x = ood_sets.draw_outliers(ClassGaussianNoise(), data, 2000, generator)
    assert name == "class-gaussian"
    torch.testing.assert_close(x.mean(0), data.train.float().mean(0), atol=0.06, rtol=0)  # clamping moves it a little
    with pytest.raises(UserError, match="std is a deviation > 0"):
        GaussianNoise(std=0)


def test_the_class_gaussian_of_unlabelled_images(generator):
    data = Grey((10, 60, 200)).load()
    bare = Images(data.train.x, torch.full((3,), -1))
    x = ClassGaussianNoise().draw(data._replace(train=bare), 50, generator)
    assert x.shape == (50, 1, 4, 4)


def test_images_of_another_shape_are_fitted():
    steps = torch.linspace(0, 1, 8).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    assert torch.equal(ood_sets.fit_shape(steps, (3, 8, 8)), steps.expand(1, 3, 8, 8))
    colour = torch.stack([0 * steps[0, 0], steps[0, 0], 0.5 * steps[0, 0]])[None]
    torch.testing.assert_close(ood_sets.fit_shape(colour, (1, 8, 8)), 0.5 * steps)
    flat = ood_sets.fit_shape(torch.full((2, 3, 5, 7), 0.3), (1, 8, 8))
    torch.testing.assert_close(flat, torch.full((2, 1, 8, 8), 0.3))
    halved = ood_sets.fit_shape(steps, (1, 8, 4))[0, 0, 0]
    torch.testing.assert_close(halved[1:3].mean(), torch.tensor(0.5))
    assert (halved.diff() > 0.2).all()


def test_a_source_gives_distinct_test_images(generator):
    data, levels = Digits().load(), tuple(range(0, 200, 5))
    name, x = ood_sets.draw_outliers(Grey(levels, (3, 6, 6)), data, 12, generator)
    assert (name, x.shape) == ("grey", (12, 1, 8, 8))
    drawn = (x.mean((1, 2, 3)) * 255).round().int().tolist()
    assert len(set(drawn)) == 12
    assert set(drawn) <= set(levels)
    assert drawn != sorted(drawn)  # files stand class by class
    assert len(ood_sets.draw_outliers(Grey(levels), data, 1000, generator)[1]) == len(levels)


@pytest.mark.parametrize("same", [Digits(), Digits(split_seed=3), Part()], ids=lambda s: type(s).__name__)
def test_the_data_itself_is_refused(same, generator):
    with pytest.raises(UserError, match="images of digits are images of digits itself"):
        ood_sets.draw_outliers(same, Digits().load(), 100, generator)


def test_a_few_common_images_are_no_reason_to_refuse(generator):
    data = Grey((1, 2, 3)).load()
    assert ood_sets.count_shared(torch.cat([data.train.x, data.train.x + 100]), data) == 3
    assert len(ood_sets.draw_outliers(Grey((1, 50, 60, 70)), data, 10, generator)[1]) == 4


# The metric -----------------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """A critic that likes bright images: one quarter of the sum of 16 pixels, a gradient of length 1."""

    def forward(self, x):
        return x.flatten(1).sum(1) / 4


def levels_subject(model, levels=(100, 110, 120, 130), threat=None):
    data = Grey(tuple(levels), name="data").load()
    return Subject(model, data, data.test, threat or Attack(norm="l2", eps=0.5), batch=3)


def test_the_worst_case_of_a_linear_critic_is_exact(generator):
    """Energies are -4 level / 255; within l2 0.2 an outlier gains 0.2, which is 12.75 levels; the data gain nothing."""
    subject = levels_subject(Brightness())
    ood = OutOfDistribution((EnergyScore(),), (Grey((80, 90, 101, 115)),), eps=0.2, steps=5, restarts=1)
    records = {r.name: r for r in ood(subject, generator)}
    standard, worst = records["AUROC energy vs grey"], records["AUROC energy vs grey, APGD-5 l2 0.2"]
    pairs = lambda gain: [o + gain < i for o in (80, 90, 101, 115) for i in (100, 110, 120, 130)]
    assert standard.value == np.mean(pairs(0))
    assert worst.value == np.mean(pairs(12.75))
    assert worst.value < standard.value
    assert (standard.count, standard.settings["inside"], standard.settings["outside"]) == (8, 4, 4)
    assert standard.series["inside"] == worst.series["inside"]  # the data are not attacked
    width = np.diff(worst.series["score"])
    assert np.dot(worst.series["outside"], width) == pytest.approx(1)
    mean = lambda r: np.dot(np.array(r.series["outside"]) * width, np.array(r.series["score"])[:-1] + width / 2)
    assert mean(worst) - mean(standard) == pytest.approx(-0.2, abs=width[0])
    assert len(records) == 10
    assert {"fpr95_ood_recall energy vs grey", "AUPR-OOD energy vs grey", "AUPR-ID energy vs grey"} <= records.keys()


class Peak(nn.Module):
    """A critic that likes mid-grey best."""

    def forward(self, x):
        return -(x - 128 / 255).flatten(1).square().sum(1)


def test_the_image_itself_counts_among_the_attacks(generator):
    """From the sphere around mid-grey, two steps do not find back to it; the outlier was best as it was."""
    subject = levels_subject(Peak(), (127, 129, 127, 129))
    ood = OutOfDistribution((EnergyScore(),), (Grey((128, 128)),), eps=0.5, steps=2, restarts=1)
    values = [r.value for r in ood(subject, generator) if r.name.startswith("AUROC")]
    assert values == [0, 0]


class Waves(nn.Module):
    """A critic with many maxima."""

    def forward(self, x):
        return (20 * x).sin().flatten(1).sum(1)


def test_the_best_restart_counts(generator):
    subject = levels_subject(Waves(), range(40, 250, 5))

    def mean(restarts):
        outside = (Grey(tuple(range(42, 252, 5))),)
        ood = OutOfDistribution((EnergyScore(),), outside, count=100, eps=0.3, steps=2, restarts=restarts)
        return [r.value for r in ood(subject, torch.Generator().manual_seed(0)) if r.name.startswith("AUROC")][1]

    assert mean(1) > mean(3) > mean(9)


def test_a_set_is_measured_alike_whatever_the_others(generator):
    subject = levels_subject(Waves(), range(40, 250, 10))
    g = lambda: torch.Generator().manual_seed(1)
    ood = OutOfDistribution((MaxLogit(), EnergyScore()), (UniformNoise(), GaussianNoise()), 50, steps=2, restarts=1)
    both = {r.name: r.value for r in ood(subject, g())}
    alone = dataclasses.replace(ood, scores=(EnergyScore(),), sets=(GaussianNoise(),))(subject, g())
    assert len(alone) == 10
    assert {r.name: r.value for r in alone}.items() <= both.items()


@pytest.mark.parametrize(
    ("options", "threat", "name"),
    [
        ({}, Attack(norm="l2", eps=0.25), "APGD-2 l2 0.25"),
        ({}, Attack(norm="linf", eps=0.1), "APGD-2 l2 1"),
        ({"norm": "linf"}, Attack(norm="linf", eps=4 / 255), "APGD-2 linf 4/255"),
        ({"norm": "linf", "restarts": 2}, Attack(norm="l2", eps=0.25), "APGD-2 x 2 linf 8/255"),
        ({"eps": 0.5}, Attack(norm="l2", eps=0.25), "APGD-2 l2 0.5"),
    ],
)
def test_the_radius_is_the_threats_if_it_has_the_norm(options, threat, name, generator):
    ood = OutOfDistribution((EnergyScore(),), (UniformNoise(),), 4, **{"steps": 2, "restarts": 1, **options})
    records = ood(levels_subject(Brightness(), threat=threat), generator)
    assert records[-1].name == f"fpr95_id_recall energy vs uniform, {name}"
    assert records[-1].settings["attack"] == name
    plain = records[-1].settings["metric"]
    assert plain["kind"] == "ood"
    assert config.build(plain, "metric") == dataclasses.replace(ood, eps=plain["eps"])


def test_a_search_climbs_its_own_score_and_the_score_itself_judges(generator):
    """One score falls to the right, the search's to the left: what is found is worse by the score that counts."""
    x, asked = torch.full((3, 1, 2, 2), 0.5), []
    score = lambda z: -z.flatten(1).sum(1)

    def other(z):
        asked.append(len(z))
        return z.flatten(1).sum(1)

    options = {"eps": 0.2, "norm": "l2", "steps": 5, "restarts": 1, "generator": generator}
    assert lowest_scores(score, x, **options).tolist() == pytest.approx([-2.4] * 3, abs=1e-2)
    assert lowest_scores(score, x, search=other, **options).tolist() == pytest.approx(
        [-2.0] * 3, abs=1e-4
    )  # the image's own
    assert asked


def test_eps_0_leaves_the_worst_case_out(generator):
    ood = OutOfDistribution((EnergyScore(),), (UniformNoise(),), 4, eps=0)
    assert len(ood(levels_subject(Brightness()), generator)) == 5


REFUSED = [
    ({"sets": ()}, "name at least one each"),
    ({"scores": ()}, "name at least one each"),
    ({"scores": (ODIN(), ODIN())}, "named once each"),
    ({"eps": 8, "norm": "linf"}, "write 8/255"),
    ({"norm": "l1"}, "one of l2, linf"),
    ({"count": 1}, "count must be at least 2"),
    ({"restarts": 0}, "restarts at least 1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        OutOfDistribution(**options)


def test_two_sets_of_one_name_and_a_bad_temperature_are_refused(generator):
    with pytest.raises(UserError, match="two sets are called grey"):
        OutOfDistribution(sets=(Grey((1, 2)), Grey((3, 4))))(levels_subject(Brightness()), generator)
    with pytest.raises(UserError, match="temperature must be > 0"):
        ODIN(temperature=0)


def test_sets_and_scores_are_named_on_the_command_line():
    pairs = [
        ("metrics.0.sets.1.std", "0.1"),
        ("metrics", "ood,accuracy"),
        ("metrics.0.sets", "uniform,gaussian,folder:some/where"),
        ("metrics.0.scores", "energy,odin"),
        ("metrics.0.scores.1.temperature", "10"),
    ]
    recipe = resolve(recipes.find("digits-at"), pairs)
    ood, _ = recipe.metrics
    assert ood.scores == (EnergyScore(), ODIN(temperature=10))
    assert ood.sets[:2] == (UniformNoise(), GaussianNoise(std=0.1))
    assert ood.sets[2].path == "some/where"
    assert resolve(config.describe(recipe)) == recipe
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        resolve(recipes.find("digits-at"), [("metrics", "ood"), ("metrics.0.sets", "unifrom")])


def test_the_report_shows_scores_calibration_and_corruptions(small_run, tmp_path):
    """Measured on a trained run, and the model is as it was."""
    folder = shutil.copytree(small_run.folder, tmp_path / "run")
    run = Run.open(folder)
    pairs = [("metrics", "accuracy,robustness-curve,ood,calibration,corruption-accuracy"), ("metrics.1.factors", "1,2")]
    pairs += [("metrics.2.steps", 3), ("metrics.2.restarts", 1), ("metrics.2.count", 60), ("metrics.4.severities", "3")]
    evaluate.evaluate_run(run, recipe=resolve(config.describe(run.recipe), pairs))
    page = report(run).read_text()
    assert "Out-of-distribution detection" in page
    assert 'alt="accuracy against confidence"' in page
    assert "accuracy under gaussian-noise 3" in page
    assert "liu2020" not in page  # the recipe's own metrics are cited, not what was measured besides
    records = [r for r in run.records() if r["name"].startswith("accuracy")]
    threat = config.describe(run.recipe.threat)
    clean = [r for r in records if "corruption" not in r["settings"]]
    assert len(clean) < len(records)
    drawn = [figures.robustness({"run": chosen}, threat) for chosen in (records, clean)]
    assert drawn[0] == drawn[1] is not None
    attacked = [r for r in clean if "attack" in r["settings"]]
    assert len(attacked) == len(clean) - 1
    assert figures.robustness({"run": attacked}, threat) != drawn[1]  # clean accuracy is at a radius of 0


def test_figures_of_nothing_are_left_out():
    assert figures.detection([]) is None
    assert figures.reliability([]) is None


# Detectors ------------------------------------------------------------------------------------------------------------


def test_detectors_of_a_linear_classifier():
    """f_k = w_k · x moves by eps ‖w_k‖ in an l2 ball inside the box, so the AUROCs are known."""
    draw = torch.Generator().manual_seed(0)
    x = (0.5 + 0.05 * torch.randn(90, 1, 4, 4, generator=draw) * 1.0).clamp(0.2, 0.8)
    y = torch.arange(90) % 3
    weights = 3 * torch.randn(3, 16, generator=draw)
    split = Images((x * 255).round().to(torch.uint8), y)
    data = Data("grey", ("a", "b", "c"), split, split, split)
    threat = Attack(eps=0.05, norm="l2", steps=1)
    subject = Subject(Plain(lambda x: x.flatten(1) @ weights.T), data, split, threat, batch=40)
    plain, attacked = Detectors(steps=20)(subject, torch.Generator().manual_seed(1))
    f = split.float().flatten(1) @ weights.T
    lift = threat.eps * weights.norm(dim=1)
    expected = [[roc_auc_score(y == k, f[:, k] + shift * lift[k] * (y != k)) for k in range(3)] for shift in (0, 1)]
    assert list(plain.series) == ["a", "b", "c"]
    assert [v[0] for v in plain.series.values()] == pytest.approx(expected[0], abs=1e-6)
    assert [v[0] for v in attacked.series.values()] == pytest.approx(expected[1], abs=2e-3)
    assert plain.value == pytest.approx(sum(expected[0]) / 3, abs=1e-6)
    assert plain.value - attacked.value > 0.02
    own = [f[y == k, k] for k in range(3)], [f[y != k, k] for k in range(3)]
    errors = [auroc(-a, -b).error for a, b in zip(*own, strict=True)]
    assert plain.error == pytest.approx(sum(e * e for e in errors) ** 0.5 / 3, rel=1e-5)
    assert (plain.name, attacked.name) == ("AUROC of detectors", "AUROC of detectors, APGD-20 l2 0.05")
    assert figures.detection([dataclasses.asdict(attacked)]) is None, "their series is no histogram"


def test_detectors_restart_and_refuse_what_they_cannot_judge(monkeypatch):
    split = Images(torch.full((6, 1, 4, 4), 128, dtype=torch.uint8), torch.arange(6) % 3)
    data = Data("grey", ("a", "b", "c"), split, split, split)
    threat = Attack(eps=0.1, norm="l2", steps=1)
    subject = Subject(Plain(lambda x: x.flatten(1)[:, :3]), data, split, threat)
    calls = []
    monkeypatch.setattr("advebm.metrics.ood.ascend", lambda value, x, **options: calls.append(options) or (x, value(x)))
    _, attacked = Detectors(restarts=4, steps=7)(subject, torch.Generator())
    assert len(calls) == 3 * 4
    assert {(c["eps"], c["norm"], c["steps"]) for c in calls} == {(0.1, "l2", 7)}
    assert "APGD-7 x 4" in attacked.name
    critic = subject._replace(model=Plain(lambda x: x.flatten(1)[:, :1]))
    with pytest.raises(UserError, match="need a classifier of 3 classes; a critic is one already"):
        Detectors()(critic, torch.Generator())
    few = subject._replace(split=split.take(slice(4)))
    with pytest.raises(UserError, match="2 images of its class and of others, b has 1"):
        Detectors()(few, torch.Generator())
    with pytest.raises(UserError, match="count must be at least 2"):
        Detectors(count=1)
