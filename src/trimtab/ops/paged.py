"""Attention over a KV cache by torch's kernel for sequences of varying length, which reads blocks ("pages") by a table, on a GPU.

As `varlen`, it is used only after a comparison with `attend`'s formula, for each device, dtype, shape of heads and size of pages. Flash
Attention 2 takes pages of a multiple of 256 tokens only. One long sequence is not split among several parts of the GPU (`num_splits=1`):
torch's kernel gives wrong results if it is (pytorch issue 194167), and a row's sums would depend on the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from trimtab.ops import varlen
from trimtab.ops.attend import attention
from trimtab.ops.moving import upload

PAGE_SIZES = (16, 256)
"""Tokens of the pages with which it is tried, smaller ones first."""
FAR = 700
"""Tokens of the longest sequence in the comparison: several blocks of the kernel."""


@dataclass(frozen=True)
class PagedIndex(varlen.Ends):
    """Sequences over a cache. length_N: the tokens of each that the cache holds. table_NP: int32, the pages that hold them."""

    length_N: Tensor
    table_NP: Tensor


def paged_index(sequences: Sequence[tuple[int, int, Sequence[int]]], device: torch.device) -> PagedIndex:
    """sequences: (queries, tokens in the cache with theirs, pages), in the order of the rows, together all rows."""
    queries, lengths = (np.array([s[i] for s in sequences], dtype=np.int32) for i in (0, 1))
    table = np.zeros((len(sequences), max(len(pages) for _, _, pages in sequences)), dtype=np.int32)
    for line, (_, _, pages) in zip(table, sequences, strict=True):
        line[: len(pages)] = pages
    ends = [np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (queries, lengths)]
    end_q, end_k, length_N, table_NP = upload([*ends, lengths, table], device)
    return PagedIndex(end_q, end_k, int(queries.max()), int(lengths.max()), length_N, table_NP)


def paged_attention(
    q_THD: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    page: int,
    index: PagedIndex,
    scaling: float,
    window: int | None,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """softmax(scaling · q kᵀ) v of each sequence, causal, its queries at the end of its tokens; [T, H, D]. k_pool, v_pool: the rows of the
    cache, of which each `page` are a page. kernel: torch's `varlen_attn`, or what has its signature."""
    k, v = (x.view(-1, page, *x.shape[1:]) for x in (k_pool, v_pool))
    pages = {"seqused_k": index.length_N, "block_table": index.table_NP, "num_splits": 1}
    return varlen.call(kernel, q_THD, k, v, index, scaling, window, **pages)


def paged_kernel(q_THD: Tensor, k_pool: Tensor, page: int) -> Callable[..., Tensor] | None:
    """The kernel, where it may be used for rows like these over pages of this size; else None."""
    if torch.is_grad_enabled() or page not in PAGE_SIZES:
        return None
    return _kernel(q_THD.device, q_THD.dtype, q_THD.shape[-1], q_THD.shape[1] // k_pool.shape[1], page)


def page_size(device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int) -> int:
    """Tokens of a page for a cache there: the smallest size with which the kernel is used, and the smallest of all where it is not.
    repeat: query heads that share a key head."""
    found = (page for page in PAGE_SIZES if _kernel(device, dtype, head_dim, repeat, page) is not None)
    return next(found, PAGE_SIZES[0])


def _kernel(device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int, page: int) -> Callable[..., Tensor] | None:
    if device.type not in varlen.DEVICES or dtype not in varlen.DTYPES:
        return None
    return _trusted(device, dtype, head_dim, repeat, page)[0]


def verdict(device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int) -> str:
    """In words, with which pages the kernel is used there, and why not with others."""
    return "; ".join(_trusted(device, dtype, head_dim, repeat, page)[1] for page in PAGE_SIZES)


@cache
def _trusted(device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int, page: int) -> varlen.Verdict:
    what = f"attention over pages of {page} on {device} in {str(dtype).removeprefix('torch.')}, heads of {head_dim}, {repeat} to a key"
    return varlen.verified(what, partial(_compare, device, dtype, head_dim, repeat, page), (None, 20), logging.INFO)


@torch.no_grad()
def _compare(
    device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int, page: int, kernel: Callable[..., Tensor], window: int | None
) -> None:
    """ArithmeticError where the kernel's output is not the formula's. Some sequences decode, others bring several rows; some have a few
    tokens, others several pages, which are in no order."""
    heads, shapes = 2, ((1, 1), (1, FAR), (5, 5), (1, page), (40, page + 41), (1, page + 1), (3, FAR // 2))
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // page) for _, length in shapes]
    order = torch.randperm(sum(counts), generator=generator).tolist()
    pages = [order[sum(counts[:i]) :][:n] for i, n in enumerate(counts)]
    index = paged_index([(n, length, mine) for (n, length), mine in zip(shapes, pages, strict=True)], device)
    rows = sum(n for n, _ in shapes)
    sizes = [(rows, heads * repeat, head_dim), *[(len(order) * page, heads, head_dim)] * 2]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float32).to(device, dtype) for s in sizes)
    scaling, at, each = head_dim**-0.5, 0, []
    got = paged_attention(q, k, v, page, index, scaling, window, kernel)
    for (n, length), mine in zip(shapes, pages, strict=True):
        keys, values = (torch.cat([x[p * page : (p + 1) * page] for p in mine])[None, :length].float() for x in (k, v))
        each.append(attention(q[None, at : at + n].float(), keys, values, length - n, None, scaling, None, window)[0])
        at += n
    varlen.check_equal("the output", got, torch.cat(each), window)
