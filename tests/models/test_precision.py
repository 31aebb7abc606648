"""bfloat16 where the device multiplies in it, float32 elsewhere: in training, searches, sampling and evaluation."""

import shutil
import subprocess
import sys

import pytest
import torch

from advebm.attacks.projected import Attack
from advebm.core import rng
from advebm.core.errors import Interrupted, UserError
from advebm.evaluation import compare
from advebm.evaluation.evaluate import evaluate
from advebm.metrics.base import Subject
from advebm.metrics.keys import Key, attack_key
from advebm.metrics.robustness import RobustAccuracy
from advebm.metrics.verdicts import find_verdicts
from advebm.models import precision
from advebm.models.inference import faster_model
from advebm.models.precision import (
    asked_precision,
    float32,
    multiplies_bfloat16,
    precision_label,
    usable_precision,
)
from advebm.runs.run import Run
from advebm.training.loop import train
from tests.helpers import tiny

CPU = torch.device("cpu")
OPTIONS = {"train__images": 2_000, "train__checkpoint_every": 1_000}


@pytest.fixture
def hardware(monkeypatch):
    """A function that gives this machine bfloat16 arithmetic, or takes it away."""
    return lambda has: monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: has)


@pytest.mark.parametrize(
    ("variable", "value", "has"),
    [
        ("ATEN_CPU_CAPABILITY", "avx2", False),
        ("ATEN_CPU_CAPABILITY", "default", False),
        ("ATEN_CPU_CAPABILITY", "avx512", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", True),
        ("DNNL_MAX_CPU_ISA", "AVX2", False),
        ("OTHER", "avx2", True),
    ],
)
@pytest.mark.parametrize("capable", [True, False])
def test_the_hardware_and_what_it_is_told_to_leave_alone(monkeypatch, variable, value, has, capable):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": capable}, raising=False)
    assert multiplies_bfloat16(CPU) is (has and capable)


@pytest.mark.parametrize("has", [True, False])
def test_older_versions_of_torch_are_asked_otherwise(monkeypatch, has):
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert multiplies_bfloat16(CPU) is has


def test_what_is_asked_for_and_what_is_computed(hardware):
    hardware(True)
    assert [usable_precision(p, CPU) for p in ("float32", "bfloat16", "float64")] == ["float32", "bfloat16", "float64"]
    assert precision_label("bfloat16", CPU) == "bfloat16"
    hardware(False)
    assert [usable_precision(p, CPU) for p in ("float32", "bfloat16", "float64")] == ["float32", "float32", "float64"]
    assert precision_label("bfloat16", CPU) == "float32 for bfloat16"
    assert precision_label("float32", CPU) == "float32"
    assert [asked_precision(p) for p in ("float32", "bfloat16", "float32 for bfloat16")] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]


def weights(run):
    return run.model()[0].state_dict()


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_training_without_bfloat16_is_training_in_float32_with_folded_searches(hardware, tmp_path):
    hardware(False)
    low, full = (
        train(tiny(train__precision=p, train__fast=fast, **OPTIONS), tmp_path / p, device="cpu")
        for p, fast in (("bfloat16", "auto"), ("float32", "fold"))
    )
    assert same(weights(low), weights(full))
    assert [run.environment["precision"] for run in (low, full)] == ["float32 for bfloat16", "float32"]
    assert {line["perf/fast"] for line in low.history() if "train/loss" in line} == {"fold"}
    hardware(True)
    real = train(tiny(train__precision="bfloat16", **OPTIONS), tmp_path / "real", device="cpu")
    assert real.environment["precision"] == "bfloat16"
    assert {line["perf/fast"] for line in real.history() if "train/loss" in line} == {"bf16"}
    assert not same(weights(real), weights(full))


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_goes_on_on_the_other_kind_of_machine_and_says_so(hardware, tmp_path, begun):
    recipe = tiny(train__precision="bfloat16", **OPTIONS)

    def stop(line):
        if line["images"] >= 1_000:
            raise KeyboardInterrupt

    hardware(begun)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(recipe, tmp_path / "run", device="cpu", report=stop)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    again = train(recipe, tmp_path / "same", resume=True, device="cpu")
    assert not [line for line in again.history() if line.get("event") == "precision"]
    hardware(not begun)
    words = ["bfloat16", "float32 for bfloat16"]
    now, then = words if not begun else words[::-1]
    with pytest.warns(RuntimeWarning, match=f"the run goes on in {now}; it was begun in {then}"):
        run = train(recipe, tmp_path / "run", resume=True, device="cpu")
    assert run.finished
    (event,) = [line for line in run.history() if line.get("event") == "precision"]
    assert event["reason"] == f"goes on in {now}; begun in {then}"
    train(recipe, tmp_path / "run", resume=True, device="cpu")
    assert len([line for line in run.history() if line.get("event") == "precision"]) == 1, "nothing went on"


def test_searches_of_evaluation_and_sampling_fold_instead(hardware, small_run):
    model, data = small_run.model()[0], small_run.recipe.data.load()
    x = data.val.float()[:4]
    subject = Subject(model, data, data.val.take(slice(50)), Attack(0.9, "l2", steps=3))
    for has, label, way in ((True, "bfloat16", "bf16"), (False, "float32 for bfloat16", "fold")):
        hardware(has)
        assert faster_model(model, x, precision="bfloat16").backend.name == way
        (record,) = RobustAccuracy(precision="bfloat16")(subject, rng.generator(0))
        assert (record.settings["precision"], record.settings["fast"]) == (label, way)


def test_a_record_of_either_kind_of_machine_is_held(hardware, small_run, tmp_path, monkeypatch):
    shutil.copytree(small_run.folder, tmp_path / "run")
    run, threat = Run.open(tmp_path / "run"), Attack(0.5, "l2", steps=1)
    metric = RobustAccuracy(threat, precision="bfloat16", images=50)
    wanted = {Key("accuracy", attack_key(threat)): metric}
    hardware(False)
    (record,) = compare.measure(run, wanted)
    assert record["settings"]["precision"] == "float32 for bfloat16"
    for has in (False, True):
        hardware(has)
        assert compare.measure(run, wanted) == [record]
    assert len(run.records()) == 1
    other = {Key("accuracy", attack_key(threat)): RobustAccuracy(threat, images=50)}
    assert compare.measure(run, other)[0]["settings"]["precision"] == "float32"


class Seen:
    """A metric that notes whether convolutions and matrix products may be rounded to TF32."""

    def __init__(self):
        self.seen = []

    def __call__(self, subject, generator):
        self.seen += [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
        return []


def test_what_is_evaluated_is_not_rounded_to_tf32(small_run):
    model, data, metric = small_run.model()[0], small_run.data, Seen()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        evaluate(Subject(model, data, data.val, Attack(0.9, "l2")), [metric])
        assert metric.seen == [False, False]
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        model.register_forward_hook(lambda *call: metric.seen.append(torch.backends.cudnn.allow_tf32))
        find_verdicts(model, data.val.x[:8], data.val.y[:8], Attack(0.9, "l2", steps=2))
        assert not any(metric.seen)
        with pytest.raises(UserError), float32():
            raise UserError("it ends by an error")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


NEWER = """
import torch
from advebm.models.precision import float32

torch.backends.cudnn.conv.fp32_precision = "tf32"
torch.backends.cuda.matmul.fp32_precision = "tf32"
with float32():
    print(torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
print(torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has only the older settings")
def test_the_newer_settings_of_torch_are_kept_as_well():
    """In a process of its own, as torch takes either the older or the newer ones."""
    done = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "ieee", "tf32", "tf32"], done.stderr
