"""LoRA on the experts of a layer: rows grouped by (adapter, expert).

A router sends each of T rows to k experts, which makes P = T·k pairs of a row and an expert. Pairs are put in the order of their experts,
and those of one expert stay in the order of their rows. Rows of one adapter stand together in a batch, so the pairs of one adapter and one
expert stand together too: a *piece*. An expert's matrix multiplies all its pairs at once, and an adapter's factors for that expert multiply
the piece. No sum W + BA is ever formed.

Dimensions: T rows, P pairs, E experts, I in, O out, R rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trimtab.ops.dropout import dropout

EXPERT_SITES = 2**20
"""More than there are sites in a model: for dropout, each expert of a site is a site of its own."""


class ExpertMatrices(Protocol):
    """The frozen matrices W [O, I] of E experts (`bases.weights.experts`)."""

    def outputs(self) -> int: ...
    def matmul(self, expert: int, x_RI: Tensor, out: Tensor) -> None: ...
    def matmul_t(self, expert: int, dy_RO: Tensor) -> Tensor: ...


class Piece(NamedTuple):
    """Pairs start..stop, which belong to one expert and to the rows of one span."""

    span: Any
    expert: int
    start: int
    stop: int


class Routes:
    """Which rows go to which experts. expert_TK: the numbers of the k experts of each row."""

    def __init__(self, expert_TK: Tensor, experts: int):
        self.top_k, self.pairs = expert_TK.shape[1], expert_TK.numel()
        expert_P, self.pair_P = expert_TK.reshape(-1).sort(stable=True)
        self.expert_P = expert_P
        ends = torch.bincount(expert_P, minlength=experts).cumsum(0).tolist()
        self.segments = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if b > a]

    @cached_property
    def row_P(self) -> Tensor:
        """The row of each pair."""
        return self.pair_P // self.top_k

    def gather(self, x_TI: Tensor) -> Tensor:
        """[P, I]: the row of each pair, in the order of experts; differentiable."""
        return x_TI[self.row_P]

    def scatter(self, y_PO: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, O]: the results of each row's pairs, weighted and added up in the order in which the router names the experts."""
        weighted = y_PO * weight_TK.reshape(-1)[self.pair_P][:, None]
        back = torch.empty_like(self.pair_P)
        back[self.pair_P] = torch.arange(self.pairs, device=back.device)
        return weighted[back].view(-1, self.top_k, y_PO.shape[1]).sum(1)

    def pieces(self, spans: Sequence[Any]) -> list[Piece]:
        """The pairs of these spans of rows, by expert; empty ones left out."""
        ordered_P = self.expert_P * self.pairs + self.pair_P
        wanted = [e * self.pairs + at * self.top_k for e, _, _ in self.segments for s in spans for at in (s.start, s.stop)]
        found = torch.searchsorted(ordered_P, torch.tensor(wanted, device=ordered_P.device)).tolist()
        places = zip(((s, e) for e, _, _ in self.segments for s in spans), found[::2], found[1::2], strict=True)
        return [Piece(s, e, a, b) for (s, e), a, b in places if b > a]


def experts_product(x_PI: Tensor, matrices: ExpertMatrices, routes: Routes, bias_EO: Tensor | None) -> Tensor:
    """y [P, O]: each pair's row times its expert's matrix, plus its bias. Differentiable in x."""
    y: Tensor = _Experts.apply(x_PI, matrices, routes, bias_EO, [], None)
    return y


def lora_experts(x_PI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) + (dropout(x) A_eᵀ) B_eᵀ for each piece; expert_A [n, R, I], expert_B [n, O, R] with the scaling folded in. place [E],
    where there is one: which of the n is an expert's, -1 for none. Each expert drops alike on its own: its number is in the mask's hash."""
    places = [p.tensors["place"].tolist() if "place" in p.tensors else None for p in packs.items]
    work = []
    for piece in base.routes.pieces(rows.spans):
        place = places[piece.span.slot]
        at = piece.expert if place is None else place[piece.expert]
        if at >= 0:
            work.append((piece, at))
    masks = _Masks(tuple(p.dropout for p in packs.items), rows, base.site, base.routes)
    factors = [t for p in packs.items for t in (p.tensors["expert_A"], p.tensors["expert_B"])]
    y: Tensor = _Experts.apply(x_PI, base.matrices, base.routes, base.bias_EO, work, masks, *factors)
    return y


@dataclass(frozen=True)
class _Masks:
    """Dropout of pieces: a rate for each slot, and the keys of the rows."""

    rates: tuple[float, ...]
    rows: Any
    site: int
    routes: Routes

    def of(self, piece: Piece, x_RI: Tensor) -> Tensor | None:
        """[pairs of the piece, I]: 0, or 1 / (1 - p); None where there is no dropout."""
        rate, keys_R = self.rates[piece.span.slot], self.rows.keys(piece.span)
        if not rate or keys_R is None:
            return None
        row_R = self.routes.row_P[piece.start : piece.stop] - piece.span.start
        return dropout(torch.ones_like(x_RI), rate, keys_R[row_R], self.site + (piece.expert + 1) * EXPERT_SITES)


class _Experts(torch.autograd.Function):
    """Products of pairs with frozen experts, and LoRA on some pieces: work is [(piece, its place in the factors)].

    Saved: x, factors, and the R-wide x Aᵀ of each piece. Dropout masks are computed again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_PI: Tensor,
        matrices: ExpertMatrices,
        routes: Routes,
        bias_EO: Tensor | None,
        work: Sequence[tuple[Piece, int]],
        masks: _Masks | None,
        *factors: Tensor,
    ) -> Tensor:
        y_PO = x_PI.new_empty(len(x_PI), matrices.outputs())
        for e, a, b in routes.segments:
            matrices.matmul(e, x_PI[a:b], y_PO[a:b])
            if bias_EO is not None:
                y_PO[a:b] += bias_EO[e]
        shrunk = []
        for piece, at in work:
            A_RI, B_OR = (factors[2 * piece.span.slot + i][at] for i in (0, 1))
            x = x_PI[piece.start : piece.stop]
            keep = masks.of(piece, x) if masks else None
            shrunk.append((x if keep is None else x * keep) @ A_RI.T)
            y_PO[piece.start : piece.stop].addmm_(shrunk[-1], B_OR.T)
        ctx.matrices, ctx.routes, ctx.work, ctx.masks = matrices, routes, work, masks
        ctx.save_for_backward(x_PI, *factors, *shrunk)
        return y_PO

    @staticmethod
    def backward(ctx: Any, dy_PO: Tensor) -> tuple:
        x_PI, *saved = ctx.saved_tensors
        cut = len(saved) - len(ctx.work)
        factors, shrunk = saved[:cut], saved[cut:]
        dx_PI = None
        if ctx.needs_input_grad[0]:
            dx_PI = torch.empty_like(x_PI)
            for e, a, b in ctx.routes.segments:
                dx_PI[a:b] = ctx.matrices.matmul_t(e, dy_PO[a:b])
        wanted = ctx.needs_input_grad[6:]
        grads = [torch.zeros_like(f) if want else None for f, want in zip(factors, wanted, strict=True)]
        for (piece, at), t_PR in zip(ctx.work, shrunk, strict=True):
            slot, part = 2 * piece.span.slot, slice(piece.start, piece.stop)
            keep = ctx.masks.of(piece, x_PI[part])
            A_RI, B_OR, dy = factors[slot][at], factors[slot + 1][at], dy_PO[part]
            dt = dy @ B_OR
            if dx_PI is not None:
                dx = dt @ A_RI
                dx_PI[part] += dx if keep is None else dx * keep
            dA, dB = grads[slot], grads[slot + 1]
            if dA is not None and dB is not None:
                x = x_PI[part]
                dA[at] += dt.T @ (x if keep is None else x * keep)
                dB[at] += (t_PR.T @ dy).T
        return dx_PI, None, None, None, None, None, *grads
