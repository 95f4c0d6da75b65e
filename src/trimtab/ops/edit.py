"""Kernels of edits: what LoRA, DoRA, IA³, bottleneck adapters and modules trained in full do to the rows of their spans.

A kernel gets all T rows of a flat batch, the base's module, the packed edits of the adapters present, and the spans of rows that each
changes. It knows no rank, no alpha and no method's name. There are two ways of running the same formula:

- by span: one pair of matmuls for each adapter's rows. This is differentiable; training and prefill use it.
- gathered: each row gathers its adapter's tensors, and all rows run in one `bmm`. Decoding of many short spans uses it (no gradients).

LoRA on a GPU has a third way, products grouped by adapter (`grouped`).

Dimensions: T rows, I in, O out, R rank or bottleneck, S adapters ("slots") of this batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops import native, native_inference, native_training
from trimtab.ops.dropout import dropout
from trimtab.ops.grouped import GroupedLora, add_lora
from trimtab.ops.names import NON_LINEARITIES

GATHER_ROWS_PER_SPAN = 4
"""Gather instead of looping where spans are this short on average: one bmm then beats many tiny matmuls."""


def add_noise(x_TH: Tensor, noise: Sequence[tuple[int, int, int, float]]) -> Tensor:
    """Add to rows a..b what a generator of that seed draws uniformly in ±bound, for each (a, b, seed, bound)."""
    if not noise:
        return x_TH
    added_TH = torch.zeros_like(x_TH)
    for a, b, seed, bound in noise:
        added_TH[a:b].uniform_(-bound, bound, generator=torch.Generator(x_TH.device).manual_seed(seed))
    return x_TH + added_TH


def gathers(rows: Any, packs: Any) -> bool:
    """Whether to run gathered: no gradients wanted, several spans in each part that is gathered, all short."""
    return (
        not torch.is_grad_enabled()
        and len(rows.spans) > max(1, 2 * len(packs.tables))
        and sum(s.stop - s.start for s in rows.spans) <= GATHER_ROWS_PER_SPAN * len(rows.spans)
    )


def by_span(y: Tensor, rows: Any, edit: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """y with the rows of each span replaced by edit(span, those rows); differentiable, y itself is left as it is.

    y is cut into all its parts at once: the backward puts their gradients together in one pass, where slices would add up as many tensors
    of the size of y.
    """
    if len(rows.spans) == 1 and rows.spans[0].stop - rows.spans[0].start == rows.total:
        return edit(rows.spans[0], y)
    cuts = [0, *(at for s in rows.spans for at in (s.start, s.stop)), rows.total]
    parts = list(y.split([b - a for a, b in pairwise(cuts)]))
    for i, span in enumerate(rows.spans):
        parts[2 * i + 1] = edit(span, parts[2 * i + 1])
    return torch.cat(parts)


# ---- LoRA ----


def lora(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) + (x Aᵀ) Bᵀ on each span; A [R, I], B [O, R] with the scaling folded in. The product BA is never formed."""
    if native.available(x_TI):
        return _lora_native(x_TI, base(x_TI), packs, rows)
    if not torch.is_grad_enabled() and len(rows.spans) > max(1, 2 * len(packs.tables)) and (found := packs.in_groups) is not None:
        y_TO = base(x_TI)
        for A_NRI, B_NOR, slots in found:
            add_lora(x_TI, y_TO, A_NRI, B_NOR, rows.of_slots(slots))
        return y_TO
    if gathers(rows, packs):
        y_TO = base(x_TI)
        for stacked, where, slots in packs.gathered(rows):
            shrunk = torch.bmm(stacked("A")[slots], x_TI[where].unsqueeze(-1))
            y_TO[where] += torch.bmm(stacked("B")[slots], shrunk).squeeze(-1)
        return y_TO
    factors = [t for p in packs.items for t in (p.tensors["A"], p.tensors["B"])]
    return _LoraSpans.apply(None if base.plain else base(x_TI), x_TI, base, rows, tuple(p.dropout for p in packs.items), *factors)


def lora_grouped(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """`lora` without dropout, with gradients: all adapters of a padded rank in one product each way (`ops.grouped`)."""
    stacks = [t for s in packs.grouped for t in (s.A, s.B)]
    where = [rows.of_slots(s.slots) for s in packs.grouped]
    return GroupedLora.apply(None if base.plain else base(x_TI), x_TI, base, where, *stacks)


def _lora_native(x_TI: Tensor, y_TO: Tensor, packs: Any, rows: Any) -> Tensor:
    """Short spans in one call, long ones in a call each, or as matmuls where there are no tiles; y is added to in place."""
    slot_T, long = rows.by_row
    if slot_T is not None:
        native_inference.lora(x_TI, y_TO, slot_T, packs.lora_parts)
    for span in long:
        if native_inference.runs_on_tiles(x_TI):
            native_inference.lora(x_TI[span.start : span.stop], y_TO[span.start : span.stop], _slot_of(span), packs.lora_parts)
            continue
        tensors = packs.items[span.slot].tensors
        y_TO[span.start : span.stop].addmm_(x_TI[span.start : span.stop] @ tensors["A"].T, tensors["B"].T)
    return y_TO


def _slot_of(span: Any) -> Tensor:
    """The slot of each row of one span."""
    return torch.full((span.stop - span.start,), span.slot, dtype=torch.int32)


class _LoraSpans(torch.autograd.Function):
    """LoRA on a frozen linear layer. If y is None the layer itself runs in here, so that the backward forms dX = dY W + (dY B) A in one
    buffer. If there are other edits in between, y is their result and is added to in place. y is the first argument, because autograd takes
    the first for what is written in place where that is a view.

    Saved: x, A, B and the R-wide x Aᵀ. Dropout masks are drawn again in the backward. W's gradient is never formed.
    """

    @staticmethod
    def forward(ctx: Any, y_TO: Tensor | None, x_TI: Tensor, base: Any, rows: Any, dropouts: Sequence[float], *factors: Tensor) -> Tensor:
        ctx.base = base if y_TO is None else None
        if y_TO is None:
            y_TO = base(x_TI)
        else:
            ctx.mark_dirty(y_TO)
        shrunk = []
        for span in rows.spans:
            A, B, y = factors[2 * span.slot], factors[2 * span.slot + 1], y_TO[span.start : span.stop]
            x = dropout(x_TI[span.start : span.stop], dropouts[span.slot], rows.keys(span), base.site)
            if native_training.takes_lora(x, y, A, B):
                shrunk.append(native_training.lora(x, A, B, y))
            else:
                shrunk.append(x @ A.T)
                y.addmm_(shrunk[-1], B.T)
        ctx.rows, ctx.dropouts, ctx.site = rows, dropouts, base.site
        ctx.save_for_backward(x_TI, *factors, *shrunk)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple:
        x_TI, *saved = ctx.saved_tensors
        factors, shrunk = saved[: -len(ctx.rows.spans)], saved[-len(ctx.rows.spans) :]
        grads: list[Tensor | None] = [None] * len(factors)
        dx_TI = None
        if ctx.needs_input_grad[1]:
            dx_TI = x_TI.new_zeros(x_TI.shape) if ctx.base is None else ctx.base.matrix.matmul_t(dy_TO)
        for span, t_R in zip(ctx.rows.spans, shrunk, strict=True):
            a, p, part = 2 * span.slot, ctx.dropouts[span.slot], slice(span.start, span.stop)
            x, to = x_TI[part], None if dx_TI is None else dx_TI[part]
            keys_R = ctx.rows.keys(span)
            keep = dropout(torch.ones_like(x), p, keys_R, ctx.site) if p and keys_R is not None else None
            dx = to if keep is None or to is None else torch.zeros_like(to)
            x = x if keep is None else x * keep
            made = _LoraSpans._of_span(dy_TO[part], x, t_R, factors[a], factors[a + 1], dx, ctx.needs_input_grad[5 + a])
            if made is not None:
                grads[a], grads[a + 1] = _add(grads[a], made[0]), _add(grads[a + 1], made[1])
            if keep is not None and dx is not None and to is not None:
                to += dx.mul_(keep)
        return dy_TO if ctx.base is None else None, dx_TI, None, None, None, *grads

    @staticmethod
    def _of_span(
        dy: Tensor, x: Tensor, t_R: Tensor, A: Tensor, B: Tensor, dx: Tensor | None, factors: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The gradients of A and B if `factors`; (dy B) A is added to dx in place where it is given."""
        if native_training.takes_lora(x, dy, A, B):
            return native_training.lora_backward(dy, x, t_R, A, B, dx, factors=factors)
        dt = dy @ B
        if dx is not None:
            dx.addmm_(dt, A)
        return (dt.T @ x, (t_R.T @ dy).T) if factors else None  # dyᵀ t, laid out so, would take twice as long


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def dora(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) + g ∘ (W x̃) + (x̃ Aᵀ) Bᵀ on each span, x̃ = dropout(x); g [O] = m/‖W + sBA‖ - 1, B already scaled by s (1 + g).

    Without dropout W x̃ is base(x) without its bias, which costs no second matmul.
    """
    y_TO = base(x_TI)
    if gathers(rows, packs):
        for stacked, where, slots in packs.gathered(rows):
            x_RI, y = x_TI[where], y_TO[where]
            plain = y if base.bias_O is None else y - base.bias_O
            shrunk = torch.bmm(stacked("A")[slots], x_RI.unsqueeze(-1))
            y_TO[where] = y + stacked("g")[slots] * plain + torch.bmm(stacked("B")[slots], shrunk).squeeze(-1)
        return y_TO

    def edit(span: Any, y: Tensor) -> Tensor:
        pack, x = packs.items[span.slot], x_TI[span.start : span.stop]
        x_drop = dropout(x, pack.dropout, rows.keys(span), base.site)
        plain = base.matrix.matmul(x_drop) if x_drop is not x else y if base.bias_O is None else y - base.bias_O
        return y + pack.tensors["g"] * plain + (x_drop @ pack.tensors["A"].T) @ pack.tensors["B"].T

    return by_span(y_TO, rows, edit)


def lora_embedding(ids_T: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(ids) + e · Aᵀ[ids] Bᵀ; A [R, V], B [O, R] scaled; e: the embedding's own factor. Dropout does not apply to token ids (as
    in peft)."""
    y_TO = base(ids_T)

    def edit(span: Any, y: Tensor) -> Tensor:
        tensors = packs.items[span.slot].tensors
        added = F.embedding(ids_T[span.start : span.stop], tensors["A"].T) @ tensors["B"].T
        return y + (added * base.row_scale).to(y.dtype)

    return by_span(y_TO, rows, edit)


# ---- IA3 ----


def scale_input(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x ∘ (1 + g)) on each span; g [I] in fp32."""
    return base(_scale(x_TI, packs, rows))


def scale_output(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) ∘ (1 + g) on each span, bias included; g [O] in fp32."""
    return _scale(base(x_TI), packs, rows)


def _scale(x: Tensor, packs: Any, rows: Any) -> Tensor:
    if native.available(x):
        scaled, (slot_T, long) = x.clone(), rows.by_row
        if slot_T is not None:
            native_inference.scale(scaled, slot_T, packs)
        for s in long:
            native_inference.scale(scaled[s.start : s.stop], _slot_of(s), packs)
        return scaled
    if gathers(rows, packs):
        scaled = x.clone()
        for stacked, where, slots in packs.gathered(rows):
            scaled[where] = (x[where] * (1.0 + stacked("g")[slots])).to(x.dtype)
        return scaled
    return by_span(x, rows, lambda s, x: (x * (1.0 + packs.items[s.slot].tensors["g"])).to(x.dtype))


# ---- bottleneck adapters ----

_FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.relu, F.gelu, F.silu, torch.tanh, F.leaky_relu, torch.sigmoid, lambda x: x)
ACTIVATIONS = dict(zip(NON_LINEARITIES, _FUNCTIONS, strict=True))


@dataclass(frozen=True)
class Bottleneck:
    """The kernel y + U f(D h + d) + u with h = y = base(x), or h = x where the adapter runs beside the module (parallel).

    D [R, H], d [R], U [H, R], u [H]; the output's scaling is folded into U and u.
    """

    activation: str
    parallel: bool

    @property
    def number(self) -> int:
        """That of the activation in native kernels."""
        return list(ACTIVATIONS).index(self.activation)

    def __call__(self, x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
        y_TO, f = base(x_TI), ACTIVATIONS[self.activation]
        h = x_TI if self.parallel else y_TO
        if native.available(h, y_TO):
            return self._native(h, y_TO, base, packs, rows)
        if gathers(rows, packs):
            for stacked, where, slots in packs.gathered(rows):
                D, d, U, u = (stacked(n)[slots] for n in ("D", "d", "U", "u"))
                hidden = f(torch.baddbmm(d.unsqueeze(-1), D, h[where].unsqueeze(-1)))
                y_TO[where] += torch.baddbmm(u.unsqueeze(-1), U, hidden).squeeze(-1)
            return y_TO

        def edit(span: Any, y_RO: Tensor) -> Tensor:
            return self._edited(x_TI[span.start : span.stop] if self.parallel else y_RO, y_RO, packs, rows, span, base.site)

        return by_span(y_TO, rows, edit)

    def _native(self, h: Tensor, y_TO: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
        slot_T, long = rows.by_row
        if slot_T is not None:
            native_inference.bottleneck(h, y_TO, slot_T, packs, self.number)
        for span in long:
            h_RI, y_RO = h[span.start : span.stop], y_TO[span.start : span.stop]
            if native_inference.runs_on_tiles(h):
                native_inference.bottleneck(h_RI, y_RO, _slot_of(span), packs, self.number)
            else:
                y_RO.copy_(self._edited(h_RI, y_RO, packs, rows, span, base.site))
        return y_TO

    def _edited(self, h_RI: Tensor, y_RO: Tensor, packs: Any, rows: Any, span: Any, site: int) -> Tensor:
        pack = packs.items[span.slot]
        t = pack.tensors
        inside = dropout(ACTIVATIONS[self.activation](F.linear(h_RI, t["D"], t["d"])), pack.dropout, rows.keys(span), site)
        return y_RO + F.linear(inside, t["U"], t["u"])


# ---- modules_to_save ----


def replace(x: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = module(x) computed with the adapter's own copy of the module's parameters, on each span."""
    whole = len(rows.spans) == 1 and rows.spans[0].stop - rows.spans[0].start == rows.total
    y = x if whole else base(x)
    return by_span(y, rows, lambda s, _: base.with_parameters(packs.items[s.slot].tensors, x[s.start : s.stop]))
