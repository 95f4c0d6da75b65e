"""The kernels of cpp/ that training runs on a CPU: row-wise parts of a layer and LoRA, forward and backward. `native` builds them.

They know nothing of autograd: `layer` and `edit` call them inside their Functions and keep what the backward needs. Results are rounded
once, so in bfloat16 they are nearer to the formula than torch's own operations. T rows, H hidden size or heads, I inputs, O outputs, D head
size, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.ops import native


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(w ∘ x / √(mean x² + eps), with x / … rounded before w; 1 / √… [T, 1] in fp32)."""
    x, weight = x_TH.contiguous(), weight_H.contiguous()
    rows, width = _size(x)
    assert weight.shape == (width,)
    y, rstd = torch.empty_like(x), torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
    run = native.function("rms_norm_forward", x.dtype, "ppppiif")
    run(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rstd.data_ptr(), rows, width, eps)
    return y, rstd


def rms_norm_backward(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor) -> Tensor:
    """The gradient of x. rstd: what `rms_norm` gave."""
    dy, x, weight = dy_TH.contiguous(), x_TH.contiguous(), weight_H.contiguous()
    assert dy.shape == x.shape
    dx = torch.empty_like(x)
    run = native.function("rms_norm_backward", x.dtype, "pppppii")
    run(dy.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd_T.data_ptr(), dx.data_ptr(), *_size(x))
    return dx


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) ∘ up."""
    assert gate_TI.shape == up_TI.shape
    gate, up, y = _rows(gate_TI), _rows(up_TI), torch.empty(gate_TI.shape, dtype=gate_TI.dtype)
    run = native.function("swiglu_forward", y.dtype, "pipipii")
    run(gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), y.data_ptr(), *_size(y))
    return y


def swiglu_backward(dy_TI: Tensor, gate_TI: Tensor, up_TI: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; silu is computed again."""
    assert dy_TI.shape == gate_TI.shape
    gate, up, dy = _rows(gate_TI), _rows(up_TI), dy_TI.contiguous()
    dgate, dup = torch.empty_like(dy), torch.empty_like(dy)
    run = native.function("swiglu_backward", dy.dtype, "ppipippii")
    run(
        dy.data_ptr(), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), dgate.data_ptr(), dup.data_ptr(), *_size(dy)
    )  # fmt: skip
    return dgate, dup


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, back: bool = False) -> Tensor:
    """[x₁; x₂] ∘ cos + [-x₂; x₁] ∘ sin for every head. back: the transposed rotation, which turns y's gradient into x's."""
    (T, H, D), x = x_THD.shape, x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()
    cos, sin = cos_TD.contiguous(), sin_TD.contiguous()
    assert cos.shape == sin.shape == (T, D) and D % 2 == 0
    y = torch.empty(T, H, D, dtype=x.dtype)
    run = native.function("rotate", x.dtype, "piipppiiii")
    run(x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), T, H, D, int(back))
    return y


def takes_lora(x_TI: Tensor, y_TO: Tensor, A_RI: Tensor, B_OR: Tensor) -> bool:
    """Whether `lora` and `lora_backward` can run on these: they multiply on matrix tiles, in bfloat16."""
    return (
        native.available(x_TI, y_TO, A_RI, B_OR)
        and x_TI.dtype == torch.bfloat16
        and native.has_tiles()
        and x_TI.shape[1] % 32 == y_TO.shape[1] % 32 == 0
        and y_TO.stride(1) == 1
    )


def lora(x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, y_TO: Tensor) -> Tensor:
    """y += (x Aᵀ) Bᵀ in place; returns x Aᵀ [T, R]."""
    x, A, B = _rows(x_TI), A_RI.contiguous(), B_OR.contiguous()
    (T, inputs), (outputs, R) = x.shape, B.shape
    assert A.shape == (R, inputs) and y_TO.shape == (T, outputs)
    t_TR = torch.empty(T, R, dtype=x.dtype)
    run = native.function("lora_forward", x.dtype, "pippppiiiii")
    run(
        x.data_ptr(), x.stride(0), A.data_ptr(), B.data_ptr(), t_TR.data_ptr(), y_TO.data_ptr(), y_TO.stride(0), T, inputs, outputs, R
    )  # fmt: skip
    torch.autograd.graph.increment_version(y_TO)
    return t_TR


def lora_backward(
    dy_TO: Tensor, x_TI: Tensor, t_TR: Tensor, A_RI: Tensor, B_OR: Tensor, dx_TI: Tensor | None, *, factors: bool
) -> tuple[Tensor, Tensor] | None:
    """With dt = dy B: (dA = dtᵀ x, dB = dyᵀ t) if `factors`; dx += dt A in place if dx is given. t: what `lora` returned."""
    dy, x, t, A, B = _rows(dy_TO), _rows(x_TI), t_TR.contiguous(), A_RI.contiguous(), B_OR.contiguous()
    (T, inputs), (outputs, R) = x.shape, B.shape
    assert dy.shape == (T, outputs) and t.shape == (T, R) and A.shape == (R, inputs)
    assert dx_TI is None or (dx_TI.shape == x.shape and dx_TI.stride(1) == 1)
    dA, dB = (torch.empty_like(A), torch.empty_like(B)) if factors else (None, None)
    run = native.function("lora_backward", x.dtype, "pipippppppiiiii")
    run(
        dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), t.data_ptr(), A.data_ptr(), B.data_ptr(), _address(dA), _address(dB),
        _address(dx_TI), x.shape[1] if dx_TI is None else dx_TI.stride(0), T, inputs, outputs, R,
    )  # fmt: skip
    return None if dA is None or dB is None else (dA, dB)


def _size(x: Tensor) -> tuple[int, int]:
    """(rows, width) of a tensor of any number of dimensions."""
    width = x.shape[-1]
    return x.numel() // max(1, width), width


def _rows(x: Tensor) -> Tensor:
    """x as rows whose values lie side by side: a view where there is one."""
    rows = x.reshape(_size(x))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
