"""Drafts of the next tokens, looked up in a sequence's own tokens: what followed when its last three tokens stood there before (prompt
lookup: Saxena 2023, after Leviathan et al. 2022, arXiv:2211.17192). A step verifies them, and gives the tokens that it would give without.

Each new token is compared with what would have been drafted, whether that ran or not. So a sequence knows how often its drafts are right
without a row being spent on finding out, and one whose drafts do not pay has none.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 3
"""Tokens that must be the same for what followed to be a draft."""
LONGEST = 15
"""Drafted tokens in a step at most."""
LEAST = 0.2
"""A draft that is less likely is none."""
INDEXED = 16_384
"""Tokens before an answer that are looked at: those at its end."""
PRIOR = ((0.5, 0.6, 0.75, 0.9), 3.0)
"""How often a draft is taken to be right before a sequence has shown it, after 0, 1, 2, and more right ones in a row; and how many drafts
this counts as."""
FORGET = 0.93
"""What is seen counts for so much less with each later one."""


class Drafts:
    """The drafts of one sequence. begin: its tokens that are not an answer."""

    __slots__ = ("_after", "_begin", "_read", "_right", "_seen", "_source", "_streak")

    def __init__(self, begin: int):
        self._begin, self._read = begin, max(0, begin - INDEXED)
        self._after: dict[tuple[int, ...], int] = {}  # the last place at which each WIDTH tokens were followed by another
        self._source: int | None = None  # which token the next one is taken to repeat
        self._streak = 0
        self._right, self._seen = [r * PRIOR[1] for r in PRIOR[0]], [PRIOR[1]] * len(PRIOR[0])

    def next(self, tokens: Sequence[int], most: int) -> list[tuple[int, float]]:
        """At most `most` tokens that may follow, each with the probability that it and all before it are right, down to LEAST."""
        self._take_in(tokens)
        found: list[tuple[int, float]] = []
        likely = 1.0
        while self._source is not None and len(found) < min(most, LONGEST):
            level = min(self._streak + len(found), len(self._seen) - 1)
            likely *= self._right[level] / self._seen[level]
            if likely < LEAST:
                break
            at = self._source + len(found)
            found.append((tokens[at] if at < len(tokens) else found[at - len(tokens)][0], likely))  # what repeats itself goes on
        return found

    def _take_in(self, tokens: Sequence[int]) -> None:
        """Tokens that are new since the last time."""
        for at in range(self._read, len(tokens)):
            if self._source is not None and at >= self._begin:
                self._score(tokens[self._source] == tokens[at])
            if at + 1 >= WIDTH:
                key = tuple(tokens[at + 1 - WIDTH : at + 1])
                if self._source is None or at < self._begin:
                    self._source = self._after.get(key)
                self._after[key] = at + 1
        self._read = len(tokens)

    def _score(self, right: bool) -> None:
        """Whether the token that would have been drafted came."""
        level = min(self._streak, len(self._seen) - 1)
        self._right[level] = FORGET * self._right[level] + right
        self._seen[level] = FORGET * self._seen[level] + 1
        assert self._source is not None
        self._source, self._streak = (self._source + 1, self._streak + 1) if right else (None, 0)
