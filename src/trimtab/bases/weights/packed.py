"""What packed formats share: the module that stands in a linear layer's place, and a `Weight` that multiplies by `ops.quantized`.

A format of this kind says what its tensors mean (`parts`), how they are read from a folder, and, for some, how a dense matrix becomes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.bases.weights.base import Weight
from trimtab.ops import quantized
from trimtab.ops.quantized import PackedMatrix
from trimtab.places.shards import visited


class PackedLinear(nn.Module):
    """A linear layer whose matrix [O, I] is packed. Its buffers are the tensors of its files, with ":" for each "." in a name.

    form: the format's name. dtype: that of inputs and results. block: see `PackedMatrix`. derived: what is computed of the stored tensors,
    and is not stored itself. experts: where it holds the matrices of so many experts, one below the other, in a parameter's place.
    """

    experts: int = 0

    def __init__(
        self,
        form: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        stored: Mapping[str, Tensor],
        bias: Tensor | None,
        *,
        block: int,
        block_rows: int = 1,
        derived: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.form, (self.out_features, self.in_features), self.compute_dtype = form, shape, dtype
        self.block, self.block_rows = block, block_rows
        for name, tensor in stored.items():  # detached: a view keeps the tensor that it was made of, even where its memory is replaced
            self.register_buffer(name.replace(".", ":"), tensor.detach())
        for name, tensor in (derived or {}).items():
            self.register_buffer(name, tensor.detach(), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        return quantized.product(self.matrix, x_TI, self.bias)

    @property
    def matrix(self) -> PackedMatrix:
        visited(self)
        shape = self.out_features, self.in_features
        return PackedMatrix(KINDS[self.form].kind, shape, self.compute_dtype, KINDS[self.form].parts(self), self.block, self.block_rows)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form}"


KINDS: dict[str, type[Packed]] = {}
"""format's name -> class, for the packed ones."""


class Packed(Weight):
    """A packed matrix. `read` and `of_matrix` raise ValueError, in words, where tensors do not fit each other."""

    kind: ClassVar[str] = ""
    """Of `PackedMatrix`; the format's name unless it says another."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            cls.kind = cls.kind or cls.name
            KINDS[cls.name] = cls

    @classmethod
    def claims(cls, module: Any) -> bool:
        return isinstance(module, PackedLinear) and module.form == cls.name

    @classmethod
    def of_linear(cls, linear: nn.Linear) -> nn.Module:
        return cls.of_matrix(linear.weight.detach(), linear.bias, linear.weight.dtype)

    @classmethod
    def of_matrix(cls, weight_OI: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear:
        """A layer with this matrix, quantised. dtype: what it computes in."""
        raise NotImplementedError

    @classmethod
    def below_each_other(cls, layers: Sequence[PackedLinear]) -> PackedLinear | None:
        """Layers of this format, with one number of inputs and one `block`, as one: their matrices one below the other. None where one
        layer cannot hold them. What is stored of it need not be what the layers' files have, but means the same entries."""
        return None

    @classmethod
    def parts(cls, module: PackedLinear) -> dict[str, Tensor]:
        """`PackedMatrix.parts` of a module."""
        raise NotImplementedError

    @property
    def packed(self) -> PackedMatrix:
        """The matrix, for kernels."""
        return self.module.matrix  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return next(self.module.buffers()).device  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for name, t in self.module.state_dict().items() if name != "bias")

    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return quantized.product(self.packed, x_TI, bias_O, out)

    def matmul_t(self, dy_TO: Tensor) -> Tensor:
        return quantized.product_t(self.packed, dy_TO)

    def dense(self, rows: Any = None) -> Tensor:
        return quantized.dense(self.packed, rows)

    def stored(self) -> dict[str, Tensor]:
        visited(self.module)
        kept = self.module.state_dict()
        return {name.replace(":", "."): tensor for name, tensor in kept.items() if name != "bias"}


def rows_of(layers: Sequence[PackedLinear]) -> tuple[int, int]:
    """The shape that matrices one below the other have."""
    return sum(layer.out_features for layer in layers), layers[0].in_features


def in_one(layers: Sequence[PackedLinear], *names: str) -> dict[str, Tensor]:
    """These buffers of all layers, the rows of each after those of the one before."""
    return {name: torch.cat([layer.get_buffer(name) for layer in layers]) for name in names}


def scales_in_one(layers: Sequence[PackedLinear], scales: Sequence[Tensor]) -> tuple[Tensor, int]:
    """(scales of blocks of rows, [O/rows, G], of all layers; how many rows a block has then). Blocks are made smaller where a layer's rows
    are no whole number of them."""
    rows = math.gcd(*(n for layer in layers for n in (layer.out_features, layer.block_rows)))
    each = [s.repeat_interleave(layer.block_rows // rows, 0)[: layer.out_features // rows] for s, layer in zip(scales, layers, strict=True)]
    return torch.cat(each), rows


def expect(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]) -> None:
    """ValueError, with all that is wrong, where a tensor is missing or has another shape or dtype than these."""
    wrong = []
    for name, (shape, dtypes) in shapes.items():
        found = tensors.get(name)
        if found is None:
            wrong.append(f"no tensor {name}")
        elif tuple(found.shape) != shape or found.dtype not in dtypes:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            has = f"{list(found.shape)} {str(found.dtype).removeprefix('torch.')}"
            wrong.append(f"{name} is {has} where {list(shape)} {kinds} belongs")
    if wrong:
        raise ValueError("; ".join(wrong))
