"""Tests with timm, transformers and RobustBench themselves, in the environment of make test-zoo."""

import pytest
import torch


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def pictures(generator):
    return torch.rand(3, 3, 32, 32, generator=generator)


def normalised(x, mean, std):
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def agree(model, expected, atol=1e-5):
    torch.testing.assert_close(model, expected, rtol=1e-5, atol=atol)
    assert expected.std() > 1e-2
