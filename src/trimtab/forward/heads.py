"""Scores of adapters' own heads, from the hidden states of a mixed forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.errors import TrimtabError
from trimtab.forward.batch import BASE, Batch
from trimtab.forward.hosted import Hosted
from trimtab.methods.base import Params


def head_scores(attached: Hosted, hidden_TH: Tensor, batch: Batch, rows: Sequence[int], members: Sequence[int]) -> list[Tensor]:
    """[K] of each of these rows, fp32: W h + b of the head of the row's adapter, K its labels. hidden_TH: what `forward` gave of the batch.
    rows: flat rows in any order; of whole sequences the last ones, `[stop - 1 for _, stop in batch.where]`. members: of each row the
    sequence's, as its piece names it: rows for which an aLoRA is off still have its head. Differentiable. TrimtabError where one has no
    head."""
    found: dict[int, Tensor] = {}
    for member in dict.fromkeys(members):
        places = [i for i, m in enumerate(members) if m == member]
        found |= zip(places, member_scores(attached, hidden_TH, batch, member, [rows[i] for i in places]).unbind(), strict=True)
    return [found[i] for i in range(len(rows))]


def member_scores(attached: Hosted, hidden_TH: Tensor, batch: Batch, member: int, rows: Sequence[int]) -> Tensor:
    """[R, K]: the same of rows of one member."""
    head = None if member == BASE else batch.mix.adapters[member].head
    if head is None:
        what = "the base has" if member == BASE else "this adapter has"
        raise TrimtabError(f"{what} no head that could score texts", fix="name an adapter of objective classify or reward")
    return read(attached, hidden_TH[ops.upload([np.array(rows, dtype=np.int64)], attached.device)[0]], head)


def read(attached: Hosted, hidden_RH: Tensor, head: Params) -> Tensor:
    """[R, K]: the same of rows of what `forward` gave, by a head's tensors."""
    return torch.nn.functional.linear(attached.normed(hidden_RH), head["weight"], head.get("bias"))
