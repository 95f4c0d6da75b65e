"""A device that is not there: tensors that say `cuda:0`, hold their values on the CPU, and refuse what CUDA refuses.

Every operation on such tensors passes `Standin`, below autograd. It checks the rules (devices of operands, of indices and of generators;
dtypes that have no kernel), counts what would cost time on a GPU, and computes on the CPU. Counted are kernels, points at which the host
waits for the device, and bytes that pass between the two. What a step costs in these does not depend on the machine.

torch's C++ takes the tensors for `meta` tensors of number 7, since a build for the CPU has no word for others. That number tells them from
meta tensors that somebody else makes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA, META = torch.device("cuda", 0), torch.device("meta", 7)
MEMORY = 80 * 2**30
"""Bytes that the device says it has."""


class Violation(AssertionError):
    """Something that a GPU would refuse."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device. held: its values, on the CPU; views hold views."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=META
        )
        made.held = held
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise Violation("numpy cannot read the memory of a GPU")

    __array__ = numpy

    def __deepcopy__(self, memo: dict) -> Tensor:
        made = self.detach().clone().requires_grad_(self.requires_grad)
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(f, args, kwargs or {}, Costs())


class Generator(torch.Generator):
    """A generator that knows which device it was made for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.made_for = torch.device(device)
        return made

    device = property(lambda self: self.made_for)  # type: ignore[assignment]


@dataclass
class Costs:
    """launches: kernels. syncs: points at which the host waits for the device, each with its cause and the line of trimtab that asked.
    to_device, to_host: bytes."""

    launches: int = 0
    to_device: int = 0
    to_host: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)

    def wait(self, cause: str) -> None:
        self.causes[f"{cause}, {_caller()}"] += 1

    @property
    def syncs(self) -> int:
        return sum(self.causes.values())


def _caller() -> str:
    """The innermost line of trimtab that runs."""
    frame = sys._getframe(1)
    while frame is not None and "/trimtab/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename.rpartition('/trimtab/')[2]}:{frame.f_lineno}"


# ---- what an operation costs ------------------------------------------------------------------

FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"),
    *("is_same_size", "_reshape_alias", "view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze", "permute"),
    *("as_strided", "split", "split_with_sizes", "unbind", "unfold", "diagonal", "view_as_real", "real", "is_pinned", "set_"),
}
"""Operations that run nothing on the device."""
UNWRITTEN, POISON = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}, float("nan")
"""Memory that nobody has written yet holds what is noticed when it is read."""
WAITS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("bincount", "histc", "_assert_async"),
}
"""Operations whose result, or its size, the host must wait for."""
CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that take indices on the CPU: they are copied, and the host waits."""
NO_INTEGERS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "matmul", "_grouped_mm", "_softmax", "_log_softmax", "gelu", "silu"}
NO_KERNEL = {torch.uint16, torch.uint32, torch.uint64}
PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors of one launch of a `_foreach` or fused operation, by how many lists it takes."""


def _launches(name: str, args: Any) -> int:
    if name in FREE:
        return 0
    if name.startswith(("_foreach", "_fused")):
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        if any(not t.is_contiguous() for a in lists for t in a):  # the slow way: tensor by tensor
            return len(lists[0])
        return -(-len(lists[0]) // PER_LAUNCH[min(5, len(lists))]) if lists else 0
    return 1


# ---- the rules --------------------------------------------------------------------------------


def _name(f: Any) -> str:
    return f._schema.name.partition("::")[2]


def _check(f: Any, name: str, args: Any, kwargs: Any, flat: list[Any], costs: Costs) -> None:
    """Violation where a GPU would refuse. Copies that it would make by itself are counted."""
    for t in flat:
        if not isinstance(t, Tensor) or name.endswith("_like"):  # of which only the sizes are read
            continue
        if isinstance(t, OnDevice):
            if t.dtype in NO_KERNEL and name not in FREE:
                raise Violation(f"{f}: no kernel for {t.dtype}")
            if name in NO_INTEGERS and not t.dtype.is_floating_point and t is args[0]:
                raise Violation(f"{f}: no kernel for {t.dtype}")
        elif name in CPU_INDICES and any(t is i for i in args[1] if i is not None):
            costs.wait(f"{name} by an index on the CPU")
            costs.to_device += t.nbytes
        elif not (t.dim() == 0 and (torch.Tag.pointwise in f.tags or name in CPU_INDICES or name.startswith("_f"))):
            raise Violation(f"{f}: a tensor {tuple(t.shape)} of {t.dtype} is on the CPU, others are on the device")
    if name == "_grouped_mm":  # rows of whole 16 bytes
        ends = args[2] if len(args) > 2 else kwargs["offs"]
        if ends.dtype != torch.int32 or len(ends) >= 1024:
            raise Violation(f"{f}: ends are int32 and of less than 1,024 groups")
        for t in args[:2]:
            if t.numel() and t.data_ptr() % 16:
                raise Violation(f"{f}: a tensor does not begin at a multiple of 16 bytes")
            if t.dtype != torch.bfloat16 or sorted(t.stride()[-2:])[0] != 1 or sorted(t.stride()[-2:])[1] % 8:
                raise Violation(f"{f}: no kernel for {t.dtype} of shape {tuple(t.shape)}, strides {t.stride()}")
    if name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        costs.wait(f"{name} by a mask")
    elif name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        costs.wait(name)


def _run(f: Any, args: Any, kwargs: dict[str, Any], costs: Costs) -> Any:
    name = _name(f)
    if name in ("_to_copy", "copy_", "_copy_from"):
        return _copy(f, name, args, kwargs, costs)
    flat, spec = tree_flatten((args, kwargs))
    _check(f, name, args, kwargs, flat, costs)
    if n := _launches(name, args):
        costs.launches += n
        costs.kernels[name] += n
    of = {id(t.held): t for t in flat if isinstance(t, OnDevice)}
    held = [t.held if isinstance(t, OnDevice) else torch.device("cpu") if t == META and isinstance(t, torch.device) else t for t in flat]
    a, k = tree_unflatten(held, spec)
    out = f(*a, **k)
    if name in UNWRITTEN and out.numel():
        out.fill_(POISON if out.dtype.is_floating_point else torch.iinfo(out.dtype).max if out.dtype != torch.bool else True)
    return tree_map_only(Tensor, lambda t: of.get(id(t)) if id(t) in of else OnDevice(t), out)


def _copy(f: Any, name: str, args: Any, kwargs: dict[str, Any], costs: Costs) -> Any:
    """Copies within the device are kernels, those from and to it wait unless they say that they need not and the memory is pinned."""
    source, target = (args[0], None) if name == "_to_copy" else (args[1], args[0])
    there = isinstance(source, OnDevice)
    device = kwargs.get("device")
    goes = isinstance(target, OnDevice) if target is not None else device == META or (device is None and there)
    non_blocking = kwargs.get("non_blocking", args[2] if target is not None and len(args) > 2 else False)
    if there and goes:
        costs.launches += 1
        costs.kernels[name] += 1
    elif goes:
        costs.to_device += source.nbytes
        if not (non_blocking and _pinned(source)):
            costs.wait(f"copy of {'pinned' if _pinned(source) else 'pageable'} memory to the device")
    else:
        costs.to_host += source.nbytes
        costs.wait("copy to the host")
    kwargs = kwargs | ({"device": torch.device("cpu")} if device is not None else {})
    held = [t.held if isinstance(t, OnDevice) else t for t in args]
    out = f(*held, **kwargs)
    return target if target is not None else OnDevice(out) if goes else out


# ---- pinned memory ----------------------------------------------------------------------------

_PINNED: dict[int, Tensor] = {}
"""Address -> a tensor of that memory, which keeps it."""


def _pinned(t: Tensor) -> bool:
    return t.untyped_storage().data_ptr() in _PINNED


def _pin(t: Tensor) -> Tensor:
    if t.numel():
        _PINNED[t.untyped_storage().data_ptr()] = t
    return t


class _Functions(TorchFunctionMode):
    """Says `meta:7` to torch where somebody says `cuda`, and looks at generators and pinned memory, of which nothing arrives below."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        args = tuple(_here(a) for a in args)
        if "device" in kwargs:
            kwargs["device"] = _here(kwargs["device"])
        if (generator := kwargs.get("generator")) is not None:
            on = [t.device for t in args if isinstance(t, Tensor)] or [CUDA if kwargs.get("device") == META else torch.device("cpu")]
            if on[0].type != generator.device.type:
                raise Violation(f"{name}: the generator is on {generator.device}, the tensor on {on[0]}")
        if name == "pin_memory":
            if isinstance(args[0], OnDevice):
                raise Violation("only memory of the CPU can be pinned")
            return _pin(args[0].clone())
        if name == "is_pinned":
            return not isinstance(args[0], OnDevice) and _pinned(args[0])
        if name in ("tensor", "as_tensor", "asarray") and kwargs.get("device") == META and not isinstance(args[0], OnDevice):
            return func(*args, **kwargs | {"device": "cpu"}).to(META)
        if name == "new_tensor" and isinstance(args[0], OnDevice):
            return torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype).to(META)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnDevice):
            args = (args[0], _index(args[1]), *args[2:])
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return _pin(out) if pinned else out


def _index(index: Any) -> Any:
    """Lists as the tensors on the CPU that torch makes of them; for `meta` it makes tensors without values."""
    if isinstance(index, tuple):
        return tuple(_index(i) for i in index)
    return torch.tensor(index, dtype=None if index else torch.int64) if isinstance(index, list) else index


def _here(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return META
    return META if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")) else value


_run_backward = torch.autograd._engine_run_backward


def _backward(*args: Any, **kwargs: Any) -> Any:
    """torch leaves the mode while it handles `backward`, which runs code that makes tensors."""
    with _Functions():
        return _run_backward(*args, **kwargs)


class Standin(TorchDispatchMode):
    """The device while it is entered. costs: of all that runs, but for what runs in `counted`."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = Costs()

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == META or any(_here_already(a) for a in args) or any(_here_already(a) for a in kwargs.values()):
            return _run(f, args, kwargs, self.costs)
        return f(*args, **kwargs)

    @contextmanager
    def counted(self) -> Iterator[Costs]:
        """What is done in here, counted apart."""
        before, self.costs = self.costs, Costs()
        try:
            yield self.costs
        finally:
            self.costs = before


def _here_already(a: Any) -> bool:
    return isinstance(a, OnDevice) or (isinstance(a, list | tuple) and any(isinstance(t, OnDevice) for t in a))


@contextmanager
def standin() -> Iterator[Standin]:
    """The device, with what torch.cuda says of it."""
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (MEMORY // 2, MEMORY),
        "max_memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    with ExitStack() as stack:
        for name, answer in said.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        # A view of a wrapper cannot be written to in inference mode, since its base counts writes.
        stack.enter_context(patch.object(torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode)))
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", _backward))
        device = Standin()
        stack.enter_context(device)
        stack.enter_context(_Functions())
        try:
            yield device
        finally:
            _PINNED.clear()


def on_device(model: Any) -> Any:
    """A model's parameters and buffers moved, tied ones tied."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None:
                    if id(t) not in moved:
                        there = OnDevice(t.detach().clone())
                        moved[id(t)] = torch.nn.Parameter(there, t.requires_grad) if isinstance(t, torch.nn.Parameter) else there
                    table[name] = moved[id(t)]
    return model
