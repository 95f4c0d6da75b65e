"""Attention over a flat batch in one kernel (cpp/attention.cpp): training on a CPU in bfloat16, where the matmuls of padded buckets cost
less than the gathers, masks and score matrices around them.

T rows, H query heads over G key heads, D head size. The pools of keys and values [N, G, D] are the rows' own and whatever else sequences
read. What a prefix, a plan or an adapter is is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.ops import native

WIDEST = 128
"""The largest head size that the kernel is tried at."""


@dataclass(frozen=True)
class FlatIndex:
    """Which rows each sequence reads, as int64 tables for the kernel. sequence_S4: first row, queries, first place in key_K, keys; the
    costliest first. key_K: the sequences' rows of the pool, one after the other. slot_K: -1 where no other sequence reads that row, else
    the place of this one's share of its gradient; shares of a row follow each other. shared_R: the rows read more than once;
    first_R1: where the shares of each start, and their number at the end. rows: how many rows of the pool are read at all."""

    sequence_S4: Tensor
    key_K: Tensor
    slot_K: Tensor
    shared_R: Tensor
    first_R1: Tensor
    rows: int
    longest: int


def flat_index(sequences: Sequence[tuple[int, int, Sequence[tuple[int, int]]]]) -> FlatIndex:
    """sequences: (first row, end, runs (first, end) of its keys' rows in the pool, in order, ending at its last query's own place)."""
    places = [np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in keys]) for _, _, keys in sequences]
    length = np.array([len(p) for p in places])
    queries = np.array([stop - start for start, stop, _ in sequences])
    first = np.concatenate([[0], np.cumsum(length)[:-1]])
    table = np.stack([np.array([start for start, _, _ in sequences]), queries, first, length], axis=1)
    costliest = np.argsort(-(queries * (2 * length - queries)), kind="stable")
    key = np.concatenate(places)
    rows, inverse, reads = np.unique(key, return_inverse=True, return_counts=True)
    twice = reads[inverse] > 1
    slot = np.full(len(key), -1, dtype=np.int64)
    slot[np.flatnonzero(twice)[np.argsort(key[twice], kind="stable")]] = np.arange(twice.sum())
    first_share = np.concatenate([[0], np.cumsum(reads[reads > 1])])
    sequence, keys, slots, shared, firsts = (
        torch.from_numpy(np.ascontiguousarray(t, dtype=np.int64)) for t in (table[costliest], key, slot, rows[reads > 1], first_share)
    )
    return FlatIndex(sequence, keys, slots, shared, firsts, rows=len(rows), longest=int(length.max()))


def takes_flat(*tensors_RHD: Tensor) -> bool:
    """Whether `flat_attention` computes tensors like these: bfloat16 on a CPU with matrix tiles, head sizes that fill them."""
    return (
        all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors_RHD)
        and all(t.shape[-1] % 32 == 0 and t.shape[-1] <= WIDEST and t.shape[-1] == tensors_RHD[0].shape[-1] for t in tensors_RHD)
        and native.has_tiles()
    )


def flat_attention(q_THD: Tensor, k_NGD: Tensor, v_NGD: Tensor, index: FlatIndex, scaling: float, window: int | None) -> Tensor:
    """softmax(scaling · q kᵀ) v of each sequence's queries over its keys, causal; [T, H, D]. Where `takes_flat` says so. scaling > 0.

    The last query of a sequence stands at its last key, the others before it; keys at distance ≥ window are never read. Scores,
    probabilities' sums and gradients are summed in fp32, probabilities and what is multiplied rounded to bfloat16. Kept for the backward:
    q, k, v and two numbers for each query and head. Results do not depend on the number of threads.
    """
    return _FlatAttention.apply(q_THD, k_NGD, v_NGD, index, scaling, window)


class _FlatAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: FlatIndex, scaling: float, window: int | None) -> Tensor:
        q, k, v = _as_rows(q), _as_rows(k), _as_rows(v)
        (T, H, D), G = q.shape, k.shape[1]
        out, kept_2HT = torch.empty(T, H, D, dtype=q.dtype), torch.empty(2, H, T)
        run = native.function("attend_rows", q.dtype, "pipipippppiiiiiifi")
        run(*_addresses(q, k, v), out.data_ptr(), kept_2HT.data_ptr(), index.sequence_S4.data_ptr(), index.key_K.data_ptr(),
            len(index.sequence_S4), index.longest, T, H, G, D, scaling, window or 0)  # fmt: skip
        ctx.save_for_backward(q, k, v, kept_2HT)
        ctx.config = index, scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        q, k, v, kept_2HT = ctx.saved_tensors
        index, scaling, window = ctx.config
        (T, H, D), (N, G, _) = q.shape, k.shape
        d_out, dq = _as_rows(d_out), torch.empty(T, H, D, dtype=q.dtype)
        some = torch.empty if index.rows == N else torch.zeros  # rows that no sequence reads have no gradient
        dk, dv = some(N, G, D, dtype=q.dtype), some(N, G, D, dtype=q.dtype)
        shares = torch.empty(2, int(index.first_R1[-1]), G, D)
        run = native.function("attend_rows_backward", q.dtype, "pipipipippppppppppiiiiiiifi")
        run(*_addresses(q, k, v, d_out), kept_2HT.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), index.sequence_S4.data_ptr(),
            index.key_K.data_ptr(), index.slot_K.data_ptr(), shares.data_ptr(), index.shared_R.data_ptr(), index.first_R1.data_ptr(),
            len(index.shared_R), len(index.sequence_S4), index.longest, T, H, G, D, scaling, window or 0)  # fmt: skip
        return dq, dk, dv, None, None, None


def _as_rows(x_RHD: Tensor) -> Tensor:
    """The same with the heads of a row side by side in memory; rows may lie apart."""
    return x_RHD if x_RHD.stride()[1:] == (x_RHD.shape[2], 1) else x_RHD.contiguous()


def _addresses(*tensors_RHD: Tensor) -> list[int]:
    return list(chain.from_iterable((t.data_ptr(), t.stride(0)) for t in tensors_RHD))
