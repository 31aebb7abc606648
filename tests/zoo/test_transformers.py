import json

import pytest
import torch
from torch.nn.functional import interpolate

import advebm
from advebm.core.errors import UserError
from advebm.models.zoo.base import resize
from advebm.models.zoo.transformers import Transformers, read_processor
from advebm.runs.find_model import find_reference
from tests.zoo.conftest import agree, normalised

transformers = pytest.importorskip("transformers", reason="make test-zoo installs transformers")

HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def vit(folder, *, size=48, kind=None, **options):
    torch.manual_seed(5)
    settings = transformers.ViTConfig(**SMALL, image_size=size, patch_size=8, num_labels=7, initializer_range=0.3)
    net = (kind or transformers.ViTForImageClassification)(settings).eval()
    net.save_pretrained(folder)
    about = {"image_processor_type": "ViTImageProcessor", "image_mean": HALF[0], "image_std": HALF[1]}
    about |= {"size": {"height": size, "width": size}, **options}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return net


def resnet(folder):
    torch.manual_seed(6)
    settings = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], num_labels=7)
    net = transformers.ResNetForImageClassification(settings).eval()
    net.save_pretrained(folder)
    about = {"size": {"shortest_edge": 40}, "crop_size": 32, "do_center_crop": True}
    about |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return net


def test_logits_of_a_vit_are_the_librarys(tmp_path, pictures):
    net = vit(tmp_path)
    model = advebm.load(tmp_path)
    large = interpolate(pictures, (48, 48), mode="bicubic", antialias=True)
    with torch.no_grad():
        agree(model(pictures), net(normalised(large, *HALF)).logits)
        assert model.features(pictures).shape == (3, 32)
    assert model.head.out_features == 7


def test_logits_of_a_resnet_are_the_librarys(tmp_path, generator):
    net, x = resnet(tmp_path), torch.rand(2, 3, 40, 40, generator=generator)
    with torch.no_grad():
        expected = net(normalised(x[..., 4:36, 4:36], (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))).logits
        agree(advebm.load(tmp_path)(x), expected)


def test_half_precision_weights_are_computed_in_float32(tmp_path, pictures):
    net = vit(tmp_path, size=32)
    net.bfloat16().save_pretrained(tmp_path)
    with torch.no_grad():
        agree(advebm.load(tmp_path)(pictures), net.float()(normalised(pictures, *HALF)).logits)


def test_a_network_that_is_no_classifier_is_refused(tmp_path):
    vit(tmp_path, kind=transformers.ViTModel)
    with pytest.raises(UserError, match=r"has no classifier.bias; train it first: --backbone transformers:"):
        advebm.load(tmp_path)


def test_a_new_network_has_the_librarys_features(tmp_path, pictures):
    vit(tmp_path)
    module, width = Transformers(str(tmp_path)).build(3, 32)
    assert module(pictures).shape == (3, width)
    module, width = Transformers(str(tmp_path), size=64).build(1, 32)
    assert module(pictures[:, :1]).shape == (3, width)


def test_a_size_that_the_network_does_not_take_is_refused(tmp_path):
    vit(tmp_path)
    with pytest.raises(UserError, match="for images of 64 x 64: Input image size"):
        advebm.load(f"transformers:{tmp_path},size=64")


def test_what_processors_say():
    mean = {"image_mean": [0.5], "image_std": [0.5]}
    for settings, expected in (
        ({"size": 224}, (224, 1.0)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 0.875)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 1.0)),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            (224, 0.875),
        ),
        ({"size": {"height": 256, "width": 256}, "do_resize": False}, (None, 1.0)),
    ):
        found = read_processor(mean | settings)
        assert (found.size, found.crop) == expected
    assert read_processor({"do_normalize": False, "size": 8}).std == (1.0,)
    for settings, message in (
        ({}, "has no image_mean and image_std"),
        ({"rescale_factor": 1 / 127.5, **mean}, "rescales bytes by 0.00784"),
        ({"size": {"height": 4, "width": 8}, **mean}, "makes images of 4 x 8"),
        ({"do_flip_channel_order": True, **mean}, "sets do_flip_channel_order"),
        ({"rescale_offset": True, **mean}, "sets rescale_offset"),
    ):
        with pytest.raises(UserError, match=message):
            read_processor(settings)


@pytest.mark.parametrize("kind", ["ViT", "ConvNext", "EfficientNet", "PoolFormer", "DeiT"])
def test_a_square_picture_becomes_what_the_librarys_processor_makes_of_it(kind):
    """The picture is smooth, so that filters hardly matter and a wrong crop or normalisation does."""
    rows, columns = torch.meshgrid(*(torch.linspace(0, 5, 400),) * 2, indexing="ij")
    bytes_ = (255 * torch.stack([0.5 + 0.4 * torch.sin(rows + k) * torch.cos(columns) for k in range(3)])).byte()
    processor = getattr(transformers, f"{kind}ImageProcessor")()
    found = read_processor(json.loads(processor.to_json_string()))
    expected = processor(bytes_, return_tensors="pt")["pixel_values"]
    got = normalised(resize(bytes_[None] / 255, found.size, found.crop), found.mean, found.std)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.06)


def test_code_in_a_models_folder_is_neither_run_nor_asked_for(tmp_path, monkeypatch):
    vit(tmp_path)
    about = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    for attempt in (lambda: advebm.load(tmp_path), lambda: Transformers(str(tmp_path)).build(3, 32)):
        with pytest.raises(UserError, match="custom code"):
            attempt()
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_found_from_other_folders(tmp_path, monkeypatch):
    vit(tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    backbone = find_reference("net").architecture().backbone
    monkeypatch.chdir("/")
    backbone.build(3, 48)


def test_one_line_for_what_is_missing_or_damaged(tmp_path):
    vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"transformers cannot make .*preprocessor_config.json") as error:
        advebm.load(tmp_path)
    assert "\n" not in str(error.value)
    vit(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="transformers cannot make") as error:
        advebm.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_around_a_folder_is_not_exported_without_it(tmp_path, monkeypatch):
    """The folder's name would mean nothing elsewhere."""
    monkeypatch.chdir(tmp_path)
    settings = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=10, num_channels=1)
    transformers.ViTForImageClassification(settings).save_pretrained("net")
    about = {"image_mean": [0.5], "image_std": [0.5], "size": {"height": 8, "width": 8}}
    (tmp_path / "net" / "preprocessor_config.json").write_text(json.dumps(about))
    run = advebm.open_run("net", {"data": "digits"})
    with pytest.raises(UserError, match="which others do not have; publish that folder by transformers' push_to_hub"):
        advebm.export(run, "published")
    assert not (tmp_path / "published").exists()


def test_a_file_of_weights_is_refused(tmp_path):
    vit(tmp_path)
    with pytest.raises(UserError, match="takes the folder that save_pretrained wrote"):
        find_reference(f"transformers:{tmp_path}@{tmp_path}/model.safetensors")
