"""The kernels of cpp/ that multiply with frozen matrices on a CPU, quantised or of bfloat16: a few rows in one call. For many rows they
dequantise tiles.

T rows, I inputs, O outputs. See `native` for when they can run, `quantized` for what a matrix holds.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.ops import native

KINDS = ("code4", "int8", "fp8", "int4", "mxfp4", "int8_groups", "q4_0", "q8_0", "q4_k", "q6_k", "dense", "tiled")
"""In the order of cpp/quantized.h."""
PARTS = {
    "code4": ("codes", "table", "absmax", "nested_table", "nested_absmax"),
    "int8": ("codes", "scale"),
    "fp8": ("codes", "scale"),
    "int4": ("codes", "scale", "zero"),
    "mxfp4": ("codes", "table", "scale"),
    "int8_groups": ("codes", "scale", "zero"),
}
"""The parts whose addresses the kernels get, in their order; GGUF's kinds have their codes alone."""

FEW_ROWS, PLAIN_ROWS = 128, 8
"""Up to so many rows the kernels are at least as fast as the library: in bfloat16 where the processor multiplies that, and elsewhere."""


class Quantized(ctypes.Structure):
    """As cpp/quantized.h reads it."""

    kept: list[Tensor | None]
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("kind", "outputs", "inputs", "block", "block_rows", "nested_block")),
        ("nested_offset", ctypes.c_double),
        ("parts", ctypes.c_void_p * 5),
    ]


class _Memory(threading.local):
    """The calling thread's tile, kept between calls: fresh pages would take longer than the arithmetic."""

    tile: Tensor | None = None


_memory = _Memory()


def reads(m: Any) -> bool:
    """Whether the kernels dequantise this `PackedMatrix`."""
    if m.device.type != "cpu" or m.dtype not in native.DTYPES or not {"group", "order"}.isdisjoint(m.parts) or native.load()[0] is None:
        return False
    return m.kind not in ("int4", "int8_groups") or m.shape[1] % m.block == 0


def takes(m: Any, x: Tensor) -> bool:
    """Whether the kernels multiply this `PackedMatrix` with rows like x. They know of no gradients."""
    return x.dtype == m.dtype and x.device == m.device and reads(m)


def few_rows(m: Any) -> int:
    """Up to so many rows a product with this `PackedMatrix` is one call; beyond, dequantising takes little beside the library's products of
    tiles."""
    return FEW_ROWS if m.dtype == torch.bfloat16 and native.attends_flat() else PLAIN_ROWS


def struct(m: Any) -> Quantized:
    """What the kernels are told of a `PackedMatrix`. It keeps what the addresses are of."""
    found = [None if (t := m.parts.get(name)) is None else t.contiguous() for name in PARTS.get(m.kind, ("codes",))]
    parts = (ctypes.c_void_p * 5)(*(None if t is None else t.data_ptr() for t in found))
    nested = "nested_table" in m.parts
    nested_block, offset = (int(m.parts["nested_block"]), float(m.parts["nested_offset"])) if nested else (1, 0.0)
    told = Quantized(KINDS.index(m.kind), *m.shape, m.block, m.block_rows, nested_block, offset, parts)
    told.kept = found
    return told


def rows_of(weight_OI: Tensor) -> Quantized:
    """What the kernels are told of a bfloat16 matrix that they read as it is."""
    weight_OI = weight_OI.contiguous()
    return _whole("dense", weight_OI.shape, weight_OI)


def tiles_of(weight_OI: Tensor) -> Quantized:
    """The same of a copy as matrix tiles read it, in one stream; I a multiple of 32."""
    O, I = weight_OI.shape  # noqa: E741
    packed, weight_OI = torch.empty(-(-O // 32) * 32 * I, dtype=torch.bfloat16), weight_OI.contiguous()
    native.advise_huge(packed)
    native.function("pack", torch.bfloat16, "ppii")(weight_OI.data_ptr(), packed.data_ptr(), I, O)
    return _whole("tiled", weight_OI.shape, packed)


def _whole(kind: str, shape: Sequence[int], memory: Tensor) -> Quantized:
    made = Quantized(KINDS.index(kind), *shape, 1, 1, 1, 0.0, (ctypes.c_void_p * 5)(memory.data_ptr()))
    made.kept = [memory]
    return made


class _Projection(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("each", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Projection:
    """Frozen matrices of one input, in bfloat16, as the native calls read them. Their results lie side by side."""

    def __init__(self, matrices: Sequence[Quantized], bias_O: Tensor | None = None):
        self.inputs, self.outputs = matrices[0].inputs, sum(m.outputs for m in matrices)
        assert all(m.inputs == self.inputs for m in matrices) and (bias_O is None or len(bias_O) == self.outputs)
        each = (Quantized * len(matrices))(*matrices)
        struct = _Projection(len(matrices), ctypes.addressof(each), None if bias_O is None else bias_O.data_ptr())
        self._kept = [m.kept for m in matrices], each, bias_O, struct
        self.address = ctypes.addressof(struct)
        self._run = native.function("project", torch.bfloat16, "ppipii")

    def __call__(self, x_TI: Tensor) -> Tensor:
        """x Wᵀ + b, accumulated in fp32; what a row gives does not depend on the rows beside it."""
        y_TO = native.fresh(len(x_TI), self.outputs, torch.bfloat16)
        self._run(self.address, x_TI.data_ptr(), x_TI.stride(0), y_TO.data_ptr(), self.outputs, len(x_TI))
        return y_TO


def product(m: Any, x_TI: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> Tensor:
    """x Wᵀ + b written to `out_TO`, accumulated in fp32; what a row gives does not depend on the rows beside it."""
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    run = native.function("quantized_product", x_TI.dtype, "ppippii")
    told, bias = struct(m), 0 if bias_O is None else bias_O.data_ptr()
    run(
        ctypes.addressof(told), x_TI.data_ptr(), x_TI.stride(0), bias, out_TO.data_ptr(), out_TO.stride(0), len(x_TI)
    )  # fmt: skip
    return out_TO


def dense(m: Any, rows: slice, columns: slice, made: Tensor | None = None) -> Tensor:
    """W's rows and columns between these numbers, dequantised, into `made` where it is given. columns: from a multiple of 256 on."""
    shape = rows.stop - rows.start, columns.stop - columns.start
    made = torch.empty(shape, dtype=m.dtype) if made is None else made
    told, run = struct(m), native.function("quantized_dense", m.dtype, "piiiipi")
    run(ctypes.addressof(told), rows.start, shape[0], columns.start, shape[1], made.data_ptr(), made.stride(0))
    return made


def row_tiles(m: Any, entries: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W's entries there) one after the other, of about so many entries. A tile is good until the next is asked for."""
    O, I = m.shape  # noqa: E741
    step = max(1, min(entries // I, O))
    for a in range(0, O, step):
        rows = slice(a, min(a + step, O))
        yield rows, dense(m, rows, slice(0, I), _tile(rows.stop - a, I, m.dtype))


def column_tiles(m: Any, entries: int) -> Iterator[tuple[slice, Tensor]]:
    """(columns, W's entries there), as `row_tiles`."""
    O, I = m.shape  # noqa: E741
    step = max(256, entries // O // 256 * 256)
    for a in range(0, I, step):
        columns = slice(a, min(a + step, I))
        yield columns, dense(m, slice(0, O), columns, _tile(O, columns.stop - a, m.dtype))


def _tile(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    size = rows * columns * dtype.itemsize
    if _memory.tile is None or _memory.tile.nbytes < size:
        _memory.tile = torch.empty(size, dtype=torch.uint8)
    return _memory.tile[:size].view(dtype).view(rows, columns)
