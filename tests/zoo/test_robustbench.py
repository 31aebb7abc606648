import pytest
import torch

import advebm
from advebm.core.errors import UserError
from advebm.runs.find_model import find_reference
from tests.zoo.conftest import agree

REASON = "ROBUSTBENCH_SRC and AUTOATTACK_SRC name checkouts for make test-zoo"
zoo = pytest.importorskip("robustbench.model_zoo.models", reason=REASON, exc_type=ImportError)

NAME = "Rice2020Overfitting"


def make():
    torch.manual_seed(2)
    net = next(p for d, ps in zoo.model_dicts.items() if d.value == "cifar10" for t, p in ps.items() if t.value == "L2")
    return net[NAME]["model"]().eval()


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
