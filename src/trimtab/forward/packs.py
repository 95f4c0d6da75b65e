"""Packed adapters, and mixes of them: the parameters of a batch, stacked for kernels that gather.

A `PackedAdapter` is what the mixed forward uses of one adapter. Packing is differentiable, so training packs again in each step; inference
packs once. A `Mix` has the adapters of a batch, grouped for each site by kernel. Its stacks are made on first use and live as long as the
mix does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.forward.arena import Arena, Layout, Placed, Table, tables_of
from trimtab.methods.base import Kernel, Packed, Params, Prefix, Rows
from trimtab.ops import native, native_inference
from trimtab.ops.grouped import MOST_GROUPS, Stacked, takes_grouped
from trimtab.ops.stack import EditTable, Stack

ALIGNED = 64
"""Bytes to whose multiples tensors are laid out: a cache line, and the widest register."""
TRANSPOSED = ("B", "U")
"""The names of output factors."""


@dataclass
class PackedAdapter:
    """One adapter, ready to run: its edits by site, or its prefix. kv: an embedded prefix's keys and values once the base has computed
    them. placed: where it is on a device, packed for inference; the row is its own as long as it lives. invocation: see `Method`. head: its
    own head's tensors."""

    edits: dict[str, Packed]
    prefix: Prefix | None = None
    kv: tuple[Tensor, Tensor] | None = None
    placed: Placed | None = None
    invocation: tuple[int, ...] = ()
    head: Params | None = None

    def on_from(self, ids: Sequence[int] | Tensor | np.ndarray) -> int:
        """The first token of a sequence for which it is on; len(ids) where it is for none."""
        return last_occurrence(self.invocation, ids) if self.invocation else 0

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
        if each and each[0][2].device.type != "cpu":
            layout = Layout.of(self.edits)
            return self._in_row(Arena(layout.size, each[0][2].device), layout, lambda placed: placed.write(self.edits))
        sizes = [-(-t.numel() * t.element_size() // ALIGNED) * ALIGNED for _, _, t in each]
        arena = torch.empty(sum(sizes), dtype=torch.uint8, device=each[0][2].device) if each else torch.empty(0, dtype=torch.float32)
        native.advise_huge(arena)
        typed = {dtype: arena.view(dtype) for dtype in {t.dtype for _, _, t in each}}
        tensors: dict[str, dict[str, Tensor]] = {site: {} for site in self.edits}
        at = 0
        for (site, name, t), size in zip(each, sizes, strict=True):
            place = typed[t.dtype].as_strided(t.shape, _strides(t.shape, name in TRANSPOSED), at // t.element_size())
            tensors[site][name] = place.copy_(t)
            at += size
        edits = {site: Packed(p.kernel, tensors[site], p.dropout) for site, p in self.edits.items()}
        return PackedAdapter(edits, self.prefix, self.kv, invocation=self.invocation, head=self.head)

    def moved_to(self, arena: Arena) -> PackedAdapter:
        """The same in a row of this arena, with one copy; itself where it is there, or is not placed, or there is no room."""
        if self.placed is None or self.placed.arena is arena:
            return self
        old = self.placed

        def copied(new: Placed) -> dict[str, Packed]:
            arena.row(new.layout, new.row).copy_(old.arena.row(old.layout, old.row))
            return new.edits(self.edits)

        return self._in_row(arena, old.layout, copied)

    def _in_row(self, arena: Arena, layout: Layout, fill: Callable[[Placed], dict[str, Packed]]) -> PackedAdapter:
        row = arena.take(layout.size)
        if row is None:
            return self
        placed = Placed(arena, layout, row)
        made = PackedAdapter(fill(placed), self.prefix, self.kv, placed, self.invocation, self.head)
        finalize(made, arena.leave, row * layout.size).atexit = False
        return made

    @cached_property
    def layout(self) -> tuple[tuple[str, ...], tuple[Kernel, ...]]:
        """Its sites, and the kernel at each: most adapters of a mix have the same."""
        return tuple(self.edits), tuple(p.kernel for p in self.edits.values())

    @cached_property
    def factor_table(self) -> FactorTable:
        """LoRA's factors, for native kernels. Computed once, not for each mix that the adapter is in."""
        lora = {site: p for site, p in self.edits.items() if p.kernel is ops.lora}
        kept = [_laid(name, p.tensors[name]).contiguous() for p in lora.values() for name in ("A", "B")]
        table = np.array([[A.data_ptr(), B.data_ptr(), len(A)] for A, B in zip(kept[::2], kept[1::2], strict=True)], dtype=np.int64)
        return FactorTable(tuple(lora), np.ascontiguousarray(table.reshape(-1, 3).T), kept)


def last_occurrence(run: Sequence[int], ids: Sequence[int] | Tensor | np.ndarray) -> int:
    """Where the last occurrence of a run of tokens begins; len(ids) where there is none."""
    found, width = np.asarray(ids, dtype=np.int64), len(run)
    if len(found) < width:
        return len(found)
    starts = np.flatnonzero(found[: len(found) - width + 1] == run[0])
    for k in range(1, width):
        starts = starts[found[starts + k] == run[k]]
    return int(starts[-1]) if len(starts) else len(found)


def together(adapters: Sequence[PackedAdapter]) -> list[PackedAdapter]:
    """These adapters, moved where those of one layout are not in one arena: then all kernels read them at once."""
    found = list(adapters)
    layouts: dict[Layout, list[int]] = {}
    for i, adapter in enumerate(adapters):
        if adapter.placed is not None:
            layouts.setdefault(adapter.placed.layout, []).append(i)
    for layout, members in layouts.items():
        places = [p for i in members if (p := adapters[i].placed) is not None]
        if len({id(p.arena) for p in places}) > 1:
            arena = Arena(len(members) * layout.size, places[0].arena.memory.device)
            for i in members:
                found[i] = adapters[i].moved_to(arena)
    return found


@dataclass(frozen=True)
class FactorTable:
    """Where an adapter has LoRA. table [3, sites]: the addresses of A and Bᵀ as `for_inference` lays them out, and the rank. kept: the
    tensors."""

    sites: tuple[str, ...]
    table: np.ndarray
    kept: list[Tensor]


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
    """The packed edits of one kernel at one site, one for each adapter of a mix that has it there. tables: where they are on a device."""

    def __init__(self, items: Sequence[Packed], site: str = "", tables: Sequence[Table] = ()):
        self.items, self.site, self.tables = items, site, tables
        self._stacked: dict[str, Tensor] = {}
        self._bottlenecks: dict[int, native_inference.BottleneckParts] = {}
        self._addresses: dict[str, tuple[Tensor, Tensor, list[Tensor]]] = {}
        self.grouped: Sequence[Stacked] = ()

    def gathered(self, rows: Rows) -> Iterator[tuple[Callable[[str], Tensor], slice | Tensor, Tensor]]:
        """For kernels that gather: (name -> one tensor for several slots, rows of the batch, where each of these has its own there). There
        is one such part, and on a device one for each table."""
        if not self.tables:
            yield self.stacked, *rows.touched(None)
        for i, table in enumerate(self.tables):
            if any(table.places[s.slot] >= 0 for s in rows.spans):
                yield self._in_rows[i].__getitem__, *rows.touched(table.places)

    @cached_property
    def _in_rows(self) -> list[dict[str, Tensor]]:
        """The tensors of all rows of each table."""
        return [{name: table.tensors(self.site, name) for name in self.items[0].tensors} for table in self.tables]

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

    @cached_property
    def in_groups(self) -> list[tuple[Tensor, Tensor, tuple[int, ...]]] | None:
        """LoRA's factors, where they run through products grouped by adapter: (A, B, the slot of each group) of each table."""
        found = []
        for i, table in enumerate(self.tables):
            A, B = (self._in_rows[i][name][table.first :][: len(table.slots)] for name in ("A", "B"))
            if len(table.slots) > MOST_GROUPS or not takes_grouped(A, B, A.dtype):
                return None
            found.append((A, B, table.slots))
        return found or None

    def addresses(self, name: str) -> tuple[Tensor, Tensor]:
        """(address of each slot's tensor as `for_inference` lays it out, its first size), int64 and int32, for native kernels."""
        if name not in self._addresses:
            kept = [_laid(name, p.tensors[name]).contiguous() for p in self.items]
            address, size = torch.tensor([t.data_ptr() for t in kept]), torch.tensor([len(t) for t in kept], dtype=torch.int32)
            self._addresses.setdefault(name, (address, size, kept))  # what another thread has given out meanwhile must live on
        return self._addresses[name][:2]

    @cached_property
    def lora_parts(self) -> native_inference.LoraParts:
        """The factors of this site alone, for `ops.native_inference.lora`."""
        (A_S, rank_S), (B_S, _) = self.addresses("A"), self.addresses("B")
        start, width = np.zeros(1, dtype=np.int64), np.array([len(self.items[0].tensors["B"])])
        return native_inference.LoraParts(start, width, A_S.numpy()[None], B_S.numpy()[None], rank_S.numpy()[None], self)

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
    tables: WeakKeyDictionary[Stack, StackEdits] = field(init=False, default_factory=WeakKeyDictionary)  # of layers that have run it
    _joined: dict[tuple[str, ...], native_inference.LoraParts | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        alike: dict[tuple[tuple[str, ...], tuple[Kernel, ...]], list[int]] = {}
        for i, adapter in enumerate(self.adapters):
            alike.setdefault(adapter.layout, []).append(i)
        found: dict[str, dict[Kernel, list[int]]] = {}
        for layout, members in alike.items():
            for site, kernel in zip(*layout, strict=True):
                found.setdefault(site, {}).setdefault(kernel, []).extend(members)
        tables: dict[tuple[int, ...], Sequence[Table]] | None = {} if any(a.placed is not None for a in self.adapters) else None
        self.groups = {site: [self._group(site, kernel, found[site][kernel], tables) for kernel in found[site]] for site in found}
        self._stack_factors()

    def _group(self, site: str, kernel: Kernel, members: list[int], tables: dict[tuple[int, ...], Sequence[Table]] | None) -> Group:
        """tables: those of other sites, by members; None where nobody is placed."""
        members.sort()
        items, numbers = [self.adapters[i].edits[site] for i in members], tuple(members)
        if tables is None:
            return Group(kernel, PackList(items), numbers)
        if numbers not in tables:
            placed = [self.adapters[i].placed for i in numbers]
            assert None not in placed, "kernels that read tables would leave out who is in none"
            tables[numbers] = tables_of(placed)
        return Group(kernel, PackList(items, site, tables[numbers]), numbers)

    def _stack_factors(self) -> None:
        """Cast and stack what trains grouped, of all sites at once."""
        packs = [g.packs for groups in self.groups.values() for g in groups if g.kernel is ops.lora_grouped]
        if packs:
            for mine, stacked in zip(packs, ops.stack_factors([[p.factors for p in q.items if p.factors] for q in packs]), strict=True):
                mine.grouped = stacked

    @cached_property
    def members(self) -> tuple[int, ...]:
        """All of them: rows of these have their member's number as slot."""
        return tuple(range(len(self.adapters)))

    @cached_property
    def factor_tables(self) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
        """(a line for each site with LoRA, the addresses of A and Bᵀ [2, lines, members], the ranks [lines, members])."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, adapter in enumerate(self.adapters):
            alike.setdefault(adapter.factor_table.sites, []).append(i)
        lines = {site: line for line, site in enumerate(dict.fromkeys(site for sites in alike for site in sites))}
        table = np.zeros((3, len(lines), len(self.adapters)), dtype=np.int64)
        for sites, members in alike.items():
            mine = np.array([lines[s] for s in sites], dtype=np.int64)
            table[:, mine[:, None], members] = np.stack([self.adapters[i].factor_table.table for i in members], axis=2)
        return lines, table[:2], table[2].astype(np.int32)

    def lora_parts(self, sites: tuple[str, ...], starts: np.ndarray, widths: np.ndarray) -> native_inference.LoraParts | None:
        """The factors of LoRA at sites that share an input, for one pass over all; slots are members. starts, widths: where each site's
        outputs are in a row. None where there are none."""
        if sites not in self._joined:
            lines, (A, B), rank = self.factor_tables
            here = [i for i, site in enumerate(sites) if site in lines]
            at = [lines[sites[i]] for i in here]
            parts = None
            if here:
                rows = slice(at[0], at[-1] + 1) if at == list(range(at[0], at[-1] + 1)) else at  # a view where they stand together
                parts = native_inference.LoraParts(starts[here], widths[here], A[rows], B[rows], rank[rows], self.adapters)
            self._joined.setdefault(sites, parts)
        return self._joined[sites]
