"""What is published: a source archive and a wheel, which draws in an environment that has nothing else."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.test_project import ROOT

pytestmark = pytest.mark.slow


def run(*words, **options):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    if "No matching distribution found for hatchling" in done.stdout + done.stderr:
        pytest.skip("building takes hatchling from a package index, and there is none")
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.iterdir())


def test_their_metadata_are_in_order(archives):
    assert [path.suffix for path in archives] == [".whl", ".gz"]
    done = run(sys.executable, "-m", "twine", "check", "--strict", *archives)
    assert done.returncode == 0, done.stdout + done.stderr


def test_they_hold_what_is_needed_and_little_else(archives):
    with zipfile.ZipFile(archives[0]) as archive, tarfile.open(archives[1]) as source_archive:
        wheel, source = archive.namelist(), source_archive.getnames()
    for name in ("py.typed", "recipes/digits-at.yaml", "bundled/cifar10-at-2h/model.safetensors", "core/citations.bib"):
        assert f"advebm/{name}" in wheel
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"advebm"}
    assert not [name for name in (*wheel, *source) if "__pycache__" in name or name.endswith(".log")]
    assert {name.split("/")[1] for name in source if "/" in name} >= {"src", "models", "docs", "tests", "README.md"}
    assert all(path.stat().st_size < 40 * 2**20 for path in archives)


def test_the_wheel_draws_in_an_empty_environment(archives, tmp_path):
    """Of a fresh venv, with the dependencies that it names, away from the repository."""
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv", check=True)
    pip = run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", archives[0])
    assert pip.returncode == 0, pip.stderr
    known = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = run(python.with_name("advebm"), "sample", "--per-class", 1, "--steps", 3, cwd=tmp_path, env=known)
    assert done.returncode == 0, done.stderr
    grid = tmp_path / done.stdout.strip()
    assert grid.name == "grid.png"
    with Image.open(grid) as image:
        assert min(image.size) > 32
