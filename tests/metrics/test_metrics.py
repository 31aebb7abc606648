import math

import numpy as np
import pytest
import torch
from torch import nn

import advebm
from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.data.sources import Data, Images
from advebm.metrics.base import Features, SampleSet, Subject, average, proportion
from advebm.metrics.distances import Moments, frechet_distance, jackknife, kernel_distance
from advebm.metrics.energy import Energies
from advebm.metrics.quality import SampleQuality
from advebm.metrics.robustness import Accuracy, RobustAccuracy, RobustnessCurve
from tests.references import distances as reference


@pytest.fixture
def features(generator):
    a = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    b = (
        torch.randn(80, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
        + 1
    )
    return a, b


class Linear(nn.Module):
    """Logits ±w·(mean pixel - 1/2): its robust accuracy in l2 is known in closed form."""

    def forward(self, x):
        s = 10 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-s, s], 1)


def linear_subject(threat, levels=(10, 100, 120, 135, 150, 200), batch=4):
    """Images of one grey level; class 1 is brighter than the middle of the scale (127.5)."""
    x = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    split = Images(x, (x[:, 0, 0, 0] > 127).long())
    data = Data("grey", ("dark", "bright"), split, split, split)
    return Subject(Linear(), data, split, threat, batch=batch)


def test_frechet_distance_of_two_gaussians_in_closed_form():
    """Moments made exactly: diagonal covariances give Σ (μ_a - μ_b)² + (σ_a - σ_b)²."""

    def exact(mean, deviation):
        corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
        return Moments.of(corners * torch.tensor(deviation) * math.sqrt(3 / 4) + torch.tensor(mean))

    a, b = exact([0.0, 1.0], [1.0, 2.0]), exact([3.0, 1.0], [0.5, 5.0])
    torch.testing.assert_close(a.covariance, torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double())
    assert frechet_distance(a, b) == pytest.approx(9 + 0.25 + 9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_agrees_with_scipy(features):
    a, b = features
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    assert ours == pytest.approx(reference.frechet(a.numpy(), b.numpy()), abs=1e-8)
    assert ours == pytest.approx(frechet_distance(Moments.of(b), Moments.of(a)), abs=1e-8)


def test_frechet_distance_with_fewer_samples_than_dimensions(generator):
    """Rank-deficient covariances: in the subspace where there is data, the distance is the one computed there."""
    low = (
        torch.randn(12, 3, generator=generator, dtype=torch.float64),
        torch.randn(12, 3, generator=generator).double() * 2,
    )
    lift = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0][:3]
    expected = frechet_distance(*map(Moments.of, low))
    assert frechet_distance(*(Moments.of(f @ lift) for f in low)) == pytest.approx(expected, abs=1e-6)


def test_moments_do_not_depend_on_batches_and_subtract(features):
    a, _ = features
    whole, parts = Moments.of(a), [Moments.of(p) for p in a.split(7)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    torch.testing.assert_close(merged.covariance, whole.covariance)
    torch.testing.assert_close(whole.covariance, torch.cov(a.T))
    torch.testing.assert_close((whole - parts[0]).mean, a[7:].mean(0))


def test_kernel_distance_agrees_with_loops_and_is_unbiased(features, generator):
    a, b = features
    assert kernel_distance(a, b) == pytest.approx(reference.kernel(a.numpy(), b.numpy()), rel=1e-10)
    same = [kernel_distance(*torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(200)


def test_jackknife_of_a_mean_is_its_standard_error(generator):
    """Leave-one-out of the mean gives s/√n exactly."""
    values = torch.randn(30, generator=generator, dtype=torch.float64)
    error = jackknife(lambda kept: values[list(kept)].mean().item(), 30)
    assert error == pytest.approx(values.std().item() / math.sqrt(30), rel=1e-6)


def test_error_bars_by_hand():
    assert proportion(torch.tensor([True, True, True, False])) == (0.75, pytest.approx(math.sqrt(3) / 8), 4)
    assert average(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(1.0), 2)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_robust_accuracy_of_a_linear_model_is_exact(batch):
    """In l2, grey images of 16 pixels at distance d levels from the threshold fall for eps = 4 d / 255 or more."""
    subject = linear_subject(Attack(eps=4 * 9 / 255, norm="l2", steps=5), batch=batch)
    g = torch.Generator().manual_seed(0)
    (clean,) = Accuracy()(subject, g)
    (robust,) = RobustAccuracy()(subject, g)
    assert (clean.value, clean.count) == (1.0, 6)
    assert robust.value == pytest.approx(4 / 6)  # 120 and 135 are 7.5 levels away, all others more than 9
    assert robust.settings["attack"]["eps"] == 4 * 9 / 255
    curve = RobustnessCurve((0.0, 0.5, 3.5))(subject, g)
    assert [r.value for r in curve] == [1.0, 1.0, pytest.approx(2 / 6)]


def test_a_metric_may_bring_its_own_attack():
    subject = linear_subject(Attack(eps=1e-6, norm="l2"))
    (robust,) = RobustAccuracy(Attack(eps=3.0, norm="l2", steps=20))(subject, torch.Generator().manual_seed(0))
    assert robust.value == 0


SPACE = Features("test space", lambda v: v.flatten(1)[:, :3], lambda f: Linear()(f[:, None, None]))


def test_sample_quality_by_hand(generator):
    """Samples that are the training images: FD 0, KID as of one set with itself, all of the class asked for."""
    subject = linear_subject(Attack(), levels=tuple(range(10, 250, 5)))
    train = subject.data.train
    x = torch.rand(40, 1, 4, 4, generator=generator)
    sets = {
        "copies": SampleSet(train.float(), train.y, {}),
        "noise": SampleSet(x, 1 - (x.flatten(1)[:, :3].mean(1) > 0.5).long(), {"a": 1}),
    }
    subject = subject._replace(samples=sets, features=SPACE)
    records = {(r.name, r.settings["samples"]): r for r in SampleQuality(groups=4)(subject, generator)}
    assert records["FD (test space)", "copies"].value == pytest.approx(0, abs=1e-6)
    f = lambda images: images.flatten(1)[:, :3].double().numpy()
    noisy = records["FD (test space)", "noise"]
    assert noisy.value == pytest.approx(reference.frechet(f(x), f(train.float())), abs=1e-6)
    assert noisy.error > 0
    assert noisy.settings["a"] == 1
    assert records["KID (test space)", "noise"].value == pytest.approx(
        reference.kernel(f(x), f(train.float())), rel=1e-6
    )
    assert records["intended class (test space)", "copies"].value == 1
    assert records["intended class (test space)", "noise"].value == 0


def test_sample_quality_refuses_too_few_and_needs_a_space(generator):
    subject = linear_subject(Attack())
    assert SampleQuality()(subject, generator) == []
    few = {"few": SampleSet(torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long), {})}
    with pytest.raises(UserError, match="give --features"):
        SampleQuality()(subject._replace(samples=few), generator)
    with pytest.warns(UserWarning, match="few: 3 images are too few"):
        assert SampleQuality()(subject._replace(samples=few, features=SPACE), generator) == []


def test_energies_of_data_samples_and_noise(generator):
    """For logits ±s, E(x) = -log(2 cosh s), with s = 10 (mean pixel - 1/2)."""
    grey = torch.full((9, 1, 4, 4), 0.9)
    subject = linear_subject(Attack())._replace(samples={"grey": SampleSet(grey, torch.zeros(9, dtype=torch.long), {})})
    records = {r.name: r for r in Energies(noise=50, bins=5)(subject, generator)}
    assert records["E(x) of samples grey"].value == pytest.approx(-math.log(2 * math.cosh(4)), rel=1e-5)
    assert records["E(x) of samples grey"].error == pytest.approx(0, abs=1e-6)
    test = records["E(x) of test images"]
    s = 10 * (subject.split.float().mean((1, 2, 3)).double() - 0.5)
    values = -torch.log(2 * torch.cosh(s))
    assert test.value == pytest.approx(values.mean().item(), rel=1e-5)
    assert test.error == pytest.approx(values.std().item() / math.sqrt(6), rel=1e-5)
    assert records["uniform noise".join(["E(x) of ", ""])].count == 50
    area = np.dot(test.series["density"], np.diff(test.series["edges"]))
    assert area == pytest.approx(1)


def test_metrics_leave_no_trace(small_run):
    model = small_run.model()[0].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = advebm.load_data("digits")
    Accuracy()(Subject(model, data, data.val, Attack()), torch.Generator())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_features_that_are_not_numbers_are_refused():
    with pytest.raises(UserError, match="finite"):
        Moments.of(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(Moments.of(torch.ones(1, 2)), Moments.of(torch.ones(3, 2)))
    with pytest.raises(UserError, match="of one dimension"):
        frechet_distance(Moments.of(torch.ones(3, 3)), Moments.of(torch.ones(3, 2)))
