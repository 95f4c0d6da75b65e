"""What an answer is made of, as readers tell it (`answers.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

PART = 1024
"""Characters that a reader gets at a time: with each part of a call it copies what it has not taken yet."""
NAME = r"(?P<name>[A-Za-z0-9_.\-]{1,128})"
"""A function's name."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What comes next. call: its text is the name of a new call; arguments: of JSON. index: of the call."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    index: int = -1


class Reader(Protocol):
    def feed(self, text: str) -> list[Piece]:
        """The parts that are certain now that this text has come."""
        ...

    def finish(self, cut: bool) -> list[Piece]:
        """The rest. cut: the answer ended for want of room; what it was about to say counts."""
        ...


def joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces of one kind that follow each other as one."""
    found: list[Piece] = []
    for piece in pieces:
        if found and piece.kind != "call" and (found[-1].kind, found[-1].index) == (piece.kind, piece.index):
            piece = Piece(piece.kind, found.pop().text + piece.text, piece.index)
        found.append(piece)
    return found


def fed(reader: Reader, text: str) -> list[Piece]:
    """What a reader makes of a text of any length."""
    return [piece for i in range(0, len(text), PART) for piece in reader.feed(text[i : i + PART])]
