"""All layers of a forward in one native call: what `lean.py` runs where few rows enter and LoRA is all that is edited.

Here is only what the call is told: addresses, laid out as cpp/layers.cpp reads them. It needs bfloat16 and matrix tiles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.ops import native
from trimtab.ops.native_inference import LoraParts, PackedWeight

WEIGHTS = ("input_norm", "mlp_norm", "q_norm", "k_norm", "qkv", "qkv_bias", "o", "o_bias", "gate_up", "gate_up_bias", "down", "down_bias")
Addresses = ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = [*((name, Addresses) for name in WEIGHTS), ("scaling", ctypes.c_double), ("window", ctypes.c_int64)]


class _Shape(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_int64) for n in ("layers", "hidden", "heads", "kv_heads", "head_dim", "inside")), ("eps", ctypes.c_double)]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, Addresses) for name in ("x", "norm", "cos", "sin", "out", "keys", "values")),
        ("pool", ctypes.c_int64),
        *((name, Addresses) for name in ("write", "sequence", "length", "table")),
        *((name, ctypes.c_int64) for name in ("table_stride", "block", "longest")),
        *((name, Addresses) for name in ("slot", "lora")),
        ("rows", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class LayerWeights:
    """One layer. norms: before attention and MLP; head_norms: of each head of q and k, or None; projections: q|k|v, o, gate|up, down."""

    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    projections: tuple[PackedWeight, PackedWeight, PackedWeight, PackedWeight]
    scaling: float
    window: int | None

    def struct(self) -> _Layer:
        q_k = self.head_norms or (None, None)
        packed = [t for p in self.projections for t in (p.packed, p.bias_O)]
        addresses = [None if t is None else t.data_ptr() for t in (*self.norms, *q_k, *packed)]
        return _Layer(*addresses, self.scaling, self.window or 0)


class LoraTable:
    """The factors of a mix at the four projections of each layer, in order; None where there are none."""

    def __init__(self, parts: Sequence[LoraParts | None]):
        self._kept = list(parts)
        self.address_LP = torch.tensor([0 if p is None else p.address for p in parts], dtype=torch.int64)


class Stack:
    """The layers of a model and its last norm. heads: (H, G, D) as in `native_inference.attend`."""

    def __init__(self, layers: Sequence[LayerWeights], heads: tuple[int, int, int], norm_H: Tensor, eps: float):
        self._kept, self._norm_H = list(layers), norm_H
        self._layers = (_Layer * len(layers))(*(layer.struct() for layer in layers))
        hidden, inside = layers[0].projections[0].inputs, layers[0].projections[3].inputs
        self._shape = _Shape(len(layers), hidden, *heads, inside, eps)
        self._run = native.function("layers", torch.bfloat16, "ppp")

    def __call__(
        self,
        x_TH: Tensor,
        rotary: tuple[Tensor, Tensor],
        pools: tuple[Tensor, Tensor],
        write_T: Tensor,
        paging: Any,
        slot_T: Tensor | None,
        lora: LoraTable | None,
    ) -> Tensor:
        """Hidden states after the last norm; x_TH is added to in place. rotary: cos and sin [T, D]; pools: keys and values of all layers
        [L, rows, G, D], written at write_T; slot_T: int32, each row's member of the mix that `lora` was made of, -1 for the base."""
        out = torch.empty_like(x_TH)
        edits = (None, None) if slot_T is None or lora is None else (slot_T.data_ptr(), lora.address_LP.data_ptr())
        step = _Step(
            x_TH.data_ptr(), self._norm_H.data_ptr(), rotary[0].data_ptr(), rotary[1].data_ptr(), out.data_ptr(),
            pools[0].data_ptr(), pools[1].data_ptr(), pools[0].stride(0), write_T.data_ptr(),
            paging.sequence_T.data_ptr(), paging.length_T.data_ptr(), paging.table_SB.data_ptr(),
            paging.table_SB.shape[1], paging.block, paging.longest,
            *edits, len(x_TH),
        )  # fmt: skip
        self._run(ctypes.addressof(self._layers), ctypes.addressof(self._shape), ctypes.addressof(step))
        return out
