"""Several processes: they compute what one computes, share the work, stop and go on together, and one of them speaks.

Two real ones, of torchrun and gloo; launched twice in all, since a launch takes seconds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from advebm import cli
from advebm.cli import entry
from advebm.core import processes
from advebm.core.errors import Interrupted, UserError
from advebm.runs.engine import Engine, close_connections
from advebm.runs.recipe import dump
from advebm.runs.run import Run
from advebm.training import norm_statistics, signals
from advebm.training.loop import train
from tests.runs import shared_work

ROOT = Path(__file__).parents[2]


# One process that is told of others ----------------------------------------------------------------------------------


@pytest.fixture
def second(monkeypatch):
    """As if this were the second of two processes."""
    for name, value in {"LOCAL_RANK": 1, "RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(entry, "GRACE", 0.0)


def test_other_commands_take_one_process(second, monkeypatch, capsys, small_run):
    for words, what in (
        (["report", "RUN"], "report takes one process, and there are 2"),
        (["demo"], "demo takes one process"),
        (["reproduce", "digits-at"], "reproduce takes one process"),
        (["sample", str(small_run.folder), "--compare", "cs,ta"], "--compare and --processes take one process"),
        (["sample", str(small_run.folder), "--processes", "2"], "--compare and --processes take one process"),
        (["evaluate", "--model", "x", "--data", "digits"], "--model makes a run, which takes one process"),
    ):
        assert cli.main(words) == 2
        assert f"advebm: process 1: error: {what}" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err.startswith("advebm: error: demo takes one process")


def test_only_the_main_process_prints(second, monkeypatch, capsys):
    assert cli.main(["train", "--recipe", "digits-at", "--print_config"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", "--recipe", "digits-at", "--print_config"]) == 0
    assert "digits-at" in capsys.readouterr().out


def test_connections_are_closed_where_all_processes_end_together(second, monkeypatch):
    registered = []
    monkeypatch.setattr(entry.atexit, "register", registered.append)

    def stop(*_: object, **__: object) -> None:
        raise Interrupted("saved")

    monkeypatch.setattr("advebm.workflows.train.fit", stop)
    assert cli.main(["train", "--recipe", "digits-at"]) == 130
    assert registered == [close_connections]
    assert cli.main(["train", "--recipe", "digits-at", "--print_config"]) == 0
    assert registered == [close_connections] * 2
    assert cli.main(["train", "--recipe", "none"]) == 2
    assert len(registered) == 2, "another process may go on"


def test_how_processes_are_started(monkeypatch):
    assert processes.rank_and_world() == (0, 1)
    assert processes.launch_command(1) == "advebm"
    assert processes.launch_command(2) == "torchrun --nproc-per-node 2 -m advebm"
    for name, value in {"LOCAL_RANK": 3, "RANK": 11, "WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    assert processes.rank_and_world() == (11, 16)
    assert processes.launch_command(16) == "torchrun --nnodes 2 --nproc-per-node 8 -m advebm"
    monkeypatch.delenv("LOCAL_RANK")
    assert processes.rank_and_world() == (0, 1), "a cluster's variables are not torchrun's"


def test_streams_are_shared_evenly():
    engine = Engine("cpu")
    engine.world, engine.rank = 2, 1
    assert list(engine.owned(6)) == [3, 4, 5]
    with pytest.raises(UserError, match=r"2 processes cannot share 3 streams evenly; set --train.streams 2, or a mult"):
        engine.owned(3)


def test_a_finished_run_may_be_opened_by_any_number(small_run, tmp_path):
    """An encoder's, too, whose streams are the processes that trained it."""
    small_run.check_processes(4)
    shutil.copytree(small_run.folder, tmp_path / "run")
    (tmp_path / "run" / "env.json").write_text('{"processes": 2}')
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("streams: 1", "streams: 2"))
    run = Run.open(tmp_path / "run")
    assert run.recipe.train.streams == 2
    before = run.checkpoints.path()
    assert train(run.recipe, run.folder, resume=True, device="cpu").checkpoints.path() == before


def test_a_bad_network_is_refused_before_there_is_a_folder(tmp_path):
    recipe = shared_work.make("digits-at", {"train.recompute": True})
    with pytest.raises(UserError, match="recompute needs a backbone with stages"):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_of_one_process_is_not_gone_on_with_by_two(small_run, monkeypatch):
    monkeypatch.setattr(Run, "finished", False)
    with pytest.raises(UserError, match=r"trained by 1 process so far, and there are 2.*: advebm train --resume"):
        small_run.check_processes(2)
    small_run.check_processes(1)


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    """A terminal's interrupt reaches a process from torchrun, too; one that comes later acts at once."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it may be ignored
    with signals.stopping() as signalled:
        try:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("the second one acted at once")
        assert signalled()
        monkeypatch.setattr(signals, "SAME_SIGNAL_SECONDS", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_statistics_move_by_the_mean_of_the_streams():
    """From the batch's beginning in each stream; what is not moved keeps every bit, and counts are of batches."""
    norm = nn.BatchNorm1d(3, momentum=0.1).double()
    norm.register_buffer("constant", torch.tensor(1 / 3))
    x = torch.rand(3, 5, 3, dtype=torch.float64)
    statistics = norm_statistics.Statistics(norm)
    for part in x:
        norm(part)
        statistics.next()
        assert torch.equal(norm.running_mean, torch.zeros(3))
    statistics.settle()
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var(1).mean(0))
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.constant, torch.tensor(1 / 3))


# Two processes --------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What two processes did, what one did, and what they know of it; and how a job ended that lost a process."""

    two: Path
    one: Path
    known: list[dict[str, Any]]
    alone: dict[str, Any]
    killed: tuple[int, str, str]


def launch(*words: object, restarts: int = 0, **options: Any) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start += ["--max-restarts", restarts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else {}
    return subprocess.Popen(
        [*map(str, start), *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def kill_one(folder: Path, config: Path, restarts: int = 0) -> tuple[int, str, str]:
    """Train under torchrun; the second process is killed, once, when the first checkpoint is whole."""
    words = ("kill", "train", "--config", config, "--out", folder)
    job = launch("-m", "tests.runs.shared_work", *words, restarts=restarts)
    out, err = job.communicate(timeout=300)
    return job.returncode, out, err


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    two, one = folder / "two", folder / "one"
    two.mkdir()
    config = folder / "stopped.yaml"
    config.write_text(dump(shared_work.stopped()))
    killed = kill_one(two / "killed", config)
    assert Run.open(two / "killed").checkpoints.latest() == "160", killed[2]
    with pytest.raises(
        UserError, match=r"trained by 2 processes so far, and there is 1.*torchrun --nproc-per-node 2 -m"
    ):
        train(shared_work.stopped(), two / "killed", resume=True, device="cpu")
    job = launch("-m", "tests.runs.shared_work", two)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as they have: sums over more threads round otherwise
    alone = shared_work.work(one, Engine("cpu"))
    torch.set_num_threads(threads)
    _, err = job.communicate(timeout=500)
    assert job.returncode == 0, err
    known = [json.loads((two / f"known-{rank}.json").read_text()) for rank in range(2)]
    return Work(two, one, known, alone, killed)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the latest checkpoint, but those of the optimiser."""
    path = Run.open(folder).checkpoints.path()
    found = {}
    for name in ("model", "ema"):
        found |= {f"{name} {k}": v for k, v in load_file(path / f"{name}.safetensors").items()}
    for file in sorted((path / "state").glob("stream-*.pt")):
        state = torch.load(file, weights_only=True)
        found |= {f"{file.name} {k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return found


def test_processes_end_without_connections(work):
    """Nor with threads that serve them: those now and then abort a process whose work is done."""
    for rank in range(2):
        leaving = json.loads((work.two / f"leaving-{rank}.json").read_text())
        assert not leaving["connected"]
        assert not [name for name in leaving["threads"] if "gloo" in name]


@pytest.mark.parametrize("name", shared_work.objectives())
def test_two_processes_train_as_one(work, name):
    """Weights, averaged weights, statistics, chains and what is logged, after 20 steps in float64."""
    two, one = (Run.open(folder / name) for folder in (work.two, work.one))
    theirs, ours = saved(two.folder), saved(one.folder)
    other = ("perf/img_per_s",)
    if "one stream" in name:  # what is of a stream is not of a batch
        theirs, ours = ({k: v for k, v in found.items() if "stream" not in k} for found in (theirs, ours))
        other = ("perf", "shift", "train/auroc")
    assert theirs.keys() == ours.keys()
    assert theirs["model head.weight" if "model head.weight" in ours else "model head.0.weight"].dtype == torch.float64
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    first = load_file(one.checkpoints.path("0") / "model.safetensors")
    assert max((ours[f"model {k}"] - v).abs().max().item() for k, v in first.items()) > 1e-3, "it has learnt"
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(other)} for line in run.history()] for run in (two, one)
    ]
    assert len(lines[0]) == len(lines[1]) == 3
    for line, same in zip(*lines, strict=True):
        assert line == pytest.approx(same, abs=1e-5)


def test_a_parameter_that_a_branch_leaves_out_has_no_gradient(work):
    """Of dual batch norms the clean half is trained; the other neither moves nor decays."""
    run = Run.open(work.two / "dual")
    first = load_file(run.checkpoints.path("0") / "model.safetensors")
    last = load_file(run.checkpoints.path() / "model.safetensors")
    moved = {k for k in first if not torch.equal(first[k], last[k])}
    assert any("branches.clean.weight" in k for k in moved)
    assert not any("adversarial" in k for k in moved)
    assert work.known[0]["gradients"] == work.known[1]["gradients"] == [0.5, 0.5, None]


def test_all_begin_with_the_weights_of_the_main_process(work):
    assert work.known[0]["agreed"] == work.known[1]["agreed"] == [[0.0, 0.0], [0.0, 0.0]]
    assert work.known[0]["shared"] == work.known[1]["shared"] == [0, 1]


def test_gathered_rows_begin_with_the_own_ones(work):
    assert [known["rows"] for known in work.known] == [[0, 1], [1, 0]]


def test_each_half_of_an_encoder_has_moved_its_statistics(work):
    run = Run.open(work.two / "acl")
    state = load_file(run.checkpoints.path() / "model.safetensors")
    pairs = [(v, state[k.replace("clean", "adversarial")]) for k, v in state.items() if "clean.running_mean" in k]
    assert pairs
    assert all(a.abs().max() > 0 and not torch.equal(a, b) for a, b in pairs)
    assert [line["images"] for line in run.history() if "val/loss" in line] == [160, 320]
    assert not (work.two / "elsewhere").exists(), "the folder is the main process's"


@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_two_processes_go_on_to_the_bytes_of_an_uninterrupted_run(work, name):
    """After SIGTERM to one of them, and after one of them was killed: weights, averages, chains, optimiser, logs."""
    whole, other = (Run.open(work.two / n) for n in ("whole", name))
    assert len(whole.history()) == 9
    for path in sorted(whole.checkpoints.path().rglob("*")):
        twin = other.checkpoints.path() / path.relative_to(whole.checkpoints.path())
        if path.is_file() and path.name not in ("progress.json", "sha256.json"):
            assert twin.read_bytes() == path.read_bytes(), path.name
    scores = [[line for line in run.history() if "val/accuracy" in line] for run in (whole, other)]
    assert scores[0] == scores[1]
    lowest = min(scores[0], key=lambda line: line["val/fd"])["images"]
    assert whole.checkpoints.path("best").name == other.checkpoints.path("best").name == str(lowest)
    assert {p.name for p in (whole.checkpoints.path() / "state").glob("stream*")} == {"stream-0.pt", "stream-1.pt"}


def test_all_stop_where_one_is_told_to(work):
    reasons = [known["stop"] for known in work.known]
    assert reasons[0] == reasons[1]
    assert "torchrun --nproc-per-node 2 -m advebm train --resume" in reasons[0]


def test_a_killed_process_ends_the_job_with_a_message(work):
    status, out, err = work.killed
    assert status != 0
    assert out == "", "the folder is printed at the end, which there is none of"
    (line,) = (line for line in err.splitlines() if line.startswith("advebm: error: "))
    assert "another process of this job has ended" in line
    assert "torchrun --nproc-per-node 2 -m advebm train --resume" in line
    assert "loop.py" not in err, "no traceback but torchrun's own"


@pytest.mark.slow
def test_an_elastic_restart_goes_on(work, tmp_path):
    """The same command, begun again by torchrun: it ends as an uninterrupted run does."""
    (tmp_path / "stopped.yaml").write_text(dump(shared_work.stopped()))
    status, out, err = kill_one(tmp_path / "run", tmp_path / "stopped.yaml", restarts=1)
    assert status == 0, err
    assert out.strip() == str(tmp_path / "run")
    assert "another process of this job has ended" in err
    whole, run = Run.open(work.two / "whole"), Run.open(tmp_path / "run")
    assert whole.checkpoints.path().name == run.checkpoints.path().name
    for name in ("model.safetensors", "ema.safetensors"):
        assert (whole.checkpoints.path() / name).read_bytes() == (run.checkpoints.path() / name).read_bytes()


def test_restarts_that_would_hang_are_refused(second, monkeypatch, capsys):
    """By a stand-in for what torchrun sets: really it hangs, or fails to connect, in about half of all cases."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert cli.main(["train", "--recipe", "digits-standard", "--device", "cpu", "--out", "somewhere"]) == 2
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment" in capsys.readouterr().err
    for name, value in (("MAX_RESTARTS", "0"), ("USE_AGENT_STORE", "False")):
        with monkeypatch.context() as change:
            change.setenv(f"TORCHELASTIC_{name}", value)
            processes.check_restarts()


def test_a_restart_goes_on_with_a_run_of_its_own_recipe_alone(tmp_path, monkeypatch, capsys):
    words = ["train", "--recipe", "digits-standard", "--train.images", "256", "--train.batch", "64", "--device", "cpu"]
    words += ["--out", str(tmp_path / "run"), "--threads", "1"]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert cli.main(words[:-4]) == 2
    assert "in a new folder each time; give --out DIR" in capsys.readouterr().err
    assert cli.main(words) == 0  # there is no run yet
    assert cli.main(words) == 0
    assert cli.main([*words, "--seed", "1"]) == 2
    assert "run is not empty; to go on with it: advebm train --resume" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert cli.main(words) == 2


def test_processes_share_the_chunks_of_a_set(work):
    assert [known["chunks"] for known in (*work.known, work.alone)] == [2, 1, 3]
    (folder,) = (work.one / "batch norm" / "samples").iterdir()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".npz", ".png", ".json"):
            assert (work.two / "batch norm" / "samples" / folder.name / path.name).read_bytes() == path.read_bytes(), (
                path.name
            )


def test_processes_share_the_batches_of_attacks(work):
    """Seven and fewer batches a run, the odd one the main process's; the verdicts are those of one."""
    assert work.known[0]["broken"] == work.known[1]["broken"] == work.alone["broken"]
    assert {-1, 0, 1} == set(work.alone["broken"]["noise"]), "some stand, some are wrong, some fall"
    mine, other = (known["batches"] for known in work.known)
    assert mine + other == work.alone["batches"]
    assert mine > other > 3
    kept = [{p.name: p.read_bytes() for p in (f / "verdicts").rglob("*.json")} for f in (work.two, work.one)]
    assert kept[0] == kept[1]


def test_the_main_process_writes_and_speaks(work):
    for verb in ("sample", "evaluate"):
        (status, printed), (status_1, printed_1) = (known[verb] for known in work.known)
        assert status == status_1 == 0
        assert printed
        assert printed_1 == ""
    records = [Run.open(folder / "batch norm").records() for folder in (work.two, work.one)]
    plain = [[{k: v for k, v in record.items() if k != "time"} for record in found] for found in records]
    assert len(plain[0]) == len(plain[1]) > 2
    for record, other in zip(*plain, strict=True):
        assert record.pop("value") == pytest.approx(other.pop("value"), abs=1e-6)
    lines = [[line["images"] for line in Run.open(f / "batch norm").history()] for f in (work.two, work.one)]
    assert lines[0] == lines[1] == [160, 320, 320]
    made = [json.loads((f / "at" / "env.json").read_text())["processes"] for f in (work.two, work.one)]
    assert made == [2, 1]
