"""The KV cache, and runs of rows that say which of its rows, or of their own batch, they read as keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.ops import native

Place = int | Sequence[int]
"""Where a cache keeps a sequence: its slot, or its blocks."""


class KVCache:
    """Keys and values of `slots` sequences of at most `capacity` tokens, for each layer [slots · capacity, kv_heads, head_dim],
    allocated once."""

    def __init__(self, layers: int, slots: int, capacity: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        shape = (layers, slots * capacity, kv_heads, head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        native.advise_huge(self.keys)
        native.advise_huge(self.values)

    def of_layer(self, layer: int, like_k: Tensor, like_v: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [slots · capacity, heads, features], of the same heads as these. A layer with fewer features than the
        cache has room for uses the first of each row."""
        keys, values = self.keys[layer], self.values[layer]
        if keys.shape[1:] == like_k.shape[1:] == like_v.shape[1:]:
            return keys, values
        return _narrowed(keys, like_k), _narrowed(values, like_v)

    def runs(self, place: Place, first: int, end: int) -> list[tuple[int, int]]:
        """The pool's rows that hold tokens first..end of a sequence, as (first, end) runs in order. place: the sequence's slot."""
        assert isinstance(place, int)
        return [(place * self.capacity + first, place * self.capacity + end)]

    def put(self, place: Place, keys_LNHD: Tensor, values_LNHD: Tensor) -> None:
        """Write a prefix at the start of a sequence."""
        at = 0
        for a, b in self.runs(place, 0, keys_LNHD.shape[1]):
            self.keys[:, a:b], self.values[:, a:b] = keys_LNHD[:, at : at + b - a], values_LNHD[:, at : at + b - a]
            at += b - a

    def copy(self, source: Place, target: Place, tokens: int) -> None:
        """Give one sequence the first tokens of another."""
        for first in range(0, tokens, self.capacity):
            end = min(tokens, first + self.capacity)
            ((a, b),), ((c, d),) = self.runs(source, first, end), self.runs(target, first, end)
            self.keys[:, c:d], self.values[:, c:d] = self.keys[:, a:b], self.values[:, a:b]


def _narrowed(rows: Tensor, like: Tensor) -> Tensor:
    heads, features = like.shape[1:]
    return rows.flatten(1)[:, : heads * features].unflatten(1, (heads, features))


class PagedKV(KVCache):
    """The same memory in `blocks` blocks of `block_size` tokens; a sequence's place is the list of its blocks, in order (Kwon et al. 2023,
    arXiv:2309.06180). Who owns which block is not known here."""

    def __init__(self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers, blocks, block_size, kv_heads, head_dim, dtype, device)
        self.blocks, self.block_size = blocks, block_size

    def runs(self, place: Place, first: int, end: int) -> list[tuple[int, int]]:
        assert not isinstance(place, int)
        size, found = self.block_size, list[tuple[int, int]]()
        while first < end:
            stop = min(end, (first // size + 1) * size)
            a = place[first // size] * size + first % size
            if found and found[-1][1] == a:
                found[-1] = (found[-1][0], a + stop - first)
            else:
                found.append((a, a + stop - first))
            first = stop
        return found


@dataclass(frozen=True)
class Run:
    """A run of rows start..stop that attend to each other. own: (first, end) runs of the pool, in order of position, that end with the
    sequence's own rows; or where a cache keeps these."""

    start: int
    stop: int
    own: tuple[tuple[int, int], ...] | Cached

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def length(self) -> int:
        return self.own.length if isinstance(self.own, Cached) else sum(b - a for a, b in self.own)

    @property
    def keys(self) -> tuple[tuple[int, int], ...]:
        """The runs of the pool. In a cache they are many for a long sequence, and a decode step does not ask for them."""
        return self.own.runs() if isinstance(self.own, Cached) else self.own


@dataclass(frozen=True)
class Cached:
    """The first `length` tokens of a sequence in a cache."""

    cache: KVCache
    place: Place
    length: int

    def runs(self) -> tuple[tuple[int, int], ...]:
        return tuple(self.cache.runs(self.place, 0, self.length))
