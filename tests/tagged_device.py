"""A device without hardware: real CPU tensors with a tag, which refuse to mix with tensors that have none.

Inside :func:`tagged_device`, ``x.to("cuda")`` copies a tensor and tags its storage.  A dispatch mode passes the tag on
from the arguments of every operator to its results, below autograd and in the backward pass, and raises what CUDA
raises where an operator meets tensors of both kinds.  A function mode answers ``x.device`` and takes the device out of
``device="cuda"``.  Generators know the device they were made for.  ``torch.save`` writes the device, and ``torch.load``
without ``map_location`` fails outside, as on a machine without a GPU.

Why not otherwise.  FakeTensorMode has tensors without values, so every ``if`` on a tensor, mask and ``.item()`` fails,
which attacks and metrics are full of; ``module.to`` and ``torch.Generator("cuda")`` raise in a CPU build.  Operators of
a PrivateUse1 backend have to be compiled, or written in Python one by one, and its generator is C++.  A wrapper
subclass needs code of its own for deepcopy, saving, tracing and functional transforms.  With tags values, strides,
views and autograd are those of the CPU, so that a result on the device has to equal the CPU's bit for bit, which the
tests ask for as well.

What tags cannot see:

- operators that a GPU lacks for a type, or computes with other rounding; memory formats that cuDNN chooses
- kernels: ``torch.compile``, CUDA graphs, fused optimisers, autocast, TF32, asynchronous copies, out of memory
- NCCL, several GPUs (there is one index), and whether accelerate chooses the GPU
- tensors that an operator makes within itself are trusted: Python code of torch and the formulas of its backward pass
- numbers of ``torch.manual_seed`` and the default generator, which on a GPU is another one
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.serialization
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
PACKAGE = str(Path(__file__).parents[1] / "src" / "advebm")

# Operators that take tensors of both devices: copies, and indices on the host.
COPIES = {"copy_", "_to_copy", "_copy_from", "set_"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
# Operators for which a tensor without dimensions counts as one of its device; others take it as a number.
STRICT = {"cat", "stack", "gather", "scatter", "scatter_", "index_select", "masked_fill"}
# Operators whose result's shape, or the number they return, the host waits for.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount"}
WAITS |= {"unique_consecutive", "allclose", "linalg_eigh", "_linalg_eigh", "linalg_svd", "_linalg_svd", "linalg_qr"}


class Generator(torch.Generator):
    """A CPU generator that says it is of the device it was made for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self.place = DEVICE if is_tagged_name(device) else HOST

    @property
    def device(self) -> torch.device:
        return self.place


def is_tagged_name(device: Any) -> bool:
    """Whether a device, its name or its number is the tagged one."""
    return isinstance(device, int) or torch.device(device).type == DEVICE.type


class Tags:
    """The tagged storages, those that an operator made without saying where, and what made the host wait.

    Attributes:
        waits: synchronisations in the order they happened, and calls of ``backward``: what it was, and the line of the
            package that called it.
        allows_float64: whether the device has float64; Apple's has none.
    """

    tagged: ClassVar[dict[int, StorageWeakRef]] = {}  # also of earlier uses, whose tensors may be in a cache

    def __init__(self, allows_float64: bool) -> None:
        self.undecided: dict[int, StorageWeakRef] = {}
        self.waits: list[tuple[str, str]] = []
        self.allows_float64 = allows_float64

    def has(self, x: Tensor, where: dict[int, StorageWeakRef] | None = None) -> bool:
        """Whether a tensor is on the device."""
        reference = (self.tagged if where is None else where).get(storage(x)._cdata)
        return reference is not None and not reference.expired()

    def undecided_has(self, x: Tensor) -> bool:
        return self.has(x, self.undecided)

    def put(self, x: Tensor, *, tagged: bool) -> None:
        """Tag a tensor's storage, or take its tag away."""
        key = storage(x)._cdata
        self.undecided.pop(key, None)
        if not tagged:
            self.tagged.pop(key, None)
            return
        if x.dtype == torch.float64 and not self.allows_float64:
            raise TypeError("this device has no float64")
        self.tagged[key] = StorageWeakRef(storage(x))  # which keeps the address from being used again
        if len(self.tagged) % 5000 == 0:
            for old in [key for key, reference in self.tagged.items() if reference.expired()]:
                del self.tagged[old]

    def leave_open(self, x: Tensor) -> None:
        self.tagged.pop(storage(x)._cdata, None)
        self.undecided[storage(x)._cdata] = StorageWeakRef(storage(x))

    def note_wait(self, name: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
        line = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else "test"
        self.waits.append((name, line))

    def counts(self) -> Counter[tuple[str, str]]:
        return Counter(self.waits)


def storage(x: Tensor) -> torch.UntypedStorage:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()


def tensors_in(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout is torch.strided and not t.is_meta]


class Operators(TorchDispatchMode):
    """Pass tags on from arguments to results; refuse to mix."""

    def __init__(self, tags: Tags) -> None:
        super().__init__()
        self.tags = tags

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = tensors_in((args, kwargs))
        known = [t for t in given if not self.tags.undecided_has(t)]
        tagged = [t for t in known if self.tags.has(t)]
        host = [t for t in known if not self.tags.has(t)]
        if tagged and host and name not in COPIES:
            self.check(name, args, tagged, host)
        if tagged:
            self.count(name, args)
        out = func(*args, **kwargs)
        before = {storage(t)._cdata for t in given}
        for t in tensors_in(out):
            if storage(t)._cdata not in before:
                if tagged:
                    self.tags.put(t, tagged=True)
                elif host:
                    self.tags.put(t, tagged=False)
                else:
                    self.tags.leave_open(t)
        return out

    def check(self, name: str, args: Any, tagged: list[Tensor], host: list[Tensor]) -> None:
        """Raise RuntimeError, as CUDA does, unless the host's tensors are numbers or indices."""
        if name in INDEXING:
            if not self.tags.has(args[0]):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            values = args[2] if len(args) > 2 else None
            if values is None or values.ndim == 0 or self.tags.has(values) or self.tags.undecided_has(values):
                return
        elif name not in STRICT and all(t.ndim == 0 for t in host):
            return
        shapes = f"{[tuple(t.shape) for t in tagged]} and {[tuple(t.shape) for t in host]}"
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name}: "
            f"{shapes})"
        )

    def count(self, name: str, args: Any) -> None:
        """Note an operator that makes the host wait for the device."""
        if name in WAITS or (name == "repeat_interleave" and isinstance(args[0], Tensor) and len(args) < 2):
            self.tags.note_wait(name)
        elif name in INDEXING:
            indices = [i for i in args[1] if i is not None]
            number = len(args) > 2 and args[2].numel() == 1 and not self.tags.has(args[2])  # filled, not indexed
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices) and not number:
                self.tags.note_wait("mask")
            elif any(not self.tags.has(i) for i in indices):
                self.tags.note_wait("to device")
        elif name == "copy_" and isinstance(args[1], Tensor) and args[1].ndim:
            to, of = self.tags.has(args[0]), self.tags.has(args[1])
            if to != of and not self.tags.undecided_has(args[1]):
                self.tags.note_wait("to device" if to else "to host")


GETTERS = {
    Tensor.device.__get__: lambda tagged, x: DEVICE if tagged else x.device,
    Tensor.is_cuda.__get__: lambda tagged, x: tagged,
    Tensor.is_cpu.__get__: lambda tagged, x: not tagged and x.is_cpu,
    Tensor.get_device: lambda tagged, x: 0 if tagged else -1,
}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}


class Functions(TorchFunctionMode):
    """Answer ``x.device``, move and make tensors on the device, and refuse generators of the other one."""

    def __init__(self, tags: Tags) -> None:
        super().__init__()
        self.tags = tags

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in GETTERS:
            return GETTERS[func](self.tags.has(args[0]), args[0])
        if func in MOVES:
            return self.move(func, args, kwargs)
        if func in TO_NUMPY and self.tags.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.tolist and self.tags.has(args[0]):
            self.tags.note_wait("to host")
        given = tensors_in((args, kwargs))
        target: bool | None = None
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type in (DEVICE.type, HOST.type):
            target, kwargs["device"] = is_tagged_name(kwargs["device"]), HOST
        elif func in (Tensor.new_tensor, Tensor.__deepcopy__):
            target = self.tags.has(args[0])
        self.check_generator(kwargs.get("generator"), given, target)
        out = func(*args, **kwargs)
        if func is Tensor.backward:
            self.tags.note_wait("backward")
        results = tensors_in(out) if isinstance(out, Tensor | tuple | list) else []
        if target is not None and isinstance(out, Tensor):
            return self.place(out, given, tagged=target, copied=func in (torch.tensor, Tensor.new_tensor))
        inherited = any(self.tags.has(t) for t in given)
        for t in results:
            if self.tags.undecided_has(t):
                self.tags.put(t, tagged=inherited)
        return out

    def place(self, out: Tensor, given: list[Tensor], *, tagged: bool, copied: bool = False) -> Tensor:
        """Return a result on the device that was asked for; a copy if it shares memory with an argument elsewhere."""
        if self.tags.has(out) != tagged and (shares := any(storage(out)._cdata == storage(t)._cdata for t in given)):
            out = out.clone()
        else:
            shares = False
        if (copied and tagged) or (shares and tagged):
            self.tags.note_wait("to device")
        elif shares:
            self.tags.note_wait("to host")
        if self.tags.has(out) != tagged or self.tags.undecided_has(out):
            self.tags.put(out, tagged=tagged)
        return out

    def move(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """``x.to(…)``, ``x.cpu()`` and ``x.cuda()``, with the device taken out of the arguments."""
        x, rest, target = args[0], list(args[1:]), None
        if func is not Tensor.to:
            target, func, rest = func is Tensor.cuda, Tensor.to, []
        elif rest and isinstance(rest[0], Tensor):
            target, rest[0] = self.tags.has(rest[0]), rest[0].dtype
        elif rest and isinstance(rest[0], str | torch.device | int):
            place = rest.pop(0)
            if torch.device(place).type not in (DEVICE.type, HOST.type):
                return func(*args, **kwargs)
            target = is_tagged_name(place)
        elif kwargs.get("device") is not None:
            target = is_tagged_name(kwargs.pop("device"))
        if isinstance(other := kwargs.pop("other", None), Tensor):
            target, rest = self.tags.has(other), [other.dtype]
        kwargs.pop("device", None)
        rest = [] if rest[:1] == [None] else rest  # no dtype, and whether it is asynchronous
        was = self.tags.has(x)
        if target is None or target == was:
            return func(x, *rest, **kwargs) if rest or kwargs else x
        out = func(x, *rest, **kwargs) if rest or kwargs else x
        if storage(out)._cdata == storage(x)._cdata:
            out = out.clone()
        self.tags.note_wait("to device" if target else "to host")
        self.tags.put(out, tagged=target)
        return out

    def check_generator(self, generator: Any, given: list[Tensor], target: bool | None) -> None:
        if generator is None:
            return
        tagged = any(self.tags.has(t) for t in given) if target is None else target
        if tagged != (generator.device.type == DEVICE.type):
            expected, found = ("cuda", "cpu") if tagged else ("cpu", "cuda")
            raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{found}'")


def group_by_device(tags: Tags, original: Any) -> Any:
    """Return what torch groups gradients and weights with by device, a function that only sees the CPU otherwise."""

    def group(tensors: Any, with_indices: bool = False) -> Any:
        groups = original(tensors, with_indices)
        return {(DEVICE if tags.has(g[0][0][0]) else place, kind): g for (place, kind), g in groups.items()}

    return group


@contextlib.contextmanager
def tagged_device(*, float64: bool = True, loads: bool = True) -> Iterator[Tags]:
    """Make ``cuda`` a device on which everything works as on the CPU, but mixes with nothing; yield its tags.

    Without ``loads`` a file with tensors of the device is refused, as on a machine that has none.
    """
    tags, registry = Tags(float64), torch.serialization._package_registry
    made, saved, named, forked = torch.Generator, list(registry), torch.cuda.get_device_name, torch.random.fork_rng
    grouping = torch._C._group_tensors_by_device_and_dtype
    try:
        torch._C._group_tensors_by_device_and_dtype = group_by_device(tags, grouping)
        torch.cuda.get_device_name = lambda device=None: "a tagged device"
        torch.random.fork_rng = lambda devices=None, **options: forked([], **options)
        torch.Generator = Generator  # type: ignore[misc]
        torch.serialization.register_package(
            -1,
            lambda s: "cuda:0" if s._cdata in tags.tagged and not tags.tagged[s._cdata].expired() else None,
            lambda s, place: _load_tagged(tags, s, place) if loads else None,
        )
        with Operators(tags), Functions(tags):
            yield tags
    finally:
        torch.Generator = made  # type: ignore[misc]
        torch.cuda.get_device_name, torch.random.fork_rng = named, forked
        torch._C._group_tensors_by_device_and_dtype = grouping
        registry[:] = saved


def _load_tagged(tags: Tags, loaded: Any, place: str) -> Any:
    """What ``torch.load`` calls with a storage that was saved on the device and is not mapped elsewhere."""
    if not str(place).startswith("cuda"):
        return None
    tags.tagged[loaded._cdata] = StorageWeakRef(loaded)
    return loaded
