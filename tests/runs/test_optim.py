"""LARS, Muon and lookahead against re-derivations."""

import copy
import io

import pytest
import torch
from torch import nn

from advebm.core.errors import UserError
from advebm.runs.optim import LARS, SGD, Lookahead, Muon, orthogonalize
from tests.references.contrastive import lars


def test_lars_by_hand():
    """Steps of a share of the weights' length, momentum on whole steps; biases by plain descent without decay."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = (nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64)) for shape in ((2, 3), (3,)))
    first, second = weight.tolist(), bias.detach().clone()
    optimizer = LARS(lr=2.0, momentum=0.8, weight_decay=0.3, trust=0.01).build([weight, bias])
    slopes = torch.randn(4, 2, 3, generator=draw, dtype=torch.float64)
    velocity = torch.zeros(3, dtype=torch.float64)
    for slope in slopes:
        weight.grad, bias.grad = slope.clone(), slope[0].clone()
        optimizer.step()
        velocity = 0.8 * velocity + 2.0 * slope[0]
        second -= velocity
        assert torch.equal(weight.grad, slope)
    theirs = lars(first, slopes.tolist(), 2.0, 0.8, 0.3, 0.01)
    torch.testing.assert_close(weight.detach().flatten(), torch.tensor(theirs, dtype=torch.float64))
    torch.testing.assert_close(bias.detach(), second)


def test_lars_allocates_its_state_once(monkeypatch):
    made, zeros = [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda w: made.append(w) or zeros(w))
    layer = nn.Linear(3, 2)
    optimizer = LARS().build(layer.parameters())
    for _ in range(3):
        for p in layer.parameters():
            p.grad = torch.ones(p.shape)
        optimizer.step()
    assert len(made) == 2


def test_lars_resumes_skips_and_does_not_divide_by_zero():
    moving, still, zero = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    nn.init.zeros_(zero)
    settings = LARS(lr=0.1, weight_decay=0.0)
    optimizer = settings.build([moving, still, zero])
    moving.grad, zero.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1))  # as plain descent
    again = settings.build([p.detach().clone().requires_grad_() for p in (moving, still, zero)])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copies = again.param_groups[0]["params"]
    copies[0].grad, copies[2].grad = torch.ones(2, 2), torch.ones(2, 2)
    optimizer.step()
    again.step()
    assert torch.equal(copies[0], moving)
    for bad in ({"momentum": 1.0}, {"trust": 0.0}):
        with pytest.raises(UserError, match=r"momentum must lie in \[0, 1\) and trust must be > 0"):
            LARS(**bad)
    with pytest.raises(UserError, match="lr must be > 0"):
        LARS(lr=0.0)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6)])
def test_an_orthogonalized_matrix_keeps_its_singular_vectors(shape, generator):
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonalize(matrix) @ right.T
    assert values.min() > values.max() / 100
    off_diagonal = found - torch.diag(found.diagonal())
    assert off_diagonal.abs().max() < 1e-9
    assert 0.65 < found.diagonal().min() <= found.diagonal().max() < 1.25
    torch.testing.assert_close(orthogonalize(7 * matrix), orthogonalize(matrix))


def test_small_singular_values_become_one_down_to_a_hundredth_of_the_norm():
    values = torch.logspace(-2, 0, 300, dtype=torch.float64)
    for value in values:
        rest = (1 - value**2).clamp_min(0).sqrt()
        found = orthogonalize(torch.diag(torch.stack([value, rest])))
        assert 0.65 < found[0, 0] < 1.25
    tiny = orthogonalize(torch.diag(torch.tensor([1e-3, 1.0], dtype=torch.float64)))
    assert tiny[0, 0] < 0.6


def test_muon_by_hand(generator):
    """Nesterov's momentum of filters as matrices, times a step that decays with the schedule; biases as they are."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    filters, bias = nn.Parameter(draw(6, 2, 1, 2)), nn.Parameter(draw(6))
    first, second = filters.detach().clone(), bias.detach().clone()
    optimizer = Muon(lr=0.2, momentum=0.9, weight_decay=0.5, vector_lr=0.05).build([filters, bias])
    velocities = [torch.zeros_like(first), torch.zeros_like(second)]
    for rate in (0.2, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        slopes = draw(6, 2, 1, 2), draw(6)
        filters.grad, bias.grad = slopes
        optimizer.step()
        velocities = [0.9 * v + slope for v, slope in zip(velocities, slopes, strict=True)]
        moves = [slope + 0.9 * v for v, slope in zip(velocities, slopes, strict=True)]
        step = (6 / 4) ** 0.5 * orthogonalize(moves[0].reshape(6, 4)).reshape(first.shape)
        first = first - rate * 0.5 * first - rate * step
        second = second - rate / 0.2 * 0.05 * moves[1]
    torch.testing.assert_close(filters.detach(), first)
    torch.testing.assert_close(bias.detach(), second)
    with pytest.raises(UserError, match="momentum must lie in"):
        Muon(momentum=1.0)


def test_lookahead_copies_the_weights_once(monkeypatch):
    copies, clone = [], torch.Tensor.clone
    optimizer = Lookahead(every=5).build([weight := nn.Parameter(torch.ones(3))])
    weight.grad = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "clone", lambda w, *a, **k: copies.append(w) or clone(w, *a, **k))
    optimizer.step()
    first = len(copies)
    assert first
    for _ in range(3):
        optimizer.step()
    assert len(copies) == first


def test_lookahead_by_hand_and_resumed(generator):
    """Three fast steps of SGD, then a third of the way from the slow weights, over and over; checkpoints have both."""
    config = Lookahead(SGD(lr=0.1, momentum=0.5, nesterov=False, weight_decay=0.0), every=3, share=1 / 3)
    weights = nn.Parameter(torch.randn(4, generator=generator, dtype=torch.float64))
    slow = fast = weights.detach().clone()
    velocity, optimizer = torch.zeros_like(fast), config.build([weights])
    for step in range(1, 9):
        slope = torch.randn(4, generator=generator, dtype=torch.float64)
        weights.grad = slope
        optimizer.step()
        velocity = 0.5 * velocity + slope
        fast = fast - 0.1 * velocity
        if step % 3 == 0:
            slow = fast = slow + (fast - slow) / 3
        torch.testing.assert_close(weights.detach(), fast)
        if step in (2, 4):  # goes on elsewhere
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            weights = nn.Parameter(weights.detach().clone())
            optimizer = config.build([weights])
            buffer.seek(0)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    assert config.lr == 0.1
    for bad in ({"every": 0}, {"share": 0.0}, {"optimizer": Lookahead()}):
        with pytest.raises(UserError, match=r"every is at least 1|around another"):
            Lookahead(**bad)
