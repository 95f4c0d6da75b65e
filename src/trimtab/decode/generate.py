"""Generation in one mixed batch with a KV cache: prompts enter flat beside the sequences that decode, and a sequence that
ends makes room for the next.

Every adapter's prefix is written at the start of its sequences' places in the cache, so that decoding does not know of prefixes. A prompt
that several sequences of one adapter have is computed once for those that enter together; the others get a copy of its keys and values.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab import ops
from trimtab.decode.cached import Pages, feed, invoked, virtual_tokens, write_prefix
from trimtab.decode.sampling import choose, greedy
from trimtab.decode.settings import cut_problems
from trimtab.errors import TrimtabError
from trimtab.forward.attached import Attached
from trimtab.forward.batch import BASE, Piece
from trimtab.forward.packs import Mix

MAX_ROWS = 2048
"""Rows of one forward at most: prompts wait for their turn (a longer prompt runs alone)."""
MAX_LIVE = 64
"""Sequences that decode together at most: bounds the cache. A sequence that ends gives its place to the next prompt."""


@dataclass(frozen=True)
class Sampling:
    """max_new_tokens: at most. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. seed: sequence i draws from (seed, i) alone."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(f"temperature = {self.temperature}: must be a finite number, 0 or above")
        problems += cut_problems(self)
        if problems:
            raise TrimtabError("cannot sample like this", problems=problems)


@torch.no_grad()
def generate(
    attached: Attached,
    mix: Mix,
    members: Sequence[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    stop_ids: Collection[int],
    on_token: Callable[[int, int], None] | None = None,
    *,
    generators: Sequence[random.Random] | None = None,
    on_draw: Callable[[Sequence[int], Tensor, Tensor], None] | None = None,
) -> list[list[int]]:
    """New ids of each prompt, without the stop token: max_new_tokens, or fewer where the base has no positions left. TrimtabError where a
    prompt alone does not fit.

    sampling: for all, or of each. generators: of each, instead of the seeds. on_draw(numbers, logits_BV, id_B): called with the prompts of
    each step, what their tokens are drawn from, and the tokens, stop tokens too.
    """
    how = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    sequences = _Sequences(attached, mix, members, prompts, [h.max_new_tokens for h in how])
    generators = generators or [random.Random(h.seed * 1_000_003 + i) for i, h in enumerate(how)]
    new: list[list[int]] = [[] for _ in prompts]
    while sequences.waiting or sequences.live:
        copies = sequences.enter()
        order = list(sequences.live)
        logits_BV = sequences.forward(order, copies)
        id_B = choose(logits_BV, [how[i] for i in order], [generators[i] for i in order])
        if on_draw is not None:
            on_draw(order, logits_BV, id_B)
        if all(greedy(how[i]) for i in order):
            ids = id_B.tolist()
        else:
            ids, finite = ops.to_host([id_B, torch.isfinite(ops.largest(logits_BV)[0])])
            _refuse_not_finite(finite, order, members)
        for i, token in zip(order, ids, strict=True):
            if token not in stop_ids:
                new[i].append(token)
                if on_token is not None:
                    on_token(i, token)
            sequences.go_on(i, token, ends=token in stop_ids or len(new[i]) == how[i].max_new_tokens)
    return new


@dataclass
class _Live:
    """A sequence that has a place in the cache. length: tokens that the cache holds. feed: those that enter next."""

    place: list[int]
    length: int
    feed: Sequence[int]


class _Sequences:
    """The prompts of `generate` and their places in the cache. new_tokens: how many each gets at most.

    waiting: those that have no place yet, the next one last. live: those that have one. runs: the member that runs each; an aLoRA that its
    prompt does not invoke is the base. filled: positions of each prompt, virtual tokens included. longest: those of each sequence at most.
    """

    def __init__(
        self, attached: Attached, mix: Mix, members: Sequence[int], prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]
    ) -> None:
        self.attached, self.mix, self.members, self.prompts = attached, mix, members, prompts
        self.virtual = virtual_tokens(mix, members)
        self.filled = [v + len(p) for v, p in zip(self.virtual, prompts, strict=True)]
        positions, fullest = attached.spec.max_positions, max(self.filled)
        if fullest > positions:
            raise TrimtabError(
                f"prompt {self.filled.index(fullest)} needs {fullest} positions, virtual tokens included; this base has {positions}",
                fix="shorten the prompt",
            )
        self.longest = [min(positions, n + new - 1) for n, new in zip(self.filled, new_tokens, strict=True)]
        self.most = min(len(prompts), MAX_LIVE)
        self.pages = Pages(attached, self.longest, self.most)
        self.runs = list(members)
        self.waiting, self.live = list(range(len(prompts)))[::-1], dict[int, _Live]()

    def enter(self) -> dict[int, int]:
        """Give places to waiting prompts while there is room. Of each that copies another one's keys and values: which that is."""
        rows, first = len(self.live), dict[tuple[int, tuple[int, ...]], int]()
        entered, copies = list[int](), dict[int, int]()
        while self.waiting and len(self.live) < self.most:
            i = self.waiting[-1]
            leader = first.setdefault((self.members[i], tuple(self.prompts[i])), i)
            if leader == i and rows and rows + len(self.prompts[i]) > MAX_ROWS:
                break
            self.live[self.waiting.pop()] = _Live(self.pages.take(i), self.virtual[i], self.prompts[i])
            if leader != i:
                copies[i] = leader
                continue
            rows += len(self.prompts[i])
            entered.append(i)
        self._begin(entered)
        return copies

    def _begin(self, entered: Sequence[int]) -> None:
        """Write what stands in the cache before the rest of a prompt is fed: prefixes, and what an aLoRA's prompt has before it is on."""
        members, places = [self.members[i] for i in entered], [self.live[i].place for i in entered]
        for member, place in zip(members, places, strict=True):
            if member != BASE:
                write_prefix(self.pages.kv, place, self.mix.adapters[member])
        own, read = invoked(self.attached, self.mix, self.pages.kv, members, [self.prompts[i] for i in entered], places)
        for i, member, n in zip(entered, own, read, strict=True):
            self.runs[i], self.live[i].length, self.live[i].feed = member, self.virtual[i] + n, self.prompts[i][n:]

    def forward(self, order: Sequence[int], copies: Mapping[int, int]) -> Tensor:
        """Logits [B, V] after what each sequence is fed. copies: see `enter`; they have the logits of those that they copy."""
        run = {i: n for n, i in enumerate(i for i in order if i not in copies)}
        fed = [(self.live[i], self.runs[i]) for i in run]
        pieces = [Piece(torch.as_tensor(s.feed, dtype=torch.int64), member, s.place, s.length) for s, member in fed]
        logits_BV = feed(self.attached, self.mix, self.pages.kv, pieces).logits([run[copies.get(i, i)] for i in order])
        for i, leader in copies.items():
            self.pages.kv.copy(self.live[leader].place, self.live[i].place, self.filled[i])
            self.runs[i] = self.runs[leader]
        return logits_BV

    def go_on(self, i: int, token: int, ends: bool) -> None:
        """Feed the token next; where the sequence ends, or has no positions left, its place is free."""
        s = self.live[i]
        s.length, s.feed = s.length + len(s.feed), [token]
        if ends or s.length == self.longest[i]:
            self.pages.give_back(self.live.pop(i).place)


def _refuse_not_finite(finite: Sequence[bool], prompts: Sequence[int], members: Sequence[int]) -> None:
    """TrimtabError where there is no distribution to draw from."""
    bad = [i for i, fine in zip(prompts, finite, strict=True) if not fine]
    if bad:
        who = [f"prompt {i}, under {'the base' if members[i] == BASE else f'adapter {members[i]} of the mix'}" for i in bad]
        raise TrimtabError("the logits are not finite, so no token can be drawn", problems=who, fix="look at the adapter: has it diverged?")
