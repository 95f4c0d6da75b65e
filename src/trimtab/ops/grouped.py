"""LoRA of many adapters in few launches, on a GPU.

In training, by span, each adapter costs a site two products forward and four backward, and packing costs three launches for each pair of
factors and three for their gradients. Here the factors of one site are one tensor [n, R, I] and one [n, O, R], filled for all sites of a
step at once (`stack_factors`), and a product over all adapters is one call of `torch.nn.functional.grouped_mm`:

    y += (x Aᵀ) Bᵀ,   dt = dy B,   dx += dt A,   dA = dtᵀ x,   dB = dyᵀ t        each span with its own A and B

Ranks of like size share a tensor, padded with zeros; a much larger one has its own, so it costs the others nothing. `grouped_mm` is used
only after a comparison with plain products on the device, and only on the GPUs for which torch has a kernel: on others it waits for the
ends of the groups and multiplies one by one. Where it is not used, `edit` runs by span. At inference the factors are rows of an arena
(`forward.arena`), and a strided tensor of them takes the place of a stack.

Dimensions: n adapters, R rank, I in, O out; a row is a token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.moving import upload

log = logging.getLogger(__name__)
DTYPES, RANKS = (torch.bfloat16,), 8
"""What `grouped_mm` multiplies on a GPU: in bf16, rows of whole 16 bytes. So ranks are padded to multiples of RANKS."""
CAPABILITIES = (9, 10)
"""Major compute capabilities for which torch 2.10 to 2.13 have a kernel (Hopper and Blackwell of data centres)."""
MOST_GROUPS = 1023
TOGETHER = 4
"""Adapters share a tensor where the largest rank is at most so many times the smallest: padding costs less than more launches."""
FAR = 2e-2
"""How far results may differ from plain products, relative to the largest: a few roundings of bf16."""


@dataclass(frozen=True)
class Factors:
    """One adapter's factors at one site as they train, fp32: A [R, I], B [O, R]; the scaling that B is multiplied with, and the dtype in
    which the site computes."""

    A: Tensor
    B: Tensor
    scaling: float
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        """Padded."""
        return -(-self.A.shape[0] // RANKS) * RANKS


@dataclass(frozen=True)
class Stacked:
    """The factors of some slots of one site, padded to one rank: A [n, R, I], B [n, O, R]."""

    slots: tuple[int, ...]
    A: Tensor
    B: Tensor


def stack_factors(sites: Sequence[Sequence[Factors]]) -> list[list[Stacked]]:
    """The factors of each site, stacked by rank, cast and scaled; differentiable. All sites take a few launches together."""
    (dtype,) = {f.dtype for factors in sites for f in factors}
    classes = [(s, rank, slots) for s, factors in enumerate(sites) for rank, slots in _by_rank([f.rank for f in factors])]
    leaves = [t for s, _, slots in classes for i in slots for t in (sites[s][i].A, sites[s][i].B)]
    places = [Place(rank, [sites[s][i].scaling for i in slots]) for s, rank, slots in classes]
    tensors = iter(_Stack.apply(places, dtype, *leaves))
    found: list[list[Stacked]] = [[] for _ in sites]
    for s, _, slots in classes:
        found[s].append(Stacked(slots, next(tensors), next(tensors)))
    return found


def _by_rank(ranks: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """(padded rank, slots) of each stack, the largest ranks first."""
    found, left = [], set(range(len(ranks)))
    while left:
        largest = max(ranks[i] for i in left)
        slots = tuple(sorted(i for i in left if ranks[i] * TOGETHER >= largest))
        found.append((largest, slots))
        left -= set(slots)
    return found


@dataclass(frozen=True)
class Place:
    """One pair of stacked tensors: its padded rank, and the scalings of its adapters."""

    rank: int
    scalings: Sequence[float]


class _Stack(torch.autograd.Function):
    """Leaves A, B, A, B, … in fp32 -> for each place its stacked A and B. Both ways are copies between lists of tensors."""

    @staticmethod
    def forward(ctx: Any, places: Sequence[Place], dtype: torch.dtype, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.places, ctx.shapes = places, [t.shape for t in leaves]
        shapes, at = [], 0
        for p in places:
            n, A, B = len(p.scalings), leaves[2 * at], leaves[2 * at + 1]
            shapes += [(n, p.rank, A.shape[1]), (n, B.shape[0], p.rank)]
            at += n
        whole = torch.zeros(sum(int(np.prod(s)) for s in shapes), dtype=dtype, device=leaves[0].device)
        stacks = [part.view(shape) for part, shape in zip(whole.split([int(np.prod(s)) for s in shapes]), shapes, strict=True)]
        copy_lists(_parts(stacks, places, ctx.shapes), _scaled(list(leaves), places))
        return tuple(stacks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        parts = _parts(grads, ctx.places, ctx.shapes)
        found = [i for i, part in enumerate(parts) if part is not None]
        wide = [torch.empty(ctx.shapes[i], dtype=torch.float32, device=parts[i].device) for i in found]
        copy_lists(wide, [parts[i] for i in found])
        out: list[Tensor | None] = [None] * len(parts)
        for i, t in zip(found, wide, strict=True):
            out[i] = t
        return None, None, *_scaled(out, ctx.places)


def copy_lists(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies between lists. One tensor with gaps (the B of a padded rank) would make torch take all of a list one by one."""
    whole = [a.is_contiguous() and b.is_contiguous() for a, b in zip(targets, sources, strict=True)]
    for kind in (True, False):
        if mine := [i for i, w in enumerate(whole) if w is kind]:
            torch._foreach_copy_([targets[i] for i in mine], [sources[i] for i in mine])


def _parts(stacks: Sequence[Any], places: Sequence[Place], shapes: Sequence[torch.Size]) -> list[Any]:
    """The part of each leaf in its stack, in the order of the leaves."""
    parts: list[Any] = []
    for p, A, B in zip(places, stacks[::2], stacks[1::2], strict=True):
        for i in range(len(p.scalings)):
            rank = shapes[len(parts)][0]
            parts += [None if A is None else A[i, :rank], None if B is None else B[i, :, :rank]]
    return parts


def _scaled(leaves: list[Any], places: Sequence[Place]) -> list[Any]:
    """The leaves, or their gradients, with the scaling of each B."""
    scalings = [s for p in places for s in p.scalings]
    which = [i for i, s in enumerate(scalings) if s != 1.0 and leaves[2 * i + 1] is not None]
    if which:
        for i, t in zip(which, torch._foreach_mul([leaves[2 * i + 1] for i in which], [scalings[i] for i in which]), strict=True):
            leaves[2 * i + 1] = t
    return leaves


@dataclass(frozen=True)
class GroupedRows:
    """The rows of some slots. where: their rows, a slice where they follow each other. end_N: int32, where each slot's rows end."""

    where: slice | Tensor
    end_N: Tensor


def grouped_rows(spans: Sequence[Any], slots: Sequence[int], device: torch.device) -> GroupedRows:
    """The rows of `slots`, in their order; one that has none, or is -1, is an empty group. spans: as in `methods.base.Rows`."""
    mine: dict[int, list[Any]] = {}
    for s in spans:
        mine.setdefault(s.slot, []).append(s)
    own = [s for i in slots for s in mine.get(i, ())]
    ends = np.array(list(accumulate(sum(s.stop - s.start for s in mine.get(i, ())) for i in slots)), dtype=np.int32)
    if all(a.stop == b.start for a, b in pairwise(own)):
        first, last = (own[0].start, own[-1].stop) if own else (0, 0)
        return GroupedRows(slice(first, last), upload([ends], device)[0])
    index, end_N = upload([np.concatenate([np.arange(s.start, s.stop) for s in own]), ends], device)
    return GroupedRows(index, end_N)


def add_lora(x_TI: Tensor, y_TO: Tensor, A_NRI: Tensor, B_NOR: Tensor, rows: GroupedRows) -> Tensor:
    """y += (x Aᵀ) Bᵀ in place on these rows, each group with its own A and B; returns x Aᵀ."""
    shrunk = F.grouped_mm(x_TI[rows.where], A_NRI.transpose(-2, -1), offs=rows.end_N)
    _add_to(y_TO, rows.where, F.grouped_mm(shrunk, B_NOR.transpose(-2, -1), offs=rows.end_N))
    return shrunk


class GroupedLora(torch.autograd.Function):
    """y + (x Aᵀ) Bᵀ, y = base(x). If y is None the frozen layer runs in here, so that its share of dx needs no buffer of its own. Else y is
    added to in place, and is the first argument for that (see `edit._LoraSpans`)."""

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor | None, x_TI: Tensor, base: Any, rows: Sequence[GroupedRows], *stacks: Tensor) -> Tensor:
        ctx.base, ctx.rows = base if y_TO is None else None, rows
        if y_TO is None:
            y_TO = base(x_TI)
        else:
            ctx.mark_dirty(y_TO)
        shrunk = [add_lora(x_TI, y_TO, A, B, r) for r, A, B in zip(rows, stacks[::2], stacks[1::2], strict=True)]
        ctx.save_for_backward(x_TI, *stacks, *shrunk)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple:
        x_TI, *saved = ctx.saved_tensors
        n = len(ctx.rows)
        dx_TI = None
        if ctx.needs_input_grad[1]:
            dx_TI = torch.zeros_like(x_TI) if ctx.base is None else ctx.base.matrix.matmul_t(dy_TO)
        grads: list[Tensor | None] = []
        for r, A, B, t in zip(ctx.rows, saved[: 2 * n : 2], saved[1 : 2 * n : 2], saved[2 * n :], strict=True):
            dy = dy_TO[r.where]
            dt = F.grouped_mm(dy, B, offs=r.end_N)
            if dx_TI is not None:
                _add_to(dx_TI, r.where, F.grouped_mm(dt, A, offs=r.end_N))
            grads += [F.grouped_mm(dt.T, x_TI[r.where], offs=r.end_N), F.grouped_mm(dy.T, t, offs=r.end_N)]
        return dy_TO if ctx.base is None else None, dx_TI, None, None, *grads


def _add_to(y_TO: Tensor, where: slice | Tensor, part: Tensor) -> None:
    if isinstance(where, slice):
        y_TO[where].add_(part)  # `+=` would write the view back, which is a copy
    else:
        y_TO.index_add_(0, where, part)


def trains_grouped(A_RI: Tensor, B_OR: Tensor, dtype: torch.dtype) -> bool:
    """Whether these factors, which want gradients, run through `grouped_mm` at a site that computes in `dtype`."""
    return torch.is_grad_enabled() and takes_grouped(A_RI, B_OR, dtype)


def takes_grouped(A_RI: Tensor, B_OR: Tensor, dtype: torch.dtype) -> bool:
    """Whether factors of these shapes run through `grouped_mm`, their rank padded to a multiple of RANKS."""
    if A_RI.device.type != "cuda" or dtype not in DTYPES or A_RI.shape[-1] % RANKS or B_OR.shape[-2] % RANKS:
        return False
    return _trusted(A_RI.device, dtype)


@cache
def _trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` agrees with plain products there, in the forms that are used: with a group that is empty, with spans of any
    length, with factors that lie apart."""
    generator, ends = torch.Generator().manual_seed(0), [23, 23, 64]
    x, A, dt = (torch.randn(s, generator=generator, dtype=torch.float32).to(device, dtype) for s in ((64, 48), (3, 16, 48), (64, 16)))
    end_N = torch.tensor(ends, dtype=torch.int32).to(device)
    spans = list(zip([0, *ends], ends, range(3), strict=False))
    apart = torch.cat([A, A], dim=1)[:, :16]
    try:
        if device.type == "cuda" and (major := torch.cuda.get_device_capability(device)[0]) not in CAPABILITIES:
            raise NotImplementedError(f"torch has no kernel for compute capability {major}")
        pairs = [
            *(
                (F.grouped_mm(x, factors.transpose(-2, -1), offs=end_N), torch.cat([x[a:b].float() @ A[i].float().T for a, b, i in spans]))
                for factors in (A, apart)
            ),
            (F.grouped_mm(dt, A, offs=end_N), torch.cat([dt[a:b].float() @ A[i].float() for a, b, i in spans])),
            (F.grouped_mm(dt.T, x, offs=end_N), torch.stack([dt[a:b].float().T @ x[a:b].float() for a, b, _ in spans])),
            (F.grouped_mm(x.T, dt, offs=end_N), torch.stack([x[a:b].float().T @ dt[a:b].float() for a, b, _ in spans])),
        ]
        for got, want in pairs:
            off = float((got.float() - want).abs().max() / want.abs().max())
            if not off <= FAR:  # NaN too
                raise ArithmeticError(f"its result is off by {off:.2g}")
    except Exception as error:  # whatever goes wrong in there, there is another way to compute it
        log.warning("LoRA on %s runs adapter by adapter: grouped_mm: %s: %s", device, type(error).__name__, error)
        return False
    return True
