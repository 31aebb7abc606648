"""What the server answers, and what it does not: asked as a stranger would, not by a browser."""

import io
import json
import time
import uuid
from pathlib import Path

import pytest
from PIL import Image

import advebm
from tests.web.test_web import header

httpx = pytest.importorskip("httpx")
pytest.importorskip("gradio")

API = "/gradio_api"


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served.url, timeout=30) as client:
        yield client


def test_the_page_comes_with_a_policy_and_names_nothing_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    for sheet in config.get("stylesheets") or []:
        assert not sheet.startswith("http"), sheet


def paths(served):
    run = Path(served.runs[0])
    return ["/etc/passwd", str(run / "config.yaml"), str(run / "metrics.json"), str(Path(__file__)), "pyproject.toml"]


def test_no_file_is_served_but_the_page_s_own(client, served):
    for path in paths(served):
        for way in (f"{API}/file={path}", f"/file={path}", f"{API}/file/{path}", f"{API}/stream/{path}"):
            answer = client.get(way)
            assert answer.status_code in (403, 404, 405), (way, answer.status_code)
            assert b"root:" not in answer.content
            assert b"backbone" not in answer.content


@pytest.mark.parametrize(
    "way",
    [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        f"{API}/file=..%2f..%2f..%2fetc%2fpasswd",
        f"{API}/file=/tmp/../etc/passwd",
        f"{API}/file=file:///etc/passwd",
        f"{API}/file=http://127.0.0.1:1/x",
        f"{API}/proxy=http://127.0.0.1:1/x",
        "/assets/../../../../../../etc/passwd",
        "/static/..%2f..%2f..%2fetc%2fpasswd",
        "/theme.css/../../etc/passwd",
        "/docs",
        "/openapi.json",
        f"{API}/run/predict",
    ],
)
def test_other_ways_lead_nowhere(client, way):
    answer = client.get(way)
    assert b"root:" not in answer.content
    assert answer.status_code >= 400 or b"<gradio-app" in answer.content or b"window.gradio" in answer.content


def test_a_server_of_another_name_is_not_this_one(client):
    assert client.get("/", headers={"host": "example.org"}).status_code == 400
    for name in ("localhost:7860", "[::1]:7860"):
        assert client.get("/", headers={"host": name}).status_code == 200


def test_other_pages_cannot_send_anything(client):
    ask = lambda origin: client.post(f"{API}/upload", files={"files": ("a.png", b"x")}, headers={"origin": origin})
    assert ask("http://example.org").status_code == 403
    assert ask(str(client.base_url).rstrip("/")).status_code == 200


def test_an_upload_of_too_many_bytes_is_refused(client):
    answer = client.post(f"{API}/upload", files={"files": ("large.png", b"\0" * 11_000_000)})
    assert answer.status_code == 413
    assert client.get("/").status_code == 200


def asked(client, name, data):
    """Call what stands behind a button, by the names of its components; the events that come back."""
    config = client.get("/config").json()
    wanted = [d["id"] for d in config["dependencies"] if name(d)]
    session = uuid.uuid4().hex[:10]
    body = {"data": data, "fn_index": wanted[0], "session_hash": session, "event_data": None}
    joined = client.post(f"{API}/queue/join", json=body)
    assert joined.status_code == 200, joined.text
    events, begun = [], time.monotonic()
    with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line[5:]))
                if events[-1]["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                    break
            assert time.monotonic() - begun < 60
    return events


def target(client, element):
    """Who is called when the button ``element`` is pressed."""
    config = client.get("/config").json()
    (button,) = [c["id"] for c in config["components"] if c.get("props", {}).get("elem_id") == element]
    return lambda d: any(t == [button, "click"] or tuple(t) == (button, "click") for t in d["targets"])


def first(client):
    """The title of the first run."""
    config = client.get("/config").json()
    return next(c["props"]["value"] for c in config["components"] if c.get("props", {}).get("label") == "model")


def draw(client, **changed):
    values = {
        "run": first(client),
        "kind": "every class",
        "count": 4,
        "method": "cs",
        "start": "global",
        "seed": 0,
    }
    values |= {"alpha": 0.1, "beta": 0, "eta": 0, "steps": 5} | changed
    return asked(client, target(client, "draw"), list(values.values()))


def test_the_first_picture_is_there_in_three_seconds(client):
    begun = time.monotonic()
    events = draw(client, count=20, steps=25)
    seconds = time.monotonic() - begun
    print(f"first sample after {seconds:.2f} s")
    assert events[-1]["success"], events[-1]
    assert "20 images" in json.dumps(events[-1])
    assert seconds < 3


@pytest.mark.parametrize(
    "changed",
    [
        {"run": "../../etc"},
        {"run": None},
        {"method": "__import__"},
        {"steps": 10**9},
        {"steps": "x"},
        {"alpha": -1},
        {"alpha": None},
        {"start": "/etc/passwd"},
        {"kind": "../x"},
        {"count": 10**9},
        {"seed": [1, 2]},
    ],
)
def test_what_makes_no_sense_is_answered_and_the_server_stays(client, changed):
    events = draw(client, **changed)
    assert events[-1]["success"] is False
    assert client.get("/").status_code == 200


def upload(client):
    """Who is called when a file is uploaded by the first button for that."""
    config = client.get("/config").json()
    button = next(c["id"] for c in config["components"] if c["type"] == "uploadbutton")
    return lambda d: any(tuple(t) == (button, "upload") for t in d["targets"])


def test_files_that_nobody_uploaded_are_not_taken_in(client, served, tmp_path):
    """A picture named by its path on the server, or by an address elsewhere."""
    secret = tmp_path / "secret.png"
    Image.new("L", (8, 8), 200).save(secret)
    where = [secret, "/etc/passwd", Path(served.runs[0]) / "config.yaml", "http://127.0.0.1:1/x.png"]
    for path in map(str, where):
        events = asked(client, upload(client), [first(client), {"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert events[-1]["success"] is False, path
        assert "root:" not in json.dumps(events)


def stored(client, name, content):
    (path,) = client.post(f"{API}/upload", files={"files": (name, content)}).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_an_upload_is_taken_in(client):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 200).save(buffer, "PNG")
    events = asked(client, upload(client), [first(client), stored(client, "a.png", buffer.getvalue())])
    assert events[-1]["success"], events[-1]
    assert "taken as it is" in json.dumps(events[-1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<script>alert(1)</script>", "kind that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "kind that is read"),
        (header(10_000, 10_000), "megapixels"),
        (header(60_000, 60_000), "megapixels"),
    ],
)
def test_an_upload_that_is_no_picture_for_a_model_gets_an_answer(client, content, words):
    events = asked(client, upload(client), [first(client), stored(client, "a.png", content)])
    assert events[-1]["success"] is False
    assert words in json.dumps(events[-1])
    assert client.get("/").status_code == 200


def send_stroke(client, **changed):
    """As the browser sends a part of what was brushed."""
    config = client.get("/config").json()
    canvas = next(c["id"] for c in config["components"] if c["type"] == "imageeditor")
    data = {"type": "layer", "index": "0", "id": "stroke", "fn_name": "accept_blobs", "session_hash": "x"}
    content = changed.pop("content", picture(8, 8))
    data |= {"component_id": str(canvas)} | changed
    return client.post(f"{API}/component_server", data=data, files={"files": ("a.png", content)})


def picture(width, height):
    """Brushed over in one corner."""
    drawn, buffer = Image.new("RGBA", (width, height)), io.BytesIO()
    drawn.paste((255, 0, 0, 255), (0, 0, width // 2, height // 2))
    drawn.save(buffer, "PNG")
    return buffer.getvalue()


def edit(client, brushed, steps=2):
    """Inpaint test image 0 of the first model where it is brushed."""
    values = [first(client), None, brushed, "inpaint", "none: E(x)", None, 1, 0, 0, steps, 0]
    return asked(client, target(client, "edit"), values)[-1]


def test_strokes_are_taken_in(client):
    file = stored(client, "a.png", picture(320, 320))
    assert edit(client, {"background": None, "layers": [file], "composite": None})["success"]
    assert send_stroke(client, content=picture(320, 320)).status_code == 200
    assert edit(client, {"background": None, "layers": [], "composite": None, "id": "stroke"})["success"]
    used = edit(client, {"background": None, "layers": [], "composite": None, "id": "stroke"})
    assert used["success"] is False  # strokes are used once
    assert "nothing is brushed over" in json.dumps(used)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([header(6_000, 6_000)], "too large"),
        ([header(60_000, 60_000)], "too large"),
        ([b"<svg/>"], "cannot be read"),
        ([picture(8, 8)] * 5, "at most 4 brushed layers"),
        ([picture(320, 200)], "320 x 200"),
    ],
)
def test_strokes_that_make_no_sense_get_an_answer(client, layers, words):
    files = [stored(client, "a.png", content) for content in layers]
    answer = edit(client, {"background": files[0], "layers": files, "composite": files[0]})
    assert answer["success"] is False
    assert words in json.dumps(answer)
    assert client.get("/").status_code == 200


def test_strokes_cannot_fill_the_memory(client):
    for large in ({"index": "9999999999"}, {"content": b"\0" * 2_000_001}):  # a list of as many places; many bytes
        assert send_stroke(client, **large).status_code == 200
        assert "nothing is brushed over" in json.dumps(edit(client, {"layers": [], "id": "stroke"}))
    for k in range(40):
        assert send_stroke(client, id=f"stroke-{k}").status_code == 200
    kept = [edit(client, {"layers": [], "id": f"stroke-{k}"})["success"] for k in (0, 39)]
    assert kept == [False, True]


def test_large_requests_are_refused(client):
    body = b"x" * 20_000_001
    assert client.post(f"{API}/queue/join", content=body).status_code == 413
    assert client.post(f"{API}/queue/join", content=iter([b"x"])).status_code == 413  # that do not say how large
    assert client.get("/").status_code == 200


def test_several_at_once_are_all_served(client, served):
    from concurrent.futures import ThreadPoolExecutor

    def one(seed):
        with httpx.Client(base_url=served.url, timeout=60) as own:
            return draw(own, seed=seed, steps=20)[-1]["success"]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(6)))


def test_nothing_is_written_beside_the_package(client):
    """As Gradio does for components that are made from its own."""
    assert not list(Path(advebm.__file__).parent.rglob("*.pyi"))
