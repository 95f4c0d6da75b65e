"""Attention of flat rows by torch's kernel for sequences of varying length (Flash Attention, Dao 2023, arXiv:2307.08691), on a GPU.

It is chosen by the signature of torch's function (torch 2.10 and later), and used only after a comparison. Before the first use with a
device, dtype and shape of heads, a few random sequences run through it and through `attend`'s formula, forwards and backwards, with and
without a window; some have keys before their queries. If the two differ, or anything is raised, it is not used there, and `verdict` says
why. Its backward adds in no fixed order, so runs on a GPU are repeatable up to rounding only. Plans and prefixes are not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.attend import attention
from trimtab.ops.moving import upload
from trimtab.ops.native_attention import Sequences

log = logging.getLogger(__name__)

Verdict = tuple[Callable[..., Tensor] | None, str]

DEVICES, DTYPES = ("cuda",), (torch.bfloat16, torch.float16)
"""Where the kernel runs; elsewhere nothing is tried."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far results may differ from the formula in fp32, relative to the largest: a few roundings of the dtype."""
SEQUENCES = ((0, 1), (0, 5), (3, 4), (7, 1), (7, 40), (0, 150))
"""What is compared: (keys before the first query, queries) of each sequence; the keys before are shared, as a prefix's are."""


@dataclass(frozen=True)
class Ends:
    """Sequences of flat rows, in the order of their rows. end_q, end_k: [N + 1] int32, where each one's queries and keys begin and end,
    side by side."""

    end_q: Tensor
    end_k: Tensor
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class VarlenIndex(Ends):
    """key_S: the pool's rows that are the keys, sequence by sequence; None where these are all rows, each its own key."""

    key_S: Tensor | None


def varlen_index(runs: Sequences, device: torch.device) -> VarlenIndex:
    """runs: together all rows, in order."""
    queries = np.array([stop - start for start, stop, _ in runs])
    keys = [np.concatenate([np.arange(a, b) for a, b in ranges]) for _, _, ranges in runs]
    lengths = np.array([len(k) for k in keys])
    assert [start for start, _, _ in runs] == np.cumsum([0, *queries[:-1]]).tolist(), "runs of rows must follow each other"
    same = all(list(ranges) == [(start, stop)] for start, stop, ranges in runs)
    ends = [np.cumsum([0, *n]).astype(np.int32) for n in (queries, lengths)]
    end_q, end_k, *key_S = upload([*ends, *([] if same else [np.concatenate(keys)])], device)
    return VarlenIndex(end_q, end_k, int(queries.max()), int(lengths.max()), key_S[0] if key_S else None)


def varlen_attention(
    q_THD: Tensor, k_pool: Tensor, v_pool: Tensor, index: VarlenIndex, scaling: float, window: int | None, kernel: Callable[..., Tensor]
) -> Tensor:
    """softmax(scaling · q kᵀ) v of each sequence, causal, its queries at the end of its keys; [T, H, D]. window: keys at distance ≥ window
    are not read. kernel: torch's `varlen_attn`, or what has its signature."""
    k, v = (x[: len(q_THD)] if index.key_S is None else x.index_select(0, index.key_S) for x in (k_pool, v_pool))
    return call(kernel, q_THD, k.contiguous(), v.contiguous(), index, scaling, window)


def call(
    kernel: Callable[..., Tensor], q_THD: Tensor, k: Tensor, v: Tensor, index: Ends, scaling: float, window: int | None, **pages: Any
) -> Tensor:
    """The kernel's call. k, v: [..., H, D]. pages: what it is told of a paged cache."""
    return kernel(
        q_THD.contiguous(),
        k,
        v,
        index.end_q,
        index.end_k,
        index.longest_q,
        index.longest_k,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # the kernel counts keys before a query's own, and 0 after it: causal
        enable_gqa=q_THD.shape[1] != k.shape[-2],
        **pages,
    )


def varlen_kernel(q_THD: Tensor, k_THD: Tensor) -> Callable[..., Tensor] | None:
    """The kernel, where it may be used for rows like these; else None. The first call for a device, dtype and shape of heads compares."""
    if q_THD.device.type not in DEVICES or q_THD.dtype not in DTYPES:
        return None
    return _trusted(q_THD.device, q_THD.dtype, q_THD.shape[-1], q_THD.shape[1] // k_THD.shape[1])[0]


def verdict(device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int) -> str:
    """In words, whether the kernel is used there, and why not. repeat: query heads that share a key head."""
    return _trusted(device, dtype, head_dim, repeat)[1]


def find() -> Callable[..., Any]:
    """torch's kernel. ImportError before torch 2.10."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def verified(what: str, compare: Callable[[Callable[..., Tensor], int | None], None], windows: Sequence[int | None], level: int) -> Verdict:
    """torch's kernel, if `compare` raises nothing for it with any of these windows, else None; and in words what was found, which is
    logged. level: of the line that says that it is not used."""
    try:
        kernel = find()
        with torch.inference_mode(False):  # a first use may be in that mode, in which nothing has gradients
            for window in windows:
                compare(kernel, window)
    except Exception as error:  # whatever goes wrong in there, there is another way to compute it
        said = str(error).strip().splitlines()
        text = f"{what}: batched matmuls ({type(error).__name__}: {said[0][:160] if said else ''})"
        log.log(level, "%s", text)
        return None, text
    text = f"{what}: torch's varlen kernel"
    log.info("%s", text)
    return kernel, text


def check_equal(name: str, ours: Tensor, exact: Tensor, window: int | None) -> None:
    """ArithmeticError where the kernel's result differs from the formula's in fp32."""
    off = float((ours.float() - exact).abs().max() / exact.abs().max())
    if not off <= TOLERANCE[ours.dtype]:  # NaN too
        raise ArithmeticError(f"{name} is off by {off:.2g}{'' if window is None else ' with a window'}")


@cache
def _trusted(device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int) -> Verdict:
    what = f"attention on {device} in {str(dtype).removeprefix('torch.')}, heads of {head_dim}, {repeat} to a key"
    return verified(what, partial(_compare, device, dtype, head_dim, repeat), (None, 4), logging.WARNING)


def _compare(
    device: torch.device, dtype: torch.dtype, head_dim: int, repeat: int, kernel: Callable[..., Tensor], window: int | None
) -> None:
    """ArithmeticError where the kernel's output or a gradient is not the formula's."""
    heads, rows, stored = 2, sum(n for _, n in SEQUENCES), max(p for p, _ in SEQUENCES)
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads * repeat, head_dim), *[(rows + stored, heads, head_dim)] * 2, (rows, heads * repeat, head_dim)]
    q, k, v, d_out = (torch.randn(s, generator=generator, dtype=torch.float32).to(device, dtype) for s in shapes)
    runs, at = list[tuple[int, int, list[tuple[int, int]]]](), 0
    for before, n in SEQUENCES:
        runs.append((at, at + n, [*([(rows, rows + before)] if before else []), (at, at + n)]))
        at += n
    index, scaling = varlen_index(runs, device), head_dim**-0.5

    def through_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, index, scaling, window, kernel)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = []
        for (a, b, ranges), (before, _) in zip(runs, SEQUENCES, strict=True):
            keys, values = (torch.cat([x[i:j] for i, j in ranges])[None] for x in (k, v))
            each.append(attention(q[None, a:b], keys, values, before, None, scaling, None, window)[0])
        return torch.cat(each)

    # Hooks that do nothing: those of whoever runs this forward must not count what is saved here.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        results = []
        for run, kind in ((through_kernel, dtype), (formula, torch.float32)):
            leaves = [x.to(kind).detach().requires_grad_() for x in (q, k, v)]
            out = run(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, d_out.to(kind))])
    for name, ours, exact in zip(("the output", "dQ", "dK", "dV"), *results, strict=True):
        check_equal(name, ours, exact, window)
