import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn

from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.data.sources import Data, Images
from advebm.metrics.base import Subject
from advebm.metrics.calibration import Calibration, Reliability, brier, fit_temperature, negative_log_likelihood
from advebm.metrics.distances import jackknife
from advebm.reporting import figures


def honest(count, generator, classes=5):
    """Logits, and labels drawn from their own probabilities."""
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def test_labels_drawn_from_the_models_probabilities_are_calibrated(generator):
    logits, y = honest(20_000, generator)
    assert Reliability.of(logits, y, 15).expected_error() < 0.01
    assert Reliability.of(3 * logits, y, 15).expected_error() > 0.1
    t, error = fit_temperature(logits, y)
    assert abs(t - 1) < 4 * error
    assert error < 0.02


def test_three_times_the_logits_have_three_times_the_temperature(generator):
    logits, y = honest(2_000, generator)
    assert fit_temperature(3 * logits, y) == pytest.approx([3 * v for v in fit_temperature(logits, y)], rel=1e-9)
    grid = np.linspace(2, 4, 801)
    losses = [torch.nn.functional.cross_entropy(3 * logits / t, y).item() for t in grid]
    assert fit_temperature(3 * logits, y)[0] == pytest.approx(grid[np.argmin(losses)], abs=0.003)


def test_the_error_of_the_temperature_is_a_jackknifes(generator):
    """Also where the model is wrong by more than a temperature: images of large logits have labels that are noise."""
    logits, y = honest(300, generator)
    logits[:30], y[:30] = 5 * logits[:30], torch.randint(5, (30,), generator=generator)
    error = jackknife(lambda kept: fit_temperature(logits[list(kept)], y[list(kept)])[0], 300)
    assert fit_temperature(logits, y)[1] == pytest.approx(error, rel=0.05)


def test_there_may_be_no_best_temperature(subject, generator):
    logits, y = torch.eye(4, dtype=torch.float64).repeat(3, 1), torch.arange(4).repeat(3)
    with pytest.raises(UserError, match="these 12 images: every image is classified correctly"):
        fit_temperature(logits, y)
    with pytest.raises(UserError, match="logits are on average not above"):
        fit_temperature(logits, (y + 1) % 4)
    val = subject.data.val
    easy = val.take(Pixels(1.0)(val.float()).argmax(1) == val.y)
    subject = subject._replace(data=subject.data._replace(val=easy))
    with pytest.warns(UserWarning, match="without temperature scaling: no finite temperature is optimal"):
        records = Calibration()(subject, generator)
    assert [r.name for r in records] == ["ECE", "MCE", "NLL", "Brier score"]


def brute_force(logits, y, bins):
    """ECE and MCE by loops over bins and images."""
    p = torch.tensor(logits).softmax(1).numpy()
    gaps, weights = [], []
    for m in range(bins):
        inside = [i for i in range(len(y)) if m / bins < p[i].max() <= (m + 1) / bins]
        if inside:
            right = np.mean([p[i].argmax() == y[i] for i in inside])
            gaps.append(abs(right - np.mean([p[i].max() for i in inside])))
            weights.append(len(inside) / len(y))
    return np.dot(gaps, weights), max(gaps)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_errors_agree_with_loops(bins, generator):
    logits, y = honest(200, generator)
    r = Reliability.of(2 * logits, y, bins)
    expected, largest = brute_force((2 * logits).numpy(), y.numpy(), bins)
    assert (r.expected_error(), r.maximum_error()) == pytest.approx((expected, largest), abs=1e-12)
    parts = [Reliability.of(2 * a, b, bins) for a, b in zip(logits.split(33), y.split(33), strict=True)]
    total = sum(parts[1:], parts[0])
    assert total.expected_error() == pytest.approx(r.expected_error(), abs=1e-12)
    s = r.series()
    assert sum(s["share"]) == pytest.approx(1)
    assert all(low < c <= low + 1 / bins for low, c in zip(s["lower"], s["confidence"], strict=True))
    assert np.dot(s["share"], s["accuracy"]) == pytest.approx((logits.argmax(1) == y).double().mean().item())


def test_a_confidence_between_two_bins_belongs_to_the_lower(generator):
    r = Reliability.of(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 0, 1]), 2)
    assert r.count.tolist() == [3, 0]
    assert r.expected_error() == pytest.approx(2 / 3 - 1 / 2)


def test_proper_scores_by_definition(generator):
    logits, y = honest(50, generator)
    p = logits.softmax(1)
    assert negative_log_likelihood(logits, y).mean().item() == pytest.approx(log_loss(y, p, labels=range(5)))
    by_hand = (p - torch.nn.functional.one_hot(y, 5)).square().sum(1)
    torch.testing.assert_close(brier(logits, y), by_hand)
    assert brier(torch.tensor([[0.0, 1e3]]), torch.tensor([0])).item() == 2


class Pixels(nn.Module):
    """Logits that are the pixels, times a factor."""

    def __init__(self, factor, outputs=5):
        super().__init__()
        self.factor, self.outputs = factor, outputs

    def forward(self, x):
        return self.factor * x.flatten(1)[:, : self.outputs] * 4


@pytest.fixture
def subject(generator):
    """A model whose logits are three times too large on the validation split, as on the test split."""

    def split(count):
        x = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
        p = Pixels(1.0)(x / 255).softmax(1)
        return Images(x, torch.multinomial(p, 1, generator=generator).squeeze(1))

    data = Data("drawn", tuple("abcde"), split(5), split(3000), split(2000))
    return Subject(Pixels(3.0), data, data.test, Attack(), batch=700)


def test_the_temperature_comes_from_the_validation_split(subject, generator):
    records = {r.name: r for r in Calibration()(subject, generator)}
    t = records["temperature"]
    assert t.value == pytest.approx(
        fit_temperature(Pixels(3.0)(subject.data.val.float()), subject.data.val.y)[0], rel=1e-6
    )
    assert abs(t.value - 3) < 4 * t.error
    assert t.count == 3000
    for name in ("ECE", "MCE", "NLL", "Brier score"):
        before, after = records[name], records[f"{name} after temperature scaling"]
        assert after.value < before.value
        assert after.settings["temperature"] == t.value
        assert min(before.error, after.error) > 0
        assert before.count == 2000
    assert records["ECE after temperature scaling"].value < 0.03
    shares = [records[name].series for name in ("ECE", "ECE after temperature scaling")]
    assert len({round(np.dot(s["share"], s["accuracy"]), 9) for s in shares}) == 1  # predictions stay
    picture = figures.reliability([dataclasses.asdict(r) for r in records.values()])
    assert picture.startswith(b"\x89PNG")


def test_the_error_of_ece_is_about_its_spread(generator):
    """Where the model is clearly off, so that ECE is a mean gap rather than noise."""
    found = []
    for _ in range(40):
        logits, y = honest(400, generator)
        (ece, *_) = Calibration()._records(3 * logits, y, "", {})
        found.append((ece.value, ece.error))
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.4)


def test_what_cannot_be_calibrated_is_refused(subject, generator):
    with pytest.raises(UserError, match="bins must be at least 1"):
        Calibration(bins=0)
    with pytest.raises(UserError, match="needs a classifier"):
        Calibration()(subject._replace(model=Pixels(1.0, outputs=1)), generator)
    bare = Images(subject.split.x, torch.full((2000,), -1))
    with pytest.raises(UserError, match="calibration needs labels, drawn has none"):
        Calibration()(subject._replace(split=bare), generator)
    with pytest.raises(UserError, match="NaN"):
        Calibration()(subject._replace(model=Pixels(math.nan)), generator)
