"""What samples are worth after each number of steps: against samplers that stop there, and distances by hand."""

import dataclasses
import time
from itertools import pairwise

import pytest
import torch

from advebm.core.errors import UserError
from advebm.data.negatives import NoiseImages
from advebm.data.sources import Data, Digits, Images
from advebm.metrics.base import Features
from advebm.metrics.distances import Moments, frechet_distance, kernel_pairs, kernel_sum, unbiased_mmd
from advebm.samplers.classifier import CS
from advebm.samplers.critic import Ascent
from advebm.sampling.step_curve import STEPS, Chains, CurvePoint, first_reaching
from tests.helpers import Plain

PIXELS = Features("pixels", lambda x: x.flatten(1))
CENTRE = torch.linspace(0.2, 0.8, 16)


@pytest.fixture
def bowl():
    """A critic with f = -‖x - c‖², of images whose splits differ in brightness."""
    draw = torch.Generator().manual_seed(0)

    def images(level, count):
        x = (level + 30 * torch.randn(count, 1, 4, 4, generator=draw)).clamp(0, 255).to(torch.uint8)
        return Images(x, torch.arange(count) % 2)

    inside = Data("in", ("a", "b"), images(120, 60), images(140, 50), images(128, 40))
    outside = Data("out", ("c",), images(40, 60), images(60, 50), images(200, 40))
    return Plain(lambda x: -(x.flatten(1) - CENTRE).square().sum(1, keepdim=True)), inside, outside


def test_points_are_those_of_samplers_that_stop_there(bowl):
    model, inside, outside = bowl
    chains, sampler = Chains(count=40, steps=(0, 1, 3, 6)), Ascent(steps=99, step_size=0.1)
    seen = chains._draw(model, sampler, inside, outside)
    begin = seen[0][0]
    assert {x.numpy().tobytes() for x in begin} <= {x.numpy().tobytes() for x in outside.test.x}
    points = chains(model, sampler, inside, PIXELS, outside=outside)
    assert [p.steps for p in points] == [0, 1, 3, 6]
    real = inside.train.float().flatten(1)
    for point in points:
        stopped = dataclasses.replace(sampler, steps=point.steps)
        x = stopped(model, torch.full((40,), -1), begin.float() / 255)
        assert (x * 255 - seen[point.steps][0]).abs().max() <= 0.51
        fake = seen[point.steps][0].float().flatten(1) / 255
        assert point.fd == pytest.approx(frechet_distance(Moments.of(fake), Moments.of(real)), rel=1e-6)
        kid = unbiased_mmd(40, kernel_pairs(fake), len(real), kernel_pairs(real), kernel_sum(fake, real))
        assert point.kid == pytest.approx(kid, rel=1e-5, abs=1e-7)
    assert all(a.fd > b.fd for a, b in pairwise(points)), "the data lie around the centre"


def test_chains_ask_for_every_class_and_may_have_noise(bowl):
    """The noise of a step is that of a sampler that goes on; classes in random order, all of them."""
    digits = Digits().load()
    model = Plain(lambda x: x.flatten(1)[:, 20:30] * 5)
    chains = Chains(count=30, steps=(0, 2, 4), seed=3)
    sampler = CS(noise=0.05, start="noise", step_size=0.2)
    one, two = (chains._draw(model, sampler, digits, None) for _ in range(2))
    assert all(torch.equal(one[k][0], two[k][0]) for k in one)
    other = dataclasses.replace(chains, seed=4)._draw(model, sampler, digits, None)
    assert not torch.equal(one[4][0], other[4][0])
    lit = one[4][0].flatten(1)[:, 20:30].float() - one[0][0].flatten(1)[:, 20:30].float()
    assert lit.argmax(1).unique().numel() == 10


def test_looking_takes_no_time(bowl, monkeypatch):
    """Only what lies between two looks counts, of all chunks, by image."""
    model, inside, outside = bowl
    monkeypatch.setattr("advebm.sampling.generate.CHUNK", 10)
    now = [0.0]

    def tick(x):
        now[0] += 1.0
        return model(x)

    real_round = torch.Tensor.round

    def slow_round(x):
        now[0] += 100.0
        return real_round(x)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.Tensor, "round", slow_round)
    points = Chains(count=20, steps=(0, 1, 4))(Plain(tick), Ascent(), inside, PIXELS, outside=outside)
    assert [p.seconds for p in points] == [0.0, 2 / 20, 8 / 20]


def test_first_reaching_a_level():
    points = [
        CurvePoint(1, 9.0, 0.5, 0.1),
        CurvePoint(2, 4.0, 0.2, 0.2),
        CurvePoint(4, 3.0, 0.3, 0.4),
        CurvePoint(8, 5.0, 0.2, 0.8),
    ]
    assert first_reaching(points, 4.0) == points[1]
    assert first_reaching(points, 3.5) == points[2]
    assert first_reaching(points, 2.0) is None


def test_bad_chains_are_refused(bowl):
    for options in ({"count": 1}, {"steps": ()}, {"steps": (3, 2)}, {"steps": (1, 1)}, {"steps": (-1, 2)}):
        with pytest.raises(UserError, match="count must be at least 2, and steps are rising numbers"):
            Chains(**options)
    model, inside, _ = bowl
    with pytest.raises(UserError, match="there are none; set start to"):
        Chains()(model, Ascent(), inside, PIXELS)
    with pytest.raises(UserError, match="the outside images are"):
        Chains()(model, Ascent(), inside, PIXELS, outside=NoiseImages().load())
    assert list(STEPS) == sorted(STEPS)
