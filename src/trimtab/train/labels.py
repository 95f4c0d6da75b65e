"""Classification by likelihood: of all labels, which answer does a contestant hold for the likeliest?

    choice = argmax over labels of log p(label, end of turn | prompt)

The sum over the label's tokens with its end of turn, not their mean: with the end, labels are whole answers, whose probabilities compare
whatever their lengths, and one that begins another is told apart from it. A row's prompt is computed once and kept in the cache; each
label then costs its own tokens only. Log-likelihoods leave the forward as numbers; logits do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.data import Example
from trimtab.forward.attached import Attached
from trimtab.forward.attention import KVCache
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.packs import Mix, PackedAdapter
from trimtab.train.step import Targets, supervised_loss

MAX_SLOTS = 64
"""Prompts in the cache together at most."""


@dataclass(frozen=True)
class Ballot:
    """One row's labels for one member: the examples agree in their first `shared` tokens, and no target lies among these."""

    member: int
    examples: Sequence[Example]

    @property
    def shared(self) -> int:
        """Tokens of the prompt that are computed once. The one before the first target enters with each label: it predicts that target."""
        ids = [e.ids for e in self.examples]
        n = min(min(map(len, ids)), *(int(np.argmax(e.supervised)) for e in self.examples)) - 1
        differ = np.flatnonzero([any(other[t] != ids[0][t] for other in ids[1:]) for t in range(n)])
        return int(differ[0]) if len(differ) else n

    @property
    def longest(self) -> int:
        return max(len(e.ids) for e in self.examples)


@torch.no_grad()
def label_likelihoods(attached: Attached, mix: Mix, ballots: Sequence[Ballot], max_tokens: int) -> list[list[float]]:
    """log p in nats of each ballot's labels; at most max_tokens tokens in a forward (a longer prompt runs alone)."""
    found: list[list[float]] = [[] for _ in ballots]
    for group in _groups(ballots, max_tokens):
        for i, values in zip(group, _together(attached, mix, [ballots[i] for i in group]), strict=True):
            found[i] = values
    return found


def _groups(ballots: Sequence[Ballot], max_tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    tokens = 0
    for i in sorted(range(len(ballots)), key=lambda i: ballots[i].longest):
        if group and (tokens + ballots[i].longest > max_tokens or len(group) == MAX_SLOTS):
            yield group
            group, tokens = [], 0
        group.append(i)
        tokens += ballots[i].longest
    if group:
        yield group


def _together(attached: Attached, mix: Mix, ballots: Sequence[Ballot]) -> list[list[float]]:
    """All prompts in one forward, then one forward for each label, over the same places of the cache."""
    spec, shared = attached.spec, [b.shared for b in ballots]
    virtual = [0 if b.member == BASE else mix.adapters[b.member].virtual_tokens for b in ballots]
    capacity = max(v + b.longest for v, b in zip(virtual, ballots, strict=True))
    cache = KVCache(spec.num_layers, len(ballots), capacity, spec.num_kv_heads, spec.head_dim, attached.dtype, attached.device)
    for slot, b in enumerate(ballots):
        if virtual[slot]:
            cache.put(slot, *_prefix(mix.adapters[b.member]))

    def batch_of(parts: Sequence[tuple[int, np.ndarray, int]]) -> Batch:
        pieces = [Piece(torch.from_numpy(ids.astype(np.int64)), ballots[s].member, s, virtual[s] + past) for s, ids, past in parts]
        return make_batch(pieces, mix, device=attached.device, max_positions=spec.max_positions, cache=cache)

    prompts = [(s, b.examples[0].ids[: shared[s]], 0) for s, b in enumerate(ballots) if shared[s]]
    if prompts:
        attached.forward(batch_of(prompts))
    found: list[list[float]] = [[] for _ in ballots]
    for label in range(max(len(b.examples) for b in ballots)):
        asked = [(s, b.examples[label]) for s, b in enumerate(ballots) if label < len(b.examples)]
        batch = batch_of([(s, e.ids[shared[s] :], shared[s]) for s, e in asked])
        for (s, _), nll in zip(asked, _nlls(attached, batch, [_tail(e, shared[s]) for s, e in asked]), strict=True):
            found[s].append(-nll)
    return found


def _nlls(attached: Attached, batch: Batch, tails: Sequence[Example]) -> list[float]:
    """Each piece's sum of nll over its targets, nats."""
    order = sorted(range(len(tails)), key=lambda i: batch.where[i])
    targets = Targets.of([(batch.where[i][0], tails[i], 1.0) for i in order], attached.device)
    _, nll_R = supervised_loss(attached, attached.forward(batch), batch, targets)
    values, sums = nll_R.tolist(), [0.0] * len(tails)
    for i, (a, b) in zip(order, targets.runs, strict=True):
        sums[i] = sum(values[a:b])
    return sums


def _tail(e: Example, start: int) -> Example:
    return Example(e.ids[start:], e.supervised[start:], e.origin, e.row)


def _prefix(adapter: PackedAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    assert adapter.prefix is not None
    kv = adapter.prefix.kv_LNHD or adapter.kv
    assert kv is not None, "an embedded prefix must be computed when its adapter is packed for inference"
    return kv
