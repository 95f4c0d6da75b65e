"""The row-wise parts of a layer as torch.compile makes them: what `layer` computes, in one pass over the rows each way.

For devices that have no native kernels. Shapes are dynamic, so that batches of different sizes share what was compiled, and all layers of a
model do. Intermediate values are not rounded to the inputs' dtype, so results differ from `layer`'s by a rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.layer import rms_norm_weight_gradient


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`layer.rms_norm`, compiled."""
    return _RMSNorm.apply(x_TH, weight_H, eps)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """`layer.swiglu`, compiled."""
    return _SwiGLU.apply(gate_TI, up_TI)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """`layer.rotate`, compiled."""
    return _Rotate.apply(x_THD, cos_TD[:, None], sin_TD[:, None])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = _wide(x)
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd).to(x.dtype) * weight, rstd


def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    g, x32 = _wide(dy * weight), _wide(x)
    along = (g * x32).sum(-1, keepdim=True) * rstd.pow(3) / -x.shape[-1]
    return (g * rstd + x32 * along).to(x.dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, dy32 = _wide(gate), _wide(dy)
    s = torch.sigmoid(g)
    return (dy32 * _wide(up) * s * (1.0 + g * (1.0 - s))).to(gate.dtype), (dy32 * g * s).to(up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = (dy * sin).chunk(2, dim=-1)
    return dy * cos + torch.cat([b, -a], dim=-1)


@cache
def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(formula, dynamic=True)


def _run(formula: Callable[..., Any], *arguments: Any) -> Any:
    """Compiled at the first call. Whether a tensor wants gradients is no matter in here, and would be compiled anew for either."""
    return _compiled(formula)(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _run(_rms_norm, x.flatten(0, -2), weight, eps)  # hidden states, and heads one by one, alike
        ctx.save_for_backward(x, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight, rstd = ctx.saved_tensors
        dx = _run(_rms_norm_backward, dy.flatten(0, -2), x.flatten(0, -2), weight, rstd).view(x.shape)
        return dx, rms_norm_weight_gradient(dy, x, rstd.view(*x.shape[:-1], 1)) if ctx.needs_input_grad[1] else None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _run(_swiglu, gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        found = _run(_swiglu_backward, *(t.flatten(0, -2) for t in (dy, gate, up)))
        return tuple(d.view(gate.shape) for d in found)


class _Rotate(torch.autograd.Function):
    """The backward is the transposed rotation, so that nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _run(_rotate, x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        return _run(_rotate_backward, dy, *ctx.saved_tensors), None, None
