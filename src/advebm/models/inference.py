"""Faster views of a network for searches such as attacks and sampling: the same outputs up to rounding."""

import copy
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from advebm.core.errors import unknown_name
from advebm.descent import Differentiate, Energy, differentiate
from advebm.models.modes import DualBatchNorm2d, searching
from advebm.models.network import Network, call_foreign, type_of
from advebm.models.precision import Precision, usable_precision

CHECKS = 8  # forward passes that must agree before folding: a random network must not be traced

BackendName = Literal["auto", "off", "fold", "compile", "bf16", "bf16+compile"]


@dataclass(frozen=True)
class Backend:
    """How a search computes the network, which changes its outputs by rounding only.

    Attributes:
        fold: merge batch norms, which are affine in eval mode, into the convolutions before them.
        precision: type of convolutions and linear layers.  Images, their gradients and updates, the normalisation, the
            head and every energy stay float32.
        compiled: use ``torch.compile`` for energies with their gradients at one batch shape; the rest is not compiled.
    """

    fold: bool = True
    precision: Precision = "float32"
    compiled: bool = False

    @property
    def name(self) -> str:
        """Return ``off``, ``fold``, ``compile``, ``bf16`` or ``bf16+compile``."""
        words = ["bf16"] * (self.precision == "bfloat16") + ["compile"] * self.compiled
        return "+".join(words) or ("fold" if self.fold else "off")


BACKENDS = {
    "off": Backend(fold=False),
    "fold": Backend(),
    "compile": Backend(compiled=True),
    "bf16": Backend(precision="bfloat16"),
    "bf16+compile": Backend(precision="bfloat16", compiled=True),
}


def find_backend(backend: str, precision: Precision = "float32") -> Backend:
    """Return the backend that ``--fast`` names; ``auto`` folds and computes in ``precision``.

    Raises:
        UserError: there is no backend of that name.
    """
    if backend == "auto":
        return Backend(precision=precision)
    if backend not in BACKENDS:
        raise unknown_name("fast", backend, ["auto", *BACKENDS])
    return BACKENDS[backend]


Layer = nn.Conv2d | nn.Linear


class LayerCopy(NamedTuple):
    """A layer of a view, and the network's layer and batch norm (or None) that its weights are computed from."""

    layer: Layer
    source: Layer
    norm: nn.BatchNorm2d | None

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the layer's weights from the network's current ones."""
        weight, bias, norm = self.source.weight, self.source.bias, cast(Any, self.norm)
        if norm is not None:
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse_conv_bn_weights(weight, bias, *statistics)
        self.layer.weight.copy_(weight)
        if self.layer.bias is not None and bias is not None:
            self.layer.bias.copy_(bias)


class View(nn.Module):
    """A frozen network in eval mode, with its own copies of weights, which :meth:`refresh` updates from the network.

    Made by :func:`make_view`.  Layers that are neither folded nor in bfloat16 are shared with the network.
    """

    def __init__(self, model: nn.Module, backend: Backend) -> None:
        super().__init__()
        parts = (model.normalise, model.backbone, model.head) if isinstance(model, Network) else (None, model, None)
        self.normalise, self.body, self.head = (nn.Identity() if part is None else part for part in parts)
        self.backend = Backend(fold=False)
        self.compiled: tuple[torch.Size, Differentiate] | None = None
        self.compute: Differentiate = differentiate
        self.kind = type_of(self.body, torch.float32)  # of the images, also where the copies of layers are in bfloat16
        self.copies: list[LayerCopy] = []
        self.searches = 0
        if backend.fold:
            self.body, self.copies = fold(self.body, everything=backend.precision != "float32")
            self.backend = Backend(fold=any(layer_copy.norm is not None for layer_copy in self.copies))

    def lower(self) -> None:
        """Switch to bfloat16: convert the copied layers, and use autocast for the rest."""
        for layer_copy in self.copies:
            layer_copy.layer.to(torch.bfloat16)
        self.backend = replace(self.backend, precision="bfloat16")

    def speed_up(self, shape: torch.Size) -> None:
        """Compile network, energy and gradient as one function, for searches of batches of ``shape``."""
        self.compiled, self.compute = (shape, self.differentiate), compile_gradients()
        self.backend = replace(self.backend, compiled=True)

    def differentiate(self, energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and gradient by the compiled function; of an energy that it does not take, not compiled."""
        if self.compiled is None:
            return differentiate(energy, x)
        try:
            return self.compute(energy, x)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.compiled, self.backend = None, replace(self.backend, compiled=False)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"not compiled: {reason}; searches run with fast {self.backend.name}", RuntimeWarning, 2)
            return differentiate(energy, x)

    def refresh(self) -> "View":
        """Update the copies from the network's current weights and running statistics; return the view."""
        for layer_copy in self.copies:
            layer_copy.refresh()
        self.searches += 1
        return self

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the head, as :meth:`Network.features` does."""
        x = self.normalise(x)
        return call_foreign(self.body, x, self.kind) if isinstance(self.head, nn.Identity) else self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's outputs, in the type of ``x``."""
        if self.backend.precision == "float32":
            return self.head(self.features(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            features = self.features(x)
        return self.head(features.to(x.dtype))


def make_view(model: nn.Module, x: Tensor, backend: Backend, *, loud: bool = False) -> View | None:
    """Return a view of the model for searches in eval mode, with what applies of ``backend``; None if nothing does.

    Outputs differ from the model's by rounding only; evaluate results on the model itself.  A model that cannot be
    traced, or gives other outputs on ``x`` once folded, is not folded.

    Args:
        model: maps images (B, C, H, W) in [0, 1] to outputs.
        x: some images to compare outputs on; with ``compiled``, as many as a search has.
        backend: what to try.
        loud: warn of what does not apply.
    """
    asked, view, reason = backend, None, "there is no batch norm after a convolution"
    if usable_precision(backend.precision, x.device) != backend.precision:
        backend, reason = replace(backend, precision="float32"), f"this {x.device.type} does not multiply in bfloat16"
    eager = replace(backend, compiled=False)
    for candidate in dict.fromkeys((backend, eager, replace(eager, fold=False), replace(eager, precision="float32"))):
        try:
            view = _try_view(model, x, candidate)
            break
        except Exception as error:  # tracing runs the model's code, which may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    used = "off" if view is None else view.backend.name
    if loud and used != asked.name:
        warnings.warn(f"fast {asked.name} does not apply: {reason}; searches run with fast {used}", RuntimeWarning, 2)
    return view if used != "off" else None


def _try_view(model: nn.Module, x: Tensor, backend: Backend) -> View:
    """Return a view after testing it on ``x``.

    Raises:
        ValueError: the view gives other outputs on ``x``.  Whatever the model raises when traced is raised as well.
    """
    with searching(model):
        # both in float32, whatever the model's precision
        view, original = View(model, backend), View(model, Backend(fold=False))
        with torch.no_grad():
            outputs = [original(x[:2]) for _ in range(CHECKS if backend.fold else 0)]
            if not all(torch.allclose(view(x[:2]), expected, rtol=1e-4, atol=1e-4) for expected in outputs):
                raise ValueError("folded it gives other outputs")
        if backend.precision != "float32":
            view.lower()
        if backend.compiled:
            view.speed_up(x.shape)
        if backend.precision != "float32" or backend.compiled:
            compute = view.compute if backend.compiled else differentiate
            compute(lambda z: view(z).flatten(1).sum(1), x)
        return view


def compile_gradients() -> Differentiate:
    """Return :func:`advebm.descent.differentiate`, compiled with the energy, and so the network, that it is given.

    Versions of torch that do not trace ``autograd.grad`` compile the energy and its derivative one by one.
    """
    compiled, options = torch.compile(differentiate, dynamic=False), torch._dynamo.config
    if not hasattr(options, "trace_autograd_ops"):
        return compiled
    return options.patch(trace_autograd_ops=True)(compiled)


def faster_model(model: nn.Module, x: Tensor, *, precision: Precision = "float32") -> nn.Module:
    """Return the model folded and in ``precision``, as far as that applies, for searches inside ``searching``."""
    return make_view(model, x, Backend(precision=precision)) or model


def fold(module: nn.Module, *, everything: bool = False) -> tuple[fx.GraphModule, list[LayerCopy]]:
    """Trace a module and merge batch norms into the convolutions before them; return it and the layers it has copied.

    Args:
        module: in eval mode.
        everything: copy every convolution and linear layer, also those without a batch norm.

    Raises:
        TypeError: the module has :class:`DualBatchNorm2d` layers, of whose branches tracing would keep only one.
    """
    if any(isinstance(m, DualBatchNorm2d) for m in module.modules()):
        raise TypeError("its batch norms have branches")
    traced = fx.symbolic_trace(module)
    layers: dict[Any, Any] = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")

    def called(node: Any, kind: type[nn.Module]) -> bool:
        """Return whether a node is the only call of a layer of exactly this type, which has no hooks."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or calls[node.target] > 1:
            return False
        layer = layers[str(node.target)]
        return type(layer) is kind and not (layer._forward_hooks or layer._forward_pre_hooks)

    norms: dict[Any, nn.BatchNorm2d] = {}
    for node in list(traced.graph.nodes):
        before: Any = node.args[0] if node.args else None
        if not (called(node, nn.BatchNorm2d) and called(before, nn.Conv2d) and len(before.users) == 1):
            continue
        if layers[node.target].running_mean is None:  # it uses batch statistics even in eval mode
            continue
        norms[before.target] = layers[node.target]
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    copies = []
    for node in traced.graph.nodes:
        if node.target in norms or (everything and (called(node, nn.Conv2d) or called(node, nn.Linear))):
            source, norm = layers[node.target], norms.get(node.target)
            layer = copy.deepcopy(source).requires_grad_(False)
            if norm is not None and layer.bias is None:
                layer.bias = nn.Parameter(source.weight.new_zeros(source.out_channels), requires_grad=False)
            copies.append(LayerCopy(layer, source, norm))
            copies[-1].refresh()
            traced.add_submodule(node.target, layer)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, copies
