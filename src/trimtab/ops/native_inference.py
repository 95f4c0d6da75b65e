"""The kernels of inference, where a step has few rows: what lies between the matmuls, attention over the KV cache, and edits. The matmuls
are in `native_quantized`.

T rows, H query heads, G key heads, D head size, I inputs, O outputs, R rank. See `native` for when they can run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.native import function, has_tiles


def add_rms_norm(x_TH: Tensor, y_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
    """x += y in place (where y is given); returns w ∘ x / √(mean x² + eps)."""
    out = torch.empty_like(x_TH)
    T, width = x_TH.shape
    y = 0 if y_TH is None else y_TH.data_ptr()
    function("add_rms_norm", x_TH.dtype, "ppppiif")(x_TH.data_ptr(), y, weight_H.data_ptr(), out.data_ptr(), T, width, eps)
    return out


def rotate_and_write(
    qkv_T: Tensor,
    heads: tuple[int, int, int],
    cos_TD: Tensor,
    sin_TD: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    pools: tuple[Tensor, Tensor],
    write_T: Tensor,
) -> None:
    """Rows of [q | k | v] with heads (H, G, D): q is rotated in place; k, rotated, and v go to rows write_T of the pools [rows, G, D].
    norms: weights of RMS norms of each head of q and k, before the rotation."""
    H, G, D = heads
    q_norm, k_norm = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    function("rotate_and_write", qkv_T.dtype, "pippppfpppiiii")(
        qkv_T.data_ptr(), qkv_T.stride(0), cos_TD.data_ptr(), sin_TD.data_ptr(), q_norm, k_norm, eps,
        pools[0].data_ptr(), pools[1].data_ptr(), write_T.data_ptr(), qkv_T.shape[0], H, G, D,
    )  # fmt: skip


def attend(
    q_T: Tensor, heads: tuple[int, int, int], pools: tuple[Tensor, Tensor], paging: Any, scaling: float, window: int | None
) -> Tensor:
    """Attention [T, H·D] of rows that start with their H query heads over their sequences' tokens in the pools. paging: see `Paging`."""
    H, G, D = heads
    T = q_T.shape[0]
    out = torch.empty(T, H * D, dtype=q_T.dtype)
    function("attend", q_T.dtype, "pippppppiiiiiifi")(
        q_T.data_ptr(), q_T.stride(0), pools[0].data_ptr(), pools[1].data_ptr(), out.data_ptr(), paging.sequence_T.data_ptr(),
        paging.length_T.data_ptr(), paging.table_SB.data_ptr(), paging.table_SB.shape[1], paging.block, T, H, G, D, scaling,
        window or 0,
    )  # fmt: skip
    return out


def swiglu(gate_up_T: Tensor) -> Tensor:
    """silu(gate) ∘ up of rows [gate | up]."""
    T, width = gate_up_T.shape
    out = torch.empty(T, width // 2, dtype=gate_up_T.dtype)
    function("swiglu", gate_up_T.dtype, "ppii")(gate_up_T.data_ptr(), out.data_ptr(), T, width // 2)
    return out


class LoraParts:
    """The factors of several adapters at sites that share an input, in tables for `lora`. starts, widths [parts]: where each site's outputs
    are in a row; A_PS, B_PS, rank_PS [parts, slots]: addresses of A and Bᵀ, int64, and the rank, int32, each contiguous. Where the rank is
    0, a slot adds nothing. kept: what the addresses are of."""

    def __init__(self, starts: np.ndarray, widths: np.ndarray, A_PS: np.ndarray, B_PS: np.ndarray, rank_PS: np.ndarray, kept: Any = None):
        tables = starts, widths, A_PS, B_PS, rank_PS
        struct = np.array([len(starts), *(t.ctypes.data for t in tables), A_PS.shape[1]], dtype=np.int64)
        self._kept = *tables, struct, kept
        self.address = struct.ctypes.data


class ScaleParts:
    """The g of several adapters at one module, by slot, as `ops.stack` reads them."""

    def __init__(self, pack: Any, places: Sequence[int], slots: int):
        self._kept = _by_slot(pack, "g", places, slots)[0], pack
        self.address = self._kept[0].ctypes.data


class BottleneckParts:
    """The tensors of several bottleneck adapters at one module, by slot, in tables for `bottleneck`. activation: the number of f in
    `ACTIVATIONS`."""

    def __init__(self, pack: Any, places: Sequence[int], slots: int, activation: int):
        (D, rank), (d, _), (U, _), (u, _) = (_by_slot(pack, name, places, slots) for name in ("D", "d", "U", "u"))
        tables = D, d, U, u, rank
        struct = np.array([*(t.ctypes.data for t in tables), slots, activation], dtype=np.int64)
        self._kept = *tables, struct, pack
        self.address = struct.ctypes.data


def _by_slot(pack: Any, name: str, places: Sequence[int], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, first sizes) of a pack's tensors at their slots; zeros elsewhere."""
    address, size = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int32)
    address[list(places)], size[list(places)] = pack.addresses(name)
    return address, size


def lora(x_TI: Tensor, y_TO: Tensor, slot_T: Tensor, parts: LoraParts) -> None:
    """y += (x Aᵀ) Bᵀ in place, each row with the factors A [R, I] and B [O, R] of its slot (-1: none), each part in its place in y."""
    function("lora", x_TI.dtype, "pipippii")(
        x_TI.data_ptr(), x_TI.stride(0), y_TO.data_ptr(), y_TO.stride(0), slot_T.data_ptr(), parts.address, *x_TI.shape
    )  # fmt: skip


def runs_on_tiles(x_TI: Tensor) -> bool:
    """Whether `lora` and `bottleneck` multiply these rows in tiles, which long runs of rows are worth; else they go row by row."""
    return x_TI.dtype == torch.bfloat16 and x_TI.shape[1] % 32 == 0 and has_tiles()


def scale(x_TI: Tensor, slot_T: Tensor, packs: Any) -> None:
    """x ∘= 1 + g in place, each row with the g [I] (fp32) of its slot in `packs` (-1: none)."""
    g, _ = packs.addresses("g")
    function("scale", x_TI.dtype, "pippii")(x_TI.data_ptr(), x_TI.stride(0), slot_T.data_ptr(), g.data_ptr(), *x_TI.shape)


def bottleneck(h_TI: Tensor, y_TO: Tensor, slot_T: Tensor, packs: Any, activation: int) -> None:
    """y += U f(D h + d) + u in place, each row with the D [R, I], d, U [O, R], u of its slot in `packs` (-1: none)."""
    parts = packs.bottleneck_parts(activation)
    function("bottleneck", h_TI.dtype, "pipippiii")(
        h_TI.data_ptr(), h_TI.stride(0), y_TO.data_ptr(), y_TO.stride(0), slot_T.data_ptr(), parts.address, *h_TI.shape, y_TO.shape[1]
    )  # fmt: skip


def largest(x_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(each row's largest value in fp32, NaN where the row holds one; its index, the first of equals)."""
    T = x_TV.shape[0]
    value, place = torch.empty(T, dtype=torch.float32), torch.empty(T, dtype=torch.int64)
    function("largest", x_TV.dtype, "pippii")(x_TV.data_ptr(), x_TV.stride(0), value.data_ptr(), place.data_ptr(), *x_TV.shape)
    return value, place
