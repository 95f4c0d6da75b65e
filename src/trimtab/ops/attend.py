"""The attention kernel: padded sequences of one bucket, with grouped heads, offsets, windows, soft caps and masks.

Dimensions: B sequences, Q queries, S keys, H query heads, G key heads, D head size; x stands for B·G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

QUERY_BLOCK = 128
"""Queries of one block of the attention's score matrix: bounds memory, and lets causality skip the keys after a block."""


def attention(
    q_BQHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    offset: int,
    mask_BQS: Tensor | None,
    scaling: float,
    softcap: float | None,
    window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(cap(scaling · q kᵀ) + mask) v for B padded sequences with H query heads over G key heads; returns [B, Q, H, D].

    Key j lies at query i's own place where j = i + offset; later keys are never read. window: keys at distance ≥ window are never read
    either. mask_BQS: False where a key must not be read (padding, gaps); None where offset and window say all; it holds the window too.
    softcap c: c · tanh(x / c). sinks_H: a score for each head, which takes its part of the softmax and reads no value (gpt-oss).

    Scores are held in the inputs' dtype, and the softmax computes in fp32 inside, as a kernel of one pass: on a CPU fp32 copies of bf16
    scores cost ten times the matmuls. The backward forms the scores again, so memory is linear in the length.
    """
    return _Attention.apply(q_BQHD, k_BSGD, v_BSGD, offset, mask_BQS, scaling, softcap, window, sinks_H)


def _blocks(Q: int, S: int, offset: int, window: int | None) -> list[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of each block, keys that no query of the block may read left out."""
    blocks = []
    for i in range(0, Q, QUERY_BLOCK):
        j = min(i + QUERY_BLOCK, Q)
        blocks.append((i, j, 0 if window is None else max(0, i + offset - window + 1), min(S, j + offset)))
    return blocks


def _forbidden(block: tuple[int, int, int, int], offset: int, mask_BQS: Tensor | None, window: int | None, like: Tensor) -> Tensor | None:
    """What is added to a block's scores, [B or 1, q, s] in their dtype: 0, or the lowest number where a key must not be read."""
    i, j, a, b = block
    if mask_BQS is not None:
        allowed = mask_BQS[:, i:j, a:b]
    elif j - i == 1 and (window is None or b - a <= window):
        return None
    else:
        distance = torch.arange(i, j, device=like.device)[:, None] + offset - torch.arange(a, b, device=like.device)
        allowed = ((distance >= 0) if window is None else (distance >= 0) & (distance < window))[None]
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, torch.finfo(like.dtype).min)


class _Scores:
    """One block's probabilities [B·G, (H/G)·q, s], formed alike in the forward and in the backward."""

    def __init__(
        self, q_x: Tensor, k_x: Tensor, added: Tensor | None, heads: tuple[int, int], softcap: float | None, sinks_H: Tensor | None
    ):
        G, repeat = heads
        if added is not None:
            B, q, s = added.shape  # the same for all heads: repeated over H/G in the rows, over G in the batch
            added = added.repeat(1, repeat, 1) if B == 1 else added[:, None].expand(B, G, q, s).repeat(1, 1, repeat, 1).flatten(0, 1)
        self.slope: Tensor | None = None
        if softcap is None:
            scores = torch.bmm(q_x, k_x.transpose(1, 2)) if added is None else torch.baddbmm(added, q_x, k_x.transpose(1, 2))
        else:
            t = torch.tanh(torch.bmm(q_x, k_x.transpose(1, 2)) / softcap)
            scores, self.slope = t * softcap, 1.0 - t * t
            if added is not None:
                scores += added
        if sinks_H is None:
            self.p = torch.softmax(scores, dim=-1)
        else:  # a head's sink stands behind its scores, in every row of the head
            sink_x = sinks_H.to(scores.dtype).view(G, repeat, 1, 1).expand(-1, -1, scores.shape[1] // repeat, 1).reshape(G, -1, 1)
            self.p = torch.softmax(torch.cat([scores, sink_x.repeat(len(scores) // G, 1, 1)], -1), dim=-1)[..., :-1]

    def backward(self, dp: Tensor) -> Tensor:
        """The gradient of the scores before the cap, from that of the probabilities."""
        ds = torch._softmax_backward_data(dp, self.p, -1, self.p.dtype)
        return ds if self.slope is None else ds.mul_(self.slope)


class _Attention(torch.autograd.Function):
    """Layouts inside: queries [B·G, (H/G)·q, D], so that the query heads that share keys share one matmul."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offset: int,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        B, Q, H, _ = q.shape
        G, S = k.shape[2], k.shape[1]
        k_x, v_x = _keys(k), _keys(v)
        out = torch.empty(B, Q, H, v.shape[-1], dtype=v.dtype, device=v.device)
        for block in _blocks(Q, S, offset, window):
            i, j, a, b = block
            added = _forbidden(block, offset, mask, window, q)
            scores = _Scores(_queries(q[:, i:j] * scaling, G), k_x[:, a:b], added, (G, H // G), softcap, sinks)
            out[:, i:j] = _unqueries(torch.bmm(scores.p, v_x[:, a:b]), B, H)
        ctx.save_for_backward(q, k, v, mask, sinks)
        ctx.config = (offset, scaling, softcap, window)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        q, k, v, mask, sinks = ctx.saved_tensors
        offset, scaling, softcap, window = ctx.config
        B, Q, H, _ = q.shape
        G, S = k.shape[2], k.shape[1]
        k_x, v_x = _keys(k), _keys(v)
        blocks = _blocks(Q, S, offset, window)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k_x), torch.zeros_like(v_x)
        d_sinks = torch.zeros(H, dtype=torch.float32, device=q.device) if ctx.needs_input_grad[8] else None
        for block in blocks:
            i, j, a, b = block
            q_x, do_x = _queries(q[:, i:j] * scaling, G), _queries(d_out[:, i:j], G)
            scores = _Scores(q_x, k_x[:, a:b], _forbidden(block, offset, mask, window, q), (G, H // G), softcap, sinks)
            dp = torch.bmm(do_x, v_x[:, a:b].transpose(1, 2))
            if d_sinks is not None:  # ∂ of the sink's own score: −p_sink · Σ p dp
                of_rows = (scores.p.float().sum(-1) - 1) * (scores.p.float() * dp).sum(-1)
                d_sinks += of_rows.view(B, H, -1).sum((0, 2))
            ds = scores.backward(dp)
            dq[:, i:j] = _unqueries(torch.bmm(ds, k_x[:, a:b]), B, H).mul_(scaling)
            dk[:, a:b].baddbmm_(ds.transpose(1, 2), q_x)
            dv[:, a:b].baddbmm_(scores.p.transpose(1, 2), do_x)
        return dq, _unkeys(dk, B), _unkeys(dv, B), None, None, None, None, None, d_sinks


def _keys(k_BSGD: Tensor) -> Tensor:
    B, S, G, D = k_BSGD.shape
    return k_BSGD.transpose(1, 2).reshape(B * G, S, D)


def _unkeys(k_xSD: Tensor, B: int) -> Tensor:
    return k_xSD.view(B, -1, *k_xSD.shape[1:]).transpose(1, 2)


def _queries(q_BqHD: Tensor, G: int) -> Tensor:
    B, q, H, D = q_BqHD.shape
    return q_BqHD.view(B, q, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(B * G, H // G * q, D)


def _unqueries(x: Tensor, B: int, H: int) -> Tensor:
    """[B·G, (H/G)·q, D] -> [B, q, H, D]"""
    return x.view(B, H, -1, x.shape[-1]).transpose(1, 2)
