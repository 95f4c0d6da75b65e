"""Row-wise kernels over spans: the only place where kernels live.

A kernel gets all T rows of a flat batch, the base's module, the packed edits of the adapters present, and the spans of rows that each
touches.
It knows no rank, no alpha, no method's name. Two ways of running the same formula:

- by span: one pair of matmuls for each adapter's run of rows; differentiable; what training and prefill use;
- gathered: each row picks its adapter's stacked tensors and all rows run in one `bmm`; what decoding many short spans uses (no gradients).

Dimensions: T rows, I in, O out, R rank or bottleneck, S adapters ("slots") of this batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GATHER_ROWS_PER_SPAN = 4
"""Gather instead of looping where spans are this short on average: one bmm then beats many tiny matmuls."""


def dropout(x: Tensor, p: float, seed: int | None, site: int) -> Tensor:
    """Inverted dropout whose mask depends on (seed, site) only: an adapter sees the same masks alone and among others, and again in the
    backward."""
    if seed is None or p == 0.0:
        return x
    generator = torch.Generator(x.device).manual_seed((seed * 1_000_003 + site) % 2**63)
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p, generator=generator)
    return x * keep.mul_(1.0 / (1.0 - p))


def gathers(rows: Any) -> bool:
    """Whether to run gathered: no gradients wanted, several spans, all short."""
    return (
        not torch.is_grad_enabled()
        and len(rows.spans) > 1
        and sum(s.stop - s.start for s in rows.spans) <= GATHER_ROWS_PER_SPAN * len(rows.spans)
    )


def by_span(y: Tensor, rows: Any, edit: Callable[[Any], Tensor]) -> Tensor:
    """y with the rows of each span replaced by edit(span); differentiable, y itself is left as it is."""
    if len(rows.spans) == 1 and rows.spans[0].stop - rows.spans[0].start == rows.total:
        return edit(rows.spans[0])
    parts, at = [], 0
    for span in rows.spans:
        parts += [y[at : span.start], edit(span)]
        at = span.stop
    return torch.cat([*parts, y[at:]])


# ---- LoRA ----


def lora(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) + (x Aᵀ) Bᵀ on each span; A [R, I], B [O, R] with the scaling folded in. The product BA is never formed."""
    if gathers(rows):
        y_TO = base(x_TI)
        where, slots = rows.touched
        shrunk = torch.bmm(packs.stacked("A")[slots], x_TI[where].unsqueeze(-1))
        y_TO[where] += torch.bmm(packs.stacked("B")[slots], shrunk).squeeze(-1)
        return y_TO
    factors = [t for p in packs.items for t in (p.tensors["A"], p.tensors["B"])]
    return _LoraSpans.apply(x_TI, None if base.plain else base(x_TI), base, rows, tuple(p.dropout for p in packs.items), *factors)


class _LoraSpans(torch.autograd.Function):
    """LoRA on a frozen linear layer. Where y is None the layer itself runs in here, so that the backward forms dX = dY W + (dY B) A in
    one buffer;
    where other edits stand between, y is their result and is added to in place.

    Saved: x, A, B and the R-wide x Aᵀ; dropout masks are drawn again in the backward. W's gradient is never formed.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, y_TO: Tensor | None, base: Any, rows: Any, dropouts: Sequence[float], *factors: Tensor) -> Tensor:
        ctx.base = base if y_TO is None else None
        if y_TO is None:
            y_TO = base(x_TI)
        else:
            ctx.mark_dirty(y_TO)
        shrunk = []
        for span in rows.spans:
            A, B = factors[2 * span.slot], factors[2 * span.slot + 1]
            shrunk.append(dropout(x_TI[span.start : span.stop], dropouts[span.slot], span.seed, base.site) @ A.T)
            y_TO[span.start : span.stop].addmm_(shrunk[-1], B.T)
        ctx.rows, ctx.dropouts, ctx.site = rows, dropouts, base.site
        ctx.save_for_backward(x_TI, *factors, *shrunk)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple:
        x_TI, *saved = ctx.saved_tensors
        factors, shrunk = saved[: -len(ctx.rows.spans)], saved[-len(ctx.rows.spans) :]
        grads: list[Tensor | None] = [None] * len(factors)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = torch.zeros_like(x_TI) if ctx.base is None else dy_TO @ ctx.base.weight_OI
        for span, t_R in zip(ctx.rows.spans, shrunk, strict=True):
            a, p = 2 * span.slot, ctx.dropouts[span.slot]
            A, B = factors[a], factors[a + 1]
            dy = dy_TO[span.start : span.stop]
            dt = dy @ B
            if ctx.needs_input_grad[5 + a]:
                x = dropout(x_TI[span.start : span.stop], p, span.seed, ctx.site)
                grads[a] = _add(grads[a], dt.T @ x)
                grads[a + 1] = _add(grads[a + 1], dy.T @ t_R)
            if dx_TI is not None:
                if p and span.seed is not None:
                    dx_TI[span.start : span.stop] += dropout(dt @ A, p, span.seed, ctx.site)
                else:
                    dx_TI[span.start : span.stop].addmm_(dt, A)
        return dx_TI, dy_TO if ctx.base is None else None, None, None, None, *grads


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def dora(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) + g ∘ (W x̃) + (x̃ Aᵀ) Bᵀ on each span, x̃ = dropout(x); g [O] = m/‖W + sBA‖ - 1, B already scaled by s (1 + g).

    Without dropout W x̃ is base(x) without its bias, which costs no second matmul.
    """
    y_TO = base(x_TI)
    if gathers(rows):
        where, slots = rows.touched
        x_RI, y = x_TI[where], y_TO[where]
        plain = y if base.bias_O is None else y - base.bias_O
        shrunk = torch.bmm(packs.stacked("A")[slots], x_RI.unsqueeze(-1))
        y_TO[where] = y + packs.stacked("g")[slots] * plain + torch.bmm(packs.stacked("B")[slots], shrunk).squeeze(-1)
        return y_TO

    def edit(span: Any) -> Tensor:
        pack, y, x = packs.items[span.slot], y_TO[span.start : span.stop], x_TI[span.start : span.stop]
        x_drop = dropout(x, pack.dropout, span.seed, base.site)
        plain = F.linear(x_drop, base.weight_OI) if x_drop is not x else y if base.bias_O is None else y - base.bias_O
        return y + pack.tensors["g"] * plain + (x_drop @ pack.tensors["A"].T) @ pack.tensors["B"].T

    return by_span(y_TO, rows, edit)


def lora_embedding(ids_T: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(ids) + e · Aᵀ[ids] Bᵀ; A [R, V], B [O, R] scaled; e: the embedding's own factor. Dropout does not apply to token ids (as
    in peft)."""
    y_TO = base(ids_T)

    def edit(span: Any) -> Tensor:
        tensors = packs.items[span.slot].tensors
        added = F.embedding(ids_T[span.start : span.stop], tensors["A"].T) @ tensors["B"].T
        return y_TO[span.start : span.stop] + (added * base.row_scale).to(y_TO.dtype)

    return by_span(y_TO, rows, edit)


# ---- IA3 ----


def scale_input(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x ∘ (1 + g)) on each span; g [I] in fp32."""
    return base(_scale(x_TI, packs, rows))


def scale_output(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = base(x) ∘ (1 + g) on each span, bias included; g [O] in fp32."""
    return _scale(base(x_TI), packs, rows)


def _scale(x: Tensor, packs: Any, rows: Any) -> Tensor:
    if gathers(rows):
        where, slots = rows.touched
        scaled = x.clone()
        scaled[where] = (x[where] * (1.0 + packs.stacked("g")[slots])).to(x.dtype)
        return scaled
    return by_span(x, rows, lambda s: (x[s.start : s.stop] * (1.0 + packs.items[s.slot].tensors["g"])).to(x.dtype))


# ---- bottleneck adapters ----

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leakyrelu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


def bottleneck(activation: str, parallel: bool) -> Any:
    """The kernel y + U f(D h + d) + u with h = y = base(x), or h = x where the adapter runs beside the module (parallel).

    D [R, H], d [R], U [H, R], u [H]; the output's scaling is folded into U and u.
    """
    f = ACTIVATIONS[activation]

    def kernel(x_TI: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
        y_TO = base(x_TI)
        h = x_TI if parallel else y_TO
        if gathers(rows):
            where, slots = rows.touched
            D, d, U, u = (packs.stacked(n)[slots] for n in ("D", "d", "U", "u"))
            hidden = f(torch.baddbmm(d.unsqueeze(-1), D, h[where].unsqueeze(-1)))
            y_TO[where] += torch.baddbmm(u.unsqueeze(-1), U, hidden).squeeze(-1)
            return y_TO

        def edit(span: Any) -> Tensor:
            pack = packs.items[span.slot]
            t = pack.tensors
            inside = dropout(f(F.linear(h[span.start : span.stop], t["D"], t["d"])), pack.dropout, span.seed, base.site)
            return y_TO[span.start : span.stop] + F.linear(inside, t["U"], t["u"])

        return by_span(y_TO, rows, edit)

    return kernel


# ---- modules_to_save ----


def replace(x: Tensor, base: Any, packs: Any, rows: Any) -> Tensor:
    """y = module(x) computed with the adapter's own copy of the module's parameters, on each span."""
    whole = len(rows.spans) == 1 and rows.spans[0].stop - rows.spans[0].start == rows.total
    y = x if whole else base(x)
    return by_span(y, rows, lambda s: base.with_parameters(packs.items[s.slot].tensors, x[s.start : s.stop]))


# ---- attention ----

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
) -> Tensor:
    """softmax(cap(scaling · q kᵀ) + mask) v for B padded sequences with H query heads over G key heads; returns [B, Q, H, D].

    Key j lies at query i's own place where j = i + offset; later keys are never read. window: keys at distance ≥ window are never read
    either. mask_BQS: False where a key must not be read (padding, gaps); None where offset and window say all; it holds the window too.
    softcap c: c · tanh(x / c). Scores are held in the inputs' dtype, and the softmax computes in fp32 inside, as a kernel of one pass: on a
    CPU fp32 copies of bf16 scores cost ten times the matmuls. The backward forms the scores again, so memory is linear in the length.
    """
    return _Attention.apply(q_BQHD, k_BSGD, v_BSGD, offset, mask_BQS, scaling, softcap, window)


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

    def __init__(self, q_x: Tensor, k_x: Tensor, added: Tensor | None, heads: tuple[int, int], softcap: float | None):
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
        self.p = torch.softmax(scores, dim=-1)

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
    ) -> Tensor:
        B, Q, H, _ = q.shape
        G, S = k.shape[2], k.shape[1]
        k_x, v_x = _keys(k), _keys(v)
        out = torch.empty(B, Q, H, v.shape[-1], dtype=v.dtype, device=v.device)
        for block in _blocks(Q, S, offset, window):
            i, j, a, b = block
            added = _forbidden(block, offset, mask, window, q)
            scores = _Scores(_queries(q[:, i:j] * scaling, G), k_x[:, a:b], added, (G, H // G), softcap)
            out[:, i:j] = _unqueries(torch.bmm(scores.p, v_x[:, a:b]), B, H)
        ctx.save_for_backward(q, k, v, mask)
        ctx.config = (offset, scaling, softcap, window)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        q, k, v, mask = ctx.saved_tensors
        offset, scaling, softcap, window = ctx.config
        B, Q, H, _ = q.shape
        G, S = k.shape[2], k.shape[1]
        k_x, v_x = _keys(k), _keys(v)
        blocks = _blocks(Q, S, offset, window)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k_x), torch.zeros_like(v_x)
        for block in blocks:
            i, j, a, b = block
            q_x, do_x = _queries(q[:, i:j] * scaling, G), _queries(d_out[:, i:j], G)
            scores = _Scores(q_x, k_x[:, a:b], _forbidden(block, offset, mask, window, q), (G, H // G), softcap)
            ds = scores.backward(torch.bmm(do_x, v_x[:, a:b].transpose(1, 2)))
            dq[:, i:j] = _unqueries(torch.bmm(ds, k_x[:, a:b]), B, H).mul_(scaling)
            dk[:, a:b].baddbmm_(ds.transpose(1, 2), q_x)
            dv[:, a:b].baddbmm_(scores.p.transpose(1, 2), do_x)
        return dq, _unkeys(dk, B), _unkeys(dv, B), None, None, None, None, None


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


# ---- loss on supervised rows ----

LOSS_ROWS = 1024
"""Rows of logits alive at a time: bounds memory whatever the batch and the vocabulary."""


def supervised_loss(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_R: Tensor, scale_R: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(Σ scale · nll, nll_R): the negative log-likelihood of each supervised row's target, nats, fp32.

    Logits are formed LOSS_ROWS at a time, logsumexp in fp32, and the gradient to the hidden states is formed in the forward, while they
    are at hand. The
    head is frozen: nothing flows to weight or bias. Only the sum carries gradients.
    """
    total, nll_R = _SupervisedLoss.apply(hidden_RH, weight_VH, bias_V, target_R, scale_R, softcap)
    return total, nll_R


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        nll = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for a in range(0, len(hidden), LOSS_ROWS):
            rows = slice(a, a + LOSS_ROWS)
            logits = F.linear(hidden[rows], weight, bias).to(nll.dtype)
            slope = None
            if softcap is not None:
                t = torch.tanh(logits / softcap)
                logits, slope = t * softcap, 1.0 - t * t
            lse = torch.logsumexp(logits, -1)
            nll[rows] = lse - logits.gather(1, target[rows, None]).squeeze(1)
            if d_hidden is not None:
                p = logits.sub_(lse[:, None]).exp_()
                p.scatter_add_(1, target[rows, None], torch.full_like(lse[:, None], -1.0))
                p.mul_(scale[rows, None])
                d_hidden[rows] = (p if slope is None else p.mul_(slope)).to(hidden.dtype) @ weight
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(nll)
        return (nll * scale).sum(), nll

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), None, None, None, None, None


# ---- row-wise parts of a layer ----


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """w ∘ x / √(mean x² + eps), the mean in fp32, x rounded to its dtype before w (as Llama does). w is frozen; kept are x and a number a
    row."""
    return _RMSNorm.apply(x_TH, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight, rstd = ctx.saved_tensors
        g, x32 = (dy * weight).to(rstd.dtype), x.to(rstd.dtype)
        along = (g * x32).sum(-1, keepdim=True).mul_(rstd.pow(3)).div_(-x.shape[-1])
        return g.mul_(rstd).addcmul_(x32, along).to(x.dtype), None, None


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) ∘ up; silu is computed again in the backward instead of being kept."""
    return _SwiGLU.apply(gate_TI, up_TI)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions in the half-split form (Su et al. 2021, arXiv:2104.09864): [x₁; x₂] ∘ cos + [-x₂; x₁] ∘ sin, for every head."""
    return _Rotate.apply(x_THD, cos_TD[:, None], sin_TD[:, None])


class _Rotate(torch.autograd.Function):
    """The backward is the transposed rotation, so that nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
        return dx, None, None
