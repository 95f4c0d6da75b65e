"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353). `LoraConfig(use_dora=True)` configures it.

    y = b + m / ‖W + sBA‖ ∘ (W x + s B A x)        norm over the inputs, one for each output; a constant in the backward (paper, §4.3)

m [O] starts at ‖W + sBA‖, which is ‖W‖ where the start changes nothing. The code writes it as an addition to the base, so that tensors of
zeros give the base's result: with g = m / ‖W + sBA‖ - 1,

    y = (W x + b) + g ∘ (W x) + s (1 + g) ∘ (B A x)

Dimensions: I in, O out, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab import ops
from trimtab.methods.base import Packed

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.bases.weights import Weight


def norm(matrix: Weight, A_RI: Tensor | None = None, B_OR: Tensor | None = None) -> Tensor:
    """‖W + BA‖ for each output, [O] fp32, without forming BA: ‖W‖² + 2 (W Aᵀ)·B + B (A Aᵀ)·B. B carries the scaling."""
    import torch

    with torch.no_grad():
        W_OI = matrix.dense().float()
        squares_O = W_OI.square().sum(-1)
        if A_RI is not None and B_OR is not None:
            A_RI, B_OR = A_RI.float(), B_OR.float()
            squares_O = squares_O + (B_OR * (2.0 * W_OI @ A_RI.T + B_OR @ (A_RI @ A_RI.T))).sum(-1)
        return squares_O.clamp_min(0.0).sqrt()


def pack(A_RI: Tensor, B_OR: Tensor, magnitude_O: Tensor, matrix: Weight, dropout: float) -> Packed:
    """B carries LoRA's scaling; gradients reach A, B and the magnitude, not the norm."""
    ratio_O = magnitude_O / norm(matrix, A_RI.detach(), B_OR.detach()).to(magnitude_O.device)
    dtype = matrix.dtype
    return Packed(ops.dora, {"A": A_RI.to(dtype), "B": (ratio_O.unsqueeze(-1) * B_OR).to(dtype), "g": (ratio_O - 1.0).to(dtype)}, dropout)


def merge(updated_OI: Tensor, magnitude_O: Tensor) -> Tensor:
    """m / ‖W + sBA‖ ∘ (W + sBA), fp32; `updated_OI` is W + sBA, and is written to."""
    return updated_OI.mul_((magnitude_O.float() / updated_OI.norm(dim=-1)).unsqueeze(-1))
