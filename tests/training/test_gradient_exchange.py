"""Buckets of gradients, by a stand-in for the other processes; real ones are in tests/runs/test_processes.py."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d
from torch.utils.checkpoint import checkpoint

from advebm.core.errors import UserError
from advebm.runs.engine import Engine
from advebm.training import gradient_exchange
from advebm.training.gradient_exchange import GradientExchange


class Others:
    """Two more processes, of twice the gradients of this one; notes what is sent, and when it is waited for."""

    world = 3

    def __init__(self):
        self.log = []

    def begin_sum(self, values):
        self.log.append(len(values))
        self.sent = values.clone()
        scale = torch.full_like(values, 5)
        values.mul_(scale)
        return lambda: self.log.append("waited")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gradient_exchange, "BUCKET", 400)  # bytes: 100 numbers


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
    return model.to(memory_format=torch.channels_last)


def loss_of(model):
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean() + 0.1 * model(1 - x).square().mean()  # two forward passes


def test_gradients_are_the_mean_over_processes_and_keep_their_layout():
    model, engine = network(), Others()
    expected = copy.deepcopy(model)
    loss_of(expected).backward()
    GradientExchange(model.parameters(), engine).backward(loss_of(model))
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * 5 / 3)
        assert p.grad.stride() == p.stride()
    numbers = [5 + 5 * 4 * 9, 4 + 4 + 4 + 4 * 3 * 9]  # of the last layer, and of the others
    assert engine.log == [numbers[0] + 2, numbers[1] + 4, "waited", "waited"]


def test_the_first_bucket_is_sent_before_the_backward_pass_has_ended():
    model, engine = network(), Others()
    model[0].weight.register_hook(lambda gradient: engine.log.append("first layer"))
    GradientExchange(model.parameters(), engine).backward(loss_of(model))
    assert engine.log.index("first layer") > engine.log.index(5 + 180 + 2)


def test_losses_are_added_up_before_they_are_exchanged():
    model, engine = network(), Others()
    exchange = GradientExchange(model.parameters(), engine)
    exchange.backward(loss_of(model), exchange=False)
    assert not engine.log
    once = [p.grad.clone() for p in model.parameters()]
    exchange.backward(loss_of(model))
    for p, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient * 5 / 3)
    sent = len(engine.log)
    exchange.backward(loss_of(model), exchange=False)
    assert len(engine.log) == sent


def test_parameters_without_a_gradient_are_sent_as_well():
    """The order of buckets is that of the other processes; who has no gradient anywhere gets none."""
    model, engine = network(), Others()
    exchange = GradientExchange(model.parameters(), engine)
    exchange.backward(conv2d(torch.ones(1, 3, 3, 3), model[0].weight).sum())
    assert engine.log == [187, 124, "waited", "waited"]
    assert [p.grad is None for p in model.parameters()] == [False] + 5 * [True]
    assert engine.sent.count_nonzero() == 108 + 1  # of the first layer's weights, and that they are there


def test_what_is_frozen_is_not_exchanged_until_it_is_thawed():
    """An objective may thaw layers; and a search freezes all for a while."""
    model, engine = network(), Others()
    model[3].requires_grad_(False)
    exchange = GradientExchange(model.parameters(), engine)
    exchange.backward(loss_of(model))
    assert engine.log == [124, "waited"]
    assert model[3].weight.grad is None
    engine.log.clear()
    model.requires_grad_(False).requires_grad_(True)
    model.zero_grad()
    expected = copy.deepcopy(network())
    loss_of(expected).backward()
    model.load_state_dict(expected.state_dict())
    exchange.backward(loss_of(model))
    assert engine.log == [187, 124, "waited", "waited"]
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * 5 / 3)


def test_each_type_of_numbers_has_its_own_buckets():
    engine = Others()
    parameters = [nn.Parameter(torch.ones(2, dtype=kind)) for kind in (torch.float32, torch.float64, torch.float32)]
    GradientExchange(parameters, engine).backward(sum(p.double().sum() for p in parameters))
    assert [p.grad.dtype for p in parameters] == [p.dtype for p in parameters]
    assert engine.log == [3, 3, 3, "waited", "waited", "waited"]


def test_a_gradient_in_two_parts_is_refused():
    model, engine = network(), Others()
    exchange = GradientExchange(model.parameters(), engine)
    x = torch.rand(2, 3, 6, 6, requires_grad=True)
    parts = [checkpoint(model, part, use_reentrant=True).sum() for part in (x, 1 - x)]
    with pytest.raises(UserError, match=r"in two parts.*set its use_reentrant to False"):
        exchange.backward(sum(parts))
    model.zero_grad()
    exchange.backward(checkpoint(model, x, use_reentrant=False).sum() + model(x).sum())


def test_one_process_has_no_hooks():
    model = network()
    exchange = GradientExchange(model.parameters(), Engine("cpu"))
    exchange.backward(loss_of(model))
    assert all(p.grad is not None and not p._post_accumulate_grad_hooks for p in model.parameters())
