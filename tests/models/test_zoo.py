"""What needs no other library; tests/zoo has the rest."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from advebm.core import config
from advebm.core.errors import UserError
from advebm.models.inference import fold
from advebm.models.zoo import base
from advebm.models.zoo.base import Resized, check_size, need, resize
from advebm.runs.find_model import find_library, find_reference, is_factory


def test_images_of_the_networks_size_are_taken_as_they_are(generator):
    x = torch.rand(2, 3, 20, 20, generator=generator)
    assert resize(x, 20, 0.875) is x


@pytest.mark.parametrize(
    ("shape", "size", "crop", "shorter"),
    [((48, 48), 32, 0.8, 40), ((60, 80), 30, 0.5, 60), ((300, 200), 64, 0.875, 73)],
)
def test_larger_images_are_reduced_and_their_centre_kept_as_libraries_do(shape, size, crop, shorter, generator):
    """Compared with Pillow, whose bytes are rounded after each direction; with noise, which has to be averaged."""
    rows, columns = torch.meshgrid(*(torch.linspace(0, 6, n) for n in shape), indexing="ij")
    x = torch.stack([0.5 + 0.4 * torch.sin(rows + k) * torch.cos(2 * columns) for k in range(3)])
    height, width = (round(n * shorter / min(shape)) for n in shape)
    x = (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    picture = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
    small = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    top, left = (height - size) // 2, (width - size) // 2
    expected = torch.from_numpy(small[top : top + size, left : left + size]).permute(2, 0, 1)
    torch.testing.assert_close(resize(x[None], size, crop)[0], expected, rtol=0, atol=2.5 / 255)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
def test_smaller_images_are_enlarged_as_a_whole(shape):
    ramp = torch.linspace(0, 1, shape[1]).expand(1, 1, *shape)
    out = resize(ramp, 32, 0.5)
    assert out.shape == (1, 1, 32, 32)
    assert out[0, 0, 0, 0] < 0.05
    assert out[0, 0, 0, -1] > 0.95


def test_gradients_go_back_through_the_resizing(generator):
    x = torch.rand(1, 2, 6, 6, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: resize(z, 9, 1.0).square(), x)
    assert torch.autograd.gradcheck(lambda z: resize(z, 4, 0.8).square(), x)


def test_batch_norms_behind_the_resizing_are_folded(generator):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).eval()
    net[1].running_mean.uniform_(generator=generator)
    module, x = Resized(net, 12), torch.rand(2, 3, 8, 8, generator=generator)
    traced, copies = fold(module)
    assert len(copies) == 1
    torch.testing.assert_close(traced(x), module(x))


def test_bad_sizes_are_refused():
    for size, crop, message in (
        (0, 1.0, "size must be at least 1"),
        (8, 0.0, "crop is the share"),
        (8, 2.0, "crop is"),
    ):
        with pytest.raises(UserError, match=message):
            check_size(size, crop)


def test_a_library_that_is_not_there_is_named_with_how_to_install_it(monkeypatch):
    with pytest.raises(UserError, match=r"timm:x needs nowhere_to_be_found, which is not installed: pip install"):
        need("nowhere_to_be_found", "timm:x")

    def broken(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(base, "import_module", broken)
    with pytest.raises(
        UserError, match="needs timm, which cannot be imported here: operator torchvision::nms does not"
    ):
        need("timm", "timm:x")


def test_options_in_a_reference():
    read = lambda text: config.read_options(text, "backbone", "resnet")
    assert read("18,width=8,norm=none") == {"depth": "18", "width": 8, "norm": "none"}
    assert read("depth=18,mean=[0.5,0.4,0.3],std=0.2") == {"depth": 18, "mean": [0.5, 0.4, 0.3], "std": 0.2}
    with pytest.raises(UserError, match="takes OPTION=VALUE between commas, got 'width'"):
        read("depth=18,width")


def test_a_kind_and_its_first_option():
    assert config.short("timm:resnet18", "backbone") == {"kind": "timm", "name": "resnet18"}
    assert config.short("folder:a:b", "source") == {"kind": "folder", "path": "a:b"}
    assert config.build("resnet:50", "backbone").depth == 50


def test_a_name_too_long_for_a_file_is_told_in_one_line():
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        find_reference("resnet:18@" + "a" * 5000)


def test_a_network_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a network without weights; give a file of them: resnet:depth=18@FILE"):
        find_reference("resnet:depth=18")
    with pytest.raises(UserError, match="there is no weight file at"):
        find_reference(f"resnet:depth=18@{tmp_path}/none.pt")


def test_names_of_libraries_are_no_modules_to_import():
    assert not is_factory("timm:resnet18")
    assert not is_factory("robustbench:Wang2023Better_WRN-28-10")
    assert is_factory("timm_models:make")


def test_whose_folder_it_is():
    assert find_library({"architecture": {"backbone": {}}}) is None
    assert find_library({"model_type": "vit"}).__name__.endswith("zoo.transformers")
    assert find_library({"architecture": "resnet18", "pretrained_cfg": {}}).__name__.endswith("zoo.timm")
    assert find_library([1]) is None
