"""All layers of a forward in one native call: what the decode path runs where few rows enter and their edits are LoRA, IA³ and bottlenecks.

Here is only what the call is told: addresses, laid out as cpp/layers.cpp reads them. It needs bfloat16, and a processor that multiplies it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.ops import native
from trimtab.ops.native_inference import BottleneckParts, LoraParts, ScaleParts
from trimtab.ops.native_quantized import Projection

WEIGHTS = ("input_norm", "mlp_norm", "q_norm", "k_norm", "qkv", "o", "gate_up", "down")
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
        *((name, ctypes.c_int64) for name in ("table_stride", "block")),
        *((name, Addresses) for name in ("slot", "edits")),
        ("rows", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class LayerWeights:
    """One layer. norms: before attention and MLP; head_norms: of each head of q and k, or None; projections: q|k|v, o, gate|up, down."""

    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, Tensor] | None
    projections: tuple[Projection, Projection, Projection, Projection]
    scaling: float
    window: int | None

    def struct(self) -> _Layer:
        q_k = self.head_norms or (None, None)
        vectors = [None if t is None else t.data_ptr() for t in (*self.norms, *q_k)]
        return _Layer(*vectors, *(p.address for p in self.projections), self.scaling, self.window or 0)


@dataclass(frozen=True)
class Edit:
    """What adapters do at one place of a layer. kind: its place in `KINDS`; first, width: the edited module's outputs in a row of the
    place's; parts: the tables of the adapters, by slot."""

    kind: str
    first: int
    width: int
    parts: LoraParts | ScaleParts | BottleneckParts


KINDS = ("lora", "scale_input", "scale_output", "behind", "beside")
"""In the order of cpp/layers.cpp; behind and beside: bottlenecks that read the module's output or its input."""


class EditTable:
    """The edits of a mix at the places of each layer, in order: q|k|v, o, gate|up, down, the whole MLP."""

    def __init__(self, places: Sequence[Sequence[Edit]]):
        edits = [e for place in places for e in place]
        stops = np.cumsum([len(place) for place in places])
        each = np.array([(KINDS.index(e.kind), e.first, e.width, e.parts.address) for e in edits], dtype=np.int64).reshape(-1, 4)
        starts = each.ctypes.data + each.strides[0] * (stops - [len(place) for place in places])
        lists = np.stack([np.array([len(place) for place in places]), starts], axis=1).astype(np.int64)
        self._kept, self.address = (edits, each, lists), lists.ctypes.data


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
        table: EditTable | None,
    ) -> Tensor:
        """Hidden states after the last norm; x_TH is added to in place. rotary: cos and sin [T, D]; pools: keys and values of all layers
        [L, rows, G, D], written at write_T; slot_T: int32, each row's member of the mix that `table` was made of, -1 for the base."""
        out = torch.empty_like(x_TH)
        edits = (None, None) if slot_T is None or table is None else (slot_T.data_ptr(), table.address)
        step = _Step(
            x_TH.data_ptr(), self._norm_H.data_ptr(), rotary[0].data_ptr(), rotary[1].data_ptr(), out.data_ptr(),
            pools[0].data_ptr(), pools[1].data_ptr(), pools[0].stride(0), write_T.data_ptr(),
            paging.sequence_T.data_ptr(), paging.length_T.data_ptr(), paging.table_SB.data_ptr(),
            paging.table_SB.shape[1], paging.block,
            *edits, len(x_TH),
        )  # fmt: skip
        self._run(ctypes.addressof(self._layers), ctypes.addressof(self._shape), ctypes.addressof(step))
        return out
