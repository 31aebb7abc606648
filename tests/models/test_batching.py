import pytest
import torch
from torch import nn

from advebm.models import batching
from advebm.models.batching import batch_size_for, bytes_per_image
from advebm.models.resnet import ResNet


def test_without_a_model_the_pixels_alone_decide():
    assert [batch_size_for((3, size, size)) for size in (8, 32, 64, 224, 1024)] == [500, 500, 125, 10, 1]


def test_bytes_are_those_of_the_activations_that_a_gradient_needs():
    """A convolution stores its input, ReLU its output, which the square stores too."""
    conv = nn.Conv2d(3, 8, 3, padding=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x).relu().square().sum((2, 3))

    expected = 4 * (3 + 8) * 16 * 16
    assert bytes_per_image(Net(), (3, 16, 16)) == expected
    assert all(p.requires_grad for p in conv.parameters())


def test_bytes_grow_with_the_pixels():
    net = ResNet(depth=8, width=8).build(3, 16)[0]
    ratio = bytes_per_image(net, (3, 32, 32)) / bytes_per_image(net, (3, 16, 16))
    assert ratio == pytest.approx(4, rel=0.05)


def test_a_batch_takes_at_most_its_share_of_the_memory(monkeypatch):
    net = ResNet(depth=8, width=8).build(3, 32)[0]
    used = bytes_per_image(net, (3, 32, 32))
    for memory, expected in ((1e15, 500), (used * 4 * 7.5, 7), (1, 1)):
        monkeypatch.setattr(batching, "memory_of", lambda device, memory=memory: memory)
        assert batch_size_for((3, 32, 32), net) == expected


def test_a_model_that_takes_no_such_image_is_left_to_fail_where_it_is_used():
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    assert batch_size_for((3, 32, 32), net) == 500


def test_memory_is_that_of_the_host():
    assert batching.memory_of(torch.device("cpu")) > 2**30
