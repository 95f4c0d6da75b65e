"""Attention over the sequences of a flat batch: causal, with a prefix and cached keys before it, no padding of rows, no dense mask.

Rows reach each layer flat, [1, heads, T, D]. An `AttentionPlan`, made once for each batch and used by all layers, says for each sequence
which rows are its queries and which rows of a *pool* are its keys. The pool is the layer's own T rows followed by the stored prefixes, or,
with a cache, the cache. Sequences of similar length share a bucket and run as one batched matmul; the padding inside a bucket never leaves
this file.

One function, registered with `transformers`' attention interface, serves every family. What it does not compute exactly it refuses by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from trimtab import ops
from trimtab.errors import BaseError
from trimtab.ops import native

NAME = "trimtab"
LONG = 64
"""Sequences that bring this many rows run their attention over a cache in blocks of queries, or as batched matmuls; others row by row."""
MAX_PADDING = 1.3
"""A bucket takes the next longer sequence while its padded area stays below this multiple of its real area."""


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


@dataclass
class Bucket:
    """Sequences of similar length. query_BQ: flat rows; key_BS: pool rows, both padded at the end with a row of the sequence; offset as
    in ops.attention, where all sequences share it and none is padded between keys and queries, else a mask says it."""

    query_BQ: Tensor
    key_BS: Tensor
    offset: int
    mask_BQS: Tensor | None
    distance_BQS: Tensor | None = None

    def masked(self, window: int | None) -> Tensor | None:
        if self.mask_BQS is None or window is None or self.distance_BQS is None:
            return self.mask_BQS
        return self.mask_BQS & (self.distance_BQS < window)


@dataclass
class AttentionPlan:
    """Which rows attend to which, for all layers of one forward.

    prefixes: stored (keys, values) [L, N, kv_heads, D] that stand in the pool behind the layer's own rows. cache: keys and values are
    written there at `write_T` and read from there; each run's sequence has its place there. captured: filled with each layer's (keys,
    values) [T, kv_heads, D] where `capture` is set.
    """

    runs: Sequence[Run]
    device: torch.device
    prefixes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    cache: KVCache | None = None
    places: Sequence[Place] = ()
    write_T: Tensor | None = None
    capture: bool = False
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @cached_property
    def layout(self) -> tuple[list[Bucket], Tensor]:
        return lay_out(self.runs, self.device)

    @cached_property
    def index(self) -> ops.FlatIndex:
        return ops.flat_index([(r.start, r.stop, r.keys) for r in self.runs])

    @cached_property
    def varlen(self) -> ops.VarlenIndex:
        return ops.varlen_index([(r.start, r.stop, r.keys) for r in self.runs], self.device)

    def pool(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> tuple[Tensor, Tensor]:
        if self.capture:
            self.captured.append((k_THD, v_THD))
        if self.cache is not None:
            self.cache.keys[layer][self.write_T], self.cache.values[layer][self.write_T] = k_THD, v_THD
            return self.cache.keys[layer], self.cache.values[layer]
        if not self.prefixes:
            return k_THD, v_THD
        return torch.cat([k_THD, *(k[layer] for k, _ in self.prefixes)]), torch.cat([v_THD, *(v[layer] for _, v in self.prefixes)])


def lay_out(sequences: Sequence[Run], device: torch.device) -> tuple[list[Bucket], Tensor]:
    """(buckets by length, each flat row's place in the buckets' concatenated results)."""
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].queries, sequences[i].length))
    laid, row_T, at = list[_Laid](), np.zeros(sum(s.queries for s in sequences), dtype=np.int64), 0
    for group in _grouped([sequences[i] for i in order]):
        Q = max(s.queries for s in group)
        for n, s in enumerate(group):
            row_T[s.start : s.stop] = at + n * Q + np.arange(s.queries)
        at += len(group) * Q
        laid.append(_lay_out(group, Q))
    row, *rest = ops.upload([row_T, *(array for bucket in laid for array in bucket.arrays)], device)
    there = iter(rest)
    return [bucket.moved([next(there) for _ in bucket.arrays]) for bucket in laid], row


@dataclass(frozen=True)
class _Laid:
    """A bucket on the host. arrays: its queries, its keys and, where it needs a mask, each key's distance."""

    arrays: list[np.ndarray]
    offset: int

    def moved(self, there: Sequence[Tensor]) -> Bucket:
        query_BQ, key_BS, *rest = there
        distance = rest[0] if rest else None
        return Bucket(query_BQ, key_BS, self.offset, None if distance is None else distance >= 0, distance)


def _grouped(ordered: list[Run]) -> list[list[Run]]:
    groups: list[list[Run]] = []
    real = 0
    for s in ordered:
        area = s.queries * s.length
        if groups:
            group = groups[-1]
            padded = (len(group) + 1) * s.queries * max(s.length, max(g.length for g in group))
            if padded <= MAX_PADDING * (real + area):
                group.append(s)
                real += area
                continue
        groups.append([s])
        real = area
    return groups


def _lay_out(group: list[Run], Q: int) -> _Laid:
    S = max(s.length for s in group)
    query, key = np.empty((len(group), Q), dtype=np.int64), np.empty((len(group), S), dtype=np.int64)
    for n, s in enumerate(group):
        query[n] = s.start + np.minimum(np.arange(Q), s.queries - 1)
        own = np.concatenate([np.arange(a, b) for a, b in s.keys])
        key[n, : s.length], key[n, s.length :] = own, own[-1]
    offsets = {s.length - s.queries for s in group}
    if len(offsets) == 1:  # then causality alone also keeps padding keys from real queries
        return _Laid([query, key], max(offsets))
    q_pos = np.stack([s.length - s.queries + np.arange(Q) for s in group])[:, :, None]
    return _Laid([query, key, q_pos - np.arange(S)[None, None]], max(offsets))


def forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    trimtab_plan: AttentionPlan | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer: query [1, H, T, D], key and value [1, kv_heads, T, D]; returns [1, T, H, D]."""
    plan = at_hand(module) if trimtab_plan is None else trimtab_plan
    if plan is None:
        raise RuntimeError("this model is attached to trimtab: call Base.logits, Base.generate or Attached.forward, or load another copy")
    # A model has read its cache, if it has one, before it calls this: what it found there would be keys without queries.
    others = {name: value for name, value in kwargs.items() if not _is_cache(value)}
    refuse_changes(others | {"attention_mask": attention_mask, "dropout": dropout, "cached_keys": key.shape[2] - query.shape[2]})
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q_THD, k_THD, v_THD, plan, module.layer_idx, scaling, softcap, sliding_window, s_aux)[None], None


class HasPlan(Protocol):
    """A batch."""

    @property
    def plan(self) -> AttentionPlan: ...


class KeepsBatch(Protocol):
    """What keeps a base's batch of the calling thread (`hosts.AtHand`)."""

    @property
    def batch(self) -> HasPlan | None: ...


KEPT: WeakKeyDictionary[Any, KeepsBatch] = WeakKeyDictionary()
"""An attention module of a base -> where the batch is, for classes whose layers do not hand their arguments on to the attention."""


def at_hand(module: Any) -> AttentionPlan | None:
    """The plan of the batch that the calling thread runs on the module's base."""
    kept = KEPT.get(module)
    batch = None if kept is None else kept.batch
    return None if batch is None else batch.plan


def refuse_changes(arguments: Mapping[str, object]) -> None:
    """BaseError where a model hands its attention something that may change the result and that is not computed here.

    Every version of transformers hands over other names, so what decides is what an argument asks for (`_asks_nothing`).
    """
    refused = [f"{name}={_in_words(value)}" for name, value in sorted(arguments.items()) if not _asks_nothing(name, value)]
    if refused:
        raise BaseError(
            f"this model's attention asks for {', '.join(refused)}, which trimtab's attention does not compute",
            fix="use another base, or a version of transformers that trimtab is tested with: `trimtab doctor` says whether yours is one",
        )


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether attention is the same with and without this argument: it says what is known already, asks that something be kept or returned
    besides, or holds nothing (None, off, zero, an empty sequence, a cache without tokens).

    Scores are always scaled and causal here, so "no" to one of these is a change, and "yes" to causality is none.
    """
    if value is None or name in _KNOWN or name.startswith(_BESIDES):
        return True
    if "causal" in name:
        return value is True
    if "scal" in name:
        return False
    if isinstance(value, bool | int | float):
        return not value
    if isinstance(value, Tensor):
        return value.numel() == 0
    if _is_cache(value):
        return bool(value.get_seq_length() == 0)
    return isinstance(value, Sized) and len(value) == 0


def _is_cache(value: Any) -> bool:
    return callable(getattr(value, "get_seq_length", None))


_KNOWN = {"position_ids", "cache_position", "layer_idx"}
"""The plan's positions and the module's number, under transformers' names."""
_BESIDES = ("output_", "return_", "use_cache")


def _in_words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"


def attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    plan: AttentionPlan,
    layer: int,
    scaling: float,
    softcap: float | None,
    window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of a layer's flat rows over the plan's sequences; q [T, H, D], k and v [T, kv_heads, D]; returns [T, H, D]."""
    k_pool, v_pool = plan.pool(layer, k_THD, v_THD)
    if softcap is not None or sinks_H is not None:
        return over_buckets(q_THD, k_pool, v_pool, plan.layout, scaling, softcap, window, sinks_H)
    flat = plan.cache is None or any(run.queries >= LONG for run in plan.runs)
    if flat and scaling > 0 and ops.takes_flat(q_THD, k_pool, v_pool):
        return ops.flat_attention(q_THD, k_pool, v_pool, plan.index, scaling, window)
    if plan.cache is None and (kernel := ops.varlen_kernel(q_THD, k_pool)) is not None:
        return ops.varlen_attention(q_THD, k_pool, v_pool, plan.varlen, scaling, window, kernel)
    return over_buckets(q_THD, k_pool, v_pool, plan.layout, scaling, None, window)


def over_buckets(
    q_THD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    layout: tuple[list[Bucket], Tensor],
    scaling: float,
    softcap: float | None,
    window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of rows over what `lay_out` laid out; [T, H, D]."""
    outs, (buckets, row_T) = [], layout
    for b in buckets:
        q, k, v = (_gather(x, i) for x, i in ((q_THD, b.query_BQ), (k_pool, b.key_BS), (v_pool, b.key_BS)))
        inside = window if b.mask_BQS is None else None  # else the mask holds it
        outs.append(ops.attention(q, k, v, b.offset, b.masked(window), scaling, softcap, inside, sinks_H).flatten(0, 1))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(0, row_T)


def _gather(x_RHD: Tensor, index: Tensor) -> Tensor:
    return x_RHD.index_select(0, index.flatten()).view(*index.shape, *x_RHD.shape[1:])


AttentionInterface.register(NAME, forward)
