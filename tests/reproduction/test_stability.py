"""Binary AT beside maximum likelihood, Binary-AT section 5.3."""

import dataclasses
import json

import pytest

from advebm.objectives.binary import BinaryAT, BinaryMLE
from advebm.reproduction.binary import GAP, LOSS, STABILITY, binary_at_stability, conclude_stability, stability_records
from advebm.reproduction.experiment import carry_out
from advebm.runs.run import Run


def test_only_loss_and_clipping_differ(tmp_path):
    recipes = binary_at_stability(tmp_path, [("train.images", 1280)]).recipes
    assert recipes.keys() == STABILITY.keys()
    for label, recipe in recipes.items():
        assert type(recipe.objective) is (BinaryMLE if "likelihood" in label else BinaryAT)
        assert recipe.objective.r1 == 0
        assert recipe.train.clip == (1.0 if "clipped" in label else None)
        assert (recipe.train.images, recipe.train.rollbacks) == (1280, 0)
    plain = [
        {k: v for k, v in dataclasses.asdict(r).items() if k != "train"} | {"clip": None} for r in recipes.values()
    ]
    assert plain[0] == plain[2]
    assert plain[1] == plain[3]


def test_records_hold_the_widest_gap_and_the_lowest_loss(tmp_path):
    rows = [(400, 0.5, -0.25, 0.7), (800, 3.0, -2.0, -5.0), (1200, 2.0, 1.0, -1.0)]
    lines = [
        {"images": i, "train/energy_negative": n, "train/energy_data": d, "train/loss": loss} for i, n, d, loss in rows
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gap, loss = stability_records(Run(tmp_path))
    assert (gap["name"], gap["value"]) == (GAP, 5.0)
    assert gap["series"] == {"images": [400, 800, 1200], "gap": [0.75, 5.0, 1.0]}
    assert (loss["name"], loss["value"]) == (LOSS, -5.0)


@pytest.mark.slow
def test_from_training_to_a_conclusion(tmp_path):
    """In 2,400 images the energies of maximum likelihood come many times further apart than those of binary AT."""
    experiment = binary_at_stability(tmp_path, [("train.images", 2_400), ("train.validate_every", 100_000)])
    results, _ = carry_out(experiment, tmp_path, 1)
    gap = {label: next(r["value"] for r in records if r["name"] == GAP) for label, records in results.items()}
    assert gap["maximum likelihood"] > 10 * gap["binary-at"] > 0
    (sentence,) = conclude_stability(results)
    assert f"{gap['binary-at']:.3g} nats in binary AT and {gap['maximum likelihood']:.3g} in maximum" in sentence
    assert list(experiment.figures(results)) == ["How far the energies of negatives and data come apart"]
