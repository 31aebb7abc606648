"""Encoders: losses, gradients, attacks and branches against re-derivations; and whole runs without labels."""

import copy
import dataclasses
import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from advebm import cli, energies, recipes
from advebm.attacks.projected import Attack
from advebm.core import config, rng
from advebm.core.errors import Diverged, Interrupted, UserError
from advebm.data.augment import Augment
from advebm.data.sources import Augmentations, Digits, Images
from advebm.descent import value_and_gradient
from advebm.models import network
from advebm.models.layers import norm2d
from advebm.models.modes import using
from advebm.models.network import Architecture, Projection
from advebm.models.small import SmallConv
from advebm.objectives.awp import AWP
from advebm.objectives.base import Batch, Context
from advebm.objectives.contrastive import ACL, AdversarialInfoNCE, InfoNCE, Negatives, Queue, Views
from advebm.objectives.rst import RST
from advebm.objectives.standard import Standard
from advebm.runs.engine import Engine
from advebm.runs.find_model import find_model
from advebm.runs.recipe import design, resolve
from advebm.runs.run import Run
from advebm.training.cost import passes_per_image
from advebm.training.loop import train
from tests.references import contrastive as reference

TINY = {"outputs": 5, "temperature": 0.4}
GENTLE = Attack(eps=0.05, steps=3, step_size=0.03, start="clean")


@pytest.fixture
def z(generator):
    """Encodings of both views of 5 images, and 3 others."""
    return torch.randn(13, 4, generator=generator, dtype=torch.float64).split([5, 5, 3])


@pytest.fixture
def encoder():
    """A small encoder with dual batch norm in float64 and train mode; the branches differ."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Conv2d(3, 6, 3), norm2d("dual", 6), nn.Tanh(), nn.Flatten(), Projection(6 * 36, 8, 5)]
        net = nn.Sequential(*layers).double()
        for branch in net[1].branches.values():
            branch.running_mean.normal_(0, 0.2)
            nn.init.uniform_(branch.weight, 0.5, 1.5)
    return net


def step(objective, net, batch, state=None, seed=0, **options):
    ctx = Context(rng.generator(seed), **options)
    found = objective.search(net, batch, state, ctx)
    return found, objective.loss(net, batch, found, state, ctx)


def gradients(total, net):
    return [torch.zeros_like(p) if g is None else g for p, g in pairs(total, net)]


def pairs(total, net):
    parameters = list(net.parameters())
    return zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True)


def both(batch):
    return Views(batch.x, batch.view)


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("queued", [False, True])
def test_losses_are_the_published_sums(z, cosine, beta, queued):
    """With their gradients, which reach the weights of hard negatives, too."""
    first, second, others = (part.requires_grad_() for part in z)
    others, tau = others if queued else others[:0], 0.3 if cosine else 3.0
    options = {"temperature": tau, "hardness": beta, "cosine": cosine}
    rows = energies.nt_xent(torch.cat([first, second]), torch.cat([first, second, others]), **options)
    assert rows.shape == (10,)
    one_sided = energies.in_batch(first, torch.cat([second, others]), **options)
    assert one_sided.shape == (5,)
    for ours, sums in ((rows.mean(), reference.nt_xent), (one_sided.mean(), reference.infonce)):
        theirs = sums(first, second, tau, others, beta, cosine)
        torch.testing.assert_close(ours, theirs)
        slopes = [torch.autograd.grad(total, [first, second], retain_graph=True) for total in (ours, theirs)]
        torch.testing.assert_close(*slopes)


def test_infonce_is_the_cross_entropy_of_telling_images_apart(z):
    first, second, _ = z
    scores = energies.similarities(first, second, temperature=2.0, cosine=False)
    torch.testing.assert_close(scores, first @ second.T / 2)
    rows = energies.in_batch(first, second, temperature=2.0, cosine=False)
    torch.testing.assert_close(rows, F.cross_entropy(scores, torch.arange(5), reduction="none"))
    positive = energies.infonce(first, second, first, temperature=2.0, cosine=False)
    far = first @ first.T / 2
    near = (first * second).sum(1) / 2
    torch.testing.assert_close(positive, torch.log(near.exp() + far.exp().sum(1)) - near)


def test_objectives_minimise_the_means_of_their_forms(encoder, batch):
    """Symmetric NT-Xent of one joint forward pass; one-sided InfoNCE against encodings that are numbers."""
    net = copy.deepcopy(encoder)
    _, loss = step(InfoNCE(**TINY), encoder, batch)
    first, second = net(torch.cat([batch.x, batch.view])).chunk(2)
    theirs = reference.nt_xent(first, second, 0.4)
    torch.testing.assert_close(loss.total, theirs)
    torch.testing.assert_close(gradients(loss.total, encoder), gradients(theirs, net))
    _, loss = step(InfoNCE(negatives=Negatives(hardness=0.7), **TINY), encoder, batch)
    first, second = net(torch.cat([batch.x, batch.view])).chunk(2)
    torch.testing.assert_close(loss.total, reference.nt_xent(first, second, 0.4, beta=0.7))
    plain = InfoNCE(form="infonce", cosine=False, outputs=5, temperature=2.0)
    _, loss = step(plain, encoder, batch)
    theirs = reference.infonce(net(batch.x), net(batch.view).detach(), 2.0, cosine=False)
    torch.testing.assert_close(loss.total, theirs)
    torch.testing.assert_close(gradients(loss.total, encoder), gradients(theirs, net))


def test_the_accuracy_counts_anchors_whose_positive_is_nearest():
    z = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]])
    assert InfoNCE().positive_is_nearest(z, z).tolist() == [True] * 4
    assert InfoNCE().positive_is_nearest(z, torch.cat([z, torch.tensor([[1.0, 0.05]])])).tolist() == [
        False,
        True,
        False,
        True,
    ]
    one = InfoNCE(form="infonce")
    assert one.positive_is_nearest(z[:2], z[2:]).tolist() == [True, True]
    assert one.positive_is_nearest(z[:2], z[2:].flip(0)).tolist() == [False, False]
    terms = InfoNCE(temperature=1.0).contrast(z, z, None, Context(None)).terms
    assert terms["contrastive_accuracy"] == 1
    assert terms["loss"] == pytest.approx(reference.nt_xent(z[:2], z[2:], 1.0).item())


# CEM's identities -----------------------------------------------------------------------------------------------------


def smooth():
    """A float64 encoder without batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.Tanh(), nn.Linear(9, 5)).double()


@pytest.mark.parametrize("cosine", [False, True])
def test_infonce_follows_the_importance_sampled_gradient_of_np_cem(batch, cosine):
    """CEM eq. 9, appendix C.4: minus its gradient, images of the batch standing in for the model's."""
    net, objective = smooth(), InfoNCE(form="infonce", cosine=cosine, outputs=5, temperature=0.7)
    _, loss = step(objective, net, batch)
    theirs = reference.np_cem_gradient(net, batch.x, net(batch.view).detach(), 0.7, cosine)
    for ours, other in zip(gradients(loss.total, net), theirs, strict=True):
        torch.testing.assert_close(-ours, other, rtol=1e-6, atol=1e-9)


def test_adversarial_infonce_follows_the_contrastive_gradient(batch):
    """CEM eq. 13, appendix C.5: at x̂ in place of x, z still being of the clean other view."""
    net = smooth()
    objective = AdversarialInfoNCE(form="infonce", cosine=False, outputs=5, temperature=0.7, attack=GENTLE)
    found, loss = step(objective, net, batch)
    assert torch.equal(found.view, batch.view)
    assert not torch.equal(found.x, batch.x)
    theirs = reference.np_cem_gradient(net, found.x, net(batch.view).detach(), 0.7, cosine=False)
    for ours, other in zip(gradients(loss.total, net), theirs, strict=True):
        torch.testing.assert_close(-ours, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["infonce", "nt-xent"])
def test_an_attack_climbs_langevins_drift_and_leaves_its_anchor(batch, form):
    """CEM eq. 11: what PGD on InfoNCE ascends is what eq. 10 ascends, minus f(x̂, z)."""
    net = smooth()
    objective = AdversarialInfoNCE(form=form, cosine=False, outputs=5, temperature=0.7)
    x = (torch.cat(both(batch)) if form == "nt-xent" else batch.x) * 0.9
    _, drift = value_and_gradient(objective.langevin_energy(net, both(batch)), x)
    z = net(torch.cat([batch.view, batch.x])[: len(x)]).detach()
    _, anchor = value_and_gradient(lambda v: (net(v) * z).sum(1) / 0.7, x)
    if form == "infonce":
        _, attack = value_and_gradient(objective.negative_loss(net, both(batch)), x)
        torch.testing.assert_close(-attack, -drift - anchor, rtol=1e-9, atol=1e-12)
        assert drift.abs().max() > 1e-3 < anchor.abs().max()
    else:  # of a pair that stays, half by half
        halves = [AdversarialInfoNCE(form="infonce", cosine=False, outputs=5, temperature=0.7)] * 2
        sides = zip(halves, (both(batch), Views(batch.view, batch.x)), x.chunk(2), strict=True)
        attack = torch.cat([value_and_gradient(o.negative_loss(net, pair), part)[1] for o, pair, part in sides])
        torch.testing.assert_close(-attack, -drift - anchor, rtol=1e-9, atol=1e-12)


# Searches -------------------------------------------------------------------------------------------------------------


def test_the_attack_on_both_views_is_one_on_their_joint_loss(encoder, batch):
    objective, net = AdversarialInfoNCE(attack=GENTLE, **TINY), copy.deepcopy(encoder).eval()
    found = objective.search(encoder, batch, None, Context(None))
    joint = lambda x: reference.nt_xent(*net(x).chunk(2), 0.4)
    theirs = reference.coupled_pgd(joint, torch.cat(both(batch)), 0.05, 0.03, 3)
    torch.testing.assert_close(torch.cat(found), theirs)
    assert joint(theirs) > joint(torch.cat(both(batch))) + 0.02
    other = batch._replace(view=torch.cat([batch.view[:-1], batch.x[:1]]))
    moved = objective.search(encoder, other, None, Context(None))
    assert not torch.equal(moved.x[0], found.x[0]), "an image's search depends on the others"


def test_one_sided_attacks_move_first_views_and_look_at_the_queue(encoder, batch, generator):
    objective = AdversarialInfoNCE(form="infonce", attack=GENTLE, negatives=Negatives(queue=8), **TINY)
    state = objective.init(batch.x, generator)
    state.rows, state.filled = torch.randn(8, 5, generator=generator), 7
    net = copy.deepcopy(encoder).eval()
    found, loss = step(objective, encoder, batch, state)
    z, others = net(batch.view).detach(), state.rows[:7].double()
    theirs = reference.coupled_pgd(lambda x: reference.infonce(net(x), z, 0.4, others), batch.x, 0.05, 0.03, 3)
    torch.testing.assert_close(found.x, theirs)
    assert torch.equal(found.view, batch.view)
    net.train()
    torch.testing.assert_close(loss.total, reference.infonce(net(found.x), net(batch.view).detach(), 0.4, others))


@pytest.mark.parametrize("form", ["infonce", "nt-xent"])
def test_langevin_climbs_without_an_anchor_and_with_noise(encoder, batch, form):
    attack = Attack(eps=1.0, steps=1, step_size=0.01, start="clean")
    quiet = AdversarialInfoNCE(form=form, attack=attack, langevin=0.0, **TINY)
    middle = batch._replace(x=0.4 + 0.2 * batch.x, view=0.4 + 0.2 * batch.view)
    search = lambda objective: objective.search(encoder, middle, None, Context(rng.generator(0)))
    found, net, images = search(quiet), copy.deepcopy(encoder).eval(), both(middle)
    moving = (images.x, images.view) if form == "nt-xent" else (images.x,)
    for start, other, end in zip(moving, (images.view, images.x), found, strict=False):
        v = start.clone().requires_grad_()
        f = F.normalize(net(v), dim=1) @ F.normalize(net(other), dim=1).detach().T / 0.4
        (drift,) = torch.autograd.grad(f.exp().sum(1).log().sum(), v)
        torch.testing.assert_close(end, start + 0.01 * drift.sign())
    if form == "infonce":
        assert torch.equal(found.view, middle.view)
    noisy = search(dataclasses.replace(quiet, langevin=0.02))
    noise = noisy.x - found.x
    assert noise.std().item() == pytest.approx(0.02, rel=0.1)
    near = search(dataclasses.replace(quiet, langevin=0.5, attack=GENTLE))
    assert (near.x - middle.x).abs().max() <= 0.05 + 1e-9, "in the attack's ball"


def test_consistency_is_the_divergence_of_what_images_are_taken_for(encoder, batch):
    for form in ("infonce", "nt-xent"):
        objective = AdversarialInfoNCE(form=form, attack=GENTLE, consistency=3.0, **TINY)
        net = copy.deepcopy(encoder)
        found, loss = step(objective, encoder, batch)
        if form == "infonce":
            anchors, moved = net(batch.x), net(found.x)
            z = net(batch.view).detach()
            gap = reference.posterior_divergence(anchors, moved, z, 0.4, True)
            base = reference.infonce(moved, z, 0.4)
        else:
            anchors, moved = (net(torch.cat(pair)).chunk(2) for pair in (both(batch), found))
            sides = zip(anchors, moved, (anchors[1].detach(), anchors[0].detach()), strict=True)
            gap = sum(reference.posterior_divergence(a, b, z, 0.4, True) for a, b, z in sides) / 2
            base = reference.nt_xent(*moved, 0.4)
        torch.testing.assert_close(loss.terms["consistency"], gap.detach())
        torch.testing.assert_close(loss.total, base + 3 * gap)
        torch.testing.assert_close(gradients(loss.total, encoder), gradients(base + 3 * gap, net))
        assert gap > 1e-4
    still = dataclasses.replace(objective, attack=Attack(eps=0.0))
    _, loss = step(still, encoder, batch)
    assert loss.terms["consistency"].abs() < 1e-12


# ACL and its branches -------------------------------------------------------------------------------------------------


def test_acl_is_half_of_each_branch(encoder, batch):
    objective = ACL(attack=GENTLE, **TINY)
    net = copy.deepcopy(encoder)
    found, loss = step(objective, encoder, batch)
    with using(net, "adversarial"):
        quiet = copy.deepcopy(net).eval()
        joint = lambda x: reference.nt_xent(*quiet(x).chunk(2), 0.4)
        torch.testing.assert_close(
            torch.cat(found), reference.coupled_pgd(joint, torch.cat(both(batch)), 0.05, 0.03, 3)
        )
        attacked = reference.nt_xent(*net(torch.cat(found)).chunk(2), 0.4)
    clean = reference.nt_xent(*net(torch.cat(both(batch))).chunk(2), 0.4)
    torch.testing.assert_close(loss.total, (attacked + clean) / 2)
    torch.testing.assert_close(gradients(loss.total, encoder), gradients((attacked + clean) / 2, net))
    torch.testing.assert_close(loss.terms["adversarial_loss"], attacked.detach())
    torch.testing.assert_close(loss.terms["clean_loss"], clean.detach())
    assert abs(attacked - clean) > 0.05


def test_branches_keep_their_own_statistics(encoder, batch):
    """The adversarial branch never sees clean images, nor the other way round; a search moves neither."""
    objective, before = ACL(attack=GENTLE, **TINY), copy.deepcopy(encoder)
    found = objective.search(encoder, batch, None, Context(rng.generator(0)))
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in encoder.state_dict().items())
    objective.loss(encoder, batch, found, None, Context(None))
    for branch, images in (("clean", both(batch)), ("adversarial", found)):
        alone = copy.deepcopy(before)
        alone(torch.cat(images)) if branch == "clean" else forward_through(alone, images)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            ours, theirs = (getattr(net[1].branches[branch], name) for net in (encoder, alone))
            assert torch.equal(ours, theirs)
            assert not torch.equal(ours, getattr(before[1].branches[branch], name))
    still = copy.deepcopy(before)
    step(InfoNCE(**TINY), still, batch)
    step(AdversarialInfoNCE(attack=GENTLE, **TINY), still, batch)
    assert torch.equal(still[1].branches["adversarial"].running_mean, before[1].branches["adversarial"].running_mean)
    assert encoder[1].branch == "clean"


def forward_through(net, images):
    with using(net, "adversarial"):
        net(torch.cat(images))


# Negatives ------------------------------------------------------------------------------------------------------------


def test_a_queue_holds_the_newest_encodings():
    queue = Queue(5, 2)
    assert queue.read(torch.zeros(1)).shape == (0, 2)
    rows = torch.arange(18.0).view(9, 2)
    for start in (0, 3, 6):
        queue.fresh = rows[start : start + 3]
        queue.push()
        held = queue.read(torch.zeros(1, dtype=torch.float64))
        assert held.dtype == torch.float64
        assert sorted(held[:, 0].tolist()) == sorted(rows[max(0, start - 2) : start + 3, 0].tolist())
    again = Queue(5, 2)
    again.load_state_dict(copy.deepcopy(queue.state_dict()))
    for one in (queue, again):
        one.fresh = rows[:2]
        one.push()
        one.push()  # what has joined does not join again
    assert torch.equal(queue.rows, again.rows)
    assert (queue.next, queue.filled) == (again.next, again.filled) == (1, 5)


@pytest.mark.parametrize("form", ["infonce", "nt-xent"])
def test_earlier_second_views_are_negatives(encoder, batch, form, generator):
    objective = InfoNCE(form=form, negatives=Negatives(queue=9), **TINY)
    state, net = objective.init(batch.x, generator), copy.deepcopy(encoder)
    found, loss = step(objective, encoder, batch, state)
    sides = net(torch.cat(found)).chunk(2) if form == "nt-xent" else (net(found.x), net(found.view).detach())
    sums = {"nt-xent": reference.nt_xent, "infonce": reference.infonce}[form]
    torch.testing.assert_close(loss.total, sums(*sides, 0.4))
    objective.after(encoder, batch, found, state, loss, Context(generator))
    torch.testing.assert_close(state.read(sides[1]), sides[1].detach(), rtol=1e-6, atol=1e-6)
    kept = state.read(batch.x)
    _, loss = step(objective, encoder, batch, state)
    sides = net(torch.cat(found)).chunk(2) if form == "nt-xent" else (net(found.x), net(found.view).detach())
    torch.testing.assert_close(loss.total, sums(*sides, 0.4, kept))


def test_consistency_leaves_the_queue_alone(encoder, batch, generator):
    """What enters it are the encodings of what was found, with a little consistency as with none."""
    held = []
    for weight in (0.0, 1e-9):
        objective = AdversarialInfoNCE(attack=GENTLE, negatives=Negatives(queue=8), consistency=weight, **TINY)
        state, net = objective.init(batch.x, generator), copy.deepcopy(encoder)
        found, loss = step(objective, net, batch, state)
        objective.after(net, batch, found, state, loss, Context(generator))
        held.append(state.read(batch.x))
    assert torch.equal(*held)
    z = copy.deepcopy(encoder)(torch.cat(found)).chunk(2)[1]
    torch.testing.assert_close(held[0], z.detach(), rtol=1e-6, atol=1e-6)


def test_streams_are_processes(tmp_path, monkeypatch):
    """Two streams of an encoder are what two processes take, and nothing else."""
    monkeypatch.setattr(Engine, "owned", lambda self, streams: self.__dict__.update(world=2) or range(0))
    with pytest.raises(UserError, match=r"train.streams is 1, and there are 2 processes.*--train.streams 2"):
        train(small(), tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match=r"negatives.queue is 5000"):  # which is looked at next
        train(small(train__streams=2, objective__negatives__queue=5_000), tmp_path / "run", device="cpu")


@dataclasses.dataclass(frozen=True)
class Own(Standard):
    """A classifier's objective that says what it cannot do."""

    def check(self, images, threat):
        raise UserError(f"{images} images under {threat.name}")


def test_the_loop_asks_the_objective(tmp_path):
    """Wrapped ones, too; and nothing is written."""
    plain = resolve(recipes.find("digits-standard"))
    for number, objective in enumerate((Own(), AWP(Own()))):
        with pytest.raises(UserError, match="1258 images under PGD"):
            train(dataclasses.replace(plain, objective=objective), tmp_path / str(number), device="cpu")
    with pytest.raises(UserError, match="7 images under PGD-20"):
        RST("none", Own()).check(7, Attack(steps=20))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["infonce", "nt-xent"])
def test_gathered_losses_have_the_gradient_of_one_process(batch, form):
    """Two shares of a batch, each with the other's rows among its negatives: the mean is the whole batch's loss."""
    net, objective = smooth(), InfoNCE(form=form, **TINY)
    shares = [Batch(batch.x[s], batch.y[s], batch.view[s]) for s in (slice(0, 3), slice(3, 6))]
    encoded = [objective.encode(net, both(share))[1] for share in shares]
    losses = []
    for number, share in enumerate(shares):
        other = encoded[1 - number]
        losses.append(step(objective, net, share, gather=lambda rows, other=other: torch.cat([rows, other]))[1].total)
    whole = step(objective, net, batch)[1].total
    torch.testing.assert_close(sum(losses) / 2, whole)
    torch.testing.assert_close(gradients(sum(losses) / 2, net), gradients(whole, net))
    alone = step(objective, net, shares[0])[1].total
    assert alone < losses[0]


@pytest.mark.parametrize("form", ["infonce", "nt-xent"])
def test_what_attacks_raise_is_of_all_processes(encoder, batch, generator, form):
    """Two shares, each with the other's encodings among its own: energies and consistency are the whole batch's."""
    net, objective = copy.deepcopy(encoder).eval(), AdversarialInfoNCE(form=form, **TINY)
    whole = both(batch)
    shares = [both(Batch(batch.x[s], batch.y[s], batch.view[s])) for s in (slice(0, 3), slice(3, 6))]
    views, moving = (2 if form == "nt-xent" else 1), objective.moving
    for energy in (objective.negative_loss, objective.langevin_energy):
        encoded: list = [[], []]
        for share, seen in zip(shares, encoded, strict=True):
            energy(net, share, None, lambda rows, seen=seen: seen.append(rows) or rows)(moving(share))
        parts = []
        for share, theirs in zip(shares, reversed(encoded), strict=True):
            answers = iter(theirs)
            joint = energy(net, share, None, lambda rows, answers=answers: torch.cat([rows, next(answers)]))
            parts.append(joint(moving(share)).chunk(views))
        together = torch.cat([torch.cat(side) for side in zip(*parts, strict=True)])
        torch.testing.assert_close(together, energy(net, whole)(moving(whole)))
        assert not torch.allclose(together[:3], energy(net, shares[0])(moving(shares[0]))[:3])
    z, moved, references = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    sides = [torch.cat([part[s] for part in references.chunk(views)]) for s in (slice(0, 3), slice(3, 6))]
    if form == "infonce":
        gaps = []
        for s, own, other in ((slice(0, 3), *sides), (slice(3, 6), *reversed(sides))):
            gaps.append(objective.gap(z[s], moved[s], own, lambda rows, other=other: torch.cat([rows, other])))
        torch.testing.assert_close(sum(gaps) / 2, objective.gap(z, moved, references))


def test_the_search_asks_all_processes(encoder, batch, generator):
    for langevin in (None, 0.0):
        asked = []
        ctx = Context(generator, gather=lambda rows, asked=asked: asked.append(len(rows)) or rows)
        AdversarialInfoNCE(attack=GENTLE, langevin=langevin, **TINY).search(encoder, batch, None, ctx)
        assert len(asked) >= 2


# Architecture ---------------------------------------------------------------------------------------------------------


def test_an_encoder_has_a_projection_and_its_features_come_before_it(tmp_path):
    made = Architecture(SmallConv(width=4), 6, 1, 8, (0.5,), (0.25,), hidden=10)
    model, x = made.build().eval(), torch.rand(3, 1, 8, 8)
    assert model.encoder
    assert model(x).shape == (3, 6)
    features = model.features(x)
    assert features.shape == (3, 8 * 16)
    first, second = model.head[0], model.head[2]
    torch.testing.assert_close(
        model(x), (features @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias
    )
    network.save(tmp_path, model, made)
    again, read = network.load(tmp_path)
    assert read == made
    assert torch.equal(again(x), model(x))
    assert "projection" in (tmp_path / "README.md").read_text()
    assert not dataclasses.replace(made, hidden=None).build().encoder


@pytest.mark.parametrize("norm", ["dual", "batch", "none"])
def test_the_head_of_acl_is_three_layers_with_batch_norms(tmp_path, norm):
    """Linear and norm three times, ReLU between, a bias in the first alone; its norms have the backbone's branches."""
    made = Architecture(SmallConv(width=4, norm=norm), 6, 1, 8, (0.5,), (0.25,), hidden=10, head="acl")
    model, x = made.build().double().train(), torch.rand(7, 1, 8, 8, dtype=torch.float64)
    layers = [m for m in model.head.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias is not None) for m in layers] == [
        (128, 10, True),
        (10, 10, False),
        (10, 6, False),
    ]

    def normalised(z):
        return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()

    with using(model, "adversarial"):
        z = model.features(x)
        one = normalised(z @ layers[0].weight.T + layers[0].bias).relu()
        two = normalised(one @ layers[1].weight.T).relu()
        torch.testing.assert_close(model(x), normalised(two @ layers[2].weight.T))
    with torch.no_grad():
        attacked, state = model.eval()(x), copy.deepcopy(model.state_dict())
        with using(model, "adversarial"):
            assert torch.equal(model(x), attacked) == (norm != "dual")
    assert any(".branches." in name for name in state if name.startswith("head.")) == (norm == "dual")
    network.save(tmp_path, model.float(), made)
    again, read = network.load(tmp_path)
    assert read == made
    assert torch.equal(again(x.float()), model(x.float()))
    with pytest.raises(UserError, match="head is one of simclr, acl, got 'mlp'"):
        dataclasses.replace(made, head="mlp")


def test_recipes_of_acl_have_its_head_as_wide_as_the_features():
    """Runs of before there was a choice name no head, and keep the one they were trained with."""
    for name, width in (("digits-acl", 768), ("cifar10-acl", 512), ("cifar10-acl-resnet50", 2048)):
        recipe = resolve(recipes.find(name))
        channels, size = (1, 8) if "digits" in name else (3, 32)
        assert recipe.backbone.build(channels, size)[1] == width
        assert (recipe.objective.head, recipe.objective.hidden, recipe.objective.outputs) == ("acl", width, width)
    plain = config.describe(resolve(recipes.find("digits-acl")))
    del plain["objective"]["head"]
    old = resolve(plain)
    assert old.objective.head == "simclr"
    assert design(old, Digits().load()).head == "simclr"


@pytest.mark.parametrize("name", ["digits-adversarial-infonce", "cifar10-adversarial-infonce-small"])
def test_recipes_of_adversarial_infonce_minimise_what_cem_writes(name, encoder, batch):
    """Eq. 13 at images that climb eq. 11: -log exp g(x̂)·z / Σ_k exp g(x̂)·z_k, z of second views as numbers."""
    objective = resolve(recipes.find(name)).objective
    assert type(objective) is AdversarialInfoNCE
    net = copy.deepcopy(encoder)
    found, loss = step(objective, encoder, batch)
    assert torch.equal(found.view, batch.view)
    moved = (found.x - batch.x).flatten(1).norm(dim=1)
    assert (moved > 0).all()
    assert (moved <= objective.attack.eps + 1e-9).all()
    scores = net(found.x) @ net(batch.view).detach().T
    theirs = F.cross_entropy(scores, torch.arange(len(batch.x)))
    torch.testing.assert_close(loss.total, theirs)
    torch.testing.assert_close(gradients(loss.total, encoder), gradients(theirs, net))


def test_models_published_before_there_were_encoders_still_load(tmp_path):
    made = Architecture(SmallConv(width=4), 6, 1, 8, (0.5,), (0.25,))
    network.save(tmp_path, made.build(), made)
    plain = json.loads((tmp_path / "config.json").read_text())
    del plain["architecture"]["hidden"], plain["architecture"]["head"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert network.load(tmp_path)[1] == made
    assert "advebm.energy" in (tmp_path / "README.md").read_text()


# Runs -----------------------------------------------------------------------------------------------------------------


def small(name="digits-infonce", **options):
    short = {"backbone.width": 6, "train.images": 1_536, "train.batch": 128, "train.log_every": 256}
    short |= {"train.validate_every": 768, "train.checkpoint_every": 512, "objective.hidden": 16}
    if name == "digits-acl":
        short |= {"objective.attack.steps": 2, "threat.steps": 2}
    return resolve(recipes.find(name), [*short.items(), *((k.replace("__", "."), v) for k, v in options.items())])


def weights(run, name="model"):
    return network.load_model(run.folder).state_dict() if name == "ema" else run.model()[0].state_dict()


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


def test_an_encoder_learns_without_labels(tmp_path):
    """The loss falls, and a linear classifier on its features beats one on those of fresh weights."""
    recipe = small(train__images=6_144, train__validate_every=3_072, threat__steps=1)
    run = train(recipe, tmp_path / "run", device="cpu")
    losses = [line["train/loss"] for line in run.history() if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.15
    data, scores = recipe.data.load(), []
    for model in (find_model(run.folder), design(recipe, data).build(recipe.seed).eval()):
        with torch.no_grad():
            train_z, test_z = (model.features(part.float()).numpy() for part in (data.train, data.test))
        few = slice(0, 100)
        probe = LogisticRegression(max_iter=2000).fit(train_z[few], data.train.y[few].numpy())
        scores.append(probe.score(test_z, data.test.y.numpy()))
    assert scores[0] > scores[1] + 0.3, scores
    judged = [line for line in run.history() if "val/loss" in line]
    assert judged[-1]["val/contrastive_accuracy"] > 2 / 359


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """Digits whose labels have been dealt out anew."""

    seed: int = 1
    augment: Augmentations = Augmentations(Augment(crop=1, scale=0.5, jitter=0.5))

    def load(self):
        data, generator = Digits().load(), torch.Generator().manual_seed(self.seed)
        deal = lambda images: Images(images.x, images.y[torch.randperm(len(images), generator=generator)])
        return data._replace(train=deal(data.train), val=deal(data.val))


def test_labels_make_no_difference(tmp_path):
    """Not to the weights, not to what is validated, not to the checkpoint that is best."""
    kind = "tests.objectives.test_contrastive:Relabelled"
    runs = [
        train(small("digits-acl", data={"kind": kind, "seed": seed}), tmp_path / str(seed), device="cpu")
        for seed in (1, 2)
    ]
    one, two = (run.recipe.data.load() for run in runs)
    assert not torch.equal(one.train.y, two.train.y)
    assert same(weights(runs[0]), weights(runs[1]))
    judged = [[line for line in run.history() if "val/loss" in line] for run in runs]
    assert judged[0] == judged[1]
    assert runs[0].checkpoints.path("best").name == runs[1].checkpoints.path("best").name


def test_the_command_line_takes_labels_away(tmp_path, capsys):
    """The weights of a run with labels, and a run that no labels can be had from."""
    short = ["--train.images=512", "--train.batch=128", "--backbone.width=6", "--objective.hidden=16", "--device=cpu"]
    short.append("--sampler.start=class")
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    assert cli.main(["train", "--recipe=digits-infonce", f"--out={whole}", *short]) == 0
    assert cli.main(["train", "--recipe=digits-infonce", f"--out={bare}", "--labels=none", *short]) == 0
    runs = Run.open(whole), Run.open(bare)
    assert same(weights(runs[0]), weights(runs[1]))
    data = runs[1].recipe.data.load()
    assert data.classes == ("unlabelled",)
    for split, labelled in zip(data.splits, runs[0].recipe.data.load().splits, strict=True):
        assert torch.equal(split.x, labelled.x)
        assert (split.y == -1).all()
    assert runs[0].recipe.sampler.start == "class"
    assert cli.main(["sample", str(bare), "--per-class=8", "--steps=1"]) == 0
    assert (bare / "samples" / "maxent-global" / "manifest.json").exists()
    capsys.readouterr()
    assert cli.main(["probe", str(bare)]) != 0
    assert "has none" in capsys.readouterr().err
    assert cli.main(["train", "--recipe=digits-at", "--labels=none", f"--out={tmp_path / 'at'}"]) != 0
    assert "AT needs labels; leave --labels out" in capsys.readouterr().err
    assert not (tmp_path / "at").exists()


@dataclasses.dataclass(frozen=True)
class Watching(InfoNCE):
    """InfoNCE that keeps the batches it was given."""

    def search(self, model, batch, state, ctx):
        SEEN.append(batch)
        return super().search(model, batch, state, ctx)


SEEN: list[Batch] = []


def test_batches_hold_two_views_and_no_labels(tmp_path):
    SEEN.clear()
    recipe = dataclasses.replace(small(train__images=128), objective=Watching(hidden=16))
    train(recipe, tmp_path / "run", device="cpu")
    assert (SEEN[0].y == -1).all()
    assert SEEN[0].x.shape == SEEN[0].view.shape == (128, 1, 8, 8)
    assert not torch.equal(SEEN[0].x, SEEN[0].view)


def test_the_loop_gathers_over_processes(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(Engine, "gather", lambda self, rows: counts.append(len(rows)) or rows)
    train(small(train__images=256), tmp_path / "run", device="cpu")
    assert counts == [256, 256]


def test_a_queue_survives_an_interruption(tmp_path):
    recipe = small(objective__negatives__queue=300, objective__form="infonce", train__checkpoint_every=100_000)
    whole = train(recipe, tmp_path / "whole", device="cpu")

    def interrupt(line):
        if 500 < line["images"] < 800:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="--resume"):
        train(recipe, tmp_path / "stopped", device="cpu", report=interrupt)
    run = train(recipe, tmp_path / "stopped", resume=True, device="cpu")
    assert same(weights(whole), weights(run))
    state = torch.load(run.checkpoints.path() / "state" / "stream-0.pt", weights_only=True)
    assert state["filled"] == 300
    other = train(small(objective__form="infonce", train__checkpoint_every=100_000), tmp_path / "none", device="cpu")
    assert not same(weights(whole), weights(other))


def test_acl_runs_and_is_judged_clean_and_attacked(tmp_path):
    run = train(small("digits-acl"), tmp_path / "run", device="cpu")
    assert run.model()[0].encoder
    lines = run.history()
    judged = [line for line in lines if "val/loss" in line]
    assert [line["images"] for line in judged] == [768, 1536]
    assert judged[-1]["val/robust_loss"] > judged[-1]["val/loss"]
    assert judged[-1]["val/robust_contrastive_accuracy"] < judged[-1]["val/contrastive_accuracy"]
    logged = next(line for line in lines if "train/loss" in line)
    assert logged["train/loss"] == pytest.approx((logged["train/adversarial_loss"] + logged["train/clean_loss"]) / 2)
    assert not any(name.startswith("shift/") for line in lines for name in line)
    progress = json.loads((run.checkpoints.path() / "state" / "progress.json").read_text())
    best = max((line["val/robust_contrastive_accuracy"], line["val/contrastive_accuracy"]) for line in judged)
    assert tuple(progress["best"]) == best


def test_passes_of_both_views_are_counted():
    """Two steps on two views, then both views clean and attacked; without an attack, both views once."""
    assert passes_per_image(small("digits-acl")) == (8, 8)
    assert passes_per_image(small("digits-infonce")) == (2, 2)
    assert passes_per_image(small("digits-infonce", objective__form="infonce")) == (2, 1)


def test_validation_attacks_through_the_adversarial_branch_in_equal_parts(encoder, batch, monkeypatch):
    monkeypatch.setattr("advebm.objectives.contrastive.MAX_VALIDATION_GROUP", 3)
    objective, net = ACL(**TINY), copy.deepcopy(encoder).eval()
    scores = objective.validate(encoder, batch, GENTLE, rng.generator(0))
    clean, attacked = [], []
    for part in (slice(0, 3), slice(3, 6)):
        x = torch.cat([batch.x[part], batch.view[part]])
        clean.append(reference.nt_xent(*net(x).chunk(2), 0.4))
        with using(net, "adversarial"):
            moved = reference.coupled_pgd(lambda v: reference.nt_xent(*net(v).chunk(2), 0.4), x, 0.05, 0.03, 3)
            attacked.append(reference.nt_xent(*net(moved).chunk(2), 0.4))
    assert scores["val/loss"] == pytest.approx(sum(clean).item() / 2)
    assert scores["val/robust_loss"] == pytest.approx(sum(attacked).item() / 2)
    assert set(scores) == {f"val/{name}{of}" for name in ("", "robust_") for of in ("loss", "contrastive_accuracy")}


def test_a_classifier_may_begin_with_an_encoder(tmp_path):
    encoder = train(small(train__images=256), tmp_path / "encoder", device="cpu")
    options = [("backbone.width", 6), ("train.images", 0), ("init", str(encoder.folder)), ("backbone.norm", "batch")]
    with pytest.warns(UserWarning, match="another head than digits takes: head.0.bias"):
        run = train(resolve(recipes.find("digits-standard"), options), tmp_path / "classifier", device="cpu")
    theirs, ours = weights(encoder, "ema"), run.model()[0].state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items() if not k.startswith("head."))


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_settings_are_refused(batch, generator, tmp_path):
    for bad, match in [
        (lambda: InfoNCE(temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: InfoNCE(temperature=float("nan")), "temperature must be > 0"),
        (lambda: InfoNCE(hidden=0), "hidden and outputs must be at least 1, got 0 and 64"),
        (lambda: InfoNCE(form="simclr"), "form is one of nt-xent, infonce"),
        (lambda: Negatives(queue=-1), "queue and hardness must be >= 0"),
        (lambda: Negatives(hardness=-0.5), "queue and hardness must be >= 0"),
        (lambda: AdversarialInfoNCE(consistency=-1.0), "consistency and langevin must be >= 0"),
        (lambda: AdversarialInfoNCE(langevin=-1.0), "consistency and langevin must be >= 0"),
        (lambda: ACL(attack=Attack(restarts=2)), "attack.restarts is 1 here"),
        (lambda: AWP(InfoNCE()), "awp goes around an objective of classifiers or critics, not InfoNCE"),
        (lambda: InfoNCE().init(batch.x[:1], generator), "which has 1; raise train.batch"),
        (lambda: InfoNCE(negatives=Negatives(queue=5)).init(batch.x, generator), "a queue of 5 is smaller than the 6"),
        (lambda: Architecture(SmallConv(), 6, 1, 8, (0.5,), (0.2,), hidden=0), "hidden must be at least 1, or none"),
        (lambda: train(small(train__batch=1), tmp_path / "a", device="cpu"), "which has 1; raise train.batch"),
        (
            lambda: train(small(objective__negatives__queue=5_000), tmp_path / "b", device="cpu"),
            "negatives.queue is 5000, but there are 1258 training images",
        ),
        (
            lambda: train(small(train__streams=2), tmp_path / "d", device="cpu"),
            "train.streams is 2, and there are 1 processes.*set --train.streams 1",
        ),
        (
            lambda: train(small(threat__restarts=2), tmp_path / "e", device="cpu"),
            "threat.restarts is 1 in the training",
        ),
        (lambda: ACL(negatives=Negatives(queue=8)), "negatives.queue is 0 for acl, got 8.*adversarial-infonce"),
    ]:
        with pytest.raises(UserError, match=match):
            bad()
    assert not list(tmp_path.iterdir())
    own = {"backbone": {"kind": "own", "path": "tests.objectives.test_contrastive:smooth"}}
    with pytest.raises(UserError, match="an encoder takes a backbone with features"):
        train(resolve({**recipes.find("digits-infonce"), **own}), tmp_path / "c", device="cpu")


def test_a_validation_that_is_not_finite_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(InfoNCE, "validate", lambda *arguments: {"val/loss": float("nan")})
    with pytest.raises(Diverged, match="the loss of validation images is not finite"):
        train(small(train__rollbacks=0), tmp_path / "run", device="cpu")


def test_one_validation_image_is_nothing_to_judge_by(tmp_path):
    run = train(small(train__validate_with=1, train__images=256), tmp_path / "run", device="cpu")
    assert not any("val/loss" in line for line in run.history())


def test_options_that_are_on_are_cited():
    assert "robinson2021" not in InfoNCE().cites
    assert "robinson2021" in ACL(negatives=Negatives(hardness=1.0)).cites
    assert "jiang2020" in config.build("acl", "objective").cites
