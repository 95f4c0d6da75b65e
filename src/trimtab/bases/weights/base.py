"""The contract of a weight format: what the forward needs of a frozen matrix, whatever lies in the file.

Read this file first. A format is one class in one file of this folder. It claims the modules of a model that hold a matrix of its kind,
and stands for that matrix everywhere: nothing outside this folder reads a module's `weight`. A class that sets `name` registers itself.
With that its bases run, train adapters and are fingerprinted, and the laws run over it.

A format keeps its tensors as parameters or buffers of the module, so that whoever keeps something that was computed from them (packed
weights, DoRA's norms) sees when they are written to. The vectors of a model are no matrices and stay tensors: biases, read from the module,
and norms' weights, read by `norm_weight`.

Dimensions: T rows, I inputs, O outputs. An embedding is the matrix of the output head that may be tied to it: O tokens, I features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.errors import BaseError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trimtab.ops.quantized import PackedMatrix

FORMATS: dict[str, type[Weight]] = {}
"""name -> class, filled by definition of the classes."""


class Weight:
    """One matrix W [O, I] of a model, as its module holds it. It reads the module at each use, so it is true to what stands there now."""

    name: ClassVar[str] = ""
    """The format's name, in messages."""
    stored_dense: ClassVar[bool] = False
    """Whether what is stored is the matrix itself, as it is multiplied. Only then can it be trained in full, be copied into an adapter
    (`modules_to_save`), take a merge, and be copied into the layout that a matmul wants."""

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            FORMATS[cls.name] = cls

    def __init__(self, module: Any):
        self.module = module

    @classmethod
    def claims(cls, module: Any) -> bool:
        """Whether this module holds a matrix in this format. At most one format may claim a module."""
        raise NotImplementedError

    @classmethod
    def of_linear(cls, linear: nn.Linear) -> nn.Module:
        """A module that stands in a linear layer's place with its matrix in this format, and its bias. The laws run on such modules."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in: that of x and y."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def trained(self) -> bool:
        """Whether the matrix wants gradients now."""
        return False

    @property
    def packed(self) -> PackedMatrix | None:
        """The matrix for the kernels of `ops.quantized`, where it is in a format of theirs."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the matrix takes."""
        return sum(t.nbytes for t in self.stored().values())

    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """y [T, O] = x Wᵀ + b. Differentiable in x and b; in W only where it is trained. x may have more dimensions before the last.
        out: where to write y, a part of a wider matrix; without gradients."""
        raise NotImplementedError

    def matmul_t(self, dy_TO: Tensor) -> Tensor:
        """dx [T, I] = dy W: what the backward of `matmul` gives for x."""
        raise NotImplementedError

    def dense(self, rows: Any = None) -> Tensor:
        """W [O, I], or these of its rows, in `dtype`; never to be written to. rows: whatever indexes the first dimension of a tensor."""
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """The tensors that hold the matrix, as the file has them: name after the module's -> tensor. The fingerprint hashes name, dtype,
        shape and bytes of each, in the order of names, so two formats of one matrix differ in it."""
        raise NotImplementedError

    def write(self, weight_OI: Tensor, rows: slice = slice(None)) -> None:
        """Put another matrix, or other rows, in place, rounded to `dtype`. Only where `stored_dense`."""
        raise NotImplementedError

    def untie(self) -> None:
        """Give the module a copy of its own of a matrix that it may share with others. Only where `stored_dense`."""
        raise NotImplementedError


def claimed(module: Any) -> Weight | None:
    """A module's matrix; None where no format claims the module."""
    found = [kind for kind in FORMATS.values() if kind.claims(module)]
    assert len(found) < 2, f"a {type(module).__name__} is claimed by {[kind.name for kind in found]}"
    return found[0](module) if found else None


def weight_of(module: Any, where: str = "") -> Weight:
    """A module's matrix. where: the module's name, for the message. BaseError where no format claims the module."""
    found = claimed(module)
    if found is None:
        raise BaseError(
            f"the weight of {where or 'a module'} ({type(module).__name__}) is in no format that trimtab reads",
            fix=f"load the base in one of: {', '.join(FORMATS)}",
        )
    return found


def stored_parts(model: Any) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """`stored_state` in parts, each made when it is called. Some formats pack a matrix anew to give what its file has: whoever lets go of
    a part before the next has one such copy in memory, not one of the whole base."""
    left: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if (weight := claimed(module)) is not None:
            for part in module.state_dict():
                if part != "bias":
                    left.pop(f"{name}.{part}", None)
            yield partial(_stored_at, name, weight)
    for name, tensor in left.items():
        yield partial(_stored_plainly, model, name, tensor)


def _stored_at(name: str, weight: Weight) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in weight.stored().items()}


def _stored_plainly(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    from trimtab.places.shards import visited

    visited(model.get_submodule(name.rpartition(".")[0]))
    return {name: tensor}


def stored_state(model: Any) -> dict[str, Tensor]:
    """A model's `state_dict()` in which each matrix is what its format stores, whatever else the module keeps in memory."""
    return {name: tensor for part in stored_parts(model) for name, tensor in part().items()}


def norm_weight(module: Any) -> Tensor:
    """A norm's weight [H]. It is a vector, and no format packs it: it is read and trained as the tensor that it is."""
    weight: Tensor = module.weight
    return weight


def first_weight(module: Any) -> Weight | Tensor:
    """The first matrix or vector in a module and its parts: in what dtype it computes, where, and on how many features."""
    parts = (claimed(part) or next(part.parameters(recurse=False), None) for part in module.modules())
    found: Weight | Tensor = next(part for part in parts if part is not None)
    return found
