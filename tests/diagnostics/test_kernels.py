"""Convolutions of this machine beside float64, and how a wrong one is avoided and found."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, cross_entropy

from advebm import cli
from advebm.core.errors import UserError
from advebm.diagnostics import kernels
from advebm.diagnostics.kernels import Convolution, Verdict, check, convolutions, errors
from advebm.models.layers import avoid_wrong_gradient
from advebm.models.network import Architecture
from advebm.models.resnet import PreActResNet, ResNet

PLAIN = Convolution((4, 8, 6, 6), (5, 8, 3, 3), (False, False), True, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)


# Avoided --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 3, 7])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_strided_convolution_of_few_channels_is_the_same_function(channels, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 6, 1, stride=2).double()
    x = torch.rand(4, channels, 9, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    expected = conv2d(x, conv.weight, conv.bias, stride=2)
    wanted = torch.autograd.grad(expected.square().sum(), (x, conv.weight))
    own = nn.Sequential(conv)
    avoid_wrong_gradient(own)
    avoid_wrong_gradient(own)  # nothing is left to do
    assert conv.stride == (1, 1)
    torch.testing.assert_close(own(x), expected)
    torch.testing.assert_close(torch.autograd.grad(own(x).square().sum(), (x, conv.weight)), wanted)
    assert list(own.state_dict()) == ["0.weight", "0.bias"]


def test_others_are_left_alone():
    for conv in (
        nn.Conv2d(1, 6, 1, stride=2),
        nn.Conv2d(8, 6, 1, stride=2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 1, stride=2, padding=1),
        nn.Conv2d(4, 6, 1, stride=2, groups=2),
    ):
        stride = conv.stride
        avoid_wrong_gradient(conv)
        assert conv.stride == stride
        assert not conv._forward_pre_hooks


@pytest.mark.parametrize("backbone", [PreActResNet(width=2), ResNet(8, width=3), ResNet(8, width=4)])
def test_no_network_calls_the_wrong_kernel(backbone):
    """And its gradients are float64's, on a CPU that has that kernel and on others."""
    model = Architecture(backbone, 5, 3, 16, (0.4,) * 3, (0.3,) * 3).build(0)
    called = convolutions(model, (3, 16, 16), 4)
    assert {c.weight[2:] for c in called} == {(3, 3), (1, 1)}
    assert not any(c.weight[2:] == (1, 1) and c.stride != (1, 1) and 1 < c.input[1] < 8 for c in called)
    x, y, found = torch.rand(16, 3, 16, 16, dtype=torch.float64), torch.arange(16) % 5, []
    for dtype in (torch.float64, torch.float32):
        own = model.to(dtype).train()
        for _ in range(3):
            own.zero_grad()
            cross_entropy(own(x.to(dtype)), y).backward()
        found.append({name: p.grad.double() for name, p in own.named_parameters()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6, name


def small():
    """A module of one's own; only evaluated, it keeps its stride."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10))


# Found ----------------------------------------------------------------------------------------------------------------


def test_convolutions_are_recorded_as_they_are_called():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.ConvTranspose2d(4, 2, 2, stride=2))
    first, second = convolutions(model.to(memory_format=torch.channels_last), (3, 8, 8), 5)
    assert first == Convolution(
        (5, 3, 8, 8), (4, 3, 3, 3), (False, True), False, (2, 2), (1, 1), (1, 1), False, (0, 0), 1
    )
    assert (second.transposed, second.bias, second.outputs) == (True, True, 2)
    assert str(first) == "3x3 convolution of 3 channels to 4, stride 2, 5 images of 8x8, channels last, float32"


@pytest.mark.parametrize(
    "shape",
    [
        PLAIN,
        replace(PLAIN, channels_last=(True, True)),
        replace(PLAIN, groups=4, weight=(8, 2, 3, 3)),
        replace(PLAIN, transposed=True, weight=(8, 5, 3, 3), stride=(2, 2), output_padding=(1, 1)),
        replace(PLAIN, dtype="bfloat16"),
    ],
)
def test_right_kernels_are_right(shape):
    found = errors(shape)
    assert len(found) == 3
    assert max(found) < kernels.TOLERANCE[shape.dtype] / 3
    if shape.dtype == "bfloat16":
        assert min(found) > 1e-5, "it was computed in bfloat16"


def test_a_wrong_gradient_shows(monkeypatch):
    real = torch.convolution

    def wrong(x, w, *rest):
        return real(x, w if w.dtype == torch.float64 else w * 1.001, *rest)

    monkeypatch.setattr(torch, "convolution", wrong)
    found = errors(PLAIN)
    assert found == pytest.approx([1e-3] * 3, rel=0.3)
    verdict = Verdict(PLAIN, found)
    assert verdict.wrong
    assert "output off by 0.001, gradient of the images off by 0.001" in str(verdict)
    assert Verdict(PLAIN, (0.0, float("nan"), 0.0)).wrong
    assert not Verdict(PLAIN, (1e-6,) * 3).wrong


FAKE = """
import os, sys, time, json
print("a library says something")
print("ready", flush=True)
for line in sys.stdin:
    channels = json.loads(line)["input"][1]
    for call in range(3):
        if channels == 11:
            os.abort()
        if channels == 12:
            time.sleep(60)
        print(json.dumps([0.5 if channels == 13 and call == 1 else 1e-7] * 3), flush=True)
    print("[]", flush=True)
"""


def test_a_process_that_dies_or_hangs_costs_its_shape_alone(monkeypatch, tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(kernels, "COMMAND", (sys.executable, str(tmp_path / "fake.py")))
    monkeypatch.setattr(kernels, "CALL_TIMEOUT", 1.0)
    shapes = [replace(PLAIN, input=(4, n, 6, 6)) for n in (10, 11, 12, 13, 14)]
    seen = []
    verdicts = list(check(shapes, progress=seen.append))
    assert [v.died for v in verdicts] == ["", "killed by signal 6", "never returned in 1 s", "", ""]
    assert [v.wrong for v in verdicts] == [False, True, True, True, False]
    assert verdicts[3].errors == (0.5,) * 3, "the worst of three calls"
    assert seen == [0, 1, 2, 3, 4, 5]
    assert list(check(shapes, limit=0.0)) == []
    assert [v.wrong for v in check(shapes[::2], limit=0.5)] == [False], "too little time is no verdict"


def test_a_process_that_does_not_start_is_no_wrong_convolution(monkeypatch):
    monkeypatch.setattr(kernels, "COMMAND", (sys.executable, "-c", "raise SystemExit('no torch here')"))
    with pytest.raises(UserError, match=r"does not start: no torch here"):
        list(check([PLAIN]))


@pytest.mark.slow
def test_the_command_checks_a_model(small_run, capsys):
    assert cli.main(["doctor", "--machine", str(small_run.folder)]) == 0
    out = capsys.readouterr().out
    assert "TFLOP/s in products" in out
    assert "agree with float64, in float32 to" in out
    assert cli.main(["doctor", "--machine", str(small_run.folder), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["wrong"] for row in rows[1:]] == [False] * (len(rows) - 1)
    assert len(rows) > 2
    assert cli.main(["doctor", "--machine", "tests.diagnostics.test_kernels:small"]) == 2
    assert "give --data NAME" in capsys.readouterr().err
    assert cli.main(["doctor", "--machine", "tests.diagnostics.test_kernels:small", "--data", "digits"]) == 0
    assert "1 of 1 convolutions" in capsys.readouterr().out.replace("2 of 2", "1 of 1")
    assert cli.main(["doctor", "--machine", "--device", "cuda"]) == 2
    assert "--machine checks the CPU" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 2
    assert "doctor takes a RUN or any model, or --machine" in capsys.readouterr().err


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="a kernel of x86")
@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="docs/cpu.md is about torch 2.13")
def test_the_kernel_of_the_docs_is_still_wrong():
    """In a process that may use AVX2 and no more; the day this fails, :func:`avoid_wrong_gradient` can go."""
    code = (
        "from advebm.diagnostics.kernels import *; print(any(v.wrong for _ in range(3) for v in check([KNOWN_WRONG])))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
