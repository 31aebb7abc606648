"""The likelihood's gradient over adversarial training, CEM section 3."""

import math

import pytest
import torch

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.diagnostics.cem_gradient import draw_langevin_negatives, split_likelihood_gradient
from advebm.reproduction.experiment import carry_out
from advebm.reproduction.supervised import cem_gradients, conclude_gradients


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    options = [("train.images", 512), ("train.checkpoint_every", 256), ("backbone.width", 8)]
    experiment = cem_gradients(folder, options)
    return experiment, *carry_out(experiment, folder, 1)


def test_shorter_runs_are_the_beginnings_of_the_longest(carried_out):
    _, _, (whole, half, quarter) = carried_out
    assert [run.recipe.train.images for run in (whole, half, quarter)] == [512, 256, 128]
    at_half, _ = whole.model("256")
    for name, value in half.model()[0].state_dict().items():
        assert torch.equal(value, at_half.state_dict()[name]), name
    assert all(not run.recipe.train.ema and run.recipe.backbone.norm == "group" for run in (whole, half, quarter))


def test_records_hold_the_parts(carried_out):
    _, results, runs = carried_out
    for run, records in zip(runs, results.values(), strict=True):
        assert {r["settings"]["training images"] for r in records} == {run.recipe.train.images}
        value = {r["name"]: r["value"] for r in records}
        assert value["cosine of contrastive with AT, PGD"] == pytest.approx(1)
        long, short, cosine = (
            value[f"{q}, PGD"] for q in ("norm of consistency", "norm of contrastive", "cosine of both")
        )
        whole = math.sqrt(long**2 + short**2 + 2 * long * short * cosine)
        assert value["cosine of sum with AT, PGD"] == pytest.approx((short + long * cosine) / whole, abs=1e-4)

        model, batch = run.model()[0], run.data.train.take(slice(512))
        langevin = draw_langevin_negatives(
            model, batch.float(), steps=7, step_size=8e-4, generator=rng.generator("cem-gradients", "Langevin")
        )
        gradient = split_likelihood_gradient(model, batch.float(), batch.y, langevin)
        assert value["norm of consistency, Langevin"] == pytest.approx(gradient.consistency.norm().item())
        assert value["norm of contrastive, Langevin"] == pytest.approx(gradient.contrastive.norm().item())
        dot = (gradient.consistency @ gradient.contrastive) / gradient.consistency.norm() / gradient.contrastive.norm()
        assert value["cosine of both, Langevin"] == pytest.approx(dot.item(), abs=1e-5)


def test_curves_and_conclusion_show_the_records(carried_out, monkeypatch):
    experiment, results, _ = carried_out
    plotted = []
    monkeypatch.setattr(
        "advebm.reporting.figures.lines", lambda groups, x, y, **options: plotted.append((groups, x, options)) or b""
    )
    assert len(experiment.figures(results)) == 3
    (norms, x, options), (cosines, *_), (updates, *_) = plotted
    assert (x, options) == ("training images", {"log": True})
    assert norms.keys() == {f"{part}, {n}" for part in ("consistency", "contrastive") for n in ("PGD", "Langevin")}
    value = {label: {r["name"]: r["value"] for r in records} for label, records in results.items()}
    labels = {512: "at", 256: "at@256", 128: "at@128"}
    for curves, prefix in ((norms, "norm of "), (cosines, "cosine of both, "), (updates, "cosine of sum with AT, ")):
        for name, points in curves.items():
            assert points == {images: (value[label][prefix + name], 0.0) for images, label in labels.items()}
    (sentence,) = conclude_gradients(results)
    end = value["at"]
    assert f"{end['norm of consistency, PGD']:.3g} and {end['norm of contrastive, PGD']:.3g} with PGD" in sentence
    assert f"(cosine {end['cosine of both, Langevin']:.2f})" in sentence
    assert f"{end['cosine of sum with AT, PGD']:.2f} and {end['cosine of sum with AT, Langevin']:.2f} with" in sentence


def test_other_objectives_are_refused(tmp_path):
    with pytest.raises(UserError, match="objective at, got TRADES; leave out --objective"):
        cem_gradients(tmp_path, [("objective", "trades")])
