"""Classifiers trained with outside data, against independent re-derivations on one small network in float64."""

import copy
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from advebm.attacks.projected import Attack
from advebm.core import config, console, rng
from advebm.core.errors import UserError
from advebm.data.negatives import Patches
from advebm.data.sources import Digits
from advebm.metrics import ood
from advebm.objectives.at import AT
from advebm.objectives.base import Batch, Context
from advebm.objectives.curriculum import Curriculum, auroc
from advebm.objectives.dat import DAT
from advebm.objectives.gat import GAT
from advebm.objectives.outlier import OE, RATIO, Pair, doubt, uniform_cross_entropy
from advebm.objectives.standard import Standard
from advebm.runs.run import Run
from advebm.training.loop import train
from advebm.workflows import train as train_workflow
from tests.helpers import tiny
from tests.objectives.test_supervised import close, gradients, step
from tests.references import objectives as reference

SMALL = {"norm": "l2", "step_size": 0.2, "start": "clean", "momentum": 0.9}


@pytest.fixture
def moved(net):
    """The network with running statistics that are not those of any batch, so that modes can be told apart."""
    net[1].running_mean.copy_(torch.linspace(-0.3, 0.4, 8))
    net[1].running_var.copy_(torch.linspace(0.5, 1.5, 8))
    return net


def quiet(net):
    return copy.deepcopy(net).eval()


# Outlier Exposure and RATIO -------------------------------------------------------------------------------------------


def test_oe(moved, batch):
    found, loss, ours = step(OE(weight=0.7), moved, batch)
    assert found == Pair(batch.x, batch.outside)
    expected = reference.oe_loss(moved, batch.x, batch.y, batch.outside, 0.7)
    close(loss.total, expected)
    close(ours, gradients(moved, expected))
    assert OE().weight == 0.5


def test_the_uniform_target_is_the_mean_over_classes(net, batch):
    net.eval()
    ours = uniform_cross_entropy(net(batch.outside))
    assert ours.shape == (6,)
    close(ours.mean(), reference.uniform_cross_entropy(net, batch.outside))
    close(uniform_cross_entropy(torch.full((2, 5), 7.0)), torch.full((2,), math.log(5)))
    assert (ours > math.log(5)).all()


def test_oe_without_weight_is_standard_training(net, batch):
    """In eval mode; in train mode the outside images still take part in the batch's statistics."""
    net.eval()
    _, standard, theirs = step(Standard(), net, batch)
    _, loss, ours = step(OE(weight=0.0), net, batch)
    close(loss.total, standard.total)
    close(ours, theirs)


def test_ratio(moved, batch):
    objective = RATIO(Attack(eps=0.5, steps=3, **SMALL), Attack(eps=0.9, steps=6, **SMALL), weight=0.6)
    found, loss, ours = step(objective, moved, batch)
    f = quiet(moved)
    raised = lambda x: nn.functional.cross_entropy(f(x), batch.y, reduction="none")
    close(found.inside, reference.momentum_ascent(raised, batch.x, 0.5, 0.2, 3, 0.9))
    sure = lambda x: reference.confidence(f, x)
    close(found.outside, reference.momentum_ascent(sure, batch.outside, 0.9, 0.2, 6, 0.9))
    assert (sure(found.outside) > sure(batch.outside) + 0.05).all()
    assert (found.outside - batch.outside).flatten(1).norm(dim=1).max() > 0.6, "its own, larger ball"
    expected = reference.ratio_loss(moved, found.inside, batch.y, found.outside, 0.6)
    close(loss.total, expected)
    close(ours, gradients(moved, expected))


def test_ratio_at_rest_is_half_of_standard_training(net, batch):
    net.eval()
    still = Attack(eps=0.0, steps=1, **SMALL)
    _, standard, theirs = step(Standard(), net, batch)
    _, loss, ours = step(RATIO(still, still, weight=0.0), net, batch)
    close(loss.total, standard.total / 2)
    close(ours, [g / 2 for g in theirs])
    _, exposed, theirs = step(OE(weight=0.3), net, batch)
    _, loss, ours = step(RATIO(still, still, weight=0.3), net, batch)
    close(loss.total, exposed.total / 2)
    close(ours, [g / 2 for g in theirs])


def test_defaults_are_those_of_the_papers():
    inside, outside = RATIO().attack, RATIO().outside_attack
    assert (inside.eps, inside.steps, inside.step_size, inside.momentum, inside.norm) == (0.5, 10, 0.1, 0.9, "l2")
    assert (outside.eps, outside.steps, outside.step_size, outside.momentum) == (1.0, 20, 0.1, 0.9)
    gat, dat = GAT().attack, DAT()
    assert (gat.eps, gat.steps, gat.norm, gat.start) == (8 / 255, 40, "linf", "uniform")
    assert gat.step_size == pytest.approx(0.5 / 255)
    attack = dat.attack
    assert (attack.eps, attack.steps, attack.step_size, attack.start, attack.norm) == (0.5, 10, 0.1, "clean", "l2")
    assert (dat.ascend, dat.step_size, dat.r1) == ("class", 0.1, 0)
    assert dat.curriculum == Curriculum(start=0, steps=50, gate=0.8, window=1000)


def test_momentum_is_that_of_the_loop(net, batch):
    """Without it, the attack is the plain one; a linf attack has none."""
    f = quiet(net)
    plain = Attack(eps=0.5, norm="l2", steps=4, step_size=0.2, start="clean")
    raised = lambda x: nn.functional.cross_entropy(f(x), batch.y, reduction="none")
    close(plain.raise_loss(f, batch.x, batch.y, None), reference.momentum_ascent(raised, batch.x, 0.5, 0.2, 4, 0.0))
    for options in ({"momentum": 0.9}, {"norm": "l2", "momentum": 1.0}, {"norm": "l2", "momentum": -0.1}):
        with pytest.raises(UserError, match=r"momentum must lie in \[0, 1\) and is for norm l2"):
            Attack(**options)


@pytest.mark.parametrize("objective", [OE(), RATIO()], ids=["oe", "ratio"])
def test_what_outlier_training_logs(objective, net, batch):
    net.eval()
    found, loss, _ = step(objective, net, batch)
    inside, outside = net(found.inside), net(found.outside)
    close(loss.terms["loss"], loss.total.detach())
    close(loss.terms["uniform"], uniform_cross_entropy(outside).mean().detach())
    close(loss.terms["energy_outside"], -outside.logsumexp(1).mean().detach())
    close(loss.terms["energy_marginal"], -inside.logsumexp(1).mean().detach())
    close(loss.terms["energy_joint"], -inside[range(6), batch.y].mean().detach())
    unsure = [(1 - reference.confidence(net, x)).detach() for x in found]
    assert loss.terms["auroc"].item() == pytest.approx(ood.auroc(*unsure).value)
    close(doubt(inside).exp(), 1 / reference.confidence(net, found.inside))


# DAT ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascend", ["class", "marginal"])
def test_dat(moved, batch, ascend):
    """Search and loss with batch norm at its running statistics, which do not move."""
    objective = DAT(Attack(eps=0.5, norm="l2", steps=3, start="clean"), ascend, 0.3, Curriculum(start=4))
    state = objective.init(batch.x, rng.generator(0))
    before = copy.deepcopy(moved.state_dict())
    found, loss, ours = step(objective, moved, batch, state=state)
    f, rows = quiet(moved), torch.arange(6)
    likeness = {"class": lambda x: f(x)[rows, batch.y], "marginal": lambda x: f(x).logsumexp(1)}[ascend]
    close(found.contrast, reference.unit_ascent(likeness, batch.outside, 0.3, 4))
    raised = lambda x: nn.functional.cross_entropy(f(x), batch.y, reduction="none")
    close(found.moved, reference.momentum_ascent(raised, batch.x, 0.5, 2.5 * 0.5 / 3, 3, 0.0))
    expected = reference.dat_loss(f, found.moved, batch.y, batch.view, found.contrast)
    close(loss.total, expected)
    close(ours, gradients(f, expected))
    ctx = Context(rng.generator(0))
    objective.loss(moved, batch, found, state, ctx)
    assert all(torch.equal(v, before[k]) for k, v in moved.state_dict().items())
    assert moved.training
    assert moved[1].training
    scores = [-likeness(x).detach() for x in (batch.view, found.contrast)]
    assert loss.terms["auroc"].item() == pytest.approx(ood.auroc(*scores).value)
    assert loss.terms["steps"] == 4


def test_the_energy_of_dat_is_self_annealed(net, batch):
    """Without the classifier's part, half of Binary AT's eq. 14: the energy model's gradient, weighted by its doubt."""
    net.eval()
    still = DAT(Attack(eps=0.0, norm="l2", steps=1, start="clean"), curriculum=Curriculum(start=3))
    found, loss, ours = step(still, net, batch, state=still.init(batch.x, rng.generator(0)))
    _, _, standard = step(Standard(), net, batch)
    rest = [a - b for a, b in zip(ours, standard, strict=True)]
    close(rest, [-g / 2 for g in reference.self_annealed(net, batch.view, found.contrast)])
    s = [net(x).logsumexp(1).detach() for x in (batch.view, found.contrast)]
    close(loss.terms["energy_data"], -s[0].mean())
    close(loss.terms["energy_negative"], -s[1].mean())
    close(loss.terms["binary"], -(s[0].sigmoid().log().mean() + (1 - s[1].sigmoid()).log().mean()) / 2)


def test_r1_of_dat(moved, batch):
    plain, held = DAT(), DAT(r1=0.3)
    state = plain.init(batch.x, rng.generator(0))
    _, loss, ours = step(held, moved, batch, state=state)
    _, without, theirs = step(plain, moved, batch, state=state)
    f = quiet(moved)
    penalty = reference.r1(f, batch.view)
    close(loss.total - without.total, 0.3 * penalty)
    close(loss.terms["r1"], penalty.detach())
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    close(difference, [0.3 * g for g in reference.parameter_gradient(f, penalty)])
    assert max(g.abs().max() for g in difference) > 1e-3
    assert not batch.view.requires_grad


def test_dat_begins_with_the_outside_images_and_climbs(net, batch):
    objective = DAT(curriculum=Curriculum(steps=2, gate=1e-6, window=100))
    state = objective.init(batch.x, rng.generator(0))
    seen = []
    for images in range(0, 500, 100):
        ctx = Context(rng.generator(0), images)
        found = objective.search(net, batch, state, ctx)
        loss = objective.loss(net, batch, found, state, ctx)
        objective.after(net, batch, found, state, loss, ctx)
        seen.append((int(loss.terms["steps"]), torch.equal(found.contrast, batch.outside)))
    assert seen == [(0, True), (1, False), (2, False), (2, False), (2, False)]


# GAT ------------------------------------------------------------------------------------------------------------------


def test_gat(moved, batch):
    objective = GAT(Attack(eps=0.1, steps=3, step_size=0.05))
    found, loss, ours = step(objective, moved, batch)
    assert (found.target != batch.y).all()
    f, draw, rows = quiet(moved), rng.generator(0), torch.arange(6)
    assert torch.equal(found.target, (batch.y + torch.randint(1, 5, (6,), generator=draw)) % 5)
    start = batch.x + 0.1 * (2 * torch.rand(batch.x.shape, generator=draw, dtype=torch.float64) - 1)
    x = start.clamp(0, 1)
    for _ in range(3):  # up the other class's logit
        leaf = x.clone().requires_grad_(True)
        g = torch.autograd.grad(f(leaf)[rows, found.target].sum(), leaf)[0]
        x = torch.minimum(torch.maximum(x + 0.05 * g.sign(), batch.x - 0.1), batch.x + 0.1).clamp(0, 1)
    close(found.moved, x)
    expected = reference.gat_loss(f, batch.x, batch.y, found.moved, found.target)
    close(loss.total, expected)
    close(ours, gradients(f, expected))
    scores = -f(batch.x)[rows, batch.y].detach(), -f(found.moved)[rows, found.target].detach()
    assert loss.terms["auroc"].item() == pytest.approx(ood.auroc(*scores).value)
    close(loss.terms["energy_joint"], scores[0].mean())
    close(loss.terms["energy_negative"], scores[1].mean())


def test_every_other_class_is_a_target(net):
    many = Batch(torch.zeros(600, 3, 8, 8, dtype=torch.float64), torch.full((600,), 3))
    found = GAT(Attack(eps=0.0, steps=1)).search(net, many, None, Context(rng.generator(0)))
    counts = found.target.bincount(minlength=5)
    assert counts[3] == 0
    assert (counts[[0, 1, 2, 4]] - 150).abs().max() < 5 * math.sqrt(600 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OE(weight=-1), "weight must be >= 0, got -1"),
        (lambda: RATIO(weight=-1), "weight must be >= 0, got -1"),
        (lambda: DAT(ascend="both"), "ascend is one of class, marginal"),
        (lambda: DAT(step_size=0), "step_size must be > 0 and r1 >= 0"),
        (lambda: DAT(r1=-1), "step_size must be > 0 and r1 >= 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_objectives_round_trip():
    curriculum = Curriculum(start=1, steps=3, gate=0.7, window=50, images_per_step=9)
    for objective in (OE(0.1), RATIO(weight=2.0), DAT(ascend="marginal", curriculum=curriculum, r1=0.1), GAT()):
        assert config.build(config.describe(objective), "objective") == objective


# In the loop ----------------------------------------------------------------------------------------------------------

SHORT = {"outside.count": 500, "train.validate_every": 10_000, "train.log_every": 512, "train.ema": 0}


def logged(run, name):
    return [line[f"train/{name}"] for line in run.history() if f"train/{name}" in line]


def test_outlier_exposure_makes_a_classifier_unsure_outside(tmp_path):
    run = train(
        tiny("digits-oe", **SHORT, **{"train.images": 3072, "backbone.width": 16}), tmp_path / "run", device="cpu"
    )
    patches = Patches(count=500).load().test.float()
    with torch.no_grad():
        inside, outside = (doubt(run.model()[0](x)) for x in (Digits().load().test.float(), patches))
    assert inside.median() < 0.5
    assert outside.mean() > 1.8, "nearly log 10"
    assert logged(run, "auroc")[-1] > 0.95


def test_dat_goes_on_from_adversarial_training_with_its_statistics(tmp_path, monkeypatch):
    """The energy learns to tell patches and what they are moved to from digits; batch norm stays that of stage one."""
    early = {"before.0.train.images": 1024, "before.0.objective.attack.steps": 2, "objective.attack.steps": 2}
    second = {"objective.curriculum": {"start": 3, "steps": 3}, "train.images": 2048, "optimizer.lr": 0.1}
    run = train(tiny("digits-dat", **SHORT, **early, **second), tmp_path / "run", device="cpu")
    first = Run.open(run.folder / "before" / "0-digits-dat-at")
    assert isinstance(first.recipe.objective, AT)
    before, after = (load_file(r.checkpoints.path() / "model.safetensors") for r in (first, run))
    running = [name for name in before if "running" in name]
    assert running
    assert all(torch.equal(before[name], after[name]) for name in running)
    assert not torch.equal(before["head.weight"], after["head.weight"])
    assert logged(run, "binary")[-1] < 0.7 * logged(run, "binary")[0]
    assert logged(run, "energy_negative")[-1] > logged(run, "energy_data")[-1] + 1
    assert logged(run, "steps")[-1] == 3
    assert counted(run, monkeypatch) == [(3072, 3072)]
    shutil.rmtree(run.folder / "checkpoints")
    assert counted(run, monkeypatch) == [(1024, 3072)], "of the first stage"


def counted(run, monkeypatch):
    """What the bar of a resumed run begins with, and ends with."""
    bars, real = [], console.bar
    monkeypatch.setattr(
        console, "bar", lambda name, total, done: (bars.append((done, total)), real(name, total, done))[1]
    )
    monkeypatch.setattr(train_workflow, "train", lambda *given, **options: run)
    train_workflow.fit(run.recipe, run.folder, resume=True)
    monkeypatch.undo()
    return bars


def test_detectors_learn_to_refuse_what_is_moved_to_them(tmp_path):
    attack = {"objective.attack.steps": 3, "objective.attack.step_size": 0.1, "optimizer.lr": 0.1}
    changes = {"before.0.train.images": 2048, "train.images": 3072, **attack}
    short = {name: value for name, value in SHORT.items() if name != "outside.count"}
    run = train(tiny("digits-gat", **short, **changes), tmp_path / "run", device="cpu")
    found, loss = logged(run, "auroc"), logged(run, "loss")
    assert found[-1] > found[0] + 0.03
    assert loss[-1] < 0.93 * loss[0]
    data = Digits().load().test
    with torch.no_grad():
        assert (run.model()[0](data.float()).argmax(1) == data.y).float().mean() > 0.85, "argmax f_k classifies"


# The curriculum -------------------------------------------------------------------------------------------------------


def climb(curriculum, readings, level=None, first=0):
    """The steps of each batch of 100 images, told the AUROC of each before."""
    level = level or curriculum.init()
    steps = []
    for i, reading in enumerate(readings, first):
        curriculum.advance(level, 100 * i)
        steps.append(level.steps)
        level.note(torch.tensor([reading]), 100 * i)
    return steps, level


def test_steps_grow_when_a_window_is_told_apart():
    curriculum = Curriculum(start=1, steps=3, gate=0.8, window=200)
    assert climb(curriculum, [0.9] * 3)[0] == [1, 1, 2]  # a window is full at the batch that begins at its end
    assert climb(curriculum, [0.9, 0.5, 0.9, 0.9, 0.9])[0] == [1, 1, 1, 1, 2], "windows overlap"
    assert climb(curriculum, [0.9] * 5)[0] == [1, 1, 2, 2, 3], "K stays for a window"
    assert climb(curriculum, [0.81] * 12)[0][-1] == 3, "K stays at its largest"
    assert climb(Curriculum(gate=0.75, window=200), [0.75] * 12)[0][-1] == 0, "the gate is to be exceeded"
    assert climb(Curriculum(start=2, steps=2), [1.0] * 30)[0] == [2] * 30
    assert climb(curriculum, [math.nan] * 12)[0][-1] == 1


def test_steps_grow_in_time():
    late = Curriculum(steps=3, gate=None, window=10_000, images_per_step=300)
    assert climb(late, [0.1] * 12)[0] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    both = Curriculum(steps=9, gate=0.8, window=200, images_per_step=300)
    steps, level = climb(both, [0.9] * 3 + [0.1] * 4)
    assert steps == [0, 0, 1, 1, 1, 2, 2], "counted from when the steps last grew"
    assert (level.since, level.at) == (500, [400, 500, 600]), "the last is not forgotten before the next step"


def test_a_level_goes_on_from_a_checkpoint():
    curriculum, readings = Curriculum(steps=5, gate=0.8, window=300), [0.9, 0.2, 0.7, 0.95, 0.9, 0.7, 0.9, 0.9, 0.9]
    whole, _ = climb(curriculum, readings)
    for cut in range(1, len(readings)):
        first, level = climb(curriculum, readings[:cut])
        restored = curriculum.init()
        restored.load_state_dict(level.state_dict())
        rest, _ = climb(curriculum, readings[cut:], restored, cut)
        assert first + rest == whole
    assert whole == [0, 0, 0, 0, 0, 1, 1, 1, 2]


def test_auroc_is_that_of_the_metric():
    draw = rng.generator(0)
    inside, outside = torch.randint(9, (40,), generator=draw).double(), torch.randint(4, 14, (30,), generator=draw)
    value = auroc(inside, outside.double())
    assert value.item() == pytest.approx(ood.auroc(inside, outside).value, abs=1e-12)
    assert value > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 30}, "0 <= start <= steps, got 30 and 25"),
        ({"start": -1}, "0 <= start <= steps"),
        ({"gate": None}, "K would never grow"),
        ({"gate": 1.0}, r"gate is an AUROC in \[0, 1\)"),
        ({"gate": 80.0}, r"gate is an AUROC in \[0, 1\) or none, got 80"),
        ({"window": 0}, "at least 1 image, got 0"),
        ({"images_per_step": 0}, "at least 1 image, got 1000 and 0"),
    ],
)
def test_bad_curricula_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Curriculum(**options)
