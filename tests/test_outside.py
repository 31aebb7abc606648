"""Classifiers trained with outside data, against independent re-derivations on one small network in float64."""

import math

import pytest
import torch

from advebm import seeds
from advebm.errors import UserError
from advebm.metrics import ood
from advebm.objectives.curriculum import Curriculum, auroc

# The curriculum -------------------------------------------------------------------------------------------------------


def climb(curriculum, readings, level=None, first=0):
    """The steps after each batch of 100 images, told the AUROC of each."""
    level = level or curriculum.init()
    steps = []
    for i, reading in enumerate(readings, first):
        curriculum.after(level, torch.tensor(reading), 100 * i)
        steps.append(level.steps)
    return steps, level


def test_steps_grow_when_a_window_is_told_apart():
    curriculum = Curriculum(start=1, steps=3, gate=0.8, window=200)
    assert climb(curriculum, [0.9, 0.9, 0.9])[0] == [1, 1, 2]  # a window is full at the batch that begins at its end
    assert climb(curriculum, [0.9, 0.9, 0.5, 0.9, 0.9])[0] == [1, 1, 1, 1, 2]  # the second has its own mean
    assert climb(curriculum, [0.8] * 12)[0][-1] == 3, "reaching the gate is enough, and K stays at its largest"
    assert climb(curriculum, [0.79] * 12)[0][-1] == 1
    assert climb(Curriculum(start=2, steps=2), [1.0] * 30)[0] == [2] * 30
    assert climb(curriculum, [math.nan] * 12)[0][-1] == 1


def test_steps_grow_in_time():
    late = Curriculum(steps=3, gate=1.0, window=10_000, images_per_step=300)
    assert climb(late, [0.1] * 12)[0] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    both = Curriculum(steps=9, gate=0.8, window=200, images_per_step=300)
    steps, level = climb(both, [0.9] * 3 + [0.1] * 4)
    assert steps == [0, 0, 1, 1, 1, 2, 2], "counted from when the steps last grew"
    assert (level.since, level.opened) == (500, 500)


def test_a_level_goes_on_from_a_checkpoint():
    curriculum, readings = Curriculum(steps=5, gate=0.8, window=300), [0.9, 0.2, 0.7, 0.95, 0.9, 0.7, 0.9, 0.9]
    whole, _ = climb(curriculum, readings)
    for cut in range(1, len(readings)):
        first, level = climb(curriculum, readings[:cut])
        restored = curriculum.init()
        restored.load_state_dict(level.state_dict())
        rest, _ = climb(curriculum, readings[cut:], restored, cut)
        assert first + rest == whole
    assert whole[-1] == 1


def test_auroc_is_that_of_the_metric():
    draw = seeds.generator(0)
    inside, outside = torch.randint(9, (40,), generator=draw).double(), torch.randint(4, 14, (30,), generator=draw)
    value = auroc(inside, outside.double())
    assert value.item() == pytest.approx(ood.auroc(inside, outside).value, abs=1e-12)
    assert value > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 30}, "starts with 0 to 25 steps"),
        ({"start": -1}, "starts with 0 to 25 steps"),
        ({"gate": 0.0}, r"gate is an AUROC in \(0, 1\]"),
        ({"gate": 80.0}, r"gate is an AUROC in \(0, 1\], got 80"),
        ({"window": 0}, "window is at least 1"),
        ({"images_per_step": -1}, "images_per_step at least 0, got 1000 and -1"),
    ],
)
def test_bad_curricula_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Curriculum(**options)
