"""8 bits an entry with a scale for each output, as bitsandbytes stores them (LLM.int8(), arXiv 2208.07339).

W[o, i] = weight[o, i] · SCB[o] / 127. bitsandbytes also rounds what it multiplies with to 8 bits. Here only the matrix is of 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.bases.weights.packed import Packed, PackedLinear, expect, in_one, rows_of

ROWS = 0
"""bitsandbytes' `weight_format` of a matrix that lies row by row, as all on the hub do."""


class Int8(Packed):
    name: ClassVar[str] = "int8"

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        largest_O = weight_OI.abs().amax(1).float()
        codes = (weight_OI * (127 / largest_O).nan_to_num(posinf=0)[:, None]).round().to(torch.int8)  # rows of zeros: 0, not NaN
        form = torch.tensor(ROWS, dtype=torch.uint8, device=weight_OI.device)
        stored = {"weight": codes, "SCB": largest_O, "weight_format": form}
        return PackedLinear(cls.name, (len(codes), codes.shape[1]), dtype, stored, bias, block=codes.shape[1])

    @classmethod
    def below_each_other(cls, layers: Sequence[PackedLinear]) -> PackedLinear | None:
        stored = in_one(layers, "weight", "SCB")
        return PackedLinear(cls.name, rows_of(layers), layers[0].compute_dtype, stored, None, block=layers[0].block)

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        return {"codes": module.get_buffer("weight"), "scale": module.get_buffer("SCB") * (1 / 127)}


def read(tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """A layer as bitsandbytes stores it. tensors: by their names after the module's. ValueError where they do not fit."""
    expect(tensors, {"weight": (shape, (torch.int8,)), "SCB": ((shape[0],), (torch.float32,))})
    if "weight_format" in tensors and int(tensors["weight_format"]) != ROWS:
        raise ValueError(f"weight_format is {int(tensors['weight_format'])}, where only {ROWS} is read: row by row")
    return PackedLinear(
        Int8.name, shape, dtype, {n: tensors[n] for n in ("weight", "SCB", "weight_format") if n in tensors}, bias, block=shape[1]
    )
