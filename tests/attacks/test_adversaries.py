"""APGD, FAB, Square, C&W, AutoAttack, and the judgement that carries them out."""

import json

import pytest
import torch
from scipy.optimize import linprog, minimize
from scipy.stats import binomtest
from torch import nn

from advebm.attacks.apgd import APGD, _evaluate, ascend, maximise
from advebm.attacks.autoattack import AutoAttack
from advebm.attacks.base import Adversary, AttackRun, critic_as_classifier, dlr, is_correct, margin
from advebm.attacks.cw import CW
from advebm.attacks.fab import FAB, onto_plane
from advebm.attacks.projected import Attack, Targeted
from advebm.attacks.square import HALVINGS, Square, _square, _stripes, _tiles, _two_windows, bump, side
from advebm.core.errors import UserError
from advebm.descent import unit
from advebm.metrics.robustness import RobustAccuracy, TargetedAccuracy, wilson
from advebm.metrics.verdicts import find_verdicts
from advebm.models.inference import faster_model, fold
from advebm.models.modes import searching
from tests.helpers import Plain
from tests.references import adversaries as reference


@pytest.fixture
def model(net):
    return net.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(w, b=0.0):
    """Two classes; class 1 wins where w·x + b > 0."""
    return lambda x: torch.stack([torch.zeros(len(x), dtype=x.dtype), x.flatten(1) @ w + b], 1)


ADVERSARIES = [Attack(eps=0.1, steps=3), Targeted(Attack(eps=0.1, steps=3)), APGD(0.1, steps=5), CW(steps=5)]
ADVERSARIES += [FAB(0.1, steps=5, targets=2), Square(0.1, queries=10), AutoAttack(0.1, version="quick")]


@pytest.mark.parametrize("attack", ADVERSARIES, ids=lambda attack: type(attack).__name__)
def test_an_attack_takes_a_model_images_and_labels(net, batch, attack):
    net.train()
    found = attack(net, batch.x, batch.y)
    assert torch.equal(found, attack(net, batch.x, batch.y))  # without a generator the same numbers are drawn
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    with searching(net) as f:
        assert torch.equal(attack(net, batch.x, batch.y, seeded(3)), attack.find(f, batch.x, batch.y, seeded(3)))
        right = is_correct(f, batch.x, batch.y)
        assert right.any()
        assert is_correct(f, found, batch.y).sum() < right.sum() or attack.norm == "linf"
    assert not torch.equal(found, batch.x)
    assert ((found >= 0) & (found <= 1)).all()
    if attack.eps < 1:
        assert (found - batch.x).abs().max() <= attack.eps + 1e-6


def test_an_attack_on_a_function_is_told_what_to_call(batch):
    for wrong in ((lambda x: x.sum(), batch.x, None), (nn.Identity(), batch.x, seeded())):
        with pytest.raises(UserError, match=r"attack\.minimize\(energy, x, generator\)"):
            Attack()(*wrong)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_margin_and_dlr_by_hand():
    out = torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.0, 4.0, 1.0, 2.0]])
    y, t = torch.tensor([0, 2]), torch.tensor([3, 1])
    assert margin(out, y).tolist() == [-2.0, 3.0]
    assert margin(out, y, t).tolist() == [-3.0, 3.0]
    torch.testing.assert_close(dlr(out, y), torch.tensor([-2 / 3, 3 / 3]))
    torch.testing.assert_close(dlr(out, y, t), torch.tensor([-3 / (5 - 1.5), 3 / (4 - 0.5)]))


@pytest.mark.parametrize("target", [None, torch.tensor([1, 2, 3, 4, 0, 1])])
def test_dlr_does_not_change_with_shift_and_scale(model, batch, target):
    out = model(batch.x)
    torch.testing.assert_close(dlr(7 * out + 3, batch.y, target), dlr(out, batch.y, target), rtol=1e-6, atol=1e-8)
    assert ((dlr(out, batch.y) > 0) == (out.argmax(1) != batch.y)).all()


# APGD -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["cross-entropy", "dlr", "targeted-dlr"])
def test_apgd_agrees_with_a_reference(model, batch, norm, loss):
    """The same starts, point by point, without leaving any out: the same points that break and the same verdicts."""
    eps = 0.03 if norm == "linf" else 0.25
    y = model(batch.x).argmax(1)
    ours = APGD(eps, norm, 30, loss, targets=2).find(model, batch.x, y, seeded())
    broken, losses = reference.apgd(model, batch.x, y, eps, norm, 30, loss, 2, seeded())
    assert (is_correct(model, ours, y) == ~broken).all()
    assert broken.sum() > 0 or loss == "targeted-dlr"
    reached, best = APGD(eps, norm, 30, loss)._search(int(loss == "targeted-dlr"), model, batch.x, y, seeded()), losses
    standing = is_correct(model, reached, y)
    found = reference.loss(model(reached), y, loss, reference.target(model, batch.x, y, 1))
    torch.testing.assert_close(found[standing], best[standing], rtol=1e-6, atol=1e-9)


def test_apgd_stops_at_a_point_once_it_is_misclassified():
    """The first half breaks at the start and is left out at once, so it is looked at once."""
    seen = []

    def f(x):
        seen.append(len(x))
        easy = (x[:, 0, 0, 0] < 0.5).to(x.dtype)
        return torch.stack([x.sum((1, 2, 3)) * 0 + 1 - 2 * easy, x.sum((1, 2, 3)) * 1e-9], 1)

    x = torch.full((8, 1, 4, 4), 0.9)
    x[:4] = 0.1
    APGD(0.05, steps=10)._search(0, f, x, torch.zeros(8, dtype=torch.long), seeded())
    assert seen == [8] + 10 * [4]


def test_apgd_goes_back_to_its_best_point_where_it_is_stuck():
    """Values that rise at every step but never reach the first one: nothing at the first check, back at the second."""
    met, values = [], iter([10.0, *(k / 100 for k in range(100))])

    def outcome(x, rows):
        met.append(x.detach().clone())
        return next(values) + x.sum((1, 2, 3)) - x.sum((1, 2, 3)).detach(), torch.zeros(1, dtype=torch.bool)

    x = torch.full((1, 1, 4, 4), 0.5)
    maximise(outcome, x, eps=0.4, norm="linf", steps=100, generator=seeded())
    corner = torch.full_like(x, 0.9)
    assert all(torch.equal(at, corner) for at in met[3:42])  # the start, then checks after 22 and 41 steps
    assert not torch.equal(met[42], corner)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ascend_finds_the_nearest_point_of_a_ball(norm):
    """Of -‖x - c‖² the best point in a ball is the projection of c."""
    x = torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64)
    c = x + 0.3 * torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)
    found, value = ascend(
        lambda v: -(v - c).square().sum((1, 2, 3)), x, eps=0.1, norm=norm, steps=100, generator=seeded()
    )
    d = c - x
    best = x + (d.clamp(-0.1, 0.1) if norm == "linf" else 0.1 * unit(d, {}))
    torch.testing.assert_close(found, best.clamp(0, 1), atol=2e-3, rtol=0)
    torch.testing.assert_close(value, -(found - c).square().sum((1, 2, 3)))


def test_gradients_of_a_random_network_are_averaged():
    draws = iter([1.0, 3.0] * 100)
    f = lambda x: torch.stack([0 * x.sum((1, 2, 3)), x.sum((1, 2, 3)) * next(draws)], 1) - 100
    attack = APGD(0.1, "l2", steps=2, loss="margin", samples=2)
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.long)
    attack._search(0, f, x, y, seeded())
    assert next(draws) == 1.0  # an even number of passes


def test_the_average_of_gradients_is_followed():
    """Two passes in turn pull to opposite sides; the second, weaker one alone would lead the other way."""
    turn = iter([1.0, -0.5] * 100)
    f = lambda x: torch.stack([0 * x.sum((1, 2, 3)) + 100, x.sum((1, 2, 3)) * next(turn)], 1)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.long)
    _, gradient, _ = _evaluate(lambda z, rows: (margin(f(z), y), y > 0), x, y, 2)
    torch.testing.assert_close(gradient, torch.full_like(x, 0.25))


def test_losses_that_few_classes_do_not_have():
    with pytest.raises(UserError, match="at least 3 classes, got 2; use margin"):
        APGD(loss="dlr").runs(2)
    with pytest.raises(UserError, match="at least 4 classes"):
        APGD(loss="targeted-dlr").runs(3)
    assert len(APGD(loss="targeted-dlr", restarts=2).runs(6)) == 10
    with pytest.raises(UserError, match="write 8/255, not 8"):
        APGD(eps=8)


# FAB ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_shortest_move_onto_a_plane(norm):
    g = seeded(2)
    x, w = torch.rand(6, 5, generator=g, dtype=torch.float64), torch.randn(6, 5, generator=g, dtype=torch.float64)
    w[0, 1] = 0.0
    x[1, 2] = 1.0
    reach = (w.abs() * torch.where(w > 0, 1 - x, x)).sum(1)  # the most that w·move can be
    gap = reach * torch.tensor([0.1, 0.5, 0.9, 0.3, -0.0, 0.99])
    gap[4] = -0.4 * (w.abs() * torch.where(w < 0, 1 - x, x)).sum(1)[4]
    move = onto_plane(x, w, gap, norm)
    torch.testing.assert_close((w * move).sum(1), gap, atol=1e-5, rtol=1e-5)
    assert ((x + move >= -1e-12) & (x + move <= 1 + 1e-12)).all()
    for i in range(6):
        if norm == "linf":  # minimise t subject to w·m = gap, -t <= m <= t, 0 <= x + m <= 1
            cost = [0] * 5 + [1]
            rows = [[s if j == k else 0 for j in range(5)] + [-1] for k in range(5) for s in (1, -1)]
            bounds = [(-v, 1 - v) for v in x[i].tolist()] + [(0, None)]
            best = linprog(cost, rows, [0] * 10, [[*w[i].tolist(), 0]], [gap[i].item()], bounds).fun
            assert move[i].abs().max().item() == pytest.approx(best, abs=1e-5)
        else:
            plane = {"type": "eq", "fun": lambda m, i=i: w[i].numpy() @ m - gap[i].item()}
            bounds = [(-v, 1 - v) for v in x[i].tolist()]
            best = minimize(lambda m: m @ m, [0.0] * 5, bounds=bounds, constraints=plane, tol=1e-12).fun
            assert move[i].square().sum().item() == pytest.approx(best, abs=1e-5)


def test_fab_restarts_begin_elsewhere(model, batch):
    y = model(batch.x).argmax(1)
    attack = FAB(0.01, steps=1, restarts=2)
    (_, first), (_, second) = ((r.attack, r.search) for r in attack.runs(5)[:2])
    met = []
    watching = lambda x: met.append(x) or model(x)
    first(watching, batch.x, y, seeded())
    second(watching, batch.x, y, seeded())
    starts = [x for x in met if x.requires_grad]
    assert torch.equal(starts[0], batch.x)
    far = (starts[1] - batch.x).abs().flatten(1).amax(1)
    assert ((far > 0.004) & (far <= 0.005 + 1e-9)).all()


def test_fab_stays_near_the_image_by_at_most_a_tenth(model, batch):
    """Against the reference, which has its own constant."""
    y = model(batch.x).argmax(1)
    shortest = reference.fab(model, batch.x, y, 4, 1)
    inside = shortest.isfinite()
    assert inside.any()
    for scale, stands in ((0.999, True), (1.001, False)):
        for i in inside.nonzero().flatten().tolist():
            one = slice(i, i + 1)
            found = FAB(scale * shortest[i].item(), "linf", 4, 1).find(model, batch.x[one], y[one], seeded())
            assert is_correct(model, found, y[one]).item() is stands


def test_a_plane_outside_the_box_is_met_in_the_corner():
    move = onto_plane(torch.tensor([[0.2, 0.7]]), torch.tensor([[1.0, -2.0]]), torch.tensor([9.0]), "linf")
    torch.testing.assert_close(move, torch.tensor([[0.8, -0.7]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_breaks_a_linear_classifier_from_its_distance_on(norm):
    w = torch.tensor([1.0, -2.0, 0.5, 3.0])
    x, y = torch.tensor([0.5, 0.6, 0.4, 0.45]).view(1, 1, 2, 2), torch.tensor([1])
    f = linear(w)
    dual = w.abs().sum() if norm == "linf" else w.norm()
    distance = ((x.flatten() @ w) / dual).item()
    assert 0 < distance < 0.3
    broken = lambda eps: not is_correct(f, FAB(eps, norm, 20).find(f, x, y, seeded()), y).item()
    assert broken(1.01 * distance)
    assert not broken(0.99 * distance)


def test_fab_agrees_with_a_reference(model, batch):
    """Verdicts at several radii, against one that sorts for its projections and never stops early."""
    y = model(batch.x).argmax(1)
    shortest = reference.fab(model, batch.x, y, 20, 2)
    for eps in (0.5, 0.9, 1.1, 2.0):
        radius = eps * shortest.median().item()
        stands = is_correct(model, FAB(radius, "linf", 20, 2).find(model, batch.x, y, seeded()), y)
        assert (stands == (shortest > radius)).all()


# Square ---------------------------------------------------------------------------------------------------------------


def test_square_takes_its_queries_and_needs_no_gradient():
    calls = []

    def f(x):
        assert not torch.is_grad_enabled()
        calls.append(len(x))
        return torch.stack([1 + 0 * x.sum((1, 2, 3)), 0 * x.sum((1, 2, 3))], 1)

    x, y = torch.rand(3, 1, 6, 6, generator=seeded()), torch.zeros(3, dtype=torch.long)
    Square(0.1, queries=40)._search(f, x, y, seeded())
    assert calls == [3] * 40


def test_square_raises_the_margin_to_its_bound():
    """Of a linear function the best point of the linf ball is known; stripes alone do not reach it."""
    w = torch.randn(36, generator=seeded(3), dtype=torch.float64)
    x, y = torch.full((1, 1, 6, 6), 0.5, dtype=torch.float64), torch.tensor([0])
    f = linear(w, b=-1000.0)
    found = Square(0.1, queries=2000)._search(f, x, y, seeded())
    reached = ((found - x).flatten() @ w).item()
    assert reached == pytest.approx(0.1 * w.abs().sum().item(), rel=1e-3)
    assert ((found - x).abs() <= 0.1 + 1e-9).all()


def test_squares_shrink_as_published():
    """AutoAttack's schedule for 0.8 of the pixels: sides of a 32x32 image before and after some queries."""
    from bisect import bisect_left

    size = lambda query: side(0.8 / 2 ** bisect_left(HALVINGS, query), 32)
    assert [size(q) for q in (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)] == [
        round((0.8 / 2**k * 1024) ** 0.5) for k in (0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    ]
    assert side(1e-9, 8) == 1


def test_the_search_follows_that_schedule(monkeypatch):
    from advebm.attacks import square

    shares, own = [], square._square
    monkeypatch.setattr(
        square, "_square", lambda best, x, share, *rest: shares.append(share) or own(best, x, share, *rest)
    )
    f = linear(torch.zeros(36), b=-1.0)
    Square(0.1, queries=60)._search(f, torch.rand(1, 1, 6, 6), torch.tensor([0]), seeded())
    assert shares == 11 * [0.8] + 40 * [0.4] + 8 * [0.2]


def test_one_square_changes_at_a_time():
    x = torch.full((2, 3, 16, 16), 0.5)
    start = _stripes(x, 0.1, seeded())
    assert torch.equal((start - x).abs(), torch.full_like(x, 0.1).sub(0).mul(1)) or (start - x).abs().allclose(
        torch.tensor(0.1)
    )
    assert (start == start[:, :, :1]).all()  # vertical
    changed = (_square(start, x, 0.1, 0.1, seeded(5)) != start).any(1)
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert rows.max() <= side(0.1, 16)
    assert columns.max() <= side(0.1, 16)
    assert changed.any()


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_bumps_agree_with_a_reference(size):
    straight = reference.bump(size)
    for seed in range(6):
        pattern = bump(size, seeded(seed))
        assert min((pattern - straight).abs().max(), (pattern - straight.T).abs().max()) < 1e-6
    assert pattern.norm().item() == pytest.approx(1, abs=1e-6)


def test_moves_of_the_l2_square_attack_keep_their_length():
    x = torch.rand(2, 3, 16, 16, generator=seeded()) * 0.2 + 0.4
    start = _tiles(x, 0.5, seeded())
    torch.testing.assert_close((start - x).flatten(1).norm(dim=1), torch.full((2,), 0.5))
    new = _two_windows(start, x, 0.05, 0.5, seeded(1))
    torch.testing.assert_close((new - x).flatten(1).norm(dim=1), torch.full((2,), 0.5))
    assert ((new != start).any(1).flatten(1).sum(1) <= 2 * 49 + 16 * 16).all()
    assert (new != start).any()


@pytest.mark.parametrize("seed", range(4))
def test_moves_of_the_l2_square_attack_agree_with_a_reference(seed):
    x = torch.rand(2, 3, 12, 12, generator=seeded()) * 0.5 + 0.25
    best = _two_windows(_tiles(x, 0.5, seeded(9)), x, 0.05, 0.5, seeded(8))
    best = x + 0.7 * (best - x)  # some of the length is unused
    ours = _two_windows(best, x, 0.05, 0.5, seeded(seed))
    expected = reference.two_windows(best, x, side(0.05, 12), 0.5, seeded(seed))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


# C&W ------------------------------------------------------------------------------------------------------------------


def test_cw_finds_the_distance_to_a_plane():
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    x, y = torch.tensor([0.5, 0.6, 0.4, 0.45], dtype=torch.float64).view(1, 1, 2, 2), torch.tensor([1])
    f = linear(w)
    distance = ((x.flatten() @ w) / w.norm()).item()
    found = CW(c=1.0, steps=300, searches=6).find(f, x, y, seeded())
    assert not is_correct(f, found, y)
    assert (found - x).norm().item() == pytest.approx(distance, rel=0.03)
    searched = CW(c=1e-3, steps=100, searches=8).find(f, x, y, seeded())
    assert not is_correct(f, searched, y)
    assert is_correct(f, CW(c=1e-3, steps=100).find(f, x, y, seeded()), y)
    assert torch.equal(CW(c=1e-6, steps=20).find(f, x, y, seeded()), x)  # the distance outweighs it


def test_cw_keeps_the_nearest_of_all_points(model, batch):
    y, met = model(batch.x).argmax(1), []
    watching = lambda x: met.append(x.detach().clone()) or model(x)
    found = CW(c=20.0, steps=60, rate=0.05).find(watching, batch.x, y, seeded())
    points = torch.stack(met[1:])  # the first is the images themselves
    crossed = torch.stack([margin(model(x), y) > 0 for x in points])
    distances = (points - batch.x).flatten(2).norm(dim=2).masked_fill(~crossed, torch.inf).amin(0)
    assert distances.isfinite().any()
    moved = (found - batch.x).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved[distances.isfinite()], distances[distances.isfinite()])


def test_cw_keeps_the_margin_it_is_asked_for():
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    x, y = torch.tensor([0.5, 0.6, 0.4, 0.45], dtype=torch.float64).view(1, 1, 2, 2), torch.tensor([1])
    found = CW(c=5.0, kappa=0.5, steps=200).find(linear(w), x, y, seeded())
    assert margin(linear(w)(found), y).item() >= 0.5


# AutoAttack -----------------------------------------------------------------------------------------------------------


def test_autoattack_is_what_the_authors_run():
    names = lambda classes, **o: [a.name.split(" linf")[0] for a in AutoAttack(0.1, **o).attacks(classes)]
    assert names(10) == ["APGD-CE 100", "APGD-T 100", "FAB-T 100", "Square 5000"]
    assert [r.attack for r in AutoAttack(0.1).runs(10)].count("APGD-T") == 9
    assert [r.attack for r in AutoAttack(0.1).runs(5)].count("FAB-T") == 4
    assert names(10, version="quick") == names(10)[:2]
    assert names(3)[1] == "APGD-margin 100"
    assert names(2, version="rand") == ["APGD-CE 100", "APGD-margin 100"]
    assert {a.samples for a in AutoAttack(0.1, version="rand").attacks(10)} == {20}
    assert names(10, version="full")[:2] == ["APGD-CE x 5 100", "APGD-DLR x 5 100"]
    assert AutoAttack(0.5, "l2").name == "AutoAttack l2 0.5"


def test_autoattack_stays_in_its_norm():
    for version in ("quick", "standard", "full", "rand"):
        assert {a.norm for a in AutoAttack(0.5, "l2", version).attacks(10)} == {"l2"}


# Judging --------------------------------------------------------------------------------------------------------------


class Halves(Adversary):
    """Two runs: the first breaks points below 0.3, the second below 0.6.  Class 1 is a first pixel of 0."""

    eps, norm, name = 1.0, "linf", "halves"

    def __init__(self):
        self.seen = []

    def runs(self, classes):
        def search(limit):
            def run(f, x, y, generator):
                self.seen.append((limit, len(x)))
                f(x)
                return torch.where((x[:, :1, :1, :1] < limit), torch.zeros_like(x), x)

            return run

        return [AttackRun("low", search(0.3), 1), AttackRun("high", search(0.6), 1)]


ZERO = Plain(lambda x: torch.stack([0.5 + 0 * x[:, 0, 0, 0], (x[:, 0, 0, 0] == 0).to(x.dtype)], 1))
POINTS = torch.linspace(0.05, 0.95, 10).view(10, 1, 1, 1)


@pytest.fixture
def described(monkeypatch):
    """Halves is not a dataclass; its description is its name."""
    from advebm.core import config

    monkeypatch.setattr(config, "describe", lambda thing: thing.name)


def test_each_run_sees_the_points_that_stand(described):
    y = torch.zeros(10, dtype=torch.long)
    y[9] = 1  # wrong as it is
    halves = Halves()
    found = find_verdicts(ZERO, POINTS, y, halves, batch=4)
    assert found.broken.tolist() == [1, 1, 1, 2, 2, 2, -1, -1, -1, 0]
    assert found.attacks == ("low", "high")
    assert halves.seen == [(0.3, 4), (0.3, 4), (0.3, 1), (0.6, 4), (0.6, 2)]
    assert found.standing(1).sum() == 6
    assert found.standing().sum() == 3
    assert found.standing(0).sum() == 9


@pytest.mark.parametrize("calls", [1, 2, 4, 5])
def test_a_stopped_judgement_goes_on_where_it_was(described, tmp_path, calls):
    y = torch.zeros(10, dtype=torch.long)
    whole = find_verdicts(ZERO, POINTS, y, Halves(), batch=4)
    count = 0

    def stop(done, note):
        nonlocal count
        count += 1
        if count == calls + 1:  # the first tells where it begins
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_verdicts(ZERO, POINTS, y, Halves(), batch=4, folder=tmp_path, tell=stop)
    rest, heard = Halves(), []
    again = find_verdicts(ZERO, POINTS, y, rest, batch=4, folder=tmp_path, tell=lambda done, note: heard.append(done))
    assert (heard[0] > 0) == (calls > 1)
    assert len(heard) == len(rest.seen) + 2, "where it begins, each search, the end"
    assert again.broken.tolist() == whole.broken.tolist()
    assert len(rest.seen) == 5 - (calls - 1)
    done = Halves()
    assert find_verdicts(ZERO, POINTS, y, done, batch=4, folder=tmp_path).broken.tolist() == whole.broken.tolist()
    assert done.seen == []
    find_verdicts(ZERO, POINTS, y, done, batch=4, folder=tmp_path, seed=1)
    assert done.seen  # another judgement
    (state, _) = sorted(tmp_path.glob("*.json"))
    state.write_text(json.dumps({"run": 1}))
    with pytest.raises(UserError, match="damaged"):
        [find_verdicts(ZERO, POINTS, y, Halves(), batch=4, folder=tmp_path, seed=s) for s in (0, 1)]


def test_another_judgement_has_another_state(small_run, tmp_path):
    model, split = small_run.model()[0], small_run.recipe.data.load().test.take(slice(20))
    attack = Attack(eps=0.1, steps=1)
    find_verdicts(model, split.x, split.y, attack, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    find_verdicts(model, split.x, split.y, attack, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    find_verdicts(model, split.x.flip(3), split.y, attack, folder=tmp_path)
    find_verdicts(model, split.x, split.y, attack, folder=tmp_path, batch=7)
    find_verdicts(model, split.x, split.y, attack, folder=tmp_path, precision="bfloat16")
    find_verdicts(model, split.x, split.y, Attack(eps=0.2, steps=1), folder=tmp_path)
    other = split.x.clone()
    other[-1, 0, 0, 0] ^= 1  # hardly anything, and not in the first images
    find_verdicts(model, other, split.y, attack, folder=tmp_path)
    for sign in (1, -1):  # the same weights, another function
        find_verdicts(Plain(lambda x, s=sign: s * model(x)), split.x, split.y, attack, folder=tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1e-6)  # other weights, next to the same function
    find_verdicts(model, split.x, split.y, attack, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 9


def test_what_cannot_be_judged_is_refused(tmp_path):
    y = torch.zeros(10, dtype=torch.long)
    with pytest.raises(UserError, match="no images"):
        find_verdicts(ZERO, POINTS[:0], y[:0], Attack())
    with pytest.raises(UserError, match="divide by 255"):
        find_verdicts(ZERO, POINTS * 255, y, Attack())
    with pytest.raises(UserError, match="labels must lie in 0 to 1"):
        find_verdicts(ZERO, POINTS, y + 2, Attack())
    undefined = Plain(lambda x: torch.stack([(x - x).sqrt().sum((1, 2, 3)), x.sum((1, 2, 3)) * 0], 1))
    with pytest.raises(UserError, match="gradient in the images is NaN"):
        find_verdicts(undefined, POINTS, y, APGD(0.1))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        find_verdicts(ZERO, POINTS, y, Attack(eps=0.1, steps=1), folder=tmp_path / "file")


def test_few_images_are_drawn_from_all_classes(small_run):
    from advebm.metrics.base import Subject
    from advebm.metrics.robustness import random_subset

    data = small_run.recipe.data.load()
    order = data.test.y.argsort()
    subject = Subject(small_run.model()[0], data, data.test.take(order), Attack())
    assert len(random_subset(subject, 60).split.y.unique()) == 10
    assert torch.equal(random_subset(subject, 60).split.x, random_subset(subject, 60).split.x)
    assert random_subset(subject, 10_000) is subject
    for metric in (RobustAccuracy, TargetedAccuracy):
        with pytest.raises(UserError, match="images must be at least 1, or none"):
            metric(images=0)


def test_random_attacks_resume_to_the_same_verdicts(small_run, tmp_path):
    model, split = small_run.model()[0], small_run.recipe.data.load().test.take(slice(60))
    attack = Attack(eps=0.25, steps=3, restarts=3)
    whole = find_verdicts(model, split.x, split.y, attack, batch=20)
    assert 0 < whole.standing().sum() < 60

    def stop(done, note, heard=[]):  # noqa: B006
        heard.append(done)
        if len(heard) == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_verdicts(model, split.x, split.y, attack, batch=20, folder=tmp_path, tell=stop)
    again = find_verdicts(model, split.x, split.y, attack, batch=20, folder=tmp_path)
    assert torch.equal(again.broken, whole.broken)


def test_progress_goes_from_nothing_to_all(small_run):
    heard = []
    model, split = small_run.model()[0], small_run.recipe.data.load().test.take(slice(60))
    find_verdicts(
        model, split.x, split.y, Attack(eps=0.1, steps=4, restarts=2), batch=20, tell=lambda n, note: heard.append(n)
    )
    assert heard == sorted(heard)
    assert heard[0] < 10
    assert heard[-1] == 60


def test_the_verdict_is_the_networks_own(small_run):
    """A search in another precision may miss points; what it takes for broken is broken in float32 too."""
    model, split = small_run.model()[0], small_run.recipe.data.load().test
    exact = find_verdicts(model, split.x, split.y, APGD(0.2, steps=10)).standing()
    low = find_verdicts(model, split.x, split.y, APGD(0.2, steps=10), precision="bfloat16").standing()
    assert 0 < exact.sum() < exact.numel()
    assert abs(int(exact.sum()) - int(low.sum())) <= 0.02 * exact.numel()


def test_a_search_that_was_deceived_searches_again(described, monkeypatch):
    """The quick view calls everything broken, so every search stops at once; the verdict comes from a second one."""
    from advebm.metrics import verdicts

    wrong = lambda x: torch.stack([1 + 0 * x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], 1)
    monkeypatch.setattr(verdicts, "faster_model", lambda model, x, precision: wrong)
    attack = APGD(0.1, steps=5)
    f = linear(torch.tensor([10.0]), b=-5.0)
    x, y = torch.tensor([0.51, 0.53, 0.55, 0.57, 0.58, 0.7]).view(6, 1, 1, 1), torch.ones(6, dtype=torch.long)
    assert find_verdicts(Plain(f), x, y, attack).standing().tolist() == [False] * 5 + [True]


def test_an_attack_that_leaves_its_ball_is_refused(described):
    class Far(Halves):
        eps = 0.01

    class Outside(Halves):
        def runs(self, classes):
            return [AttackRun("out", lambda f, x, y, generator: x - 0.5, 1)]

    for attack in (Far(), Outside()):
        with pytest.raises(UserError, match="left its ball or the box"):
            find_verdicts(ZERO, POINTS, torch.zeros(10, dtype=torch.long), attack)


def test_a_critic_is_attacked_as_two_classes():
    """One logit 4 (x - 0.5): class 1 above 0.5."""
    critic = Plain(lambda x: 4 * (x.flatten(1).mean(1) - 0.5))
    torch.testing.assert_close(critic_as_classifier(critic)(POINTS).softmax(1)[:, 1], critic(POINTS).sigmoid())
    y = (POINTS.flatten() > 0.5).long()
    for shape in (lambda v: v, lambda v: v[:, None]):
        found = find_verdicts(Plain(lambda x, s=shape: s(critic(x))), POINTS, y, AutoAttack(0.1, version="quick"))
        assert found.standing().tolist() == [abs(v - 0.5) > 0.1 for v in POINTS.flatten().tolist()]
    for attack in (FAB(0.1, steps=10), Square(0.1, queries=20)):
        assert find_verdicts(critic, POINTS, y, attack).standing().sum() == 8


def test_intervals_are_wilsons():
    for hits, n in ((0, 30), (30, 30), (7, 50)):
        low, high = wilson(torch.arange(n) < hits)
        exact = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-4)


# The network as it is searched ----------------------------------------------------------------------------------------


def test_folding_changes_nothing_but_rounding(small_run):
    from advebm.models.resnet import ResNet

    torch.manual_seed(0)
    backbone, _ = ResNet(depth=8, width=4).build(3, 8)
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    backbone.eval()
    x = torch.rand(4, 3, 8, 8)
    folded = fold(backbone)[0]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), backbone(x), rtol=1e-4, atol=1e-5)
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    model = small_run.model()[0]
    with searching(model) as f:
        quick = faster_model(model, small_run.recipe.data.load().test.float()[:4])
        assert quick is not model
        x = torch.rand(5, 1, 8, 8)
        torch.testing.assert_close(quick(x), f(x), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_folded_is_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

        def forward(self, x):
            return (self.conv(x) if x.sum() > 0 else -self.conv(x)).mean((2, 3))

    class Alternating(Odd):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return (-1) ** self.calls * self.conv(x).mean((2, 3))

    for model in (Odd().eval(), Alternating().eval()):
        assert faster_model(model, torch.rand(2, 1, 4, 4)) is model


def test_a_critic_is_refused_by_every_attack():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    for model in (critic, nn.Sequential(critic, nn.Flatten(0))):
        with pytest.raises(UserError, match="accuracy needs a classifier, the model has one output"):
            Attack()(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 0, 0]))
