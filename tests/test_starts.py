import math

import pytest
import torch

from advebm.core import rng
from advebm.core.errors import UserError
from advebm.starts import ClassGaussians, Gaussian, ReplayBuffer, UniformBall, clean, noise


def draws(start, x, count=4000):
    return start(x.expand(count, *x.shape[1:]), torch.zeros(count, dtype=torch.long), torch.Generator().manual_seed(1))


def test_uniform_in_the_linf_ball():
    x = torch.full((1, 1, 2, 2), 0.5)
    offset = draws(UniformBall(0.1, "linf"), x) - x
    assert offset.abs().max() <= 0.1
    assert offset.var().item() == pytest.approx(0.2**2 / 12, rel=0.05)
    assert abs(offset.mean().item()) < 4 * 0.2 / math.sqrt(12 * offset.numel())


def test_uniform_in_the_l2_ball_by_volume():
    """P(‖δ‖ <= r) = (r / eps)^d for d = 4."""
    x = torch.full((1, 1, 2, 2), 0.5)
    offset = draws(UniformBall(0.4, "l2"), x) - x
    length = offset.flatten(1).norm(dim=1)
    assert length.max() <= 0.4
    for r in (0.2, 0.3):
        share, p = (length <= r).float().mean().item(), (r / 0.4) ** 4
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / len(length))
    assert offset.mean(0).abs().max() < 0.02


def test_other_starts(generator):
    x = torch.rand(500, 1, 2, 2, generator=generator)
    assert clean(x, None, None) is x
    assert (Gaussian(0.1)(x, None, generator) - x).std().item() == pytest.approx(0.1, rel=0.1)
    uniform = noise(x, None, generator)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_gaussian_seeds_have_the_mean_and_the_shrunk_covariance(shrinkage):
    """Few images (20) in 9 dimensions, far from the clamp: moments of 40,000 draws within 4.5 standard errors."""
    g = torch.Generator().manual_seed(3)
    images = 0.5 + 0.02 * torch.randn(20, 1, 3, 3, generator=g) @ torch.randn(3, 3, generator=g)
    start = ClassGaussians.fit(images, shrinkage=shrinkage)
    x = draws(start, images[:1], 40_000).flatten(1).double()
    flat = images.flatten(1).double()
    sample = torch.cov(flat.T)
    expected = (1 - shrinkage) * sample + shrinkage * sample.diagonal().mean() * torch.eye(9)
    error = (expected.diagonal()[:, None] * expected.diagonal() + expected**2).sqrt() / math.sqrt(len(x))
    assert ((torch.cov(x.T) - expected).abs() < 4.5 * error + 1e-9).all()
    mean_error = (expected.diagonal() / len(x)).sqrt()
    assert ((x.mean(0) - flat.mean(0)).abs() < 4.5 * mean_error).all()


def test_gaussian_seeds_know_their_class(generator):
    x = torch.cat([torch.full((5, 1, 2, 2), 0.2), torch.full((5, 1, 2, 2), 0.8)])
    x = x + 0.01 * torch.randn(x.shape, generator=generator)
    start = ClassGaussians.fit(x, torch.arange(10) // 5, classes=2)
    y = torch.tensor([1, 0, 1])
    seeds_drawn = start(torch.empty(3, 1, 2, 2), y, generator)
    assert [round(v, 1) for v in seeds_drawn.mean((1, 2, 3)).tolist()] == [0.8, 0.2, 0.8]
    with pytest.raises(UserError, match="classes 0 to 1 have seeds, got 2"):
        start(torch.empty(1, 1, 2, 2), torch.tensor([2]), generator)


def test_gaussian_seeds_stay_in_the_box_and_work_at_32_pixels(generator):
    x = torch.rand(30, 3, 32, 32, generator=generator)
    start = ClassGaussians.fit(x, torch.arange(30) % 3, classes=3)
    drawn = start(torch.empty(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), generator)
    assert drawn.shape == (4, 3, 32, 32)
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_a_class_without_images_is_named():
    with pytest.raises(UserError, match="class 1 has 1 images"):
        ClassGaussians.fit(torch.rand(4, 1, 2, 2), torch.tensor([0, 0, 0, 1]), classes=2)
    with pytest.raises(UserError, match="shrinkage"):
        ClassGaussians.fit(torch.rand(4, 1, 2, 2), shrinkage=2)


def test_replay_buffer_draws_distinct_slots_and_restarts_a_share(generator):
    buffer = ReplayBuffer(torch.full((2000, 1, 2, 2), 2.0))
    slots, x = buffer.draw(1000, 0.3, generator)
    assert len(slots.unique()) == 1000
    fresh = (x < 1).flatten(1).all(1)
    assert abs(fresh.float().mean().item() - 0.3) < 4 * math.sqrt(0.21 / 1000)
    assert (x[~fresh] == 2).all()
    assert (buffer.chains == 2).all()  # drawing changes nothing
    buffer.put(slots[:1], torch.zeros(1, 1, 2, 2))
    assert (buffer.chains[slots[0]] == 0).all()
    assert (buffer.chains == 0).sum() == 4


def test_replay_buffer_resumes(generator):
    a = ReplayBuffer.uniform(8, (1, 2, 2), generator)
    b = ReplayBuffer.uniform(8, (1, 2, 2), torch.Generator().manual_seed(9))
    assert not torch.equal(a.chains, b.chains)
    b.load_state_dict(a.state_dict())
    first, second = (buffer.draw(4, 0.5, torch.Generator().manual_seed(3)) for buffer in (a, b))
    torch.testing.assert_close(first, second)
    with pytest.raises(UserError, match="was the buffer's size changed"):
        ReplayBuffer.uniform(9, (1, 2, 2), generator).load_state_dict(a.state_dict())
    with pytest.raises(UserError, match="enlarge the buffer"):
        a.draw(9, 0.0, generator)


def test_seeds_depend_on_every_key_and_its_type():
    keys = [(0, "a"), (0, "b"), (1, "a"), ("0", "a"), (0, "a", 0), (0, 0), (0,)]
    assert len({rng.derive_seed(*key) for key in keys}) == len(keys)
    assert rng.derive_seed(0, "a") == rng.derive_seed(0, "a")
    assert torch.equal(
        rng.randn(torch.empty(3), rng.generator(1, "x")), rng.randn(torch.empty(3), rng.generator(1, "x"))
    )
