"""The page's own functions, without Gradio; its server and a browser are in tests/page."""

import asyncio
import base64
import dataclasses
import io
import json
import re
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from advebm import api, cli
from advebm.core import config
from advebm.core.errors import UserError
from advebm.sampling.generate import to_bytes
from advebm.toy import train as toy_training
from advebm.training.loop import train
from advebm.web import attacking, editing, inputs, listing, planes, sampling, server, slicing, views
from advebm.web import studio as web_studio
from advebm.web.jobs import WAITING, Job, Jobs, Stopped
from advebm.web.studio import EVERY, Studio
from tests.helpers import linked, tiny

GREY, COLOUR = (1, 8, 8), (3, 16, 16)


@pytest.fixture(scope="module")
def studio(small_run):
    return Studio("tiny", small_run)


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    recipe = tiny("digits-binary-at", train__images=1_000, train__validate_with=50, objective__curriculum__steps=2)
    return Studio("critic", train(recipe, tmp_path_factory.mktemp("runs") / "critic", device="cpu"))


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_a_job_tells_and_then_returns():
    gate = threading.Event()

    def work(job):
        job.tell("first")
        gate.wait(5)
        return "last"

    news = Job().follow(work)
    assert next(news) == "first"
    gate.set()
    assert list(news) == ["last"]


def test_newer_news_replace_older_ones_that_nobody_saw():
    begin, done, release = (threading.Event() for _ in range(3))

    def work(job):
        job.tell("begun")
        begin.wait(5)
        for k in range(100):
            job.tell(k)
        done.set()
        release.wait(5)
        return "end"

    news = Job().follow(work)
    assert next(news) == "begun"
    begin.set()
    done.wait(5)
    assert next(news) == 99
    release.set()
    assert list(news) == ["end"]


def test_a_job_that_fails_says_so_to_whoever_follows():
    def work(job):
        raise UserError("no such class")

    with pytest.raises(UserError, match="no such class"):
        list(Job().follow(work))


def test_a_stopped_job_ends_at_its_next_step_and_gives_its_turn_back():
    job, lock, steps = Job(), threading.Lock(), []

    def work(job):
        with job.turn(lock):
            for k in range(10_000):
                job.tell(k)
                steps.append(k)
                time.sleep(0.001)

    news = job.follow(work)
    next(news)
    job.stop()
    with pytest.raises(Stopped):
        for _ in news:
            pass
    assert len(steps) < 1_000
    assert lock.acquire(timeout=5)


def test_work_that_nobody_follows_any_more_is_stopped():
    ended = threading.Event()

    def work(job):
        try:
            while True:
                job.tell("more")
                time.sleep(0.001)
        finally:
            ended.set()

    news = Job().follow(work)
    next(news)
    news.close()
    assert ended.wait(5)


def test_who_waits_for_a_turn_is_told_and_can_leave():
    lock = threading.Lock()
    lock.acquire()
    job = Job()

    def work(job):
        with job.turn(lock):
            return "mine"

    news = job.follow(work)
    assert next(news) == WAITING
    job.stop()
    with pytest.raises(Stopped):
        next(news)
    lock.release()
    assert list(Job().follow(work)) == ["mine"]
    assert lock.acquire(blocking=False)


def test_a_visitor_stops_jobs_of_their_own_alone():
    jobs = Jobs()
    with jobs.begin("one") as first, jobs.begin("one") as second, jobs.begin("other") as third:
        jobs.stop("one")
        jobs.stop("nobody")
        for stopped in (first, second):
            with pytest.raises(Stopped):
                stopped.check()
        third.check()
    with pytest.raises(Stopped):
        third.check()
    assert not jobs._under_way


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, "7", True, float("nan"), float("inf"), -1, 11, [3]])
def test_numbers_are_checked(bad):
    with pytest.raises(UserError, match="the seed"):
        inputs.parse_number(bad, "the seed", 0, 10)
    with pytest.raises(UserError, match="the seed"):
        inputs.parse_integer(bad, "the seed", 0, 10)
    assert inputs.parse_number(10, "the seed", 0, 10) == 10.0


def test_whole_numbers_are_whole():
    assert inputs.parse_integer(3.0, "K", 0, 10) == 3
    with pytest.raises(UserError, match="whole number"):
        inputs.parse_integer(2.5, "K", 0, 10)


def saved(tmp_path, picture, name="picture.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return path


def test_a_picture_of_the_right_size_is_taken_to_the_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x, said = inputs.read_image(saved(tmp_path, Image.fromarray(pixels)), COLOUR)
    assert torch.equal(to_bytes(x).permute(1, 2, 0), torch.from_numpy(pixels))
    assert said == "taken as it is"
    x, said = inputs.read_image(saved(tmp_path, Image.fromarray(pixels[:8, :8, 0])), GREY)
    assert torch.equal(to_bytes(x)[0], torch.from_numpy(pixels[:8, :8, 0]))


def test_a_grey_picture_for_a_colour_model_and_the_other_way_round(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    x, said = inputs.read_image(saved(tmp_path, grey), COLOUR)
    assert torch.equal(x[0], x[1])
    assert torch.equal(x[0], x[2])
    assert "grey" in said
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    x, said = inputs.read_image(saved(tmp_path, red), GREY)
    assert x.shape == GREY
    assert x.unique().item() == pytest.approx(0.299, abs=2 / 255)
    assert "grey" in said


def test_a_picture_of_another_size_is_cut_and_scaled_and_that_is_said(tmp_path):
    wide = np.zeros((32, 96), dtype=np.uint8)
    wide[:, 32:64] = 255  # the middle square
    x, said = inputs.read_image(saved(tmp_path, Image.fromarray(wide)), GREY)
    assert x.min() == 1
    assert "96 x 32" in said
    assert "middle square" in said
    quarters = np.kron(np.array([[0, 255], [255, 0]], dtype=np.uint8), np.ones((8, 8), dtype=np.uint8))
    x, said = inputs.read_image(saved(tmp_path, Image.fromarray(quarters)), GREY)
    assert (x[0].round() == torch.tensor([[0, 1], [1, 0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)).all()
    assert "middle square" not in said


def test_what_is_transparent_becomes_white(tmp_path):
    assert inputs.read_image(saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 0))), GREY)[0].min() == 1


def header(width, height):
    """A PNG that says that it is large, and holds almost nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("edge", [5_000, 10_000, 14_000, 60_000])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, edge):
    path = tmp_path / "bomb.png"
    path.write_bytes(header(edge, edge))
    begun = time.perf_counter()
    with pytest.raises(UserError, match="megapixels"):
        inputs.read_image(path, COLOUR)
    assert time.perf_counter() - begun < 0.5


def test_a_file_of_too_many_bytes_is_refused_before_it_is_opened(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(inputs.MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match="10 MB"):
        inputs.read_image(path, COLOUR)


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg onload='x'/>", b"%!PS\n", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"can be read|is empty|of a kind that is read"):
        inputs.read_image(path, COLOUR)


def test_a_damaged_picture_is_refused(tmp_path):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    path = tmp_path / "half.jpg"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(UserError, match="can be read"):
        inputs.read_image(path, COLOUR)


def layer(edge, cells, colour=(255, 45, 45, 255), size=8):
    """A transparent layer with some cells of the image's raster painted."""
    pixels = np.zeros((edge, edge, 4), dtype=np.uint8)
    step = edge // size
    for row, column in cells:
        pixels[row * step : (row + 1) * step, column * step : (column + 1) * step] = colour
    return Image.fromarray(pixels)


def test_the_brush_marks_the_pixels_that_it_covers():
    _, where = inputs.read_strokes([layer(320, [(0, 0), (3, 5)])], GREY)
    assert where.nonzero().tolist() == [[0, 0, 0], [0, 3, 5]]
    _, where = inputs.read_strokes([layer(320, [(1, 1)]), layer(64, [(2, 2)])], GREY)
    assert where.nonzero().tolist() == [[0, 1, 1], [0, 2, 2]]
    _, where = inputs.read_strokes([], GREY)
    assert not where.any()
    faint = np.zeros((320, 320, 4), dtype=np.uint8)
    faint[:40, :10] = 255  # a quarter of a pixel
    assert not inputs.read_strokes([Image.fromarray(faint)], GREY)[1].any()


def test_the_brush_paints_its_colour_whatever_covers_it_partly():
    paint, where = inputs.read_strokes([layer(320, [(0, 0)], (255, 0, 0, 255), 16)], COLOUR)
    assert torch.allclose(paint[:, 0, 0], torch.tensor([1.0, 0, 0]))
    half = np.zeros((320, 320, 4), dtype=np.uint8)
    half[:20, :10] = (255, 0, 0, 255)
    paint, where = inputs.read_strokes([Image.fromarray(half)], COLOUR)
    assert where[0, 0, 0]
    assert torch.allclose(paint[:, 0, 0], torch.tensor([1.0, 0, 0]), atol=0.01)
    paint, _ = inputs.read_strokes([layer(320, [(0, 0)], (255, 0, 0, 255))], GREY)
    assert paint[0, 0, 0].item() == pytest.approx(0.299, abs=0.01)
    over = [layer(320, [(0, 0)], (255, 255, 255, 255)), layer(320, [(0, 0)], (0, 0, 0, 255))]
    assert inputs.read_strokes(over, GREY)[0][0, 0, 0] == 0  # later layers lie on top


def test_a_mask_of_other_proportions_is_refused():
    with pytest.raises(UserError, match="320 x 200"):
        inputs.read_strokes([Image.new("RGBA", (320, 200))], GREY)


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_layers_are_read_as_they_were_brushed(tmp_path):
    drawn = [layer(320, [(k, k)]) for k in range(inputs.MAX_LAYERS)]
    (tmp_path / "last.png").write_bytes(encoded(drawn[-1]))
    found = inputs.read_layers([*map(encoded, drawn[:-1]), tmp_path / "last.png"])
    assert [picture.tobytes() for picture in found] == [picture.tobytes() for picture in drawn]
    assert inputs.read_strokes(found, GREY)[1].sum() == inputs.MAX_LAYERS


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([b""] * (inputs.MAX_LAYERS + 1), "at most 4 brushed layers"),
        ([header(2_001, 2_000)], "too large"),
        ([header(60_000, 60_000)], "too large"),
        ([header(2_000, 2_000)], "cannot be read"),
        ([b"<svg/>"], "cannot be read"),
    ],
)
def test_layers_that_are_too_much_are_refused_before_they_are_decoded(parts, words):
    with pytest.raises(UserError, match=words):
        inputs.read_layers(parts)


# Pictures -------------------------------------------------------------------------------------------------------------


def test_small_images_are_enlarged_pixel_by_pixel():
    x = torch.rand(1, 8, 8)
    shown = np.asarray(views.enlarge(x, 320))
    assert shown.shape == (320, 320)
    assert np.array_equal(shown[::40, ::40], to_bytes(x)[0].numpy())
    assert np.array_equal(shown, np.kron(shown[::40, ::40], np.ones((40, 40), dtype=np.uint8)))
    assert views.enlarge(torch.rand(3, 32, 32)).mode == "RGB"


def test_a_difference_is_grey_where_nothing_changed():
    before = torch.rand(1, 8, 8) * 0.5
    after = before.clone()
    after[0, 2, 3] += 0.1
    picture, factor = views.difference(before, after)
    shown = np.asarray(picture)[::40, ::40]
    assert factor == pytest.approx(5)
    assert shown[2, 3] == 255
    assert set(shown.flatten()) == {128, 255}


def tiles_of(text):
    """The pictures and captions that HTML of tiles holds."""
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)" alt="[^"]*">(?:<figcaption>([^<]*)</figcaption>)?', text)
    assert len(found) == text.count("<img") == text.count("<figure>")
    return [(kind, Image.open(io.BytesIO(base64.b64decode(data))), caption) for kind, data, caption in found]


def test_tiles_show_images_to_the_bit_above_their_names():
    x = torch.rand(3, 3, 16, 16)
    found = tiles_of(views.tiles(x, ["cat", '<script>"', ""]))
    assert [caption for _, _, caption in found] == ["cat", "&lt;script&gt;&quot;", ""]
    assert {kind for kind, _, _ in found} == {"png"}
    assert torch.equal(torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for _, p, _ in found]), to_bytes(x))
    assert tiles_of(views.tiles(torch.rand(1, 1, 8, 8), ["7"]))[0][1].mode == "L"


def test_tiles_of_large_images_are_small_files():
    x = torch.rand(1, 3, 4, 4).repeat_interleave(32, 2).repeat_interleave(32, 3)
    (kind, picture, _), *_ = tiles_of(views.tiles(x, [""]))
    assert kind == "jpeg"
    assert np.abs(np.array(picture) / 255.0 - x[0].permute(1, 2, 0).numpy()).mean() < 0.05


def test_tables_are_text():
    assert "<td>&lt;b&gt;</td><td>2</td>" in views.table(["a", "b"], [["<b>", "2"]])


@pytest.mark.parametrize(
    ("value", "text"), [(-4.5678, "-4.57"), (9.5e-8, "0"), (-1e-3, "-0.001"), (1234.5, "1.23e+03")]
)
def test_numbers_are_short(value, text):
    assert views.short(value) == text


# Tabs -----------------------------------------------------------------------------------------------------------------


def drawn(studio, job=None, kind=EVERY, count=10, seed=3, **changed):
    settings = {"method": "cs", "start": "global", "alpha": 0.1, "beta": 0, "eta": 0, "steps": 12} | changed
    return sampling.sample(studio, sampling.build_sampler(studio, **settings), kind, count, seed, job or Job())


def test_a_sample_is_what_the_sampler_draws(studio):
    shown = drawn(studio)
    sampler = sampling.build_sampler(studio, "cs", "global", 0.1, 0, 0, 12)
    y = torch.arange(10)
    seeds, draws = studio.seeds(sampler, y, 3)
    x = sampler(studio.model, y, seeds, generator=draws)
    assert shown.images == views.tiles(x, [str(k) for k in range(10)])
    energy = [api.energy(studio.model, z, y).mean().item() for z in (seeds, x)]
    assert f"energy {energy[0]:.3g} → {energy[1]:.3g} nats" in shown.note
    hits = int((studio.model(x).argmax(1) == y).sum())
    assert f"{hits} of 10" in shown.note
    assert shown.film is not None
    assert shown.figure is not None


def test_a_sample_is_seen_while_it_comes_into_being(studio, monkeypatch):
    monkeypatch.setattr(sampling, "PAUSE", 0)
    seen = []
    job = Job()
    job.tell = seen.append
    drawn(studio, job)
    assert len(seen) == 12
    assert [s.note.split(",")[0] for s in seen[:2]] == ["step 0 of 12", "step 1 of 12"]
    assert seen[0].images != seen[-1].images


def test_the_first_pictures_are_of_every_class_and_drawn_once(studio, critic):
    seen, job = [], Job()
    job.tell = seen.append
    first = sampling.sample_first(studio, job)
    assert [caption for _, _, caption in tiles_of(first.images)] == [*map(str, range(10))] * 2
    assert first.images == sampling.sample(studio, studio.sampler(), EVERY, 20, 0, Job()).images
    assert seen[0] == "preparing"
    seen.clear()
    assert sampling.sample_first(studio, job) is first
    assert not seen
    assert {caption for _, _, caption in tiles_of(sampling.sample_first(critic, Job()).images)} == {""}


def test_pictures_that_were_stopped_are_drawn_the_next_time(small_run):
    studio, job = Studio("tiny", small_run), Job()
    job.stop()
    with pytest.raises(Stopped):
        sampling.sample_first(studio, job)
    assert sampling.sample_first(studio, Job()).images


def test_a_server_starts_without_pictures_that_take_too_long(small_run, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0)
    monkeypatch.setattr(sampling, "sample_first", lambda studio, job: [time.sleep(0.05), job.check()])
    assert list(server.open_studios([small_run])) == ["digits-at"]


def test_examples_are_images_that_the_model_gets_right(studio, critic):
    test = studio.data.test
    with torch.no_grad():
        p = studio.model(test.float()).softmax(1)
    right = [k for k in range(32) if p[k].argmax() == test.y[k]]
    fairly_sure = min(right, key=lambda k: abs(p[k].max() - 0.6))
    assert 1 < len(right) < 32
    right.remove(fairly_sure)
    assert [studio.example(k) for k in range(-1, len(right))] == [fairly_sure, *right]
    assert studio.example(len(right) + 1) == right[0]
    second = p[right[0]].argsort(descending=True)[1]
    assert studio.second_class(right[0]) == str(int(second))
    assert [critic.example(k) for k in (0, 1, -1)] == [0, 1, 31]


def test_without_training_images_chains_start_from_noise(small_run, monkeypatch):
    nothing = small_run.data.train.take(slice(0))
    monkeypatch.setattr(small_run, "data", small_run.data._replace(train=nothing, val=nothing))
    studio = Studio("tiny", small_run)
    assert studio.starts(studio.sampler()) == ["noise"]
    assert studio.sampler().start == "noise"
    assert sampling.sample_first(studio, Job()).images


def test_no_more_images_at_once_than_their_size_allows(studio, monkeypatch):
    whole, seen = drawn(studio), []
    for module in (sampling, web_studio):
        monkeypatch.setattr(module, "batch_size_for", lambda shape, model: 3 if shape == GREY else None)
    hook = studio.model.register_forward_hook(lambda model, given, out: seen.append(len(out)))
    parts = drawn(studio)
    hook.remove()
    assert max(seen) == 3
    assert parts.note.split(" s, ")[1] == whole.note.split(" s, ")[1]


def test_seeds_and_classes_decide_a_sample(studio):
    one, same, other = drawn(studio), drawn(studio), drawn(studio, seed=4)
    assert one.images == same.images
    assert one.images != other.images
    assert studio.labels("7", 3).tolist() == [7, 7, 7]
    assert studio.labels(EVERY, 12).tolist() == [*range(10), 0, 1]
    with pytest.raises(UserError, match="no class '11'"):
        drawn(studio, kind="11")


def test_dials_reach_the_sampler(studio):
    sampler = sampling.build_sampler(studio, "ta", "class", 0.3, 1.5, 0.02, 7)
    found = (sampler.step_size, sampler.radius, sampler.noise, sampler.steps, sampler.start)
    assert found == (0.3, 1.5, 0.02, 7, "class")
    assert sampling.build_sampler(studio, "ta", "class", 0.3, 0, 0, 7).radius is None
    exact = sampling.build_sampler(studio, "jeat-17", "class", 1e-4, 0, 0, 7)
    assert exact.temperature == 1.0
    assert sampling.build_sampler(studio, "jeat-17", "class", 1e-4, 0, 0.01, 7).temperature is None


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 1e9},
        {"steps": 2.5},
        {"steps": None},
        {"alpha": 0},
        {"alpha": "1"},
        {"beta": -1},
        {"eta": float("nan")},
        {"method": "__class__"},
        {"start": "../../etc"},
        {"count": 10_000},
        {"seed": -1},
    ],
)
def test_settings_of_a_sample_are_checked(studio, changed):
    with pytest.raises(UserError):
        drawn(studio, **changed)


def test_every_method_that_is_offered_draws(studio, critic, monkeypatch):
    monkeypatch.setattr(views, "descents", lambda energies, label: None)
    for one in (studio, critic):
        for method in one.methods():
            s = one.sampler(method)
            sampler = sampling.build_sampler(one, method, s.start, s.step_size, s.radius or 0, s.noise, 1)
            for start in one.starts(s):
                assert sampling.build_sampler(one, method, start, s.step_size, 0, 0, 1).start == start
            assert sampling.sample(one, sampler, EVERY, 2, 0, Job()).note
    assert "cs" not in critic.methods()
    assert "ascent" in critic.methods()


def test_a_search_that_is_stopped_leaves_no_trace(studio):
    x = torch.rand(4, 1, 8, 8)
    before = studio.model(x)
    job = Job()
    job.stop()
    for work in (
        lambda: drawn(studio, job),
        lambda: slicing.slice_energy(studio, studio.sampler(), "3", "path", 0, job),
        lambda: attacking.attack(studio, x[0], -1, "APGD", "l2", 0.5, 10, "3", 0, job),
        lambda: editing.explain(studio, x[0], "3", 0.8, 10, job),
    ):
        with pytest.raises(Stopped):
            work()
    assert not studio.model._forward_pre_hooks
    assert torch.equal(studio.model(x), before)
    drawn(studio)


def test_searches_on_a_model_take_turns(studio):
    inside, most = [], []

    def observe(*ignored):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()

    hook = studio.model.register_forward_hook(observe)
    threads = [threading.Thread(target=lambda: drawn(studio, steps=5)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert len(most) >= 15
    assert max(most) == 1


@pytest.mark.slow  # timed, on an idle machine
def test_the_first_sample_is_there_in_three_seconds(small_run):
    (studio,) = server.open_studios([small_run]).values()
    begun = time.perf_counter()
    sampling.sample(studio, studio.sampler(), EVERY, 20, 0, Job())
    assert time.perf_counter() - begun < 3


def test_an_attack_shows_what_the_model_says(studio):
    x, label = studio.image(0)
    for name in attacking.attack_names(studio):
        norm = "linf" if name == "PGD" else "l2"
        target = str((label + 1) % 10)
        shown = attacking.attack(studio, x, label, name, norm, 0.2, 10, target, 0, Job())
        assert shown.table[0][0] == "E(x), nats"
        assert float(shown.table[0][1]) == pytest.approx(api.energy(studio.model, x[None]).item(), abs=0.006)
        y = torch.tensor([label])
        assert float(shown.table[1][1]) == pytest.approx(api.energy(studio.model, x[None], y).item(), abs=0.006)
        length = float(shown.note.split("length ")[1].split(" ")[0].removesuffix("/255"))
        assert length <= (0.2 * 255 if norm == "linf" else 0.2) * 1.01
        rises = float(shown.table[1][2]) > float(shown.table[1][1])
        assert rises == (name != "nothing")
    wrong = attacking.attack(studio, x, (label + 1) % 10, "PGD", "l2", 0.0, 1, "0", 0, Job())
    assert f"Taken for {label} before any attack, and its class is {(label + 1) % 10}." in wrong.note
    assert "changed nothing" in wrong.note
    with pytest.raises(UserError, match="already"):
        attacking.attack(studio, x, label, attacking.TARGETED_PGD, "l2", 0.2, 10, str(label), 0, Job())


def test_a_critic_is_attacked_by_its_energy(critic):
    x, label = critic.image(0)
    (name,) = attacking.attack_names(critic)
    shown = attacking.attack(critic, x, label, name, "l2", 1.0, 10, "", 0, Job())
    assert float(shown.table[0][2]) > float(shown.table[0][1])
    assert shown.figure is None
    assert "rises" in shown.note
    with pytest.raises(UserError, match="no attack"):
        attacking.attack(critic, x, label, "PGD", "l2", 1.0, 10, "", 0, Job())


@pytest.mark.parametrize(
    ("place", "value"), [(0, "rm -rf"), (1, "l1"), (2, -1), (2, 300), (2, None), (3, 0), (3, 10**6), (5, "x")]
)
def test_settings_of_an_attack_are_checked(studio, place, value):
    settings = ["PGD", "linf", 0.1, 5, "1", 0]
    settings[place] = value
    with pytest.raises(UserError):
        attacking.attack(studio, studio.image(0)[0], 1, *settings, Job())


def test_a_plane_through_a_path_holds_it(generator):
    start, ahead, bend = torch.rand(3, 1, 8, 8, generator=generator)
    t = torch.linspace(0, 1, 9)[:, None, None, None]
    path = start + t * ahead + (t * (1 - t)) * bend
    first, second = slicing.leading_directions(path)
    assert first.norm().item() == pytest.approx(1, abs=1e-5)
    assert second.norm().item() == pytest.approx(1, abs=1e-5)
    assert (first * second).sum().item() == pytest.approx(0, abs=1e-5)
    plane = slicing.project_path(path, start[None][0], first, second)
    assert plane.share == pytest.approx(1, abs=1e-5)
    assert torch.allclose(
        torch.cdist(plane.at, plane.at).float(), torch.cdist(path.flatten(1), path.flatten(1)), atol=1e-4
    )
    assert plane.at[-1, 1].item() == pytest.approx(0, abs=1e-4)  # the end lies ahead of the start
    off = path + torch.randn(path.shape, generator=generator)
    assert slicing.project_path(off, start, first, second).share < 0.9


def test_a_path_that_stands_still_spans_no_plane():
    with pytest.raises(UserError, match="does not move"):
        slicing.leading_directions(torch.ones(5, 1, 8, 8))


@pytest.mark.parametrize("through", ["path", "gradient", "random"])
def test_a_slice_is_drawn(studio, critic, through, monkeypatch):
    monkeypatch.setattr(slicing, "GRID_POINTS", 5)
    seen, job = [], Job()
    job.tell = seen.append
    shown = slicing.slice_energy(studio, studio.sampler(), "3", through, 0, job)
    assert len(seen) == 1
    assert shown.figure.size[0] > 400
    assert "E(x, 3)" in shown.note
    assert "E(x)" in slicing.slice_energy(critic, critic.sampler(), EVERY, through, 0, Job()).note


def test_a_slice_is_of_the_energy_around_the_image(studio, monkeypatch):
    caught, projected = {}, slicing.project_path

    def keep(*given):
        caught["path"], caught["plane"] = given[0], projected(*given)
        return caught["plane"]

    monkeypatch.setattr(slicing, "project_path", keep)
    monkeypatch.setattr(
        slicing, "draw_slice", lambda values, reach, at, symbol: caught.update(values=values, reach=reach)
    )
    slicing.slice_energy(studio, studio.sampler(), "3", "gradient", 0, Job())
    plane, values, reach = caught["plane"], caught["values"], caught["reach"]
    assert torch.equal(plane.centre, caught["path"][-1])
    offset = torch.linspace(-reach, reach, slicing.GRID_POINTS)
    x = torch.stack([plane.centre, plane.centre + offset[3] * plane.first + offset[20] * plane.second])
    with torch.no_grad():
        energy = -studio.model(x)[:, 3]
    assert values[3, 20].item() == pytest.approx((energy[1] - energy[0]).item(), abs=1e-4)


def test_the_toy_is_seen_while_it_trains_and_can_be_stopped():
    seen, job = [], Job()
    job.tell = seen.append
    shown = planes.train_density("gaussian", "binary-at", "uniform", 6, 0, job)
    assert len(seen) > 3
    assert seen[0].note == "update 0 of 6"
    values = {name: value for name, value, _ in shown.table}
    assert (
        values["objective"]
        == f"{toy_training.summarize(toy_training.train_toy('gaussian', updates=6))['objective']:.3f}"
    )
    assert all(about for _, _, about in shown.table)
    stopped = Job()
    stopped.stop()
    with pytest.raises(Stopped):
        planes.train_density("gaussian", "mle", "uniform", 2_000, 0, stopped)
    for bad in (
        ("x", "mle", "uniform", 6),
        ("moons", "x", "uniform", 6),
        ("moons", "mle", "x", 6),
        ("moons", "mle", "uniform", 1e6),
    ):
        with pytest.raises(UserError):
            planes.train_density(*bad, 0, Job())


def brush(*cells):
    return inputs.read_strokes([layer(320, cells, (255, 255, 255, 255))], GREY)


@pytest.mark.parametrize("name", editing.TOOLS)
def test_every_application_gives_a_picture(studio, name):
    tool = editing.TOOLS[name]
    x, _ = studio.image(0)
    paint, where = brush((3, 3), (3, 4)) if tool.brush else brush()
    other = {"image": 1, "class": "4"}.get(tool.other)
    asked = editing.EditForm(name, "8", 3, [d.value for d in tool.dials], other, 0)
    shown = editing.apply_tool(studio, x, paint, where, asked, Job())
    assert shown.result.size[0] >= 300
    assert shown.film is not None  # or that of another edit stays
    assert "nats" in shown.note
    for d in tool.dials:
        assert d.low <= d.value <= d.high


def test_pixels_that_are_not_brushed_stay(studio):
    x, _ = studio.image(0)
    paint, where = brush((3, 3), (4, 4))
    for name in ("inpaint", "paint"):
        asked = editing.EditForm(name, "8", 10, [d.value for d in editing.TOOLS[name].dials], None, 0)
        shown = editing.apply_tool(studio, x, paint, where, asked, Job())
        pixels = np.asarray(shown.result)[::40, ::40]
        same = pixels == to_bytes(x)[0].numpy()
        assert same[~where[0].numpy()].all()
        assert not same[where[0].numpy()].all()


def test_an_edit_that_changes_nothing_says_so(studio):
    x, _ = studio.image(0)
    asked = editing.EditForm("translate", "8", 10, [0], None, 0)
    assert editing.apply_tool(studio, x, *brush(), asked, Job()).note.startswith("**Nothing changed.**")
    asked = asked._replace(dials=[1])
    assert "Nothing" not in editing.apply_tool(studio, x, *brush(), asked, Job()).note


def test_the_brush_is_for_tools_that_use_it(studio):
    x, _ = studio.image(0)
    asked = editing.EditForm("translate", "8", 3, [1], None, 0)
    plain, brushed = (editing.apply_tool(studio, x, *brush(*cells), asked, Job()) for cells in ((), [(0, 0)]))
    assert np.array_equal(np.asarray(plain.result), np.asarray(brushed.result))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tool": "os.system"}, "no application"),
        ({"tool": "inpaint"}, "nothing is brushed"),
        ({"kind": "9999"}, "no class"),
        ({"steps": 10**9}, "number of steps"),
        ({"dials": [99]}, "share of the steps"),
        ({"tool": "upsample", "dials": [3]}, "do not fill"),
        ({"tool": "interpolate", "other": 10**9}, "test image"),
        ({"tool": "interpolate", "other": "../x"}, "test image"),
        ({"tool": "compose", "other": "x"}, "no class"),
        ({"tool": "compose", "kind": editing.ANY, "other": "1"}, "two classes"),
    ],
)
def test_what_is_asked_of_an_application_is_checked(studio, changed, words):
    asked = editing.EditForm("translate", "8", 3, [1], None, 0)._replace(**changed)
    paint, where = brush()
    with pytest.raises(UserError, match=words):
        editing.apply_tool(studio, studio.image(0)[0], paint, where, asked, Job())


def test_an_explanation_goes_from_the_image_to_another_class(studio):
    x, label = studio.image(0)
    target = str((label + 1) % 10)
    found = editing.explain(studio, x, target, 0.6, 20, Job())
    first, added, said = editing.moment(found, 0)
    assert np.array_equal(np.asarray(first), np.asarray(views.enlarge(x)))
    assert set(np.asarray(added).flatten()) == {128}
    assert "distance 0.00" in said
    end = found.film[-1][None]
    if found.reached:
        assert studio.model(end).softmax(1)[0, int(target)] >= 0.6
    assert f"{100 * studio.model(end).softmax(1)[0, int(target)].item():.0f} %" in found.note
    assert np.array_equal(np.asarray(editing.moment(found, 100)[0]), np.asarray(views.enlarge(found.film[-1])))
    assert editing.way(found).size[0] > 400
    for bad in (-1, 101, None):
        with pytest.raises(UserError):
            editing.moment(found, bad)


def test_a_critic_explains_nothing(critic):
    with pytest.raises(UserError, match="classifier"):
        editing.explain(critic, critic.image(0)[0], "1", 0.8, 5, Job())
    assert "compose" not in editing.offered_tools(critic)


def test_runs_are_listed_and_reported_without_being_touched(studio, tmp_path):
    (tmp_path / "run").mkdir()
    run = linked(studio.run, tmp_path / "run")
    record = {"name": "accuracy", "value": 0.875, "error": 0.01, "count": 100, "settings": {}, "series": {}}
    run.append([record])
    one = Studio("one", run)
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    head, rows = listing.full_table([one, Studio("two", run)])
    assert head == ["measured", "samples", "one", "two"]
    assert rows == [["accuracy", "", "87.5 ± 1.0 %", "87.5 ± 1.0 %"]]
    other = Studio("other", studio.run)
    (tmp_path / "other").mkdir()
    other.run = linked(studio.run, tmp_path / "other")
    other.run.append([record | {"name": "only here"}, record])
    assert [row[0] for row in listing.full_table([other, one])[1]] == [
        "accuracy",
        "only here",
    ]  # what both have comes first
    (tmp_path / "page").mkdir()
    path, another = (listing.report(one, tmp_path / "page") for _ in range(2))
    assert path.parent.parent == another.parent.parent == tmp_path / "page"
    assert path.parent != another.parent  # of one visitor each
    assert "<h1>" in path.read_text()
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")} == before


def measured(name, value, **settings):
    return {"name": name, "value": value, "error": 0.01, "count": 100, "settings": settings, "series": {}}


def test_headlines_are_of_the_set_with_the_least_distance(studio, tmp_path, monkeypatch):
    threat = f"accuracy under {studio.run.recipe.threat.name}"
    space = "(features of judge)"
    records = [
        measured("ECE", 0.1),
        measured(f"intended class {space}", 0.5, samples="cs-class"),
        measured(f"intended class {space}", 0.75, samples="ta-class"),
        measured(f"FD {space}", 3.0, samples="cs-class"),
        measured(f"FD {space}", 2.0, samples="ta-class"),
        measured("FD (own features)", 0.1, samples="own-class"),
        measured("accuracy", 0.9),
        measured(threat, 0.6, attack=config.describe(studio.run.recipe.threat)),
        measured("accuracy under PGD-99 l2 9", 0.1),
        measured("accuracy under AutoAttack quick l2 0.5", 0.4),
        measured("accuracy under AutoAttack quick l2 0.5, after APGD-CE", 0.45),
    ]
    monkeypatch.setattr(listing, "read_records", lambda run: records if run is studio.run else [])
    (tmp_path / "other").mkdir()
    other = Studio("other", linked(studio.run, tmp_path / "other"))
    head, rows = listing.headline_table([studio, other])
    assert head == ["measured", "tiny", "other"]
    assert rows == [
        ["clean accuracy", "90.0 ± 1.0 %", ""],
        ["accuracy under the threat", f"60.0 ± 1.0 % ({studio.run.recipe.threat.name})", ""],
        ["accuracy under AutoAttack", "40.0 ± 1.0 % (quick l2 0.5)", ""],
        [f"FD {space}, best set", "2.000 ± 0.010 (ta-class)", ""],
        [f"intended class {space}, same set", "75.0 ± 1.0 % (ta-class)", ""],
    ]
    assert listing.headline_table([other])[1] == []


def test_a_model_brings_what_it_was_published_with(studio, tmp_path):
    (tmp_path / "run").mkdir()
    run = linked(studio.run, tmp_path / "run")
    assert not listing.read_records(run)
    assert not listing.is_published(run)
    good = {"name": "accuracy", "value": 0.86, "error": 0.003, "count": 10_000, "samples": None}
    bad = ["text", {"name": 3}, good | {"value": "<b>"}, good | {"count": None}]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"measured": [*bad, good, good | {"name": "FD", "samples": "ta"}]}))
    run.recipe = dataclasses.replace(run.recipe, init=str(model))
    assert listing.full_table([Studio("one", run)])[1] == [
        ["accuracy", "", "86.0 ± 0.3 %"],
        ["FD", "ta", "0.860 ± 0.003"],
    ]
    assert listing.is_published(run)
    run.append([measured("accuracy", 0.9)])
    assert [record["value"] for record in listing.read_records(run)] == [0.9]  # measured here
    assert not listing.is_published(run)
    run.recipe = dataclasses.replace(run.recipe, init="nowhere/model")
    assert not list(listing._published_records(run.recipe.init))


def test_test_images_are_chosen_by_number(studio):
    count = len(studio.data.test)
    x, label = studio.image(count - 1)
    assert torch.equal(x, studio.data.test.float()[-1])
    assert label == int(studio.data.test.y[-1])
    for bad in (-1, count, 0.5, None, "1"):
        with pytest.raises(UserError, match="test image"):
            studio.image(bad)


# Server ---------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_said_so():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*--port"):
            server.check_free("127.0.0.1", port)
    server.check_free("127.0.0.1", port)
    with pytest.raises(UserError, match="1 to 65535"):
        server.check_free("127.0.0.1", 70_000)
    with pytest.raises(UserError, match="cannot be had"):
        server.check_free("192.0.2.1", port)  # of nobody


def test_every_answer_is_guarded():
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-content-type-options", b"own")]})
        await send({"type": "http.response.body", "body": b""})

    async def keep(event):
        sent.append(event)

    asyncio.run(server.Guard(inner)({"type": "http"}, None, keep))
    headers = dict(sent[0]["headers"])
    assert b"'self'" in headers[b"content-security-policy"]
    assert b"http" not in headers[b"content-security-policy"]
    assert headers[b"x-content-type-options"] == b"own"
    assert len(sent) == 2


@pytest.mark.parametrize(
    ("method", "origin", "status"),
    [
        ("POST", None, 200),
        ("POST", b"http://localhost:7860", 200),
        ("POST", b"https://LOCALHOST:7860", 200),
        ("POST", b"http://localhost:7861", 403),
        ("POST", b"http://example.org", 403),
        ("POST", b"null", 403),
        ("OPTIONS", b"http://example.org", 403),
        ("GET", b"http://example.org", 200),
    ],
)
def test_other_pages_cannot_send_anything(method, origin, status):
    sent, reached = [], []

    async def inner(scope, receive, send):
        reached.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def keep(event):
        sent.append(event)

    headers = [(b"host", b"localhost:7860"), *([] if origin is None else [(b"Origin", origin)])]
    asyncio.run(server.Guard(inner)({"type": "http", "method": method, "headers": headers}, None, keep))
    assert sent[0]["status"] == status
    assert len(reached) == (status == 200)
    assert b"content-security-policy" in dict(sent[0]["headers"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"content-length", b"20000000")], 200),
        ([(b"content-length", b"20000001")], 413),
        ([(b"Content-Length", b"-1")], 413),
        ([(b"Transfer-Encoding", b"chunked")], 413),
    ],
)
def test_large_requests_are_refused_unread(headers, status):
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def keep(event):
        sent.append(event)

    asyncio.run(server.Guard(inner)({"type": "http", "method": "POST", "headers": headers}, None, keep))
    assert sent[0]["status"] == status


def test_addresses_are_what_one_types():
    assert server.address("127.0.0.1", 7860) == "http://127.0.0.1:7860"
    assert server.address("::1", 7860) == "http://[::1]:7860"


def test_the_page_s_folder_goes_with_the_server():
    with server.own_folder() as folder:
        (folder / "upload").mkdir()
        assert folder.is_dir()
    assert not folder.exists()


def test_runs_that_cannot_be_opened(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(server, "serve", lambda folders, **rest: server.open_studios(folders))
    assert cli.main(["app", str(tmp_path / "nothing")]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert cli.main(["app", str(small_run.folder), str(small_run.folder)]) == 2
    assert "named twice" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(small_run, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["app", str(small_run.folder), "--port", "0"]) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    capsys.readouterr()
    assert cli.main(["app", str(small_run.folder), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'advebm[app]'" in error
