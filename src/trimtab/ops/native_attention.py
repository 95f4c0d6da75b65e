"""Attention over a flat batch in one kernel (cpp/attention.cpp): training and long prompts on a CPU in bfloat16, where the matmuls of
padded buckets cost less than the gathers, masks and score matrices around them.

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
PIECE = 256
"""Queries of a long sequence that a thread computes at a time where no gradients are wanted."""
Sequences = Sequence[tuple[int, int, Sequence[tuple[int, int]]]]
"""(first row, end, runs (first, end) of its keys' rows in the pool, in order, ending at its last query's own place) of each."""


@dataclass(frozen=True)
class QueryIndex:
    """Which rows each sequence reads, as int64 tables for the kernel. sequence_S4: first row, queries, first place in key_K, keys; the
    costliest first. key_K: the sequences' rows of the pool, one after the other. longest: the most keys of a sequence."""

    sequence_S4: Tensor
    key_K: Tensor
    longest: int


@dataclass(frozen=True)
class FlatIndex(QueryIndex):
    """The same, and what gradients need. slot_K: -1 where no other sequence reads that row, else the place of this one's share of its
    gradient; shares of a row follow each other. shared_R: the rows read more than once; first_R1: where the shares of each start, and
    their number at the end. rows: how many rows of the pool are read at all."""

    slot_K: Tensor
    shared_R: Tensor
    first_R1: Tensor
    rows: int


def query_index(sequences: Sequences, piece: int = PIECE) -> QueryIndex:
    """For `attend_rows`: each sequence in pieces of so many queries, which share its keys, so that threads share it."""
    lines, places, at = list[tuple[int, int, int, int]](), list[np.ndarray](), 0
    for start, stop, keys in sequences:
        places.append(np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in keys]))
        length = len(places[-1])
        for a in range(start, stop, piece):
            b = min(a + piece, stop)
            lines.append((a, b - a, at, length - (stop - b)))
        at += length
    table = np.array(lines, dtype=np.int64)
    costliest = np.argsort(-(table[:, 1] * (2 * table[:, 3] - table[:, 1])), kind="stable")
    return QueryIndex(torch.from_numpy(table[costliest]), torch.from_numpy(np.concatenate(places)), int(table[:, 3].max()))


def flat_index(sequences: Sequences) -> FlatIndex:
    """For `flat_attention`: sequences are whole, since each adds to the gradients of its keys."""
    whole = query_index(sequences, piece=max(stop - start for start, stop, _ in sequences))
    key = whole.key_K.numpy()
    rows, inverse, reads = np.unique(key, return_inverse=True, return_counts=True)
    twice = reads[inverse] > 1
    slot = np.full(len(key), -1, dtype=np.int64)
    slot[np.flatnonzero(twice)[np.argsort(key[twice], kind="stable")]] = np.arange(twice.sum())
    first_share = np.concatenate([[0], np.cumsum(reads[reads > 1])])
    slots, shared, firsts = (torch.from_numpy(np.ascontiguousarray(t, dtype=np.int64)) for t in (slot, rows[reads > 1], first_share))
    return FlatIndex(whole.sequence_S4, whole.key_K, whole.longest, slots, shared, firsts, len(rows))


def takes_flat(*tensors_RHD: Tensor) -> bool:
    """Whether `flat_attention` computes tensors like these: bfloat16 on a CPU that multiplies it, heads of whole blocks."""
    return (
        all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors_RHD)
        and all(t.shape[-1] % 32 == 0 and t.shape[-1] <= WIDEST and t.shape[-1] == tensors_RHD[0].shape[-1] for t in tensors_RHD)
        and native.attends_flat()
    )


def flat_attention(q_THD: Tensor, k_NGD: Tensor, v_NGD: Tensor, index: FlatIndex, scaling: float, window: int | None) -> Tensor:
    """softmax(scaling · q kᵀ) v of each sequence's queries over its keys, causal; [T, H, D]. Where `takes_flat` says so. scaling > 0.

    The last query of a sequence stands at its last key, the others before it; keys at distance ≥ window are never read. Scores,
    probabilities' sums and gradients are summed in fp32, probabilities and what is multiplied rounded to bfloat16. Kept for the backward:
    q, k, v and two numbers for each query and head. Results do not depend on the number of threads.
    """
    return _FlatAttention.apply(q_THD, k_NGD, v_NGD, index, scaling, window)


def attend_rows(
    q_THD: Tensor, k_NGD: Tensor, v_NGD: Tensor, out_THD: Tensor, index: QueryIndex, scaling: float, window: int | None
) -> Tensor:
    """`flat_attention` without gradients, into the rows of `out_THD` [T, H, D] (contiguous) that belong to the index's sequences. Returns
    [2, H, T] what the backward needs of each query: its largest score and the factor that makes its weights' sum 1."""
    (T, H, D), G = q_THD.shape, k_NGD.shape[1]
    kept_2HT = torch.empty(2, H, T, dtype=torch.float32)
    run = native.function("attend_rows", q_THD.dtype, "pipipippppiiiiiifi")
    run(*_addresses(q_THD, k_NGD, v_NGD), out_THD.data_ptr(), kept_2HT.data_ptr(), index.sequence_S4.data_ptr(), index.key_K.data_ptr(),
        len(index.sequence_S4), index.longest, T, H, G, D, scaling, window or 0)  # fmt: skip
    return kept_2HT


class _FlatAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: FlatIndex, scaling: float, window: int | None) -> Tensor:
        q, k, v = _as_rows(q), _as_rows(k), _as_rows(v)
        out = torch.empty(q.shape, dtype=q.dtype)
        kept_2HT = attend_rows(q, k, v, out, index, scaling, window)
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
        shares = torch.empty(2, int(index.first_R1[-1]), G, D, dtype=torch.float32)
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
