"""Whole numbers of 2 to 8 bits with a scale and a zero for each group of inputs: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978).

W[o, i] = scale[o, g] · (code[o, i] − zero[o, g]), g the group of input i. Both store several codes in an int32: GPTQ along the inputs, AWQ
along the outputs in an order of its own ("gemm") or along the inputs ("gemv"). In memory all have the rows of the outputs one after the
other: two codes of 4 bits a byte; or codes and zeros of 8 bits less 128, as int8. `stored` gives back what the files have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bases.weights.packed import Packed, PackedLinear, expect, in_one, rows_of
from trimtab.places.shards import visited

IN_ORDER = tuple(range(16))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight consecutive outputs each four bits of an int32 are, from the lowest on."""
_INT32, _FLOATS = (torch.int32,), (torch.float16, torch.bfloat16, torch.float32)


class GroupedLinear(PackedLinear):
    """Buffers: codes, scales fp32 [O, G], zeros [O, G]; `g_idx` [I] where the files have it. Where groups are not consecutive, `order` [I]
    has the inputs group by group, and codes are kept so; or, where groups have different sizes, `group` is `g_idx`. Of up to 4
    bits codes are uint8 [O, I/2] and zeros uint8; of 8 bits both are int8, codes [O, I]. scale_dtype: of the files. less_by_one: whether
    the files' zeros are."""

    scale_dtype: torch.dtype
    less_by_one: bool


class Grouped(Packed):
    """A format of this kind; its `bits` are those of a code."""

    bits: ClassVar[int]
    order: ClassVar[Sequence[int]] = IN_ORDER

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        (O, I), most_code = weight_OI.shape, 2**cls.bits - 1  # noqa: E741
        size = next(n for n in (128, 64, 32, 16, 8, 4, 2) if I % n == 0)
        groups = weight_OI.float().view(O, I // size, size)
        least, most = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scale = ((most - least) / most_code).clamp_min(1e-6).to(torch.float16)
        zero = (-least / scale.float()).round().clamp(0, most_code)
        code = (groups / scale.float()[..., None]).round().add(zero[..., None]).clamp(0, most_code).view(O, I).to(torch.uint8)
        return cls.layer(code, scale, zero.to(torch.uint8), None, bias, dtype, size)

    @classmethod
    def layer(
        cls,
        code_OI: Tensor,
        scale: Tensor,
        zero: Tensor,
        g_idx: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        size: int,
        less_by_one: bool = False,
        beside: Mapping[str, Tensor] | None = None,
    ) -> PackedLinear:
        """A layer of codes and zeros from 0 on, in uint8. beside: tensors of the files that it does not compute with."""
        order = None if g_idx is None else _order(g_idx, size)
        code_OI = code_OI if order is None else code_OI[:, order]
        codes = _pairs(code_OI) if cls.bits <= 4 else _signed(code_OI)
        zeros = zero.contiguous() if cls.bits <= 4 else _signed(zero)
        kept = {"codes": codes, "scales": scale.float().contiguous(), "zeros": zeros, **(beside or {})}
        shape, derived = (code_OI.shape[0], code_OI.shape[1]), {}
        if g_idx is not None:
            kept["g_idx"] = g_idx
            if order is not None:
                derived["order"] = order
            elif not consecutive(g_idx, size):
                derived["group"] = g_idx.long()
        made = GroupedLinear(cls.name, shape, dtype, kept, bias, block=size, derived=derived)
        made.scale_dtype, made.less_by_one = scale.dtype, less_by_one
        return made

    @classmethod
    def below_each_other(cls, layers: Sequence[PackedLinear]) -> PackedLinear | None:
        """None where groups are not consecutive: each layer has an order of its own."""
        told = {tuple(getattr(layer, name, None) for name in ("scale_dtype", "less_by_one", "zeros_stored")) for layer in layers}
        if len(told) > 1 or any(not {"group", "order"}.isdisjoint(layer._buffers) for layer in layers):
            return None
        made = GroupedLinear(
            cls.name, rows_of(layers), layers[0].compute_dtype, in_one(layers, "codes", "scales", "zeros"), None, block=layers[0].block
        )
        first: Any = layers[0]
        made.scale_dtype, made.less_by_one = first.scale_dtype, first.less_by_one
        if hasattr(first, "zeros_stored"):
            made.zeros_stored = first.zeros_stored  # type: ignore[assignment]
        return made

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        has = module.get_buffer
        parts = {"codes": has("codes"), "scale": has("scales"), "zero": has("zeros")}
        return parts | {name: has(name) for name in ("group", "order") if name in module._buffers}

    def stored(self) -> dict[str, Tensor]:
        visited(self.module)
        has = self.module.get_buffer
        codes, zeros = has("codes"), has("zeros")
        if self.bits <= 4:
            codes = torch.stack((codes >> 4, codes & 15), -1).flatten(1)
        else:
            codes, zeros = _unsigned(codes), _unsigned(zeros)
        if "order" in self.module._buffers:
            codes = torch.empty_like(codes).index_copy_(1, has("order"), codes)
        return self._in_files(codes, zeros, has("scales").to(self.module.scale_dtype))

    def _in_files(self, code_OI: Tensor, zero_OG: Tensor, scale_OG: Tensor) -> dict[str, Tensor]:
        """The files' tensors. Codes and zeros are from 0 on, in uint8."""
        raise NotImplementedError


class Gptq(Grouped):
    """`g_idx` says the group of each input; without it groups are consecutive. Files of format "gptq" have zeros that are less by one."""

    name: ClassVar[str] = "gptq"
    kind: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

    def _in_files(self, code_OI: Tensor, zero_OG: Tensor, scale_OG: Tensor) -> dict[str, Tensor]:
        zero_OG = (zero_OG - 1) & (2**self.bits - 1) if self.module.less_by_one else zero_OG
        found = {"qweight": pack(code_OI, IN_ORDER, self.bits).T.contiguous(), "qzeros": pack(zero_OG.T, IN_ORDER, self.bits)}
        found["scales"] = scale_OG.T.contiguous()
        return found | ({"g_idx": self.module.get_buffer("g_idx")} if "g_idx" in self.module._buffers else {})


class Gptq2(Gptq):
    """Codes of 2 bits, in memory in 4."""

    name: ClassVar[str] = "gptq-2"
    bits: ClassVar[int] = 2


class Gptq3(Gptq):
    """Codes of 3 bits, in memory in 4."""

    name: ClassVar[str] = "gptq-3"
    bits: ClassVar[int] = 3


class Gptq8(Gptq):
    name: ClassVar[str] = "gptq-8"
    kind: ClassVar[str] = "int8_groups"
    bits: ClassVar[int] = 8


class Awq(Grouped):
    name: ClassVar[str] = "awq"
    kind: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

    def _in_files(self, code_OI: Tensor, zero_OG: Tensor, scale_OG: Tensor) -> dict[str, Tensor]:
        zeros = pack(zero_OG.T, AWQ_ORDER)
        return {"qweight": pack(code_OI.T, AWQ_ORDER), "qzeros": zeros, "scales": scale_OG.T.contiguous()}


class AwqGemv(Awq):
    """Zeros and scales are filled up with zeros to the width that the program's kernels read."""

    name: ClassVar[str] = "awq-gemv"

    def _in_files(self, code_OI: Tensor, zero_OG: Tensor, scale_OG: Tensor) -> dict[str, Tensor]:
        width = gemv_width(code_OI.shape[1], self.module.block)
        zeros, scales = (F.pad(t, (0, width - t.shape[1])) for t in (zero_OG, scale_OG))
        return {"qweight": pack(code_OI, IN_ORDER), "qzeros": pack(zeros, IN_ORDER), "scales": scales.contiguous()}


def read_gptq(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, settings: Mapping[str, Any]
) -> PackedLinear:
    """A layer as stored. settings: `bits`, `group_size` (-1: one group), `checkpoint_format`; with `dynamic`, by which layers differ, the
    shapes say both. ValueError where something does not fit."""
    if (form := settings.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format {form!r} of GPTQ is not read, only 'gptq' and 'gptq_v2'")
    (O, I), (bits, size) = shape, _told(settings, shape, _as_shaped(tensors, shape) if settings.get("dynamic") else {})  # noqa: E741
    groups = -(-I // size)
    shapes = {"qweight": ((words(I, bits), O), _INT32), "scales": ((groups, O), _FLOATS), "qzeros": ((groups, words(O, bits)), _INT32)}
    expect(tensors, shapes | ({"g_idx": ((I,), _INT32)} if "g_idx" in tensors else {}))
    g_idx = tensors.get("g_idx")
    if g_idx is not None and bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise ValueError(f"g_idx names groups from {int(g_idx.min())} to {int(g_idx.max())}, where there are {groups}")
    less = form == "gptq"
    zero, code = unpack(tensors["qzeros"], IN_ORDER, bits)[:, :O].T, unpack(tensors["qweight"].T, IN_ORDER, bits)[:, :I]
    zero = (zero + 1) & (2**bits - 1) if less else zero
    cls = {c.bits: c for c in (Gptq2, Gptq3, Gptq, Gptq8)}[bits]
    return cls.layer(code, tensors["scales"].T, zero, g_idx, bias, dtype, size, less)


def read_awq(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, settings: Mapping[str, Any]
) -> PackedLinear:
    """A layer as stored. settings: `bits`, `group_size`, `version` ("gemm", "gemv"). ValueError where something does not fit."""
    (O, I), (bits, size) = shape, _told(settings, shape)  # noqa: E741
    if bits != 4:
        raise ValueError(f"bits = {bits}: AWQ is read with 4")
    if (version := str(settings.get("version", "gemm")).lower()) not in ("gemm", "gemv"):
        raise ValueError(f"version {version!r} of AWQ is not read, only 'gemm' and 'gemv'")
    groups, outputs = -(-I // size), -(-O // 8)
    if version == "gemv":
        width = gemv_width(I, size)
        expect(tensors, {"qweight": ((O, -(-I // 8)), _INT32), "scales": ((O, width), _FLOATS), "qzeros": ((O, width // 8), _INT32)})
        scale, zero = tensors["scales"], unpack(tensors["qzeros"], IN_ORDER)
        if bool(scale[:, groups:].any()) or bool(zero[:, groups:].any()):
            raise ValueError(f"scales or qzeros have more than the {groups} groups of {size} inputs")
        code = unpack(tensors["qweight"], IN_ORDER)[:, :I]
        return AwqGemv.layer(code, scale[:, :groups], zero[:, :groups], None, bias, dtype, size)
    expect(tensors, {"qweight": ((I, outputs), _INT32), "scales": ((groups, O), _FLOATS), "qzeros": ((groups, outputs), _INT32)})
    code, zero = (unpack(tensors[name], AWQ_ORDER)[:, :O].T for name in ("qweight", "qzeros"))
    return Awq.layer(code, tensors["scales"].T, zero, None, bias, dtype, size)


def gemv_width(inputs: int, size: int) -> int:
    """How many groups "gemv" has room for, by the widths that its kernels read: zeros of eights, and several of these for small groups."""
    several = {64: 2, 32: 4}.get(size, 1)
    return 8 * several * -(-(inputs // size) // (8 * several))


def unpack(packed: Tensor, order: Sequence[int], bits: int = 4) -> Tensor:
    """[R, C] int32 -> [R, 32/bits · C] uint8: the number at place order[k] of each int32 is in its k-th `bits` bits. Those of 3 bits stand
    one after the other, 32 in three int32."""
    if bits == 3:
        return _unpack_threes(packed)
    per = 32 // bits
    numbers = torch.empty(*packed.shape, per, dtype=torch.uint8, device=packed.device)
    for k, place in enumerate(order[:per]):
        numbers[..., place] = ((packed >> (bits * k)) & (2**bits - 1)).to(torch.uint8)
    return numbers.flatten(1)


def pack(numbers: Tensor, order: Sequence[int], bits: int = 4) -> Tensor:
    """What `unpack` takes apart, of a width that is filled up with zeros to whole int32; of 3 bits, to three of them."""
    if bits == 3:
        return _pack_threes(numbers)
    per = 32 // bits
    filled = F.pad(numbers.int(), (0, -numbers.shape[1] % per)).unflatten(1, (-1, per))
    packed = torch.zeros(filled.shape[:2], dtype=torch.int32, device=numbers.device)
    for k, place in enumerate(order[:per]):
        packed |= filled[..., place] << (bits * k)
    return packed


def words(numbers: int, bits: int) -> int:
    """How many int32 so many numbers take."""
    return 3 * -(-numbers // 32) if bits == 3 else -(-numbers * bits // 32)


def _unpack_threes(packed: Tensor) -> Tensor:
    three = packed.unflatten(1, (-1, 3)).long() & 0xFFFFFFFF
    numbers = torch.empty(*three.shape[:2], 32, dtype=torch.uint8, device=packed.device)
    for k in range(32):
        word, at = divmod(3 * k, 32)
        found = three[..., word] >> at
        numbers[..., k] = (found | three[..., word + 1] << (32 - at) if at > 29 else found) & 7
    return numbers.flatten(1)


def _pack_threes(numbers: Tensor) -> Tensor:
    filled = F.pad(numbers.long(), (0, -numbers.shape[1] % 32)).unflatten(1, (-1, 32))
    three = torch.zeros(*filled.shape[:2], 4, dtype=torch.int64, device=numbers.device)
    for k in range(32):
        word, at = divmod(3 * k, 32)
        three[..., word] |= filled[..., k] << at & 0xFFFFFFFF
        three[..., word + 1] |= filled[..., k] << at >> 32
    return (three[..., :3] - (three[..., :3] >> 31 << 32)).to(torch.int32).flatten(1)


def consecutive(g_idx: Tensor, size: int) -> bool:
    """Whether inputs have the groups that they would have without `g_idx`."""
    return torch.equal(g_idx, torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device) // size)


def _order(g_idx: Tensor, size: int) -> Tensor | None:
    """The inputs group by group, where groups are not consecutive and each has its `size` inputs; else None."""
    whole = bool((torch.bincount(g_idx.long(), minlength=len(g_idx) // size) == size).all())
    return g_idx.argsort(stable=True) if whole and not consecutive(g_idx, size) else None


def _pairs(code_OI: Tensor) -> Tensor:
    """Two codes a byte. Codes along the outputs, as AWQ has them, would keep that order in memory: kernels would copy them at each use."""
    return (code_OI[:, ::2] << 4 | code_OI[:, 1::2]).contiguous()


def _signed(numbers: Tensor) -> Tensor:
    """Numbers of 8 bits less 128."""
    return (numbers ^ 128).view(torch.int8).contiguous()


def _unsigned(numbers: Tensor) -> Tensor:
    return numbers.view(torch.uint8) ^ 128


def _as_shaped(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    """`bits` and `group_size` as the shapes of GPTQ's tensors have them, as far as they do."""
    (_, I), codes, scales = shape, tensors.get("qweight"), tensors.get("scales")  # noqa: E741
    if codes is None or scales is None or codes.dim() != 2 or not len(codes) or not len(scales):
        return {}
    return {"bits": 32 * len(codes) // I, "group_size": I // len(scales)}


def told(settings: Mapping[str, Any]) -> tuple[int, int | None]:
    """(bits of a code, inputs of a group, or None where all are one). ValueError where one of them cannot be read."""
    bits, size = settings.get("bits", 4), settings.get("group_size", 128)
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        raise ValueError(f"bits = {bits!r}: only 2, 3, 4 and 8 are read")
    if not is_size(size):
        raise ValueError(f"group_size = {size!r}, where -1 or a whole number above 0 belongs")
    return bits, None if size == -1 else size


def is_size(size: Any) -> bool:
    """Whether a config may have this as a `group_size`. One that is `true` is no 1."""
    return size is None or (type(size) is int and (size == -1 or size > 0))


def _told(settings: Mapping[str, Any], shape: tuple[int, int], instead: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """(bits of a code, inputs of a group)."""
    (bits, size), I = told({**settings, **(instead or {})}), shape[1]  # noqa: E741
    size = size or I
    if I % 2 or I % size:
        raise ValueError(f"group_size = {size} does not divide the {I} inputs")
    return bits, size
