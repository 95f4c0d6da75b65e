"""The batch: flat rows of many sequences, grouped by adapter. Callers of the forward make it; the forward reads it.

Adapters of the mix are laid out one after the other, so that each adapter's rows are one span; the base's rows come first. An aLoRA has a
span in each sequence, from its invocation on, and the rows before are the base's. With a cache, callers give the rows before as pieces of
the base. If an adapter's prefix is given as embeddings, these are rows of their own, once, before its sequences (unless a cache already has
their keys and values).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.forward.attention import AttentionPlan
from trimtab.forward.kv_cache import Cached, KVCache, Place, Run
from trimtab.forward.packs import Mix
from trimtab.methods.base import Rows, Span
from trimtab.ops import row_keys, upload

BASE = -1
"""The member number of rows that no adapter touches."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that enter this forward. ids: [t] int64. member: its adapter in the mix, or BASE.

    shared: so many tokens stand before them that are the first ones of the piece before this one, of the same member: their rows are not
    computed again. seed: of dropout, in training; pieces of one seed that follow each other are one row to it. noise: (seed, bound) of what
    is added to its embeddings, uniform in ±bound (NEFTune, training only). prompt: an aLoRA's invocation is looked for among so many first
    tokens of the sequence (shared ones included); None: among all. With a cache: slot, the sequence's place in it, and how many tokens of
    the sequence (virtual ones included) the cache already holds.
    """

    ids: Tensor
    member: int = BASE
    slot: Place = 0
    past: int = 0
    shared: int = 0
    seed: int | None = None
    noise: tuple[int, float] | None = None
    prompt: int | None = None


class Way(StrEnum):
    """How rows run: with all layers in one native call, layer by layer on the decode path, or through the model's own modules."""

    ONE_CALL = "one_call"
    LAYER_BY_LAYER = "layer_by_layer"
    MODEL = "model"


@dataclass
class Batch:
    """Flat rows, ready to run. where[i]: (start, stop) of the i-th piece's rows. spans: the members' runs of rows. embeds: rows that are
    not tokens. keys_T: of the rows' dropout (`ops.dropout`), in training. noise: (first row, last row + 1, seed, bound) of pieces with
    noise. head: the output head of the forward that ran it, where that was not the model's own; it is not for rows of `own_head`."""

    mix: Mix
    ids_T: Tensor
    position_T: Tensor
    plan: AttentionPlan
    spans: list[Span]
    where: list[tuple[int, int]]
    embeds: list[tuple[int, int, Tensor]]
    keys_T: Tensor | None = None
    noise: Sequence[tuple[int, int, int, float]] = ()
    head: Callable[[Tensor], Tensor] | None = None
    own_head: frozenset[int] = frozenset()
    _rows: dict[tuple[int, ...], Rows | None] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.ids_T)

    def rows(self, members: tuple[int, ...]) -> Rows | None:
        """The rows of these members, whose slots are their places in `members`; None where the batch has none."""
        if members not in self._rows:
            self._rows[members] = make_rows(self.spans, members, self.total, self.ids_T.device, self.keys_T)
        return self._rows[members]

    @cached_property
    def members(self) -> frozenset[int]:
        """The members that have rows, BASE among them."""
        base = sum(s.stop - s.start for s in self.spans) < self.total
        return frozenset(s.slot for s in self.spans) | ({BASE} if base else set())

    @cached_property
    def member_T(self) -> list[int]:
        """The member of each row."""
        member_T = [BASE] * self.total
        for s in self.spans:
            member_T[s.start : s.stop] = [s.slot] * (s.stop - s.start)
        return member_T

    def index(self, members: Collection[int]) -> list[int]:
        """The rows of these members, ascending."""
        return [i for i, member in enumerate(self.member_T) if member in members]

    def subset(self, index: Sequence[int]) -> Batch:
        """The same members over a selection of rows, ascending: what the output head sees. Nothing but spans is carried over."""
        cut = [(bisect_left(index, s.start), bisect_left(index, s.stop), s) for s in self.spans]
        spans = [Span(a, b, s.slot) for a, b, s in cut if b > a]
        ids = self.ids_T.new_zeros(len(index))
        keys = None if self.keys_T is None else self.keys_T[upload([np.asarray(index, dtype=np.int64)], self.plan.device)[0]]
        return Batch(self.mix, ids, ids, self.plan, spans, [], [], keys)

    def part(self, index: Sequence[int]) -> Batch:
        """Whole sequences of a batch with a cache, by their rows, as a batch of their own: they read nothing of the others."""
        plan, chosen, at = self.plan, set(index), 0
        assert plan.cache is not None and plan.write_T is not None and not self.embeds
        kept = [(run, place) for run, place in zip(plan.runs, plan.places, strict=True) if run.start in chosen]
        runs = []
        for run, _ in kept:
            runs.append(replace(run, start=at, stop=at + run.queries))
            at += run.queries
        assert at == len(index)
        rows_T = upload([np.array(index)], plan.device)[0]
        own = AttentionPlan(runs, plan.device, cache=plan.cache, places=[place for _, place in kept], write_T=plan.write_T[rows_T])
        return replace(self.subset(index), ids_T=self.ids_T[rows_T], position_T=self.position_T[rows_T], plan=own)


def make_rows(
    spans: Sequence[Span], members: tuple[int, ...], total: int, device: torch.device, keys_T: Tensor | None = None
) -> Rows | None:
    slots = {m: i for i, m in enumerate(members)}
    chosen = tuple(Span(s.start, s.stop, slots[s.slot]) for s in spans if s.slot in slots)
    return Rows(chosen, total, device, keys_T) if chosen else None


def make_batch(
    pieces: Sequence[Piece],
    mix: Mix,
    *,
    device: torch.device,
    max_positions: int,
    cache: KVCache | None = None,
) -> Batch:
    """Lay pieces out flat, grouped by member.

    TrimtabError where a sequence, its virtual tokens included, is longer than the base has positions.
    """
    build = _Layout(mix, cache)
    for i in sorted(range(len(pieces)), key=lambda i: pieces[i].member):
        build.add(i, pieces[i], max_positions)
    runs, writes = build.runs, build.writes
    plan = AttentionPlan([Run(a, b, _placed(keys, build.total)) for a, b, keys in runs], device)
    plan.prefixes, plan.cache, plan.places = build.prefixes, cache, build.places
    ids, positions = torch.cat(build.ids).cpu(), torch.cat(build.positions)
    extra = {"write": np.array(writes)} if cache is not None else {}
    if build.seeded:
        extra["keys"] = build.keys()
    ids_T, position_T, *others = upload([ids.numpy(), positions.numpy(), *extra.values()], device)
    there = dict(zip(extra, others, strict=True))
    plan.write_T = there.get("write")
    spans = [Span(a, b, member) for member, found in build.spans.items() if member != BASE for a, b in found]
    where = [build.where[i] for i in range(len(pieces))]
    noise = [(*build.computed[i], *piece.noise) for i, piece in enumerate(pieces) if piece.noise is not None]
    return Batch(mix, ids_T, position_T, plan, spans, where, build.embeds, there.get("keys"), noise)


_Key = tuple[str, int, int]
"""A run of keys: "own" or "prefix", first, end."""


def _placed(keys: list[_Key] | Cached, total: int) -> tuple[tuple[int, int], ...] | Cached:
    """Keys as rows of the pool: stored prefixes lie behind the batch's own rows."""
    if isinstance(keys, Cached):
        return keys
    return tuple((a + total, b + total) if kind == "prefix" else (a, b) for kind, a, b in keys)


def _first(keys: Sequence[_Key], n: int) -> list[_Key]:
    """The first n of some keys."""
    found = list[_Key]()
    for kind, a, b in keys:
        if n > 0:
            found.append((kind, a, min(b, a + n)))
        n -= b - a
    return found


class _Layout:
    """Rows so far, and what stands before each member's sequences."""

    def __init__(self, mix: Mix, cache: KVCache | None):
        self.mix, self.cache, self.total, self.prefix_rows = mix, cache, 0, 0
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.runs: list[tuple[int, int, list[_Key] | Cached]] = []
        self.writes: list[int] = []
        self.places: list[Place] = []
        self.where: dict[int, tuple[int, int]] = {}
        self.computed: dict[int, tuple[int, int]] = {}  # of each piece: `where`, and before it rows that were not asked for
        self.spans: dict[int, list[tuple[int, int]]] = {}
        self.seeded: list[tuple[tuple[int, int], int, int]] = []  # (member, seed), first row, end: of what is one row to dropout
        self.embeds: list[tuple[int, int, Tensor]] = []
        self.prefixes: list[tuple[Tensor, Tensor]] = []
        self.before: dict[int, list[_Key]] = {BASE: []}
        self.last: list[_Key] = []  # the keys of the piece before
        # of an aLoRA's piece before: its tokens, and from where it is on
        self.said: tuple[Tensor, int] = torch.empty(0, dtype=torch.int64), 0

    def add(self, i: int, piece: Piece, max_positions: int) -> None:
        member, n, off, hidden = piece.member, len(piece.ids), 0, 0
        if self.cache is None and member != BASE and self.mix.adapters[member].invocation:
            piece, off, hidden = self._from_invocation(piece)
            n = len(piece.ids)
        keys: list[_Key] | Cached
        if self.cache is not None:
            past, keys = piece.past, Cached(self.cache, piece.slot, piece.past + n)
            self.places.append(piece.slot)
            for a, b in self.cache.runs(piece.slot, past, past + n):
                self.writes.extend(range(a, b))
        else:
            if member not in self.before:
                self._prefix(member)
            virtual = sum(b - a for _, a, b in self.before[member])
            before = _first(self.last, virtual + piece.shared) if piece.shared else self.before[member]
            past = virtual + piece.shared
            self.last = keys = [*before, ("own", self.total, self.total + n)]
        if past + n > max_positions:
            behind = f" after {past} that stand before them" if past else ""
            raise TrimtabError(
                f"{n} tokens{behind} are more than the {max_positions} positions of this base", fix="shorten the text or the prefix"
            )
        start, stop = self._append(piece.ids, past, keys, member, off, piece.seed)
        self.where[i], self.computed[i] = (start + hidden, stop), (start, stop)

    def _from_invocation(self, piece: Piece) -> tuple[Piece, int, int]:
        """(a piece of an aLoRA, its first rows that are the base's, its first rows that were not asked for). Rows that it would share with
        the piece before, and for which the adapter is on in one of the two alone, are its own."""
        before, on_before = self.said
        ids = torch.cat([before[: piece.shared], piece.ids])
        asked = ids[: piece.prompt]
        on = self.mix.adapters[piece.member].on_from(asked.numpy())
        on = on if on < len(asked) else len(ids)
        self.said, shared = (ids, on), piece.shared
        if min(on, shared) != min(on_before, shared):
            return replace(piece, ids=ids, shared=0), on, shared
        return piece, max(0, on - shared), 0

    def keys(self) -> np.ndarray:
        """Of each row's dropout; 0 where there is none."""
        found = np.zeros(self.total, dtype=np.int32)
        for (_, seed), start, stop in self.seeded:
            found[start:stop] = row_keys(seed, stop - start)
        return found

    def _append(
        self, ids: Tensor, past: int, keys: list[_Key] | Cached, member: int, off: int = 0, seed: int | None = None
    ) -> tuple[int, int]:
        """off: so many rows at the start are the base's."""
        start, stop = self.total, self.total + len(ids)
        self.ids.append(ids)
        self.positions.append(torch.arange(past, past + len(ids)))
        self.runs.append((start, stop, keys))
        mine = self.spans.setdefault(member, [])
        if off < len(ids) and mine and not off and mine[-1][1] == start:
            mine[-1] = (mine[-1][0], stop)
        elif off < len(ids):
            mine.append((start + off, stop))
        if seed is not None:
            goes_on = bool(self.seeded) and self.seeded[-1][::2] == ((member, seed), start)  # another member's row may have the same seed
            self.seeded.append(((member, seed), self.seeded.pop()[1] if goes_on else start, stop))
        self.total = stop
        return start, stop

    def _prefix(self, member: int) -> None:
        adapter = self.mix.adapters[member]
        prefix, self.before[member] = adapter.prefix, []
        if prefix is None:
            return
        kv = adapter.stored_prefix()
        if kv is not None:
            self.prefixes.append(kv)
            self.before[member] = [("prefix", self.prefix_rows, self.prefix_rows + prefix.length)]
            self.prefix_rows += prefix.length
        else:
            own = ("own", self.total, self.total + prefix.length)
            start, stop = self._append(torch.zeros(prefix.length, dtype=torch.int64), 0, [own], member)
            assert prefix.embeds_NH is not None
            self.embeds.append((start, stop, prefix.embeds_NH))
            self.before[member] = [own]
