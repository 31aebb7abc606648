import json
import sys

import pytest
import torch
from torch import nn

import advebm
from advebm.core.errors import UserError
from advebm.models import network
from advebm.models.ema import EMA
from advebm.models.network import Architecture, Normalize
from advebm.models.small import SmallConv


def architecture(**options):
    return Architecture(SmallConv(width=4, **options), 10, 1, 8, (0.3,), (0.4,))


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_small_conv_maps_images_to_logits(size, norm):
    arch = Architecture(SmallConv(width=4, norm=norm), 10, 3, size, (0.5,) * 3, (0.2,) * 3)
    model, x = arch.build(), torch.rand(2, 3, size, size)
    assert model(x).shape == (2, 10)
    torch.testing.assert_close(model.eval()(x), model.head(model.features(x)))
    assert model.features(x).shape[1] == 4 * (size // 4) * 16
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_of_the_digits_network_by_hand():
    """1·24·9 + 24·24·9 + 24·48·9 + 48·48·9 weights, 2 (24 + 24 + 48 + 48) of batch norm, 768·10 + 10 of the head."""
    model = advebm.load_recipe("digits-at").backbone
    count = sum(p.numel() for p in Architecture(model, 10, 1, 8, (0.0,), (1.0,)).build().parameters())
    assert count == 216 + 5184 + 10368 + 20736 + 288 + 7690


def test_normalisation_is_the_first_layer():
    x = torch.rand(2, 3, 4, 4)
    out = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(x)
    torch.testing.assert_close(out[:, 2], (x[:, 2] - 0.3) / 2)
    with pytest.raises(UserError, match="positive deviation"):
        Normalize((0.5,), (0.0,))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    a, state = architecture().build(1), torch.get_rng_state()
    torch.manual_seed(6)
    b, c = architecture().build(1), architecture().build(2)
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state), "building moved the global random state"


@pytest.mark.parametrize(
    "options", [{"features": 12}, {"norm": "group", "activation": "relu"}, {"activation": "leaky_relu"}]
)
def test_save_and_load(tmp_path, options):
    arch = architecture(**options)
    model, x = arch.build(3), torch.rand(5, 1, 8, 8)
    model(x)
    network.save(tmp_path, model, arch, title="t", extra={"threat": {"eps": 1}})
    again, read = network.load(tmp_path)
    assert read == arch
    assert not again.training
    torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["threat"] == {"eps": 1}
    assert "advebm.load" in (tmp_path / "README.md").read_text()


def test_averaged_weights_are_preferred(tmp_path):
    arch = architecture()
    model, average = arch.build(1), arch.build(2)
    network.save(tmp_path, model, arch, ema=average.state_dict())
    assert torch.equal(network.load(tmp_path)[0].head.weight, average.head.weight)
    assert torch.equal(network.load(tmp_path, ema=False)[0].head.weight, model.head.weight)


def test_damaged_models_are_named(tmp_path):
    arch = architecture()
    network.save(tmp_path, arch.build(), arch)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        network.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no weights at"):
        network.load(tmp_path)
    weights.write_bytes(whole)
    config.write_text(text.replace('"outputs": 10', '"outputs": 7'))
    with pytest.raises(UserError, match="does not fit the model"):
        network.load(tmp_path)
    config.write_text(text.replace("small-conv", "os:system"))
    with pytest.raises(UserError, match="foreign code"):
        network.load(tmp_path)
    config.write_text(text[:50])
    with pytest.raises(UserError, match=r"config.json is damaged"):
        network.load(tmp_path)
    with pytest.raises(UserError, match=r"config.json is missing"):
        network.load(tmp_path / "nowhere")


def test_bad_backbones_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        SmallConv(width=0)
    with pytest.raises(UserError, match="8, 16 or 32 pixels, got 28"):
        SmallConv().build(1, 28)


def test_ema_halves_a_weight_in_its_half_life():
    """A parameter that jumps from 0 to 1: after h images the average is 1/2, after 2 h it is 3/4."""
    model = nn.BatchNorm1d(1)
    nn.init.zeros_(model.weight)
    ema = EMA(model, half_life=1000)
    nn.init.ones_(model.weight)
    model.running_mean.fill_(8.0)
    model.num_batches_tracked.fill_(5)
    for step in range(1, 11):
        ema.update(model, 100_000 + 100 * step, 100)
    assert ema.module.weight.item() == pytest.approx(0.5)
    assert ema.module.running_mean.item() == pytest.approx(4.0)
    assert ema.module.num_batches_tracked.item() == 5
    for _ in range(20):
        ema.update(model, 200_000, 50)
    assert ema.module.weight.item() == pytest.approx(0.75)


def test_ema_forgets_the_first_weights_early_and_without_memory_copies():
    model = nn.BatchNorm1d(1)
    ema, copy = EMA(model, half_life=1e9), EMA(model, half_life=0)
    nn.init.constant_(model.weight, 5.0)
    for images in range(100, 3000, 100):
        ema.update(model, images, 100)
        copy.update(model, images, 100)
    assert ema.module.weight.item() == pytest.approx(5.0, abs=1e-3)
    assert copy.module.weight.item() == 5.0
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_low_precision_stays_inside_the_network(tmp_path):
    """Logits, energies and input gradients are float32 and near; what is saved and loaded knows nothing of it."""
    arch = architecture(norm="group")
    model, x = arch.build(1), torch.rand(16, 1, 8, 8, requires_grad=True)
    exact = model(x)
    slope = torch.autograd.grad(exact.logsumexp(1).sum(), x)[0]
    model.precision = torch.bfloat16
    short = model(x)
    short_slope = torch.autograd.grad(short.logsumexp(1).sum(), x)[0]
    assert short.dtype == short_slope.dtype == torch.float32
    assert 0 < (short - exact).abs().max() < 0.05
    cosine = torch.nn.functional.cosine_similarity(slope.flatten(1), short_slope.flatten(1))
    assert 0.98 < cosine.min() < 1 - 1e-9
    network.save(tmp_path, model, arch)
    loaded = network.load(tmp_path)[0]
    assert loaded.precision == torch.float32
    assert all(v.dtype == torch.float32 for v in loaded.state_dict().values())
    torch.testing.assert_close(loaded(x), exact)


def test_somebody_elses_model_imports_nothing(tmp_path):
    """A published configuration may not name code to import, neither as a kind nor as the path of an own module."""
    network.save(tmp_path, architecture().build(), architecture())
    path = tmp_path / "config.json"
    for backbone in ({"kind": "own", "path": "antigravity:x"}, {"kind": "antigravity:x"}):
        plain = json.loads(path.read_text())
        plain["architecture"]["backbone"] = backbone
        path.write_text(json.dumps(plain))
        with pytest.raises(UserError, match=r"would import foreign code|only when it is named"):
            network.load(tmp_path)
    assert "antigravity" not in sys.modules
