"""Row-wise parts of a layer, fused: RMSNorm, SwiGLU, rotary positions. T rows, H hidden size or heads, I intermediate, D head size.

On a CPU in float32 or bfloat16 they run in one native pass each (`native_training`); what stands here in torch is the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops import native, native_inference, native_training


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """w ∘ x / √(mean x² + eps), the mean in fp32, x rounded to its dtype before w (as Llama does). Kept are x and a number a row."""
    return _RMSNorm.apply(x_TH, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if native.available(x, weight):
            y, rstd = native_training.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, rstd)
            return y
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight, rstd = ctx.saved_tensors
        dw = rms_norm_weight_gradient(dy, x, rstd) if ctx.needs_input_grad[1] else None
        if native.available(dy, x, weight):
            return native_training.rms_norm_backward(dy, x, weight, rstd), dw, None
        g, x32 = (dy * weight).to(rstd.dtype), x.to(rstd.dtype)
        along = (g * x32).sum(-1, keepdim=True).mul_(rstd.pow(3)).div_(-x.shape[-1])
        return g.mul_(rstd).addcmul_(x32, along).to(x.dtype), dw, None


def rms_norm_weight_gradient(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dL/dw [H] of `rms_norm`, summed over the rows in fp32. rstd: 1 / √(mean x² + eps), one a row."""
    normed = (x * rstd).to(x.dtype)
    return (dy * normed).flatten(0, -2).sum(0, dtype=rstd.dtype).to(dy.dtype)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) ∘ up; silu is computed again in the backward instead of being kept."""
    return _SwiGLU.apply(gate_TI, up_TI)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native_training.swiglu(gate, up) if native.available(gate, up) else F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        if native.available(dy, gate, up):
            return native_training.swiglu_backward(dy, gate, up)
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions in the half-split form (Su et al. 2021, arXiv:2104.09864): [x₁; x₂] ∘ cos + [-x₂; x₁] ∘ sin, for every head."""
    return _Rotate.apply(x_THD, cos_TD, sin_TD)


class _Rotate(torch.autograd.Function):
    """The backward is the transposed rotation, so that nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if native.available(x, cos, sin):
            return native_training.rotate(x, cos, sin)
        cos, sin = cos[:, None], sin[:, None]
        half = x.shape[-1] // 2
        y = x * cos
        y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        y[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        if native.available(dy, cos, sin):
            return native_training.rotate(dy, cos, sin, back=True), None, None
        cos, sin = cos[:, None], sin[:, None]
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
        return dx, None, None


class Matrix(Protocol):
    """A frozen matrix of the base [O, I], in whatever format it is stored: x Wᵀ + b, and dy W."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def matmul(self, x_TI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor: ...
    def matmul_t(self, dy_TO: Tensor) -> Tensor: ...


def linears(x_TI: Tensor, weights: Sequence[Matrix], biases: Sequence[Tensor | None]) -> Tensor:
    """The results of several linear layers of one input, side by side, each written where it belongs; no gradients."""
    widths = [w.shape[0] for w in weights]
    y_TO = x_TI.new_empty(len(x_TI), sum(widths))
    for y, weight, bias in zip(y_TO.split(widths, dim=1), weights, biases, strict=True):
        weight.matmul(x_TI, bias, y)
    return y_TO


def linear_into(out_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b, written to `out_TO`, which may be a part of a wider matrix; no gradients."""
    if bias_O is None:
        return torch.mm(x_TI, weight_OI.T, out=out_TO)
    return torch.addmm(bias_O, x_TI, weight_OI.T, out=out_TO)


def largest(x_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(each row's largest value, NaN where the row holds one; its index, the first of equals). On a CPU in bf16 torch's own is slow."""
    if native.available(x_TV):
        return native_inference.largest(x_TV)
    value, place = x_TV.max(-1)
    return value.float(), place
