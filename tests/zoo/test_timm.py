import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate

import advebm
from advebm.core.errors import UserError
from advebm.models.network import save
from advebm.models.zoo.timm import Timm
from advebm.runs.find_model import find_reference
from tests.zoo.conftest import agree, normalised

timm = pytest.importorskip("timm", reason="make test-zoo installs timm", exc_type=ImportError)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = (
    "convnext_atto",
    "resnet18",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_small_050",
    "efficientvit_m0",  # a batch norm stands before its last layer
)


def make(name, **options):
    """A classifier of 10 classes with weights and statistics that no network begins with."""
    torch.manual_seed(3)
    net = timm.create_model(name, num_classes=10, **options)
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", ".bias")):
            value.normal_(0, 0.1)
    torch.nn.init.normal_(net.get_classifier().weight, 0, 0.1)
    return net.eval()


def constants(name):
    configuration = timm.get_pretrained_cfg(name)
    return configuration.mean, configuration.std


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_librarys(name, tmp_path, pictures):
    net = make(name)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "net.pt")
    model = advebm.load(f"timm:{name}@{tmp_path / 'net.pt'}")
    large = interpolate(pictures, (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = net(normalised(large, *constants(name)))
        agree(model(pictures), expected)
        agree(model(large), expected)
    assert model.features(pictures).shape == (3, model.head.in_features)


def test_gradients_reach_small_images_through_the_resizing(tmp_path, pictures):
    net = make("convnext_atto")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model = advebm.load(f"timm:convnext_atto@{tmp_path / 'net.pt'}").double()
    x = pictures[:1].double()
    y = torch.tensor([3])
    moved = advebm.energy(model, (x + 1e-5).clamp(0, 1), y) - advebm.energy(model, x, y)
    z = x.clone().requires_grad_()
    loss = -model(z)[0, 3]
    loss.backward()
    step = (x + 1e-5).clamp(0, 1) - x
    assert moved.item() == pytest.approx((z.grad * step).sum().item(), rel=1e-2)


def test_images_as_they_are(tmp_path, pictures):
    net = make("convnext_atto")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model = advebm.load(f"timm:convnext_atto,size=none@{tmp_path / 'net.pt'}")
    with torch.no_grad():
        agree(model(pictures), net(normalised(pictures, *IMAGENET)))


def test_a_folder_that_timm_wrote(tmp_path, pictures):
    net = make("resnet18")
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "input_size": [3, 32, 32], "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": own})
    )
    with pytest.raises(UserError, match=r"has no model.safetensors, the weights of its resnet18"):
        advebm.load(tmp_path)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        agree(advebm.load(tmp_path)(pictures), net(normalised(pictures, own["mean"], own["std"])))


def test_a_new_network_has_the_librarys_features(pictures):
    for name, size in (("convnext_atto", 32), ("vit_tiny_patch16_224", 32), ("resnet18", 20)):
        module, width = Timm(name).build(3, size)
        assert module(pictures[..., :size, :size]).shape == (3, width)
    module, width = Timm("vit_tiny_patch16_224", size=64).build(1, 28)
    assert module(pictures[:, :1, :28, :28]).shape == (3, width)


def test_one_line_for_what_is_unknown_damaged_or_of_another_network(tmp_path):
    torch.save(make("resnet18").state_dict(), tmp_path / "net.pt")
    content = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    weights = make("convnext_atto").state_dict()
    weights["stem.0.weight"] = weights["stem.0.weight"][:3]
    torch.save(weights, tmp_path / "shape.pt")
    torch.save({"fc.weight": torch.tensor(3.0)}, tmp_path / "scalar.pt")
    for reference, message in {
        "timm:convnext_attoo": r"timm has no model 'convnext_attoo' \(did you mean 'convnext_atto'\?\)",
        "timm:convnext_atto.nowhere": "timm has no weights 'convnext_atto.nowhere'; there is convnext_atto.d2_in1k",
        "timm:test_vit4": "cannot|no weights",
        f"timm:convnext_atto@{tmp_path}/none.pt": "there is no weight file at",
        f"timm:convnext_atto@{tmp_path}/net.pt": "has no matrix head.fc.weight, so it does not fit convnext_atto",
        f"timm:convnext_atto@{tmp_path}/shape.pt": "of another shape: stem.0.weight",
        f"timm:convnext_atto@{tmp_path}/half.pt": "damaged",
        f"timm:deit_tiny_distilled_patch16_224@{tmp_path}/net.pt": "has no linear layer from features to logits",
        f"timm:resnet18,crops=1@{tmp_path}/net.pt": "has no option 'crops'",
        f"timm:resnet18,size=[1@{tmp_path}/net.pt": r"size takes a number, a word or a list",
        f"timm:resnet18@{tmp_path}/scalar.pt": "has no matrix fc.weight",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            advebm.load(reference)
        assert "\n" not in str(error.value), reference


def test_a_size_that_the_network_does_not_take_is_refused():
    with pytest.raises(UserError, match="VGG of timm takes no images of 3 x 8 x 8"):
        Timm("vgg11").build(3, 8)


def test_logits_of_two_last_layers_are_refused():
    with pytest.raises(UserError, match="VOLO of timm computes its logits by more than one last layer"):
        Timm("volo_d1_224").build(3, 224)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pretrained_cfg": [1]}, "its pretrained_cfg is"),
        ({"pretrained_cfg": {"mean": "x"}}, "mean.0 takes a number"),
        ({"pretrained_cfg": {"input_size": 3}}, "input_size takes a list"),
        ({"pretrained_cfg": {"input_size": [3]}}, "input_size is channels, height and width"),
        ({"model_args": 3}, "changes options of resnet18"),
    ],
)
def test_one_line_for_a_damaged_configuration(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", **content}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        advebm.load(tmp_path)


def test_older_folders_have_the_normalisation_at_the_top(tmp_path, pictures):
    net, own = make("resnet18"), {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.5], "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "crop_pct": 1.0, **own}))
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        agree(advebm.load(tmp_path)(pictures), net(normalised(pictures, own["mean"], own["std"])))


def test_a_saved_network_is_loaded_again_and_its_card_names_it(tmp_path, pictures):
    torch.save(make("resnet18").state_dict(), tmp_path / "net.pt")
    model, architecture = find_reference(f"timm:resnet18,size=32@{tmp_path / 'net.pt'}").pretrained.load()
    save(tmp_path / "folder", model, architecture)
    with torch.no_grad():
        agree(advebm.load(tmp_path / "folder")(pictures), model(pictures))
    assert "Backbone `timm:resnet18`, which needs `pip install timm`, " in (tmp_path / "folder/README.md").read_text()
