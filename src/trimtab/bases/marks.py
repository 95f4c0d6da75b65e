"""Where beginnings of a text end among its ids, read off the added tokens before them.

The text before an added token, and what it becomes, do not depend on what stands behind it. So the ids of a beginning are those up to the
last added token in it, and those of the few characters from there on, which templates write ("assistant\\n").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Ids = list[int]


@dataclass(frozen=True)
class Marks:
    """added: the ids of all added tokens that a text spells out, in order. ends: of each beginning that is asked for, (how many of them it
    has, at least one; the ids of what it has behind the last of these)."""

    added: Ids
    ends: tuple[tuple[int, Ids], ...]

    def ends_in(self, ids: Ids, places: Sequence[int]) -> list[int] | None:
        """How many of the ids of the text are those of each beginning; None where they do not show it. places: of the added tokens in
        `ids`."""
        if [ids[i] for i in places] != self.added:
            return None
        found = list[int]()
        for k, rest in self.ends:
            end = places[k - 1] + 1
            if rest:
                if ids[end : end + len(rest)] != rest:
                    return None
                end += len(rest)
            found.append(end)
        return found


class Edges:
    """Tells whether a text may be a part of one of these tokens, together with what stands beside it."""

    def __init__(self, tokens: Iterable[str]):
        self._tokens = tuple(tokens)
        self._starts = frozenset(token[:k] for token in self._tokens for k in range(1, len(token)))
        self._stops = frozenset(token[k:] for token in self._tokens for k in range(1, len(token)))
        self._longest = max(map(len, self._tokens), default=0)

    def may_join(self, text: str) -> bool:
        near = range(1, min(len(text), self._longest) + 1)
        if any(text[-k:] in self._starts or text[:k] in self._stops for k in near):
            return True
        return any(text in token[1:-1] for token in self._tokens)
