"""4-bit floating point (e2m1) with a power of two for each 32 inputs: OCP's MXFP4, in which gpt-oss publishes its experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.bases.weights.packed import Packed, PackedLinear, expect

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK, BIAS, LARGEST_EXPONENT = 32, 127, 2
NAN = 255
"""The one scale that is no power of two."""


class Mxfp4(Packed):
    """blocks: uint8, O·I/2 of them, the low nibble is the even entry. scales: uint8, O·I/32 of them, the exponent plus 127."""

    name: ClassVar[str] = "mxfp4"

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        values = torch.tensor(VALUES, dtype=torch.float32, device=weight_OI.device)
        blocks = weight_OI.float().unflatten(1, (-1, BLOCK))
        exponent = blocks.abs().amax(-1).clamp_min(2.0**-BIAS).log2().floor() - LARGEST_EXPONENT
        scaled = blocks / torch.exp2(exponent)[..., None]
        code = torch.bucketize(scaled.abs(), (values[1:] + values[:-1]) / 2).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
        stored = {"blocks": code[..., ::2] | code[..., 1::2] << 4, "scales": (exponent + BIAS).to(torch.uint8)}
        stored["blocks"] = stored["blocks"].flatten(1)
        return cls._made(stored, (len(code), weight_OI.shape[1]), bias, dtype)

    @classmethod
    def _made(cls, stored: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float32, device=stored["blocks"].device)
        return PackedLinear(cls.name, shape, dtype, stored, bias, block=BLOCK, derived={"table": table})

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        rows, has = module.out_features, module.get_buffer
        return {"codes": has("blocks").view(rows, -1), "table": has("table"), "scale": has("scales").view(rows, -1)}


def read(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype, settings: Mapping[str, Any]
) -> PackedLinear:
    """The matrices of some experts as gpt-oss stores them: blocks [E, O, I/32, 16], scales [E, O, I/32]. shape: (E·O, I). settings: E under
    `experts`. ValueError where they do not fit."""
    experts = settings["experts"]
    O, I = shape[0] // experts, shape[1]  # noqa: E741
    if I % BLOCK:
        raise ValueError(f"blocks of {BLOCK} do not divide the {I} inputs")
    expect(
        tensors, {"blocks": ((experts, O, I // BLOCK, BLOCK // 2), (torch.uint8,)), "scales": ((experts, O, I // BLOCK), (torch.uint8,))}
    )
    if lost := int((tensors["scales"] == NAN).sum()):
        raise ValueError(f"scales has {lost:,} numbers that are not finite")
    return Mxfp4._made({n: tensors[n] for n in ("blocks", "scales")}, shape, bias, dtype)
