import dataclasses
import math

import numpy as np
import pytest
import torch

import advebm
from advebm.attacks.projected import Attack
from advebm.core.errors import UserError
from advebm.edits.restore import Denoise, Inpaint, Upsample
from advebm.edits.transform import Counterfactual, Translate
from advebm.metrics.base import Features, Subject
from advebm.metrics.restoration import Counterfactuals, Restoration, add_salt_and_pepper, corrupt_for, fidelity
from advebm.metrics.similarity import psnr
from tests.helpers import Plain

skimage = pytest.importorskip("skimage", reason="restoration is compared with scikit-image")


@pytest.fixture(scope="module")
def subject():
    data = advebm.load_data("digits")
    centres = data.train.float().flatten(1)[:200]
    model = Plain(lambda x: -torch.cdist(x.flatten(1), centres).square() / (2 * 0.5**2))  # a mixture of Gaussians
    return Subject(model, data, data.test, Attack(1.0, "l2"))


def test_fidelity_is_scikit_images(generator):
    from skimage import metrics

    a = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, dtype=torch.float64, generator=generator)).clamp(0, 1)
    found = fidelity(a, b)
    for i in range(3):
        truth, other = (z[i].permute(1, 2, 0).numpy() for z in (a, b))
        assert found["PSNR"][i].item() == pytest.approx(metrics.peak_signal_noise_ratio(truth, other, data_range=1.0))
    assert math.isinf(psnr(a, a)[0])


def test_what_edits_are_given(generator):
    x = torch.full((1, 3, 100, 100), 0.5)
    noisy = corrupt_for(Denoise(sigma=0.1), x, None, generator)
    assert noisy.std().item() == pytest.approx(0.1, rel=0.05)
    pepper = add_salt_and_pepper(x, 0.2, generator)
    assert (pepper == 0).float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert (pepper == 1).float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert ((pepper == 0.5).all(1) | (pepper != 0.5).all(1)).all()
    assert corrupt_for(Upsample(factor=4), x, None, generator).shape == (1, 3, 25, 25)
    assert corrupt_for(Translate(), x, None, generator) is x


def test_restoration_beside_other_ways(subject):
    edits = (Denoise(sigma=0.3), Inpaint(steps=10), Upsample(steps=5))
    records = {r.name: r for r in Restoration(edits, images=25)(subject, torch.Generator().manual_seed(1))}
    value = lambda name: records[f"PSNR {name}"].value
    assert (
        value("denoising 0.3 by energy") > value("denoising 0.3 by total variation") > value("denoising 0.3 by nothing")
    )
    assert value("inpainting by energy") > value("inpainting by mean fill")
    assert {"PSNR upsampling x2 by bicubic", "SSIM inpainting by biharmonic"} <= records.keys()
    assert all(r.count == 25 and np.isfinite(r.value) for r in records.values())
    again = Restoration(edits[:1], images=25)(subject, torch.Generator().manual_seed(1))
    assert records[again[-2].name].value == again[-2].value
    chosen = records["PSNR denoising 0.3 by energy"].settings["edit"]["prior"]
    assert 0.25 <= chosen <= 4  # the density of the data is near, so λ is near 1


def test_counterfactuals_are_counted(subject, monkeypatch):
    goals, call = [], Counterfactual.__call__
    monkeypatch.setattr(Counterfactual, "__call__", lambda e, m, x, y, **o: goals.append(y) or call(e, m, x, y, **o))
    judge = Features(
        "twin", lambda x: x.flatten(1), lambda z: torch.cat([z[:, :1] * 0 + 1, z[:, :1].expand(-1, 9) * 0], 1)
    )
    digits = Plain(lambda x: subject.model(x)[:, :10])
    seen = subject._replace(model=digits, features=judge)
    metric = Counterfactuals(Counterfactual(steps=10, searches=3, radius=1.2), "random", images=359)
    found = {r.name: r for r in metric(seen, torch.Generator().manual_seed(0))}
    assert (torch.cat(goals) != subject.split.y).all()
    hits = round(found["counterfactual reached"].value * 359)
    assert 1 < hits < 359
    assert found["counterfactual distance"].count == hits
    assert 0 < found["counterfactual distance"].value < 1.2
    assert found["counterfactual named so (twin)"].value < 0.5  # the judge says 0 to everything


def test_only_what_restores_is_compared(subject, monkeypatch):
    with pytest.raises(UserError, match="edits that restore are denoise, inpaint and upsample"):
        Restoration((Translate(),))
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(UserError, match=r"pip install 'advebm\[compare\]'"):
        Restoration(images=2)(subject, torch.Generator())
    assert dataclasses.replace(Restoration(), images=3).images == 3
