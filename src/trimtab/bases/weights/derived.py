"""When something that was computed from tensors is no longer true, because they have been written to since.

Packed weights, packed adapters with DoRA's norms in them, the keys and values of a prompt: each is computed once and kept. Whoever keeps
one asks here, before using it, whether what it was made of is still the same.

torch counts the writes to a tensor, but not all of them: fused optimizers, `.data` and numpy write past the counter. So a close look also
compares where the memory is and a few values of each tensor. It is taken where a computation begins; within one, the counters do. What it
cannot see is a write past the counter to a small part of a tensor, which needs `Weights.touch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from trimtab.bases.weights.base import Weight, weight_of
from trimtab.places.shards import shards_of

VALUES = 16
"""How many values of a tensor a close look compares, spread over all of it."""

T = TypeVar("T")
_version = attrgetter("_version")


class Stamp:
    """Tensors as they were at one moment. It holds their memory, so that no other tensor can come to lie there."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = list(tensors)
        self.counted = not any(t.is_inference() for t in self.tensors)  # torch counts no writes to those
        self.versions = list(map(_version, self.tensors)) if self.counted else []
        self.places = [t.data_ptr() for t in self.tensors]
        self.probes: dict[Any, list[Tensor]] = {}
        for t in self.tensors:
            self.probes.setdefault((t.dtype, t.device), []).append(_probe(t.detach()))
        self.values = self._look()

    def unwritten(self) -> bool:
        """Whether no write to these tensors has been counted since."""
        return list(map(_version, self.tensors)) == self.versions if self.counted else self.holds(self.tensors)

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same tensors with the same content, at a close look."""
        return hold([(self, tensors)])[0]

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same tensors in the same places, and no write to them has been counted."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(is_, tensors, self.tensors))
            and (not self.counted or self.unwritten())
            and [t.data_ptr() for t in tensors] == self.places
        )

    def compared(self) -> list[tuple[Tensor, Tensor]]:
        """(values now, values then)."""
        return list(zip(self._look(), self.values, strict=True))

    def _look(self) -> list[Tensor]:
        """The values of the probes, one tensor a dtype, as bytes: NaN equals itself."""
        return [torch.cat(found).view(torch.uint8) for found in self.probes.values()]


def hold(stamps: Sequence[tuple[Stamp, list[Tensor]]]) -> list[bool]:
    """Whether each stamp is of these tensors, with the same content at a close look. A GPU is waited for once."""
    good = [stamp.is_of(tensors) for stamp, tensors in stamps]
    pairs = [(i, pair) for i, (stamp, _) in enumerate(stamps) if good[i] for pair in stamp.compared()]
    if len({a.device for _, (a, _) in pairs}) == 1 and torch.equal(*(torch.cat(side) for side in zip(*(p for _, p in pairs), strict=True))):
        return good
    for i, (a, b) in pairs:
        good[i] = good[i] and torch.equal(a, b)
    return good


def _probe(tensor: Tensor) -> Tensor:
    """A view of a few values spread over a tensor, [n]."""
    if tensor.is_contiguous():
        return tensor.view(-1)[:: max(1, tensor.numel() // VALUES)]
    count = min(VALUES, max(tensor.shape))
    step = sum((size - 1) // max(1, count - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((count,), (step,), tensor.storage_offset())  # along the diagonal


class Weights:
    """A model's weights and their generation, a number that grows whenever they have been written to.

    of: the matrix of each module that is named in `matrices`. BaseError where one is in no format that is known.
    """

    def __init__(self, model: Any, matrices: Iterable[str]):
        self.of: dict[str, Weight] = {name: weight_of(model.get_submodule(name), name) for name in matrices}
        tables = [table for m in model.modules() for table in (m._parameters, m._buffers)]
        self._places = [(table, name) for table in tables for name, tensor in table.items() if tensor is not None]
        self._model = model
        self._stamp: Stamp | None = None
        self._generation, self._lock = 0, Lock()  # a server packs adapters beside the thread that computes

    def look(self, *, closely: bool = True) -> int:
        """The generation. closely: see writes that torch does not count, and tensors that stand in place of others, too."""
        with self._lock:
            if self._stamp is not None and not closely and self._stamp.unwritten():
                return self._generation
            now = self._tensors()
            if self._stamp is None or not self._stamp.holds(now):
                self._stamp = None  # the memory that it holds goes first
                self._stamp, self._generation = Stamp(now), self._generation + 1
            return self._generation

    def _tensors(self) -> list[Tensor]:
        """All of the model's, as they are now. Those that ranks share out have no memory while they are not used: what this rank keeps of
        them stands for them."""
        shards = shards_of(self._model)
        return [table[name] for table, name in self._places] if shards is None else shards.kept(self._model)

    def touch(self) -> None:
        """Say that the weights have been written to."""
        with self._lock:
            self._stamp = None


class Derived(Generic[T]):
    """Something made of a model's weights: made at first use, and made anew when they have been written to."""

    def __init__(self, weights: Weights, make: Callable[[], T]):
        self._weights, self._make = weights, make
        self._made: tuple[int, T] | None = None
        self._lock = Lock()

    def get(self) -> T:
        """The thing, true to all writes that torch has counted, and to the others at the last close look."""
        with self._lock:
            generation = self._weights.look(closely=False)
            if self._made is None or self._made[0] != generation:
                self._made = None  # two of them need not have room
                self._made = generation, self._make()
            return self._made[1]

    def drop(self) -> None:
        """Free its memory until it is asked for again."""
        with self._lock:
            self._made = None
