import pytest
import torch

import advebm
from advebm.core.errors import UserError
from advebm.models.zoo.robustbench import RobustBench
from advebm.runs.find_model import find_reference
from tests.zoo.conftest import agree

pytest.importorskip("pyautoattack", reason="make test-zoo installs robustbench")

NAME = "Rice2020Overfitting"


def make():
    torch.manual_seed(2)
    net = RobustBench(NAME, threat="L2").build(3, 32)[0].net.eval()
    return net


def test_logits_are_the_zoos(tmp_path, pictures, monkeypatch):
    """The zoo takes a file that is there and does not download it."""
    net = make()
    path = tmp_path / "robustbench" / "cifar10" / "L2" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path))
    with torch.no_grad():
        expected = net(pictures)
        agree(advebm.load(f"robustbench:cifar10/L2/{NAME}")(pictures), expected)
        agree(advebm.load(f"robustbench:cifar10/L2/{NAME}@{path}")(pictures), expected)


def test_data_and_threat_are_known():
    reference = find_reference(f"robustbench:cifar10/L2/{NAME}")
    assert reference.options()["data"] == {"kind": "cifar10"}
    threat = reference.threat()
    assert (threat.norm, threat.eps) == ("l2", 0.5)


def test_names_that_stand_for_several_models_or_none():
    with pytest.raises(
        UserError, match=r"stands for \d models; there is cifar10/Linf/Rice2020Overfitting, cifar10/L2/"
    ):
        find_reference(f"robustbench:{NAME}")
    with pytest.raises(UserError, match=r"has no model 'Rice2020Overfit' \(did you mean 'Rice2020Overfitting'\?\)"):
        find_reference("robustbench:Rice2020Overfit")
