import pytest
import torch
from sklearn.datasets import load_digits

import advebm
from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.augment import Augment
from advebm.data.loader import Loader
from advebm.data.sources import Digits, Images


@pytest.fixture(scope="module")
def digits():
    return advebm.load_data("digits")


def test_digits_are_the_real_ones_within_rounding(digits):
    pixels, labels = load_digits(return_X_y=True)
    original = {tuple(p.astype(int)): y for p, y in zip(pixels, labels, strict=True)}
    everything = [digits.train, digits.val, digits.test]
    assert sum(map(len, everything)) == 1797
    for split in everything:
        levels = (split.float() * 16).round().long().flatten(1)
        assert (split.float().flatten(1) * 16 - levels).abs().max() < 16 * 0.5 / 255 + 1e-6
        assert all(original[tuple(row)] == y for row, y in zip(levels.tolist(), split.y.tolist(), strict=True))


def test_splits_are_disjoint_in_proportion_and_fixed(digits):
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1258, 180, 359)
    for split, share in ((digits.train, 0.7), (digits.val, 0.1), (digits.test, 0.2)):
        counts, whole = split.y.bincount(), 1797 / 10
        assert ((counts - share * whole).abs() < 4).all()
    again, other = advebm.load_data("digits"), advebm.load_data("digits", split_seed=1)
    assert torch.equal(again.test.x, digits.test.x)
    assert not torch.equal(other.test.x, digits.test.x)


def test_statistics_are_those_of_the_training_split(digits):
    mean, std = digits.statistics()
    x = digits.train.float().double()
    assert mean == (pytest.approx(x.mean().item(), abs=1e-4),)
    assert std == (pytest.approx(x.std(correction=0).item(), abs=1e-4),)


def test_bad_splits_are_refused():
    with pytest.raises(UserError, match="leave some for training"):
        Digits(val=0.5, test=0.5)
    with pytest.raises(UserError):
        advebm.load_data("digits", val=0)
    with pytest.raises(UserError, match="did you mean 'digits'"):
        advebm.load_data("digit")


def loader(count=100, batch=32, streams=1, seed=0):
    x = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Loader(Images(x, torch.arange(count)), seed, batch, streams, (Augment(),))


def read(load, seen, stream=0):
    return load(seen, stream, torch.Generator())[1].tolist()


def test_every_epoch_shows_every_image_once_in_another_order():
    load = loader()
    order = [y for seen in range(0, 320, 32) for y in read(load, seen)]
    epochs = [order[i : i + 100] for i in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_images_seen_alone():
    a, b = loader(), loader()
    forwards = [read(a, seen) for seen in (0, 32, 64, 96)]
    backwards = [read(b, seen) for seen in (96, 64, 32, 0)]
    assert forwards == backwards[::-1]
    assert read(loader(seed=1), 0) != forwards[0]


def test_streams_share_the_batch_that_one_stream_would_read():
    whole, parts = loader(), loader(streams=4)
    assert [y for s in range(4) for y in read(parts, 96, s)] == read(whole, 96)


def test_images_and_labels_stay_together_and_are_scaled():
    (x,), y = loader()(0, 0, torch.Generator())
    assert torch.equal((x * 255).round().flatten().long(), y)
    assert x.dtype == torch.float32


def test_crop_shifts_each_image_by_its_own_offset():
    x = torch.rand(200, 2, 5, 5) + 0.1
    out = Augment(crop=2)(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, [2] * 4)
    offsets = []
    for before, after in zip(padded, out, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(before[:, i : i + 5, j : j + 5], after)]
        assert len(fits) == 1
        offsets += fits
    assert len(set(offsets)) == 25


def test_flip_mirrors_half_of_the_images():
    x = torch.rand(1000, 1, 2, 3)
    out = Augment(flip=True)(x, torch.Generator().manual_seed(0))
    same, mirrored = ((out == v).flatten(1).all(1) for v in (x, x.flip(3)))
    assert (same | mirrored).all()
    assert abs(mirrored.float().mean().item() - 0.5) < 4 * 0.5 / 1000**0.5


def test_augmentation_is_drawn_from_the_generator():
    x = torch.rand(20, 1, 5, 5)
    draw = lambda seed: Augment(crop=1, flip=True)(x, rng.generator(seed))
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(Augment()(x, torch.Generator()), x)
    with pytest.raises(UserError):
        Augment(crop=-1)


def test_alternating_flips_show_both_sides_in_turn():
    """In two epochs each image comes from either side, half of them mirrored in the first one."""
    count, ramp = 64, torch.arange(8, dtype=torch.uint8).expand(64, 1, 8, 8).contiguous()
    images = Images(ramp, torch.arange(count))
    load = Loader(images, seed=0, batch=16, streams=1, augment=(Augment(flip=True, alternate=True),))
    sides = [{}, {}, {}]
    for seen in range(0, 3 * count, 16):
        (x,), y = load(seen, 0, rng.generator(seen))
        sides[seen // count] |= dict(zip(y.tolist(), (x[:, 0, 0, 0] > 0).tolist(), strict=True))
    assert all(sides[0][k] != sides[1][k] == (not sides[2][k]) for k in range(count))
    assert 20 <= sum(sides[0].values()) <= 44
    batches = [load(seen, 0, rng.generator(9))[0][0] for seen in (count + 8, count + 8)]  # across no state
    assert torch.equal(*batches)
