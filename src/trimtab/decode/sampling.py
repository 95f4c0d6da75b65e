"""From logits to one token a row: the one sampler of `generate`, `chat`, evaluation and the engine.

A row's distribution is that of transformers' warpers, in their order: temperature, top_k, top_p, min_p, each on what the one before has
left, in fp32. Tokens tied with the k-th all stay; of tokens tied where top_p cuts, as many stay as are needed. A draw inverts the
distribution at one uniform number, in the order of the vocabulary: a row's token depends on its own logits, settings and generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab import ops
from trimtab.decode.settings import Settings

COLD = 1e-5
"""A temperature below this is greedy, as in vLLM: logits divided by it would not be finite."""

Cut = Callable[[Tensor, Sequence[float]], Tensor]
"""Takes tokens out of rows, in place; each row has a number of its own."""


def greedy(settings: Settings) -> bool:
    """Whether the likeliest token is taken, the first of equals."""
    return settings.temperature < COLD


def choose(logits_RV: Tensor, settings: Sequence[Settings], generators: Sequence[random.Random]) -> Tensor:
    """One token [R] of each row. A generator gives one number where its row is drawn, none where it is greedy. Rows that hold NaN, or
    nothing above -inf, give tokens that mean nothing."""
    drawn = [r for r, s in enumerate(settings) if not greedy(s)]
    if not drawn:
        return ops.largest(logits_RV)[1]
    uniform = [generators[r].random() for r in drawn]
    if len(drawn) == len(settings):
        return draw(warped(logits_RV, settings), uniform)
    row_D, id_R = ops.index(drawn, logits_RV.device), ops.largest(logits_RV)[1]
    return id_R.index_copy(0, row_D, draw(warped(logits_RV[row_D], [settings[r] for r in drawn]), uniform))


def warped(logits_RV: Tensor, settings: Sequence[Settings]) -> Tensor:
    """fp32 logits of the distributions that the rows are drawn from; -inf where a token cannot come."""
    V = logits_RV.shape[-1]
    x_RV = logits_RV.to(torch.float32, copy=True)
    x_RV /= _column([s.temperature for s in settings], x_RV)
    cuts: list[tuple[Cut, list[float], float]] = [
        (_top_k, [min(s.top_k or V, V) for s in settings], V),
        (_top_p, [s.top_p for s in settings], 1.0),
        (_min_p, [s.min_p for s in settings], 0.0),
    ]
    for cut, values, off in cuts:
        rows = [r for r, value in enumerate(values) if value != off]
        if len(rows) == len(values):
            cut(x_RV, values)
        elif rows:
            row_C = ops.index(rows, x_RV.device)
            x_RV[row_C] = cut(x_RV[row_C], [values[r] for r in rows])
    return x_RV


def drawn_from(logits_RV: Tensor, id_R: Tensor, temperature: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(log p of the tokens, entropy) [R], [R], in nats, of the whole distributions at these temperatures, fp32."""
    x_RV = logits_RV.to(torch.float32, copy=True)
    x_RV /= _column(temperature, x_RV)
    logp_RV = torch.log_softmax(x_RV, -1)
    return logp_RV.gather(1, id_R[:, None])[:, 0], -(logp_RV.exp() * logp_RV).sum(-1)


def draw(logits_RV: Tensor, uniform: Sequence[float]) -> Tensor:
    """The token [R] at which each row's cumulative probability passes its number in [0, 1)."""
    weight_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=torch.float64)
    uniform_R1 = ops.floats(uniform, weight_RV)[:, None]
    place_R1 = torch.searchsorted(weight_RV, uniform_R1 * weight_RV[:, -1:], right=True)
    return place_R1[:, 0].clamp_max(logits_RV.shape[-1] - 1)  # a row of nothing points behind the end


def _top_k(x_RV: Tensor, k: Sequence[float]) -> Tensor:
    """Keep each row's k largest, and what equals the last of them."""
    place_R1 = ops.index([int(n) - 1 for n in k], x_RV.device)[:, None]
    least_R1 = x_RV.topk(int(max(k))).values.gather(1, place_R1)
    return x_RV.masked_fill_(x_RV < least_R1, -torch.inf)


def _top_p(x_RV: Tensor, p: Sequence[float]) -> Tensor:
    """Leave out the least likely tokens that together hold at most 1 - p; the likeliest stays."""
    ordered_RV, index_RV = x_RV.sort()  # among equals its order decides who goes, as in transformers
    gone_RV = ordered_RV.softmax(-1).cumsum_(-1) <= _column([1.0 - value for value in p], x_RV)
    gone_RV[:, -1] = False
    return x_RV.masked_fill_(gone_RV.scatter(1, index_RV, gone_RV), -torch.inf)


def _min_p(x_RV: Tensor, p: Sequence[float]) -> Tensor:
    """Keep the tokens that are at least p times as likely as the likeliest."""
    p_RV = x_RV.softmax(-1)
    return x_RV.masked_fill_(p_RV < _column(p, x_RV) * p_RV.amax(-1, keepdim=True), -torch.inf)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return ops.floats(values, like)[:, None]
