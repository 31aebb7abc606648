import dataclasses

import pytest
import torch

from advebm import energies
from advebm.attacks.projected import Attack, fgsm
from advebm.core.errors import UserError
from advebm.metrics.verdicts import find_verdicts
from tests.helpers import Plain
from tests.references import attacks as reference


@pytest.fixture
def model(net):
    return net.eval()


def test_fgsm_is_one_full_sign_step(model, batch):
    x = reference.input_gradient(model, batch.x, batch.y)
    expected = (batch.x + 0.03 * x.sign()).clamp(0, 1)
    attack = fgsm(0.03)
    torch.testing.assert_close(attack.minimize(attack.negative_loss(model, batch.y), batch.x, None), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_agrees_with_a_reference(model, batch, norm):
    eps, step = (0.05, 0.02) if norm == "linf" else (0.6, 0.25)
    attack = Attack(eps=eps, norm=norm, steps=6, step_size=step, start="clean")
    ours = attack.minimize(attack.negative_loss(model, batch.y), batch.x, None)
    theirs = getattr(reference, f"pgd_{norm}")(model, batch.x, batch.y, eps, step, 6)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, batch.x)


def test_energy_attack_agrees_with_a_reference(model, batch):
    attack = dataclasses.replace(fgsm(0.03), loss="energy")
    ours = attack.minimize(attack.negative_loss(model, batch.y), batch.x, None)
    torch.testing.assert_close(ours, reference.energy_fgsm(model, batch.x, batch.y, 0.03))


@pytest.mark.parametrize("loss", ["cross-entropy", "energy"])
def test_an_attack_beats_a_random_corner_of_its_ball(model, batch, generator, loss):
    """Sign steps overshoot, so a wrong-way attack can also raise a loss a little; a random corner is the bar."""
    attack = Attack(eps=8 / 255, steps=10, loss=loss)
    energy = energies.conditional if loss == "cross-entropy" else energies.joint
    measure = lambda x: (energy(model(x), batch.y) - energy(model(batch.x), batch.y)).mean()
    corner = (batch.x + 8 / 255 * torch.randn(batch.x.shape, generator=generator).sign()).clamp(0, 1)
    found = attack.minimize(attack.negative_loss(model, batch.y), batch.x, generator)
    assert measure(found) > 2 * measure(corner).abs()


def test_a_targeted_attack_raises_the_target(model, batch, generator):
    target = (batch.y + 1) % 5
    attack = Attack(eps=0.5, norm="l2", steps=10)
    found = attack.minimize(lambda x: energies.conditional(model(x), target), batch.x, generator)
    before, after = (model(x).softmax(1).gather(1, target[:, None]) for x in (batch.x, found))
    assert (after > before).all()


@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_start_stays_in_ball_and_box(model, batch, generator, start, norm):
    attack = Attack(eps=0.1, norm=norm, steps=3, start=start, spread=1.0)
    found = attack.minimize(attack.negative_loss(model, batch.y), batch.x, generator)
    length = (found - batch.x).flatten(1).norm(p=torch.inf if norm == "linf" else 2, dim=1)
    assert (length <= 0.1 + 1e-9).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_start_counts(model, batch):
    run = lambda start: Attack(eps=0.1, steps=1, step_size=1e-9, start=start, spread=0.05).minimize(
        lambda x: x.flatten(1).sum(1), batch.x, torch.Generator().manual_seed(0)
    )
    spread = {start: (run(start) - batch.x).abs().mean().item() for start in ("clean", "gaussian", "uniform")}
    assert spread["clean"] < 1e-8
    assert 0.02 < spread["gaussian"] < 0.05
    assert 0.03 < spread["uniform"] < 0.06


def test_default_step_is_two_and_a_half_radii_over_the_steps():
    assert Attack(eps=0.4, steps=10).descent().size == pytest.approx(0.1)


def test_restarts_keep_the_lowest_energy_of_each_image(model, batch):
    attack = Attack(eps=0.3, norm="l2", steps=1, step_size=1e-6, restarts=8)
    once = dataclasses.replace(attack, restarts=1)
    energy = attack.negative_loss(model, batch.y)
    g = torch.Generator().manual_seed(0)
    singles = torch.stack([energy(once.minimize(energy, batch.x, g)) for _ in range(8)]).detach()
    best = energy(attack.minimize(energy, batch.x, torch.Generator().manual_seed(0))).detach()
    torch.testing.assert_close(best, singles.min(0).values)
    assert (best < singles.mean(0)).all()


def test_a_point_survives_only_if_every_restart_fails(batch):
    """One logit is a coin the generator flips: with r restarts of a random search a share (1/2)^r survives."""
    x = torch.full((4000, 1, 1, 1), 0.5)
    y = torch.zeros(4000, dtype=torch.long)
    f = lambda v: torch.cat([0.5 - v.flatten(1), v.flatten(1) - 0.5], 1)  # wrong where the pixel exceeds 0.5
    still = Attack(eps=0.1, steps=1, step_size=1e-9, restarts=3)
    share = find_verdicts(Plain(f), x, y, still).standing().float().mean().item()
    assert share == pytest.approx(1 / 8, abs=4 * (7 / 64 / 4000) ** 0.5)


def test_the_clean_image_counts_as_an_attack(batch):
    """An attack that could repair a wrong image must not."""
    f = lambda v: torch.stack([0 * v.sum((1, 2, 3)), 1 + 0 * v.sum((1, 2, 3))], 1)
    right = find_verdicts(Plain(f), torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 1, 0, 1]), Attack(steps=1))
    assert right.standing().tolist() == [False, True, True, False, True]
    coin = lambda v: torch.cat([0.5 - v.flatten(1), v.flatten(1) - 0.5], 1)
    wrong, nothing = torch.full((100, 1, 1, 1), 0.51), torch.zeros(100, dtype=torch.long)
    assert not find_verdicts(Plain(coin), wrong, nothing, Attack(eps=0.1, steps=1, step_size=1e-9)).standing().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "radius >= 0"),
        ({"eps": float("nan")}, "radius >= 0"),
        ({"eps": 8.0}, "write 8/255, not 8"),
        ({"steps": 0}, "at least 1"),
        ({"restarts": 0}, "at least 1"),
        ({"step_size": 0.0}, "step_size must be > 0"),
        ({"spread": -1.0}, "deviation >= 0"),
    ],
)
def test_bad_attacks_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Attack(**options)


def test_names_say_what_is_reported():
    assert Attack().name == "PGD-10 linf 8/255"
    assert fgsm(0.5, "l2").name == "FGSM l2 0.5"
    assert Attack(eps=1, norm="l2", steps=50, restarts=10, loss="energy").name == "energy attack-50 x 10 l2 1"
