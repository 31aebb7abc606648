"""Validation of the images, labels, outputs and devices that callers pass in."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from advebm.core.errors import UserError


def device(name: str | None = None) -> str:
    """Return the name of an available device, such as ``cuda:1``, else raise UserError; default: cuda, else cpu."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.empty(0, device=name).device.type
    except (RuntimeError, AssertionError):  # what torch raises depends on how it was built
        kind = ""
    if kind in ("", "meta"):
        gpus = f"; cuda is the first of {count} GPUs" if (count := torch.cuda.device_count()) > 1 else ""
        raise UserError(f"there is no device {name!r} here; there is {', '.join(devices())}{gpus}")
    return "cpu" if kind == "cpu" else name


def devices() -> list[str]:
    """Return the names of the devices that there are: ``cpu``, then every GPU."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names = ["cpu", *(["cuda"] if gpus else []), *gpus[1:]]
    return names + ["mps"] * torch.backends.mps.is_available()


ROUNDING = 1e-5  # how far outside [0, 1] images may lie by rounding, as after resizing


def images(x: Tensor) -> Tensor:
    """Return ``x`` if it is floating point (B, C, H, W) in [0, 1], else raise UserError.

    What lies outside by rounding is clamped.  The result is no inference tensor, so gradients can be computed for it.
    """
    if not isinstance(x, Tensor) or x.ndim != 4:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"images are a tensor (batch, channels, height, width), got {got}")
    if not x.dtype.is_floating_point:
        raise UserError(f"images are floating point in [0, 1], got {x.dtype}; divide bytes by 255")
    if x.numel():
        low, high = x.min().item(), x.max().item()
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also catches NaN
            if x.isnan().any():
                raise UserError("images must lie in [0, 1], and some are NaN")
            fix = "divide by 255" if high > 2 else "undo the normalisation: it is the first layer of the model"
            raise UserError(f"images must lie in [0, 1], got [{low:.6g}, {high:.6g}]; {fix}")
        x = x if low >= 0 and high <= 1 else x.clamp(0, 1)
    return _without_inference(x)


def _without_inference(x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


def outputs(f: Callable[[Tensor], Tensor], x: Tensor, who: str) -> Tensor:
    """Return ``f(x)``; raise UserError, which names ``who``, if a user's own code fails on these images."""
    try:
        return f(x)
    except UserError:
        raise
    except Exception as error:  # a user's own code can raise anything
        shape = " x ".join(map(str, x.shape[1:]))
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{who} does not take images of {shape}: {why}") from error


def labels(y: Tensor, count: int | None, classes: int) -> Tensor:
    """Return ``y`` if it is int64 (B,) in 0 … classes - 1 and of length ``count`` (None: any), else raise UserError."""
    if not isinstance(y, Tensor) or y.ndim != 1 or count not in (None, len(y)):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise UserError(f"labels are a tensor ({'B' if count is None else count},), one for each image, got {got}")
    if y.dtype != torch.int64:
        raise UserError(f"labels are int64, got {y.dtype}; call y.long()")
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < classes):
        raise UserError(f"labels must lie in 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    return _without_inference(y)


def no_encoder(model: nn.Module) -> None:
    """Raise UserError for an encoder: it has embeddings but no logits."""
    if getattr(model, "encoder", False):
        raise UserError("the model is an encoder, which has no logits; advebm probe makes a classifier of its run")


def logits(out: Tensor, count: int) -> Tensor:
    """Return outputs that are finite logits (B, K), else raise UserError.

    Probabilities and their logarithms are refused, because they have no energies: rows that sum to 1, or whose
    exponentials do.  Where all rows are alike or almost one-hot this may be chance, and is only a warning.
    """
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != count:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        fix = "; flatten them: .flatten(1)" if isinstance(out, Tensor) and out.ndim > 2 and len(out) == count else ""
        raise UserError(f"a classifier returns logits (batch, classes) = ({count}, K), got {got}{fix}")
    if not torch.isfinite(out).all():
        raise UserError("the model returns NaN or infinite logits for images in [0, 1]")
    if not out.numel() or out.shape[1] < 2:
        return out
    if out.min() >= 0 and _all_near(out.sum(1), 1):
        text, largest = "probabilities (each row sums to 1); return logits: remove the softmax", out.amax(1)
    elif out.max() <= 0 and _all_near(out.logsumexp(1), 0):
        text, largest = "log-probabilities, whose energy is 0; return logits: remove the log-softmax", out.amax(1).exp()
    else:
        return out
    if bool((largest > 0.99).all()) or (len(out) > 1 and bool((out == out[:1]).all())):
        warnings.warn(f"if the model returns {text}; else this is chance", stacklevel=3)
        return out
    raise UserError(f"the model returns {text}")


def _all_near(values: Tensor, target: float) -> bool:
    return bool(((values - target).abs() < 1e-2).all())  # as near as in bfloat16
