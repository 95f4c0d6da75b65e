"""4 bits an entry as bitsandbytes has them: NF4 and FP4, with and without scales that are quantised too (arXiv 2305.14314, QLoRA).

A block of 64 entries, of the matrix row by row, shares its largest absolute value; an entry is the number of the value in a table of 16
that is nearest to the entry divided by that. Quantised here, matrices have the bytes that bitsandbytes gives them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.bases.weights.packed import Packed, PackedLinear, expect, rows_of

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_HALF_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
TABLES = {"nf4": NF4, "fp4": (*_HALF_FP4, 0.0, *(-v for v in _HALF_FP4[1:]))}
BLOCK, NESTED_BLOCK = 64, 256
AT_ONCE = 2**22
"""Entries that are quantised at a time; a multiple of all blocks."""


class FourBit(Packed):
    kind: ClassVar[str] = "code4"
    table: ClassVar[str] = ""
    nested: ClassVar[bool] = False

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        table = torch.tensor(TABLES[cls.table], dtype=torch.float32)
        codes, absmax = _quantised(weight_OI.contiguous().view(-1), table)
        shape = list(weight_OI.shape)
        state: dict[str, Any] = {"quant_type": cls.table, "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch."), "shape": shape}
        stored = {"weight": codes[:, None], "weight.absmax": absmax, "weight.quant_map": table}
        if cls.nested:
            offset = absmax.mean()
            small, nested_absmax = _nearest((absmax - offset), dynamic_table(), NESTED_BLOCK)
            stored |= {"weight.absmax": small, "weight.nested_absmax": nested_absmax, "weight.nested_quant_map": dynamic_table().clone()}
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
        stored[f"weight.quant_state.bitsandbytes__{cls.table}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        on = weight_OI.device
        return cls._made({name: t.to(on) for name, t in stored.items()}, state, bias, dtype)

    @classmethod
    def _made(cls, stored: Mapping[str, Tensor], state: Mapping[str, Any], bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        O, I = state["shape"]  # noqa: E741
        derived = {}
        if cls.nested:
            on = stored["weight"].device
            derived["nested_offset"] = torch.tensor([state["nested_offset"]], dtype=torch.float32, device=on)
            derived["nested_block"] = torch.tensor([state["nested_blocksize"]], device=on)
        return PackedLinear(cls.name, (O, I), dtype, stored, bias, block=state["blocksize"], derived=derived)

    @classmethod
    def below_each_other(cls, layers: Sequence[PackedLinear]) -> PackedLinear | None:
        """Scales that are quantised have an offset for each layer: they become fp32, which is exact. None where blocks run over the ends of
        matrices, or tables differ."""
        block, parts, (O, I) = layers[0].block, [cls.parts(layer) for layer in layers], rows_of(layers)  # noqa: E741
        if I % 2 or any(layer.out_features * I % block for layer in layers):
            return None
        if any(not torch.equal(own["table"], parts[0]["table"]) for own in parts):
            return None
        plain = next(c for c in (Nf4, Fp4) if c.table == cls.table)
        dtype, shape = str(layers[0].compute_dtype).removeprefix("torch."), [O, I]
        state: dict[str, Any] = {"quant_type": cls.table, "blocksize": block, "dtype": dtype, "shape": shape}
        stored = {
            "weight": torch.cat([own["codes"].reshape(-1) for own in parts])[:, None],
            "weight.absmax": torch.cat([_plain_absmax(own) for own in parts]),
            "weight.quant_map": parts[0]["table"],
            f"weight.quant_state.bitsandbytes__{cls.table}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
        return plain._made(stored, state, None, layers[0].compute_dtype)

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        O, I = module.out_features, module.in_features  # noqa: E741
        codes, absmax = module.get_buffer("weight").view(-1).view(torch.uint8), module.get_buffer("weight:absmax")
        codes = codes[: -(-O * I // 2)]  # kept as wider numbers, they may be filled up
        parts = {
            "codes": codes.view(O, I // 2) if I % 2 == 0 else codes,
            "table": module.get_buffer("weight:quant_map"),
            "absmax": absmax.view(O, I // module.block) if I % module.block == 0 else absmax,
        }
        if cls.nested:
            parts["nested_table"], parts["nested_absmax"] = (module.get_buffer(f"weight:nested_{n}") for n in ("quant_map", "absmax"))
            parts |= {n: module.get_buffer(n) for n in ("nested_offset", "nested_block")}
        return parts


class Nf4(FourBit):
    name: ClassVar[str] = "nf4"
    table: ClassVar[str] = "nf4"


class Fp4(FourBit):
    name: ClassVar[str] = "fp4"
    table: ClassVar[str] = "fp4"


class Nf4Double(Nf4):
    name: ClassVar[str] = "nf4-double"
    nested: ClassVar[bool] = True


class Fp4Double(Fp4):
    name: ClassVar[str] = "fp4-double"
    nested: ClassVar[bool] = True


def read(tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """A layer as bitsandbytes stores it. tensors: by their names after the module's. ValueError where they do not fit."""
    states = [name for name in tensors if name.startswith("weight.quant_state.bitsandbytes__")]
    if len(states) != 1:
        raise ValueError(f"{len(states) or 'no'} tensors weight.quant_state.bitsandbytes__…, of which there should be one")
    try:
        state = json.loads(bytes(tensors[states[0]].tolist()))
        kind, block, own_shape = str(state["quant_type"]), int(state["blocksize"]), list(state.get("shape") or ())
        nested_block = int(state.get("nested_blocksize", 0))
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{states[0]} cannot be read ({error})") from error
    if kind not in TABLES:
        raise ValueError(f"quant_type {kind!r} is none of {', '.join(TABLES)}")
    if own_shape != list(shape):
        raise ValueError(f"a matrix of shape {own_shape} where the model has {list(shape)}")
    if block < 2 or block & (block - 1) or nested_block < 0 or not math.isfinite(offset):
        raise ValueError(f"blocksize {block}, nested_blocksize {nested_block}, nested_offset {offset} in {states[0]}")
    n = math.prod(shape)
    blocks, bytes_each, fp32 = -(-n // block), tensors["weight"].dtype.itemsize, (torch.float32,)
    stored = -(-n // 2)
    shapes: dict[str, Any] = {
        "weight": ((-(-stored // bytes_each), 1), (torch.uint8, torch.bfloat16, torch.float16, torch.float32)),
        "weight.absmax": ((blocks,), (torch.uint8,) if nested_block else fp32),
        "weight.quant_map": ((16,), fp32),
    }
    if nested_block:
        shapes |= {"weight.nested_absmax": ((-(-blocks // nested_block),), fp32), "weight.nested_quant_map": ((256,), fp32)}
    expect(tensors, shapes)
    cls = {(c.table, c.nested): c for c in (Nf4, Fp4, Nf4Double, Fp4Double)}[kind, bool(nested_block)]
    kept = {name: tensors[name] for name in (*shapes, states[0])}
    return cls._made(kept, {"shape": shape, "blocksize": block, "nested_offset": offset, "nested_blocksize": nested_block}, bias, dtype)


def _quantised(flat: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes of two codes, the high nibble first; absmax of each block) of a matrix's entries in order."""
    codes, absmax = flat.new_empty(-(-len(flat) // 2), dtype=torch.uint8), []
    table = table.to(flat.device)
    for a in range(0, len(flat), AT_ONCE):
        code, largest = _nearest(flat[a : a + AT_ONCE], table, BLOCK)
        code = torch.nn.functional.pad(code, (0, len(code) % 2), value=_zero_of(table))
        codes[a // 2 : (a + len(code)) // 2] = code[::2] << 4 | code[1::2]
        absmax.append(largest)
    return codes, torch.cat(absmax)


def _plain_absmax(parts: Mapping[str, Tensor]) -> Tensor:
    """The scales of all blocks, fp32, by what `FourBit.parts` gives."""
    absmax = parts["absmax"].reshape(-1)
    if "nested_absmax" not in parts:
        return absmax
    number = torch.arange(len(absmax), device=absmax.device) // parts["nested_block"]
    return parts["nested_table"][absmax.int()] * parts["nested_absmax"][number] + parts["nested_offset"]


def _zero_of(table: Tensor) -> int:
    return int((table == 0).nonzero()[0])


def _nearest(flat: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(the number of each entry's value in the table, uint8; the largest absolute value of each block, fp32)."""
    blocks = torch.nn.functional.pad(flat.float(), (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp_min(1e-38))[:, None]).clamp_(-1, 1).view(-1)[: len(flat)]
    values, order = table.sort(stable=True)
    code = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2, out_int32=True)
    return (order[code] if bool((order.diff() < 0).any()) else code).to(torch.uint8), absmax


@cache
def dynamic_table() -> Tensor:
    """bitsandbytes' table of 256 values in [-1, 1], fp32, sorted: the nearer to 0, the finer (arXiv 1511.04561)."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (10.0 ** (i - 6)) * (edges[:-1] + edges[1:]) / 2
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
