"""Residual networks re-derived from the papers in torch.nn.functional, reading a state_dict by name.

``w`` is the state_dict, ``act`` a function.  A norm whose weights are missing is none, one without running statistics
is a group norm of 8 groups; batch norm is in eval mode.
"""

import torch.nn.functional as F


def conv(w, name, x, stride=1):
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, padding=(kernel.shape[2] - 1) // 2)


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


def bottleneck(w, name, x, stride, act):
    """He et al. (2016), fig. 5 right, the stride on the 3x3 convolution."""
    y = act(norm(w, f"{name}.residual.1", conv(w, f"{name}.residual.0", x)))
    y = act(norm(w, f"{name}.residual.4", conv(w, f"{name}.residual.3", y, stride)))
    y = norm(w, f"{name}.residual.7", conv(w, f"{name}.residual.6", y))
    if f"{name}.shortcut.0.weight" in w:
        x = norm(w, f"{name}.shortcut.1", conv(w, f"{name}.shortcut.0", x, stride))
    return act(y + x)


def preactivation(w, name, x, stride, act):
    """He et al. (2016b), eq. 6 and appendix: the first activation of a unit that changes the shape is shared."""
    a = act(norm(w, f"{name}.opening.0", x))
    y = conv(w, f"{name}.residual.0", a, stride)
    y = conv(w, f"{name}.residual.3", act(norm(w, f"{name}.residual.1", y)))
    return y + (conv(w, f"{name}.shortcut", a, stride) if f"{name}.shortcut.weight" in w else x)


def logits(w, x, counts, block, act):
    """``counts``: blocks a stage; stages after the first begin with stride 2."""
    x = (x - w["normalise.mean"]) / w["normalise.std"]
    if block is preactivation:
        x = conv(w, "backbone.stem", x)
    else:
        x = act(norm(w, "backbone.stem.1", conv(w, "backbone.stem.0", x)))
    for i, count in enumerate(counts):
        for j in range(count):
            x = block(w, f"backbone.stages.{i}.{j}", x, 2 if i > 0 and j == 0 else 1, act)
    if block is preactivation:
        x = act(norm(w, "backbone.closing.0", x))
    return F.adaptive_avg_pool2d(x, 1).flatten(1) @ w["head.weight"].T + w["head.bias"]
