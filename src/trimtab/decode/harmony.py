"""Reads what gpt-oss writes."""

from __future__ import annotations

from typing import Literal

import regex  # type: ignore[import-untyped]

from trimtab.bases.call_grammar import Schemas
from trimtab.decode.pieces import NAME, Piece, joined

LONGEST_HEADER = 256
"""Characters of a message's header."""


class Harmony:
    """gpt-oss: messages of a header, <|message|> and a body. What goes to functions is a call, the analysis channel is reasoning."""

    MARK, ENDS = "<|message|>", ("<|end|>", "<|call|>", "<|return|>", "<|start|>")

    def __init__(self, tools: Schemas):
        self._tools, self._rest, self._index = tools, "", -1
        self._kind: Literal["content", "reasoning", "arguments"] | None = None  # None: within a header

    def feed(self, text: str) -> list[Piece]:
        self._rest += text
        out: list[Piece] = []
        while self._step(out):
            pass
        return joined(out)

    def finish(self, cut: bool) -> list[Piece]:
        if self._kind is None:
            header, self._rest = self._rest, ""
            plain = header.strip() and not regex.match(r"\s*(?:assistant|to=|<\|)", header)
            return [Piece("content", header)] if plain else []
        text, self._rest = self._rest, ""
        return [Piece(self._kind, text, self._index if self._kind == "arguments" else -1)] if text else []

    def _step(self, out: list[Piece]) -> bool:
        if self._kind is None:
            header, found, rest = self._rest.partition(self.MARK)
            if not found:
                if len(header) > LONGEST_HEADER:
                    self._kind = "content"
                    return True
                return False
            called = regex.search(r"to=functions\." + NAME, header)
            if called is not None and called["name"] in self._tools:
                self._index += 1
                self._kind = "arguments"
                out.append(Piece("call", called["name"], self._index))
            else:
                self._kind = "reasoning" if "analysis" in header else "content"
            self._rest = rest
            return True
        at, end = min(((i, e) for e in self.ENDS if (i := self._rest.find(e)) >= 0), default=(-1, ""))
        kept = 0 if end else max((n for e in self.ENDS for n in range(1, len(e)) if self._rest.endswith(e[:n])), default=0)
        at = at if end else len(self._rest) - kept
        if at:
            out.append(Piece(self._kind, self._rest[:at], self._index if self._kind == "arguments" else -1))
        self._rest = self._rest[at + len(end) :]
        self._kind = None if end else self._kind
        return bool(end)
