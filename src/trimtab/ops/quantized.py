"""Products with packed matrices: of 4 to 8 bits an entry, dequantised a tile at a time where they are multiplied.

W [O, I] is never in memory as a whole, neither forward nor backward. Gradients are those of x and of the bias. Entries are computed in
fp32 and rounded once to the dtype that is multiplied in. On a CPU the native kernels (`native_quantized`) multiply a few rows in one call,
and dequantise the tiles of products of many. T rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops import native_quantized
from trimtab.ops.layer import linear_into

TILE = 2**18
"""Entries of a matrix that are dequantised at a time: they stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """W [O, I] as it is kept. dtype: that of x, y and the dequantised entries. What `parts` holds depends on the kind:

    code4  (nf4, fp4: any table)  W = table[code] · absmax[block]. codes: uint8 [O, I/2], the HIGH nibble is the even entry; where I
           is odd flat, [⌈O·I/2⌉]. table: fp32 [16]. absmax, one for each `block` consecutive entries of the row-major matrix:
           [O, I/block], or flat where `block` does not divide I, so that blocks run over the ends of rows. It is fp32; or uint8 where
           it is quantised too: absmax = nested_table[absmax] · nested_absmax[flat index // nested_block] + nested_offset, all fp32,
           `nested_block` as an int64 tensor of one number.
    int8   W = codes · scale. codes: int8 [O, I]; scale: fp32 [O].
    fp8    W = codes · scale. codes: float8_e4m3fn [O, I]; scale: fp32 [⌈O/block_rows⌉, ⌈I/block⌉]; the last blocks may be short.
    int4   (gptq, awq)  W = (code − zero) · scale. codes: uint8 [O, I/2], the high nibble is the even entry; scale: fp32 [O, G]; zero: uint8
           [O, G]. G = I/block groups of consecutive inputs; or, where there is `group` [I] int64, the group of each input. Where there is
           `order` [I] int64, column k of all this is the matrix' column order[k]: so groups of any inputs are consecutive.
    int8_groups  W = (code − zero) · scale, in groups as int4 has them. codes: int8 [O, I]; scale: fp32 [O, G]; zero: int8 [O, G].
    mxfp4  W = table[code] · 2^(scale − 127). codes: uint8 [O, I/2], the LOW nibble is the even entry; table: fp32 [16]; scale: uint8
           [O, I/32].
    q4_0, q8_0, q4_k, q6_k  codes: uint8 [O, bytes of a row], blocks as GGUF has them.
    """

    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]
    block: int
    block_rows: int = 1

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device


def product(m: PackedMatrix, x_TI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y [T, O] = x Wᵀ + b. Differentiable in x and b. x may have more dimensions before the last. out: where to write y, without
    gradients."""
    if out is not None:
        return _forward(m, x_TI, bias_O, out)
    y: Tensor = _Product.apply(x_TI, m, bias_O)
    return y


def product_t(m: PackedMatrix, dy_TO: Tensor) -> Tensor:
    """dx [T, I] = dy W."""
    if "order" in m.parts:
        return _put_back(m, product_t(_without_order(m), dy_TO))
    if native_quantized.takes(m, dy_TO):
        dx_TI, dy = dy_TO.new_empty(*dy_TO.shape[:-1], m.shape[1]), dy_TO.detach().flatten(0, -2)
        for columns, tile in native_quantized.column_tiles(m, TILE):
            torch.mm(dy, tile, out=dx_TI.view(-1, m.shape[1])[:, columns])
        return dx_TI
    tiles = list(_tiles(m))
    if len(tiles) == 1:
        return dy_TO @ dense(m)
    dx_TI = dy_TO.new_zeros(*dy_TO.shape[:-1], m.shape[1], dtype=torch.promote_types(dy_TO.dtype, torch.float32))
    for rows in tiles:
        dx_TI += dy_TO[..., rows] @ dense(m, rows)
    return dx_TI.to(dy_TO.dtype)


def dense(m: PackedMatrix, rows: Any = None) -> Tensor:
    """W [O, I] dequantised, or these of its rows. rows: whatever indexes the first dimension of a tensor."""
    if "order" in m.parts:
        return _put_back(m, dense(_without_order(m), rows))
    if rows is None and native_quantized.reads(m):
        return native_quantized.dense(m, slice(0, m.shape[0]), slice(0, m.shape[1]))
    if rows is None or isinstance(rows, slice):
        return _decode(m, slice(None) if rows is None else rows).to(m.dtype)
    index = torch.arange(m.shape[0], device=m.device)[rows]
    return _decode(m, index.reshape(-1)).to(m.dtype).view(*index.shape, m.shape[1])


def part(m: PackedMatrix, rows: slice) -> PackedMatrix | None:
    """These rows of W as a matrix of their own, over the same memory; None where a block of scales runs over one of their ends."""
    (O, I), a, b = m.shape, rows.start, rows.stop  # noqa: E741
    found = dict(m.parts)
    for name in ("codes", "scale", "zero", "absmax"):
        own = m.parts.get(name)
        if own is None:
            continue
        entries = I  # of W, for each row of the part
        if m.kind == "fp8" and name == "scale":
            entries = m.block_rows * I
        elif m.kind == "code4" and own.dim() == 1:
            entries = 2 if name == "codes" else m.block
        if a * I % entries or (b * I % entries and b != O):
            return None
        found[name] = own[a * I // entries : -(-b * I // entries)]
    if "nested_absmax" in found:
        each = m.block * int(m.parts["nested_block"])
        if a * I % each or (b * I % each and b != O):
            return None
        found["nested_absmax"] = m.parts["nested_absmax"][a * I // each : -(-b * I // each)]
    return PackedMatrix(m.kind, (b - a, I), m.dtype, found, m.block, m.block_rows)


class _Product(torch.autograd.Function):
    """What is kept for the backward is the packed matrix, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, m: PackedMatrix, bias_O: Tensor | None) -> Tensor:
        ctx.m = m
        return _forward(m, x_TI, bias_O, x_TI.new_empty(*x_TI.shape[:-1], m.shape[0]))

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple:
        dx_TI = product_t(ctx.m, dy_TO) if ctx.needs_input_grad[0] else None
        return dx_TI, None, dy_TO.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


def _without_order(m: PackedMatrix) -> PackedMatrix:
    return replace(m, parts={name: part for name, part in m.parts.items() if name != "order"})


def _put_back(m: PackedMatrix, of_columns: Tensor) -> Tensor:
    """What is told of the columns as they are kept, of the matrix' columns."""
    return torch.empty_like(of_columns).index_copy_(-1, m.parts["order"], of_columns)


def _forward(m: PackedMatrix, x_TI: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> Tensor:
    if "order" in m.parts:
        return _forward(_without_order(m), x_TI.index_select(-1, m.parts["order"]), bias_O, out_TO)
    if native_quantized.takes(m, x_TI):
        x, out = x_TI.flatten(0, -2), out_TO if out_TO.dim() == 2 else out_TO.flatten(0, -2)
        if len(x) <= native_quantized.few_rows(m):
            native_quantized.product(m, x, bias_O, out)
        else:
            for rows, tile in native_quantized.row_tiles(m, TILE):
                linear_into(out[:, rows], x, tile, None if bias_O is None else bias_O[rows])
        return out_TO
    for rows in _tiles(m):
        out_TO[..., rows] = F.linear(x_TI, dense(m, rows), None if bias_O is None else bias_O[rows])
    return out_TO


def _tiles(m: PackedMatrix) -> Iterator[slice]:
    O, I = m.shape  # noqa: E741
    step = max(1, TILE // I)
    return (slice(a, min(a + step, O)) for a in range(0, O, step))


# ---- entries in fp32: (matrix, a slice or numbers of rows) -> [rows, I] ----


def _decode(m: PackedMatrix, rows: Any) -> Tensor:
    return DECODERS[m.kind](m, rows)


def _code4(m: PackedMatrix, rows: Any) -> Tensor:
    codes, absmax, I = m.parts["codes"], m.parts["absmax"], m.shape[1]  # noqa: E741
    number_R = torch.arange(m.shape[0], device=m.device)[rows]
    if codes.dim() == 1:
        place_RI = number_R[:, None] * I + torch.arange(I, device=m.device)
        pair = codes[place_RI // 2]
        code_RI = torch.where(place_RI % 2 == 0, pair >> 4, pair & 15)
    else:
        code_RI = _nibbles(codes[rows], high_first=True)
    values_RI = m.parts["table"][code_RI.int()]
    if absmax.dim() == 1:
        block_RI = (number_R[:, None] * I + torch.arange(I, device=m.device)) // m.block
        return values_RI * _absmax(m, absmax[block_RI], block_RI)
    per_row = I // m.block
    block_RB = number_R[:, None] * per_row + torch.arange(per_row, device=m.device)
    return _scaled(values_RI, _absmax(m, absmax[rows], block_RB), m.block)


def _absmax(m: PackedMatrix, stored: Tensor, block: Tensor) -> Tensor:
    """The absmax of these blocks, by what is stored of them and their numbers."""
    if stored.dtype == torch.float32:
        return stored
    parts = m.parts
    return parts["nested_table"][stored.int()] * parts["nested_absmax"][block // parts["nested_block"]] + parts["nested_offset"]


def _int8(m: PackedMatrix, rows: Any) -> Tensor:
    return m.parts["codes"][rows].float() * m.parts["scale"][rows, None]


def _fp8(m: PackedMatrix, rows: Any) -> Tensor:
    number_R = torch.arange(m.shape[0], device=m.device)[rows]
    scale = m.parts["scale"][number_R // m.block_rows].repeat_interleave(m.block, 1)[:, : m.shape[1]]
    return m.parts["codes"].view(torch.uint8)[rows].view(torch.float8_e4m3fn).float() * scale  # torch indexes no float8


def _int4(m: PackedMatrix, rows: Any) -> Tensor:
    return _in_groups(m, rows, _nibbles(m.parts["codes"][rows], high_first=True).float())


def _int8_groups(m: PackedMatrix, rows: Any) -> Tensor:
    return _in_groups(m, rows, m.parts["codes"][rows].float())


def _in_groups(m: PackedMatrix, rows: Any, code_RI: Tensor) -> Tensor:
    scale, zero = m.parts["scale"][rows], m.parts["zero"][rows].float()
    if "group" in m.parts:
        group = m.parts["group"]
        return (code_RI - zero[:, group]) * scale[:, group]
    return _scaled((code_RI.view(*zero.shape, -1) - zero[..., None]).flatten(1), scale, m.block)


def _mxfp4(m: PackedMatrix, rows: Any) -> Tensor:
    values_RI = m.parts["table"][_nibbles(m.parts["codes"][rows], high_first=False).int()]
    return _scaled(values_RI, torch.exp2(m.parts["scale"][rows].float() - 127), m.block)


def _q4_0(m: PackedMatrix, rows: Any) -> Tensor:
    """Blocks of 32: an fp16 scale, 16 bytes; the low nibbles are the first half. W = scale · (code − 8)."""
    blocks = _blocks(m, rows, 18)
    low_high = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
    return (_half(blocks, 0) * (low_high.float() - 8)).flatten(1)


def _q8_0(m: PackedMatrix, rows: Any) -> Tensor:
    """Blocks of 32: an fp16 scale, 32 bytes. W = scale · code."""
    blocks = _blocks(m, rows, 34)
    return (_half(blocks, 0) * blocks[..., 2:].contiguous().view(torch.int8).float()).flatten(1)


def _q4_k(m: PackedMatrix, rows: Any) -> Tensor:
    """Blocks of 256: fp16 d and dmin, 8 scales and 8 minima of 6 bits in 12 bytes, 128 bytes of codes. In each of 8 runs of 32 entries
    W = d · scale · code − dmin · minimum; 32 bytes have one run in their low nibbles and the next in their high ones."""
    blocks = _blocks(m, rows, 144)
    s = blocks[..., 4:16]
    scale = torch.cat([s[..., :4] & 63, (s[..., 8:] & 15) | (s[..., :4] >> 6 << 4)], -1)
    least = torch.cat([s[..., 4:8] & 63, (s[..., 8:] >> 4) | (s[..., 4:8] >> 6 << 4)], -1)
    codes = blocks[..., 16:].unflatten(-1, (4, 1, 32))
    code = torch.cat([codes & 15, codes >> 4], -2).flatten(-3, -2).float()
    d, dmin = (_half(blocks, at)[..., None] for at in (0, 2))
    return (d * scale[..., None].float() * code - dmin * least[..., None].float()).flatten(1)


def _q6_k(m: PackedMatrix, rows: Any) -> Tensor:
    """Blocks of 256: the low 4 bits of each code in 128 bytes, the high 2 in 64, 16 int8 scales, fp16 d. In each of 16 runs of 16 entries
    W = d · scale · (code − 32)."""
    blocks = _blocks(m, rows, 210)
    low, high = blocks[..., :128].unflatten(-1, (2, 1, 64)), blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    low4 = torch.cat([low & 15, low >> 4], -2).flatten(-2).unflatten(-1, (4, 32))
    high2 = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -2)
    code = (low4 | (high2 << 4)).float().flatten(-3).unflatten(-1, (16, 16)) - 32
    scale = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return (_half(blocks, 208)[..., None] * scale[..., None] * code).flatten(1)


def _blocks(m: PackedMatrix, rows: Any, size: int) -> Tensor:
    """The rows' blocks of so many bytes, [R, blocks, size]."""
    return m.parts["codes"][rows].unflatten(-1, (-1, size))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a place of each block, as fp32 [..., 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor, *, high_first: bool) -> Tensor:
    """Two numbers of 4 bits for each byte of the last dimension."""
    high, low = codes >> 4, codes & 15
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def _scaled(values_RI: Tensor, scale_RB: Tensor, block: int) -> Tensor:
    return (values_RI.unflatten(-1, (-1, block)) * scale_RB[..., None]).flatten(-2)


DECODERS: Mapping[str, Callable[[PackedMatrix, Any], Tensor]] = {
    "code4": _code4,
    "int8": _int8,
    "fp8": _fp8,
    "int4": _int4,
    "mxfp4": _mxfp4,
    "int8_groups": _int8_groups,
    "q4_0": _q4_0,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}
