"""Inputs of the kinds that people reported to other projects, and what becomes of each here.

Every test names its report; ``python -m tests.test_inputs`` prints the table that stands in docs/inputs.md.
"""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

import advebm
from advebm import cli
from advebm.attacks.apgd import APGD
from advebm.attacks.projected import Attack
from advebm.core import checks
from advebm.core.errors import Notice, UserError
from advebm.data.decode import open_image
from advebm.data.folders import Folder
from advebm.data.npz import Npz
from advebm.metrics.verdicts import find_verdicts
from tests.helpers import few_samples, linked
from tests.references import foreign_networks

TABLE = []  # (area, input, report, what happens)


def report(area, given, where, outcome):
    """Enter a test into the table: the input, where such inputs were reported, and what happens to it here."""

    def enter(test):
        TABLE.append((area, given, where, outcome))
        return test

    return enter


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVEBM_DATA", raising=False)


RNG = np.random.default_rng(0)


def picture(size=16, low=0, high=256):
    return Image.fromarray(RNG.integers(low, high, (size, size, 3), dtype=np.uint8))


def fill(root, names, count=20):
    """Write ``count`` pictures into each folder; those of one folder are of one brightness, 40 levels apart."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((16, 16, 3), 20 + 40 * k + i, np.uint8)).save(root / name / f"{i}.png")
    return root


def two_classes(root, image, name="0.png", **options):
    """A folder of two classes, of which the first holds one more image: the one in question."""
    fill(root, ["a", "b"])
    image.save(root / "a" / name, **options)
    return root


def brightness(data, classes):
    """Return the mean level of each class over all splits, by name."""
    x, y = torch.cat([part.x for part in data.splits]), torch.cat([part.y for part in data.splits])
    return {name: x[y == data.classes.index(name)].float().mean().item() for name in classes}


def read_one(path, channels=3, size=16):
    """Return the one image of a folder, read as a training set of unlabelled images with copies would be."""
    folder = Path(tempfile.mkdtemp(dir=path.parent))
    for i in range(10):
        (folder / f"{i}{path.suffix}").write_bytes(path.read_bytes())
    return Folder(str(folder), size=size, channels=channels).load().train.x[0]


def both_ways(path, channels=3, size=16):
    """Return an image as training reads it, after checking that editing reads it in the same way."""
    trained = read_one(path, channels, size)
    edited = open_image(path, (channels, size, size), fit=True)
    assert torch.equal(trained, (edited * 255).round().to(torch.uint8)), "one decoder for all"
    return trained


# Pixels ---------------------------------------------------------------------------------------------------------------


@report("pixels", "16-bit grey PNG", "pytorch/vision#2218, Pillow#2574", "black and white stay, 65535 is 255")
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits(tmp_path, channels):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    x = both_ways(tmp_path / "x.png", channels)
    assert x[0].flatten().tolist() == list(range(256))


@report("pixels", "16-bit grey TIFF", "pytorch/vision#2218", "as 16-bit PNG")
def test_sixteen_bit_tiff(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.tif")
    assert both_ways(tmp_path / "x.tif")[0].flatten().tolist() == list(range(256))


@report("pixels", "floating-point TIFF in [0, 1]", "pytorch/vision#2218", "1 is 255")
def test_floating_point(tmp_path):
    ramp = (np.arange(256, dtype=np.float32) / 255).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.tiff")
    assert both_ways(tmp_path / "x.tiff")[0].flatten().tolist() == list(range(256))


@report(
    "pixels", "32-bit or floating-point TIFF of an unknown range", "pytorch/vision#2218", "refused: white is unknown"
)
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_without_a_known_white(tmp_path, kind):
    Image.fromarray((np.arange(256).reshape(16, 16) * 1000).astype(kind)).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match="save it with 8"):
        open_image(tmp_path / "x.tiff", (1, 16, 16))
    with pytest.raises(UserError, match=r"10 of 10 images cannot be read: 0.tiff has .*; leave such images out"):
        read_one(tmp_path / "x.tiff")


@report("pixels", "EXIF orientation", "datumaro#1756, dataset-viewer#2605", "turned upright, in training as in editing")
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tiff"])
def test_orientation(tmp_path, name):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255  # the top is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / name, exif=exif)
    x = both_ways(tmp_path / name)
    assert x[:, :7].float().mean() > 245
    assert x[:, 9:].float().mean() < 10


def transparent():
    """The left half is fully transparent black, the right half opaque grey."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:] = (100, 100, 100, 255)
    return Image.fromarray(pixels)


TRANSPARENT = {
    "RGBA": lambda path: transparent().save(path),
    "LA": lambda path: transparent().convert("LA").save(path),
    "RGB with a colour key": lambda path: transparent().convert("RGB").save(path, transparency=(0, 0, 0)),
    "L with a grey key": lambda path: transparent().convert("L").save(path, transparency=0),
    "palette": lambda path: transparent().convert("RGB").quantize(4).save(path, transparency=_index_of_black()),
}


def _index_of_black():
    return int(np.asarray(transparent().convert("RGB").quantize(4))[0, 0])


@report(
    "pixels", "transparent PNGs: alpha, colour key, palette", "sd-scripts#1269, transformers#49003", "laid over white"
)
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency(tmp_path, kind):
    TRANSPARENT[kind](tmp_path / "x.png")
    x = both_ways(tmp_path / "x.png")
    assert x[:, :, :8].float().mean() == 255
    assert x[:, :, 8:].float().mean() == 100


@report("pixels", "16-bit PNG with a grey key", "transformers#49003", "laid over white")
def test_sixteen_bits_with_a_grey_key(tmp_path):
    pixels = np.full((16, 16), 257 * 100, np.uint16)
    pixels[:, :8] = 7
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    raw = buffer.getvalue()
    at = raw.index(b"IDAT") - 4
    chunk = b"tRNS" + (7).to_bytes(2, "big")
    key = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(raw[:at] + key + raw[at:])
    x = both_ways(tmp_path / "x.png")
    assert x[:, :, :8].float().mean() == 255
    assert x[:, :, 8:].float().mean() == 100


@report("pixels", "uncompressed TIFF with EXIF orientation", "datumaro#1756", "turned upright")
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "RGBA"])
def test_orientation_of_raw_tiff(tmp_path, mode):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8] = 255
    stored = Image.fromarray(np.rot90(upright).copy())
    if mode == "I;16":
        stored = Image.fromarray(np.rot90(upright).astype(np.uint16) * 257)
    (stored if mode == "I;16" else stored.convert(mode)).save(tmp_path / "x.tif", tiffinfo={0x112: 6})
    x = both_ways(tmp_path / "x.tif", 1)
    assert x[0, :7].float().mean() > 245
    assert x[0, 9:].float().mean() < 10


@report("pixels", "16-bit colour and 2-bit grey PNG with a colour key", "transformers#49003", "laid over white")
def test_keys_of_other_depths(tmp_path):
    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    def png_file(depth, colour, rows, key):
        head = (16).to_bytes(4, "big") * 2 + bytes([depth, colour, 0, 0, 0])
        content = zlib.compress(b"".join(b"\0" + row for row in rows))
        parts = chunk(b"IHDR", head) + chunk(b"tRNS", key) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + parts

    key = (1000).to_bytes(2, "big") + (2000).to_bytes(2, "big") + (3000).to_bytes(2, "big")
    grey = (25700).to_bytes(2, "big") * 3
    (tmp_path / "x.png").write_bytes(png_file(16, 2, [key * 8 + grey * 8] * 16, key))
    x = both_ways(tmp_path / "x.png")
    assert x[:, :, :8].float().mean() == 255
    assert x[:, :, 8:].float().mean() == 100
    (tmp_path / "y.png").write_bytes(png_file(2, 0, [bytes([0b01010101] * 2 + [0] * 2)] * 16, (1).to_bytes(2, "big")))
    x = both_ways(tmp_path / "y.png")
    assert x[:, :, :8].float().mean() == 255
    assert x[:, :, 8:].float().mean() == 0


@report("pixels", "16-bit TIFF in which 0 is white", "pytorch/vision#2218", "0 is white")
def test_white_is_zero(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "x.tif") as saved:
        if saved.tag_v2[262] != 0:
            pytest.skip("this Pillow does not write such files")
    assert both_ways(tmp_path / "x.tif")[0].flatten().tolist() == list(range(255, -1, -1))


@report("pixels", "animated GIF or WebP", "sd-scripts#2210", "the first frame, said in a line")
@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_animations(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), (value,) * 3) for value in (50, 200)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.warns(
        Notice, match="10 of 10 images: an animation or a file of several pages, of which the first is used"
    ):
        x = read_one(tmp_path / name)
    assert (x.float() - 50).abs().max() < 4
    with pytest.warns(Notice, match="of which the first is used"):
        open_image(tmp_path / name, (3, 16, 16))


@report("pixels", "colour profile other than sRGB", "sd-scripts#2210", "converted to sRGB")
def test_colour_profiles(tmp_path):
    """In a profile whose red and green primaries are exchanged, green is red."""
    source = np.zeros((16, 16, 3), np.uint8)
    source[..., 1] = 255
    Image.fromarray(source).save(tmp_path / "x.png", icc_profile=exchanged_profile())
    x = both_ways(tmp_path / "x.png")
    assert x[0].float().mean() > 250
    assert x[1].float().mean() < 5


def exchanged_profile():
    """The sRGB profile under another name, with the tags of the red and the green primary exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in (b"sRGB".decode("latin1").encode("utf-16-be"), b"sRGB"):
        while (at := profile.find(tag)) >= 0:
            profile[at : at + len(tag)] = "XRGB".encode("utf-16-be") if len(tag) > 4 else b"XRGB"
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@report("pixels", "damaged colour profile", "sd-scripts#2210", "taken as sRGB, said in a line")
def test_damaged_profiles(tmp_path):
    image = picture()
    image.save(tmp_path / "x.png", icc_profile=b"nothing of the kind")
    with pytest.warns(Notice, match="a colour profile that cannot be read; taken as sRGB"):
        x = read_one(tmp_path / "x.png")
    assert np.array_equal(x.permute(1, 2, 0).numpy(), np.asarray(image))


@report("pixels", "sRGB profile", "sd-scripts#2210", "pixels untouched")
def test_srgb_profiles_change_nothing(tmp_path):
    image = picture()
    image.save(tmp_path / "x.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert np.array_equal(both_ways(tmp_path / "x.png").permute(1, 2, 0).numpy(), np.asarray(image))


@report("pixels", "CMYK, palette, 1-bit, grey and colour in one folder", "datasets#6735", "converted")
def test_mixed_modes(tmp_path):
    root = fill(tmp_path / "set", ["a", "b"])
    colour = Image.new("RGB", (16, 16), (200, 100, 50))
    colour.convert("CMYK").save(root / "a" / "c.jpg", quality=100)
    colour.quantize(8).save(root / "a" / "p.gif")
    Image.new("1", (16, 16), 1).save(root / "a" / "one.bmp")
    Image.new("L", (16, 16), 77).save(root / "a" / "l.png")
    assert sum(len(part) for part in advebm.load_data(f"folder:{root}", size=16).splits) == 44
    assert (read_one(root / "a" / "c.jpg").float().mean((1, 2)) - torch.tensor([200.0, 100, 50])).abs().max() < 6
    assert read_one(root / "a" / "one.bmp").min() == 255
    assert set(read_one(root / "a" / "l.png").flatten().tolist()) == {77}


@report(
    "pixels", "photographs of 60 megapixels in a set", "", "read; as a single image to edit refused, with the limit"
)
def test_large_photographs(tmp_path):
    Image.new("L", (8_000, 7_500), 9).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="60,000,000 pixels, the most is 50,000,000"):
        open_image(tmp_path / "x.png", (1, 16, 16), fit=True)
    root = fill(tmp_path / "set", ["a", "b"])
    (root / "a" / "x.png").write_bytes((tmp_path / "x.png").read_bytes())
    assert sum(len(part) for part in Folder(str(root), size=16).load().splits) == 41


# Folders --------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ImageNet": (("train", "val"), "read train as train, val as test; val cut from train"),
    "three": (("train", "valid", "test"), "read train as train, valid as val, test as test"),
    "upper case": (("Train", "Validation", "TEST"), "read Train as train, Validation as val, TEST as test"),
    "dev": (("training", "dev", "testing"), "read training as train, dev as val, testing as test"),
    "no validation": (("train", "test"), "read train as train, test as test; val cut from train"),
    "train alone": (("train",), "read train as train; val and test cut from train"),
}


@report(
    "folders",
    "train/ and val/ without test/, valid/, Validation/, dev/, …",
    "roboflow-python#153, ultralytics#4310",
    "read as these splits, what is missing is cut from train, said in a line",
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_split_folders(tmp_path, name):
    splits, said = LAYOUTS[name]
    root = tmp_path / "set"
    for split in splits:
        fill(root / split, ["cat", "dog"], count=20)
    with pytest.warns(Notice, match=f"{root}: {said}"):
        data = advebm.load_data(f"folder:{root}", size=16)
    assert data.classes == ("cat", "dog")
    assert sum(map(len, data.splits)) == 40 * len(splits)
    if len(splits) == 3:
        assert [len(part) for part in data.splits] == [40, 40, 40]
    elif len(splits) == 2:
        assert [len(part) for part in data.splits] == [36, 4, 40]
    levels = brightness(data, data.classes)
    assert levels["cat"] < 50 < levels["dog"]
    assert Folder(str(root), size=16).outline().classes == 2


@report(
    "folders", "val/ and test/ without train/, or two names of one split", "roboflow-python#153", "refused in a line"
)
def test_splits_that_make_no_sense(tmp_path):
    for split in ("val", "test"):
        fill(tmp_path / "a" / split, ["cat", "dog"])
    with pytest.raises(UserError, match="has test and val, but no train"):
        advebm.load_data(f"folder:{tmp_path / 'a'}")
    for split in ("train", "val", "valid"):
        fill(tmp_path / "b" / split, ["cat", "dog"])
    with pytest.raises(UserError, match="has val and valid, which both mean val"):
        advebm.load_data(f"folder:{tmp_path / 'b'}")


@report("folders", "classes that are called train and test among others", "", "stay classes")
def test_classes_with_the_names_of_splits(tmp_path):
    data = Folder(str(fill(tmp_path / "set", ["bus", "plane", "test", "train"])), size=16).load()
    assert data.classes == ("bus", "plane", "test", "train")


@report(
    "folders",
    "test without some classes, or with them in another order",
    "ultralytics#13936, #26192",
    "matched by name, the missing ones named; unknown ones refused",
)
def test_classes_are_matched_by_name(tmp_path):
    root = tmp_path / "set"
    fill(root / "train", ["a", "b", "c"])
    fill(root / "test", ["c"])
    for path in (root / "test" / "c").iterdir():
        Image.new("RGB", (16, 16), (100,) * 3).save(path)
    with pytest.warns(UserWarning, match="there are no test images of a, b"):
        data = Folder(str(root), size=16, val=0.2).load()
    assert data.classes == ("a", "b", "c")
    assert set(data.test.y.tolist()) == {2}
    (root / "test" / "c").rename(root / "test" / "d")
    with pytest.raises(UserError, match="test has the classes d, which train has not"):
        Folder(str(root), size=16).load()


@report(
    "folders",
    "test/ of a competition, images without classes",
    "roboflow-python#153",
    "left out, test is cut from train",
)
def test_unlabelled_test_folders(tmp_path):
    root = tmp_path / "set"
    fill(root / "train", ["a", "b"], 20)
    fill(root, ["test"])
    with pytest.warns(UserWarning, match="test has no sub-folders of classes; left out"):
        data = Folder(str(root), size=16).load()
    assert sum(map(len, data.splits)) == 40


@report("folders", "`__MACOSX`, `._*`, `.DS_Store`, `Thumbs.db`, `desktop.ini`", "vision#8297", "passed over")
@pytest.mark.parametrize("corrupt", ["refuse", "skip"])
def test_junk(tmp_path, corrupt):
    root = fill(tmp_path / "set", ["a", "b"])
    (root / "__MACOSX" / "a").mkdir(parents=True)
    for name in ("__MACOSX/a/._0.png", "a/._0.png", "a/.DS_Store", "b/Thumbs.db", "b/desktop.ini"):
        (root / name).write_bytes(b"\x00\x05\x16\x07")
    data = Folder(str(root), size=16, corrupt=corrupt).load()
    assert data.classes == ("a", "b")
    assert sum(map(len, data.splits)) == 40


@report("folders", "class folder without images", "vision#4925", "named; left out with --data.corrupt skip")
def test_empty_classes(tmp_path):
    root = fill(tmp_path / "set", ["a", "c"])
    (root / "b").mkdir()
    with pytest.raises(UserError, match=r"b holds no image .*--data.corrupt skip"):
        Folder(str(root), size=16).load()
    with pytest.warns(UserWarning, match="classes without training images are left out: b"):
        data = Folder(str(root), size=16, corrupt="skip").load()
    assert data.classes == ("a", "c")
    assert set(data.train.y.tolist()) == {0, 1}
    levels = brightness(data, data.classes)
    assert levels["a"] < 50 < levels["c"]


@report(
    "folders",
    ".heic, .svg, .txt and files of other kinds",
    "gradio#2287, #6617",
    "counted and named, with what reads them",
)
def test_files_of_other_kinds(tmp_path):
    root = fill(tmp_path / "set", ["a", "b"])
    for name in ("a/x.svg", "a/y.svg", "a/notes.txt"):
        (root / name).write_bytes(b"x")
    with pytest.warns(Notice, match="files that are not read as images: 2 .svg, 1 .txt"):
        Folder(str(root), size=16).load()
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        (root / "a" / "z.heic").write_bytes(b"x")
        with pytest.warns(Notice, match=r"1 .heic.*pip install pillow-heif"):
            Folder(str(root), size=16).load()


@report("folders", ".jfif, .avif, .jp2, .tif, .webp, .PNG", "gradio#2287", "read")
def test_many_formats(tmp_path):
    root = fill(tmp_path / "set", ["a", "b"])
    kinds = {"x.jfif": "JPEG", "x.jp2": "JPEG2000", "x.tif": "TIFF", "x.webp": "WEBP", "X.PNG": "PNG", "x.pnm": "PPM"}
    from PIL import features

    kinds |= {"x.avif": "AVIF"} if features.check("avif") else {}
    for name, kind in kinds.items():
        picture().save(root / "a" / name, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(map(len, Folder(str(root), size=16).load().splits)) == 40 + len(kinds)


@report("folders", "classes one level deeper than given", "", "the deeper folder is proposed")
def test_a_folder_around_the_classes(tmp_path):
    fill(tmp_path / "set" / "inside", ["a", "b"])
    with pytest.raises(UserError, match=r"it has only inside; is .*inside meant\?"):
        Folder(str(tmp_path / "set")).load()


@report("folders", "train_set/, seg_test/, and a folder of the same name inside", "", "read as these splits")
def test_names_around_splits(tmp_path):
    root = tmp_path / "set"
    fill(root / "train_set" / "train_set", ["cat", "dog"])
    fill(root / "seg_test", ["cat", "dog"])
    fill(root, ["single_prediction"])
    with pytest.warns(UserWarning, match="single_prediction beside the splits: left out"):
        data = Folder(str(root), size=16).load()
    assert data.classes == ("cat", "dog")
    assert len(data.test) == 40


@report("folders", "splits inside the folders of classes", "roboflow-python#153", "refused, with the right order")
def test_splits_inside_classes(tmp_path):
    for name in ("cats", "dogs"):
        fill(tmp_path / "set" / name, ["train", "val"])
    with pytest.raises(UserError, match=r"cats holds splits, which have to be around the classes: .*train/cats"):
        Folder(str(tmp_path / "set")).load()


@report("folders", "links: to a folder around, to nothing", "", "not followed; counted")
def test_links(tmp_path):
    root = fill(tmp_path / "set", ["a", "b"])
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.warns(Notice, match="1 link to nothing"):
        data = Folder(str(root), size=16).load()
    assert sum(map(len, data.splits)) == 40
    levels = brightness(data, data.classes)
    assert levels["a"] < 50 < levels["b"]


@report("folders", "a class that is added or removed later", "", "labels follow the folders, not the cache")
def test_another_class_changes_the_labels(tmp_path):
    root = tmp_path / "set"
    for split in ("train", "test"):
        fill(root / split, ["b", "c"])
    Folder(str(root), size=16).load()
    fill(root / "train", ["a"])
    with pytest.warns(UserWarning, match="there are no test images of a"):
        data = Folder(str(root), size=16).load()
    assert sorted(set(data.test.y.tolist())) == [1, 2]


# Arrays ---------------------------------------------------------------------------------------------------------------


def arrays(path, y, size=8, **more):
    x = RNG.integers(0, 256, (len(y), size, size, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.asarray(y), **more)
    return x


@report("labels", "gaps in the labels: {0, 2}, {1, 2}", "timm#957", "classes 0 and 2, none between")
@pytest.mark.parametrize("labels", [(0, 2), (1, 2), (7, 3)])
def test_gaps_in_labels(tmp_path, labels):
    x = arrays(tmp_path / "s.npz", list(labels) * 20)
    data = Npz(str(tmp_path / "s.npz")).load()
    assert data.classes == tuple(map(str, sorted(labels)))
    for split in data.splits:
        for image, label in zip(split.x, split.y.tolist(), strict=True):
            position = next(i for i in range(40) if np.array_equal(x[i], image.permute(1, 2, 0).numpy()))
            assert data.classes[label] == str(labels[position % 2])


@report("labels", "test labels that no training image has", "timm#957", "refused in a line")
def test_unknown_test_labels(tmp_path):
    more = {"x_test": RNG.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), "y_test": np.array([0, 2, 5, 5])}
    arrays(tmp_path / "s.npz", [0, 2] * 20, **more)
    with pytest.raises(UserError, match="s has test images of 5, but no such training images"):
        Npz(str(tmp_path / "s.npz")).load()


@report("labels", "labels of shape (N, 1)", "ART#1712", "read as (N,); one-hot refused in a line")
def test_columns_of_labels(tmp_path):
    arrays(tmp_path / "s.npz", [[0], [1]] * 20)
    assert Npz(str(tmp_path / "s.npz")).load().train.y.ndim == 1
    arrays(tmp_path / "s.npz", np.eye(2, dtype=int)[[0, 1] * 20])
    with pytest.raises(UserError, match=r"y whole numbers \(N,\)"):
        Npz(str(tmp_path / "s.npz")).load()


NAMES = {
    "the field's synthetic CIFAR-10": ("image", "label", {}),
    "keras": ("x_train", "y_train", {"x_test": 10, "y_test": 10}),
    "MedMNIST": (
        "train_images",
        "train_labels",
        {"val_images": 6, "val_labels": 6, "test_images": 10, "test_labels": 10},
    ),
}


@report("labels", "npz with image and label, x_train, train_images, …", "DM-Improves-AT, MedMNIST, keras", "read")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_names_of_arrays(tmp_path, name, save):
    x, y, more = NAMES[name]
    sizes = {x: 40, y: 40} | more
    made = {
        key: RNG.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) if ("im" in key or "x" in key) else np.arange(n) % 2
        for key, n in sizes.items()
    }
    save(tmp_path / "s.npz", **made)
    data = Npz(str(tmp_path / "s.npz")).load()
    assert sum(map(len, data.splits)) == sum(sizes.values()) // 2
    if more:
        key = next(k for k in more if "test" in k)
        assert np.array_equal(data.test.x.permute(0, 2, 3, 1).numpy(), made[key])
    everything = sorted(
        np.ascontiguousarray(image).tobytes() for part in data.splits for image in part.x.permute(0, 2, 3, 1).numpy()
    )
    assert everything == sorted(image.tobytes() for a in made.values() if a.ndim == 4 for image in a)


@report(
    "labels",
    "npz larger than half the memory",
    "DM-Improves-AT",
    "uncompressed arrays are memory-mapped, then copied once",
)
def test_arrays_are_mapped(tmp_path):
    from advebm.data.npz import _read_arrays

    x = arrays(tmp_path / "s.npz", [0, 1] * 20)
    mapped = _read_arrays(tmp_path / "s.npz")["x"]
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, x)
    np.savez(tmp_path / "f.npz", x=np.asfortranarray(x), y=np.zeros(40, int))
    assert np.array_equal(_read_arrays(tmp_path / "f.npz")["x"], x)


@report("labels", "labels that are large numbers, such as identifiers", "timm#957", "a class for each that is there")
def test_large_labels(tmp_path):
    arrays(tmp_path / "s.npz", [10**9, 10**9 + 5] * 20)
    assert Npz(str(tmp_path / "s.npz")).load().classes == ("1000000000", "1000000005")


@report("labels", "npz of which a byte is wrong", "", "refused in a line")
def test_damaged_arrays(tmp_path):
    arrays(tmp_path / "s.npz", [0, 1] * 20)
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[500] ^= 255
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(UserError, match="is not an npz archive of arrays"):
        Npz(str(tmp_path / "s.npz")).load()


@report("labels", "npz of floating-point images, of four channels, with class names", "", "the fix; the names are used")
def test_fixes_for_arrays(tmp_path):
    x, y = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "s.npz", x=x / 255, y=y)
    with pytest.raises(UserError, match=r"likely fix: save x as bytes: \(x \* 255\)"):
        Npz(str(tmp_path / "s.npz")).load()
    np.savez(tmp_path / "s.npz", x=np.concatenate([x, x[..., :1]], 3), y=y)
    with pytest.raises(UserError, match=r"likely fix: x\[\.\.\., :3\] without alpha"):
        Npz(str(tmp_path / "s.npz")).load()
    np.savez(tmp_path / "s.npz", x=x, y=y, class_names=np.array(["ant", "bee"]))
    assert Npz(str(tmp_path / "s.npz")).load().classes == ("ant", "bee")
    np.savez(tmp_path / "s.npz", x=x, y=y, x_test=x[:, :4, :4], y_test=y)
    with pytest.raises(UserError, match="the images of all splits have one shape"):
        Npz(str(tmp_path / "s.npz")).load()


# Sets of the Hub, through its library on local files ------------------------------------------------------------------


def hub(root, columns, splits=("train", "test"), features=None):
    """A data set of 40 images a split in the layout of the Hub; ``columns`` maps names to values or to ``IMAGES``."""
    datasets = pytest.importorskip("datasets")
    for split in splits:
        cells = {
            name: [png(20 + 40 * (i % 2) + i // 2) for i in range(40)] if values == "images" else values
            for name, values in columns.items()
        }
        kinds = {name: datasets.Image() for name, values in columns.items() if values == "images"} | (features or {})
        table = datasets.Dataset.from_dict(cells)
        for name, kind in kinds.items():
            table = table.cast_column(name, kind)
        (root / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def png(level):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def load_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    datasets.disable_progress_bars()
    return lambda root, **options: advebm.load_data(f"hf:{root}", **options)


@report("labels", "Hub set with labels as text", "DashAI#678", "classes in alphabetical order")
def test_hub_text_labels(tmp_path, load_hub):
    data = load_hub(hub(tmp_path / "set", {"image": "images", "label": ["dog", "cat"] * 20}), val=0.2)
    assert data.classes == ("cat", "dog")
    levels = brightness(data, data.classes)
    assert levels["dog"] < 50 < levels["cat"]


@report("labels", "Hub set with missing labels or images", "DashAI#678", "named; left out with --data.corrupt skip")
def test_hub_nulls(tmp_path, load_hub):
    root = hub(tmp_path / "set", {"image": "images", "label": [0, None, *[1, 0] * 19]})
    with pytest.raises(UserError, match=r"1 of 40 images have no label, .*train 1; .*--data.corrupt skip"):
        load_hub(root)
    assert len(load_hub(root, corrupt="skip", val=0.2).test) == 39
    cells = [None] + [png(9)] * 39
    root = hub(
        tmp_path / "other",
        {"image": cells, "label": [0, 1] * 20},
        features={"image": pytest.importorskip("datasets").Image()},
    )
    with pytest.raises(UserError, match=r"1 of 40 images cannot be read: .*train 0 is empty"):
        load_hub(root)
    with pytest.warns(UserWarning, match="1 of 40 images cannot be read"):
        assert len(load_hub(root, corrupt="skip", val=0.2).test) == 39


@report("labels", "Hub set whose labels have gaps, or names that no image has", "timm#957", "no class without images")
def test_hub_label_gaps(tmp_path, load_hub):
    data = load_hub(hub(tmp_path / "set", {"image": "images", "label": [1, 2] * 20}), val=0.2)
    assert data.classes == ("1", "2")
    names = pytest.importorskip("datasets").ClassLabel(names=["ant", "bee", "cow"])
    root = hub(tmp_path / "other", {"image": "images", "label": [2, 1] * 20}, features={"label": names})
    with pytest.warns(UserWarning, match="classes without training images are left out: ant"):
        data = load_hub(root, val=0.2)
    assert data.classes == ("bee", "cow")
    levels = brightness(data, data.classes)
    assert levels["cow"] < 50 < levels["bee"]


@report("labels", "Hub set with the split train only", "donut#57", "validation and test are cut from it")
def test_hub_train_only(tmp_path, load_hub):
    data = load_hub(hub(tmp_path / "set", {"image": "images", "label": [0, 1] * 20}, ["train"]), val=0.1)
    assert [len(part) for part in data.splits] == [28, 4, 8]


@report("labels", "Hub set with train, validation and test", "transformerlab#163", "each is used as what it is")
def test_hub_three_splits(tmp_path, load_hub):
    data = load_hub(hub(tmp_path / "set", {"image": "images", "label": [0, 1] * 20}, ["train", "validation", "test"]))
    assert [len(part) for part in data.splits] == [40, 40, 40]


@report(
    "labels",
    "Hub set with columns of other names",
    "transformerlab#163",
    "found by type and usual names, or given as options",
)
def test_hub_columns(tmp_path, load_hub):
    for image, label in (("pixel_values", "cls"), ("jpg", "target")):
        assert len(load_hub(hub(tmp_path / image, {image: "images", label: [0, 1] * 20}), val=0.2).test) == 40
    root = hub(tmp_path / "odd", {"scan": "images", "mask": "images", "kind": [0, 1] * 20})
    with pytest.raises(UserError, match=r"needs one of .*; say which it is: --data.image_column NAME"):
        load_hub(root)
    with pytest.raises(UserError, match=r"no column for --data.label_column 'kinds' \(did you mean 'kind'"):
        load_hub(root, image_column="scan", label_column="kinds")
    assert load_hub(root, image_column="scan", label_column="kind", val=0.2).classes == ("0", "1")


@report(
    "labels", "Hub set with splits of other names", "donut#57", "given as --data.train_split, val_split, test_split"
)
def test_hub_splits(tmp_path, load_hub, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [png(20 + 40 * (i % 2) + i) for i in range(40)], "label": [0, 1] * 20})
    rows = rows.cast_column("image", datasets.Image())
    loaded = datasets.DatasetDict({"labelled": rows, "unlabeled": rows, "heldout": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: loaded)
    with pytest.raises(UserError, match=r"say which to train on: --data.train_split NAME"):
        load_hub("some/set")
    assert len(load_hub("some/set", train_split="labelled", test_split="heldout", val=0.2).test) == 40
    with pytest.raises(UserError, match=r"no split for --data.test_split 'held' \(did you mean 'heldout'"):
        load_hub("some/set", train_split="labelled", test_split="held")


@report("labels", "Hub set with a label column beside others of classes", "transformerlab#163", "the usual name counts")
def test_hub_label_among_classes(tmp_path, load_hub):
    kind = pytest.importorskip("datasets").ClassLabel(names=["photo", "sketch"])
    columns = {"image": "images", "label": ["dog", "cat"] * 20, "domain": [0] * 40}
    assert load_hub(hub(tmp_path / "set", columns, features={"domain": kind}), val=0.2).classes == ("cat", "dog")


@report("labels", "Hub test split of a competition, all labels -1", "", "left out, said")
def test_hub_test_without_labels(tmp_path, load_hub):
    root = hub(tmp_path / "set", {"image": "images", "label": [0, 1] * 20}, ["train"])
    hub(root, {"image": "images", "label": [-1] * 40}, ["test"])
    with pytest.warns(UserWarning, match="the test images have no labels; left out"):
        assert sum(map(len, load_hub(root, val=0.1).splits)) == 40


@report("labels", "Hub labels that are lists or fractions", "DashAI#678", "refused in a line")
@pytest.mark.parametrize("label", [[0, 1], 0.5])
def test_hub_strange_labels(tmp_path, load_hub, label):
    with pytest.raises(UserError, match="a label is a whole number or a text"):
        load_hub(hub(tmp_path / "set", {"image": "images", "label": [label] * 40}))


# Models ---------------------------------------------------------------------------------------------------------------


def net(classes=4, seed=0):
    """A small network on images of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
        )


class Returns(nn.Module):
    """A network that returns what ``make`` makes of its logits."""

    def __init__(self, make):
        super().__init__()
        self.net, self.make = net(), make

    def forward(self, x):
        return self.make(self.net(x))


def images(count=6, height=12, width=12):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


OUTPUTS = {
    "tuple": lambda z: (z, z[:, :, None]),
    "loss and logits": lambda z: (z.mean(), z),
    "list": lambda z: [z],
    "dict of logits": lambda z: {"hidden": z.exp(), "logits": z},
    "dict of one tensor": lambda z: {"out": z},
    "Hugging Face": lambda z: SimpleNamespace(loss=None, logits=z),
}


@report(
    "models",
    "a tuple, a dict or an object with .logits as output",
    "torchattacks#193, foolbox#736",
    "the logits are found",
)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_unwrapped(kind):
    x, y, plain = images(), torch.arange(6) % 4, net()
    for model in (Returns(OUTPUTS[kind]), advebm.wrap(Returns(OUTPUTS[kind]))):
        assert torch.allclose(advebm.energy(model, x, y), advebm.energy(plain, x, y))
        expected = advebm.attack(plain, x, y, eps=0.1, steps=3)
        assert torch.allclose(advebm.attack(model, x, y, eps=0.1, steps=3), expected, atol=1e-6)


@report("models", "an output in which logits are not found", "foolbox#736", "refused in a line that lists its parts")
def test_outputs_without_logits():
    with pytest.raises(UserError, match="returns a dict with a, b, in which logits are not found"):
        advebm.energy(Returns(lambda z: {"a": z, "b": z}), images())


@report("models", "float64, float16 and bfloat16 models, float64 images", "cleverhans#1224, ART#2475", "cast")
@pytest.mark.parametrize("weights", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pixels", [torch.float32, torch.float64, torch.float16])
def test_types(weights, pixels):
    x, y = images().to(pixels), torch.arange(6) % 4
    model, exact = net().to(weights), net()
    for given in (model, advebm.wrap(model)):
        energy = advebm.energy(given, x, y)
        assert torch.allclose(energy.float(), advebm.energy(exact, x.float(), y), atol=0.05)
        moved = advebm.attack(given, x, y, eps=0.1, steps=2)
        assert ((moved.float() - x.float()).abs() <= 0.1 + 1e-3).all()
        assert advebm.energy(given, moved, y).mean() > energy.mean() - 1e-3
    assert all(p.dtype == weights for p in model.parameters())


@report("models", "torch.inference_mode() around a call", "lightning#14497, #19910", "works")
def test_inference_mode():
    y, data = torch.arange(6) % 4, "digits"
    expected = advebm.attack(net(), images(), y, eps=0.1, steps=2)
    digits = advebm.load_recipe("digits-at").backbone.build(1, 8)[0]
    model = nn.Sequential(digits, nn.LazyLinear(10)).eval()
    model(torch.zeros(1, 1, 8, 8))
    outside = net()
    with torch.inference_mode():
        x, labels = images(), torch.arange(6) % 4
        assert torch.equal(advebm.attack(outside, x, labels, eps=0.1, steps=2), expected)
        assert advebm.energy(outside, x, labels).shape == (6,)
        assert advebm.sample(model, torch.arange(3), data=data, steps=2).shape == (3, 1, 8, 8)
        inside = net()
        with pytest.raises(UserError, match=r"made under torch.inference_mode\(\)"):
            advebm.attack(inside, x, labels, eps=0.1)
    with torch.no_grad():
        assert torch.equal(advebm.attack(outside, images(), y, eps=0.1, steps=2), expected)


class WithoutGradient(Returns):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@report("models", "a forward under torch.no_grad()", "lightning#19910", "an error that names it")
@pytest.mark.parametrize("attack", [Attack(eps=0.1), APGD(eps=0.1)])
def test_a_model_without_gradient(attack):
    model, y = WithoutGradient(lambda z: z), torch.arange(6) % 4
    with pytest.raises(UserError, match=r"no gradient .* images: its forward runs under torch.no_grad"):
        advebm.attack(model, images(), y, eps=0.1)
    with pytest.raises(UserError, match=r"no gradient with respect to the images"):
        find_verdicts(advebm.wrap(model), images(), y, attack, seed=0)


@report("models", "channels_last images and a model that uses .view", "auto-attack#66", "works")
def test_channels_last():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 12 * 12, 4)

        def forward(self, x):
            return self.linear(x.view(len(x), -1))

    model, x, y = Viewing(), images(), torch.arange(6) % 4
    for given in (model, advebm.wrap(model)):
        expected = advebm.attack(given, x, y, eps=0.1, steps=2)
        assert torch.equal(advebm.attack(given, x.to(memory_format=torch.channels_last), y, eps=0.1, steps=2), expected)


@report("models", "several matrices in a tuple; class numbers as output", "foolbox#736", "refused in a line")
def test_outputs_that_are_not_clear():
    with pytest.raises(UserError, match=r"returns several matrices, \(6, 4\), \(6, 4\)"):
        advebm.energy(Returns(lambda z: (z.exp(), z)), images())
    with pytest.raises(UserError, match=r"returns torch.int64, such as numbers of classes"):
        advebm.energy(Returns(lambda z: z.argmax(1)), images())


@report("models", "a softmax in half precision, or given on the command line", "", "refused as in Python")
def test_probabilities_elsewhere(tmp_path, monkeypatch, capsys):
    for kind in (torch.float16, torch.bfloat16):
        for last in (nn.Softmax(1), nn.LogSoftmax(1)):
            with pytest.raises(UserError, match="probabilities"):
                advebm.energy(nn.Sequential(net(), last).to(kind), images())
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "tests.test_inputs:softmax_net", "--data", "digits", "--metrics", "accuracy"]
    status, _, err = command(*words, capsys=capsys)
    assert status == 2
    assert "returns probabilities" in err
    assert not Path("runs").exists()


def softmax_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))


@report("models", "what is no module, or fails on the images", "", "refused in a line")
def test_what_is_no_model():
    with pytest.raises(UserError, match=r"a model is a torch module, got 'runs/d'; advebm.load loads a model"):
        advebm.energy("runs/d", images())
    with pytest.raises(UserError, match="the model does not take images of 3 x 12 x 12: RuntimeError"):
        advebm.energy(nn.Linear(7, 2), images())
    with pytest.raises(UserError, match=r"a mean of 127.5 is for images up to 255"):
        advebm.wrap(net(), mean=127.5, std=127.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(UserError, match="the model has 4 outputs, the data have 10 classes"):
        advebm.evaluate(model, data="digits", threat=Attack(eps=0.1))


@report(
    "models",
    "a model that ends in softmax or log-softmax",
    "",
    "refused; almost one-hot or constant: warned",
)
def test_probabilities():
    x = images()
    with pytest.raises(UserError, match="returns probabilities"):
        advebm.energy(Returns(lambda z: z.softmax(1)), x)
    with pytest.raises(UserError, match="returns log-probabilities, whose energy is 0"):
        advebm.energy(Returns(lambda z: z.log_softmax(1)), x)
    constant = Returns(lambda z: z * 0 + torch.tensor([1.0, 0, 0, 0]))
    almost = Returns(lambda z: (z * 1e-7).abs() + torch.tensor([0.9999, 0, 0, 0.0001]))
    for model in (constant, almost):
        with pytest.warns(UserWarning, match="if the model returns probabilities .*; else this is chance"):
            energy = advebm.energy(model, x)
        assert torch.allclose(energy, torch.full((6,), -torch.tensor([1.0, 0, 0, 0]).logsumexp(0).item()), atol=1e-3)
    unlucky = Returns(lambda z: z * 0 - 0.5)
    advebm.energy(unlucky, x)


@report(
    "models",
    "images outside [0, 1] by rounding, as after resizing",
    "",
    "clamped; normalised images are refused",
)
def test_rounding():
    x, y = images(), torch.arange(6) % 4
    rounded = x.clone()
    rounded[0, 0, 0, 0], rounded[0, 0, 0, 1] = 1 + 9e-6, -9e-6
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1, 0
    assert torch.equal(checks.images(rounded), x)
    assert torch.equal(advebm.energy(net(), rounded), advebm.energy(net(), x))
    assert advebm.attack(net(), rounded, y, eps=0.1, steps=1).max() <= 1
    with pytest.raises(UserError, match=r"got \[.*, 1.01\]; undo the normalisation"):
        advebm.energy(net(), x * 1.01)


@report("models", "rectangular images", "ART#1244, auto-attack#95", "train and sample on networks that take them")
def test_rectangles(tmp_path):
    x = RNG.integers(0, 256, (120, 8, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", x=x, y=np.arange(120) % 2)
    options = {"data": f"npz:{tmp_path / 's.npz'}", "backbone": "resnet", "backbone.depth": 8, "backbone.width": 4}
    options |= {"train.images": 200, "train.batch": 40, "train.validate_every": 200}
    run = advebm.train("digits-at", options=options, folder=tmp_path / "run")
    model = advebm.load(run.folder)
    assert advebm.sample(model, torch.tensor([0, 1]), data=run.data, steps=2).shape == (2, 3, 8, 16)
    options = {"data": options["data"], "train.batch": 40, "backbone": "own:tests.test_inputs:square_net"}
    with pytest.raises(UserError, match="the network does not take images of 3 x 8 x 16"):
        advebm.train("digits-at", options=options, folder=tmp_path / "no")


def square_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))


# Commands, their models and their files -------------------------------------------------------------------------------

TRAIN = ["train", "--recipe", "digits-standard", "--train.images", "400", "--train.batch", "40"]
TRAIN += ["--train.validate_every", "400"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run of a few steps, and what it was trained by."""
    options = {"train.images": 2_000, "backbone.width": 8, "objective.attack.steps": 1, "threat.steps": 2}
    return advebm.train("digits-at", options=options, folder=tmp_path_factory.mktemp("runs") / "run", device="cpu")


def command(*words, capsys):
    """Run a command and return its status, output and messages, each as one line of text."""
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, " ".join(err.split())


@report("commands", "evaluate without a threat", "", "the threat that the model was trained for, and printed")
def test_a_model_is_judged_under_its_own_threat(digits_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("export", digits_run.folder, "model", capsys=capsys)[0] == 0
    assert advebm.load("model").threat == digits_run.recipe.threat
    evaluate = ["evaluate", "model", "--metrics", "accuracy,robust-accuracy"]
    status, out, err = command(*evaluate, capsys=capsys)
    assert status == 0
    assert "model is no run; made runs/models/model-" in err
    assert "RobustAccuracy under l2 0.9, as in training" in err
    assert "PGD-2 l2 0.9" in out
    records = advebm.evaluate(advebm.load("model"), data="digits")
    assert records[1].name == "accuracy under PGD-2 l2 0.9"
    status, out, err = command(*evaluate, "--threat.norm", "linf", "--threat.eps", "0.1", capsys=capsys)
    assert "under linf 25.5/255; the model was trained for l2 0.9" in err
    (folder, *_) = sorted(Path("runs/models").iterdir())
    page = Path(command("report", folder, capsys=capsys)[1].strip()).read_text()
    assert "not the threat that the model was trained for, l2 0.9." in page
    with pytest.raises(UserError, match="no threat model is known of this model"):
        advebm.evaluate(net(), data="digits")


@report("commands", "a recipe on data that it was not made for", "", "its threat is said to be that of other data")
def test_a_recipe_on_other_data_says_so(tmp_path):
    fill(tmp_path / "set", ["a", "b"])
    with pytest.warns(Notice, match=r"digits-at was made for digits: its threat, l2 0.9, .* --threat.eps"):
        advebm.load_recipe("digits-at", {"data": f"folder:{tmp_path / 'set'}"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advebm.load_recipe("digits-at", {"data": f"folder:{tmp_path / 'set'}", "threat.eps": "8/255"})
        advebm.load_recipe("digits-at", {"data.val": 0.2})


@report(
    "commands",
    "FD in a model's own features, or of fewer images than dimensions",
    "",
    "marked, and never among the main numbers of a report",
)
def test_distances_that_say_little(digits_run, tmp_path, capsys):
    from advebm.metrics.texts import as_text
    from advebm.reporting import overview
    from advebm.workflows.sample import draw_set

    about = {"samples": "s", "space": "own features", "few": False}
    own = {"name": "FD (own features)", "value": 0.0, "error": 0.0, "count": 40, "settings": about, "series": {}}
    few = {**own, "name": "FD (judge)", "settings": {**about, "space": "judge", "few": True}}
    sound = {**few, "value": 3.0, "settings": {**about, "space": "judge"}}
    draw_set(run := linked(digits_run, tmp_path), "s", digits_run.recipe.sampler, 1)
    describe = lambda *records: overview.describe({"run": run}, {"run": records})
    assert "FD says little" in describe(own, few)
    assert "FD 3.000" in describe(own, few, sound)
    assert as_text(own)["caution"] == "in the model's own features"
    assert as_text(few)["caution"] == "no more images than dimensions"


@few_samples
@report("commands", "sample, compare and edit where results are already", "", "a new name; --replace overwrites")
def test_nothing_is_overwritten(digits_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = ["sample", digits_run.folder, "--sampler.steps", "2", "--per-class"]
    folder = digits_run.folder / "samples"
    names = [Path(command(*draw, count, capsys=capsys)[1].strip()).parent.name for count in (2, 1, 2, 1)]
    assert names == [names[0], f"{names[0]}-2"] * 2
    status, _, err = command(*draw, 3, "--name", names[0], capsys=capsys)
    assert status == 2
    assert "drawn with other settings; another --name, or --replace" in err
    assert command(*draw, 3, "--name", names[0], "--replace", capsys=capsys)[0] == 0
    assert len(np.load(folder / names[0] / "images.npz")["y"]) == 30
    alter = ["edit", "upsample", digits_run.folder, "--count", "2", "--edit.steps", "1"]
    paths = [command(*alter, capsys=capsys)[1].split()[-1] for _ in range(2)]
    assert [Path(path).parent.name for path in paths] == ["upsample", "upsample-2"]
    assert command(*alter, "--out", Path(paths[0]).parent, capsys=capsys)[0] == 2
    assert command(*alter, "--out", Path(paths[0]).parent, "--replace", capsys=capsys)[0] == 0
    compare = ["compare", digits_run.folder, digits_run.folder]
    pages = [command(*compare, capsys=capsys)[1].split()[-1] for _ in range(2)]
    assert pages == ["comparison.html", "comparison-2.html"]
    assert command(*compare, "--out", "comparison.html", capsys=capsys)[0] == 2


@pytest.mark.slow
@report("commands", "export of one's own module; loading elsewhere", "", "weights and the factory's name")
def test_own_modules_are_exported(tmp_path, monkeypatch, capsys):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "own_net_of_a_test.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    own = ["--model", "own_net_of_a_test:make", "--out", home / "run"]
    status, _, err = command(*TRAIN, *own, capsys=capsys)
    assert status == 0, err
    assert command("export", home / "run", away / "model", capsys=capsys)[0] == 0
    x = torch.rand(2, 1, 8, 8)
    expected = advebm.load(home / "run")(x)
    code = "import advebm, sys, torch; print(advebm.load(sys.argv[1])(torch.load(sys.argv[2])).tolist())"
    torch.save(x, away / "x.pt")

    def loaded(where, **options):
        words = [sys.executable, "-c", code, str(where), str(away / "x.pt")]
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd=away, **options)

    assert torch.allclose(torch.tensor(ast.literal_eval(loaded(home / "run").stdout)), expected, atol=1e-5)
    refused = loaded("model")
    assert "load it as own_net_of_a_test:make@model" in refused.stderr
    found = loaded("own_net_of_a_test:make@model", env={**os.environ, "PYTHONPATH": str(home)})
    assert torch.allclose(torch.tensor(ast.literal_eval(found.stdout)), expected, atol=1e-5)


@report("commands", "MODULE:FACTORY@FOLDER of an exported model", "", "weights and normalisation of the folder")
def test_an_exported_module_is_normalised(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ["--model", "tests.test_inputs:grey_net", "--out", "run"]
    assert command(*TRAIN, *own, capsys=capsys)[0] == 0
    assert command("export", "run", "model", capsys=capsys)[0] == 0
    where = "tests.test_inputs:grey_net@model"
    assert command("evaluate", where, "--data", "digits", "--metrics", "accuracy", capsys=capsys)[0] == 0
    (made,) = Path("runs/models").iterdir()
    x = torch.rand(3, 1, 8, 8)
    expected = advebm.load("run")(x)
    assert advebm.load("run").normalise.mean.item() != 0
    for model in (advebm.load(where), advebm.load(made)):
        torch.testing.assert_close(model(x), expected)


def grey_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@report("commands", "a published model whose options name code", "", "its code is never imported")
def test_a_published_model_imports_nothing(digits_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module_of_a_test.py").write_text("raise SystemExit('imported')")
    assert command("export", digits_run.folder, "checkpoints/m", capsys=capsys)[0] == 0
    path = Path("checkpoints/m/config.json")
    plain = json.loads(path.read_text())
    for change in ({"sampler": {"kind": "evil_module_of_a_test:X"}}, {"data": {"kind": "evil_module_of_a_test:X"}}):
        path.write_text(json.dumps({**plain, "options": {**plain["options"], **change}}))
        status, _, err = command("sample", "checkpoints/m", "--per-class", "1", capsys=capsys)
        assert status == 2
        assert "would import foreign code" in err
    backbone = {"kind": "own", "path": "evil_module_of_a_test:X", "root": str(tmp_path)}
    path.write_text(json.dumps({**plain, "architecture": {**plain["architecture"], "backbone": backbone}}))
    assert "imported only when it is named" in command("sample", "checkpoints/m", capsys=capsys)[2]
    assert "evil_module_of_a_test" not in sys.modules


@report("commands", "a run that is gone on with on other images", "", "refused")
def test_resuming_on_other_images(tmp_path, capsys):
    arrays(tmp_path / "s.npz", [0, 1] * 60)
    options = ["--data", f"npz:{tmp_path / 's.npz'}", "--out", tmp_path / "run"]
    assert command(*TRAIN, *options, capsys=capsys)[0] == 0
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("[1-9]*"):
        shutil.rmtree(checkpoint)
    (tmp_path / "run" / "checkpoints" / "LATEST").write_text("0\n")
    arrays(tmp_path / "s.npz", [0, 1] * 60)
    status, _, err = command("train", "--resume", tmp_path / "run", capsys=capsys)
    assert status == 2
    assert "are not those that" in err


@report("commands", "images of a run that were moved", "robustbench#212, ray#28082", "--data.path, with a check")
def test_moved_images(tmp_path, capsys):
    arrays(tmp_path / "s.npz", [0, 1] * 60)
    options = ["--data", f"npz:{tmp_path / 's.npz'}", "--out", tmp_path / "run"]
    status, _, err = command(*TRAIN, *options, capsys=capsys)
    assert status == 0, err
    (tmp_path / "s.npz").rename(tmp_path / "t.npz")
    evaluate = ["evaluate", tmp_path / "run", "--metrics", "accuracy"]
    status, _, err = command(*evaluate, capsys=capsys)
    assert status == 2
    assert "give it with --data.path" in err
    for words in (evaluate, ["report", tmp_path / "run"], ["sample", tmp_path / "run", "--per-class", "1"]):
        assert command(*words, "--data.path", tmp_path / "t.npz", capsys=capsys)[0] == 0
    assert command("train", "--resume", tmp_path / "run", "--data.path", tmp_path / "t.npz", capsys=capsys)[0] == 0
    arrays(tmp_path / "other.npz", [0, 1] * 60)
    status, _, err = command(*evaluate, "--data.path", tmp_path / "other.npz", capsys=capsys)
    assert status == 2
    assert "are not those that" in err
    status, _, err = command(*evaluate, "--data", "digits", capsys=capsys)
    assert status == 2
    assert "only their place can be given: --data.path" in err


def test_every_reference_to_a_model(digits_run, tmp_path, monkeypatch):
    """A run, a checkpoint, a published folder, a file in it, a state dict, a module, each by one function."""
    monkeypatch.chdir(tmp_path)
    folder = digits_run.checkpoints.path()
    expected, x = advebm.load(digits_run.folder), torch.rand(2, 1, 8, 8)
    for where in (digits_run.folder, folder, folder / "ema.safetensors"):
        assert torch.equal(advebm.load(where)(x), expected(x)), where
    with pytest.raises(UserError, match=r"there is no run or model at cifar10-at-2hh; given can be .*hf:USER/NAME"):
        advebm.load("cifar10-at-2hh")
    with pytest.raises(UserError, match=r"there is no weight file at nothing\.pt"):
        advebm.load("nothing.pt")


@report(
    "models",
    "a state dict of a public network alone",
    "foolbox#736",
    "recognised, built and loaded",
)
def test_weight_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    public = foreign_networks.randomise(foreign_networks.ResNet((1, 1, 1), 8), generator).eval()
    torch.save({"state_dict": public.state_dict()}, tmp_path / "net.pt")
    x = torch.rand(2, 3, 32, 32, generator=generator)
    with pytest.warns(Notice, match="has no normalisation; images in .* are taken as they are"):
        model = advebm.load(tmp_path / "net.pt")
    torch.testing.assert_close(model(x), public(x), rtol=1e-4, atol=1e-4)


def test_one_way_to_name_data(tmp_path):
    root = fill(tmp_path / "set", ["a", "b"])
    data = advebm.load_data(f"folder:{root}", size=16)
    assert data.digest() == advebm.load_data("folder", path=str(root), size=16).digest()
    with pytest.raises(UserError, match=r"train.batch is 128, but .* has 28 training images; give --train.batch 28"):
        advebm.train("digits-standard", options={"data": f"folder:{root}"}, folder=tmp_path / "run")


@report("commands", "doctor on 100 pictures, of which 20 are for test", "", "also validation and training images, said")
def test_the_doctor_on_few_pictures(digits_run, tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (100, 8, 8), dtype=np.uint8), np.arange(100) % 10
    np.savez(tmp_path / "s.npz", x=x, y=y)
    monkeypatch.chdir(tmp_path)
    status, _, err = command("doctor", digits_run.checkpoints.path(), "--data", "npz:s.npz", capsys=capsys)
    assert status in (0, 1), err
    assert "on 50 test, validation and training images of s" in err


@report("commands", "a demo that was interrupted", "", "advebm demo --resume DIR goes on with all of it")
def test_an_interrupted_demo(tmp_path, monkeypatch, capsys):
    from advebm.workflows import demo

    class Stop(Exception):
        pass

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "fit", interrupt)
        status, _, err = command("demo", "--out", tmp_path, capsys=capsys)
    (folder,) = [tmp_path / name for name in [err.rpartition("--resume ")[2].rpartition("/")[2]]]
    assert status == 130
    assert f"advebm demo --resume {folder}" in err


@report(
    "commands",
    "metrics.jsonl that is not UTF-8, or a folder in a file's place",
    "",
    "an error that names the file, or the damaged lines left out",
)
@pytest.mark.parametrize("damage", ["bytes", "folder"])
def test_damaged_runs(digits_run, tmp_path, capsys, damage):
    run = tmp_path / "run"
    for name in ("metrics.jsonl", "metrics.json", "env.json", "config.yaml", "checkpoints/LATEST"):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(digits_run.folder, run)
        (run / name).unlink(missing_ok=True)
        if damage == "folder":
            (run / name).mkdir()
        else:
            (run / name).write_bytes(b"\xff\xfe{\x00")
        for words in (["report", run], ["sample", run, "--per-class", "1"], ["evaluate", run, "--metrics", "accuracy"]):
            status, _, err = command(*words, capsys=capsys)
            assert status in (0, 2), (name, words)
            assert "Traceback" not in err


def test_the_page_has_this_table():
    page = Path(__file__).parents[1] / "docs" / "inputs.md"
    if not page.exists():
        pytest.skip("the pages are not here")
    assert table() in page.read_text()


def table():
    """Return the table of all inputs as Markdown, by area."""
    lines = ["| input | reported as | what happens |", "| --- | --- | --- |"]
    area = None
    areas = list(dict.fromkeys(kind for kind, *_ in TABLE))
    for kind, given, where, outcome in sorted(TABLE, key=lambda row: areas.index(row[0])):
        if kind != area:
            lines.append(f"| **{kind}** | | |")
            area = kind
        lines.append(f"| {given} | {where} | {outcome} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
