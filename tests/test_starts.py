import math

import pytest
import torch
from torch.nn.functional import interpolate

from advebm import starts
from advebm.core import rng
from advebm.core.errors import UserError
from advebm.data.sources import Data, Images
from advebm.samplers.classifier import CS
from advebm.starts import ClassGaussians, CompactGaussians, Gaussian, ReplayBuffer, UniformBall, clean, cosines, noise


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


def test_cosines_are_orthonormal_and_those_of_scipy(generator):
    from scipy.fft import dctn

    x = torch.rand(2, 3, 5, 8, dtype=torch.float64, generator=generator)
    expected = torch.from_numpy(dctn(x.numpy(), axes=(1, 2, 3), norm="ortho"))
    torch.testing.assert_close(cosines(x), expected)
    torch.testing.assert_close(cosines(cosines(x), inverse=True), x)


def correlated(count, shape, generator, centre=0.5, spread=0.02):
    """Images with a covariance of full rank that no frequency decorrelates, far from the clamp."""
    size = math.prod(shape)
    mix = torch.randn(size, size, generator=generator).cumsum(0) / size
    return centre + spread * (torch.randn(count, size, generator=generator) @ mix).view(count, *shape)


def check_moments(x, mean, covariance, tolerance):
    """Moments of draws within 4.5 standard errors, and ``tolerance`` for rounding, of what they should be."""
    x, (mean, covariance) = x.flatten(1).double(), (mean.flatten().double(), covariance.double())
    error = (covariance.diagonal()[:, None] * covariance.diagonal() + covariance**2).sqrt() / math.sqrt(len(x))
    off = (torch.cov(x.T) - covariance).abs()
    assert (off < 4.5 * error + tolerance * covariance.diagonal().max()).all()
    assert ((x.mean(0) - mean).abs() < 4.5 * (covariance.diagonal() / len(x)).sqrt() + 0.51 / 255).all()


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_compact_gaussians_are_the_exact_ones_where_nothing_is_left_out(generator, shrinkage):
    """Of small images all frequencies have covariances: what remains is rounding to 8 bits."""
    x = correlated(400, (2, 3, 4), generator)
    draw = draws(CompactGaussians.fit(x).start(by_class=False, shrinkage=shrinkage), x[:1], 40_000)
    exact = torch.cov(x.flatten(1).double().T)
    expected = (1 - shrinkage) * exact + shrinkage * exact.diagonal().mean() * torch.eye(24)
    check_moments(draw, x.mean(0), expected, tolerance=0.02)


def reduced(x, frequencies):
    """The covariance of ``x`` in float64, of whose cosines only those of ``frequencies`` keep covariances."""
    size = x[0].numel()
    basis = cosines(torch.eye(size, dtype=torch.float64).view(size, *x.shape[1:])).flatten(1)
    covariance = torch.cov((x.double().flatten(1) @ basis).T)
    kept = torch.diag(covariance.diagonal())
    kept[torch.meshgrid(frequencies, frequencies, indexing="ij")] = covariance[frequencies][:, frequencies]
    return basis @ kept @ basis.T


@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_frequencies_that_vary_less_keep_their_variances_alone(generator, monkeypatch, shrinkage):
    monkeypatch.setattr(starts, "COVARIANCE_BYTES", 6)
    x = correlated(400, (1, 4, 6), generator)
    compact = CompactGaussians.fit(x)
    assert compact.roots.shape == (1, 6)
    most = cosines(x).flatten(1).var(0).argsort(descending=True)[:3]
    assert set(compact.frequencies.tolist()) == set(most.tolist())
    draw = draws(compact.start(by_class=False, shrinkage=shrinkage), x[:1], 40_000)
    kept = reduced(x, most)
    expected = (1 - shrinkage) * kept + shrinkage * kept.diagonal().mean() * torch.eye(24)
    check_moments(draw, x.mean(0), expected, tolerance=0.02)


def test_a_coarse_spectrum_keeps_the_sum_of_the_variances(generator, monkeypatch):
    """Each block of it is a mean over the frequencies that have no covariance."""
    monkeypatch.setattr(starts, "COVARIANCE_BYTES", 6)
    monkeypatch.setattr(starts, "SPECTRUM_EDGE", 2)
    x = correlated(400, (1, 4, 6), generator)
    compact = CompactGaussians.fit(x)
    assert compact.spectra.shape == (1, 1, 2, 2)
    drawn = draws(compact.start(by_class=False, shrinkage=0.0), x[:1], 40_000)
    assert drawn.var(0).sum().item() == pytest.approx(x.var(0).sum().item(), rel=0.03)


@pytest.mark.parametrize("kept", [9, 3])
def test_one_gaussian_for_all_is_that_of_the_mixture(generator, monkeypatch, kept):
    """Means and covariances of classes of different sizes give the moments of all images."""
    monkeypatch.setattr(starts, "COVARIANCE_BYTES", kept * (kept + 1))
    a = correlated(300, (1, 3, 3), generator, 0.4)
    b = correlated(100, (1, 3, 3), generator, 0.6, 0.03)
    b[:, :, 1] -= 0.15  # their means differ in frequencies that vary little, too
    x, y = torch.cat([a, b]), torch.cat([torch.zeros(300), torch.ones(100)]).long()
    compact = CompactGaussians.fit(x, y, classes=2)
    assert compact.shares.tolist() == [0.75, 0.25]
    assert compact.roots.shape == (2, kept * (kept + 1) // 2)
    drawn = draws(compact.start(by_class=False, shrinkage=0.0), x[:1], 40_000)
    check_moments(drawn, x.mean(0), reduced(x, compact.frequencies), tolerance=0.02)
    classes = compact.start(by_class=True, shrinkage=0.0)
    few = classes(torch.empty(4, 1, 3, 3), torch.tensor([0, 1, 0, 1]), generator)
    assert (few[:, 0, 0].mean(1) > 0.5).tolist() == [False, True, False, True]
    with pytest.raises(UserError, match="classes 0 to 1 have seeds, got 2"):
        classes(torch.empty(1, 1, 3, 3), torch.tensor([2]), generator)


def test_classes_of_fewer_images_than_frequencies(generator):
    """Their covariances have no inverse; the draws have them all the same."""
    x = correlated(5, (1, 3, 4), generator)
    drawn = draws(CompactGaussians.fit(x).start(by_class=False, shrinkage=0.0), x[:1], 40_000)
    check_moments(drawn, x.mean(0), torch.cov(x.flatten(1).double().T), tolerance=0.02)


def test_compact_gaussians_of_large_images_stay_small(generator):
    """Nothing of the size of an image but its mean, and that at most 64 pixels wide."""
    x = (255 * torch.rand(6, 3, 80, 100, generator=generator)).to(torch.uint8)
    compact = CompactGaussians.fit(x, torch.arange(6) % 2, classes=2)
    sizes = {name: tuple(value.shape[-2:]) for name, value in vars(compact).items() if value.ndim > 3}
    assert sizes == {"means": (64, 64), "spectra": (32, 32)}
    drawn = compact.start(by_class=True)(torch.empty(4, 3, 80, 100), torch.tensor([0, 1, 1, 0]), generator)
    assert drawn.shape == (4, 3, 80, 100)
    assert 0 <= drawn.min() < drawn.max() <= 1
    assert drawn.var().item() == pytest.approx((x / 255).var().item(), rel=0.25)


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


def test_low_resolution_seeds_have_the_moments_of_the_averaged_images(generator):
    """Enlarging is linear, so mean and covariance of seeds are those of the enlarged averages; nothing is clamped."""
    y = torch.arange(400) % 2
    x = (0.3 + 0.3 * y.view(-1, 1, 1, 1) + 0.02 * torch.randn(400, 1, 8, 12, generator=generator)).clamp(0, 1)
    small = starts.shrink(x, 3)
    assert small.shape == (400, 1, 2, 3)
    torch.testing.assert_close(small, x.view(400, 1, 2, 4, 3, 4).mean((3, 5)))
    data = Data("x", ("a", "b"), *(Images(x, y) for _ in range(3)))
    start = CS(fit_size=3, shrinkage=0.0).prepare(data)
    seeds = start(torch.empty(4000, 1, 8, 12), torch.ones(4000, dtype=torch.long), generator)
    assert seeds.shape == (4000, 1, 8, 12)
    large = interpolate(small[y == 1], size=(8, 12), mode="bilinear")
    torch.testing.assert_close(seeds.mean(0), large.mean(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(seeds.flatten(1).T.cov(), large.flatten(1).T.cov(), rtol=0.2, atol=1e-5)


def test_shrinking_keeps_bytes_and_leaves_small_images(generator):
    x = torch.randint(256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8)
    small = starts.shrink(x, 4)
    assert small.dtype == torch.uint8
    assert (small.float() - x.float().view(5, 3, 4, 4, 4, 4).mean((3, 5))).abs().max() <= 0.501
    assert starts.shrink(x, 16) is x
