"""Dense: the matrix as it is multiplied, one number in float32, bfloat16, float16 or float64 for each entry.

`nn.Linear` and `nn.Embedding` keep [O, I]; transformers' `Conv1D` keeps [I, O].
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import ops
from trimtab.bases.weights.base import Weight
from trimtab.bases.weights.passing import Passing
from trimtab.memory import release_mapped
from trimtab.places.shards import visited

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Dense(Weight):
    """Where the parameter requires gradients, `matmul` gives them to it."""

    name: ClassVar[str] = "dense"
    stored_dense: ClassVar[bool] = True

    def __init__(self, module: Any):
        super().__init__(module)
        self._parameters, self._transposed = module._parameters, _is_conv1d(module)

    @classmethod
    def claims(cls, module: Any) -> bool:
        if not (isinstance(module, nn.Linear | nn.Embedding) or _is_conv1d(module)):
            return False
        weight = module._parameters.get("weight")
        return weight is not None and weight.dtype in DTYPES

    @classmethod
    def of_linear(cls, linear: nn.Linear) -> nn.Module:
        return linear

    @property
    def _weight_OI(self) -> Tensor:
        visited(self.module)
        weight: Tensor = self._parameters["weight"]
        return weight.T if self._transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self._parameters["weight"].shape
        return (second, first) if self._transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._parameters["weight"].dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self._parameters["weight"].device
        return device

    @property
    def trained(self) -> bool:
        return bool(self._parameters["weight"].requires_grad)

    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        weight_OI = self._weight_OI
        if out is None:
            return F.linear(x_TI, weight_OI, bias_O)
        return ops.linear_into(out, x_TI, weight_OI, bias_O)

    def matmul_t(self, dy_TO: Tensor) -> Tensor:
        return dy_TO @ self._weight_OI

    def dense(self, rows: Any = None) -> Tensor:
        weight_OI, own = self._weight_OI, self._parameters["weight"]
        if isinstance(own, Passing):  # what packs an adapter may ask for it while its layer does not run
            weight_OI = own.values().T if self._transposed else own.values()
        return weight_OI if rows is None else weight_OI[rows]

    def stored(self) -> dict[str, Tensor]:
        visited(self.module)
        return {"weight": self._parameters["weight"]}

    @torch.no_grad()
    def write(self, weight_OI: Tensor, rows: slice = slice(None)) -> None:
        self._weight_OI[rows].copy_(weight_OI)

    def untie(self) -> None:
        own = self._parameters["weight"]
        self.module.weight = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
        release_mapped(own.data_ptr(), own.nbytes)


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"
