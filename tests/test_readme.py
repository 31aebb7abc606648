"""What the README promises to somebody who types it."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from advebm import cli
from advebm.cli.options import split_overrides
from advebm.cli.parser import build_parser
from tests.test_project import ROOT, python_example

README = (ROOT / "README.md").read_text()
COMMANDS = list(dict.fromkeys("".join(pair) for pair in re.findall(r"(?m)^(advebm .*)$|`(advebm [^`]+)`", README)))
LONG = ("evaluate", "reproduce", "train")  # minutes to an hour: begun, seen to work, and stopped
MINE = """
from torch import nn

def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
"""


def test_it_is_one_screen_and_a_half():
    assert len(README.splitlines()) <= 120
    assert {"sample", "app", "edit", "evaluate", "train", "reproduce"} <= {c.split()[1] for c in COMMANDS}


def test_its_example_runs(tmp_path, monkeypatch):
    """As printed, in an empty folder, without data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVEBM_DATA", raising=False)
    scope: dict = {}
    exec(python_example(ROOT / "README.md"), scope)
    assert scope["images"].shape == (10, 3, 32, 32)
    assert scope["energy"].shape == (10,)
    away = (scope["x_adv"] - scope["images"]).flatten(1).norm(dim=1)
    assert away.max() <= 0.5 + 1e-5
    with torch.no_grad():
        assert (scope["model"](scope["images"]).argmax(1) == torch.arange(10)).all()


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_understood(command):
    plain, _ = split_overrides(shlex.split(command)[1:])
    build_parser().parse_args(plain)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the README calls mine.py and pictures."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "mine.py").write_text(MINE)
    rng = np.random.default_rng(0)
    for number in range(200):
        kind = ("cats", "dogs")[number % 2]
        (folder / "pictures" / kind).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 30 + number % 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / kind / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "advebm app"])
def test_its_commands_run(command, desk):
    """As typed.  What takes long has to work for a while, say so, and end in order when it is stopped."""
    if re.search("cifar10 |--recipe cifar10", command) and "ADVEBM_DATA" not in os.environ:
        pytest.skip("needs CIFAR-10: the folder above it in ADVEBM_DATA")
    words = [sys.executable, "-m", *shlex.split(command)]
    process = subprocess.Popen(words, cwd=desk, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    is_long = command.split()[1] in LONG
    try:
        said, _ = process.communicate(timeout=45 if is_long else 240)
    except subprocess.TimeoutExpired:
        assert is_long, f"{command} is not done after four minutes"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130, said
    else:
        assert process.returncode == 0, said
    assert "Traceback" not in said
    assert said.strip(), command


@pytest.mark.slow
def test_the_page_opens_without_a_name(tmp_path):
    pytest.importorskip("gradio")
    import urllib.request

    process = subprocess.Popen([sys.executable, "-m", "advebm", "app", "--port", "7899"], cwd=tmp_path)
    try:
        for _ in range(240):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen("http://127.0.0.1:7899/") as answer:
                    assert b"advebm" in answer.read()
                break
            except OSError:
                assert process.poll() is None, "the page ended"
        else:
            raise AssertionError("the page does not answer")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.mark.parametrize("model", ["cifar10-at-2h", "cifar10-at-20min"])
def test_its_headline_numbers_are_those_of_the_models_card(model):
    """Clean accuracy, and accuracy under the two APGD attacks."""
    card = (ROOT / "models" / model / "README.md").read_text()
    clean = re.search(r"\| accuracy \|  \| (\S+ ± \S+ %) \| 10,000 \|", card)[1]
    attacked = re.search(r"\| accuracy under AutoAttack quick l2 0.5 \|  \| (\S+ ± \S+ %) \| 1,000 \|", card)[1]
    text = " ".join(README.split())
    assert f"{clean} of the 10,000 test images" in text
    assert f"{attacked} of 1,000 of them" in text


def test_help_names_every_command_of_it():
    text = build_parser().format_help()
    for verb in {command.split()[1] for command in COMMANDS}:
        assert re.search(rf"^ +{verb}\s", text, re.M), verb
    assert cli.main(["list"]) == 0
