"""Residual networks re-derived from the papers in torch.nn.functional, reading a state_dict by name.

``w`` is the state_dict, ``act`` a function.  A norm whose weights are missing is none, one without running statistics
is a group norm of 8 groups; batch norm is in eval mode.
"""

import torch
import torch.nn.functional as F


def conv(w, name, x, stride=1, same=False):
    """``same``: "same" padding of TensorFlow, which for a stride of 2 and an even size is behind the image alone."""
    kernel = w[f"{name}.weight"]
    size, padding = kernel.shape[2], (kernel.shape[2] - 1) // 2
    if same and stride == 2 and size == 3:
        x, padding = F.pad(x, (0, 1, 0, 1)), 0
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, padding=padding)


def norm(w, name, x):
    if f"{name}.weight" not in w:
        return x
    scale, shift = w[f"{name}.weight"], w[f"{name}.bias"]
    if f"{name}.running_mean" not in w:
        return F.group_norm(x, 8, scale, shift)
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    column = lambda v: v[None, :, None, None]
    return (x - column(mean)) / (column(var) + 1e-5).sqrt() * column(scale) + column(shift)


def basic(w, name, x, stride, act):
    """He et al. (2016), fig. 5 left: y = σ(F(x) + Wx)."""
    y = act(norm(w, f"{name}.residual.1", conv(w, f"{name}.residual.0", x, stride)))
    y = norm(w, f"{name}.residual.4", conv(w, f"{name}.residual.3", y))
    if f"{name}.shortcut.0.weight" in w:
        x = norm(w, f"{name}.shortcut.1", conv(w, f"{name}.shortcut.0", x, stride))
    return act(y + x)


def padded(w, name, x, stride, act):
    """He et al. (2016), option A: "extra zero entries padded for increasing dimensions", the stride "across" sizes."""
    y = act(norm(w, f"{name}.residual.1", conv(w, f"{name}.residual.0", x, stride)))
    y = norm(w, f"{name}.residual.4", conv(w, f"{name}.residual.3", y))
    half = (y.shape[1] - x.shape[1]) // 2
    z = torch.zeros_like(y)
    z[:, half : half + x.shape[1]] = x[:, :, ::stride, ::stride]
    return act(y + z)


def bottleneck(w, name, x, stride, act):
    """He et al. (2016), fig. 5 right, the stride on the 3x3 convolution."""
    y = act(norm(w, f"{name}.residual.1", conv(w, f"{name}.residual.0", x)))
    y = act(norm(w, f"{name}.residual.4", conv(w, f"{name}.residual.3", y, stride)))
    y = norm(w, f"{name}.residual.7", conv(w, f"{name}.residual.6", y))
    if f"{name}.shortcut.0.weight" in w:
        x = norm(w, f"{name}.shortcut.1", conv(w, f"{name}.shortcut.0", x, stride))
    return act(y + x)


def preactivation(w, name, x, stride, act, *, bare=False, late=False, same=False):
    """He et al. (2016b), eq. 6 and appendix: the first activation of a unit that changes the shape is shared.

    ``bare``: it is not, ``late``: the second convolution has the stride, ``same``: see :func:`conv`.
    """
    a = act(norm(w, f"{name}.opening.0", x))
    y = conv(w, f"{name}.residual.0", a, 1 if late else stride, same)
    y = conv(w, f"{name}.residual.3", act(norm(w, f"{name}.residual.1", y)), stride if late else 1)
    if f"{name}.shortcut.weight" in w:
        x = conv(w, f"{name}.shortcut", x if bare else a, stride, same)
    return y + x


def logits(w, x, counts, block, act, closing=True, imagenet=False):
    """``counts``: blocks a stage; stages after the first begin with stride 2."""
    x = (x - w["normalise.mean"]) / w["normalise.std"]
    before = "backbone.stem.weight" in w
    if before:
        x = conv(w, "backbone.stem", x)
    else:
        x = act(norm(w, "backbone.stem.1", conv(w, "backbone.stem.0", x, 2 if imagenet else 1)))
    if imagenet:
        x = F.max_pool2d(x, 3, 2, padding=1)
    for i, count in enumerate(counts):
        for j in range(count):
            x = block(w, f"backbone.stages.{i}.{j}", x, 2 if i > 0 and j == 0 else 1, act)
    if before and closing:
        x = act(norm(w, "backbone.closing.0", x))
    return F.adaptive_avg_pool2d(x, 1).flatten(1) @ w["head.weight"].T + w["head.bias"]
