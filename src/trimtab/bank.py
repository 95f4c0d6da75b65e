"""Packed adapters, and mixes of them: the parameters of a batch, stacked where kernels gather.

A `PackedAdapter` is what the mixed forward runs of one adapter; packing is differentiable, so training packs anew in each step and
inference once.
A `Mix` is the adapters of a batch, grouped for each site by kernel; its stacks are made on first use and live as long as the mix does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from trimtab.methods.base import Kernel, Packed, Prefix


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


class PackList:
    """The packed edits of one kernel at one site, one for each adapter of a mix that has it there."""

    def __init__(self, items: Sequence[Packed]):
        self.items = items
        self._stacked: dict[str, Tensor] = {}

    def stacked(self, name: str) -> Tensor:
        """[slots, ...], padded with zeros at the end of each dimension to the largest; zeros do nothing."""
        if name not in self._stacked:
            tensors = [p.tensors[name] for p in self.items]
            shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
            out = tensors[0].new_zeros(len(tensors), *shape)
            for row, t in zip(out, tensors, strict=True):
                row[tuple(slice(n) for n in t.shape)] = t
            self._stacked[name] = out
        return self._stacked[name]


@dataclass(frozen=True)
class Group:
    """The members of a mix that run one kernel at a site; member `members[i]` is slot i of `packs`."""

    kernel: Kernel
    packs: PackList
    members: tuple[int, ...]


@dataclass
class Mix:
    """The adapters of a batch. Member i is `adapters[i]`; rows of the base belong to no member (-1)."""

    adapters: Sequence[PackedAdapter]
    groups: dict[str, list[Group]] = field(init=False)

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
