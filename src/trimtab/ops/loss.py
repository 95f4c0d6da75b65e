"""Log-probabilities of target tokens at a frozen output head, and the loss that is a weighted sum of them.

    logits = softcap(W h + b),  log p = logits[target] − logsumexp(logits),  ∂ log p / ∂ logits = 1[target] − p

Logits are formed LOSS_ROWS rows at a time, logsumexp in fp32. The head gets no gradients; the hidden states do. Where the weight of each
row in the loss is known beforehand, one pass gives loss and gradient (`supervised_loss`). Where it depends on the log-probabilities
themselves, the backward forms the logits again (`log_probabilities`).

Dimensions: R target rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.ops.layer import Matrix

LOSS_ROWS = 1024
"""Rows of logits alive at a time: bounds memory whatever the batch and the vocabulary."""


def supervised_loss(
    hidden_RH: Tensor, head: Matrix, bias_V: Tensor | None, target_R: Tensor, scale_R: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(Σ scale · nll, nll_R): the negative log-likelihood of each row's target, nats, fp32. Only the sum carries gradients.

    The gradient to the hidden states is formed in the forward, while the logits are at hand.
    """
    total, nll_R = _SupervisedLoss.apply(hidden_RH, head, bias_V, target_R, scale_R, softcap)
    return total, nll_R


def log_probabilities(hidden_RH: Tensor, head: Matrix, bias_V: Tensor | None, target_R: Tensor, softcap: float | None) -> Tensor:
    """log p [R] of each row's target, nats, fp32, differentiable in the hidden states."""
    return _LogProbabilities.apply(hidden_RH, head, bias_V, target_R, softcap)


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Matrix, bias: Tensor | None, target: Tensor, scale: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        nll = _empty(hidden)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(hidden)):
            gradient = None if d_hidden is None else (scale[rows], d_hidden[rows])
            _loss_of_rows(hidden[rows], head, bias, target[rows], softcap, nll[rows], gradient)
        ctx.save_for_backward(d_hidden)
        ctx.mark_non_differentiable(nll)
        return (nll * scale).sum(), nll

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple:
        (d_hidden,) = ctx.saved_tensors
        return d_hidden * d_total.to(d_hidden.dtype), None, None, None, None, None


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Matrix, bias: Tensor | None, target: Tensor, softcap: float | None) -> Tensor:
        nll = _empty(hidden)
        for rows in _chunks(len(hidden)):
            _loss_of_rows(hidden[rows], head, bias, target[rows], softcap, nll[rows], None)
        ctx.save_for_backward(hidden, bias, target)
        ctx.head, ctx.softcap = head, softcap
        return -nll

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor) -> tuple:
        hidden, bias, target = ctx.saved_tensors
        d_hidden, nll = torch.empty_like(hidden), _empty(hidden)
        for rows in _chunks(len(hidden)):
            _loss_of_rows(hidden[rows], ctx.head, bias, target[rows], ctx.softcap, nll[rows], (-d_logp[rows], d_hidden[rows]))
        return d_hidden, None, None, None, None


def _empty(hidden: Tensor) -> Tensor:
    """Room for a number a row, fp32 or wider."""
    return torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)


def _chunks(rows: int) -> list[slice]:
    return [slice(a, a + LOSS_ROWS) for a in range(0, rows, LOSS_ROWS)]


def _loss_of_rows(
    hidden: Tensor,
    head: Matrix,
    bias: Tensor | None,
    target: Tensor,
    softcap: float | None,
    nll: Tensor,
    gradient: tuple[Tensor, Tensor] | None,
) -> None:
    """Write nll. gradient: (scale, d_hidden): write that of Σ scale · nll into d_hidden. A function of its own, so that its logits are
    gone before the next rows' are made."""
    logits, slope = head.matmul(hidden, bias).to(nll.dtype), None
    if softcap is not None:
        t = logits.div_(softcap).tanh_()
        slope = (t * t).neg_().add_(1.0)
        logits = t.mul_(softcap)
    lse = torch.logsumexp(logits, -1)
    torch.sub(lse, logits.gather(1, target[:, None]).squeeze(1), out=nll)
    if gradient is not None:
        scale, d_hidden = gradient
        p = logits.sub_(lse[:, None]).exp_()
        p.scatter_add_(1, target[:, None], torch.full_like(lse[:, None], -1.0))
        p.mul_(scale[:, None])
        d_hidden.copy_(head.matmul_t((p if slope is None else p.mul_(slope)).to(hidden.dtype)))
