"""Every supervised method against an independent re-derivation, on one small network in float64."""

import copy
import dataclasses
import itertools
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from advebm import recipes
from advebm.attacks.projected import Attack
from advebm.core import config, rng
from advebm.core.errors import EarlyStop, Interrupted, UserError
from advebm.data.augment import Augment
from advebm.data.loader import Loader, Origin
from advebm.data.sources import Digits, Images
from advebm.evaluation.evaluate import evaluate_run
from advebm.objectives.at import AT, PreJEAT
from advebm.objectives.awp import AWP, SAM
from advebm.objectives.base import Batch, Context, Loss
from advebm.objectives.cutmix import CutMix, draw_beta, mix
from advebm.objectives.fast import FAST, FGSMEP, NFGSM, CollapseMonitor, KeptPerturbations
from advebm.objectives.free import FREE
from advebm.objectives.langevin import JEAT, JEM, MLE, SGLD
from advebm.objectives.rst import RST
from advebm.objectives.standard import Standard
from advebm.objectives.trades import TRADES, WEAT
from advebm.reporting.build import report
from advebm.runs.recipe import resolve
from advebm.runs.run import Run
from advebm.training import cost
from advebm.training.energy_shift import EnergyShift
from advebm.training.loop import train
from tests.helpers import tiny
from tests.references import objectives as reference

SHORT = SGLD(steps=4, step_size=0.3, noise=0.02, buffer=0)


@pytest.fixture
def inside(batch):
    """Images away from the borders of the box, where clamping a start would change it."""
    return Batch(0.2 + 0.6 * batch.x, batch.y)


def gradients(net, total):
    return list(torch.autograd.grad(total, list(net.parameters()), allow_unused=True))


def step(objective, net, batch, seed=0, state=None):
    """What was found, the loss, and its parameter gradients, as the loop would get them; running statistics stay."""
    ctx, before = Context(rng.generator(seed)), copy.deepcopy(net.state_dict())
    found = objective.search(net, batch, state, ctx)
    loss = objective.loss(net, batch, found, state, ctx)
    ours = gradients(net, loss.total)
    net.load_state_dict(before)
    return found, loss, ours


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("norm", "eps", "size"), [("linf", 0.05, 0.02), ("l2", 0.6, 0.25)])
def test_trades(net, inside, norm, eps, size):
    attack = Attack(eps=eps, norm=norm, steps=4, step_size=size, start="gaussian", spread=0.01)
    found, loss, ours = step(TRADES(attack, beta=3.0), net, inside)
    noise = 0.01 * torch.randn(inside.x.shape, generator=rng.generator(0), dtype=torch.float64)
    quiet = copy.deepcopy(net).eval()
    close(found, reference.trades_search(quiet, inside.x, noise, eps, size, 4, norm, box_first=False))
    expected = reference.trades_loss(net, inside.x, found, inside.y, 3.0)
    close(loss.total, expected)
    close(ours, gradients(net, expected))
    assert (found - inside.x).abs().max() > 0.01


def test_trades_gradient_flows_through_both_branches(net, inside):
    """Without it on one side, the parameter gradient is another."""
    found, _, ours = step(TRADES(beta=50.0), net, inside)
    clean, moved = net(inside.x), net(found)
    for a, b in ((clean.detach(), moved), (clean, moved.detach())):
        gap = (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1).mean()
        total = nn.functional.cross_entropy(clean, inside.y) + 50 * gap
        other = torch.autograd.grad(total, list(net.parameters()), retain_graph=True)
        assert any((x - y).abs().max() > 1e-4 for x, y in zip(ours, other, strict=True))


@pytest.mark.parametrize("on", ["clean", "adversarial"])
def test_weat(net, inside, on):
    found, loss, ours = step(WEAT(beta=4.0, on=on), net, inside)
    expected = reference.weat_loss(net, inside.x, found, inside.y, 4.0, on)
    close(loss.total, expected)
    close(ours, gradients(net, expected))


def test_fast_is_one_step_in_train_mode(net, batch):
    objective = FAST(Attack(eps=0.06, steps=1, step_size=0.075))
    found, _, ours = step(objective, net, batch)
    start = 0.06 * (2 * torch.rand(batch.x.shape, generator=rng.generator(0), dtype=torch.float64) - 1)
    close(found, reference.fast_search(copy.deepcopy(net), batch.x, batch.y, start, 0.06, 0.075))
    close(ours, gradients(net, reference.at_loss(net, found, batch.y)))


def test_n_fgsm_is_one_step_from_strong_noise(net, batch):
    found, _, ours = step(NFGSM(Attack(eps=0.06, steps=1), noise=1.5), net, batch)
    noise = 0.09 * (2 * torch.rand(batch.x.shape, generator=rng.generator(0), dtype=torch.float64) - 1)
    close(found, reference.nfgsm_search(copy.deepcopy(net), batch.x, batch.y, noise, 0.06))
    assert (found - batch.x).abs().max() > 0.13
    close(ours, gradients(net, reference.at_loss(net, found, batch.y)))


@pytest.mark.parametrize("objective", [Standard(smoothing=0.3), AT(smoothing=0.3), TRADES(beta=0.0, smoothing=0.3)])
def test_smoothed_labels(objective, net, inside):
    again, _, _ = step(dataclasses.replace(objective, smoothing=0.0), net, inside)
    assert torch.equal(again, step(objective, net, inside)[0])  # the search takes the labels as they are
    found, loss, ours = step(objective, net, inside)
    x = inside.x if isinstance(objective, TRADES) else found
    expected = nn.functional.cross_entropy(net(x), inside.y, label_smoothing=0.3)
    close(loss.total, expected)
    close(ours, gradients(net, expected))


def test_steps_follow_the_radius(net, inside):
    """Without a step of its own: eps for the energy attack, 1.25 eps for FAST; a start at rest shows it."""
    clean = {"eps": 0.05, "steps": 1, "start": "clean"}
    for objective, moved in (
        (FAST(Attack(**clean)), 0.05),  # 1.25 eps, cut to the ball
        (PreJEAT(Attack(**clean, loss="energy")), 0.05),
    ):
        found = objective.search(net, inside, None, Context(rng.generator(0)))
        assert (found - inside.x).abs().max().item() == pytest.approx(moved)
    assert FAST(Attack(eps=0.08, steps=1)).inner().step_size == pytest.approx(0.1)
    assert PreJEAT(Attack(eps=0.08, steps=1, loss="energy")).inner().step_size == pytest.approx(0.08)
    assert FAST(Attack(eps=0.08, steps=1, step_size=0.01)).inner().step_size == 0.01


def test_another_method_takes_the_radius_over_and_not_the_steps():
    for kind, steps, loss in (("prejeat", 1, "energy"), ("jeat", 1, "energy"), ("fast", 1, "cross-entropy")):
        attack = resolve(recipes.find("digits-at"), [("objective", kind)]).objective.attack
        assert (attack.eps, attack.norm, attack.steps, attack.loss) == (0.9, "l2", steps, loss), kind
    change = lambda *pairs: resolve(recipes.find("digits-at"), pairs)
    assert change(("objective", "trades")).objective.attack.start == "gaussian"
    wrapped = change(("objective", "awp"), ("objective.gamma", 0.02)).objective
    assert (wrapped.gamma, wrapped.objective) == (0.02, AT(Attack(norm="l2", eps=0.9, steps=7)))
    part = change(("data", "part"), ("data.share", 0.25)).data
    assert (part.source, part.share) == (Digits(), 0.25)


def test_fast_stops_when_robustness_falls(net, batch):
    objective, state = FAST(watch_every=100, fall=0.2), CollapseMonitor()
    few, looks = batch, []
    batch = Batch(batch.x.repeat(40, 1, 1, 1), batch.y.repeat(40))
    for images, accuracy in ((50, None), (100, 0.9), (150, None), (200, 0.75), (300, 0.5)):
        ctx = Context(rng.generator(0), images, mean=lambda x, a=accuracy: looks.append(x) or torch.tensor(a))
        if accuracy == 0.5:
            with pytest.raises(EarlyStop, match="PGD-5 fell from 75% to 50%"):
                objective.after(net, batch, batch.x, state, Loss(torch.tensor(0.0), {}), ctx)
        else:
            objective.after(net, batch, batch.x, state, Loss(torch.tensor(0.0), {}), ctx)
    assert len(looks) == 3
    state = CollapseMonitor(100, 0.75)  # of few images a fall from 75 % to 50 % may be chance
    ctx = Context(rng.generator(0), 200, mean=lambda x: torch.tensor(0.5))
    objective.after(net, few, few.x, state, Loss(torch.tensor(0.0), {}), ctx)
    assert state.accuracy == 0.5


def test_free_replays_a_batch_and_keeps_its_perturbation(net, batch):
    objective = FREE(eps=0.05, replays=3, step_size=0.02)
    theirs_net = copy.deepcopy(net)
    state, ctx = objective.init(batch.x, rng.generator(0)), Context(rng.generator(0))
    ours, theirs = (torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in (net, theirs_net))
    delta = torch.zeros_like(batch.x)
    for x in (batch.x, batch.x.flip(0)):  # two batches: the perturbation outlives the first
        for _ in range(objective.replays):
            found = objective.search(net, Batch(x, batch.y), state, ctx)
            loss = objective.loss(net, Batch(x, batch.y), found, state, ctx)
            ours.zero_grad()
            loss.total.backward()
            ours.step()
            objective.after(net, Batch(x, batch.y), found, state, loss, ctx)
        delta, losses = reference.free_steps(theirs_net, theirs, x, batch.y, delta, 0.05, 0.02, 3)
        close(state.delta, delta)
        close(loss.total.item(), losses[-1])
    close(list(net.parameters()), list(theirs_net.parameters()))
    assert delta.abs().max() <= 0.05 + 1e-12


@pytest.mark.parametrize("inner", [AT(Attack(eps=0.05, steps=2)), TRADES(Attack(eps=0.05, steps=2, start="uniform"))])
def test_awp(net, inside, inner):
    """Direction and gradient; the search moves neither weights nor running statistics."""
    before = copy.deepcopy(net.state_dict())
    objective, ctx = AWP(inner, gamma=0.1), Context(rng.generator(0))
    found = objective.search(net, inside, None, ctx)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    total = objective.loss(net, inside, found, None, ctx).total
    if isinstance(inner, TRADES):
        expected = reference.trades_awp(net, inside.x, found.inner, inside.y, inner.beta, 0.1)
    else:
        expected = reference.at_awp(net, found.inner, inside.y, 0.1)
    close(gradients(net, total), expected)
    assert set(found.moves) == {"0.weight", "4.weight"}
    plain = gradients(net, inner.loss(net, inside, found.inner, None, ctx).total)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(plain, expected, strict=True))
    early = dataclasses.replace(objective, warmup=1000).search(net, inside, None, ctx)
    assert early.moves == {}


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(net, inside, adaptive):
    objective, before = SAM(AT(Attack(eps=0.05, steps=2)), rho=0.3, adaptive=adaptive), copy.deepcopy(net.state_dict())
    found = objective.search(net, inside, None, Context(rng.generator(0)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert found.moves.keys() == dict(net.named_parameters()).keys()
    if not adaptive:
        close(torch.cat([v.flatten() for v in found.moves.values()]).norm().item(), 0.3)
    ours = gradients(net, objective.loss(net, inside, found, None, Context(None)).total)
    loss = lambda model: reference.at_loss(model, found.inner, inside.y)
    plain = list(torch.autograd.grad(loss(net), list(net.parameters())))
    close(ours, reference.sam_gradient(net, loss, 0.3, adaptive))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(ours, plain, strict=True))


def test_negatives_from_noise(net, batch):
    """x ← x - step ∇E + noise ε with the very same draws; in eval mode; not clamped."""
    generator = rng.generator(0)
    objective = MLE(SHORT, data_noise=0.1)
    found = objective.search(net, batch, None, Context(rng.generator(0)))
    draw = lambda kind: kind(batch.x.shape, generator=generator, dtype=torch.float64)
    noisy, start = batch.x + 0.1 * draw(torch.randn), draw(torch.rand)
    noises = [draw(torch.randn) for _ in range(4)]
    quiet = copy.deepcopy(net).eval()
    energy = lambda x: reference.marginal_energy(quiet, x)
    close(found.positive, noisy)
    close(found.negative, reference.sgld(energy, start, noises, 0.3, 0.02))
    assert found.negative.min() < 0
    boxed = dataclasses.replace(objective, negatives=dataclasses.replace(SHORT, clamp=True))
    found = boxed.search(net, batch, None, Context(rng.generator(0)))
    close(found.negative, reference.sgld(energy, start, noises, 0.3, 0.02, box=True))


def test_chains_go_on_where_they_were(net, batch):
    negatives = dataclasses.replace(SHORT, buffer=20, restart=0.3, noise=0.0)
    objective = JEM(negatives, data_noise=0.0)
    state = objective.init(batch.x.float(), rng.generator(5))
    buffer = state.chains.clone()
    ctx = Context(rng.generator(0))
    found = objective.search(net, batch, state, ctx)
    assert torch.equal(state.chains, buffer), "only after the step"
    slots, start = type(state)(buffer.clone()).draw(6, 0.3, rng.generator(0))
    quiet = copy.deepcopy(net).eval()
    energy = lambda x: reference.marginal_energy(quiet, x)
    close(found.negative, reference.sgld(energy, start.double(), torch.zeros(4, *batch.x.shape), 0.3, 0.0))
    objective.after(net, batch, found, state, None, ctx)
    close(state.chains, reference.replay_store(buffer, slots, found.negative.float()))


def test_chains_begin_and_restart_at_outside_images(net, batch):
    """A chain that has not begun starts there, whatever ``restart`` is; without a buffer all do."""
    outside = torch.rand(batch.x.shape, generator=rng.generator(4), dtype=torch.float64)
    batch, ctx = batch._replace(outside=outside), Context(rng.generator(0))
    quiet = copy.deepcopy(net).eval()
    energy, still = lambda x: reference.marginal_energy(quiet, x), torch.zeros(4, *batch.x.shape)
    from_outside = reference.sgld(energy, outside.float().double(), still, 0.3, 0.0)
    negatives = dataclasses.replace(SHORT, buffer=6, restart=0.0, noise=0.0, start="outside")
    objective = JEM(negatives, data_noise=0.0)
    assert objective.needs == {"labels", "outside"}
    assert MLE(negatives).needs == {"outside"}
    state = objective.init(batch.x.float(), rng.generator(5))
    found = objective.search(net, batch, state, ctx)
    close(found.negative, from_outside)
    objective.after(net, batch, found, state, None, ctx)
    second = objective.search(net, batch, state, ctx)  # goes on from where the chains are
    close(second.negative, reference.sgld(energy, state.chains[second.slots].double(), still, 0.3, 0.0))
    again = dataclasses.replace(objective, negatives=dataclasses.replace(negatives, restart=1.0))
    close(again.search(net, batch, state, ctx).negative, from_outside)
    short = dataclasses.replace(objective, negatives=dataclasses.replace(negatives, buffer=0))
    close(short.search(net, batch, None, ctx).negative, reference.sgld(energy, outside, still, 0.3, 0.0))


def test_proximal_steps_are_those_of_sada_jem(net, batch):
    """x ← clamp(x + clamp(∇LSE, -1, 1), -1, 1) in [-1, 1] is a step of 0.25 with limit 0.5, clamped, in [0, 1]."""
    loud = copy.deepcopy(net).eval()
    with torch.no_grad():
        loud[-1].weight *= 300  # so that most components are cut
    own = SGLD(steps=3, noise=0.0, buffer=0, clamp=True, limit=0.5)
    x, cut = 2 * torch.rand(batch.x.shape, generator=rng.generator(0), dtype=torch.float64) - 1, []
    for _ in range(3):
        v = x.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loud((v + 1) / 2).logsumexp(1).sum(), v)
        cut.append((g.abs() > 1).double().mean().item())
        x = (x + g.clamp(-1, 1)).clamp(-1, 1)
    assert 0.05 < min(cut) <= max(cut) < 1
    found = JEM(own, data_noise=0.0).search(loud, batch, None, Context(rng.generator(0)))
    close(found.negative, (x + 1) / 2)


def test_searches_with_statistics_of_the_chains(net, batch):
    """With ``search_mode`` train the energies are those of train mode, and running statistics stay as they were."""
    before, objective = copy.deepcopy(net.state_dict()), JEM(SHORT, data_noise=0.0, search_mode="train")
    found = objective.search(net, batch, None, Context(rng.generator(0)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    generator, loud = rng.generator(0), copy.deepcopy(net).train()
    draw = lambda kind: kind(batch.x.shape, generator=generator, dtype=torch.float64)
    start, noises = draw(torch.rand), [draw(torch.randn) for _ in range(4)]
    close(found.negative, reference.sgld(lambda x: reference.marginal_energy(loud, x), start, noises, 0.3, 0.02))
    quiet = JEM(SHORT, data_noise=0.0).search(net, batch, None, Context(rng.generator(0)))
    assert (found.negative - quiet.negative).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [MLE, JEM, JEAT])
def test_keeps_statistics_that_are_frozen(kind, net, batch):
    """With ``freeze_norms`` loss and gradients are those of eval mode, and the statistics stay as they were."""
    before, quiet, ctx = copy.deepcopy(net.state_dict()), copy.deepcopy(net).eval(), Context(rng.generator(0))
    objective = kind(SHORT, freeze_norms=True)
    loss = objective.loss(net, batch, objective.search(net, batch, None, ctx), None, ctx)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    _, expected, gradient = step(kind(SHORT), quiet, batch)
    close(loss.total, expected.total)
    close(gradients(net, loss.total), gradient)
    assert (step(kind(SHORT), net, batch)[1].total - expected.total).abs() > 1e-3


def test_jem_lowers_the_energy_of_the_other_view(net, batch):
    view = batch.x.flip(3)
    objective = JEM(SHORT, data_noise=0.1, weight=0.3, positives="view")
    assert objective.needs == {"labels", "view"}
    found, loss, ours = step(objective, net, batch._replace(view=view))
    close(found.positive, view + 0.1 * torch.randn(view.shape, generator=rng.generator(0), dtype=torch.float64))
    expected = nn.functional.cross_entropy(net(batch.x), batch.y)
    expected = expected + 0.3 * reference.mle_loss(net, found.positive, found.negative)
    close(loss.total, expected)
    close(ours, gradients(net, expected))


def test_jem_at_the_scale_of_its_code(net, batch):
    """Step 1 and noise 0.01 in [-1, 1] are a quarter and a half of that in [0, 1]: the default."""
    draw = rng.generator(3)
    start = torch.rand(batch.x.shape, generator=draw, dtype=torch.float64)
    noises = torch.randn(20, *batch.x.shape, generator=draw, dtype=torch.float64)
    quiet = copy.deepcopy(net).eval()
    wide = reference.jem_sgld(lambda v: reference.marginal_energy(quiet, (v + 1) / 2), 2 * start - 1, noises)
    own = SGLD()
    ours = reference.sgld(lambda x: reference.marginal_energy(quiet, x), start, noises, own.step_size, own.noise)
    close(ours, (wide + 1) / 2)
    assert (own.steps, own.buffer, own.restart, JEM().data_noise) == (20, 10_000, 0.05, 0.03 / 2)


@pytest.mark.parametrize("objective", [MLE(SHORT), JEM(SHORT), JEM(SHORT, weight=0.3)])
def test_likelihood_losses(net, batch, objective):
    found, loss, ours = step(objective, net, batch)
    if isinstance(objective, MLE):
        expected = reference.mle_loss(net, found.positive, found.negative)
    else:
        full = reference.jem_loss(net, found.positive, found.negative, found.positive, batch.y)
        likelihood = reference.mle_loss(net, found.positive, found.negative)
        expected = full - (1 - objective.weight) * likelihood
    close(loss.total, expected)
    close(ours, gradients(net, expected))


def test_jeat(net, inside):
    """Search and loss of algorithm 1; its sum is the cancelled form; the printed eq. 20 is not."""
    attack = Attack(eps=0.05, steps=1, step_size=0.05, loss="energy")
    found, loss, ours = step(JEAT(SHORT, attack=attack), net, inside)
    generator, quiet = rng.generator(0), copy.deepcopy(net).eval()
    draw = lambda kind: kind(inside.x.shape, generator=generator, dtype=torch.float64)
    start, noises = draw(torch.rand), [draw(torch.randn) for _ in range(4)]
    close(found.negative, reference.sgld(lambda x: reference.marginal_energy(quiet, x), start, noises, 0.3, 0.02))
    shift = 0.05 * (2 * draw(torch.rand) - 1)
    close(found.positive, reference.prejeat_search(quiet, inside.x, inside.y, shift, 0.05, box=True))
    for form in (reference.jeat_loss, reference.jeat_loss_cancelled):
        expected = form(net, found.positive, inside.y, found.negative)
        close(loss.total, expected)
        close(ours, gradients(net, expected))
    joint = reference.joint_energy(net, found.positive, inside.y).mean()
    printed = joint + reference.marginal_energy(net, found.negative).mean()
    assert any((a - b).abs().max() > 1e-2 for a, b in zip(ours, gradients(net, printed), strict=True))


def test_prejeat(net, inside):
    objective = PreJEAT(Attack(eps=0.05, steps=1, step_size=0.05, loss="energy"))
    found, _, ours = step(objective, net, inside)
    start = 0.05 * (2 * torch.rand(inside.x.shape, generator=rng.generator(0), dtype=torch.float64) - 1)
    close(found, reference.prejeat_search(copy.deepcopy(net).eval(), inside.x, inside.y, start, 0.05, box=True))
    close(ours, gradients(net, reference.at_loss(net, found, inside.y)))
    assert PreJEAT().attack.loss == "energy"


@pytest.mark.parametrize("objective", [MLE(SHORT), JEM(SHORT), JEAT(SHORT)])
def test_squared_energies_hold_the_scale(net, batch, objective):
    found, plain, _ = step(objective, net, batch)
    held = dataclasses.replace(objective, energy_l2=0.1)
    total = held.loss(net, batch, found, None, Context(rng.generator(0))).total
    squares = sum(reference.marginal_energy(net, x).square().mean() for x in (found.positive, found.negative))
    close(total - plain.total, 0.1 * squares)


def test_rst_trains_on_the_joint_batch(net, inside, small_run):
    """Pseudo-labels are the teacher's; the loss is the inner one of one batch with one mean."""
    teacher = small_run.model()[0]
    objective = RST(str(small_run.folder), Standard())
    x, extra = (torch.rand(6, 1, 8, 8, generator=rng.generator(i)) for i in (1, 2))
    model = copy.deepcopy(teacher).train()
    batch = Batch(x, torch.arange(6), extra=extra)
    _, loss, ours = step(objective, model, batch)
    labels = teacher(extra).argmax(1)
    expected = reference.rst_loss(model, x, batch.y, extra, labels, 1.0)
    close(loss.total, expected)
    close(ours, gradients(model, expected), 1e-5)
    assert objective.needs == {"labels", "extra"}
    with pytest.raises(UserError, match="there is no run or model at nowhere"):
        RST("nowhere").init(x, rng.generator(0))
    with pytest.raises(UserError, match="does not take images of 3 x 8 x 8"):
        objective.init(torch.zeros(6, 3, 8, 8), rng.generator(0))
    with pytest.raises(UserError, match="on labelled images, not RST"):
        RST("nowhere", RST("nowhere"))


def test_energy_changes_of_attack_and_update(net, inside):
    """JEAT eq. 15, across a real update."""
    found, _, direction = step(AT(Attack(eps=0.1, steps=3)), net, inside)
    before = copy.deepcopy(net).eval()
    shift = EnergyShift(net, inside, found)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for p, g in zip(net.parameters(), direction, strict=True):
        p.grad = g
    optimizer.step()
    terms = shift.terms()
    changes = reference.jeat_eq15(before, copy.deepcopy(net).eval(), inside.x, found, inside.y)
    names = ("attack_joint", "attack_marginal", "update_joint", "update_marginal")
    for name, change in zip(names, changes, strict=True):
        assert terms[f"shift/{name}"] == pytest.approx(change.mean().item(), abs=1e-9)
        assert terms[f"shift/{name}_sd"] == pytest.approx(change.std(correction=0).item(), abs=1e-9)
    assert terms["shift/attack_joint"] > 0
    assert net.training


# CEM's identities -------------------------------------------------------------------------------------------------


def test_the_contrastive_gradient_is_that_of_adversarial_training(net, inside):
    """CEM eq. 16: E[∇f(x̂, y) - ∇f(x̂, ŷ)] = -∇CE(x̂, y)."""
    net.eval()
    found, _, ours = step(AT(Attack(eps=0.1, steps=3)), net, inside)
    close([-g for g in ours], reference.cem_contrastive(net, found, inside.y))


def test_the_likelihood_gradient_falls_into_two(net, inside):
    """CEM section 3 (its second equation of the minimisation process, corrected): consistency + contrastive."""
    net.eval()
    moved = inside.x + 0.1 * torch.randn(inside.x.shape, generator=rng.generator(0), dtype=torch.float64)
    parts = reference.cem_consistency(net, inside.x, moved, inside.y), reference.cem_contrastive(net, moved, inside.y)
    whole = reference.cem_likelihood(net, inside.x, inside.y, moved)
    close([a + b for a, b in zip(*parts, strict=True)], whole)
    _, _, standard = step(Standard(), net, inside)
    close(reference.cem_likelihood(net, inside.x, inside.y, inside.x), [-g for g in standard])


def test_jeat_ascends_the_likelihood_gradient(net, inside):
    """With clean images for x̂ it is CEM's likelihood gradient with SGLD negatives, exactly."""
    net.eval()
    objective = JEAT(SHORT, attack=Attack(eps=0.0, steps=1, loss="energy"))
    found, _, ours = step(objective, net, inside)
    close([-g for g in ours], reference.cem_likelihood(net, inside.x, inside.y, found.negative))


def test_fgsm_ep_goes_on_from_the_last_epoch(net):
    """Two epochs of a loader with crops and mirror images: the second step starts where the first one ended.

    The perturbation of an image is followed by hand: pixel by pixel, through the positions that a picture of numbers
    has after the same augmentation.
    """
    count, size = 6, 8
    images = Images(torch.randint(60, 190, (count, 3, size, size), dtype=torch.uint8), torch.arange(count) % 3)
    load = Loader(images, seed=0, batch=count, streams=1, augment=(Augment(crop=2, flip=True),))
    objective = FGSMEP(Attack(eps=0.06, steps=1, step_size=0.05))
    state, kept = objective.init(torch.empty(count, 3, size, size), rng.generator(0)), {}
    for epoch in range(2):
        draws = lambda epoch=epoch: rng.generator("draws", epoch)
        (x,), y = load(epoch * count, 0, draws())
        origin = load.trace(epoch * count, 0, draws())
        for k, image, pixels in zip(origin.images.tolist(), x, origin.pixels, strict=True):
            source = images.x[k].flatten(1) / 255
            torch.testing.assert_close(image, torch.where(pixels >= 0, source[:, pixels.clamp_min(0)], 0.0))
        batch = Batch(x.double(), y, origin=origin)
        found = objective.search(net, batch, state, Context(rng.generator("start", epoch)))
        if epoch == 0:
            start = batch.x + 0.06 * (
                2 * torch.rand(x.shape, generator=rng.generator("start", 0), dtype=torch.float64) - 1
            )
            start = start.clamp(0, 1)
        else:
            start = batch.x.clone()
            for row, (k, pixels) in enumerate(zip(origin.images.tolist(), origin.pixels, strict=True)):
                for c, i, j in itertools.product(range(3), range(size), range(size)):
                    start[row, c, i, j] += kept[k].get((c, int(pixels[i, j])), 0.0)
            start = (batch.x + (start - batch.x).clamp(-0.06, 0.06)).clamp(0, 1)
        net.eval()
        at = start.double().requires_grad_()
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(at), y, reduction="sum"), at)
        moved = start + 0.05 * slope.sign()
        moved = (batch.x + (moved - batch.x).clamp(-0.06, 0.06)).clamp(0, 1)
        close(found, moved, 2e-3)  # bytes
        deltas = (found - batch.x).flatten(2)
        for k, delta, pixels in zip(origin.images.tolist(), deltas, origin.pixels.flatten(1), strict=True):
            kept[k] = {(c, int(p)): float(d) for c in range(3) for p, d in zip(pixels, delta[c], strict=True) if p >= 0}
    assert any(-1 in pixels for pixels in origin.pixels.flatten(1))
    copied = objective.init(batch.x, rng.generator(0))
    copied.load_state_dict(state.state_dict())
    close(copied.show(batch.x, origin), state.show(batch.x, origin))
    for bad in (
        {"images_per_step": 5, "attack": Attack(steps=2)},
        {"attack": Attack(steps=2)},
        {"attack": Attack(steps=1, restarts=2)},
    ):
        with pytest.raises(UserError, match="goes on from one perturbation"):
            FGSMEP(**bad)


def test_of_an_image_twice_in_a_batch_the_last_perturbation_is_kept(generator):
    """As at the border of two epochs; scattered writes have no order of their own."""
    kept, images = KeptPerturbations(), torch.tensor([3, 0, 3, 1, 3])
    pixels = torch.arange(16).view(1, 4, 4).expand(5, 4, 4)
    origin, delta = Origin(images, pixels, 5), torch.randn(5, 2, 4, 4, generator=generator)
    kept.show(torch.zeros_like(delta), origin)
    for _ in range(20):
        kept.keep(delta, origin)
        found = kept.show(torch.zeros_like(delta), origin)
        torch.testing.assert_close(found, delta[[4, 1, 4, 3, 4]], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("train.streams", 2, "keeps perturbations in one stream"),
        ("data.augment.x.scale", 0.5, "follows pixels through crops"),
        ("data.augment.x.policy", "color-shape", "follows pixels through crops"),
    ],
)
def test_what_fgsm_ep_cannot_follow_is_refused_before_anything_is_written(tmp_path, option, value, message):
    recipe = tiny("digits-standard", objective="fgsm-ep", **{option: value})
    with pytest.raises(UserError, match=message):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_perturbations_that_do_not_fit_in_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("advebm.data.disk.IN_MEMORY", 1_000)
    with pytest.raises(UserError, match="which do not fit in memory"):
        train(tiny("digits-standard", objective="fgsm-ep"), tmp_path / "run", device="cpu")


def test_pixels_are_followed_through_whole_pictures_only():
    with pytest.raises(UserError, match="cannot be followed"):
        Augment(scale=0.5).trace(torch.zeros(2, 1, 8, 8), rng.generator(0))
    with pytest.raises(UserError, match="labels can be mixed"):
        CutMix(FGSMEP())


# CutMix -----------------------------------------------------------------------------------------------------------


def test_a_mixed_image_has_a_box_of_another_and_labels_by_area(generator):
    """Image k is all k, so each pixel says whose it is; the label's shares are counted from the pixels."""
    count = 300
    x = torch.arange(count, dtype=torch.float64)[:, None, None, None].expand(-1, 2, 9, 12)
    batch = mix(Batch(x, torch.eye(count, dtype=torch.float64)), 1.0, generator)
    torch.testing.assert_close(batch.y.sum(1), torch.ones(count, dtype=torch.float64))
    shares, places = [], set()
    for k, (image, label) in enumerate(zip(batch.x, batch.y, strict=True)):
        assert torch.equal(image[0], image[1])
        foreign = image[0] != k
        others = image[0][foreign].unique().long().tolist()
        assert len(others) <= 1
        assert label[k].item() == pytest.approx(1 - foreign.double().mean().item())
        if others:
            assert label[others[0]].item() == pytest.approx(foreign.double().mean().item())
            rows, columns = foreign.any(1).nonzero(), foreign.any(0).nonzero()
            height, width = (int(v.max() - v.min()) + 1 for v in (rows, columns))
            assert height * width == foreign.sum()
            places.add((int(rows.min()), int(columns.min())))
        shares.append(foreign.double().mean().item())
    assert 0.15 < np.mean(shares) < 0.4  # half, less what lies outside and is rounded down
    assert len(places) > 40


@pytest.mark.parametrize(("alpha", "variance"), [(1.0, 1 / 12), (0.2, 0.25 / 1.4), (4.0, 0.25 / 9)])
def test_shares_are_drawn_from_the_beta_distribution(alpha, variance):
    drawn = draw_beta(alpha, 40_000, rng.generator(0))
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(variance, rel=0.03)


def test_cutmix_attacks_and_trains_the_mixed_loss(net, batch):
    """One signed step up the mean of both cross-entropies by their shares, and that mean is the loss."""
    objective = CutMix(AT(Attack(eps=0.06, steps=1, step_size=0.05, start="clean")))
    found, loss, ours = step(objective, net, batch)
    mixed, x_adv = found
    assert ((mixed.y > 0).sum(1) == 2).any()

    def by_shares(x):
        return -(mixed.y * net(x).log_softmax(1)).sum(1)

    net.eval()
    x = mixed.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(by_shares(x).sum(), x)
    close(x_adv, (mixed.x + 0.05 * slope.sign()).clamp(0, 1))
    net.train()
    expected = by_shares(x_adv).mean()
    close(loss.total, expected)
    close(ours, gradients(net, expected))
    assert objective.adversarial(batch, found) is None
    with pytest.raises(UserError, match="labels can be mixed, standard, AT or TRADES, not JEM"):
        CutMix(JEM())
    with pytest.raises(UserError, match="the margin is that of one label"):
        CutMix(AT(Attack(loss="margin")))
    with pytest.raises(UserError, match="alpha must be > 0"):
        CutMix(alpha=0.0)


@pytest.mark.parametrize("inner", [Standard(smoothing=0.1), TRADES(), FAST()])
def test_cutmix_goes_around_others(net, batch, inner):
    _, loss, ours = step(CutMix(inner), net, batch)
    assert loss.total.isfinite()
    assert 0 <= loss.terms["accuracy"] <= 1
    assert any(g is not None and g.abs().sum() > 0 for g in ours)


# In the loop ------------------------------------------------------------------------------------------------------

LOOPED = {
    "at": {"objective.attack.steps": 3, "objective.images_per_step": 300},
    "fast": {"objective.watch_every": 256},
    "n-fgsm": {"objective.watch_every": 256},
    "fgsm-ep": {"objective.attack.eps": "0.1", "train.images": 2048, "train.checkpoint_every": 1536},  # two epochs
    "cutmix": {},
    "free": {"objective.replays": 2, "objective.eps": "0.1"},
    "awp": {},
    "sam": {},
    "jem": {"objective.negatives.buffer": 150, "objective.negatives.steps": 3},
    "jeat": {"objective.negatives.buffer": 150, "objective.negatives.steps": 3},
    "mle": {  # whose chains begin in the course of training
        "outside": {"kind": "gaussians", "count": 400},
        "objective.negatives": {"steps": 3, "buffer": 900, "start": "outside"},
    },
    "dat": {
        "outside": {"kind": "patches", "count": 400},
        "objective.attack.steps": 2,
        "objective.curriculum": {"steps": 9, "gate": 0.1, "window": 200, "images_per_step": 500},
    },
}


@pytest.mark.parametrize("kind", LOOPED)
def test_states_survive_an_interruption(tmp_path, kind):
    """Chains, perturbations and watches come back: a resumed run ends with the weights of an uninterrupted one."""
    short = {
        "train.images": 1024,
        "train.checkpoint_every": 512,
        "train.validate_every": 1024,
        "backbone.norm": "group",
    }
    options = {"objective": {"kind": kind}, **short, **LOOPED[kind], "train.log_every": 128}
    recipe = tiny("digits-standard", **options)

    def interrupt(line):
        if line["images"] == recipe.train.images * 7 // 8:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "cut", device="cpu", report=interrupt)
    cut = train(recipe, tmp_path / "cut", resume=True, device="cpu")
    whole = train(recipe, tmp_path / "whole", device="cpu")
    one, two = (load_file(r.checkpoints.path() / "model.safetensors") for r in (cut, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)
    if kind not in ("awp", "sam", "cutmix"):  # what outlives a step, too
        states = [torch.load(r.checkpoints.path() / "state" / "stream-0.pt", weights_only=True) for r in (cut, whole)]
        assert states[0].keys() == states[1].keys()
        values = [[torch.as_tensor(v).nan_to_num(7) for v in state.values()] for state in states]
        assert all(torch.equal(*pair) for pair in zip(*values, strict=True))
        assert kind != "fast" or states[0]["images"] > 0
        assert kind != "dat" or (states[0]["steps"] > 2 and len(states[0]["seen"]) > 0)
    lines = [line for line in whole.history() if "train/loss" in line]
    assert lines
    if kind == "mle":
        assert 0 < len(whole.chains().train) < 900 == len(states[0]["chains"])
    attacked = kind not in ("jem", "mle", "cutmix")
    assert all(("shift/attack_joint" in line) == attacked for line in lines)
    assert not attacked or lines[-1]["shift/attack_joint"] > 0


def test_a_collapse_ends_training_at_the_checkpoint_before(tmp_path, monkeypatch):
    def fall(self, model, batch, found, state, loss, ctx):
        if ctx.images >= 1280:
            raise EarlyStop("accuracy fell")

    monkeypatch.setattr(FAST, "after", fall)
    recipe = tiny("digits-standard", objective="fast", train__checkpoint_every=512)
    with pytest.warns(RuntimeWarning, match="accuracy fell: stopped at 1,024 images"):
        run = train(recipe, tmp_path / "run", device="cpu")
    assert run.checkpoints.path().name == "1024"
    assert max(line["images"] for line in run.history()) == 1024
    assert run.history()[-1]["event"] == "early stop"
    before = run.history()
    assert train(run.recipe, run.folder, resume=True, device="cpu").history() == before  # it has ended
    assert "Early stop" in report(run).read_text()


def test_bad_settings_are_refused(tmp_path, batch):
    for make, message in (
        (lambda: TRADES(Attack(start="clean")), "the KL is flat"),
        (lambda: TRADES(beta=-1), "beta is a weight >= 0"),
        (lambda: AT(smoothing=1.0), "smoothing is the share of a label"),
        (lambda: NFGSM(noise=-1.0), "noise is a radius in units of eps"),
        (lambda: FAST(fall=0), "fall in"),
        (lambda: FAST(Attack(steps=4)), "training by one step, got attack.steps 4"),
        (lambda: PreJEAT(Attack(steps=1)), "attack.loss is energy, got cross-entropy"),
        (lambda: JEAT(attack=Attack(steps=1)), "attack.loss is energy, got cross-entropy"),
        (lambda: JEM(weight=-1), "weight must be >= 0"),
        (lambda: FREE(eps=8), "write 8/255, not 8"),
        (lambda: FREE(replays=0), "replays must be at least 1"),
        (lambda: AWP(FREE()), "without replays, not FREE"),
        (lambda: AWP(gamma=-1), "gamma and warmup must be >= 0"),
        (lambda: SGLD(restart=2), "restart in"),
        (lambda: SGLD(step_size=0), "step_size must be > 0"),
        (lambda: SGLD(limit=0), "limit must be > 0 or none, got 0"),
        (lambda: SGLD(start="class"), "start"),
        (lambda: SAM(rho=-1), "rho must be >= 0, got -1"),
        (lambda: JEM(SGLD(buffer=4)).init(batch.x, rng.generator(0)), "4 chains is smaller than the 6 images"),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_a_buffer_that_is_too_small_leaves_no_run_behind(tmp_path):
    recipe = tiny("digits-standard", objective="jem", **{"objective.negatives.buffer": 50})
    with pytest.raises(UserError, match="50 chains is smaller than the 128 images of a step"):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_are_for_objectives_without_labels(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bare.npz", x=x)
    options = {"data": f"npz:{tmp_path / 'bare.npz'}", "backbone.norm": "group", "train.images": 256}
    with pytest.raises(UserError, match="objective Standard needs labels, bare has none"):
        train(tiny("digits-standard", **options), tmp_path / "no", device="cpu")
    assert not (tmp_path / "no").exists()
    short = {"objective.negatives.steps": 2, "objective.negatives.buffer": 150, "train.validate_every": 128}
    run = train(tiny("digits-standard", objective="mle", **options, **short), tmp_path / "run", device="cpu")
    assert run.model()[0](torch.rand(2, 1, 8, 8)).shape == (2, 1)
    assert all("val/accuracy" not in line for line in run.history())
    with pytest.raises(UserError, match="accuracy needs labels"):
        evaluate_run(run)


def test_a_resumed_run_with_another_buffer_is_refused(tmp_path):
    recipe = tiny("digits-standard", objective="mle", **{"objective.negatives.buffer": 150, "train.images": 128})
    run = train(recipe, tmp_path / "run", device="cpu")
    text = (run.folder / "config.yaml").read_text()
    assert text.count("buffer: 150") == 1
    (run.folder / "config.yaml").write_text(text.replace("buffer: 150", "buffer: 160"))
    changed = Run.open(run.folder).recipe
    with pytest.raises(UserError, match=r"holds \(150, 1, 8, 8\) chains, this run expects \(160, 1, 8, 8\)"):
        train(changed, run.folder, resume=True, device="cpu")


def test_objectives_round_trip():
    for objective in (AWP(TRADES(beta=2.0), gamma=0.005), RST("x", AWP(TRADES())), JEAT(SHORT)):
        assert config.build(config.describe(objective), "objective") == objective


def test_the_search_of_at_grows_step_by_step(net, batch):
    """After every 100 images one step more, up to those of the attack; the cost is that of the mean."""
    objective = AT(Attack(eps=0.1, norm="l2", steps=3, step_size=None), images_per_step=100)
    state = objective.init(batch.x, rng.generator(0))
    for images, steps in ((0, 1), (99, 1), (100, 2), (199, 2), (200, 3), (900, 3)):
        ctx = Context(rng.generator(1), images)
        found = objective.search(net, batch, state, ctx)
        fixed = AT(dataclasses.replace(objective.attack, steps=steps))
        assert torch.equal(found, fixed.search(net, batch, None, Context(rng.generator(1), images)))
        assert objective.loss(net, batch, found, state, ctx).terms["steps"] == steps
    with pytest.raises(UserError, match=r"for a search of several steps, got 100 and attack\.steps 1"):
        AT(Attack(steps=1), images_per_step=100)
    with pytest.raises(UserError, match="a number of images >= 1"):
        AT(images_per_step=0)
    options = {"train.images": 60_000, "train.batch": 100, "objective.attack.steps": 3, "objective.attack.restarts": 2}
    costs = [
        cost.estimate(resolve(recipes.find("digits-at"), [*options.items(), *more.items()])).training
        for more in ({"objective.images_per_step": 20_000}, {"objective.attack.steps": 2})
    ]
    assert costs[0] == pytest.approx(costs[1])  # 20,000 images each of 1, 2 and 3 steps
