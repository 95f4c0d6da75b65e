"""Segments laid out as a batch, and the log-probabilities of their supervised tokens at the output head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.data import Example
from trimtab.forward.attached import Attached
from trimtab.forward.batch import Batch, Piece, make_batch
from trimtab.forward.packs import Mix
from trimtab.ops import loss as kernels
from trimtab.ops.layer import Matrix
from trimtab.train.samples import prompt_of


def lay_out(
    attached: Attached,
    mix: Mix,
    segments: Sequence[tuple[int, Example, int | None]],
    noise: Sequence[tuple[int, float] | None] = (),
) -> tuple[list[tuple[int, int, Example]], Batch]:
    """((place among `segments`, the row of its first token, segment) in the order of rows, the batch). segments: (member, segment, seed of
    its dropout). Those of a member keep their order, so those of a part follow each other. Where a segment shares its first tokens with the
    one before it, the row is where they would have been, if they had rows of their own. noise: of each segment."""
    pieces = [
        Piece(torch.from_numpy(s.ids[s.shared :].astype(np.int64)), member, shared=s.shared, seed=seed, noise=n, prompt=prompt_of(s))
        for (member, s, seed), n in zip_longest(segments, noise)
    ]
    batch = make_batch(pieces, mix, device=attached.device, max_positions=attached.spec.max_positions)
    laid = [(i, start, s) for i, ((start, _), (_, s, _)) in enumerate(zip(batch.where, segments, strict=True))]
    return [(i, start - s.shared, s) for i, start, s in sorted(laid, key=lambda x: x[1])], batch


@dataclass(frozen=True)
class Targets:
    """The supervised rows of a batch, ascending. rows, row_R: the flat row that predicts. target_R: the token it predicts. runs: each
    segment's part of R, in the order of rows."""

    rows: list[int]
    row_R: Tensor
    target_R: Tensor
    runs: list[tuple[int, int]]

    @classmethod
    def of(cls, segments: Sequence[tuple[int, Example]], device: torch.device) -> Targets:
        """segments: (first row, segment), in the order of rows. The token at place t is predicted by the row before it; place 0 is never a
        target."""
        rows: list[int] = []
        targets: list[int] = []
        runs: list[tuple[int, int]] = []
        for start, e in segments:
            places = np.flatnonzero(e.supervised)
            places = places[places > 0]
            runs.append((len(rows), len(rows) + len(places)))
            rows += (start + places - 1).tolist()
            targets += e.ids[places].tolist()
        row_R, target_R = ops.upload([np.array(rows, dtype=np.int64), np.array(targets, dtype=np.int64)], device)
        return cls(rows, row_R, target_R, runs)


def supervised_loss(attached: Attached, hidden_TH: Tensor, batch: Batch, targets: Targets, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ scale · nll, nll_R). The frozen, unedited head forms its gradient in the forward; a head that trains goes through autograd."""
    if _trains(attached, batch):
        nll_R = -_log_probabilities_by_autograd(attached, hidden_TH, batch, targets)
        return (nll_R * scale_R).sum(), nll_R.detach()
    return kernels.supervised_loss(*_at_head(attached, hidden_TH, targets), scale_R, attached.spec.final_softcap)


def log_probabilities(attached: Attached, hidden_TH: Tensor, batch: Batch, targets: Targets, temperature: float = 1.0) -> Tensor:
    """log p [R] of the targets, nats, fp32, with the graph. temperature: of the distribution."""
    if _trains(attached, batch):
        return _log_probabilities_by_autograd(attached, hidden_TH, batch, targets, temperature)
    return kernels.log_probabilities(*_at_head(attached, hidden_TH, targets), attached.spec.final_softcap, temperature)


def _at_head(attached: Attached, hidden_TH: Tensor, targets: Targets) -> tuple[Tensor, Matrix, Tensor | None, Tensor]:
    """(the rows that predict a target, the head's matrix and bias, the targets)."""
    return hidden_TH[targets.row_R], attached.head_weight, attached.head_module.bias, targets.target_R


def _trains(attached: Attached, batch: Batch) -> bool:
    """Whether the head is edited, or trained itself."""
    return attached.spec.head in batch.mix.groups or attached.head_weight.trained


def _log_probabilities_by_autograd(
    attached: Attached, hidden_TH: Tensor, batch: Batch, targets: Targets, temperature: float = 1.0
) -> Tensor:
    """With gradients to whatever the head computes with."""
    found = []
    for some, at_one in logits_of(attached, hidden_TH[targets.row_R], batch, targets):
        logits = at_one if temperature == 1.0 else at_one / temperature
        wanted = targets.target_R[some]
        if wanted.dim() == 1:
            found.append(-torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        else:
            found.append(torch.log_softmax(logits, -1).gather(1, wanted))
    return torch.cat(found)


def logits_of(attached: Attached, hidden_RH: Tensor, batch: Batch, targets: Targets) -> Iterator[tuple[slice, Tensor]]:
    """(which targets, their logits [r, V] in fp32), `loss_rows` at a time. hidden_RH: of the rows that predict them."""
    step = kernels.loss_rows(attached.spec.vocab_size, attached.device)
    for a in range(0, len(hidden_RH), step):
        some = slice(a, a + step)
        yield some, attached.head(hidden_RH[some], batch, targets.rows[some]).float()
