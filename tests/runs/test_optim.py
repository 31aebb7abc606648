"""LARS against a re-derivation."""

import copy

import pytest
import torch
from torch import nn

from advebm.core.errors import UserError
from advebm.runs.optim import LARS
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
