"""The losses of several members' rows in one mixed forward, each by its own objective; and such forwards over many rows, without gradients.

Rows whose objective knows their weights beforehand take one pass over the output head, the others two (`ops.loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.data import Example
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.packs import Mix
from trimtab.objectives import Counts, Objective, Segments
from trimtab.ops import loss as kernels
from trimtab.ops.layer import Matrix

Reference = Mapping[Example, Tensor]
"""Segment -> the base's log-probabilities of its supervised tokens, nats, fp32, on the CPU."""


@dataclass(frozen=True)
class Part:
    """Rows of one member in one forward. counts: of all rows over which the loss is a mean. reference: of the rows' segments, where the
    objective needs it. seed: of dropout; None where there is none."""

    member: int
    examples: Sequence[Example]
    objective: Objective
    counts: Counts
    reference: Reference = field(default_factory=dict)
    seed: int | None = None

    @property
    def segments(self) -> list[Example]:
        return [s for e in self.examples for s in e.segments]

    def described(self, device: torch.device) -> Segments:
        """What the objective knows of the segments."""
        targets = tuple(int(s.supervised.sum()) for s in self.segments)
        return Segments(tuple(s.role for s in self.segments), targets, self.counts, device)


@dataclass(frozen=True)
class Outcome:
    """Loss and metrics of some rows; those of parts of the same rows add up."""

    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Outcome) -> Outcome:
        metrics = {k: self.metrics.get(k, 0.0) + other.metrics.get(k, 0.0) for k in {**self.metrics, **other.metrics}}
        return Outcome(self.loss + other.loss, metrics)


@dataclass(frozen=True)
class Unread:
    """The outcomes of a forward's parts, whose numbers are where they were computed. numbers: these, as tensors. told: the outcomes, from
    what `ops.to_host` gives of them. A GPU is waited for where they are read, so a step reads those of all its forwards together."""

    numbers: list[Tensor]
    told: Callable[[Sequence[Any]], list[Outcome]]

    def read(self) -> list[Outcome]:
        return self.told(ops.to_host(self.numbers))


def forward_loss(attached: Attached, mix: Mix, parts: Sequence[Part]) -> tuple[Tensor, Unread]:
    """(Σ of all parts' losses, with the graph; each part's outcome) in one mixed forward."""
    seeds = {p.member: p.seed for p in parts if p.seed is not None and p.member != BASE}
    laid, batch = _lay_out(attached, mix, [(p.member, s) for p in parts for s in p.segments], seeds)
    hidden_TH = attached.forward(batch)
    described = [p.described(attached.device) for p in parts]
    weights = [p.objective.nll_weights(d) for p, d in zip(parts, described, strict=True)]
    of = [n for n, p in enumerate(parts) for _ in p.segments]  # the part of each segment
    order = [(of[i], start, segment) for i, start, segment in laid]
    totals, numbers = list[Tensor](), list[Tensor]()
    places = list[tuple[int, int, int]]()  # (part, begin and end of a segment) in the first of the numbers
    names = dict[int, list[str]]()  # part -> what each of its numbers is
    if known := [(n, start, s) for n, start, s in order if weights[n] is not None]:
        targets = Targets.of([(start, s) for _, start, s in known], attached.device)
        scale_R = torch.cat([w for n in dict.fromkeys(n for n, _, _ in known) if (w := weights[n]) is not None])
        total, nll_R = supervised_loss(attached, hidden_TH, batch, targets, scale_R)
        totals.append(total)
        numbers.append(nll_R * scale_R)
        places = [(n, a, b) for (n, _, _), (a, b) in zip(known, targets.runs, strict=True)]
    if unknown := [(n, start, s) for n, start, s in order if weights[n] is None]:
        targets = Targets.of([(start, s) for _, start, s in unknown], attached.device)
        logp_R = log_probabilities(attached, hidden_TH, batch, targets)
        owners = list(dict.fromkeys(n for n, _, _ in unknown))
        for n, own_R in zip(owners, logp_R.split([sum(described[n].targets) for n in owners]), strict=True):
            loss, metrics = parts[n].objective.loss(own_R, _reference_of(parts[n], attached.device), described[n])
            totals.append(loss)
            names[n] = list(metrics)
            found = [loss, *(torch.as_tensor(m, device=loss.device) for m in metrics.values())]
            numbers.append(torch.stack([f.detach().to(loss.dtype) for f in found]))

    def told(read: Sequence[Any]) -> list[Outcome]:
        losses, rest = [0.0] * len(parts), iter(read)
        scaled = next(rest) if places else []
        for n, a, b in places:
            losses[n] += sum(scaled[a:b])
        outcomes = [Outcome(loss) for loss in losses]
        for n, (loss, *metrics) in zip(names, rest, strict=True):
            outcomes[n] = Outcome(loss, dict(zip(names[n], metrics, strict=True)))
        return outcomes

    return sum(totals[1:], totals[0]), Unread(numbers, told)


def _lay_out(
    attached: Attached, mix: Mix, segments: Sequence[tuple[int, Example]], seeds: Mapping[int, int]
) -> tuple[list[tuple[int, int, Example]], Batch]:
    """((place among `segments`, its first row, segment) in the order of rows, the batch). Segments of a member keep their order, so those
    of a part follow each other."""
    pieces = [Piece(torch.from_numpy(s.ids.astype(np.int64)), member) for member, s in segments]
    batch = make_batch(pieces, mix, device=attached.device, max_positions=attached.spec.max_positions, seeds=seeds)
    laid = [(i, start, s) for i, ((start, _), (_, s)) in enumerate(zip(batch.where, segments, strict=True))]
    return sorted(laid, key=lambda x: x[1]), batch


def _reference_of(part: Part, device: torch.device) -> Tensor | None:
    if not part.objective.needs_reference:
        return None
    return torch.cat([part.reference[s] for s in part.segments]).to(device)


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


def log_probabilities(attached: Attached, hidden_TH: Tensor, batch: Batch, targets: Targets) -> Tensor:
    """log p [R] of the targets, nats, fp32, with the graph."""
    if _trains(attached, batch):
        return _log_probabilities_by_autograd(attached, hidden_TH, batch, targets)
    return kernels.log_probabilities(*_at_head(attached, hidden_TH, targets), attached.spec.final_softcap)


def _at_head(attached: Attached, hidden_TH: Tensor, targets: Targets) -> tuple[Tensor, Matrix, Tensor | None, Tensor]:
    """(the rows that predict a target, the head's matrix and bias, the targets)."""
    return (
        hidden_TH[targets.row_R],
        attached.head_weight,
        attached.head_module.bias,
        targets.target_R,
    )


def _trains(attached: Attached, batch: Batch) -> bool:
    """Whether the head is edited, or trained itself."""
    return attached.spec.head in batch.mix.groups or attached.head_weight.trained


def _log_probabilities_by_autograd(attached: Attached, hidden_TH: Tensor, batch: Batch, targets: Targets) -> Tensor:
    """Chunk by chunk, with gradients to whatever the head computes with."""
    hidden_RH, found = hidden_TH[targets.row_R], []
    for a in range(0, len(hidden_RH), kernels.LOSS_ROWS):
        b = min(a + kernels.LOSS_ROWS, len(hidden_RH))
        logits = attached.head(hidden_RH[a:b], batch, targets.rows[a:b]).float()
        found.append(-torch.nn.functional.cross_entropy(logits, targets.target_R[a:b], reduction="none"))
    return torch.cat(found)


# ---- many rows, without gradients ------------------------------------------------------------


@torch.no_grad()
def mean_losses(attached: Attached, mix: Mix, asked: Sequence[Part], max_tokens: int) -> list[Outcome]:
    """The outcome of each part, all packed together into forwards of at most max_tokens tokens."""
    outcomes = [Outcome()] * len(asked)
    for chunk in _chunks([(n, e) for n, part in enumerate(asked) for e in part.examples], max_tokens):
        _, unread = forward_loss(attached, mix, [replace(asked[n], examples=[e]) for n, e in chunk])
        for (n, _), outcome in zip(chunk, unread.read(), strict=True):
            outcomes[n] += outcome
    return outcomes


@torch.no_grad()
def base_log_probabilities(attached: Attached, examples: Sequence[Example], max_tokens: int) -> Reference:
    """The base's log-probabilities of all segments. A function of these arguments alone, so that a resumed run has the same to the bit."""
    found: dict[Example, Tensor] = {}
    for chunk in _chunks([(0, e) for e in dict.fromkeys(examples)], max_tokens):
        laid, batch = _lay_out(attached, Mix([]), [(BASE, s) for _, e in chunk for s in e.segments], {})
        targets = Targets.of([(start, s) for _, start, s in laid], attached.device)
        logp_R = log_probabilities(attached, attached.forward(batch), batch, targets).cpu()
        found |= {s: logp_R[a:b] for (_, _, s), (a, b) in zip(laid, targets.runs, strict=True)}
    return found


def _chunks(todo: list[tuple[int, Example]], max_tokens: int) -> Iterator[list[tuple[int, Example]]]:
    """Rows of one forward each, the longest first."""
    todo = sorted(todo, key=lambda x: x[1].tokens)
    while todo:
        chunk = [todo.pop()]
        tokens = chunk[0][1].tokens
        while todo and (tokens := tokens + todo[-1][1].tokens) <= max_tokens:
            chunk.append(todo.pop())
        yield chunk
