"""What every loop over a KV cache is made of: a cache, virtual tokens at the start of a sequence, pieces through the forward.

`generate`, label scoring and the engine's runner each decide what runs when. What they write into a cache, and how they read a forward's
rows, is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.kv_cache import KVCache, PagedKV, Place
from trimtab.forward.packs import Mix, PackedAdapter


def virtual_tokens(mix: Mix, members: Sequence[int]) -> list[int]:
    """How many virtual tokens stand before a sequence of each member."""
    return [0 if m == BASE else mix.adapters[m].virtual_tokens for m in members]


def invoked(
    attached: Attached, mix: Mix, cache: KVCache, members: Sequence[int], prompts: Sequence[Sequence[int] | Tensor], places: Sequence[Place]
) -> tuple[list[int], list[int]]:
    """(the member that runs the rest of each prompt, and how many of its tokens the cache then holds). Of an aLoRA's prompt the tokens
    before its invocation run here, as the base's. Where the prompt has none, it is the base's from beginning to end."""
    rest = list(members)
    past = [0 if m == BASE else mix.adapters[m].on_from(p) for m, p in zip(members, prompts, strict=True)]
    for i, prompt in enumerate(prompts):
        if past[i] == len(prompt) > 0:  # of an empty one nothing is known yet
            rest[i], past[i] = BASE, 0
    pieces = [Piece(torch.as_tensor(prompts[i][:n], dtype=torch.int64), BASE, places[i]) for i, n in enumerate(past) if n]
    if pieces:
        feed(attached, mix, cache, pieces)
    return rest, past


class Pages:
    """A cache for sequences that take turns, at most `live` at once. needs: the tokens of each. On a device they are kept in pages of the
    size that its attention reads; on a CPU each has one piece, as large as the largest needs."""

    def __init__(self, attached: Attached, needs: Sequence[int], live: int):
        s = attached.spec
        page = max(needs)
        if attached.device.type != "cpu":
            first = s.layers[0]
            page = ops.page_size(attached.device, attached.dtype, first.head_dim, first.num_heads // first.num_kv_heads)
        self._counts = [-(-n // page) for n in needs]
        total = sum(sorted(self._counts)[-live:])
        self.kv = PagedKV(s.num_layers, total, page, *s.kv_shape, attached.dtype, attached.device)
        self._free = list(range(total))

    def take(self, sequence: int) -> list[int]:
        """The place of a sequence."""
        return [self._free.pop() for _ in range(self._counts[sequence])]

    def give_back(self, place: Sequence[int]) -> None:
        self._free += place


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

    def logits_of(self, rows: range) -> Tensor:
        """Logits [n, V], in the base's dtype, of these rows."""
        return self.attached.head(self.hidden_TH[rows.start : rows.stop], self.batch, list(rows))

    def logits(self, pieces: Sequence[int], counts: Sequence[int] = ()) -> Tensor:
        """Logits [n, V], in the base's dtype, of the last rows of these pieces, in this order. counts: how many rows of each; one where
        nothing is said."""
        stops = [self.batch.where[i][1] for i in pieces]
        last = [row for stop, n in zip(stops, counts or [1] * len(stops), strict=True) for row in range(stop - n, stop)]
        if not last:
            return self.hidden_TH.new_empty(0, self.attached.spec.vocab_size)
        rows = sorted(set(last))
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
    needs = list(past)
    for i, ids in (one for asked in rounds for one in asked):
        needs[i] = max(needs[i], past[i] + len(ids))
    pages = Pages(attached, needs, len(prompts))
    cache, places = pages.kv, [pages.take(i) for i in range(len(prompts))]
    for place, member in zip(places, members, strict=True):
        if member != BASE:
            write_prefix(cache, place, mix.adapters[member])
    members, read = invoked(attached, mix, cache, members, prompts, places)
    pieces = [Piece(ids[read[i] :], members[i], places[i], virtual[i] + read[i]) for i, ids in enumerate(prompts) if len(ids)]
    if pieces:
        feed(attached, mix, cache, pieces)
    for asked in rounds:
        yield feed(attached, mix, cache, [Piece(ids, members[i], places[i], past[i]) for i, ids in asked])
