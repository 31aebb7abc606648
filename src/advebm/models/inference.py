"""A network as it is searched: the same function of its input, computed faster."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from advebm.energies import Logits
from advebm.models.network import Network

LOOKS = 8  # at a network, which may be random: tracing would keep one of its ways


def faster(model: nn.Module, x: Tensor, *, precision: torch.dtype = torch.float32) -> Logits:
    """The model with its batch norms folded into the convolutions before them, for searches in eval mode.

    Logits differ from the model's by rounding only; whoever judges asks the model itself.  What cannot be traced, or
    does not give the same logits on ``x``, is left as it is.

    Args:
        model: frozen and in eval mode, as inside :func:`advebm.modes.searching`.
        x: some images (B, C, H, W), to compare on.
        precision: what the network computes in, by autocast; gradients and logits stay float32.
    """
    f = _checked(model, x)
    if precision == torch.float32:
        return f

    def low(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, precision):
            return f(x).float()

    return low


@contextmanager
def float32() -> Iterator[None]:
    """Convolutions in float32 on GPUs, too, where cuDNN would round their inputs to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _checked(model: nn.Module, x: Tensor) -> nn.Module:
    """The folded model, if there is one with the same logits on ``x``."""
    try:
        folded = model
        if isinstance(model, Network):
            folded = Network(model.normalise, fold(model.backbone), model.head).eval()
        elif list(model.children()):
            folded = fold(model)
        with torch.no_grad():
            looks = [model(x) for _ in range(LOOKS)]
            same = all(torch.allclose(folded(x), look, rtol=1e-4, atol=1e-4) for look in looks)
    except Exception:  # tracing runs the model's own code, which may do anything
        return model
    return folded if same else model


def fold(module: nn.Module) -> nn.Module:
    """A traceable module without the batch norms that follow a convolution."""
    traced = fx.symbolic_trace(module)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if not (node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d)):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1 or not isinstance(modules[before.target], nn.Conv2d):
            continue
        conv = fuse_conv_bn_eval(modules[before.target], modules[node.target])
        traced.add_submodule(before.target, conv)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
