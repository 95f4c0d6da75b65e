"""Generation in one mixed batch with a KV cache: prompts enter flat beside the sequences that decode, and a sequence that
ends makes room for the next.

Every adapter's prefix is written at the start of its sequences' cache slots, so that decoding does not know of prefixes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from trimtab import ops
from trimtab.decode.cached import cache_of, feed, virtual_tokens, write_prefix
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
    sampling: Sampling,
    stop_ids: Collection[int],
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New ids of each prompt, without the stop token: max_new_tokens, or fewer where the base has no positions left. TrimtabError where a
    prompt alone does not fit."""
    spec = attached.spec
    virtual = virtual_tokens(mix, members)
    filled = [v + len(p) for v, p in zip(virtual, prompts, strict=True)]
    if max(filled) > spec.max_positions:
        raise TrimtabError(
            f"prompt {filled.index(max(filled))} needs {max(filled)} positions, virtual tokens included;"
            f" this base has {spec.max_positions}",
            fix="shorten the prompt",
        )
    capacity = min(spec.max_positions, max(filled) + sampling.max_new_tokens - 1)
    slots = min(len(prompts), MAX_LIVE)
    cache = cache_of(attached, slots, capacity)
    generators = [random.Random(sampling.seed * 1_000_003 + i) for i in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    waiting, free, live = list(range(len(prompts)))[::-1], list(range(slots)), dict[int, _Live]()
    while waiting or live:
        rows = len(live)
        while waiting and free and (rows == 0 or rows + len(prompts[waiting[-1]]) <= MAX_ROWS):
            i = waiting.pop()
            live[i] = _Live(free.pop(), virtual[i], prompts[i])
            rows += len(prompts[i])
            if members[i] != BASE:
                write_prefix(cache, live[i].slot, mix.adapters[members[i]])
        order = list(live)
        pieces = [Piece(torch.as_tensor(s.feed, dtype=torch.int64), members[i], s.slot, s.length) for i, s in live.items()]
        logits_BV = feed(attached, mix, cache, pieces).logits(range(len(pieces)))
        id_B = choose(logits_BV, [sampling] * len(order), [generators[i] for i in order])
        if greedy(sampling):
            ids = id_B.tolist()
        else:
            ids, finite = ops.to_host([id_B, torch.isfinite(ops.largest(logits_BV)[0])])
            _refuse_not_finite(finite, order, members)
        for i, token in zip(order, ids, strict=True):
            s = live[i]
            s.length, s.feed = s.length + len(s.feed), [token]
            if token not in stop_ids:
                new[i].append(token)
                if on_token is not None:
                    on_token(i, token)
            if token in stop_ids or len(new[i]) == sampling.max_new_tokens or s.length == capacity:
                free.append(live.pop(i).slot)
    return new


@dataclass
class _Live:
    """A sequence that has a cache slot. length: tokens that the cache holds. feed: those that enter next."""

    slot: int
    length: int
    feed: Sequence[int]


def _refuse_not_finite(finite: Sequence[bool], prompts: Sequence[int], members: Sequence[int]) -> None:
    """TrimtabError where there is no distribution to draw from."""
    bad = [i for i, fine in zip(prompts, finite, strict=True) if not fine]
    if bad:
        who = [f"prompt {i}, under {'the base' if members[i] == BASE else f'adapter {members[i]} of the mix'}" for i in bad]
        raise TrimtabError("the logits are not finite, so no token can be drawn", problems=who, fix="look at the adapter: has it diverged?")
