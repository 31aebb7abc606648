"""Samplers of encoders, probes and nearest neighbours."""

import dataclasses
import io

import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import advebm
from advebm import energies, recipes
from advebm.attacks.projected import Attack
from advebm.cli import main
from advebm.core import config, files
from advebm.core.errors import UserError
from advebm.data.sources import Images
from advebm.descent import unit, value_and_gradient
from advebm.metrics.base import SampleSet, Subject
from advebm.metrics.probing import LinearProbe, NearestNeighbours, Probe, representations
from advebm.metrics.robustness import RobustAccuracy
from advebm.models.modes import DualBatchNorm2d, using
from advebm.reporting import figures
from advebm.reproduction import unsupervised
from advebm.runs.find_model import find_model
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.samplers.encoder import NPPGD, MaxEnt, NPLangevin
from advebm.sampling import generate
from advebm.training.loop import train
from advebm.web.server import open_studios
from advebm.workflows import probe
from tests.helpers import few_samples, linked
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
    moved = batch.view  # at the seed itself the pull to the anchor is 0
    negatives = net(bank).detach()[None]
    begun = lambda sampler: gradient(sampler.begun(net, batch.y, batch.x, negatives), moved)
    pull = gradient(lambda x: energies.similarity(net(x), net(batch.x).detach(), temperature=0.5), moved)
    torch.testing.assert_close(begun(NPPGD()), begun(NPLangevin()) - pull)
    assert pull.norm() > 0.1 * begun(NPLangevin()).norm()


def test_maxent_is_minus_the_gradient_of_the_similarity_over_the_batch(net, batch):
    """H = -1/N Σ_i log Σ_{j≠i} exp f(x_i, x_j) + constant: energy falls where entropy rises, N times as fast."""
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
    x = batch.x.clone().requires_grad_()
    others = [[z[j] for j in range(len(z)) if j != i] for i in range(len(z))]
    lines = zip(net(x), others, strict=True)
    values = [reference.log_sum_exp([reference.alike(own, other, 0.5) for other in held]) for own, held in lines]
    torch.testing.assert_close(pull, -torch.autograd.grad(sum(values), x)[0])
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


# What the recipe decides ----------------------------------------------------------------------------------------------


def test_a_sampler_compares_as_its_encoder_was_trained():
    """Whatever names the objective's temperature later, and whatever kind of sampler; unless it is given."""
    options = [("objective.temperature", "0.07"), ("objective.cosine", "false")]
    tau = lambda recipe: (recipe.sampler.tau, recipe.sampler.cosine)
    plain = recipes.find("digits-infonce")
    recipe = resolve(plain, options)
    assert tau(resolve(plain)) == (0.2, True)
    assert (tau(resolve(recipes.find("digits-acl"))), tau(resolve(recipes.find("cifar10-acl")))) == (
        (0.2, True),
        (0.5, True),
    )
    assert tau(recipe) == (0.07, False)
    whole = config.describe(resolve(plain))
    assert tau(resolve(whole, options)) == (0.07, False)
    assert tau(resolve(whole, [("metrics", ["knn"]), ("metrics.0.k", 3), *options])) == (0.07, False)
    assert tau(resolve(config.describe(recipe), [("sampler", "np-pgd")])) == (0.07, False)
    assert tau(resolve(plain, [*options, ("sampler.tau", "0.3"), ("sampler.cosine", "true")])) == (0.3, True)
    given = config.describe(resolve(plain, [("sampler.tau", "0.3")]))
    assert resolve(given, options).sampler.tau == 0.3
    assert resolve(recipes.find("digits-at")).sampler == resolve(recipes.find("digits-at")).sampler.trained_by(None)
    stage = {"name": "first", "objective": {"temperature": 0.1}}
    staged = resolve({**plain, "before": [stage]}, options)
    assert (tau(staged), tau(staged.before[0])) == ((0.07, False), (0.1, False))


def test_without_a_recipe_samplers_compare_directions_at_acls_temperature(net, batch):
    draw = lambda **settings: MaxEnt(**STEPS, noise=0.0, **settings)(net, batch.y, batch.x)
    assert torch.equal(draw(), draw(tau=0.5, cosine=True))
    assert not torch.equal(draw(), draw(tau=0.1))


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
        asked = generate.classes_to_draw(sampler, digits, 50)
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
    whole = generate.generate(encoder, sampler, digits, y, seed=3).x
    options = {"shape": digits.shape, "seed": 3, "bank": sampler.bank(digits)}
    view = generate.sampling_view(encoder, digits, len(y), "auto")
    pieces = [
        generate.draw_chunk(encoder, sampler, sampler.prepare(digits), y, n, view=view, **options) for n in (1, 0)
    ]
    assert torch.equal(torch.cat(pieces[::-1]), whole)


def test_a_film_of_samples_that_interact(digits):
    body, width = advebm.load_recipe("digits-at").backbone.build(1, 8)
    encoder = torch.nn.Sequential(body, torch.nn.Linear(width, 16))
    frames, steps = generate.draw_trajectory(encoder, MaxEnt(steps=2, start="class"), digits, classes=(3,))
    assert (frames.shape, steps) == ((2, 3, 1, 8, 8), [0, 1, 2])  # two chains, since one alone has nothing to leave
    assert generate.draw_trajectory(encoder, NPPGD(steps=1), digits, classes=(3,))[0].shape == (1, 2, 1, 8, 8)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(net, batch, digits):
    too_many = r"NPPGD takes 2000 negatives from the training images, digits has \d+; lower --sampler.count"
    cases = {
        too_many: lambda: NPPGD(count=2000).bank(digits),
        "NPLangevin contrasts samples with images": lambda: NPLangevin()(net, batch.y, batch.x),
        "interact in groups of at least 2, got group 1": lambda: MaxEnt(group=1),
        "tau must be > 0, got 0": lambda: MaxEnt(tau=0.0),
        "count must be at least 1, got 0": lambda: NPPGD(count=0),
        "samples of MaxEnt interact, and one is left alone": lambda: MaxEnt()(net, batch.y[:1], batch.x[:1]),
        "one is left alone; draw another number": lambda: generate.generate(net, MaxEnt(), digits, torch.zeros(501)),
        "interact in groups of 6, and batch 5 holds no group": lambda: MaxEnt()(net, batch.y, batch.x, batch=5),
        "no option 'negatives'": lambda: config.build({"kind": "maxent", "negatives": "data"}, "sampler"),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()


# Probes and neighbours ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short, real training of an encoder with dual batch norms."""
    options = {"backbone.width": 8, "train.images": 2_560, "train.validate_every": 2_560, "objective.attack.steps": 1}
    options |= {
        "threat.steps": 2,
        "threat.eps": 0.9,
        "sampler.steps": 2,
        "objective.hidden": 32,
        "objective.outputs": 64,
    }
    recipe = resolve(recipes.find("digits-acl"), list(options.items()))
    return train(recipe, tmp_path_factory.mktemp("runs") / "acl", device="cpu")


@pytest.fixture
def own(run, tmp_path):
    (tmp_path / "acl").mkdir()
    return linked(run, tmp_path / "acl")


@pytest.fixture(scope="module")
def features(run, digits):
    """Representations of training and test images, computed here."""
    model = run.model()[0]
    with torch.no_grad():
        return [model.backbone(model.normalise(split.float())) for split in (digits.train, digits.test)]


def subject(run, data, **changes):
    return Subject(run.model()[0], data, data.test, run.recipe.threat)._replace(**changes)


def test_representations_are_taken_before_the_projection(run, digits, features):
    model = run.model()[0]
    z = representations(model, digits.test.x, 100)
    torch.testing.assert_close(z, features[1])
    assert model(digits.test.float()[:5]).shape == (5, 64)
    torch.testing.assert_close(model.head(z[:5]), model(digits.test.float()[:5]))


def test_a_probe_scores_what_scikit_learn_scores(run, digits, features):
    (train_z, test_z), y = (z.double().numpy() for z in features), digits.train.y.numpy()
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(train_z, y)
    expected = peer.score(test_z, digits.test.y.numpy())
    clean, attacked = LinearProbe(Probe(c=0.1))(subject(run, digits), torch.Generator().manual_seed(0))
    assert clean.value == pytest.approx(expected, abs=1e-9)
    assert (clean.name, clean.count) == ("accuracy of a linear probe with C 0.1", len(digits.test))
    assert attacked.name == "accuracy of a linear probe with C 0.1 under PGD-2 l2 0.9"
    assert attacked.value < clean.value
    model = Probe(c=0.1).classifier(run.model()[0], digits.train, 10)
    logits = model(digits.test.float()).detach().double().numpy()
    ours, theirs = (v - v.mean(1, keepdims=True) for v in (logits, peer.decision_function(test_z)))
    assert abs(ours - theirs).max() < 1e-3


def test_a_probe_of_two_classes_has_both_logits(digits):
    z, y = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    z[:, 1] += 2 * y
    layer = Probe().fit(z, y, 2)
    peer = make_pipeline(StandardScaler(), LogisticRegression()).fit(z.double().numpy(), y.numpy())
    expected = torch.from_numpy(peer.predict_proba(z.double().numpy()))
    torch.testing.assert_close(layer(z).softmax(1).double(), expected, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="images of every class, and class 2 has none"):
        Probe().fit(z, y, 3)


def test_an_attack_on_a_probe_sees_through_the_network(run, digits):
    """The metric's number is that of the classifier that ``advebm probe`` writes."""
    model = Probe().classifier(run.model()[0], digits.train, 10)
    one = Attack(eps=0.9, norm="l2", steps=3)
    found = LinearProbe(attack=one)(subject(run, digits), torch.Generator().manual_seed(0))[1]
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**62, (), generator=generator)  # the seed of the clean verdict
    measured = RobustAccuracy(one)(subject(run, digits, model=model), generator)[0]
    assert found.value == measured.value
    x = digits.test.float()[:8].requires_grad_()
    assert torch.autograd.grad(model(x).sum(), x)[0].flatten(1).norm(dim=1).min() > 0


def test_neighbours_vote_as_in_a_brute_force_and_in_scikit_learn(run, digits, features):
    (record,) = NearestNeighbours(k=5)(subject(run, digits), torch.Generator())
    train_z, test_z = features
    peer = KNeighborsClassifier(5, metric="cosine", algorithm="brute").fit(train_z.numpy(), digits.train.y.numpy())
    assert record.value == pytest.approx(peer.score(test_z.numpy(), digits.test.y.numpy()), abs=1 / len(test_z))
    assert record.name == "accuracy of 5 nearest neighbours"
    few = digits._replace(train=digits.train.take(slice(60)), test=digits.test.take(slice(40)))
    voted = reference.nearest(train_z[:60], few.train.y, test_z[:40], 5)
    (record,) = NearestNeighbours(k=5)(subject(run, few), torch.Generator())
    assert record.value == pytest.approx((voted == few.test.y).double().mean().item())


def test_neighbours_and_probes_are_of_the_branch_that_is_asked_for(run, digits):
    """Records say of which, and of which C, so that a report keeps both."""
    few = digits._replace(train=digits.train.take(slice(60)), test=digits.test.take(slice(40)))
    model = run.model()[0]
    with torch.no_grad(), using(model, "adversarial"):
        near, z = (model.features(split.float()) for split in (few.train, few.test))
    (record,) = NearestNeighbours(5, "adversarial")(subject(run, few), torch.Generator())
    assert record.value == pytest.approx((reference.nearest(near, few.train.y, z, 5) == few.test.y).double().mean())
    looked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advebm.metrics.probing.representations", lambda m, x, b: looked.append(branches(m)) or ones(x))
        for branch in ("clean", "adversarial"):
            NearestNeighbours(5, branch)(subject(run, few), torch.Generator())
    assert looked == [{"clean"}] * 2 + [{"adversarial"}] * 2
    assert record.name == "accuracy of 5 nearest neighbours on the adversarial branch"
    assert Probe(0.1, branch="adversarial").name == "a linear probe with C 0.1 on the adversarial branch"
    found = LinearProbe(Probe(0.1))(subject(run, digits), torch.Generator().manual_seed(0))
    assert found[0].name == "accuracy of a linear probe with C 0.1"
    with pytest.raises(UserError, match="branch is one of clean, adversarial"):
        NearestNeighbours(5, "dirty")


def branches(model):
    return {m.branch for m in model.modules() if isinstance(m, DualBatchNorm2d)}


def ones(x):
    return torch.ones(len(x), 3)


def test_the_branch_of_dual_batch_norms(run, digits):
    """Probes and samplers take the one that is asked for; a probe computes by it for good."""
    model, x = run.model()[0], digits.test.float()[:20]
    with torch.no_grad():
        features = {}
        for branch in ("clean", "adversarial"):
            with using(model, branch):
                features[branch] = model.features(x)
            probed = Probe(branch=branch).classifier(model, digits.train, 10)
            torch.testing.assert_close(probed.features(x), features[branch])
            with using(probed, "clean"):
                torch.testing.assert_close(probed.features(x), features[branch])
    assert not torch.allclose(features["clean"], features["adversarial"], atol=1e-4)
    draw = lambda branch=None: MaxEnt(steps=1, noise=0.0, branch=branch)(model, torch.zeros(20), x)
    with using(model, "adversarial"):
        asked = MaxEnt(steps=1, noise=0.0).begun(model.eval(), torch.zeros(20), x, None)
        expected = (x - 0.25 * unit(gradient(asked, x), {})).clamp(0, 1)
    torch.testing.assert_close(draw("adversarial"), expected)
    assert torch.equal(draw(), draw("adversarial"))
    assert not torch.allclose(draw("clean"), expected, atol=1e-4)


def test_samplers_take_the_branch_that_training_attacks():
    """The robust encoder of ACL is its adversarial branch; other objectives never train that one.

    Configurations of older runs name the clean one, which was the default, and keep it.
    """
    acl, infonce = recipes.find("digits-acl"), recipes.find("digits-infonce")
    branch = lambda plain, *options: resolve(plain, options).sampler.branch
    assert branch(acl) == branch(config.describe(resolve(acl)), ("sampler", "np-pgd")) == "adversarial"
    assert branch(infonce) == branch(infonce, ("objective", "adversarial-infonce")) == "clean"
    assert branch(infonce, ("objective", "acl")) == branch(acl, ("sampler.branch", "adversarial")) == "adversarial"
    assert branch(acl, ("sampler.branch", "clean")) == "clean"
    old = config.override(config.describe(resolve(acl)), "sampler.branch", "clean")
    assert branch(old) == branch(old, ("sampler", "np-langevin")) == "clean"
    with pytest.raises(UserError, match="branch is one of clean, adversarial, got 'robust'"):
        branch(acl, ("sampler.branch", "robust"))


def test_probing_leaves_no_trace(run, digits):
    model = run.model()[0].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    LinearProbe()(subject(run, digits, model=model), torch.Generator().manual_seed(0))
    assert model.training
    assert model.encoder
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# The command line -----------------------------------------------------------------------------------------------------


def cli(*words):
    return main([str(word) for word in (*words, "--device", "cpu")])


@few_samples
def test_a_probe_is_a_run_that_every_command_takes(own, tmp_path, capsys):
    assert cli("probe", own.folder, "--c", 0.1, "--threat.steps", 3) == 0
    out = capsys.readouterr().out
    probed = Run.open(own.folder.with_name("acl-probe"))
    assert str(probed.folder) in out
    assert "accuracy under PGD-3 l2 0.9" in out
    assert "accuracy of 20 nearest neighbours" in out
    assert {r["name"] for r in probed.records()} == {"accuracy", "accuracy under PGD-3 l2 0.9"}
    assert [r["name"] for r in own.records()] == ["accuracy of 20 nearest neighbours"]
    data, model = probed.recipe.data.load(), probed.model()[0]
    same = Probe(c=0.1).classifier(own.model()[0], data.train, 10)
    torch.testing.assert_close(model(data.test.float()), same(data.test.float()))
    assert not model.encoder
    assert find_model(own.folder / "probe")(data.test.float()[:2]).shape == (2, 10)
    assert probed.recipe.sampler.steps == 2
    assert cli("sample", probed.folder, "--per-class", 1) == 0
    assert cli("evaluate", probed.folder, "--metrics", "accuracy,sample-quality") == 0
    assert main(["export", str(probed.folder), str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"`{own.recipe.name}` (objective `acl`, {own.recipe.train.images:,} images, " in card
    assert "The head is a linear probe, fitted on the labels of the training images." in card
    assert "objective `standard`" not in card
    assert files.read_json(tmp_path / "exported" / "config.json")["probed"] == own.recipe.name
    assert cli("probe", own.folder) == 2
    assert "acl-probe is not empty; choose another --out" in " ".join(capsys.readouterr().err.split())


def test_a_probe_is_refused_before_anything_is_fitted(own, monkeypatch, capsys):
    """Nothing is written over, either."""
    (own.folder / "probe").mkdir()
    monkeypatch.setattr(Probe, "classifier", lambda *arguments: pytest.fail("fitted"))
    assert cli("probe", own.folder, "--threat.step", 3) == 2
    assert "no option --threat.step" in capsys.readouterr().err
    assert not list((own.folder / "probe").iterdir())
    assert not own.folder.with_name("acl-probe").exists()


def test_a_probe_computes_as_many_images_at_once_as_their_size_allows(own, tmp_path, monkeypatch):
    seen, classifier = [], Probe.classifier
    monkeypatch.setattr(probe, "batch_size_for", lambda shape, model: 123)
    monkeypatch.setattr(Probe, "classifier", lambda *a: seen.append(a[-1]) or classifier(*a))
    probe.probe(own, tmp_path / "probed", by=Probe(c=0.1))
    assert seen == [123]


def test_the_branch_is_that_of_the_neighbours_too(own):
    assert cli("probe", own.folder, "--branch", "adversarial", "--threat.steps", 1) == 0
    assert own.records()[0]["settings"]["metric"]["branch"] == "adversarial"


def test_an_encoder_is_measured_by_what_needs_no_logits(own, capsys):
    assert cli("evaluate", own.folder, "--metrics", "linear-probe,knn") == 0
    assert "accuracy of a linear probe" in capsys.readouterr().out
    assert cli("evaluate", own.folder, "--metrics", "accuracy") == 2
    assert "Accuracy reads logits, and the model is an encoder" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("method", ["np-langevin", "np-pgd", "maxent"])
def test_sets_do_not_depend_on_what_is_computed_at_once(own, method):
    sets = {}
    for name, options in {"whole": (), "batch": ("--batch", "250"), "small": ("--batch", "60")}.items():
        words = ("--per-class", 55, "--name", name, "--method", method, "--sampler.group", 50)
        assert cli("sample", own.folder, *words, "--sampler.noise", 0, *options) == 0
        sets[name] = generate.read_set(own.samples()[name]).x
    assert (sets["batch"] - sets["whole"]).abs().max() <= 1 / 255 + 1e-6
    assert (sets["small"] - sets["whole"]).abs().max() <= 1 / 255 + 1e-6
    if method == "maxent":  # each group is computed by itself in any case
        assert torch.equal(sets["batch"], sets["whole"])


@pytest.mark.slow
def test_processes_share_a_set_of_samples_that_interact(own):
    words = ("sample", own.folder, "--per-class", 51, "--sampler.start", "class", "--sampler.steps", 1)
    assert cli(*words, "--name", "one") == 0
    assert cli(*words, "--name", "two", "--processes", 2) == 0
    one, two = ((path / "images.npz").read_bytes() for path in own.samples().values())
    assert one == two


WRONG = {
    "supervised": (("--method", "ta"), "sampler TA draws from logits, and objective ACL trains an encoder"),
    "count": (("--method", "np-pgd", "--sampler.count", 5000), "NPPGD takes 5000 negatives from the training images"),
    "group": (("--sampler.group", 1), "interact in groups of at least 2"),
    "batch": (("--batch", 5), "interact in groups of 10, and batch 5 holds no group"),
    "alone": (
        ("--sampler.start", "class", "--classes", 3, "--per-class", 1),
        "samples of MaxEnt interact, and one is left alone",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_combinations_are_one_line(own, capsys, case):
    words, message = WRONG[case]
    assert cli("sample", own.folder, "--per-class", 1, "--method", "maxent", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not own.samples()


def test_encoders_are_neither_edited_nor_on_the_page(own, capsys):
    assert cli("edit", "translate", own.folder, "--class", 3, "--split", "test", "--count", 2) == 2
    assert "the model is an encoder, which has no logits" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=f"probe it first: advebm probe {own.folder}"):
        open_studios([own])


def test_a_classifier_is_no_encoder(small_run, tmp_path, capsys):
    assert cli("sample", linked(small_run, tmp_path).folder, "--method", "maxent") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "sampler MaxEnt draws from an encoder, and objective AT trains none; --sampler cs" in err


@few_samples
def test_tuning_and_diagnosing_an_encoder(own, capsys):
    few = ("--per-class", 2, "--step-size", 0.1, "--steps", "1,2")
    assert cli("tune-sampler", own.folder, "--method", "np-langevin", *few) == 0
    assert list((own.folder / "tuned").glob("*.json"))
    assert cli("diagnose", own.folder, "--what", "interpolation,neighbours", "--images", 20) == 0
    assert cli("diagnose", own.folder, "--what", "landscape") == 2
    assert "landscape looks at energies of logits, and encoders have none" in " ".join(capsys.readouterr().err.split())


def test_fine_tuning_begins_with_an_encoder(run, tmp_path):
    """Robust training from the encoder's weights: its projection stays behind, and a fresh linear head comes."""
    options = {
        "backbone": {"kind": "small-conv", "width": 8, "norm": "dual"},
        "train.images": 128,
        "init": str(run.folder),
    }
    options |= {"objective.attack.steps": 1, "threat.steps": 2, "optimizer.lr": 1e-9, "train.ema": 0}
    recipe = resolve(recipes.find("digits-at"), list(options.items()))
    with pytest.warns(UserWarning, match="another head than digits takes"):
        tuned = train(recipe, tmp_path / "tuned", device="cpu").model()[0]
    encoder = run.model()[0]
    assert isinstance(tuned.head, torch.nn.Linear)
    assert tuned.head.weight.shape == (10, encoder.head[0].in_features)
    weights = encoder.backbone.state_dict()
    for name, value in tuned.backbone.state_dict().items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=0)


def test_the_python_interface_draws_from_encoders(run, digits):
    model, y = run.model()[0], torch.zeros(3, dtype=torch.int64)
    for method in ("np-langevin", "np-pgd", "maxent"):
        assert advebm.sample(model, y, data=digits, method=method, steps=1).shape == (3, 1, 8, 8)
    with pytest.raises(UserError, match="maxent draws from an encoder, and the model is none"):
        advebm.sample(Probe().classifier(model, digits.train, 10), y, data=digits, method="maxent")
    with pytest.raises(UserError, match="the model is an encoder, which has no logits"):
        advebm.sample(model, y, data=digits, method="cs")
    records = advebm.evaluate(model, data=digits, threat=run.recipe.threat, metrics=[NearestNeighbours()])
    assert 0.5 < records[0].value <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Probe(c=0.0), "c must be > 0 and iterations at least 1"),
        (lambda: NearestNeighbours(k=0), "k must be at least 1, got 0"),
    ],
)
def test_bad_probes_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_cannot_be_probed_is_named(run, digits, small_run):
    few = digits._replace(train=digits.train.take(slice(15)))
    with pytest.raises(UserError, match="20 neighbours are asked of 15 training images; lower k"):
        NearestNeighbours()(subject(run, few), torch.Generator())
    bare = advebm.wrap(torch.nn.Flatten())
    with pytest.raises(UserError, match="reads the features before a network's head"):
        LinearProbe()(subject(run, digits, model=bare), torch.Generator().manual_seed(0))
    unlabelled = digits._replace(test=Images(digits.test.x, torch.full_like(digits.test.y, -1)))
    for metric in (LinearProbe(), NearestNeighbours()):
        with pytest.raises(UserError, match="needs labels"):
            metric(subject(run, unlabelled, split=unlabelled.test), torch.Generator())


# The experiment -------------------------------------------------------------------------------------------------------


def test_each_row_of_the_table_has_settings_of_its_own(run, tmp_path, monkeypatch):
    """Tuned on validation images, and the same beside it at a common number of steps; equal sets are drawn once."""
    (tmp_path / "acl").mkdir()
    own, drawn = linked(run, tmp_path / "acl"), {}
    steps = {"np-pgd": 4, "np-langevin": 2, "maxent": 16}

    def tune(run, sampler, features, count):
        assert (features, count) == ("judge", 60)
        best = dataclasses.replace(sampler, steps=steps[config.describe(sampler)["kind"]])
        return {"best": best, "common": dataclasses.replace(sampler, steps=16)}

    def draw(run, recipe, per_class, name):
        assert per_class == 4
        drawn[name] = (recipe.seed, recipe.sampler.steps, recipe.sampler.start)

    def measure(run, wanted, features):
        names = dict.fromkeys(key.samples for key in wanted)
        value = lambda name: drawn[name][1] + float(name[-1])
        return [{"name": "FD (x)", "value": value(n), "error": 9.0, "settings": {"samples": n}} for n in names]

    patches = {"tune": tune, "draw_if_missing": draw, "measure_missing": measure}
    for name, patch in patches.items():
        monkeypatch.setattr(unsupervised, name, patch)
    monkeypatch.setattr(unsupervised.compare, "space_name", lambda features: "x")
    monkeypatch.setattr(unsupervised, "cem_figure1", lambda runs: b"")
    monkeypatch.setattr(unsupervised.figure_store, "save_figure", lambda *a: None)
    monkeypatch.setitem(
        unsupervised.TABLE2, "acl", {"cond, no steps": ("maxent", "class"), **unsupervised.UNSUPERVISED}
    )
    found = unsupervised.compare_samplers({"acl": own}, "judge", samples=40, draws=2, trials=60)
    assert drawn["cond-langevin-0"] == (0, 2, "class")
    assert drawn["cond-langevin-1"] == (1, 2, "class")
    assert drawn["uncond-pgd-16-steps-1"] == (1, 16, "global")
    assert drawn["cond-no-steps-0"] == (0, 0, "class")
    assert "uncond-maxent-16-steps-0" not in drawn, "its own settings have that many steps"
    value = lambda row: [(r["value"], r["error"], r["seeds"]) for r in found[f"acl, {row}"]]
    assert value("cond, Langevin") == [(2.5, pytest.approx(0.5**0.5), 2)]
    assert value("uncond, MaxEnt") == value("uncond, MaxEnt, 16 steps") == [(16.5, pytest.approx(0.5**0.5), 2)]
    assert len(found) == 1 + 2 * 6


def test_it_says_which_sampler_wins_and_by_how_much(monkeypatch):
    fd = lambda value, error: [{"name": "FD (x)", "value": value, "error": error, "settings": {"space": "x"}}]
    accuracy = [{"name": "accuracy", "value": 1.0, "error": 0.0, "settings": {}}]
    results = {"at": accuracy, "at, cond, TA": fd(9.0, 0.3), "at, cond, CS": fd(7.0, 0.4), "at, cond, RCS": fd(12.0, 1)}
    results |= {"acl, uncond, PGD": fd(50.0, 0.0), "acl, uncond, MaxEnt": fd(40.5, 0.0)}
    results |= {"at, cond, no steps": fd(6.0, 0.0), "at, uncond, no steps": fd(80.0, 0.0)}
    lines = [
        "at, cond: CS (7.0) before TA by 2.0 ± 0.5 in FD; the baseline, no steps, has 6.0",
        "acl, uncond: MaxEnt (40.5) before PGD by 9.5 ± 0.0 in FD; the baseline, no steps, has 80.0",
    ]
    assert unsupervised.winners(results) == lines
    equal = {"at, cond, TA, 16 steps": fd(5.0, 0.3), "at, cond, CS, 16 steps": fd(7.0, 0.4)}
    sixteen = "at 16 steps, at, cond: TA (5.0) before CS by 2.0 ± 0.5 in FD; the baseline, no steps, has 6.0"
    assert unsupervised.winners(results | equal) == [*lines, sixteen]
    drawn = []
    monkeypatch.setattr(figures, "bars", lambda values, label: drawn.append(values) or b"")
    assert list(unsupervised.unsupervised_figures(results)) == [". ".join(lines)]
    assert drawn[0]["acl, uncond, PGD"] == (50.0, 0.0)


def test_figure_1_shows_seeds_and_every_sampler(run, small_run, tmp_path):
    """Three rows of panels below the seeds, all from what was drawn."""
    runs = {"at": small_run, "infonce": run, "acl": run}
    own = {}
    for title, trained in runs.items():
        (tmp_path / title).mkdir()
        own[title] = linked(trained, tmp_path / title)
        for row, (_, start) in unsupervised.TABLE2[title].items():
            x = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            y = torch.arange(10) if start == "class" else torch.full((10,), -1)
            about = {"sampler": {}, "seed": 0}
            generate.write_set(
                own[title].folder / "samples" / f"{unsupervised.folder_of(row)}-0", SampleSet(x, y, about), 10
            )
    picture = Image.open(io.BytesIO(unsupervised.cem_figure1(own)))
    assert picture.width > 1500
    assert picture.height > 1500
