import math

import pytest
import torch
from torch import nn

from advebm import energies
from advebm.core.errors import UserError
from advebm.descent import (
    Descent,
    adam,
    both,
    box,
    free,
    heavy_ball,
    hold,
    in_parts,
    l2_ball,
    linf_ball,
    raw,
    sign,
    unit,
    value_and_gradient,
)
from advebm.models.modes import searching

BALLS = {"linf": (linf_ball(0.1), torch.inf, 0.1), "l2": (l2_ball(0.5), 2, 0.5)}
DIRECTIONS = {"raw": raw, "sign": sign, "unit": unit, "heavy_ball": heavy_ball(0.9), "adam": adam}


def quadratic(x):
    return 0.5 * x.flatten(1).square().sum(1)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_stays_in_ball_and_box_and_lowers_the_energy(net, batch, ball, direction):
    net.eval()
    constraint, order, radius = BALLS[ball]
    energy = lambda x: -energies.conditional(net(x), batch.y)
    found = Descent(8, 0.05, DIRECTIONS[direction], both(constraint, box()))(energy, batch.x)
    assert ((found - batch.x).flatten(1).norm(p=order, dim=1) <= radius + 1e-9).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert (energy(found) < energy(batch.x)).all()


@pytest.mark.parametrize("ball", [linf_ball(0.1), l2_ball(0.5), box()], ids=str)
def test_projection_is_the_nearest_point(ball, generator):
    """Idempotent, fixes the origin, and no random point of the set is nearer."""
    origin = torch.rand(4, 3, 5, 5, generator=generator)
    x = origin + torch.randn(origin.shape, generator=generator)
    once = ball(x, origin)
    torch.testing.assert_close(ball(once, origin), once)
    torch.testing.assert_close(ball(origin, origin), origin)
    distance = (x - once).flatten(1).norm(dim=1)
    for _ in range(50):
        other = ball(once + 0.3 * torch.randn(x.shape, generator=generator), origin)
        assert ((x - other).flatten(1).norm(dim=1) >= distance - 1e-5).all()


def test_projection_reaches_the_surface():
    origin = torch.zeros(1, 1, 2, 2)
    x = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]])
    assert l2_ball(1.0)(x, origin).norm().item() == pytest.approx(1.0)
    assert linf_ball(0.5)(x, origin).flatten().tolist() == [0.5, 0, 0, 0.5]


def test_one_step_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    assert Descent(1, 0.5, raw, free)(quadratic, x).tolist() == [[1.5, 2.0]]
    torch.testing.assert_close(Descent(1, 1.0, unit, free)(quadratic, x), torch.tensor([[2.4, 3.2]]))
    assert Descent(1, 1.0, sign, free)(quadratic, x).tolist() == [[2.0, 3.0]]


def test_heavy_ball_keeps_its_speed():
    """On a slope of constant direction, v_k = 1 + d + … + d^k."""
    path = []
    Descent(4, 1.0, heavy_ball(0.5), free)(
        lambda x: x.sum(1), torch.zeros(1, 1), observe=lambda k, x, e: path.append(x.item())
    )
    assert path == [0, -1, -2.5, -4.25]


def test_adam_takes_the_steps_of_torch(generator):
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    energy = lambda v: (scale * v**2).sum(1) + v.sin().sum(1)
    weight = torch.nn.Parameter(x.clone())
    optimiser = torch.optim.Adam([weight], lr=0.05)
    for _ in range(20):
        optimiser.zero_grad()
        energy(weight).sum().backward()
        optimiser.step()
    torch.testing.assert_close(Descent(20, 0.05, adam, free)(energy, x), weight.detach())


def test_an_energy_in_parts_is_the_energy(generator):
    x = torch.randn(5, 3, generator=generator)
    target = torch.arange(5.0)
    parts = [lambda v, t=t: (v.sum(1) - t) ** 2 for t in target.split(2)]
    ours = value_and_gradient(in_parts(parts, [slice(0, 2), slice(2, 4), slice(4, 6)]), x)
    torch.testing.assert_close(ours, value_and_gradient(lambda v: (v.sum(1) - target) ** 2, x))


def test_zero_gradients_do_not_move_a_sample():
    x = torch.zeros(2, 3)
    assert torch.equal(Descent(3, 1.0, unit, free)(quadratic, x), x)


def test_size_and_noise_may_follow_a_schedule(generator):
    seen = []

    def size(share):
        seen.append(share)
        return 1 - share

    x = Descent(4, size, sign, free)(lambda x: x.sum(1), torch.zeros(1, 1))
    assert seen == [0, 0.25, 0.5, 0.75]
    assert x.item() == -2.5
    quiet = Descent(3, 0.0, raw, free, noise=lambda share: float(share == 0))(
        quadratic, torch.zeros(5000, 1), generator=generator
    )
    assert quiet.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2 * 5000))


def test_the_constraint_sees_the_given_origin():
    origin = torch.full((1, 2), 5.0)
    found = Descent(1, 0.1, sign, linf_ball(1.0))(quadratic, torch.zeros(1, 2), origin=origin)
    assert found.tolist() == [[4.0, 4.0]]


def test_samples_do_not_see_each_other_in_eval_mode(net, batch):
    attack = Descent(3, 0.05, unit, l2_ball(0.5))
    with searching(net) as f:
        together = attack(lambda x: energies.marginal(f(x)), batch.x)
        alone = attack(lambda x: energies.marginal(f(x)), batch.x[:1])
    torch.testing.assert_close(together[:1], alone)


def test_langevin_reaches_the_gaussian_it_should(generator):
    """x ← x - h x + √(2h) ε is AR(1): stationary variance 2h / (1 - (1-h)²), mean 0."""
    h = 0.1
    chain = Descent(400, h, raw, free, noise=math.sqrt(2 * h))
    x = chain(quadratic, torch.full((20_000, 1), 3.0), generator=generator)
    expected = 2 * h / (1 - (1 - h) ** 2)
    assert abs(x.var().item() - expected) < 4 * expected * math.sqrt(2 / 20_000)
    assert abs(x.mean().item()) < 4 * math.sqrt(expected / 20_000)


def test_inpainting_never_moves_the_known_pixels(net, batch):
    net.eval()
    known = torch.zeros_like(batch.x, dtype=torch.bool)
    known[..., :4] = True
    out = Descent(5, 0.1, unit, both(box(), hold(known)))(lambda x: energies.marginal(net(x)), batch.x)
    assert torch.equal(out[known], batch.x[known])
    assert not torch.equal(out, batch.x)


def test_maximum_entropy_spreads_a_batch(generator):
    x = 1 + 0.01 * torch.randn(8, 4, generator=generator)
    spread = Descent(50, 0.1, unit, free)(energies.crowding, x)
    assert energies.crowding(spread).mean() < energies.crowding(x).mean() - 0.5


def test_input_gradients_match_finite_differences(generator):
    small = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=generator)
    for energy in (
        lambda v: energies.marginal(small(v)),
        lambda v: energies.conditional(small(v), torch.tensor([0, 2])),
    ):
        value, gradient = value_and_gradient(energy, x)
        torch.testing.assert_close(value, energy(x).detach())
        for index in [(0, 0, 1, 1), (1, 2, 0, 1)]:
            step = torch.zeros_like(x)
            step[index] = 1e-6
            slope = (energy(x + step).sum() - energy(x - step).sum()) / 2e-6
            assert gradient[index].item() == pytest.approx(slope.item(), abs=1e-7)


def test_gradients_of_parameters_are_left_alone(net, batch):
    value_and_gradient(lambda x: energies.marginal(net(x)), batch.x)
    assert all(p.grad is None for p in net.parameters())


def test_zero_steps_return_the_start(batch):
    assert torch.equal(Descent(0, 1.0, raw, free)(quadratic, batch.x), batch.x)


def test_a_reduced_energy_is_refused():
    with pytest.raises(UserError, match=r"did you call \.mean"):
        value_and_gradient(lambda x: x.mean(), torch.zeros(3, 2))


def test_negative_steps_are_refused():
    with pytest.raises(UserError, match="steps must be >= 0"):
        Descent(-1, 1.0, raw, free)


@pytest.mark.parametrize("ball", [linf_ball(0.5), l2_ball(0.5), box()], ids=str)
def test_points_inside_stay_where_they_are(ball, generator):
    origin = torch.full((3, 1, 2, 2), 0.5)
    inside = origin + 0.2 * (torch.rand(origin.shape, generator=generator) - 0.5)
    torch.testing.assert_close(ball(inside, origin), inside)
