"""One step of a joint run: every live variant's batch, cut into micro-batches, packed into few forwards within the token budget.

A forward computes the rows of several variants on one frozen model. Each variant's objective turns its own log-probabilities into a part
of a mean over its own optimizer step, so the sum of all losses gives every variant just the gradient that it would have alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab import ops
from trimtab.data import Example
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.places.shards import shards_of
from trimtab.train.losses import Outcome, Part, Unread, forward_loss
from trimtab.train.measure import probe
from trimtab.train.variant import MicroBatch, StepBatch, Variant, cut

Item = tuple[Variant, MicroBatch]

FULL = 1024
"""Tokens a thread from which on a forward on a CPU gains nothing by rows of further variants: reading the weights is a small part of it,
and what its layers hold between them no longer fits the cache."""


@dataclass(frozen=True)
class Found:
    """What a step has found of a variant. grad_norm: L2, of all its gradients."""

    loss: float
    metrics: dict[str, float]
    grad_norm: float


def run_step(batches: Mapping[Variant, StepBatch], max_tokens: int, place: Place = ONE_PROCESS) -> dict[Variant, Found]:
    """Forward and backward of every batch; gradients are left on the variants' parameters. All numbers are read at the end, at once. A
    variant that takes several steps on its answers remembers their log-probabilities at the first. place: whose ranks take a share of the
    rows each, and have the sums of all rows afterwards."""
    outcomes = {v: Outcome() for v in batches}
    probes = _probe(batches, max_tokens, place)
    groups = _pack(_shared_out(batches, place), max_tokens)
    unread = [_run(group, batches, probes) for group in groups]
    place.add_gradients(_leaves(v) for v in batches)
    numbers = ops.to_host([*(t for u in unread for t in u.numbers), *gradient_norms(list(batches))])
    at, variants = 0, list(batches)
    said: list[tuple[int, list[int], Sequence[float]]] = []  # (variant, numbers of its rows, log-probabilities)
    for group, u in zip(groups, unread, strict=True):
        for (variant, rows), outcome in zip(group, u.told(numbers[at : at + len(u.numbers)]), strict=True):
            outcomes[variant] += outcome
            if outcome.logps and variant.drawn:
                number = {id(row): i for i, row in enumerate(variant.drawn.rows)}
                said.append((variants.index(variant), [number[id(e)] for e in rows.examples], outcome.logps))
        at += len(u.numbers)
    norms = numbers[at:]
    for n, places, logps in place.added([said])[0]:
        drawn = variants[n].drawn
        assert drawn is not None
        variants[n].drawn = drawn.remembering([drawn.rows[i] for i in places], logps)
    summed = place.added(list(outcomes.values()))
    return {v: Found(o.loss, o.metrics, norm) for v, o, norm in zip(outcomes, summed, norms, strict=True)}


def _shared_out(batches: Mapping[Variant, StepBatch], place: Place) -> list[Item]:
    """The micro-batches of this rank: of its share of all variants' rows together."""
    if place.ranks == 1:
        return [(v, m) for v, b in batches.items() for m in b.micro_batches]
    rows = [(v, e, seed) for v, b in batches.items() for m in b.micro_batches for e, seed in zip(m.examples, m.seeds, strict=True)]
    own: dict[Variant, list[tuple[Example, int]]] = {}
    for i in place.share([e.tokens for _, e, _ in rows]):
        v, e, seed = rows[i]
        own.setdefault(v, []).append((e, seed))
    return [
        (v, MicroBatch([mine[i][0] for i in part], [mine[i][1] for i in part]))
        for v, mine in own.items()
        for part in cut([e for e, _ in mine], v.max_tokens)
    ]


def _leaves(v: Variant) -> Iterable[Tensor]:
    """What trains; the gradients of a model of its own are moved to it first."""
    v.gradients()
    return v.trained_params.values()


def gradient_norms(variants: Sequence[Variant]) -> list[Tensor]:
    """The L2 norm of each variant's gradients together; 0 where it has none."""
    gradients = [v.gradients() for v in variants]
    each = iter(torch._foreach_norm([g for mine in gradients for g in mine]) if any(gradients) else ())
    return [
        torch.linalg.vector_norm(torch.stack([next(each) for _ in mine]))
        if mine
        else torch.zeros((), dtype=torch.float32, device=v.attached.device)
        for v, mine in zip(variants, gradients, strict=True)
    ]


def _pack(items: Iterable[Item], max_tokens: int) -> list[list[Item]]:
    """Groups for one forward each: one model, at most max_tokens tokens, none added to one that is full, at most one micro-batch of a
    variant (its rows must stay one span)."""
    groups: list[list[Item]] = []
    full: dict[Attached, float] = {}
    for variant, rows in sorted(items, key=lambda item: -item[1].tokens):
        attached = variant.attached
        if attached not in full:
            full[attached] = _full(attached)
        for group in groups:
            held = sum(r.tokens for _, r in group)
            room = held < full[attached] and held + rows.tokens <= max_tokens
            if group[0][0].attached is attached and room and all(v is not variant for v, _ in group):
                group.append((variant, rows))
                break
        else:
            groups.append([(variant, rows)])
    return groups


def _full(attached: Attached) -> float:
    """From how many tokens on a forward takes no further variant. No bound where each forward has a cost that does not grow with its rows:
    launches on a GPU, matrices that are unpacked or fetched from other ranks."""
    packed = any(not w.stored_dense for w in attached.weights.of.values())
    if attached.device.type != "cpu" or packed or shards_of(attached.model) is not None:
        return math.inf
    return FULL * torch.get_num_threads()


@torch.no_grad()
def _probe(batches: Mapping[Variant, StepBatch], max_tokens: int, place: Place) -> dict[Variant, Tensor]:
    """What the objectives of some variants want to know of a step before its loss, without gradients: variants of one model together."""
    asked = {v: found for v, b in batches.items() if (found := v.config.objective.probes(b.examples))}
    told: dict[Variant, Tensor] = {}
    for attached in dict.fromkeys(v.attached for v in asked):
        who = [v for v in asked if v.attached is attached]
        packed = [v.pack() for v in who]
        mix = Mix([p for p in packed if p is not None])
        sequences = [(member, asked[v]) for member, v in zip(_number(packed), who, strict=True)]
        told |= zip(who, probe(attached, who[0].base, mix, sequences, max_tokens, place), strict=True)
    return told


def _run(group: Sequence[Item], batches: Mapping[Variant, StepBatch], probes: Mapping[Variant, Tensor]) -> Unread:
    """One forward and backward. Returns each variant's part of its loss."""
    packed = [v.pack() for v, _ in group]
    members = _number(packed)
    mix = Mix([p for p in packed if p is not None])
    parts = [
        Part(m, rows.examples, v.config.objective, batches[v].counts, v.reference, probes.get(v), rows.seeds, v.noise(rows))
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
