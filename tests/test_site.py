"""The pages in docs, and the site that is built of them."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from advebm.cli.options import split_overrides
from advebm.cli.parser import build_parser
from tests.test_project import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    """Of all pages: page and text."""
    return [(page.name, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def commands():
    """Each line of a block, and each inline code, that calls advebm; without its comment."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        lines = [line for _, block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(advebm \w+ [^`]*?\w+)`", BLOCK.sub("", text))  # not what only names a command
        for line in lines:
            called = re.match(r"(?:\w+=\S+ )*(?:torchrun .*-m )?(advebm \S.*)", re.sub(r"\s#.*", "", line).strip())
            if called and "…" not in line and "$" not in line and not re.search(r" --[\w-]+$", called[1]):
                found.setdefault(" ".join(called[1].split()), page.name)
    return [pytest.param(line, id=f"{page} {line}") for line, page in found.items()]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    """By the parser, with placeholders such as RUN and DIR as they are."""
    plain, _ = split_overrides(shlex.split(command)[1:])
    args, unexpected = build_parser().parse_known_args(plain)
    assert not unexpected
    assert args.verb


def test_there_are_many():
    assert len(commands()) > 100
    assert len(blocks("python")) > 5


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_blocks_compile(page, code):
    compile(code, page, "exec")


@pytest.mark.parametrize("page", ["index.md", "concepts.md"])
def test_python_blocks_that_need_nothing_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    (code,) = (code for name, code in blocks("python") if name == page)
    exec(code, {})


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a link or anchor that leads nowhere, or a page that is not in the menu, ends it."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_with_everything(site):
    for name in ("attacks", "samplers", "energies"):
        assert f"advebm.{name}" in (site / "api" / name / "index.html").read_text()
    assert 'id="advebm.descent.Descent"' in (site / "api" / "energies" / "index.html").read_text()
    assert ":class:" not in (site / "api" / "models" / "index.html").read_text()
    assert 'id="cifar10-at-2h"' in (site / "recipes" / "index.html").read_text()
    assert list((site / "results").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize(("words", "page"), [("own model", "your-own/"), ("FID", "concepts/"), ("threat", "concepts/")])
def test_the_search_knows(site, words, page):
    sections = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    found = [s for s in sections if all(word.lower() in f"{s['title']} {s['text']}".lower() for word in words.split())]
    assert page in {s["location"].partition("#")[0] for s in found}


@pytest.mark.slow
def test_nothing_on_the_site_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.findall(r"(?:src|rel=.stylesheet. href)=.https?://", path.read_text()), path
