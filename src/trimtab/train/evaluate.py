"""Scores on held-out rows: the base and every adapter side by side, answering in one mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.attach import Attached
from trimtab.bank import Mix
from trimtab.data import SCORES, Example, valid_json
from trimtab.generate import Sampling, generate
from trimtab.train.step import Part, forward_loss


@dataclass(frozen=True)
class Contestant:
    """Who answers: the base (member BASE) or an adapter of the mix."""

    name: str
    member: int


@dataclass(frozen=True)
class Question:
    """A held-out row as a prompt and the answer that it should get."""

    prompt: Sequence[int]
    reference: str


@torch.no_grad()
def mean_losses(
    attached: Attached, mix: Mix, examples: Sequence[Example], contestants: Sequence[Contestant], max_tokens: int
) -> dict[str, float]:
    """Mean nats a target of each contestant on the same examples."""
    targets = max(1, int(sum(e.supervised.sum() for e in examples)))
    total = {c.name: 0.0 for c in contestants}
    todo = [(c, e) for c in contestants for e in sorted(examples, key=lambda e: len(e.ids))]
    while todo:
        chunk, tokens = [todo.pop()], 0
        while todo and (tokens := tokens + len(chunk[-1][1].ids)) + len(todo[-1][1].ids) <= max_tokens:
            chunk.append(todo.pop())
        _, losses = forward_loss(attached, mix, [Part(c.member, [e], 1.0 / targets) for c, e in chunk])
        for (c, _), loss in zip(chunk, losses, strict=True):
            total[c.name] += loss
    return total


def answers(
    attached: Attached,
    mix: Mix,
    questions: Sequence[tuple[Contestant, Question]],
    stop_ids: set[int],
    decode: Callable[[list[int]], str],
    max_new_tokens: int,
    on_answer: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers, all contestants and questions in one continuous mixed batch. on_answer(tokens so far): called as tokens appear."""
    count = 0

    def token(_: int, __: int) -> None:
        nonlocal count
        count += 1
        if on_answer is not None and count % 64 == 0:
            on_answer(count)

    new = generate(
        attached, mix, [c.member for c, _ in questions], [q.prompt for _, q in questions], Sampling(max_new_tokens), stop_ids, token
    )
    return [decode(ids).strip() for ids in new]


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Every score that texts allow, in percent; the share of valid JSON only where all references are JSON."""
    names = [n for n in SCORES if n != "valid_json" or valid_json(references, references) == 100.0]
    return {n: round(SCORES[n](predictions, references), 2) for n in names}


def compare(
    attached: Attached,
    mix: Mix,
    fields: Mapping[str, Sequence[Contestant]],
    held_out: Mapping[str, tuple[Sequence[Example], Sequence[Question]]],
    stop_ids: set[int],
    decode: Callable[[list[int]], str],
    max_new_tokens: int,
    max_tokens: int,
    on_answer: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """data set -> contestant -> loss, scores and the first predictions. fields: who answers each data set."""
    asked = [(d, c, q) for d in fields for c in fields[d] for q in held_out[d][1]]
    said = answers(attached, mix, [(c, q) for _, c, q in asked], stop_ids, decode, max_new_tokens, on_answer) if asked else []
    result: dict[str, dict[str, Any]] = {}
    for d in fields:
        examples = held_out[d][0]
        losses = mean_losses(attached, mix, examples, fields[d], max_tokens)
        for c in fields[d]:
            mine = [(q.reference, s) for (dd, cc, q), s in zip(asked, said, strict=True) if dd == d and cc == c]
            found = score([s for _, s in mine], [r for r, _ in mine]) if mine else {}
            samples = [{"reference": r, "answer": s} for r, s in mine[:5]]
            result.setdefault(d, {})[c.name] = {"loss": losses[c.name], "rows": len(examples), **found, "samples": samples}
    return result
