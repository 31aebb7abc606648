"""Sets that do not fit in memory: whatever their layout, they give the splits and batches that memory would."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import advebm
from advebm.core import config, console, rng
from advebm.core.errors import Interrupted, Notice, UserError
from advebm.data import disk, tables
from advebm.data.augment import Augment
from advebm.data.decode import decode
from advebm.data.loader import Loader
from advebm.data.negatives import Mixture
from advebm.data.ood_sets import count_shared
from advebm.data.sources import Classes, Images, Part, Unlabelled
from advebm.starts import ClassGaussians, CompactGaussians
from advebm.training.loop import train
from tests.data.shard_sets import CLASSES, NAMES, SIZE, encode, pictures, write, write_parquet, write_tar
from tests.helpers import tiny

LAYOUTS = ("parquet", "tar", "folder", "hub")
AUGMENT = (Augment(crop=2, flip=True, jitter=0.5, cutout=3),)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVEBM_DATA", raising=False)


@pytest.fixture
def small_memory(monkeypatch):
    """No set fits in memory, and shards that can be cut have 16 images."""
    monkeypatch.setattr(disk, "IN_MEMORY", 100)
    monkeypatch.setattr(disk, "CHUNK", 16 * 3 * SIZE * SIZE)


def source(layout, root, **options):
    path = write("parquet" if layout == "hub" else layout, root)
    if layout != "hub":
        return config.build({"kind": "folder", "path": str(path), "size": SIZE, "val": 0.2, **options}, "source")
    pytest.importorskip("datasets").config.HF_DATASETS_CACHE = str(root / "arrow")
    return config.build({"kind": "hf", "path": str(path / "data"), "size": SIZE, "val": 0.2, **options}, "source")


def in_memory(this):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "IN_MEMORY", 2**30)
        data = this.load()
    assert not any(part.key for part in data.splits)
    return data


def same_data(a, b):
    splits = zip(a.splits, b.splits, strict=True)
    return a.classes == b.classes and all(torch.equal(p.x, q.x) and torch.equal(p.y, q.y) for p, q in splits)


def batches(data, count=12, batch=32, streams=2):
    load = Loader(data.train, 5, batch, streams, AUGMENT)
    for step, stream in itertools.product(range(count), range(streams)):
        views, y = load(step * batch, stream, rng.generator(step, stream))
        yield views[0], y


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_set_gives_the_batches_that_memory_would(tmp_path, small_memory, layout):
    """Over four epochs of augmented batches, bit by bit."""
    this = source(layout, tmp_path / "set")
    data, expected = this.load(), in_memory(this)
    assert all(part.key for part in data.splits)
    assert same_data(data, expected)
    assert len(data.train) * 4 <= 12 * 32
    for (x, y), (x_expected, y_expected) in zip(batches(data), batches(expected), strict=True):
        assert torch.equal(x, x_expected)
        assert torch.equal(y, y_expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_in_its_split_with_its_label(tmp_path, small_memory, layout):
    """As the pixels say: the test shard is the test split, in order; the others are training and validation images."""
    data = source(layout, tmp_path / "set").load()
    x, y = pictures()
    number = lambda part: part.x[:, 1, 0, 0].long()
    for part in data.splits:
        assert np.array_equal(part.x.permute(0, 2, 3, 1).numpy(), x[number(part)])
        assert torch.equal(part.y, part.x[:, 0, 0, 0].long())
        assert np.array_equal(part.y.numpy(), y[number(part)])
    assert data.classes == (tuple(map(str, range(CLASSES))) if layout == "tar" else NAMES)
    assert len(data.val) == sum(round(0.2 * int((y[:120] == k).sum())) for k in range(CLASSES))
    assert sorted(torch.cat([number(data.train), number(data.val)]).tolist()) == list(range(120))
    if layout != "folder":  # whose order is that of classes
        assert number(data.test).tolist() == list(range(120, 150))
        assert number(data.train).tolist() == sorted(number(data.train).tolist())


def test_images_on_disk_are_mapped_once_and_never_decoded_again(tmp_path, small_memory, monkeypatch):
    this = source("tar", tmp_path / "set")
    data = this.load()
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = [line for line in maps.read_text().splitlines() if data.train.key in line]
        assert lines
        assert all(line.split()[1] == "r--s" for line in lines)  # read-only and shared: the system can drop the pages
    monkeypatch.setattr(tables, "decode", lambda *a, **k: pytest.fail("decoded again"))
    assert same_data(this.load(), data)


def test_other_files_other_sizes_and_other_splits_are_other_sets(tmp_path, small_memory):
    this = source("tar", tmp_path / "set")
    before = this.load()
    other_split = replace(this, split_seed=1)
    assert same_data(other_split.load(), in_memory(other_split))
    assert other_split.load().train.key != before.train.key
    path = tmp_path / "set" / "set-train-1.tar"
    damage(path, lambda content: content.__setitem__(slice(512, 512 + 8), content[512:520]))  # as long, and the same
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert this.load().train.key != before.train.key
    assert replace(this, size=4).load().shape == (3, 4, 4)
    x, _ = pictures()
    write_tar(tmp_path / "set" / "set-train-1.tar", {"a.png": encode(255 - x[0]), "a.cls": b"1"})
    after = this.load()
    assert len(after.train) + len(after.val) == 40 + 1 + 45
    assert same_data(after, in_memory(this))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_that_was_killed_goes_on_behind_the_last_whole_shard(tmp_path, small_memory, monkeypatch, layout):
    this, seen = source(layout, tmp_path / "set"), []

    def dies(blobs, names, **options):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(blobs))
        return decode(blobs, names, **options)

    monkeypatch.setattr(tables, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        this.load()
    sets = lambda: sorted(len(list(p.iterdir())) - 1 for p in (tmp_path / "cache").glob("images-*"))
    assert sets() == [1]  # the test images; of training and validation images there is nothing that looks whole
    (draft,) = (tmp_path / "cache").glob(".*.partial")
    for part in draft.glob("[0-9]"):  # as when it is killed while it writes
        part.write_bytes(part.read_bytes() + b"half a shard")
    monkeypatch.setattr(tables, "decode", lambda b, n, **k: seen.append(len(b)) or decode(b, n, **k))
    data = this.load()
    assert sum(seen) == 150
    assert sets() == [1, 2]
    assert not list((tmp_path / "cache").glob(".*.partial"))
    assert same_data(data, in_memory(this))


def test_files_that_are_cut_short_are_made_anew(tmp_path, small_memory):
    this = source("parquet", tmp_path / "set")
    data = this.load()
    path = tmp_path / "cache" / data.train.key
    del data
    path.write_bytes(path.read_bytes()[:-1])
    assert same_data(this.load(), in_memory(this))


def damage(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


def cut(content):
    del content[len(content) // 2 :]


def flip_header(content):
    content[1024 + 3] ^= 255  # the name of the second file, which its checksum covers


def flip_picture(content):
    content[512 + 60] ^= 255  # inside the pixels of the first image


@pytest.mark.parametrize(
    ("layout", "name", "change", "message"),
    [
        ("tar", "set-train-1.tar", cut, r"set-train-1\.tar is not a whole tar file"),
        ("tar", "set-train-1.tar", flip_header, r"set-train-1\.tar is not a whole tar file: damaged .* at byte 1,024"),
        ("tar", "set-train-1.tar", flip_picture, r"1 of 35 images cannot be read: set-train-1\.tar image 0"),
        ("parquet", "data/train-2.parquet", cut, r"train-2\.parquet is not parquet"),
        ("tar", "set-train-1.tar", bytearray.clear, r"set-train-1\.tar is not a whole tar file"),
    ],
)
def test_a_damaged_shard_is_named_in_a_line(tmp_path, small_memory, layout, name, change, message):
    this = source(layout, tmp_path / "set")
    damage(tmp_path / "set" / name, change)
    with pytest.raises(UserError, match=message) as caught:
        this.load()
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "cache").glob("images-*") if (p / "1").exists()]  # training and validation


def test_images_that_cannot_be_read_are_left_out(tmp_path, small_memory):
    this = source("tar", tmp_path / "set", corrupt="skip")
    damage(tmp_path / "set" / "set-train-1.tar", flip_picture)
    with pytest.warns(UserWarning, match=r"1 of 35 images cannot be read: set-train-1.tar image 0 .*left out"):
        data = this.load()
    numbers = torch.cat([part.x[:, 1, 0, 0] for part in data.splits]).tolist()
    assert sorted(numbers) == [i for i in range(150) if i != 40]
    assert all(torch.equal(part.y, part.x[:, 0, 0, 0].long()) for part in data.splits)
    assert same_data(this.load(), data)


def test_too_little_memory_is_no_damaged_image(monkeypatch):
    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr("PIL.Image.open", full)
    with pytest.raises(MemoryError):
        decode([encode(pictures()[0][0])], ["it"], channels=3, size=None, corrupt="skip")


def test_samples_of_tar_files(tmp_path):
    """Labels as text or in JSON, folders and hidden files inside, and what is not a sample."""
    x, _ = pictures()
    root = tmp_path / "set"
    files = {"./b/7.x.png": b"not of this kind", "b/._7.png": b"junk", "readme": b"text"}
    files |= {f"b/{i}.PNG": encode(x[i]) for i in range(30)}
    files |= {f"b/{i}.json": json.dumps({"caption": "c", "label": ("owl", "elk")[i % 2]}).encode() for i in range(15)}
    files |= {f"b/{i}.cls": (b"owl\n", b"elk")[i % 2] for i in range(15, 30)}
    write_tar(root / "00000.tar", files)
    read = lambda: advebm.load_data("folder", path=str(root), size=SIZE)
    data = read()
    assert data.classes == ("elk", "owl")
    assert sum(map(len, data.splits)) == 30
    for part in data.splits:
        assert torch.equal(part.y, 1 - part.x[:, 1, 0, 0].long() % 2)
    write_tar(root / "00000.tar", {f"{i}.png": encode(x[i]) for i in range(30)})
    assert not read().labelled
    write_tar(root / "00000.tar", {"3.png": encode(x[3]), "3.jpg": b""})
    with pytest.raises(UserError, match=r"00000.tar: 3 has 2 images; there has to be one"):
        read()


def test_names_of_shards_say_their_split(tmp_path):
    x, _ = pictures()
    one = {"0.png": encode(x[0])}
    for name in ("train/0.tar", "train/1.tar", "val/train.tar", "extra.tar"):
        write_tar(tmp_path / name, one)
    found = {p.name: None for p in tmp_path.iterdir()}
    assert set(found) == {"train", "val", "extra.tar"}
    with pytest.warns(UserWarning, match=r"extra\.tar beside the splits: left out"):
        splits = advebm.data.shard_files._find_file_splits(tmp_path, advebm.data.shard_files.find_shard_files(tmp_path))
    assert [str(p.relative_to(tmp_path)) for p in splits["train"]] == ["train/0.tar", "train/1.tar", "val/train.tar"]
    write_tar(tmp_path / "test-train.tar", one)
    with pytest.raises(UserError, match="names the splits test and train"):
        advebm.load_data("folder", path=str(tmp_path))
    write_tar(tmp_path / "other" / "valid-0.tar", one)
    with pytest.raises(UserError, match="has shards of val, but no train"):
        advebm.load_data("folder", path=str(tmp_path / "other"))
    write_parquet(tmp_path / "other" / "train-0.parquet", [encode(x[0])], [0])
    with pytest.raises(UserError, match="both parquet and tar"):
        advebm.load_data("folder", path=str(tmp_path / "other"))


def test_an_archive_beside_images_is_not_read(tmp_path):
    root = write("folder", tmp_path / "set")
    write_tar(root / "train.tar", {"0.png": b"nothing"})
    with pytest.warns(Notice):
        assert len(advebm.load_data("folder", path=str(root), size=SIZE).test) == 30


@pytest.mark.parametrize(
    "derive",
    [
        lambda this: Part(this, share=0.5),
        lambda this: Part(this, share=0.5, rest=True),
        lambda this: Classes(this, count=2),
        Unlabelled,
        lambda this: Mixture((this, replace(this, split_seed=4))),
    ],
)
def test_sources_made_from_others(tmp_path, small_memory, derive):
    this = derive(source("tar", tmp_path / "set"))
    data = this.load()
    assert all(part.key for part in data.splits)
    assert same_data(data, in_memory(this))


def test_archives_of_arrays(tmp_path, small_memory):
    x, y = pictures()
    np.savez(tmp_path / "set.npz", x=x, y=y)
    this = config.build(f"npz:{tmp_path / 'set.npz'}", "source")
    data = this.load()
    assert data.train.key
    assert same_data(data, in_memory(this))
    np.savez(tmp_path / "set.npz", x=255 - x, y=y)  # known by its content
    assert same_data(this.load(), in_memory(this))


def test_what_is_computed_from_all_images(tmp_path, small_memory, monkeypatch):
    this = source("tar", tmp_path / "set")
    data, expected = this.load(), in_memory(this)
    answers = expected.digest(), expected.statistics()
    assert (data.digest(), data.statistics()) == answers
    assert count_shared(data.test.x, expected) == len(data.test)
    assert count_shared(255 - data.test.x, expected) == 0
    for name in ("_hash", "_measure"):
        monkeypatch.setattr(type(data), name, lambda self: pytest.fail("all images are read again"))
    again = this.load()
    assert (again.digest(), again.statistics()) == answers
    other = again._replace(train=replace(again.train, y=again.train.y.flip(0)))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        other.digest()


def test_gaussians_of_pieces_are_those_of_the_whole(tmp_path, small_memory, monkeypatch):
    """Mean and variance by definition; draws and compact Gaussians as from one piece, within rounding."""
    data = source("tar", tmp_path / "set").load()
    x, y = data.train.x, data.train.y
    drawn = lambda: ClassGaussians.fit(x, y, classes=CLASSES)(
        torch.empty(9, 3, SIZE, SIZE), torch.arange(9) % CLASSES, rng.generator(0)
    )
    monkeypatch.setattr("advebm.starts.COVARIANCE_BYTES", 55)  # of 10 frequencies
    whole, compact = drawn(), CompactGaussians.fit(x)
    monkeypatch.setattr("advebm.starts.PIECE", 10 * 4 * 3 * SIZE * SIZE)
    fitted = ClassGaussians.fit(x)
    rows = x.double().flatten(1) / 255
    assert torch.allclose(fitted.means[0].double(), rows.mean(0), atol=1e-6)
    assert fitted.variances.item() == pytest.approx(((rows - rows.mean(0)) ** 2).sum(0).mean().item() / (len(x) - 1))
    assert torch.allclose(drawn(), whole, atol=1e-5)
    pieces = CompactGaussians.fit(x)
    assert torch.equal(pieces.frequencies, compact.frequencies)
    assert torch.allclose(pieces.powers, compact.powers, rtol=1e-3)
    assert torch.allclose(pieces.scales, compact.scales, rtol=1e-3)
    assert (pieces.roots.int() - compact.roots.int()).abs().max() <= 1
    assert (pieces.means.int() - compact.means.int()).abs().max() <= 1


def recipe(path, **options):
    return tiny(
        "digits-standard",
        data={"kind": "folder", "path": str(path), "size": SIZE, "augment": {"x": {"crop": 2, "flip": True}}},
        train__batch=16,
        train__images=480,
        train__validate_every=240,
        train__checkpoint_every=240,
        train__log_every=32,
        **options,
    )


def weights(run):
    return load_file(run.checkpoints.path() / "model.safetensors")


@pytest.mark.parametrize("layout", ["parquet", "tar"])
def test_training_resumes_to_the_weights_of_training_in_memory(tmp_path, monkeypatch, layout):
    """In memory without a stop, and from disk with one, after the images were decoded again."""
    this = recipe(write(layout, tmp_path / "set"))
    expected = weights(train(this, tmp_path / "memory", device="cpu"))
    monkeypatch.setattr(disk, "IN_MEMORY", 100)
    with pytest.raises(Interrupted):
        train(this, tmp_path / "disk", device="cpu", report=stop)
    shutil.rmtree(tmp_path / "cache")
    run = train(this, tmp_path / "disk", resume=True, device="cpu")
    assert run.data.train.key
    found = weights(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def stop(line):
    if line["images"] >= 160:
        signal.raise_signal(signal.SIGINT)


def test_images_that_fit_go_to_the_device_and_others_batch_by_batch(monkeypatch):
    x, y = pictures()
    images = Images(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y))
    build = lambda: Loader(images, 0, 8, 1, (Augment(),), device="meta")
    assert build().images.x.device.type == "meta"
    monkeypatch.setattr(disk, "IN_MEMORY", 100)
    loader = build()
    assert loader.images.x.device.type == "cpu"
    (views,), labels = loader(0, 0, torch.Generator())
    assert views.device.type == labels.device.type == "meta"
    assert views.shape == (8, 3, SIZE, SIZE)


def test_a_full_or_read_only_disk_is_told_with_the_way_out(tmp_path, small_memory, monkeypatch):
    this = source("tar", tmp_path / "set")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"do not fit in .*cache, which has 0.0 GB free; .* ADVEBM_CACHE"):
        this.load()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*file.* ADVEBM_CACHE"):
        this.load()


def test_decoding_reports_what_is_left_within_seconds(tmp_path, small_memory, monkeypatch):
    monkeypatch.setattr(console, "FIRST", 0.0)
    monkeypatch.setattr(console, "QUIET", 0.0)
    said = []
    monkeypatch.setattr(console, "say", lambda *texts: said.extend(texts))
    source("tar", tmp_path / "set").load()
    assert sum("GB of images, more than is held in memory, are decoded to" in text for text in said) == 2
    lines = [text for text in said if "/120  " in text]
    assert all(line.startswith("images decoded to disk  ") and "s left" in line for line in lines)
    counts = [int(line.split()[4].partition("/")[0]) for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] > 100


def test_a_second_process_waits_for_the_one_that_decodes(tmp_path, small_memory, monkeypatch):
    this = source("tar", tmp_path / "set")
    name = this.load().train.key.partition("/")[0]
    shutil.rmtree(tmp_path / "cache" / name)
    said = threading.Event()
    monkeypatch.setattr(console, "say", lambda *texts: said.set() if "another process" in "".join(texts) else None)
    results = []
    with filelock.FileLock(tmp_path / "cache" / f".{name}.lock"):
        waiting = threading.Thread(target=lambda: results.append(this.load()))
        waiting.start()
        assert said.wait(60)
        assert not (tmp_path / "cache" / name).exists()
    waiting.join(60)
    assert same_data(results[0], in_memory(this))


CHILD = """
import resource, sys
import torch
import advebm
from advebm.data import disk
from advebm.data.decode import decode
from advebm.data.loader import Loader
from advebm.data.augment import Augment
from advebm.core import rng
from advebm.starts import ClassGaussians

disk.IN_MEMORY, disk.CHUNK = int(sys.argv[2]), 4 << 20
torch.set_num_threads(1)
anonymous = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (anonymous() + (110 << 20),) * 2)
data = advebm.load_data("folder", path=sys.argv[1], size=256)
load = Loader(data.train, 0, 8, 1, (Augment(crop=4, flip=True),))
total = 0.0
for step in range(len(data.train) // 8):
    views, _ = load(8 * step, 0, rng.generator(step))
    total += views[0].double().mean().item()
data.digest(), data.statistics()
print(sum(map(len, data.splits)), sum(p.x.numel() for p in data.splits) >> 20, round(total, 6))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is limited as on Linux")
@pytest.mark.parametrize("layout", ["tar", "folder"])
def test_decoding_and_training_take_the_memory_of_a_few_shards(tmp_path, layout):
    """281 MiB of images with 110 MiB for all that is allocated; in memory that fails."""
    blobs = [encode(np.full((256, 256, 3), 3 * i, np.uint8)) for i in range(60)]
    for shard in range(25):
        rows = {f"{shard:02}-{i:02}": (blobs[i], i % 2) for i in range(60)}
        if layout == "tar":
            files = {f"{n}.{e}": c for n, (b, k) in rows.items() for e, c in (("png", b), ("cls", b"%d" % k))}
            write_tar(tmp_path / "set" / f"{shard:03}.tar", files)
        else:
            for name, (blob, label) in rows.items():
                path = tmp_path / "set" / str(label) / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(blob)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "2"}  # freed is given back

    def child(in_memory):
        words = [sys.executable, "-c", CHILD, str(tmp_path / "set"), str(in_memory)]
        return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)

    done = child(16 << 20)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[:2] == ["1500", "281"]
    shutil.rmtree(tmp_path / "cache")
    assert re.search("MemoryError|allocate memory", child(1 << 30).stderr)
