"""One step of a joint run: every live variant's batch, cut into micro-batches, packed into as few forwards as the token budget allows.

A forward computes the rows of several variants on one frozen model; the loss of each row is divided by its own variant's count of
targets, so the sum of all losses gives every variant just the gradient that it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.data import Example
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.packs import Mix
from trimtab.train.variant import MicroBatch, StepBatch, Variant

Item = tuple[Variant, MicroBatch]


def run_step(batches: Mapping[Variant, StepBatch], max_tokens: int) -> dict[Variant, float]:
    """Forward and backward of every batch; gradients are left on the variants' parameters. Returns each variant's loss, mean nats a
    target."""
    losses = dict.fromkeys(batches, 0.0)
    items = [(v, m) for v, b in batches.items() for m in b.micro_batches]
    for group in _pack(items, max_tokens):
        for variant, loss in _run(group, batches).items():
            losses[variant] += loss
    return losses


def _pack(items: Iterable[Item], max_tokens: int) -> list[list[Item]]:
    """Groups for one forward each: one model, at most max_tokens tokens, at most one micro-batch of a variant (its rows must stay one
    span)."""
    groups: list[list[Item]] = []
    for variant, rows in sorted(items, key=lambda item: -item[1].tokens):
        for group in groups:
            same_model = group[0][0].attached is variant.attached
            room = sum(r.tokens for _, r in group) + rows.tokens <= max_tokens
            if same_model and room and all(v is not variant for v, _ in group):
                group.append((variant, rows))
                break
        else:
            groups.append([(variant, rows)])
    return groups


def _run(group: Sequence[Item], batches: Mapping[Variant, StepBatch]) -> dict[Variant, float]:
    """One forward and backward. Returns each variant's part of its loss."""
    packed = [v.pack() for v, _ in group]
    members = _number(packed)
    mix = Mix([p for p in packed if p is not None])
    parts = [Part(m, rows.examples, 1.0 / batches[v].supervised, rows.seed) for (v, rows), m in zip(group, members, strict=True)]
    total, losses = forward_loss(group[0][0].attached, mix, parts)
    total.backward()
    return {v: loss for (v, _), loss in zip(group, losses, strict=True)}


def _number(packed: Sequence[object | None]) -> list[int]:
    members, at = [], 0
    for p in packed:
        members.append(BASE if p is None else at)
        at += p is not None
    return members


@dataclass(frozen=True)
class Part:
    """Examples of one member in one forward. scale: the weight of each target's nll in the loss. seed: of dropout; None where there is
    none."""

    member: int
    examples: Sequence[Example]
    scale: float
    seed: int | None = None


def forward_loss(attached: Attached, mix: Mix, parts: Sequence[Part]) -> tuple[Tensor, list[float]]:
    """(Σ of all parts' losses, with the graph; each part's loss) in one mixed forward. A part's loss is Σ scale · nll over its
    supervised rows."""
    pieces = [Piece(torch.from_numpy(e.ids.astype(np.int64)), p.member) for p in parts for e in p.examples]
    seeds = {p.member: p.seed for p in parts if p.seed is not None and p.member != BASE}
    batch = make_batch(pieces, mix, device=attached.device, max_positions=attached.spec.max_positions, seeds=seeds)
    owners = [(n, e) for n, p in enumerate(parts) for e in p.examples]
    ordered = sorted(((start, n, e) for (start, _), (n, e) in zip(batch.where, owners, strict=True)), key=lambda x: x[0])
    targets = Targets.of([(start, e, parts[n].scale) for start, n, e in ordered], attached.device)
    total, nll_R = supervised_loss(attached, attached.forward(batch), batch, targets)
    scaled, losses = (nll_R * targets.scale_R).tolist(), [0.0] * len(parts)
    for (_, n, _), (a, b) in zip(ordered, targets.runs, strict=True):
        losses[n] += sum(scaled[a:b])
    return total, losses


@dataclass(frozen=True)
class Targets:
    """The supervised rows of a batch, ascending. row_R: the flat row that predicts. target_R: the token it predicts. scale_R: its weight
    in the loss.
    runs: each example's part of R, in the order of rows."""

    row_R: list[int]
    target_R: Tensor
    scale_R: Tensor
    runs: list[tuple[int, int]]

    @classmethod
    def of(cls, examples: Sequence[tuple[int, Example, float]], device: torch.device) -> Targets:
        """examples: (first row, example, scale), in the order of rows. The token at place t is predicted by the row before it; place 0
        is never a target."""
        rows: list[int] = []
        targets: list[int] = []
        scales: list[float] = []
        runs: list[tuple[int, int]] = []
        for start, e, scale in examples:
            places = np.flatnonzero(e.supervised)
            places = places[places > 0]
            runs.append((len(rows), len(rows) + len(places)))
            rows += (start + places - 1).tolist()
            targets += e.ids[places].tolist()
            scales += [scale] * len(places)
        return cls(rows, torch.tensor(targets, device=device), torch.tensor(scales, dtype=torch.float32, device=device), runs)


def supervised_loss(attached: Attached, hidden_TH: Tensor, batch: Batch, targets: Targets) -> tuple[Tensor, Tensor]:
    """(Σ scale · nll, nll_R). The frozen, unedited head forms its gradient in the forward; a head that trains goes through autograd, in
    chunks."""
    hidden_RH = hidden_TH[torch.tensor(targets.row_R, device=hidden_TH.device)]
    head, spec = attached.head_module, attached.spec
    if spec.head not in batch.mix.groups and not head.weight.requires_grad:
        return ops.supervised_loss(hidden_RH, head.weight, head.bias, targets.target_R, targets.scale_R, spec.final_softcap)
    parts = []
    for a in range(0, len(hidden_RH), ops.loss.LOSS_ROWS):
        b = min(a + ops.loss.LOSS_ROWS, len(hidden_RH))
        logits = attached.head(hidden_RH[a:b], batch, targets.row_R[a:b]).float()
        parts.append(torch.nn.functional.cross_entropy(logits, targets.target_R[a:b], reduction="none"))
    nll_R = torch.cat(parts)
    return (nll_R * targets.scale_R).sum(), nll_R.detach()
