"""What every loop over a KV cache is made of: a cache of slots, virtual tokens at the start of a sequence, pieces through the forward.

`generate`, label scoring and the engine's runner each decide what runs when. What they write into a cache, and how they read a forward's
rows, is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trimtab import ops
from trimtab.forward.attached import Attached
from trimtab.forward.attention import KVCache, Place
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.packs import Mix, PackedAdapter


def virtual_tokens(mix: Mix, members: Sequence[int]) -> list[int]:
    """How many virtual tokens stand before a sequence of each member."""
    return [0 if m == BASE else mix.adapters[m].virtual_tokens for m in members]


def cache_of(attached: Attached, slots: int, capacity: int) -> KVCache:
    """A cache for `slots` sequences of at most `capacity` tokens, virtual ones included."""
    s = attached.spec
    return KVCache(s.num_layers, slots, capacity, s.num_kv_heads, s.head_dim, attached.dtype, attached.device)


def write_prefix(cache: KVCache, place: Place, adapter: PackedAdapter) -> None:
    """Put an adapter's virtual tokens, if it has any, at the start of a sequence: from then on they are tokens like others."""
    if adapter.prefix is not None:
        stored = adapter.stored_prefix()
        assert stored is not None, "an embedded prefix must be computed when its adapter is packed for inference"
        cache.put(place, *stored)


@dataclass(frozen=True)
class Fed:
    """Pieces that have run. hidden_TH: of the batch's rows; batch.where: which rows are a piece's."""

    attached: Attached
    batch: Batch
    hidden_TH: Tensor

    def logits(self, pieces: Sequence[int]) -> Tensor:
        """Logits [n, V], in the base's dtype, of the last rows of these pieces, in this order."""
        last = [self.batch.where[i][1] - 1 for i in pieces]
        if not last:
            return self.hidden_TH.new_empty(0, self.attached.spec.vocab_size)
        rows = sorted(last)
        place = {r: i for i, r in enumerate(rows)}
        row_R, place_R = ops.upload([np.array(rows), np.array([place[r] for r in last])], self.hidden_TH.device)
        logits_RV = self.attached.head(self.hidden_TH[row_R], self.batch, rows)
        return logits_RV if rows == last else logits_RV[place_R]


def feed(attached: Attached, mix: Mix, cache: KVCache, pieces: Sequence[Piece]) -> Fed:
    """Run pieces of sequences whose beginnings are in the cache. Afterwards it holds the pieces' keys and values too."""
    batch = make_batch(pieces, mix, device=attached.device, max_positions=attached.spec.max_positions, cache=cache)
    return Fed(attached, batch, attached.forward(batch))


def continue_prompts(
    attached: Attached,
    mix: Mix,
    members: Sequence[int],
    prompts: Sequence[Tensor],
    rounds: Sequence[Sequence[tuple[int, Tensor]]],
) -> Iterator[Fed]:
    """Run each prompt once and then, in every round, other continuations of it: the forward of each round, its pieces in the round's order.
    prompts: int64 ids. rounds: (number of a prompt, ids that continue it), each prompt once at most in a round. A round's continuations
    overwrite those of the round before."""
    virtual = virtual_tokens(mix, members)
    past = [v + len(p) for v, p in zip(virtual, prompts, strict=True)]
    cache = cache_of(attached, len(prompts), max(past[i] + len(ids) for asked in rounds for i, ids in asked))
    for slot, member in enumerate(members):
        if member != BASE:
            write_prefix(cache, slot, mix.adapters[member])
    pieces = [Piece(ids, members[i], i, virtual[i]) for i, ids in enumerate(prompts) if len(ids)]
    if pieces:
        feed(attached, mix, cache, pieces)
    for asked in rounds:
        yield feed(attached, mix, cache, [Piece(ids, members[i], i, past[i]) for i, ids in asked])
