import pytest
import torch
from torch import nn

from advebm.objectives.base import Batch


def pytest_collection_modifyitems(items):
    """Tests that look at the work of several processes are slow: the processes need half a minute for it."""
    for item in items:
        if "work" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def net():
    """A small classifier with batch norm, in float64 and train mode, with no normalisation of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 5)]
        return nn.Sequential(*layers).double()


@pytest.fixture
def batch(generator):
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=generator)
    others = torch.rand(2, 6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(6) % 5, view=others[0], outside=others[1])


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A short, real adversarial training run on digits that several tests look at and none changes."""
    from advebm.training.loop import train
    from tests.helpers import tiny

    return train(tiny(), tmp_path_factory.mktemp("runs") / "tiny", device="cpu")


@pytest.fixture(scope="module")
def data():
    """Digits, a few of each class."""
    from tests.kinds import few_digits

    return few_digits()


@pytest.fixture(scope="module")
def networks():
    """A classifier, a critic and an encoder with both branches, on the host."""
    from tests.kinds import small_networks

    return small_networks()
