"""What differs between machines: modules of one system only, and paths that are not plain ASCII words."""

import ast
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from advebm import cli
from advebm.runs.run import Run
from tests.test_project import ROOT

SOURCES = sorted((ROOT / "src" / "advebm").rglob("*.py"))
POSIX = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
ODD = "meine Läufe – été 'n 测试"


def imported(path):
    """Modules that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_nothing_of_one_system_alone_is_imported():
    found = {(path.name, name) for path in SOURCES for name in imported(path)}
    assert len(found) > 500
    assert not {(file, name) for file, name in found if name in POSIX}
    assert POSIX & set(sys.stdlib_module_names), "these are modules"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / ODD / "mes images"
    rng = np.random.default_rng(0)
    for kind in ("chien été", "chat noir"):
        (folder / kind).mkdir(parents=True)
        for number in range(30):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / kind / f"n° {number}.png")
    return folder


def test_folders_may_have_spaces_and_any_letters(pictures, tmp_path, monkeypatch, capsys):
    """Train, go on, draw, measure, edit, report, export, and use what was exported."""
    monkeypatch.setenv("ADVEBM_CACHE", str(tmp_path / ODD / "cache"))
    run, model = tmp_path / ODD / "runs" / "at 1", tmp_path / ODD / "modèle"
    small = "--data.size 8 --train.images 256 --train.batch 16 --train.validate_with 4 --threads 1 --device cpu"
    image = str(sorted(pictures.glob("*/*.png"))[0])
    for words in (
        ["train", "--recipe", "digits-at", "--data", f"folder:{pictures}", *shlex.split(small), "--out", str(run)],
        ["train", "--resume", str(run), "--device", "cpu"],
        ["sample", str(run), "--per-class", "2", "--steps", "2", "--name", "tirés au sort", "--device", "cpu"],
        ["evaluate", str(run), "--metrics", "accuracy", "--device", "cpu"],
        ["edit", "denoise", str(run), "--image", image, "--edit.steps", "2", "--device", "cpu"],
        ["report", str(run)],
        ["export", str(run), str(model)],
        ["sample", str(model), "--per-class", "1", "--steps", "1", "--data.path", str(pictures), "--device", "cpu"],
    ):
        monkeypatch.chdir(tmp_path / ODD)
        assert cli.main(words) == 0, capsys.readouterr().err
    assert "chien été" in (run / "report.html").read_text(encoding="utf-8")
    assert Run.open(run).data.classes == ("chat noir", "chien été")
