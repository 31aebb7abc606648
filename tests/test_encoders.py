"""Samplers of encoders, probes and nearest neighbours."""

import pytest
import torch

import advebm
from advebm import config, energies, generation
from advebm.descent import value_and_gradient
from advebm.errors import UserError
from advebm.samplers import NPPGD, MaxEnt, NPLangevin
from tests.references import encoders as reference


@pytest.fixture(scope="module")
def digits():
    return advebm.load_data("digits")


@pytest.fixture
def bank(generator):
    return torch.rand(9, 3, 8, 8, dtype=torch.float64, generator=generator)


def gradient(energy, x):
    return value_and_gradient(energy, x)[1]


# What is descended ----------------------------------------------------------------------------------------------------

STEPS = {"steps": 4, "step_size": 0.2}


def test_langevin_agrees_with_the_paper_re_derived(net, batch, bank):
    ours = NPLangevin(**STEPS, noise=0.0, tau=0.3)(net, batch.y, batch.x, bank=bank)
    theirs = reference.np_langevin(net.eval(), batch.x, net(bank).detach(), 0.3, 0.2, 4)
    torch.testing.assert_close(ours, theirs)


def test_pgd_agrees_with_the_paper_re_derived(net, batch, bank):
    ours = NPPGD(**STEPS, tau=0.3)(net, batch.y, batch.x, bank=bank)
    theirs = reference.np_pgd(net.eval(), batch.x, net(bank).detach(), 0.3, 0.2, 4)
    torch.testing.assert_close(ours, theirs)


def test_maxent_agrees_with_a_brute_force_entropy(net, batch):
    ours = MaxEnt(**STEPS, noise=0.0, tau=0.3)(net, batch.y, batch.x)
    torch.testing.assert_close(ours, reference.maxent(net.eval(), batch.x, 0.3, 0.2, 4))


def test_pgd_is_langevin_minus_the_pull_to_the_anchor(net, batch, bank):
    """CEM eq. 11 beside eq. 10: the same negatives, and a push off g of the seed."""
    net.eval()
    moved = (batch.x + 0.05).clamp(0, 1)  # at the seed itself the pull to the anchor is 0
    negatives = net(bank).detach()[None]
    begun = lambda sampler: gradient(sampler.begun(net, batch.y, batch.x, negatives), moved)
    pull = gradient(lambda x: energies.similarity(net(x), net(batch.x).detach(), temperature=0.5), moved)
    torch.testing.assert_close(begun(NPPGD()), begun(NPLangevin()) - pull)
    assert pull.norm() > 0.1 * begun(NPLangevin()).norm()


def test_maxent_is_minus_the_gradient_of_the_similarity_over_the_batch(net, batch):
    """H = -1/N Σ_i log Σ_{j≠i} exp f(x_i, x_j) + constant: the energy falls where the entropy rises, N times as fast."""
    net.eval()
    downhill = -gradient(MaxEnt().begun(net, batch.y, batch.x, None), batch.x)
    x = batch.x.clone().requires_grad_()
    (uphill,) = torch.autograd.grad(reference.entropy(net(x), 0.5), x)
    torch.testing.assert_close(downhill, len(x) * uphill)


def test_maxent_and_langevin_on_the_batch_are_of_opposite_sign(net, batch):
    """The two readings of one row of CEM's tables: together or apart; Langevin holds the others fixed."""
    net.eval()
    apart, together = MaxEnt(), NPLangevin(negatives="batch")
    z = net(batch.x).detach()
    pull = gradient(together.begun(net, batch.y, batch.x, None), batch.x)
    own = gradient(lambda x: energies.crowding(net(x), z), batch.x)
    torch.testing.assert_close(pull, -own)
    both = gradient(apart.begun(net, batch.y, batch.x, None), batch.x)
    assert torch.cosine_similarity(pull.flatten(1), both.flatten(1)).max() < -0.5

    def alike(sampler):
        x = sampler(net, batch.y, batch.x, generator=torch.Generator().manual_seed(0))
        return energies.crowding(net(x)).mean().item()

    begin = energies.crowding(net(batch.x)).mean().item()
    settings = {"steps": 10, "step_size": 0.2, "noise": 0.0}
    assert alike(MaxEnt(**settings)) < begin - 0.1
    assert alike(NPLangevin(negatives="batch", **settings)) > begin + 0.1


@pytest.mark.parametrize("sampler", [NPLangevin(), NPPGD(), MaxEnt()], ids=lambda s: type(s).__name__)
def test_the_plain_product_is_not_the_cosine(net, batch, bank, sampler):
    net.eval()
    options = config.describe(sampler)
    plain = config.build({**options, "cosine": False, "tau": 2.0}, "sampler")
    z, negatives = net(batch.x).detach(), net(bank).detach()
    found = gradient(plain.begun(net, batch.y, batch.x * 0.9, negatives[None]), batch.x)
    alike = z @ (z if sampler == MaxEnt() else negatives).T / 2
    value = alike.fill_diagonal_(-torch.inf).logsumexp(1) if sampler == MaxEnt() else -alike.logsumexp(1)
    if isinstance(sampler, NPPGD):
        value = value + (z * net(batch.x * 0.9)).sum(1) / 2
    torch.testing.assert_close(plain.begun(net, batch.y, batch.x * 0.9, negatives[None])(batch.x), value)
    assert not torch.allclose(found, gradient(sampler.begun(net, batch.y, batch.x * 0.9, negatives[None]), batch.x))


# Negatives ------------------------------------------------------------------------------------------------------------


def test_a_bank_is_always_the_same_images(digits):
    first, again = (NPLangevin(count=40).bank(digits) for _ in range(2))
    assert torch.equal(first, again)
    known = {image.numpy().tobytes() for image in digits.train.x}
    assert len({image.numpy().tobytes() for image in first} & known) == 40
    assert torch.equal(NPPGD(negatives="data").bank(digits), digits.train.x)
    assert NPPGD(negatives="batch").bank(digits) is None
    assert MaxEnt().bank(digits) is None


def test_features_of_negatives(net, batch, bank):
    net.eval()
    contrast = lambda sampler, **o: sampler.contrast(net, bank, batch.x, torch.Generator().manual_seed(0), **o)
    fixed = contrast(NPLangevin(steps=3, count=9), batch=4)
    torch.testing.assert_close(fixed, net(bank).detach()[None])
    fresh = contrast(NPLangevin(steps=3, count=5, negatives="data"), batch=9)
    assert fresh.shape == (3, 5, 5)
    assert not fresh.requires_grad
    rows = torch.cdist(fresh, net(bank).detach()).argmin(2)
    assert all(len(set(step.tolist())) == 5 for step in rows)  # no image twice in a step
    assert len({tuple(sorted(step.tolist())) for step in rows}) == 3
    assert contrast(NPLangevin(negatives="batch"), batch=4) is None


def test_bytes_are_read_as_images(net, batch, bank):
    rounded = (bank * 255).round().to(torch.uint8)
    of = lambda images: NPLangevin(count=9).contrast(net.eval(), images, batch.x, None, 9)
    torch.testing.assert_close(of(rounded), of(rounded.double() / 255), rtol=1e-6, atol=1e-6)


def test_each_step_takes_its_own_negatives(net, batch, bank):
    """Two steps against sets that were drawn for them are two samplers of one step, one after the other."""
    net.eval()
    sets = net(bank).detach().split([4, 5])
    sampler = NPLangevin(steps=2, step_size=0.1, noise=0.0)
    sets = torch.stack([sets[0], sets[1][:4]])
    found = sampler.descent()(sampler.begun(net, batch.y, batch.x, sets), batch.x)
    x = batch.x
    for negatives in sets:
        x = reference.np_langevin(net, x, negatives, 0.5, 0.1, 1)
    torch.testing.assert_close(found, x)


# Labels, groups, batches ----------------------------------------------------------------------------------------------

EVERY = [
    NPLangevin(steps=3, step_size=0.1, count=9),
    NPLangevin(steps=3, step_size=0.1, count=4, negatives="data"),
    NPLangevin(steps=3, step_size=0.1, negatives="batch", group=3),
    NPPGD(steps=3, step_size=0.1, count=9),
    NPPGD(steps=3, step_size=0.1, negatives="batch", group=3),
    MaxEnt(steps=3, step_size=0.1, group=3),
]
names = lambda s: f"{type(s).__name__}-{getattr(s, 'negatives', '')}"


@pytest.mark.parametrize("sampler", EVERY, ids=names)
def test_labels_never_enter(net, batch, bank, sampler):
    draw = lambda y: sampler(net, y, batch.x, bank=bank, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(batch.y), draw(torch.full((6,), -1)))
    assert not sampler.conditional


def test_class_seeds_are_what_makes_it_conditional(digits):
    y = torch.arange(10).repeat_interleave(50)
    means = torch.stack([digits.train.float()[digits.train.y == k].mean(0) for k in range(10)])
    share = {}
    for start in ("class", "global"):
        sampler = NPLangevin(start=start)
        asked = generation.wanted(sampler, digits, 50)
        assert (asked >= 0).all() == (start == "class")
        x = sampler.prepare(digits)(torch.empty(500, 1, 8, 8), asked, torch.Generator().manual_seed(0))
        share[start] = (torch.cdist(x.flatten(1), means.flatten(1)).argmin(1) == y).float().mean().item()
    assert share["class"] > 0.9
    assert share["global"] < 0.2
    assert NPLangevin().start == NPPGD().start == MaxEnt().start == "global"


@pytest.mark.parametrize("sampler", EVERY, ids=names)
@pytest.mark.parametrize("size", [3, 4, 6])
def test_the_compute_batch_changes_rounding_only(net, batch, bank, sampler, size):
    options = {"bank": bank[: 9 if sampler.negatives == "data" else sampler.count]} if hasattr(sampler, "count") else {}
    draw = lambda **o: sampler(net, batch.y, batch.x, generator=torch.Generator().manual_seed(1), **options, **o)
    torch.testing.assert_close(draw(batch=size), draw(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [s for s in EVERY if s.coupled], ids=names)
def test_samples_interact_within_their_group_only(net, batch, sampler):
    """Groups are dealt as cards are: of six samples in groups of three, 0, 2 and 4 are one."""
    draw = lambda x: sampler(net, batch.y, x, generator=torch.Generator().manual_seed(1))
    other = batch.x.clone()
    other[2] = other[2].flip(-1)
    moved = (draw(batch.x) - draw(other)).flatten(1).abs().amax(1) > 1e-9
    assert moved.tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize(
    ("count", "group", "sizes"),
    [(500, 100, [100] * 5), (110, 100, [55, 55]), (7, 3, [3, 2, 2]), (3, 2, [3]), (5, 2, [3, 2]), (2, 100, [2])],
)
def test_groups_are_of_equal_size_and_never_of_one(count, group, sizes):
    parts = MaxEnt(group=group).parts(count, None)
    assert [len(range(count)[part]) for part in parts] == sizes
    assert sorted(i for part in parts for i in range(count)[part]) == list(range(count))


@pytest.mark.parametrize("sampler", [NPPGD(steps=2, count=50), MaxEnt(steps=2, group=50)], ids=names)
def test_chunks_do_not_depend_on_who_draws_what(digits, sampler):
    body, width = advebm.load_recipe("digits-at").backbone.build(1, 8)
    encoder = torch.nn.Sequential(body, torch.nn.Linear(width, 16))
    y = torch.arange(10).repeat_interleave(60)
    whole = generation.generate(encoder, sampler, digits, y, seed=3).x
    options = {"shape": digits.shape, "seed": 3, "bank": sampler.bank(digits)}
    quick = generation.quickly(encoder, digits, len(y), "auto")
    pieces = [generation.chunk(encoder, sampler, sampler.prepare(digits), y, n, quick=quick, **options) for n in (1, 0)]
    assert torch.equal(torch.cat(pieces[::-1]), whole)


def test_a_film_of_samples_that_interact(digits):
    body, width = advebm.load_recipe("digits-at").backbone.build(1, 8)
    encoder = torch.nn.Sequential(body, torch.nn.Linear(width, 16))
    frames, steps = generation.film(encoder, MaxEnt(steps=2, start="class"), digits, classes=(3,))
    assert (frames.shape, steps) == ((2, 3, 1, 8, 8), [0, 1, 2])  # two chains, since one alone has nothing to leave
    assert generation.film(encoder, NPPGD(steps=1), digits, classes=(3,))[0].shape == (1, 2, 1, 8, 8)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(net, batch, digits):
    too_many = "NPPGD takes 2000 negatives from the training images, digits has 1257; lower --sampler.count"
    cases = {
        too_many: lambda: NPPGD(count=2000).bank(digits),
        "NPLangevin contrasts samples with images": lambda: NPLangevin()(net, batch.y, batch.x),
        "interact in groups of at least 2, got group 1": lambda: MaxEnt(group=1),
        "tau is > 0, got 0": lambda: MaxEnt(tau=0.0),
        "count is at least 1, got 0": lambda: NPPGD(count=0),
        "samples of MaxEnt interact, and one is left alone": lambda: MaxEnt()(net, batch.y[:1], batch.x[:1]),
        "one is left alone; draw another number": lambda: generation.generate(net, MaxEnt(), digits, torch.zeros(501)),
        "interact in groups of 6, and batch 5 holds no group": lambda: MaxEnt()(net, batch.y, batch.x, batch=5),
        "no option 'negatives'": lambda: config.build({"kind": "maxent", "negatives": "data"}, "sampler"),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()
