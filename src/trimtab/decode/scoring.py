"""Log-probabilities under a model's own distribution, before temperature and cuts: of tokens drawn, and of tokens that are there already.

log p = logits[token] − logsumexp(logits), in fp32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from trimtab import ops
from trimtab.decode.cached import Fed

LOGITS = 1 << 22
"""Logits that are alive at a time while the rows of a prompt are scored: 16 MB in fp32, whatever its length and the vocabulary."""


@dataclass(frozen=True)
class Score:
    """logprob: of the token. rank: 1 for the likeliest; of equals each has the best. top: the likeliest, (id, log-probability)."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def likelihoods(logits_RV: Tensor, id_R: Tensor, most: int) -> list[Tensor]:
    """Log-probabilities of these tokens [R], and of the `most` likeliest [R, most], with their ids. fp32 logits."""
    lse_R1 = logits_RV.logsumexp(-1, keepdim=True)
    values_RK, index_RK = logits_RV.topk(most)
    return [(logits_RV.gather(1, id_R[:, None]) - lse_R1)[:, 0], values_RK - lse_R1, index_RK]


def scores(fed: Fed, rows: range, targets: Sequence[int], most: int) -> list[Score]:
    """How likely each of these rows of a batch makes its target, and what it makes likeliest."""
    vocab = fed.attached.spec.vocab_size
    at_once, found = max(1, LOGITS // vocab), list[Score]()
    for begin in range(0, len(rows), at_once):
        part, wanted = rows[begin : begin + at_once], targets[begin : begin + at_once]
        logits_RV = fed.logits_of(part).float()
        id_R = ops.index(wanted, logits_RV.device)
        own, values, index = likelihoods(logits_RV, id_R, min(most, vocab))
        rank_R = (logits_RV > logits_RV.gather(1, id_R[:, None])).sum(-1) + 1
        told = ops.to_host([own, rank_R, values, index])
        found += [Score(p, r, tuple(zip(ids, ps, strict=True))) for p, r, ps, ids in zip(*told, strict=True)]
    return found
