"""Packed adapters, and mixes of them: the parameters of a batch, stacked for kernels that gather.

A `PackedAdapter` is what the mixed forward uses of one adapter. Packing is differentiable, so training packs again in each step; inference
packs once. A `Mix` has the adapters of a batch, grouped for each site by kernel. Its stacks are made on first use and live as long as the
mix does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from trimtab.methods.base import Kernel, Packed, Prefix
from trimtab.ops import native, native_inference
from trimtab.ops.stack import EditTable, Stack

ALIGNED = 64
"""Bytes to whose multiples tensors are laid out: a cache line, and the widest register."""


TRANSPOSED = ("B", "U")
"""The names of output factors."""


@dataclass
class PackedAdapter:
    """One adapter, ready to run: its edits by site, or its prefix. kv: an embedded prefix's keys and values once the base has computed
    them."""

    edits: dict[str, Packed]
    prefix: Prefix | None = None
    kv: tuple[Tensor, Tensor] | None = None

    @property
    def virtual_tokens(self) -> int:
        return self.prefix.length if self.prefix else 0

    def stored_prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [L, N, kv_heads, D] of its virtual tokens. None where there are no virtual tokens, or only their embeddings are
        known: packed for inference, they have keys and values too."""
        return None if self.prefix is None else self.prefix.kv_LNHD or self.kv

    def for_inference(self) -> PackedAdapter:
        """The same with all tensors in one piece of memory, in the order in which a forward reads them, so that reading it is one stream.
        Output factors [O, R] are laid out as their transpose, along which kernels that run row by row read them."""
        each = [(site, name, t) for site, p in self.edits.items() for name, t in p.tensors.items()]
        sizes = [-(-t.numel() * t.element_size() // ALIGNED) * ALIGNED for _, _, t in each]
        arena = torch.empty(sum(sizes), dtype=torch.uint8, device=each[0][2].device) if each else torch.empty(0)
        native.advise_huge(arena)
        typed = {dtype: arena.view(dtype) for dtype in {t.dtype for _, _, t in each}}
        edits = {site: Packed(p.kernel, {}, p.dropout, {}) for site, p in self.edits.items()}
        at, begin = 0, arena.data_ptr()
        for (site, name, t), size in zip(each, sizes, strict=True):
            shape, strides = t.shape, _strides(t.shape, name in TRANSPOSED)
            place = typed[t.dtype].as_strided(shape, strides, at // t.element_size()).copy_(t)
            edits[site].tensors[name] = place  # type: ignore[index]
            edits[site].addresses[name] = begin + at, shape[-1 if name in TRANSPOSED else 0]  # type: ignore[index]
            at += size
        return PackedAdapter(edits, self.prefix, self.kv)


def _laid(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name in TRANSPOSED else tensor


def _strides(shape: Sequence[int], transposed: bool) -> list[int]:
    """Of a tensor that is contiguous, or whose transpose is."""
    if transposed:
        return [1, shape[0]]
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


class PackList:
    """The packed edits of one kernel at one site, one for each adapter of a mix that has it there."""

    def __init__(self, items: Sequence[Packed]):
        self.items = items
        self._stacked: dict[str, Tensor] = {}
        self._bottlenecks: dict[int, native_inference.BottleneckParts] = {}
        self._addresses: dict[str, tuple[Tensor, Tensor, list[Tensor]]] = {}

    def stacked(self, name: str) -> Tensor:
        """[slots, ...], padded with zeros at the end of each dimension to the largest. Kernels compute the base's result for zeros."""
        if name not in self._stacked:
            tensors = [p.tensors[name] for p in self.items]
            shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
            out = tensors[0].new_zeros(len(tensors), *shape)
            for row, t in zip(out, tensors, strict=True):
                row[tuple(slice(n) for n in t.shape)] = t
            self._stacked.setdefault(name, out)
        return self._stacked[name]

    def addresses(self, name: str) -> tuple[Tensor, Tensor]:
        """(address of each slot's tensor as `for_inference` lays it out, its first size), int64 and int32, for native kernels."""
        if name not in self._addresses:
            kept = [] if all(p.addresses for p in self.items) else [_laid(name, p.tensors[name]).contiguous() for p in self.items]
            found = [(t.data_ptr(), t.shape[0]) for t in kept] or [p.addresses[name] for p in self.items]
            table = np.array(found, dtype=np.int64)
            self._addresses.setdefault(
                name, (torch.from_numpy(table[:, 0].copy()), torch.from_numpy(table[:, 1].astype(np.int32)), kept)
            )  # what another thread has given out meanwhile must live on
        return self._addresses[name][:2]

    @cached_property
    def lora_parts(self) -> native_inference.LoraParts:
        """The factors of this site alone, for `ops.native_inference.lora`."""
        return native_inference.LoraParts([(self, range(len(self.items)))], [0], len(self.items))

    def bottleneck_parts(self, activation: int) -> native_inference.BottleneckParts:
        """The tensors of this site, for `ops.native_inference.bottleneck`."""
        if activation not in self._bottlenecks:
            slots = len(self.items)
            self._bottlenecks[activation] = native_inference.BottleneckParts(self, range(slots), slots, activation)
        return self._bottlenecks[activation]


@dataclass(frozen=True)
class Group:
    """The members of a mix that run one kernel at a site; member `members[i]` is slot i of `packs`."""

    kernel: Kernel
    packs: PackList
    members: tuple[int, ...]


@dataclass(frozen=True)
class StackEdits:
    """What one native call of all layers can do of a mix, and the members that have edits which it does not know."""

    table: EditTable
    unknown: frozenset[int]


@dataclass
class Mix:
    """The adapters of a batch, as they were packed. Member i is `adapters[i]`; rows of the base belong to no member (-1)."""

    adapters: Sequence[PackedAdapter]
    groups: dict[str, list[Group]] = field(init=False)
    joined: dict[tuple[str, ...], native_inference.LoraParts | None] = field(init=False, default_factory=dict)
    tables: WeakKeyDictionary[Stack, StackEdits] = field(init=False, default_factory=WeakKeyDictionary)  # of layers that have run it

    def __post_init__(self) -> None:
        found: dict[str, dict[Kernel, list[int]]] = {}
        for i, adapter in enumerate(self.adapters):
            for site, packed in adapter.edits.items():
                found.setdefault(site, {}).setdefault(packed.kernel, []).append(i)
        self.groups = {
            site: [
                Group(kernel, PackList([self.adapters[i].edits[site] for i in members]), tuple(members))
                for kernel, members in kernels.items()
            ]
            for site, kernels in found.items()
        }

    @cached_property
    def members(self) -> tuple[int, ...]:
        """All of them: rows of these have their member's number as slot."""
        return tuple(range(len(self.adapters)))

    def lora_parts(self, sites: tuple[str, ...], starts: Sequence[int], kernel: Kernel) -> native_inference.LoraParts | None:
        """The factors of LoRA (its kernel) at sites that share an input, for one pass over all; slots are members. starts: where each
        site's outputs begin in a row. None where there are none."""
        if sites not in self.joined:
            found = [(group, start) for site, start in zip(sites, starts, strict=True) for group in self.groups.get(site, ())]
            found = [(group, start) for group, start in found if group.kernel is kernel]
            packs = [(group.packs, group.members) for group, _ in found]
            parts = native_inference.LoraParts(packs, [s for _, s in found], len(self.adapters)) if found else None
            self.joined.setdefault(sites, parts)
        return self.joined[sites]
