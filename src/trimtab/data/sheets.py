"""Conversations of given roles in pieces, supervised or not, with places for their contents: found once, then filled in for every row.

What a template writes for such roles is known where it never looks at contents (`bases/skeleton.py`). Where answers stand in it is found on
contents that are marks. It holds for all contents without control tokens if

- each answer's prompt begins the finished conversation, whatever the contents,
- an answer ends with a control token,
- the texts between the contents cannot become a part of a control token, together with a content, and no contents that stand side by side
  spell one.

The last two make sure that the control tokens of a rendering are those between the contents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby

from trimtab.bases.marks import Marks
from trimtab.bases.skeleton import Piece, fill
from trimtab.bases.template import BadRow, Message, Template
from trimtab.bases.tool_turns import marked, plain_shape

Pieces = tuple[tuple[str, bool], ...]
"""(text, whether it is supervised), in order."""
Find = Callable[[Sequence[Message], Sequence[int]], tuple[Pieces, str | None]]
"""(messages, answers) -> (pieces, the last answer's end token)."""


@dataclass(frozen=True)
class Sheet:
    """marks: of the places between pieces, where contents have no added tokens; None where they are not known. side_by_side: contents with
    nothing between them, which could spell a control token together."""

    pieces: tuple[tuple[tuple[Piece, ...], bool], ...]
    marks: Marks | None
    side_by_side: tuple[tuple[Piece, ...], ...] = ()

    def filled(self, contents: Sequence[str]) -> Pieces:
        return tuple([("".join(fill(pieces, contents)), supervised) for pieces, supervised in self.pieces])


def sheet_of(template: Template, roles: Sequence[str], answers: Sequence[int], find: Find) -> Sheet | None:
    """None where a row of these roles is to be looked at itself."""
    try:
        skeleton, talk = template.skeleton(roles, answers), marked(plain_shape(roles))
        if skeleton is None or not skeleton.begins_itself:
            return None
        pieces, end = find(talk, answers)
    except BadRow:  # the same will be said of each row
        return None
    places = [piece for piece in skeleton.pieces if not isinstance(piece, str)]
    texts = [piece for piece in skeleton.pieces if isinstance(piece, str)]
    if [i for i, _ in places] != list(range(len(roles))) or any(map(template.special_edges.may_join, texts)):
        return None
    at = re.compile(r"Zq(\d+)qZ")
    found = [(_split(text, at, dict(places)), supervised) for text, supervised in pieces]
    if end is None or [p for several, _ in found for p in several if not isinstance(p, str)] != places:
        return None
    if not all(any(isinstance(p, str) for p in several) for several, _ in found):
        return None
    whole, cuts = "".join(text for text, _ in pieces), list(accumulate(len(text) for text, _ in pieces))[:-1]
    marks = None if any(map(template.added_edges.may_join, texts)) else template.marks(whole, cuts)
    together = (tuple(pieces) for _, pieces in groupby(chain.from_iterable(several for several, _ in found), lambda p: isinstance(p, str)))
    side_by_side = tuple(p for p in together if len(p) > 1 and not isinstance(p[0], str))
    return Sheet(tuple(found), marks if marks and template.spells(whole, marks.added) else None, side_by_side)


def _split(text: str, at: re.Pattern[str], stripped: dict[int, bool]) -> tuple[Piece, ...]:
    between = at.split(text)  # texts, and between them the numbers of the contents
    pieces: list[Piece] = [(int(t), stripped[int(t)]) if i % 2 else t for i, t in enumerate(between)]
    return tuple(p for p in pieces if p)
