"""Where packed adapters are on a device: each has a row of a piece of memory, and kernels read all rows through one strided tensor.

Adapters with the same sites, kernels and sizes have the same `Layout`, which says where in a row each tensor is. Ranks are padded with
zeros to a power of two, so that similar ones share a layout. A row begins at a multiple of its size, wherever the arena has room. Therefore
`Arena.tensors` gives one tensor of every row as [rows, *shape] and copies nothing. An adapter that comes or goes costs the others nothing,
and a large rank makes no other adapter's tensors larger.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from trimtab import ops
from trimtab.methods.base import Kernel, Packed

ALIGNED = 256
"""Bytes to whose multiples tensors and rows are laid out."""
LEAST_RANK = 8
RANK_FIRST, RANK_LAST = ("A", "D", "d"), ("B", "U")
"""Tensors whose first or last dimension is the rank (or a bottleneck's width)."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a row: its padded shape, its dtype, and where it begins, in bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


class Layout:
    """Where a row has each tensor, by site and name. size: bytes of a row. One object for each content."""

    def __init__(self, content: tuple[tuple[str, Kernel, str, tuple[int, ...], torch.dtype], ...]):
        self.entries: dict[tuple[str, str], Entry] = {}
        at = 0
        for site, _, name, shape, dtype in content:
            self.entries[site, name] = Entry(shape, dtype, at)
            at += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNED) * ALIGNED
        self.size = at

    @staticmethod
    def of(edits: Mapping[str, Packed]) -> Layout:
        content = tuple(
            (site, p.kernel, name, _padded(name, tuple(t.shape)), t.dtype) for site, p in edits.items() for name, t in p.tensors.items()
        )
        with _LAYOUTS_LOCK:
            if (found := _LAYOUTS.get(content)) is None:
                found = _LAYOUTS[content] = Layout(content)
        return found


_LAYOUTS: WeakValueDictionary[tuple, Layout] = WeakValueDictionary()
_LAYOUTS_LOCK = Lock()


def _padded(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name in RANK_FIRST:
        return (_power(shape[0]), *shape[1:])
    return (*shape[:-1], _power(shape[-1])) if name in RANK_LAST else shape


def _power(rank: int) -> int:
    return max(LEAST_RANK, 1 << (rank - 1).bit_length())


class Arena:
    """So many bytes on a device, for rows of any layouts. `take` and `leave` may be called from any thread."""

    def __init__(self, nbytes: int, device: torch.device):
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._taken: list[tuple[int, int]] = []
        self._left: deque[int] = deque()
        self._lock = Lock()

    def take(self, size: int) -> int | None:
        """The number of a row of this size that is free from now on only for the caller; None where there is no room."""
        with self._lock:
            while self._left:
                start = self._left.popleft()
                self._taken = [t for t in self._taken if t[0] != start]
            at = 0
            for first, end in [*self._taken, (len(self.memory), len(self.memory))]:
                start = -(-at // size) * size
                if start + size <= first:
                    insort(self._taken, (start, start + size))
                    return start // size
                at = max(at, end)
        return None

    def leave(self, start: int) -> None:
        """A row, by its first byte, is free. No lock is taken: this is called when an adapter is collected, which may be at any time."""
        self._left.append(start)

    def row(self, layout: Layout, row: int) -> Tensor:
        """The bytes of a row."""
        return self.memory[row * layout.size : (row + 1) * layout.size]

    def tensors(self, layout: Layout, key: tuple[str, str]) -> Tensor:
        """One tensor of all rows of a layout, [rows, *shape]. Rows of other layouts are in it too, as numbers that mean nothing."""
        entry = layout.entries[key]
        width, strides = entry.dtype.itemsize, [1]
        for size in reversed(entry.shape[1:]):
            strides.insert(0, strides[0] * size)
        whole = self.memory[: len(self.memory) // layout.size * layout.size].view(entry.dtype)
        return whole.as_strided((len(self.memory) // layout.size, *entry.shape), (layout.size // width, *strides), entry.start // width)


@dataclass(frozen=True, eq=False)
class Placed:
    """The row that an adapter has."""

    arena: Arena
    layout: Layout
    row: int

    def edits(self, like: Mapping[str, Packed]) -> dict[str, Packed]:
        """The tensors of `like` as views of this row, without the padding."""
        found = {}
        for site, p in like.items():
            mine = {}
            for name, t in p.tensors.items():
                row = self.arena.tensors(self.layout, (site, name))[self.row]
                mine[name] = row[tuple(slice(n) for n in t.shape)]
            found[site] = Packed(p.kernel, mine, p.dropout)
        return found

    def write(self, edits: Mapping[str, Packed]) -> dict[str, Packed]:
        """Copies of these edits' tensors, in this row."""
        self.arena.row(self.layout, self.row).zero_()
        mine = self.edits(edits)
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for site, p in edits.items():
            for name, t in p.tensors.items():
                targets, sources = by_dtype.setdefault(t.dtype, ([], []))
                targets.append(mine[site].tensors[name])
                sources.append(t)
        for targets, sources in by_dtype.values():
            ops.copy_lists(targets, sources)
        return mine


@dataclass(frozen=True, eq=False)
class Table:
    """The rows that some slots have in one arena, in one layout. places: the row of each slot; -1 where it has none here."""

    arena: Arena
    layout: Layout
    places: tuple[int, ...]

    def tensors(self, site: str, name: str) -> Tensor:
        return self.arena.tensors(self.layout, (site, name))

    @cached_property
    def first(self) -> int:
        return min(row for row in self.places if row >= 0)

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The slot of each row from the first to the last that is used; -1 where none of these slots has it."""
        found = [-1] * (max(self.places) - self.first + 1)
        for slot, row in enumerate(self.places):
            if row >= 0:
                found[row - self.first] = slot
        return tuple(found)


def tables_of(placed: Sequence[Placed | None]) -> list[Table]:
    """The tables of slots that have these rows; none where they are not placed."""
    found: dict[tuple[int, int], list[int]] = {}
    for slot, p in enumerate(placed):
        if p is not None:
            found.setdefault((id(p.arena), id(p.layout)), [-1] * len(placed))[slot] = p.row
    of = {(id(p.arena), id(p.layout)): p for p in placed if p is not None}
    return [Table(of[key].arena, of[key].layout, tuple(places)) for key, places in found.items()]


def in_order(placed: Sequence[Placed | None]) -> list[int]:
    """The numbers of adapters in the order in which their rows are, so that those of one arena and layout follow each other in a batch."""
    arenas = {id(p.arena): i for i, p in enumerate(placed) if p is not None}
    layouts = {id(p.layout): i for i, p in enumerate(placed) if p is not None}
    return sorted(
        range(len(placed)), key=lambda i: (-1, -1, -1) if (p := placed[i]) is None else (arenas[id(p.arena)], layouts[id(p.layout)], p.row)
    )
