import pytest
import torch
from torch import nn

from advebm.models.modes import DualBatchNorm2d, all_finite, searching, using


def snapshot(model):
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    return modes, flags, {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a[:2] == b[:2] and all(torch.equal(a[2][k], b[2][k]) for k in a[2])


@pytest.mark.parametrize("training", [False, True])
def test_searching_leaves_no_trace(net, batch, training):
    net[1].eval()
    net[0].weight.requires_grad_(False)
    before = snapshot(net)
    with searching(net, training=training) as f:
        assert net.training is training
        assert net[1].training is training
        assert not any(p.requires_grad for p in net.parameters())
        f(batch.x + 3)
    assert same(snapshot(net), before)
    assert net[1].track_running_stats


def test_searching_leaves_no_trace_of_a_failure(net, batch):
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), searching(net, training=True):
        raise ZeroDivisionError
    assert same(snapshot(net), before)


def test_a_search_in_train_mode_uses_the_batch_and_in_eval_mode_the_running_statistics(net, batch):
    x = batch.x + 3
    with searching(net, training=True) as f:
        own = f(x)
    with searching(net) as f:
        running = f(x)
    reference = nn.functional.batch_norm(net[0](x), None, None, net[1].weight, net[1].bias, training=True)
    torch.testing.assert_close(own, net[4](net[3](net[2](reference))))
    torch.testing.assert_close(running, net.eval()(x))
    assert not torch.allclose(own, running)


def test_dual_norm_keeps_its_branches_apart():
    norm = nn.Sequential(DualBatchNorm2d(2))
    with using(norm, "adversarial"):
        norm(torch.randn(8, 2, 4, 4) + 5)
    assert norm[0].branches["clean"].running_mean.abs().max() == 0
    assert norm[0].branches["adversarial"].running_mean.min() > 0.3
    assert norm[0].branch == "clean"


def test_a_misspelt_branch_changes_nothing():
    norm = nn.Sequential(DualBatchNorm2d(2))
    with pytest.raises(KeyError), using(norm, "adverserial"):
        pass
    assert norm[0].branch == "clean"


def test_all_finite_looks_at_weights_and_buffers(net):
    assert all_finite(net)
    net[1].running_mean[0] = torch.inf
    assert not all_finite(net)
