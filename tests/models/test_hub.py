import base64
import dataclasses
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import advebm
from advebm import cli, recipes
from advebm.core.config import describe
from advebm.core.errors import UserError
from advebm.metrics.base import Record
from advebm.models import hub, network
from advebm.models.network import Architecture
from advebm.models.small import SmallConv
from advebm.reporting.card import _hide_local_paths, hub_metadata
from advebm.reporting.card import write_model as publish_run
from advebm.reporting.terminal import print_records
from advebm.runs.recipe import dump, resolve
from advebm.runs.run import Run
from advebm.training.loop import train

# of the hub's client, which hands httpx a file as ``data``
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "a" * 34


@dataclasses.dataclass(frozen=True)
class Mine:
    """A backbone of one's own."""

    def build(self, channels, size):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size**2, 4)), 4


class FakeHub(ThreadingHTTPServer):
    """As much of the Hub as the client needs to make a model, upload a folder with large files and download it.

    ``repos`` maps a name to its commits, oldest first, each a dict path -> bytes; ``public`` names those that anybody
    may read; ``seen`` lists requests, ``broken`` maps the beginning of some to the status that they get.  ``alice`` is
    who owns the token.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.repos, self.public, self.large, self.seen, self.broken = {}, set(), {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that has gone is not worth a traceback."""


def sha(content):
    return hashlib.sha256(content).hexdigest()


def commit_id(number):
    return f"{number:040x}"


class Request(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, -1

    def log_message(self, *args):
        pass

    def answer(self, status, content=b"", code=None, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub.seen.append(f"{self.command} {path}")
        if status := next((v for k, v in hub.broken.items() if hub.seen[-1].startswith(k)), None):
            return self.answer(status, {"error": "out of order"})
        login = self.headers.get("Authorization")
        known = login == f"Bearer {TOKEN}"
        if login is not None and not known:
            return self.answer(401, {"error": "Invalid credentials"})
        parts = path.strip("/").split("/")
        match self.command, parts:
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if not known:
                    return self.answer(401, {"error": "log in"})
                if name in hub.repos:
                    return self.answer(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                if asked["organization"] != "alice":
                    return self.answer(403, {"error": "not yours"})
                hub.repos[name] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
                if not (asked.get("private") or asked.get("visibility") == "private"):
                    hub.public.add(name)
                return self.answer(200, {"url": f"{hub.url}/{name}"})
            case "POST", ["api", "validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            case "PUT", ["large", oid]:
                assert sha(body) == oid
                hub.large[oid] = body
                return self.answer(200)
            case _, ["api", "models", user, repo, *rest]:
                name = f"{user}/{repo}"
            case _, [user, repo, *rest]:
                name = f"{user}/{repo.removesuffix('.git')}"
        if name not in hub.repos or not (known or name in hub.public):
            return self.answer(404 if known else 401, {"error": "Repository not found"}, code="RepoNotFound")
        commits = hub.repos[name]
        match self.command, rest:
            case "POST", ["preupload", "main"]:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            case "POST", ["info", "lfs", "objects", "batch"]:
                objects = [
                    {**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            case "POST", ["commit", "main"]:
                if user != "alice":
                    return self.answer(403, {"error": "read only"})
                tree = dict(commits[-1])
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        tree[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        tree[value["path"]] = hub.large[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del tree[value["path"]]
                commits.append(tree)
                oid = commit_id(len(commits))
                url = f"{hub.url}/{name}/commit/{oid}"
                return self.answer(200, {"success": True, "commitUrl": url, "commitOid": oid})
        revision = rest[1] if len(rest) > 1 else "main"
        number = {commit_id(i + 1): i for i in range(len(commits))}.get(revision, len(commits) - 1)
        tree, oid = commits[number], commit_id(number + 1)
        if revision not in ("main", oid):
            return self.answer(404, {"error": "no revision"}, code="RevisionNotFound")
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                files = [{"rfilename": path} for path in tree]
                about = {"id": name, "sha": oid, "private": name not in hub.public, "siblings": files}
                return self.answer(200, about)
            case "GET", ["tree", _]:
                return self.answer(
                    200, [{"type": "file", "path": p, "size": len(c), "oid": sha(c)[:40]} for p, c in tree.items()]
                )
            case "HEAD" | "GET", ["resolve", _, *inside] if "/".join(inside) in tree:
                content = tree["/".join(inside)]
                return self.answer(200, content, ETag=f'"{sha(content)[:40]}"', X_Repo_Commit=oid)
        return self.answer(404, {"error": f"no {path}"}, code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A fake Hub that the client talks to, as ``alice``, with its cache in ``tmp_path``."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    fake = FakeHub()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    disable_progress_bars()
    yield fake
    enable_progress_bars()
    fake.shutdown()
    fake.server_close()
    thread.join()


def publish(folder, seed=1, *, ema=None):
    """A model's folder with more in it than a model."""
    arch = Architecture(SmallConv(width=4), 10, 1, 8, (0.3,), (0.4,))
    model = arch.build(seed)
    network.save(folder, model, arch, ema=None if ema is None else arch.build(ema).state_dict())
    (folder / "state").mkdir(exist_ok=True)
    for extra in ("state/optimizer.pt", "state/model.safetensors", "notes.txt"):
        (folder / extra).write_bytes(b"secret")
    return model


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_pushed_model_can_be_pulled(server, tmp_path):
    model = publish(tmp_path / "model", ema=2)
    assert hub.push(tmp_path / "model", "alice/net") == f"{server.url}/alice/net"
    assert len(server.repos["alice/net"]) == 2, "one commit"
    assert server.repos["alice/net"][-1].keys() == {".gitattributes", *hub.FILES} - {hub.EXCERPT}
    assert sum(line.startswith("PUT /large") for line in server.seen) == 2
    assert "alice/net" in server.public

    folder = hub.pull("alice/net")
    assert folder.is_relative_to(tmp_path / "cache")
    assert {p.name for p in folder.iterdir()} == set(hub.FILES) - {hub.EXCERPT}
    assert same(network.load(folder, ema=False)[0], model)
    assert same(advebm.load(folder), network.load(tmp_path / "model")[0])


def test_a_later_push_leaves_no_old_average_behind(server, tmp_path):
    publish(tmp_path / "old", ema=2)
    hub.push(tmp_path / "old", "alice/net")
    new = publish(tmp_path / "new", 3)
    hub.push(tmp_path / "new", "alice/net")
    assert same(advebm.load(hub.pull("alice/net")), new)


def test_a_revision_is_that_of_its_time(server, tmp_path):
    first = publish(tmp_path / "model", 1)
    hub.push(tmp_path / "model", "alice/net")
    second = publish(tmp_path / "model", 2)
    hub.push(tmp_path / "model", "alice/net")
    assert same(advebm.load(hub.pull("alice/net", revision=commit_id(2))), first)
    assert same(advebm.load(hub.pull("alice/net")), second)
    with pytest.raises(UserError, match=r"cannot pull alice/net at v7: there is no such revision"):
        hub.pull("alice/net", revision="v7")


def test_files_that_are_no_part_of_a_model_are_not_downloaded(server, tmp_path):
    publish(tmp_path / "model")
    hub.push(tmp_path / "model", "alice/net")
    server.repos["alice/net"][-1] |= {"train.py": b"import os", "state/optimizer.pt": b"x"}
    assert {p.name for p in hub.pull("alice/net").iterdir()} == set(hub.FILES) - {"ema.safetensors", hub.EXCERPT}
    assert not any("train.py" in line for line in server.seen)


def test_private_models(server, tmp_path, monkeypatch):
    model = publish(tmp_path / "model")
    hub.push(tmp_path / "model", "alice/secret", private=True)
    assert "alice/secret" not in server.public
    assert same(advebm.load(hub.pull("alice/secret")), model)
    hub.push(tmp_path / "model", "alice/net")
    before = list(server.repos["alice/net"])
    with pytest.raises(UserError, match="alice/net is on the Hub already, and public; choose another name"):
        hub.push(tmp_path / "model", "alice/net", private=True)
    assert server.repos["alice/net"] == before
    monkeypatch.delenv("HF_TOKEN")
    hub.pull("alice/net")
    with pytest.raises(UserError, match="cannot pull alice/other: there is no such model, or it is not open to you"):
        hub.pull("alice/other")


def test_out_of_reach_the_cache_serves(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    model = publish(tmp_path / "model")
    hub.push(tmp_path / "model", "alice/net")
    folder = hub.pull("alice/net")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert hub.pull("alice/net") == folder
    assert same(advebm.load(folder), model)
    with pytest.raises(UserError, match="cannot pull alice/other: the Hub cannot be reached; check the connection"):
        hub.pull("alice/other")
    with pytest.raises(UserError, match="cannot push alice/net: the Hub cannot be reached"):
        hub.push(tmp_path / "model", "alice/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot push alice/net: the Hub cannot be reached; .* HF_HUB_OFFLINE"):
        hub.push(tmp_path / "model", "alice/net")


def test_no_login_and_no_permission(server, tmp_path, monkeypatch):
    publish(tmp_path / "model")
    server.repos["bob/net"] = [{}]
    server.public.add("bob/net")
    for name in ("bob/net", "bob/new"):
        with pytest.raises(UserError, match=f"cannot push {name}: the login may not do that; bob has to be you"):
            hub.push(tmp_path / "model", name)
    assert server.repos == {"bob/net": [{}]}
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    with pytest.raises(UserError, match="cannot push alice/net: the Hub does not accept the login; run: hf auth"):
        hub.push(tmp_path / "model", "alice/net")
    server.seen.clear()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="nobody is logged in to the Hub; run: hf auth login"):
        hub.push(tmp_path / "model", "alice/net")
    assert not server.seen, "asked before anything is sent"


def test_other_failures_are_told_in_one_line(server, tmp_path):
    publish(tmp_path / "model")
    server.broken["PUT /large"] = 403
    with pytest.raises(UserError, match="cannot push alice/net: the login may not do that"):
        hub.push(tmp_path / "model", "alice/net")
    assert len(server.repos["alice/net"]) == 1
    server.broken["GET /api/models"] = 418
    with pytest.raises(UserError, match=r"cannot pull alice/net: .*418") as error:
        hub.pull("alice/net")
    assert "\n" not in str(error.value)


def test_what_is_not_a_model_is_neither_pushed_nor_pulled(server, tmp_path):
    publish(folder := tmp_path / "model")
    server.repos["alice/other"] = [{"config.json": b"{}", "README.md": b"hello"}]
    with pytest.raises(UserError, match=r"alice/other of the Hub, which is not a model of advebm: model.safetensors"):
        hub.pull("alice/other")
    server.seen.clear()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"is not a published model: config.json has no architecture"):
        hub.push(folder, "alice/net")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not a published model: config.json and model.safetensors missing"):
        hub.push(folder, "alice/net")
    assert not server.seen


@pytest.mark.parametrize("name", ["net", "a/b/c", "alice/", "alice/ne t", "alice/../net", "alice/a--b", ""])
def test_a_name_has_a_user_and_a_name(name, tmp_path, server):
    publish(tmp_path / "model")
    for call in (lambda: hub.push(tmp_path / "model", name), lambda: hub.pull(name)):
        with pytest.raises(UserError, match="is called user/name, of letters, digits"):
            call()
    assert not server.seen


# What is published ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured_run(small_run, tmp_path):
    """A run with an accuracy, samples that were judged, and what was measured of another checkpoint."""
    shutil.copytree(small_run.folder, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    latest = run.checkpoints.latest()
    about = {"error": 0.01, "count": 100, "settings": {}, "series": {}, "checkpoint": latest}
    judged = {**about, "name": "intended class (features of judge)", "value": 0.8, "judge": str(tmp_path)}
    judged["series"] = {"zero": [0.9], "one": [0.25]}
    manifest = {"samples": "drawn", "sampler": describe(small_run.recipe.sampler), "checkpoint": latest}
    others = ({"samples": "photos", "images": str(tmp_path)}, {**manifest, "samples": "early", "checkpoint": "0"})
    run.append(
        [
            {**about, "name": "accuracy", "value": 0.125},
            {**about, "name": "accuracy", "value": 0.5, "checkpoint": "0"},
            *({**judged, "settings": {**settings, "space": "features of judge"}} for settings in (manifest, *others)),
        ]
    )
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("init: null", f"init: {tmp_path / 'other'}"))
    return run


@pytest.mark.parametrize("weights", ["float32", "float16", "bfloat16"])
def test_what_is_exported_is_the_averaged_model(measured_run, tmp_path, weights):
    """Filters and matrices rounded, all else to the bit; nothing beside it, and no place on this machine."""
    assert cli.main(["export", str(measured_run.folder), str(tmp_path / "model"), "--weights", weights]) == 0
    averaged, exported = measured_run.model()[0], advebm.load(tmp_path / "model")
    large = {name for name, p in averaged.named_parameters() if p.ndim > 1}
    for name, value in averaged.state_dict().items():
        rounded = value.to(getattr(torch, weights)).float() if name in large else value
        assert torch.equal(exported.state_dict()[name], rounded), name
    files = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "README.md", "excerpt.safetensors"}
    size = {"float32": 4}.get(weights, 2) * sum(dict(averaged.named_parameters())[name].numel() for name in large)
    assert size <= len(files["model.safetensors"]) < size + 20_000
    assert all(str(tmp_path).encode() not in content for content in files.values())


def test_the_card_says_what_was_measured_of_that_checkpoint(measured_run, tmp_path):
    assert cli.main(["export", str(measured_run.folder), str(tmp_path / "model")]) == 0
    card, plain = ((tmp_path / "model" / name).read_text() for name in ("README.md", "config.json"))
    assert "| accuracy |  | 12.5 ± 1.0 % | 100 |" in card
    assert "50.0 ±" not in card
    assert "| intended class (features of judge) | drawn |\n| --- | --- |\n| zero | 90 % |\n| one | 25 % |" in card
    steps = measured_run.recipe.sampler.steps
    assert f"\n- drawn: {describe(measured_run.recipe.sampler)['kind'].upper()}: {steps} unit steps of " in card
    assert "photos" not in card
    assert "early" not in card
    images = f"{int(measured_run.checkpoints.latest()):,} images"
    trained = rf"Trained on digits: `digits-at` \(objective `at`, {images}, \d minutes, beginning with other weights"
    assert re.search(trained, card)
    assert ", options in `config.json`). On cpu (" in card
    assert [line["value"] for line in json.loads(plain)["measured"]] == [0.125, 0.8]
    assert json.loads(plain)["options"]["train"]["images"] == measured_run.recipe.train.images


def card_data(folder):
    """Of a card, as the Hub's own library reads it, which refuses an incomplete model-index."""
    card = ModelCard.load(folder / "README.md")
    return card.data


def test_the_card_has_what_the_hub_lists(measured_run, tmp_path):
    assert cli.main(["export", str(measured_run.folder), str(tmp_path / "model"), "--license", "mit"]) == 0
    data = card_data(tmp_path / "model")
    assert (data.license, data.pipeline_tag, data.library_name) == ("mit", "image-classification", "advebm")
    assert (data.metrics, data.model_name, data.datasets) == (["accuracy"], "digits-at", None)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.125, "digits")
    publish_run(measured_run, tmp_path / "other")
    assert card_data(tmp_path / "other").license is None


def test_metadata_name_sets_of_the_hub_and_what_samples_were_compared_with():
    architecture = Architecture(SmallConv(width=4), 10, 1, 8, (0.3,), (0.4,))
    names = {
        "accuracy under PGD-20 l2 0.5": None,
        "FD (features of judge)": "drawn",
        "accuracy (fog, severity 3)": None,
        "accuracy of something else": None,
        "precision (features of judge)": "drawn",
    }
    records = [{"name": name, "value": 0.25, "settings": {"samples": of}} for name, of in names.items()]
    found = yaml.safe_load(hub_metadata("mine", architecture, {"kind": "cifar10"}, records))
    assert found["datasets"] == ["uoft-cs/cifar10"]
    assert found["metrics"] == ["accuracy", "fd"]
    accuracy, quality = found["model-index"][0]["results"]
    assert (accuracy["task"]["type"], accuracy["dataset"]["split"]) == ("image-classification", "test")
    assert len(accuracy["metrics"]) == 2
    assert (quality["task"]["type"], quality["dataset"]["split"]) == ("unconditional-image-generation", "train")
    assert quality["metrics"] == [{"type": "fd", "value": 0.25, "name": "FD (features of judge), drawn"}]
    critic = dataclasses.replace(architecture, outputs=1)
    tags = [
        yaml.safe_load(hub_metadata("mine", a, {"kind": "cifar10"}, []))["pipeline_tag"] for a in (architecture, critic)
    ]
    assert tags == ["image-classification", "unconditional-image-generation"]
    other = yaml.safe_load(hub_metadata("mine", architecture, {"kind": "hf", "path": "me/photos"}, []))
    assert other["datasets"] == ["me/photos"]
    assert "model-index" not in other
    assert _hide_local_paths({"kind": "hf", "path": "me/photos"}) == {"kind": "hf", "path": "me/photos"}
    assert _hide_local_paths({"kind": "hf", "path": str(ROOT)}) == {"kind": "hf", "path": None}


def test_a_recipe_without_options_of_its_own_is_not_said_to_have_them(measured_run, tmp_path):
    """Where its data are is not such an option."""
    plain = resolve(recipes.find("cifar10-at-small"), [("data.path", "here")])
    own = resolve(recipes.find("cifar10-at-small"), [("objective.attack.steps", 3)])
    for number, recipe in enumerate((plain, own)):
        (measured_run.folder / "config.yaml").write_text(dump(recipe))
        publish_run(Run.open(measured_run.folder), tmp_path / str(number))
    first, second = ((tmp_path / str(n) / "README.md").read_text() for n in range(2))
    assert "options in" not in first
    assert "options in" in second


def test_nothing_is_exported_over_something(measured_run, tmp_path, capsys):
    def refused(*words):
        assert cli.main(["export", str(measured_run.folder), *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "no kind of weights 'float8'" in refused(tmp_path / "model", "--weights", "float8")
    assert "no checkpoint '7'" in refused(tmp_path / "model", "--checkpoint", "7")
    assert not (tmp_path / "model").exists()
    assert "is not an empty folder; choose another" in refused(measured_run.folder)
    assert "is not an empty folder; choose another" in refused(measured_run.folder / "config.yaml")
    assert "cannot write" in refused("/dev/null/model")


def test_what_others_cannot_read_is_not_exported(tmp_path):
    """Weights beyond float16, and a network of one's own; what was begun is not left behind."""
    architecture = Architecture(SmallConv(width=4), 10, 1, 8, (0.3,), (0.4,))
    model = architecture.build()
    model.head.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"head.weight is too large for float16; bfloat16 and float32 hold it"):
        network.save(tmp_path / "model", model, architecture, weights="float16")
    own = resolve(recipes.find("digits-at"), [("backbone", "tests.models.test_hub:Mine"), ("train.images", 0)])
    run = train(own, tmp_path / "run", device="cpu")
    with pytest.raises(UserError, match="Mine"):
        publish_run(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".model*"))


def test_the_command_of_the_card_makes_a_run_of_the_model(measured_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (publish_run(measured_run, tmp_path / "model") / "README.md").read_text()
    words = next(line for line in card.splitlines() if line.startswith("advebm evaluate")).split()[1:]
    assert cli.main(["model" if word == "PATH" else word for word in words]) == 0
    (made,) = Path("runs/models").iterdir()
    assert same(Run.open(made).model()[0], measured_run.model()[0])


def test_the_card_says_what_every_stage_took(measured_run, tmp_path):
    recipe = dataclasses.replace(measured_run.recipe, init=None)
    first = dataclasses.replace(recipe, name="first")
    (measured_run.folder / "config.yaml").write_text(dump(dataclasses.replace(recipe, before=(first,))))
    measured_run = Run.open(measured_run.folder)
    shutil.copytree(measured_run.folder, measured_run.before[0])
    (measured_run.before[0] / "config.yaml").write_text(dump(first))
    path = measured_run.before[0] / "checkpoints" / measured_run.checkpoints.latest() / "state"
    progress = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**progress, "seconds": 5999.0}))
    digests = json.loads((path / "sha256.json").read_text())
    digests["state/progress.json"] = sha((path / "progress.json").read_bytes())
    (path / "sha256.json").write_text(json.dumps(digests))
    card = (publish_run(measured_run, tmp_path / "model") / "README.md").read_text()
    images = f"{int(measured_run.checkpoints.latest()):,} images"
    assert (
        f"digits: `first` (objective `at`, {images}, 100 minutes, options in `config.json`), then `digits-at` (" in card
    )


@pytest.mark.parametrize("folder", sorted((ROOT / "models").glob("*")), ids=lambda p: p.name)
def test_the_kept_models_can_be_used(folder):
    """Each is small, says what was measured, and names no place on a machine."""
    assert {p.name for p in folder.iterdir()} == set(hub.FILES) - {"ema.safetensors"}
    assert sum(p.stat().st_size for p in folder.iterdir()) < 25e6
    plain = json.loads((folder / "config.json").read_text())
    assert {"accuracy"} < {record["name"] for record in plain["measured"]}
    data = card_data(folder)
    assert (data.license, data.datasets) == ("apache-2.0", ["uoft-cs/cifar10"])
    listed = {result.metric_name.partition(",")[0]: result.metric_value for result in data.eval_results}
    assert listed["accuracy"] == next(r["value"] for r in plain["measured"] if r["name"] == "accuracy")
    assert _hide_local_paths(plain["options"]) == plain["options"]
    size = plain["architecture"]["size"]
    images = torch.rand(4, plain["architecture"]["channels"], size, size)
    assert advebm.energy(advebm.load(folder), images).isfinite().all()


def test_a_run_is_pushed_as_it_is_exported(server, measured_run, tmp_path, capsys):
    assert cli.main(["push", str(measured_run.folder), "alice/net", "--weights", "float16"]) == 0
    assert capsys.readouterr().out == f"{server.url}/alice/net\n"
    publish_run(measured_run, tmp_path / "model", weights="float16")
    pushed = server.repos["alice/net"][-1]
    assert pushed.keys() == {".gitattributes", *hub.FILES} - {"ema.safetensors"}
    assert pushed["excerpt.safetensors"] == (tmp_path / "model" / "excerpt.safetensors").read_bytes()
    assert pushed["README.md"] == (tmp_path / "model" / "README.md").read_bytes()
    assert same(advebm.load("hf:alice/net"), advebm.load(tmp_path / "model"))


def test_the_shares_of_classes_are_printed(measured_run, capsys):
    names = [field.name for field in dataclasses.fields(Record)]
    print_records(Record(**{name: r[name] for name in names}) for r in measured_run.records())
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["intended", "class", "(features", "of", "judge)", "drawn", "photos", "early"] in printed
    assert ["one", *3 * ["25", "%"]] in printed
