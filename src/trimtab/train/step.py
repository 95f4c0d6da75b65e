"""One step of a joint run: every live variant's batch, cut into micro-batches, packed into as few forwards as the token budget allows.

A forward computes the rows of several variants on one frozen model. Each variant's objective turns its own log-probabilities into a part
of a mean over its own optimizer step, so the sum of all losses gives every variant just the gradient that it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab import ops
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.train.losses import Outcome, Part, Unread, forward_loss
from trimtab.train.variant import MicroBatch, StepBatch, Variant

Item = tuple[Variant, MicroBatch]


@dataclass(frozen=True)
class Found:
    """What a step has found of a variant. grad_norm: L2, of all its gradients."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float


def run_step(batches: Mapping[Variant, StepBatch], max_tokens: int) -> dict[Variant, Found]:
    """Forward and backward of every batch; gradients are left on the variants' parameters. All numbers are read at the end, at once."""
    outcomes = {v: Outcome() for v in batches}
    items = [(v, m) for v, b in batches.items() for m in b.micro_batches]
    groups = _pack(items, max_tokens)
    unread = [_run(group, batches) for group in groups]
    numbers = ops.to_host([*(t for u in unread for t in u.numbers), *gradient_norms(list(batches))])
    at = 0
    for group, u in zip(groups, unread, strict=True):
        for (variant, _), outcome in zip(group, u.told(numbers[at : at + len(u.numbers)]), strict=True):
            outcomes[variant] += outcome
        at += len(u.numbers)
    norms = numbers[at:]
    return {v: Found(o.loss, o.metrics, norm) for (v, o), norm in zip(outcomes.items(), norms, strict=True)}


def gradient_norms(variants: Sequence[Variant]) -> list[Tensor]:
    """The L2 norm of each variant's gradients together; 0 where it has none."""
    gradients = [v.gradients() for v in variants]
    each = iter(torch._foreach_norm([g for mine in gradients for g in mine]) if any(gradients) else ())
    return [
        torch.linalg.vector_norm(torch.stack([next(each) for _ in mine])) if mine else torch.zeros((), device=v.attached.device)
        for v, mine in zip(variants, gradients, strict=True)
    ]


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


def _run(group: Sequence[Item], batches: Mapping[Variant, StepBatch]) -> Unread:
    """One forward and backward. Returns each variant's part of its loss."""
    packed = [v.pack() for v, _ in group]
    members = _number(packed)
    mix = Mix([p for p in packed if p is not None])
    parts = [
        Part(m, rows.examples, v.config.objective, batches[v].counts, v.reference, rows.seed)
        for (v, rows), m in zip(group, members, strict=True)
    ]
    total, unread = forward_loss(group[0][0].attached, mix, parts)
    total.backward()
    return unread


def _number(packed: Sequence[object | None]) -> list[int]:
    members, at = [], 0
    for p in packed:
        members.append(BASE if p is None else at)
        at += p is not None
    return members
