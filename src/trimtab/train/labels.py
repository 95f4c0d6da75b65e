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
from trimtab.decode.cached import Fed, continue_prompts
from trimtab.forward.attached import Attached
from trimtab.forward.packs import Mix
from trimtab.train.targets import Targets, log_probabilities

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
    for lot in _groups(ballots, max_tokens):
        group = sorted(lot, key=lambda i: ballots[i].member)  # the order in which a batch lays rows out
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
    """Every prompt once, then its first label, its second, and so on."""
    tails = [[_tail(e, b.shared) for e in b.examples] for b in ballots]
    rounds = [[(i, mine[label]) for i, mine in enumerate(tails) if label < len(mine)] for label in range(max(map(len, tails)))]
    prompts = [_ids(b.examples[0])[: b.shared] for b in ballots]
    ids = [[(i, _ids(e)) for i, e in asked] for asked in rounds]
    forwards = continue_prompts(attached, mix, [b.member for b in ballots], prompts, ids)
    found: list[list[float]] = [[] for _ in ballots]
    for asked, fed in zip(rounds, forwards, strict=True):
        for (i, _), logp in zip(asked, _log_probabilities(fed, [e for _, e in asked]), strict=True):
            found[i].append(logp)
    return found


def _log_probabilities(fed: Fed, tails: Sequence[Example]) -> list[float]:
    """Each piece's sum of log p over its targets, nats. The pieces' rows lie in the order of `tails`."""
    targets = Targets.of([(start, e) for (start, _), e in zip(fed.batch.where, tails, strict=True)], fed.attached.device)
    values = log_probabilities(fed.attached, fed.hidden_TH, fed.batch, targets).tolist()
    return [sum(values[a:b]) for a, b in targets.runs]


def _tail(e: Example, start: int) -> Example:
    return Example(e.ids[start:], e.supervised[start:], e.origin, e.row)


def _ids(e: Example) -> torch.Tensor:
    return torch.from_numpy(e.ids.astype(np.int64))
