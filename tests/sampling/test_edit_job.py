"""Images that somebody hands in, and edits from the command line."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from advebm import cli
from advebm.core import config, console
from advebm.core.errors import UserError
from advebm.data import pictures
from advebm.data.decode import LARGEST, open_image, open_mask
from advebm.edits.base import Edited
from advebm.edits.transform import Translate
from advebm.sampling import edit_job, generate
from tests.helpers import linked


def encoded(array, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array, **options).save(buffer, format)
    return buffer.getvalue()


def picture(width=8, height=8, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class TestOpening:
    def test_an_image_that_fits_is_its_bytes(self, tmp_path):
        pixels = picture()
        (tmp_path / "a.png").write_bytes(encoded(pixels))
        for source in (encoded(pixels), tmp_path / "a.png"):
            x = open_image(source, (3, 8, 8))
            assert torch.equal((x * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))
        assert open_image(encoded(picture(channels=1)), (1, 8, 8)).shape == (1, 8, 8)

    def test_fitting_cuts_the_middle_and_converts(self):
        wide = np.zeros((8, 24, 3), np.uint8)
        wide[:, 8:16] = 255
        assert (open_image(encoded(wide), (3, 8, 8), fit=True) == 1).all()
        assert open_image(encoded(wide), (1, 4, 4), fit=True).shape == (1, 4, 4)
        assert open_image(encoded(picture(channels=1)), (3, 8, 8), fit=True).shape == (3, 8, 8)

    def test_greys_in_a_colour_file_are_grey(self):
        grey = picture(channels=1)
        x = open_image(encoded(np.stack([grey] * 3, -1)), (1, 8, 8))
        assert torch.equal((x[0] * 255).round().byte(), torch.from_numpy(grey))

    def test_what_is_transparent_is_white(self):
        clear = np.zeros((8, 8, 4), np.uint8)
        clear[0, 0] = (255, 0, 0, 255)
        x = open_image(encoded(clear), (3, 8, 8))
        assert x[:, 0, 0].tolist() == [1, 0, 0]
        assert (x[:, 1:] == 1).all()

    def test_cameras_turn_images(self):
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        pixels = np.zeros((8, 8), np.uint8)
        pixels[0] = 255
        Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
        x = open_image(buffer.getvalue(), (1, 8, 8))
        assert (x[0, :, -1] == 1).all()
        assert (x[0, :, :-1] == 0).all()

    def test_the_first_picture_of_an_animation(self):
        buffer = io.BytesIO()
        frames = [Image.new("L", (8, 8), value) for value in (0, 200)]
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
        assert (open_image(buffer.getvalue(), (1, 8, 8), fit=True) == 0).all()

    BAD = (
        (encoded(picture(9, 8)), (3, 8, 8), "has 9 x 8 pixels, there have to be 8 x 8; resize it, or have it fitted"),
        (encoded(picture(channels=1)), (3, 8, 8), "is grey, the model takes colour images; convert it"),
        (encoded(picture()), (1, 8, 8), "is in colour, the model takes grey images; convert it"),
        (encoded(picture(64, 64))[:2000], (3, 64, 64), "is not an image that can be read .* is it whole"),
        (b"", (3, 8, 8), "is empty"),
        (b"<svg></svg>", (3, 8, 8), "is not an image of a kind that is read here"),
        (encoded(np.zeros((8, 8), np.int32), "TIFF"), (1, 8, 8), "has signed pixels: which value is white"),
    )

    @pytest.mark.parametrize(("source", "shape", "message"), BAD, ids=lambda v: str(v)[:20])
    def test_what_cannot_be_is_named(self, source, shape, message):
        with pytest.raises(UserError, match=f"the image {message}"):
            open_image(source, shape)

    @pytest.mark.parametrize("edge", [7_500, 20_000])
    def test_a_decompression_bomb_is_not_opened(self, edge):
        bomb = encoded(np.zeros((edge, edge), np.uint8)) if edge < 10_000 else bomb_of(edge)
        with pytest.raises(UserError, match=f"{LARGEST:,}"):
            open_image(bomb, (3, 8, 8), fit=True)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"there is no .*nothing\.png"):
            open_image(tmp_path / "nothing.png", (3, 8, 8))

    def test_masks(self):
        pixels = np.zeros((8, 8), np.uint8)
        pixels[2:4, 1:7] = 200
        mask = open_mask(encoded(pixels), (8, 8))
        assert mask.dtype == torch.bool
        assert torch.equal(mask, torch.from_numpy(pixels > 100))
        with pytest.raises(UserError, match="the mask has 8 x 8 pixels, there have to be 16 x 16"):
            open_mask(encoded(pixels), (16, 16))
        assert open_mask(encoded(pixels), (16, 16), fit=True).sum() > 30


def bomb_of(edge):
    """A PNG whose header alone is huge."""
    small = bytearray(encoded(np.zeros((8, 8), np.uint8)))
    small[16:24] = edge.to_bytes(4, "big") * 2
    import zlib

    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


@pytest.fixture
def run(small_run, tmp_path):
    (tmp_path / "run").mkdir()
    return linked(small_run, tmp_path / "run")


def edit(run, what, *arguments, capsys, refused=False):
    status = cli.main(
        ["edit", what, str(run.folder), "--replace" if what != "score" else "--seed=0", *map(str, arguments)]
    )
    out, err = capsys.readouterr()
    if refused:
        assert status == 2, out
        (line,) = [line for line in err.splitlines() if line.startswith("advebm: error")]
        return line
    assert status == 0, err
    return out


def read(folder):
    arrays = np.load(folder / "images.npz")
    return json.loads((folder / "manifest.json").read_text()), {k: arrays[k] for k in arrays.files}


QUICK = ("--count", 3, "--edit.steps", 3)


@pytest.mark.parametrize("what", ["translate", "inpaint", "paint", "denoise", "upsample", "counterfactual"])
def test_edits_of_the_runs_own_images(run, capsys, what):
    goal = ("--class", 3) if what in ("translate", "paint") else ()
    out = edit(run, what, *QUICK, *goal, "--split", "test", "--film", capsys=capsys)
    folder = run.folder / "edits" / what
    assert str(folder / "edit.png") in out
    manifest, arrays = read(folder)
    assert manifest["edit"]["kind"] == what
    assert manifest["edit"]["steps"] == 3
    assert manifest["models"][0]["checkpoint"] == run.checkpoints.path().name
    assert len(manifest["models"][0]["weights"]) == 64
    assert arrays["x"].shape == (3, 1, 8, 8)
    assert {p.stem for p in (folder / "results").iterdir()} == {"test-0", "test-1", "test-2"} == set(manifest["images"])
    numbers = manifest["images"]["test-0"]
    assert ("PSNR after" in numbers) == (what in ("inpaint", "denoise", "upsample"))
    assert "distance" in out
    if what == "inpaint":
        data = run.recipe.data.load()
        first = data.test.x[(data.test.y == 0).nonzero()[0, 0]]
        known = np.ones((8, 8), bool)
        known[2:6, 2:6] = False
        assert (arrays["x"][0, 0][known] == first[0].numpy()[known]).all()
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames > 1


def test_edits_of_files_and_folders(run, capsys, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.png").write_bytes(encoded(picture(channels=1)))
    (tmp_path / "photo.jpg").write_bytes(encoded(picture(40, 30), "JPEG"))
    (tmp_path / "mask.png").write_bytes(encoded(np.pad(np.full((2, 2), 255, np.uint8), 3)))
    paths = ("--image", tmp_path / "in", tmp_path / "photo.jpg")
    line = edit(run, "inpaint", *paths, "--mask", tmp_path / "mask.png", capsys=capsys, refused=True)
    assert "photo.jpg has 40 x 30 pixels, there have to be 8 x 8" in line
    out = tmp_path / "out"
    edit(run, "inpaint", *paths, "--fit", "--mask", tmp_path / "mask.png", "--out", out, capsys=capsys)
    manifest, arrays = read(out)
    assert list(manifest["images"]) == ["a", "b", "photo"]
    known = np.ones((8, 8), bool)
    known[3:5, 3:5] = False
    assert (arrays["x"][..., known] == arrays["given"][..., known]).all()
    (tmp_path / "small.png").write_bytes(encoded(picture(4, 4, 1)))
    edit(run, "upsample", "--image", tmp_path / "small.png", "--out", out, capsys=capsys)
    assert read(out)[1]["x"].shape == (1, 1, 8, 8)
    assert {p.name for p in (out / "results").iterdir()} == {"small.png"}


def test_seeds_and_ways(run, capsys):
    edit(run, "compose", *QUICK, "--classes", "3,8", "--edit.weights", "1,-0.5", capsys=capsys)
    manifest, arrays = read(run.folder / "edits" / "compose")
    assert manifest["classes"] == [3, 8]
    assert arrays["x"].shape == (3, 1, 8, 8)
    edit(run, "interpolate", "--count", 3, "--edit.count", 4, capsys=capsys)
    manifest, arrays = read(run.folder / "edits" / "interpolate")
    assert list(manifest["images"])[:2] == ["seed-0-seed-1-0", "seed-0-seed-1-1"]
    assert arrays["x"].shape == (8, 1, 8, 8)
    assert manifest["edit"]["ends"] == "moved"
    edit(run, "compose", *QUICK, "--with", run.folder, capsys=capsys)
    assert len(read(run.folder / "edits" / "compose")[0]["models"]) == 2


def test_translation_from_another_run_and_its_dial(run, capsys):
    edit(run, "translate", "--from", run.folder, "--split", "val", "--amount", 0, "--class", 1, capsys=capsys)
    _, arrays = read(run.folder / "edits" / "translate")
    assert (arrays["x"] == arrays["given"]).all()
    assert len(arrays["x"]) == 8


def test_scores(run, capsys):
    out = edit(run, "score", "--split", "test", "--count", 2, capsys=capsys)
    assert "test-0" in out
    assert "share of validation images below" in out


MISTAKES = [
    (["sharpen"], "no edit 'sharpen'"),
    (["translate", "--mask", "a.png"], "--mask is for inpaint, paint; translate takes none"),
    (["inpaint", "--box", "1,2"], "a box is left,top,right,bottom such as 8,8,24,24, got '1,2'"),
    (["inpaint", "--box", "1,2,30,4"], "a box is left,top,right,bottom within 8 x 8 pixels"),
    (["inpaint", "--image", "nowhere.png"], "there is no nowhere.png"),
    (["inpaint", "--image", "a.png", "--split", "test"], "--image or --split, not both"),
    (["translate", "--class", "cat"], "no class 'cat'"),
    (["translate", "--class", "12"], "no class '12'"),
    (["translate", "--edit.stpes", "3"], "did you mean 'steps'"),
    (["score", "--edit.steps", "3"], "score takes no --edit options"),
    (["compose", "--classes", "1,2", "--edit.weights", "1"], "as many models as classes and weights"),
    (["translate", "--out", "."], ". is a run; --out takes a folder for this edit"),
    (["translate", "--count", "0"], "--count must be at least 1"),
    (["translate", "--frm", "x"], "unexpected '--frm'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else ""
)
def test_mistakes_are_one_line(run, capsys, arguments, message, monkeypatch):
    monkeypatch.chdir(run.folder)
    assert message in edit(run, arguments[0], *arguments[1:], capsys=capsys, refused=True)
    assert not (run.folder / "edits").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("manifest", [{"sampler": {"kind": "cs"}, "seed": 0, "count": 2}, [1], {"edit": "x"}, None])
def test_what_is_no_edit_is_not_written_over(run, capsys, tmp_path, manifest, monkeypatch):
    out = tmp_path / "samples"
    (out / "results").mkdir(parents=True)
    (out / "images.npz").write_bytes(b"samples")
    if manifest is not None:
        (out / "manifest.json").write_text(json.dumps(manifest))
    before = contents(out)
    monkeypatch.setattr(edit_job, "apply_edit", lambda *a, **k: pytest.fail("refused after the work"))
    line = edit(run, "translate", *QUICK, "--split", "test", "--out", out, capsys=capsys, refused=True)
    assert "holds something that is not an edit" in line
    assert contents(out) == before


def test_names_of_another_manifest_do_not_lead_out_of_the_folder(run, capsys, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.png"
    (out / "results").mkdir(parents=True)
    (out / "results" / "old.png").touch()
    other.touch()
    names = {"../../other": {}, str(other.with_suffix("")): {}, "old": {}}
    (out / "manifest.json").write_text(json.dumps({"edit": {"kind": "paint"}, "images": names}))
    edit(run, "translate", *QUICK, "--split", "test", "--out", out, capsys=capsys)
    assert other.exists()
    assert {path.stem for path in (out / "results").iterdir()} == {"test-0", "test-1", "test-2"}


def test_an_edit_that_was_cut_short_is_done_again(run, capsys, monkeypatch):
    folder = run.folder / "edits" / "translate"
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save", lambda *a: (_ for _ in ()).throw(UserError("no more room")))
        assert "no more room" in edit(run, "translate", *QUICK, "--split", "test", capsys=capsys, refused=True)
    with pytest.raises(UserError):
        generate.read_set(folder)
    edit(run, "translate", *QUICK, "--split", "test", capsys=capsys)
    assert len(read(folder)[0]["images"]) == 3


def test_the_checkpoint_is_that_of_every_run(run, capsys):
    first, last = run.checkpoints.names()[0], run.checkpoints.latest()
    assert first != last
    edit(run, "compose", *QUICK, "--with", run.folder, "--checkpoint", first, capsys=capsys)
    manifest, _ = read(run.folder / "edits" / "compose")
    assert [model["checkpoint"] for model in manifest["models"]] == [first, first]


def test_the_bar_goes_to_all_images(run, capsys, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(encoded(picture(channels=1)))
    (tmp_path / "c.png").write_bytes(encoded(picture(channels=1)))
    bars, real = [], console.Bar.__call__
    monkeypatch.setattr(console.Bar, "__call__", lambda self, n: (bars.append((n, self.total)), real(self, n))[1])
    files = ("--image", tmp_path / "in", tmp_path / "c.png")
    for words in (("translate", *files), ("translate",), ("interpolate", *files)):
        edit(run, *words, "--edit.steps", 1, capsys=capsys)
    assert bars == [(3, 3), (8, 8), (3, 3)]


def test_a_manifest_is_json_for_everyone(tmp_path):
    x = torch.rand(2, 1, 8, 8)
    numbers = {"PSNR after": torch.tensor([float("inf"), 20.0])}
    edited = Edited(x, x, x[:, None], [0], numbers, {})
    edit_job.write_edit(tmp_path, Translate(), x, edited, ["a", "b"], {})
    manifest = json.loads((tmp_path / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["images"] == {"a": {"PSNR after": None}, "b": {"PSNR after": 20.0}}
    assert manifest["edit"] == config.describe(Translate())
