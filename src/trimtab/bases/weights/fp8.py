"""8-bit floating point with a scale for each block of the matrix, as DeepSeek and Qwen publish it: W = weight (e4m3) · weight_scale_inv.

Blocks have 128 x 128 entries; the last ones may be smaller. Mistral's files have one scale for a matrix. Others name their scales
`weight_scale`, one or one for each output, which are read as those of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bases.weights import compressed
from trimtab.bases.weights.packed import Packed, PackedLinear, expect, in_one, rows_of, scales_in_one

BLOCK = 128


class Fp8(Packed):
    name: ClassVar[str] = "fp8"

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        O, I = weight_OI.shape  # noqa: E741
        padded = F.pad(weight_OI.float(), (0, -I % BLOCK, 0, -O % BLOCK))
        blocks = padded.view(-(-O // BLOCK), BLOCK, -(-I // BLOCK), BLOCK)
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-38) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:O, :I].to(torch.float8_e4m3fn)
        return _layer({"weight": codes.contiguous(), "weight_scale_inv": scale}, (O, I), bias, dtype, (BLOCK, BLOCK))

    @classmethod
    def below_each_other(cls, layers: Sequence[PackedLinear]) -> PackedLinear | None:
        scale, rows = scales_in_one(layers, [cls.parts(layer)["scale"] for layer in layers])
        stored = in_one(layers, "weight") | {"weight_scale_inv": scale}
        return _layer(stored, rows_of(layers), None, layers[0].compute_dtype, (rows, layers[0].block))

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        scale = module.get_buffer("weight_scale_inv" if module.get_buffer("weight_scale_inv").dim() else "scale")
        return {"codes": module.get_buffer("weight"), "scale": scale.float()}


def read(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, settings: Mapping[str, Any]
) -> PackedLinear:
    """A layer as stored. settings: `weight_block_size`; without it a scale is the matrix's, or its blocks have 128 x 128. ValueError where
    its tensors do not fit each other."""
    if "weight_scale" in tensors and "weight_scale_inv" not in tensors and settings.get("weight_block_size") is None:
        return compressed.read_float(tensors, shape, bias, dtype)
    size = settings.get("weight_block_size") or (BLOCK, BLOCK)
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"weight_block_size = {size}, where two numbers above 0 belong")
    blocks = tuple(-(-n // block) for n, block in zip(shape, size, strict=True))
    scale, whole = tensors.get("weight_scale_inv"), settings.get("weight_block_size") is None
    one = scale is not None and whole and not scale.dim()
    expect(
        tensors,
        {
            "weight": (shape, (torch.float8_e4m3fn,)),
            "weight_scale_inv": (() if one else blocks, (torch.float32, torch.bfloat16, torch.float16)),
        },
    )
    derived = {"scale": tensors["weight_scale_inv"].float().repeat(*blocks)} if one else {}
    kept = ("weight", "weight_scale_inv", "activation_scale")  # the last is for products in 8 bits, which are not computed here
    return _layer({n: tensors[n] for n in kept if n in tensors}, shape, bias, dtype, (size[0], size[1]), derived)


def _layer(
    stored: Mapping[str, Tensor],
    shape: tuple[int, int],
    bias: Tensor | None,
    dtype: torch.dtype,
    size: tuple[int, int],
    derived: Mapping[str, Tensor] | None = None,
) -> PackedLinear:
    """derived: where one scale is stored, it again for each block, as kernels read it."""
    return PackedLinear(Fp8.name, shape, dtype, stored, bias, block=size[1], block_rows=size[0], derived=derived)
