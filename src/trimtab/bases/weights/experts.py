"""The matrices of a layer's experts: a 3-D parameter with a matrix for each expert, or its packed form.

A dense parameter is [E, O, I], or [E, I, O] where the class is transposed (gpt-oss). Packed, a `PackedLinear` of E·O rows stands in the
parameter's place.
Dimensions: R rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab import ops
from trimtab.bases.weights.packed import PackedLinear
from trimtab.ops import quantized
from trimtab.ops.quantized import PackedMatrix
from trimtab.places.shards import visited


class Experts:
    """Matrices W [O, I] of E experts, as their module holds them. It reads the module at each use, as a `Weight` does."""

    def __init__(self, module: Any, name: str):
        self.module, self.name = module, name
        self.transposed = bool(getattr(module, "is_transposed", False))

    @property
    def _parameter(self) -> Tensor:
        parameter: Tensor = self.module._parameters[self.name]
        return parameter

    @property
    def packed(self) -> PackedLinear | None:
        """What holds the matrices of all experts, where they are packed."""
        found: PackedLinear | None = self.module._modules.get(self.name)
        return found

    def _packed(self, expert: int) -> PackedMatrix | Tensor | None:
        """One expert's matrix, where it is packed; dequantised where it shares scales with the next one."""
        if (packed := self.packed) is None:
            return None
        whole, rows = packed.matrix, slice(expert * self.outputs(), (expert + 1) * self.outputs())
        return quantized.part(whole, rows) or quantized.dense(whole, rows)

    def outputs(self) -> int:
        """O."""
        if (packed := self.packed) is not None:
            return packed.out_features // packed.experts
        return self._parameter.shape[2 if self.transposed else 1]

    @property
    def dtype(self) -> torch.dtype:
        """That of x and y."""
        if (packed := self.packed) is not None:
            return packed.compute_dtype
        return self._parameter.dtype

    def dense(self, expert: int) -> Tensor:
        """W [O, I] of one expert; never to be written to."""
        if (found := self._packed(expert)) is not None:
            return found if isinstance(found, Tensor) else quantized.dense(found)
        visited(self.module)
        own = self._parameter[expert]
        return own.T if self.transposed else own

    def matmul(self, expert: int, x_RI: Tensor, out: Tensor) -> None:
        """Write x Wᵀ of one expert to out [R, O]; without gradients."""
        if isinstance(packed := self._packed(expert), PackedMatrix):
            quantized.product(packed, x_RI, out=out)
            return
        ops.linear_into(out, x_RI, self.dense(expert) if packed is None else packed, None)

    def matmul_t(self, expert: int, dy_RO: Tensor) -> Tensor:
        """dx [R, I] = dy W of one expert."""
        if isinstance(packed := self._packed(expert), PackedMatrix):
            return quantized.product_t(packed, dy_RO)
        return dy_RO @ (self.dense(expert) if packed is None else packed)

    @torch.no_grad()
    def write(self, expert: int, weight_OI: Tensor) -> None:
        """Put another matrix in one expert's place, rounded to the parameter's dtype."""
        self.dense(expert).copy_(weight_OI)


def put_experts(module: nn.Module, name: str, packed: nn.Module) -> None:
    """Put what holds the matrices of all experts in the place of a module's parameter."""
    delattr(module, name)
    setattr(module, name, packed)
    vars(module)["_is_hf_initialized"] = True


def put_dense(module: nn.Module, name: str, matrix: Tensor | None) -> None:
    """Put a matrix in the place of a module's parameter, or of what stands there. None: leave the place empty, also in `state_dict()`."""
    if name in module._modules:
        delattr(module, name)
    module.register_parameter(name, None if matrix is None else nn.Parameter(matrix, requires_grad=False))
    vars(module)["_is_hf_initialized"] = True


def parameters_of_experts(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The parameters of experts in transformers' layout: full name -> (its module, its name there)."""
    return {
        f"{at}.{name}": (module, name)
        for at, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
