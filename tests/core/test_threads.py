"""Threads: how many, said and kept; and how long idle ones wait."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from advebm.core import console, threads
from advebm.core.errors import UserError


@pytest.fixture
def environment(monkeypatch):
    """Without what says how threads wait, and with the number of threads put back."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_user_count", [])
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def test_waiting_is_bounded_before_torch_is_there(environment):
    threads.bound_waiting()
    assert "GOMP_SPINCOUNT" not in os.environ, "torch has read it by now"
    environment.delitem(sys.modules, "torch")
    threads.bound_waiting()
    assert os.environ["GOMP_SPINCOUNT"] == threads.SPINS


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_environment_says_is_left(environment, name):
    environment.setenv(name, "active")
    environment.delitem(sys.modules, "torch")
    before = dict(os.environ)
    threads.bound_waiting()
    assert dict(os.environ) == before


def test_so_many_threads_here_and_in_processes_to_come(environment):
    threads.use_threads(1)
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"
    with pytest.raises(UserError, match="--threads must be at least 1, got 0"):
        threads.use_threads(0)


def command(*words, **environment):
    start = [sys.executable, "-m", "advebm", *map(str, words)]
    done = subprocess.run(start, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_the_number_is_said_kept_and_taken_again(tmp_path):
    """A resumed run has the threads that it was begun with: with others its sums are rounded in another order."""
    run, options = tmp_path / "run", ["--train.images", 256, "--train.validate_every", 256]
    first = command("train", "--recipe", "digits-standard", *options, "--threads", 1, "--device", "cpu", "--out", run)
    assert "  cpu, 1 thread, float32" in first.splitlines()
    assert json.loads((run / "env.json").read_text())["threads"] == 1
    shutil.rmtree(run / "checkpoints" / "256")
    (run / "checkpoints" / "LATEST").write_text("0\n")
    cores = os.cpu_count() or 1
    again = command("train", "--resume", run, "--device", "cpu", OMP_NUM_THREADS=str(cores))
    assert "  cpu, 1 thread, float32" in again.splitlines()


def test_threads_are_taken_over_where_they_are_there_and_nobody_said_otherwise(environment):
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    assert threads.take_over_threads(None) == ""
    assert "begun with 10000 threads, and there are" in threads.take_over_threads(10_000)
    assert torch.get_num_threads() == cores
    assert threads.take_over_threads(1) == ""
    assert torch.get_num_threads() == 1
    threads.use_threads(cores)
    assert threads.take_over_threads(1) == ""
    assert torch.get_num_threads() == cores


# Progress -------------------------------------------------------------------------------------------------------------


def test_what_is_computed_on_is_said_before_the_first_line_and_once(capsys, monkeypatch):
    monkeypatch.setattr(console, "_ComputingOn", SimpleNamespace(said="", pending=""))
    for name in ("one", "two"):
        console.computing_on("cpu, 3 threads")
        assert capsys.readouterr().err == "", "nothing is done yet"
        with console.bar(name, 10) as tell:
            tell(0)
            tell(10)
        lines = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
        assert lines == (["cpu,", "one"] if name == "one" else ["two"])


def test_cached_results_have_no_speed(capsys, monkeypatch):
    monkeypatch.setattr(console, "_ComputingOn", SimpleNamespace(said="", pending=""))
    with console.bar("judged", 359) as tell:
        tell(359, "71 stand")
    assert capsys.readouterr().err.split() == ["judged", "359/359", "cached", "71", "stand"]


def test_a_line_has_one_speed(capsys):
    """The bar's, which is of late; the log has its own."""
    note = console.training_note({"perf/img_per_s": 39.0, "train/loss": 2.0, "val/accuracy": 0.5}, {})
    assert note == "loss 2  clean 0.5"


def test_a_run_that_goes_back_to_a_checkpoint_has_no_negative_speed(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console, "_ComputingOn", SimpleNamespace(said="", pending=""))
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with console.bar("train", 1000, 0) as tell:
        for done in (200, 400, 100, 100, 200):
            now[0] += 20.0
            tell(done)
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["train 200/1,000 10/s, 40 s left".replace("40", "80"), "train 400/1,000 10/s, 60 s left"]
    assert lines[-1] == "train 200/1,000 2.5/s, 320 s left"
    assert not any("-" in line for line in lines)
