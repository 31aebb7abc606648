"""The playground of the plane: densities against their draws, binary AT and maximum likelihood against the paper."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import make_moons
from torch import nn

from advebm import cli
from advebm.core.errors import UserError
from advebm.descent import free, raw, unit
from advebm.toy import densities, figures, train


@pytest.fixture(scope="module")
def plays():
    """Both methods on the paper's density, trained for a second each."""
    return {m: train.train_toy("gaussian", m, updates=150, batch=128, frames=3) for m in train.METHODS}


# Densities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", densities.DENSITIES)
def test_draws_have_the_density(name, generator):
    """It integrates to 1 and has the draws' means, second moments and share of every cell."""
    density = densities.find_density(name)
    x = density.sample(20_000, generator)
    assert x.shape == (20_000, 2)
    points = train.plane_points(200).view(-1, 2)  # cells of 0.04
    mass = density.log_density(points).exp() * 0.04**2
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    for moment in (lambda v: v, lambda v: v**2, lambda v: v.prod(1, keepdim=True)):
        expected, got = (mass[:, None] * moment(points)).sum(0), moment(x)
        assert ((got.mean(0) - expected).abs() < 5 * got.std(0) / len(x) ** 0.5 + 4e-3).all()
    coarse = mass.view(20, 10, 20, 10).sum((1, 3)).numpy()
    edges = np.linspace(-4, 4, 21)
    counts = np.histogram2d(x[:, 1], x[:, 0], bins=[edges, edges])[0]
    assert np.abs(counts / len(x) - coarse).max() < 5 * (coarse.max() / len(x)) ** 0.5
    assert (counts[coarse < 1e-7] == 0).all()


def test_closed_forms_by_hand(generator):
    x = torch.randn(5, 2, generator=generator)
    expected = -x.square().sum(1) / (2 * 0.36) - math.log(2 * math.pi * 0.36)
    torch.testing.assert_close(densities.find_density("gaussian").log_density(x), expected)
    eight = densities.find_density("eight-gaussians")
    top = eight.log_density(torch.tensor([[2.2, 0.0]])).item()  # the neighbours are 1.68 away: 6.7 deviations
    assert top == pytest.approx(-math.log(2 * math.pi * 0.0625 * 8), abs=1e-4)
    straight = dataclasses.replace(densities.Pinwheel(), arms=1, twist=0.0)
    offset = (x - torch.tensor([2.2, 0.0])) / torch.tensor([0.5, 0.25])
    expected = -offset.square().sum(1) / 2 - math.log(2 * math.pi * 0.125)
    torch.testing.assert_close(straight.log_density(x), expected)


def test_moons_are_those_of_scikit_learn():
    centres = 1.7 * (make_moons(200, shuffle=False)[0] - (0.5, 0.25))
    np.testing.assert_allclose(np.array(densities.find_density("moons").means), centres)


# Training ------------------------------------------------------------------------------------------------------------


def test_the_methods_are_table_1(generator):
    """Normalised ascent from p0 each time; Langevin with noise √(2 step), whose chains go on."""
    adversarial, likelihood = train.METHODS["binary-at"], train.METHODS["mle"]
    assert adversarial.search.direction is unit
    assert adversarial.search.constraint is free
    assert (adversarial.search.noise, adversarial.restart) == (0, 1)
    assert adversarial.search.steps * adversarial.search.size > 4 * 2**0.5  # from a corner to the middle
    assert likelihood.search.direction is raw
    assert likelihood.search.noise**2 == pytest.approx(2 * likelihood.search.size)
    assert 0 < likelihood.restart < 0.1
    positive, negative = torch.tensor([0.3, -1.2]), torch.tensor([2.0, 0.4])
    d, moved = torch.sigmoid(-positive), torch.sigmoid(-negative)
    expected = -(d.log().mean() + (1 - moved).log().mean())
    torch.testing.assert_close(adversarial.loss(positive, negative), expected)
    torch.testing.assert_close(likelihood.loss(positive, negative), positive.mean() - negative.mean())


def test_points_climb_by_the_step_and_are_seen_on_the_way(generator):
    """On f(x) = x₀ every point goes straight to the right; 20 steps and the end were visited."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0.0]]))
    began = train.contrastive_points("concentrated", 7, generator)
    how = train.METHODS["binary-at"]
    ended, path = train.move_contrastive(model, how, began, generator)
    torch.testing.assert_close(ended, began + torch.tensor([how.search.steps * how.search.size, 0.0]))
    assert path.shape == (7 * (how.search.steps + 1), 2)
    torch.testing.assert_close(path[:7], began)
    torch.testing.assert_close(path[-7:], ended)
    assert model.weight.grad is None


def test_visits_are_counted_where_the_grid_says():
    visited = torch.zeros(40, 40, dtype=torch.bool)
    train.mark_visited(visited, torch.tensor([[-3.95, 3.95], [0.05, -0.05], [4.1, 0.0], [0.0, -9.0]]))
    assert {tuple(round(v, 1) for v in p) for p in train.plane_points()[visited].tolist()} == {(-3.9, 3.9), (0.1, -0.1)}
    torch.testing.assert_close(train.plane_points()[0, 1], torch.tensor([-3.7, -3.9]))  # [row, column] is (x, y)


def test_p0_is_the_square_or_its_lower_left_corner(generator):
    uniform, corner = (train.contrastive_points(p0, 5_000, generator) for p0 in train.P0)
    for x, low, high in ((uniform, -4, 4), (corner, -4, -2.4)):
        torch.testing.assert_close(x.amin(0), torch.full((2,), float(low)), atol=0.02, rtol=0)
        torch.testing.assert_close(x.amax(0), torch.full((2,), float(high)), atol=0.02, rtol=0)


def test_proposition_1(plays):
    """D is near 1/2 on the support and below it off the support; the game's value is -log 4; it was not so before."""
    found = train.summarize(plays["binary-at"])
    assert found["D on support"] == pytest.approx(0.5, abs=0.05)
    assert found["deviation"] < 0.03
    assert found["D off support"] < 0.3
    assert found["highest off"] < 0.55
    assert found["objective"] == pytest.approx(-math.log(4), abs=0.12)
    before = train.summarize(dataclasses.replace(plays["binary-at"], frames=plays["binary-at"].frames[:1]))
    assert before["D off support"] > 0.5
    assert before["deviation"] > 0.05


def test_maximum_likelihood_learns_the_density_and_binary_at_its_support(plays):
    adversarial, likelihood = (train.summarize(plays[m]) for m in ("binary-at", "mle"))
    assert likelihood["slope"] == pytest.approx(1, abs=0.35)
    assert likelihood["correlation"] > 0.85
    assert abs(adversarial["slope"]) < 0.15
    assert set(likelihood) == {"correlation", "slope"}


def test_slope_and_correlation_of_the_true_energy(plays):
    """A model that is half the log-density has slope 1/2 and correlation 1, and D = σ of it."""

    class Half(nn.Module):
        def forward(self, x):
            return densities.find_density("gaussian").log_density(x)[:, None] / 2

    play = plays["binary-at"]
    visited = torch.ones_like(play.visited)
    visited[0] = False  # the lowest row of cells
    frames = (dataclasses.replace(play.frames[-1], model=Half()),)
    found = train.summarize(dataclasses.replace(play, frames=frames, visited=visited))
    assert found["slope"] == pytest.approx(0.5, abs=1e-4)
    assert found["correlation"] == pytest.approx(1, abs=1e-4)
    half = lambda x: torch.sigmoid(Half()(torch.tensor([x]))).item()
    assert found["highest unvisited"] == pytest.approx(half([0.1, -3.9]))
    edge = (0.36 * 2 * math.log(1000)) ** 0.5  # beyond which lies a thousandth of the mass
    assert half([edge + 0.15, 0.0]) < found["highest off"] < half([edge - 0.15, 0.0])


def test_a_concentrated_p0_leaves_what_it_never_visits():
    play = train.train_toy("moons", p0="concentrated", updates=100, batch=128, frames=2)
    found = train.summarize(play)
    assert found["highest unvisited"] > 0.6
    assert not play.visited.all()
    assert play.visited[:8, :8].all()  # where it starts


def test_a_seed_decides_everything(plays):
    again, other = (train.train_toy("gaussian", updates=3, batch=16, frames=2, seed=s) for s in (0, 1))
    same = train.train_toy("gaussian", updates=3, batch=16, frames=2)
    for a, b in zip(again.frames, same.frames, strict=True):
        assert torch.equal(a.ended, b.ended)
        assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not torch.equal(again.frames[0].ended, other.frames[0].ended)
    assert [frame.update for frame in again.frames] == [0, 3]


def test_chains_of_maximum_likelihood_go_on():
    """Most contrastive points begin where the last update's ended."""
    frames = train.train_toy("gaussian", "mle", updates=1, batch=200, frames=2).frames
    stayed = (frames[1].began == frames[0].ended).all(1).float().mean()
    assert 0.9 < stayed.item() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": "moon"}, r"no density 'moon' \(did you mean 'moons'\?\); there is eight-gaussians"),
        ({"method": "at"}, "no method 'at'.*there is binary-at, mle"),
        ({"p0": "uniforn"}, r"no p0 'uniforn' \(did you mean 'uniform'\?\)"),
        ({"updates": 0}, "updates and batch must be at least 1 and frames 2, got 0, "),
        ({"frames": 1}, "frames 2, got .* and 1"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(UserError, match=message):
        train.train_toy(**{"density": "gaussian", **options})


# Pictures and command ------------------------------------------------------------------------------------------------


def test_the_command_writes_its_pictures(tmp_path, capsys, monkeypatch):
    short = lambda *names, play=train.train_toy, **options: play(*names, updates=4, batch=32, frames=3, **options)
    monkeypatch.setattr(train, "train_toy", short)
    assert cli.main(["toy", "gaussian", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    names = {"p0.png", "density.png", "binary-at-uniform.gif", "mle-uniform.png"}
    names |= {f"binary-at-{p0}.png" for p0 in train.P0}
    assert {path.name for path in tmp_path.iterdir()} == {f"gaussian-{name}" for name in names}
    for path in tmp_path.iterdir():
        assert str(path) in out
        with Image.open(path) as picture:
            picture.load()
            assert getattr(picture, "n_frames", 1) == (3 if path.suffix == ".gif" else 1)
    assert re.search(r"^gaussian binary-at uniform +0\.\d{3}", out, re.M)
    assert re.search(r"^gaussian mle uniform +-?\d\.\d{3} +-?\d+\.\d{3} *$", out, re.M)
    assert cli.main(["toy", "rings", "--method", "mle", "--p0", "concentrated", "--out", str(tmp_path / "one")]) == 0
    assert {p.name for p in (tmp_path / "one").iterdir()} == {f"rings-mle-concentrated.{e}" for e in ("png", "gif")}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["moon"], "no density 'moon'"), (["moons", "--all"], "leave out the name or --all"), (["--p0", "x"], "no p0")],
)
def test_bad_commands_are_one_line(words, message, tmp_path, capsys):
    assert cli.main(["toy", *words, "--out", str(tmp_path / "none")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_arrows_point_uphill_in_d(monkeypatch):
    """The field that is drawn is the normalised gradient of f, eq. 8."""
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.quiver", lambda self, *vectors, **options: drawn.append(vectors))
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    points = torch.zeros(3, 2)
    play = train.ToyRun(
        "gaussian", "binary-at", "uniform", (train.Frame(0, model, points, points),) * 2, torch.zeros(1, 1)
    )
    figures.film(play, count=2)
    x, y, right, up = drawn[0]
    torch.testing.assert_close(right, torch.full_like(right, 0.6))
    torch.testing.assert_close(up, torch.full_like(up, 0.8))
    assert (x[0].item(), y[0].item()) == (
        train.plane_points(17)[0, 0, 0].item(),
        train.plane_points(17)[0, 0, 1].item(),
    )
