"""The runner: tokens of many sequences in, logits out, in one flat mixed forward over a paged KV cache.

It owns the memory of the KV blocks. The engine decides which sequence has which blocks. The runner knows adapters only as packed
parameters, and nothing of requests, tenants or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.decode.cached import Fed, feed, write_prefix
from trimtab.forward.arena import in_order
from trimtab.forward.batch import BASE, Piece
from trimtab.forward.kv_cache import PagedKV
from trimtab.forward.packs import Mix, PackedAdapter
from trimtab.model import Base


@dataclass(frozen=True)
class Feed:
    """Tokens of one sequence that enter a forward. past: tokens whose keys and values its blocks hold (virtual ones included). blocks: its
    KV blocks in order, enough for past + len(ids) tokens. adapter: None is the base. logits: of how many of its last rows they are wanted;
    0 for a chunk of a prompt that goes on. read: called with all that has run and the number of this feed in it, to read its rows."""

    ids: Sequence[int]
    past: int
    blocks: Sequence[int]
    adapter: PackedAdapter | None = None
    logits: int = 1
    read: Callable[[Fed, int], None] | None = None


class Runner:
    """Runs forwards of one base over `blocks` KV blocks of `block_size` tokens. One thread at a time."""

    def __init__(self, base: Base, *, blocks: int, block_size: int = 16):
        s = base.spec
        self.base, self.block_size = base, block_size
        self.kv = PagedKV(s.num_layers, blocks, block_size, *s.kv_shape, base.dtype, base.device)
        self._mix = Mix([])

    @staticmethod
    def bytes_per_block(base: Base, block_size: int = 16) -> int:
        """Memory of one KV block over all layers."""
        s = base.spec
        return s.kv_numbers * block_size * torch.finfo(base.dtype).bits // 8

    @torch.inference_mode()
    def __call__(self, feeds: Sequence[Feed]) -> Tensor:
        """Logits [n, V], in the base's dtype, of the rows that want them, in order. Keys and values of all fed tokens are written."""
        mix = self._mix_of([f.adapter for f in feeds])
        number = {id(a): i for i, a in enumerate(mix.adapters)}
        pieces = [
            Piece(torch.as_tensor(f.ids, dtype=torch.int64), BASE if f.adapter is None else number[id(f.adapter)], f.blocks, f.past)
            for f in feeds
        ]
        fed = feed(self.base.attached, mix, self.kv, pieces)
        for i, f in enumerate(feeds):
            if f.read is not None:
                f.read(fed, i)
        return fed.logits([i for i, f in enumerate(feeds) if f.logits], [f.logits for f in feeds if f.logits])

    @torch.inference_mode()
    def write_prefix(self, blocks: Sequence[int], adapter: PackedAdapter) -> None:
        """Put an adapter's virtual tokens at the start of a sequence."""
        write_prefix(self.kv, blocks, adapter)

    def forget(self, adapter: PackedAdapter) -> None:
        """Let go of what is kept of an adapter that leaves memory."""
        if any(a is adapter for a in self._mix.adapters):
            self._mix = Mix([])

    def _mix_of(self, adapters: Sequence[PackedAdapter | None]) -> Mix:
        """A mix that holds these adapters: the last one if it does, so that what it stacked stays."""
        wanted = {id(a): a for a in adapters if a is not None}
        if not wanted.keys() <= {id(a) for a in self._mix.adapters}:
            packed = list(wanted.values())
            self._mix = Mix([packed[i] for i in in_order([a.placed for a in packed])])
        return self._mix
