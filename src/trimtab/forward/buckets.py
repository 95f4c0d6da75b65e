"""Attention in buckets: sequences of similar length run as one batched matmul. The padding inside a bucket never leaves this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.forward.kv_cache import Run

MAX_PADDING = 1.3
"""A bucket takes the next longer sequence while its padded area stays below this multiple of its real area."""


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
