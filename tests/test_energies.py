import math

import pytest
import torch

from advebm import energies


@pytest.fixture
def logits(generator):
    return torch.randn(7, 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def y():
    return torch.arange(7) % 5


def test_energies_by_hand():
    """Two logits (0, ln 3): p = (1/4, 3/4), E(x) = -ln 4."""
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    y = torch.tensor([1])
    assert energies.joint(logits, y).item() == pytest.approx(-math.log(3))
    assert energies.marginal(logits).item() == pytest.approx(-math.log(4))
    assert energies.conditional(logits, y).item() == pytest.approx(-math.log(3 / 4))


def test_joint_splits_into_marginal_plus_conditional(logits, y):
    torch.testing.assert_close(
        energies.joint(logits, y),
        energies.marginal(logits) + torch.nn.functional.cross_entropy(logits, y, reduction="none"),
    )


def test_marginal_sums_the_joint_over_classes(logits):
    """exp(-E(x)) = Σ_y exp(-E(x, y))."""
    joint = torch.stack([energies.joint(logits, torch.full((7,), k)) for k in range(5)], 1)
    torch.testing.assert_close((-energies.marginal(logits)).exp(), (-joint).exp().sum(1))


def test_data_have_low_energy_when_logits_are_high(logits, y):
    higher = logits + 3
    assert (energies.joint(higher, y) < energies.joint(logits, y)).all()
    assert (energies.marginal(higher) < energies.marginal(logits)).all()
    assert (energies.binary(torch.ones(3, 1)) < energies.binary(torch.zeros(3))).all()


def test_similarity_is_minus_the_product_over_temperature():
    z, r = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    assert energies.similarity(z, r, temperature=0.5, cosine=False).item() == pytest.approx(-12.0)
    assert energies.similarity(z, r, temperature=0.5).item() == pytest.approx(-1.2)


def test_infonce_is_the_cross_entropy_of_finding_the_positive(generator):
    z, positive = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    negatives = torch.randn(6, 3, generator=generator)
    scores = torch.cat([(z * positive).sum(1, keepdim=True), z @ negatives.T], 1) / 0.2
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(4, dtype=torch.long), reduction="none")
    torch.testing.assert_close(energies.infonce(z, positive, negatives, temperature=0.2, cosine=False), expected)


def test_infonce_cosine_ignores_lengths(generator):
    z, positive, negatives = (torch.randn(5, 3, generator=generator) for _ in range(3))
    torch.testing.assert_close(
        energies.infonce(z, positive, negatives), energies.infonce(3 * z, 0.2 * positive, 7 * negatives)
    )


def test_crowding_of_two_points_is_their_cosine():
    z = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(energies.crowding(z, temperature=0.5), torch.full((2,), math.sqrt(0.5) / 0.5))
