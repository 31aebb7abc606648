"""The precision of a network's computation: the requested one, or float32 where the device only emulates it."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from advebm.core.errors import UserError
from advebm.core.floats import widest

Precision = Literal["float32", "bfloat16"]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 itself; emulation is about twelve times slower than float32.

    A CPU on which ``ATEN_CPU_CAPABILITY`` or ``ONEDNN_MAX_CPU_ISA`` disables such instructions does not.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False  # as far as is known
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
        return False
    bound = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if not re.search("BF16|FP16|AMX|AVX10|DEFAULT|ALL", bound.upper()):
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())  # older versions of torch


def usable_precision(asked: str, device: torch.device) -> str:
    """Return ``asked``, or ``float32`` if that is ``bfloat16`` and the device does not multiply in it.

    Raises:
        UserError: ``asked`` is ``float64``, which the device does not have.
    """
    if asked == "float64" and widest(device) != torch.float64:
        raise UserError(f"{device.type} has no float64; set --train.precision float32, or --device cpu")
    return "float32" if asked == "bfloat16" and not multiplies_bfloat16(device) else asked


def precision_label(asked: str, device: torch.device) -> str:
    """Return the label in records and env.json: ``bfloat16``, ``float32``, or ``float32 for bfloat16``."""
    used = usable_precision(asked, device)
    return asked if used == asked else f"{used} for {asked}"


def asked_precision(label: str) -> str:
    """Return the requested precision, given a label of :func:`precision_label`."""
    return label.rpartition(" for ")[2]


@contextmanager
def float32() -> Iterator[None]:
    """Compute float32 as float32 on NVIDIA GPUs, too, where torch rounds the inputs of convolutions to TF32.

    That type has the 10 bits of a half's mantissa.  Training, samplers and edits leave torch's setting as it is; what
    is evaluated is computed here, attacks included.
    """
    try:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody has set ``fp32_precision``, of torch 2.9 and later, which these must not join
        with _fp32_precision("ieee"):
            yield
        return
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@contextmanager
def _fp32_precision(kind: str) -> Iterator[None]:
    """Set ``fp32_precision`` of convolutions and matrix products, on NVIDIA GPUs and CPUs."""
    backends: Any = torch.backends
    parts = (
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
    )
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = kind
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value
