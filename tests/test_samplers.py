import pytest
import torch

import advebm
from advebm import energies, generation
from advebm.descent import value_and_gradient
from advebm.errors import UserError
from advebm.samplers import CS, TA, Sampler
from tests.references import attacks as reference


@pytest.fixture(scope="module")
def digits():
    return advebm.load_data("digits")


@pytest.mark.parametrize("method", [TA, CS])
def test_agrees_with_the_paper_re_derived(net, batch, method):
    sampler = method(steps=5, step_size=0.2)
    ours = sampler(net, batch.y, batch.x)
    theirs = reference.sample(net.eval(), batch.x, batch.y, 0.2, 5, subtract_marginal=method is TA)
    torch.testing.assert_close(ours, theirs)


def test_ta_is_cs_minus_the_pull_of_the_marginal(net, batch):
    """∇E(y|x) = ∇E(x, y) - ∇E(x): the bias that CS drops."""
    net.eval()
    gradient = lambda energy: value_and_gradient(energy, batch.x)[1]
    ta, cs = (gradient(sampler.energy(net, batch.y)) for sampler in (TA(), CS()))
    pull = gradient(lambda x: energies.marginal(net(x)))
    torch.testing.assert_close(ta, cs - pull)
    assert pull.norm() > 0.1 * cs.norm()


@pytest.mark.parametrize(
    "sampler", [TA(steps=10, step_size=0.1), CS(steps=10, step_size=0.1)], ids=lambda s: type(s).__name__
)
def test_samples_are_what_was_asked_for(net, batch, sampler):
    found = sampler(net, batch.y, batch.x)
    net.eval()
    assert (energies.joint(net(found), batch.y) < energies.joint(net(batch.x), batch.y)).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_ball_noise_and_direction_are_used(net, batch):
    base = CS(steps=5, step_size=0.5)
    free = base(net, batch.y, batch.x)
    held = CS(steps=5, step_size=0.5, radius=0.3)(net, batch.y, batch.x)
    assert (held - batch.x).flatten(1).norm(dim=1).max() <= 0.3 + 1e-9
    assert (free - batch.x).flatten(1).norm(dim=1).min() > 0.3
    noisy = CS(steps=1, step_size=1e-9, noise=0.01)(net, batch.y, batch.x, generator=torch.Generator().manual_seed(0))
    inside = (batch.x > 0.05) & (batch.x < 0.95)
    assert (noisy - batch.x)[inside].std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.allclose(CS(steps=5, direction="raw")(net, batch.y, batch.x), CS(steps=5)(net, batch.y, batch.x))


def test_sampling_leaves_no_trace(net, batch):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    CS(steps=3)(net, batch.y, batch.x)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_global_seeds_carry_no_class_and_class_seeds_do(digits):
    y = torch.arange(10).repeat_interleave(50)
    like = torch.empty(len(y), 1, 8, 8)
    means = torch.stack([digits.train.float()[digits.train.y == k].mean(0) for k in range(10)])

    def nearest(start):
        x = CS(start=start).prepare(digits)(like, y, torch.Generator().manual_seed(0))
        return (torch.cdist(x.flatten(1), means.flatten(1)).argmin(1) == y).float().mean().item()

    assert nearest("class") > 0.9
    assert nearest("global") < 0.2
    assert nearest("noise") < 0.2


def test_the_same_seed_gives_the_same_images_whatever_comes_after(net, digits):
    model = advebm.load_recipe("digits-at").backbone.build(1, 8)
    network = torch.nn.Sequential(model[0], torch.nn.Linear(model[1], 10))
    y = torch.arange(10).repeat(60)
    sampler = CS(steps=2, noise=0.01)
    all_of_them = generation.generate(network, sampler, digits, y, seed=3).x
    first_chunk = generation.generate(network, sampler, digits, y[: generation.CHUNK], seed=3).x
    assert torch.equal(all_of_them[: generation.CHUNK], first_chunk)
    assert not torch.equal(generation.generate(network, sampler, digits, y[:10], seed=4).x, all_of_them[:10])
    last = all_of_them[generation.CHUNK :]
    assert not torch.equal(generation.generate(network, sampler, digits, y[generation.CHUNK :], seed=3).x, last)


def test_a_film_begins_at_the_seed_and_ends_at_the_sample(digits):
    model = advebm.load_recipe("digits-at").backbone.build(1, 8)
    network = torch.nn.Sequential(model[0], torch.nn.Linear(model[1], 10))
    frames, steps = generation.film(network, CS(steps=6), digits, frames=4)
    assert steps == [0, 2, 4, 6]
    assert frames.shape == (10, 4, 1, 8, 8)
    still, _ = generation.film(network, CS(steps=0), digits)
    assert torch.equal(frames[:, 0], still[:, 0])
    again = CS(steps=2)(network, torch.arange(10), frames[:, 0])
    torch.testing.assert_close(again, frames[:, 1])


@pytest.mark.parametrize("options", [{"steps": -1}, {"step_size": 0}, {"noise": -1}, {"radius": 0}])
def test_bad_samplers_are_refused(options):
    with pytest.raises(UserError):
        CS(**options)


def test_the_base_class_has_no_energy(net, batch):
    with pytest.raises(NotImplementedError):
        Sampler()(net, batch.y, batch.x)
