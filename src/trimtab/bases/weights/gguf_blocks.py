"""Blocks as GGUF files have them: Q4_0, Q8_0, Q4_K, Q6_K. `ops.quantized` says what is in a block.

Nothing is quantised to these here: they are read from .gguf files (`bases/gguf_packed.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.bases.weights.packed import Packed, PackedLinear, expect

BLOCKS: Mapping[str, tuple[int, int]] = {"q4_0": (32, 18), "q8_0": (32, 34), "q4_k": (256, 144), "q6_k": (256, 210)}
"""Format -> (entries of a block, its bytes)."""


class GgufBlocks(Packed):
    """Its one tensor is named as the format: uint8 [O, bytes of a row]."""

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        return {"codes": module.get_buffer(cls.name)}


class Q4_0(GgufBlocks):
    name: ClassVar[str] = "q4_0"


class Q8_0(GgufBlocks):
    name: ClassVar[str] = "q8_0"


class Q4_K(GgufBlocks):
    name: ClassVar[str] = "q4_k"


class Q6_K(GgufBlocks):
    name: ClassVar[str] = "q6_k"


def read(tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """A layer whose blocks are in a tensor that is named as their format. ValueError where it does not fit."""
    found = [name for name in tensors if name in BLOCKS]
    if len(found) != 1:
        raise ValueError(f"blocks of {' and '.join(found) or 'no kind'}, where those of one of {', '.join(BLOCKS)} belong")
    (O, I), (block, size) = shape, BLOCKS[found[0]]  # noqa: E741
    if I % block:
        raise ValueError(f"blocks of {block} do not divide the {I} inputs")
    expect(tensors, {found[0]: ((O, I // block * size), (torch.uint8,))})
    return PackedLinear(found[0], shape, dtype, {found[0]: tensors[found[0]]}, bias, block=block)
