"""The loss on supervised rows. Dimensions: R supervised rows, H hidden, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_ROWS = 1024
"""Rows of logits alive at a time: bounds memory whatever the batch and the vocabulary."""


def supervised_loss(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_R: Tensor, scale_R: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(Σ scale · nll, nll_R): the negative log-likelihood of each supervised row's target, nats, fp32.

    Logits are formed LOSS_ROWS at a time, logsumexp in fp32, and the gradient to the hidden states is formed in the forward, while they
    are at hand. The head is frozen: nothing flows to weight or bias. Only the sum carries gradients.
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
            gradient = None if d_hidden is None else d_hidden[rows]
            _loss_of_rows(hidden[rows], weight, bias, target[rows], scale[rows], softcap, nll[rows], gradient)
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(nll)
        return (nll * scale).sum(), nll

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), None, None, None, None, None


def _loss_of_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    softcap: float | None,
    nll: Tensor,
    d_hidden: Tensor | None,
) -> None:
    """Write nll and, where it is wanted, d_hidden. A function of its own, so that its logits are gone before the next rows' are made."""
    logits, slope = F.linear(hidden, weight, bias).to(nll.dtype), None
    if softcap is not None:
        t = logits.div_(softcap).tanh_()
        slope = (t * t).neg_().add_(1.0)
        logits = t.mul_(softcap)
    lse = torch.logsumexp(logits, -1)
    torch.sub(lse, logits.gather(1, target[:, None]).squeeze(1), out=nll)
    if d_hidden is not None:
        p = logits.sub_(lse[:, None]).exp_()
        p.scatter_add_(1, target[:, None], torch.full_like(lse[:, None], -1.0))
        p.mul_(scale[:, None])
        d_hidden.copy_((p if slope is None else p.mul_(slope)).to(hidden.dtype) @ weight)
