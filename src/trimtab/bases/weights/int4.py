"""4-bit whole numbers with a scale and a zero for each group of inputs: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978).

W[o, i] = scale[o, g] · (code[o, i] − zero[o, g]), g the group of input i. Both store eight codes in an int32, GPTQ along the inputs, AWQ
along the outputs in an order of its own. In memory both have the rows of the outputs one after the other, two codes a byte. `stored` gives
back what the files have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bases.weights.packed import Packed, PackedLinear, expect
from trimtab.places.shards import visited

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight consecutive outputs each four bits of an int32 are, from the lowest on."""
_INT32, _FLOATS = (torch.int32,), (torch.float16, torch.bfloat16, torch.float32)


class Int4Linear(PackedLinear):
    """Buffers: codes uint8 [O, I/2], scales fp32 [O, G], zeros uint8 [O, G]; `g_idx` [I] where the files have it, and `group`, the same,
    where groups are not consecutive. scale_dtype: of the files. less_by_one: whether the files' zeros are."""

    scale_dtype: torch.dtype
    less_by_one: bool


class Int4(Packed):
    kind: ClassVar[str] = "int4"
    order: ClassVar[Sequence[int]] = IN_ORDER

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        O, I = weight_OI.shape  # noqa: E741
        size = next(n for n in (128, 64, 32, 16, 8, 4, 2) if I % n == 0)
        groups = weight_OI.float().view(O, I // size, size)
        least, most = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
        scale = ((most - least) / 15).clamp_min(1e-6).to(torch.float16)
        zero = (-least / scale.float()).round().clamp(0, 15)
        code = (groups / scale.float()[..., None]).round().add(zero[..., None]).clamp(0, 15).view(O, I).to(torch.uint8)
        return cls._layer(_pairs(code), scale, zero.to(torch.uint8), None, bias, dtype, size)

    @classmethod
    def _layer(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        g_idx: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        size: int,
        less_by_one: bool = False,
    ) -> PackedLinear:
        kept = {"codes": codes, "scales": scale.float().contiguous(), "zeros": zero}
        shape, derived = (len(codes), 2 * codes.shape[1]), {}
        if g_idx is not None:
            kept["g_idx"] = g_idx
            if not torch.equal(g_idx, torch.arange(shape[1], dtype=g_idx.dtype, device=g_idx.device) // size):
                derived["group"] = g_idx.long()
        made = Int4Linear(cls.name, shape, dtype, kept, bias, block=size, derived=derived)
        made.scale_dtype, made.less_by_one = scale.dtype, less_by_one
        return made

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        has = module.get_buffer
        parts = {"codes": has("codes"), "scale": has("scales"), "zero": has("zeros")}
        return parts | ({"group": has("group")} if "group" in module._buffers else {})

    def stored(self) -> dict[str, Tensor]:
        visited(self.module)
        has = self.module.get_buffer
        code_OI = torch.stack((has("codes") >> 4, has("codes") & 15), -1).flatten(1)
        found = {"qweight": self._pack_codes(code_OI), "scales": has("scales").T.to(self.module.scale_dtype).contiguous()}
        found["qzeros"] = pack(self._zeros_in_files(has("zeros")).T, self.order)
        return found | ({"g_idx": has("g_idx")} if "g_idx" in self.module._buffers else {})

    @classmethod
    def _pack_codes(cls, code_OI: Tensor) -> Tensor:
        raise NotImplementedError

    def _zeros_in_files(self, zero_OG: Tensor) -> Tensor:
        return zero_OG


class Gptq(Int4):
    """`g_idx` says the group of each input; without it groups are consecutive. Files of format "gptq" have zeros that are less by one."""

    name: ClassVar[str] = "gptq"

    @classmethod
    def _pack_codes(cls, code_OI: Tensor) -> Tensor:
        return pack(code_OI, IN_ORDER).T.contiguous()

    def _zeros_in_files(self, zero_OG: Tensor) -> Tensor:
        return (zero_OG - 1) & 15 if self.module.less_by_one else zero_OG


class Awq(Int4):
    name: ClassVar[str] = "awq"
    order: ClassVar[Sequence[int]] = AWQ_ORDER

    @classmethod
    def _pack_codes(cls, code_OI: Tensor) -> Tensor:
        return pack(code_OI.T, AWQ_ORDER)


def read_gptq(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, settings: Mapping[str, Any]
) -> PackedLinear:
    """A layer as stored. settings: `bits`, `group_size` (-1: one group), `checkpoint_format`. ValueError where something does not fit."""
    (O, I), size = shape, _group_size(settings, shape)  # noqa: E741
    if (form := settings.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format {form!r} of GPTQ is not read, only 'gptq' and 'gptq_v2'")
    groups, (inputs, outputs) = -(-I // size), (-(-I // 8), -(-O // 8))
    shapes = {"qweight": ((inputs, O), _INT32), "scales": ((groups, O), _FLOATS), "qzeros": ((groups, outputs), _INT32)}
    expect(tensors, shapes | ({"g_idx": ((I,), _INT32)} if "g_idx" in tensors else {}))
    g_idx = tensors.get("g_idx")
    if g_idx is not None and bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise ValueError(f"g_idx names groups from {int(g_idx.min())} to {int(g_idx.max())}, where there are {groups}")
    less = form == "gptq"
    zero = unpack(tensors["qzeros"], IN_ORDER)[:, :O].T
    codes = _pairs(unpack(tensors["qweight"].T, IN_ORDER)[:, :I])
    zero = ((zero + 1) & 15 if less else zero).contiguous()
    return Gptq._layer(codes, tensors["scales"].T, zero, g_idx, bias, dtype, size, less)


def read_awq(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, settings: Mapping[str, Any]
) -> PackedLinear:
    """A layer as stored. settings: `bits`, `group_size`, `version` ("gemm"). ValueError where something does not fit."""
    (O, I), size = shape, _group_size(settings, shape)  # noqa: E741
    if (version := str(settings.get("version", "gemm")).lower()) != "gemm":
        raise ValueError(f"version {version!r} of AWQ is not read, only 'gemm'")
    groups, outputs = -(-I // size), -(-O // 8)
    expect(tensors, {"qweight": ((I, outputs), _INT32), "scales": ((groups, O), _FLOATS), "qzeros": ((groups, outputs), _INT32)})
    codes = _pairs(unpack(tensors["qweight"], AWQ_ORDER)[:, :O].T)
    zero = unpack(tensors["qzeros"], AWQ_ORDER)[:, :O].T.contiguous()
    return Awq._layer(codes, tensors["scales"].T, zero, None, bias, dtype, size)


def unpack(packed: Tensor, order: Sequence[int]) -> Tensor:
    """[R, C] int32 -> [R, 8 C] uint8: the number at place order[k] of eight is in the k-th four bits."""
    numbers = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for k, place in enumerate(order):
        numbers[..., place] = ((packed >> (4 * k)) & 15).to(torch.uint8)
    return numbers.flatten(1)


def pack(numbers: Tensor, order: Sequence[int]) -> Tensor:
    """What `unpack` takes apart, of a width that is filled up with zeros to whole eights."""
    eights = F.pad(numbers.int(), (0, -numbers.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = torch.zeros(eights.shape[:2], dtype=torch.int32, device=numbers.device)
    for k, place in enumerate(order):
        packed |= eights[..., place] << (4 * k)
    return packed


def _pairs(code_OI: Tensor) -> Tensor:
    """Two codes a byte. Codes along the outputs, as AWQ has them, would keep that order in memory: kernels would copy them at each use."""
    return (code_OI[:, ::2] << 4 | code_OI[:, 1::2]).contiguous()


def _group_size(settings: Mapping[str, Any], shape: tuple[int, int]) -> int:
    bits, size, I = settings.get("bits", 4), settings.get("group_size", 128), shape[1]  # noqa: E741
    if bits != 4:
        raise ValueError(f"bits = {bits}: only 4 are read")
    size = I if size in (-1, None) else size
    if not isinstance(size, int) or size < 1 or I % 2 or I % size:
        raise ValueError(f"group_size = {size} does not divide the {I} inputs")
    return size
