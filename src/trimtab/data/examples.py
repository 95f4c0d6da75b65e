"""Tokenised rows as arrays, made for many rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np

from trimtab.bases.marks import Ids
from trimtab.data.rows import RowId

Run = tuple[int, bool]
"""So many ids, and whether they are supervised."""
Arrays = tuple[np.ndarray, np.ndarray]
"""`ids` and `supervised` of an `Example`."""


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised row. ids: int32 [T]. supervised: bool [T], True for a target: the loss of predicting ids[t] from ids[:t] counts.

    Of a row that a head reads, True for the tokens at which it does; otherwise supervised[0] is always False. Tokens after the last
    supervised one affect no loss. origin: for messages. row: the row's identity.
    role: which of its row's segments this is, to an objective that reads several. others: the other segments of the row, which enter every
    forward and every loss with this one. shared: how many of the first ids, none of them supervised, are also those of the segment before
    this one; a forward computes these rows once.
    """

    ids: np.ndarray
    supervised: np.ndarray
    origin: str
    row: RowId
    role: str = ""
    others: tuple[Example, ...] = ()
    shared: int = 0

    @property
    def segments(self) -> tuple[Example, ...]:
        """The row's segments, this one first."""
        return (self, *self.others)

    @property
    def tokens(self) -> int:
        """Of all segments, shared ones counted once: the rows of a forward."""
        return sum(len(s.ids) - s.shared for s in self.segments)

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(len(s.ids) for s in self.segments)

    @property
    def targets(self) -> int:
        """Supervised tokens of all segments."""
        return sum(int(s.supervised.sum()) for s in self.segments)


@dataclass(frozen=True)
class Joined:
    """A text's ids; which of them are supervised; whether a chat template wrote it; whether it is a prompt alone; whether a
    head reads it."""

    ids: Ids
    runs: Sequence[Run]
    chat: bool
    question: bool
    read: bool = False


def arrays_of(texts: Sequence[Joined | str], max_length: int, vocab_size: int | None, tokenizer: Any) -> list[Arrays | str]:
    """The arrays of each text, parts of one array for all; or why it cannot be trained on. A text that is given as a reason stays one."""
    good = [t for t in texts if isinstance(t, Joined)]
    lengths = np.array([len(t.ids) for t in good], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.fromiter(chain.from_iterable(t.ids for t in good), np.int32, int(bounds[-1]))
    runs = np.array([run for t in good for run in t.runs], dtype=np.int64).reshape(-1, 2)
    supervised = np.repeat(runs[:, 1].astype(bool), runs[:, 0])
    predicted = np.array([not t.read for t in good], dtype=bool)
    all_supervised = predicted & (_counted(supervised, bounds) == lengths)
    supervised[bounds[:-1][predicted & (lengths > 0)]] = False  # nothing stands before the first token to predict it from
    targets = _counted(supervised, bounds)
    beyond = np.zeros(len(good), np.int64) if vocab_size is None else _counted(ids >= vocab_size, bounds)

    def result(i: int, a: int, b: int) -> Arrays | str:
        if beyond[i]:
            large = int(ids[a:b].max())
            token = tokenizer.convert_ids_to_tokens(large)
            return f"token outside the base: {token!r} has id {large}, and the base's embedding has {vocab_size} rows"
        if b - a > max_length:
            return f"over-long: {b - a} tokens, max_length is {max_length}"
        if good[i].chat and all_supervised[i]:
            return "everything supervised: the chat template writes nothing before the answer"
        nothing = not targets[i] and not good[i].question
        return "nothing supervised: no token is left to learn" if nothing else (ids[a:b], supervised[a:b])

    unfit = (beyond > 0) | (lengths > max_length) | all_supervised | (targets == 0)
    made = iter(
        [
            result(i, a, b) if wrong else (ids[a:b], supervised[a:b])
            for i, ((a, b), wrong) in enumerate(zip(pairwise(bounds.tolist()), unfit.tolist(), strict=True))
        ]
    )
    return [t if isinstance(t, str) else next(made) for t in texts]


def _counted(flags: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many are set between each two bounds."""
    total = np.concatenate([[0], np.cumsum(flags)])
    return total[bounds[1:]] - total[bounds[:-1]]


def one_row(segments: Sequence[Example]) -> Example:
    """Segments as one row. Each shares with the one before it the first tokens that both have, but for the token before its first target:
    that target is predicted by a row of its own."""
    found = list(segments[:1])
    for segment in segments[1:]:
        a, b = found[-1].ids, segment.ids
        both = min(len(a), len(b))
        differ = np.flatnonzero(a[:both] != b[:both])
        same = int(differ[0]) if len(differ) else both
        found.append(replace(segment, shared=max(0, min(same, int(segment.supervised.argmax()) - 1))))
    return replace(found[0], others=tuple(found[1:]))
