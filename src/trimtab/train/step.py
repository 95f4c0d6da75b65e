"""One step of a joint run: every live variant's batch, cut into micro-batches, packed into as few forwards as the token budget allows.

A forward computes the rows of several variants on one frozen model. Each variant's objective turns its own log-probabilities into a part
of a mean over its own optimizer step, so the sum of all losses gives every variant just the gradient that it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.train.losses import Outcome, Part, forward_loss
from trimtab.train.variant import MicroBatch, StepBatch, Variant

Item = tuple[Variant, MicroBatch]


def run_step(batches: Mapping[Variant, StepBatch], max_tokens: int) -> dict[Variant, Outcome]:
    """Forward and backward of every batch; gradients are left on the variants' parameters. Returns each variant's loss and metrics."""
    outcomes = {v: Outcome() for v in batches}
    items = [(v, m) for v, b in batches.items() for m in b.micro_batches]
    for group in _pack(items, max_tokens):
        for variant, outcome in _run(group, batches).items():
            outcomes[variant] += outcome
    return outcomes


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


def _run(group: Sequence[Item], batches: Mapping[Variant, StepBatch]) -> dict[Variant, Outcome]:
    """One forward and backward. Returns each variant's part of its loss."""
    packed = [v.pack() for v, _ in group]
    members = _number(packed)
    mix = Mix([p for p in packed if p is not None])
    parts = [
        Part(m, rows.examples, v.config.objective, batches[v].counts, v.reference, rows.seed)
        for (v, rows), m in zip(group, members, strict=True)
    ]
    total, outcomes = forward_loss(group[0][0].attached, mix, parts)
    total.backward()
    return {v: outcome for (v, _), outcome in zip(group, outcomes, strict=True)}


def _number(packed: Sequence[object | None]) -> list[int]:
    members, at = [], 0
    for p in packed:
        members.append(BASE if p is None else at)
        at += p is not None
    return members
