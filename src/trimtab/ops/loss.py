"""Log-probabilities of target tokens at a frozen output head, and the loss that is a weighted sum of them.

    logits = softcap(W h + b) / temperature,  log p = logits[target] − logsumexp(logits),  ∂ log p / ∂ logits = 1[target] − p

Logits are formed `loss_rows` rows at a time, logsumexp in fp32. The head gets no gradients; the hidden states do. Where the weight of each
row in the loss is known beforehand, one pass gives loss and gradient (`supervised_loss`). Where it depends on the log-probabilities
themselves, the backward forms the logits again (`log_probabilities`).

Dimensions: R target rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.ops.layer import Matrix

LOSS_ROWS, FEWEST_ROWS = 1024, 32
LOSS_BYTES = 31 << 20
"""Of a block of logits in fp32 on a CPU. glibc gives blocks of 32 MiB and more back to the system (`train/heap.py`), and each page costs a
fault when it is used again: a fourth of the time at 49,152 tokens."""


def loss_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits alive at a time: bounds memory whatever the batch and, on a CPU, the vocabulary."""
    return LOSS_ROWS if device.type != "cpu" else min(LOSS_ROWS, max(FEWEST_ROWS, LOSS_BYTES // (4 * vocab_size)))


def supervised_loss(
    hidden_RH: Tensor, head: Matrix, bias_V: Tensor | None, target_R: Tensor, scale_R: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(Σ scale · nll, nll_R): the negative log-likelihood of each row's target, nats, fp32. Only the sum carries gradients.

    The gradient to the hidden states is formed in the forward, while the logits are at hand.
    """
    total, nll_R = _SupervisedLoss.apply(hidden_RH, head, bias_V, target_R, scale_R, softcap)
    return total, nll_R


def log_probabilities(
    hidden_RH: Tensor, head: Matrix, bias_V: Tensor | None, target_R: Tensor, softcap: float | None, temperature: float = 1.0
) -> Tensor:
    """log p [R] of each row's target, nats, fp32, differentiable in the hidden states; [R, K] where rows have K targets each, all
    different. temperature: of the distribution."""
    return _LogProbabilities.apply(hidden_RH, head, bias_V, target_R, softcap, temperature)


class _SupervisedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Matrix, bias: Tensor | None, target: Tensor, scale: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        nll = _empty(hidden)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _chunks(hidden, head):
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
    def forward(
        ctx: Any, hidden: Tensor, head: Matrix, bias: Tensor | None, target: Tensor, softcap: float | None, temperature: float
    ) -> Tensor:
        nll = _empty(hidden, target.shape[1:])
        for rows in _chunks(hidden, head):
            _loss_of_rows(hidden[rows], head, bias, target[rows], softcap, nll[rows], None, temperature)
        ctx.save_for_backward(hidden, bias, target)
        ctx.head, ctx.softcap, ctx.temperature = head, softcap, temperature
        return -nll

    @staticmethod
    def backward(ctx: Any, d_logp: Tensor) -> tuple:
        hidden, bias, target = ctx.saved_tensors
        d_hidden, nll = torch.empty_like(hidden), _empty(hidden, target.shape[1:])
        for rows in _chunks(hidden, ctx.head):
            gradient = (-d_logp[rows], d_hidden[rows])
            _loss_of_rows(hidden[rows], ctx.head, bias, target[rows], ctx.softcap, nll[rows], gradient, ctx.temperature)
        return d_hidden, None, None, None, None, None


def _empty(hidden: Tensor, more: tuple[int, ...] = ()) -> Tensor:
    """Room for a number a row, or several, fp32 or wider."""
    return torch.empty((len(hidden), *more), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)


def _chunks(hidden: Tensor, head: Matrix) -> list[slice]:
    step = loss_rows(head.shape[0], hidden.device)
    return [slice(a, a + step) for a in range(0, len(hidden), step)]


def _loss_of_rows(
    hidden: Tensor,
    head: Matrix,
    bias: Tensor | None,
    target: Tensor,
    softcap: float | None,
    nll: Tensor,
    gradient: tuple[Tensor, Tensor] | None,
    temperature: float = 1.0,
) -> None:
    """Write nll. gradient: (scale, d_hidden): write that of Σ scale · nll into d_hidden. A function of its own, so that its logits are
    gone before the next rows' are made."""
    logits, slope = head.matmul(hidden, bias).to(nll.dtype), None
    if softcap is not None:
        t = logits.div_(softcap).tanh_()
        slope = (t * t).neg_().add_(1.0)
        logits = t.mul_(softcap)
    if temperature != 1.0:
        logits = logits.div_(temperature)
    lse = torch.logsumexp(logits, -1)
    several = target.view(len(target), -1)  # [R, K]
    torch.sub(lse[:, None], logits.gather(1, several), out=nll.view(several.shape))
    if gradient is not None:
        scale, d_hidden = gradient[0] / temperature, gradient[1]
        p = logits.sub_(lse[:, None]).exp_()
        if target.dim() == 1:
            p.scatter_add_(1, several, torch.full_like(lse[:, None], -1.0)).mul_(scale[:, None])
        else:
            p.mul_(scale.sum(1, keepdim=True)).scatter_add_(1, several, -scale)
        d_hidden.copy_(head.matmul_t((p if slope is None else p.mul_(slope)).to(hidden.dtype)))
