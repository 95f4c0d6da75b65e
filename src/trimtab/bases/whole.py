"""A finished conversation as text, and where in it each answer stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.bases.dialect import Dialect, Finished
from trimtab.bases.shaping import NONE
from trimtab.bases.tool_turns import Message
from trimtab.bases.watched import Beginning


class Whole:
    """A finished conversation as text. openings: what the template writes before each answer's content, once it was asked for."""

    def __init__(self, dialect: Dialect, messages: Sequence[Message], finished: Finished, variables: Mapping[str, Any] = NONE):
        self._dialect, self.messages, self.text, self.variables = dialect, messages, finished.text, variables
        self._beginnings = finished.beginnings
        self.openings: Mapping[int, str] | None = None

    def around(self, index: int) -> tuple[int, str, str]:
        """(n, prompt, upto) of the answer at `index`: what is served before it, and that with the answer, are the first n characters of the
        text with these behind them. BadRow if the template refuses one of them."""
        asked, prompt = self._of(index, True)
        answered, upto = (len(self.text), "") if index == len(self.messages) - 1 else self._of(index + 1, False)
        begin = min(asked, answered)
        return begin, self.text[begin:asked] + prompt, self.text[begin:answered] + upto

    def _of(self, end: int, generate: bool) -> Beginning:
        if (found := self._beginnings.get((end, generate))) is not None:
            return found
        return 0, self._dialect.render(self.messages[:end], generate=generate, variables=self.variables)


def ends_of(marks: Sequence[str], text: str) -> list[int]:
    """Where in `text` each mark and all those before it have ended; behind its end where one of them is missing."""
    ends, last = list[int](), 0
    for mark in marks:
        at = text.find(mark, last)
        at = text.find(mark) if at < 0 else at
        last = at + len(mark) if at >= 0 else len(text) + 1
        ends.append(max([last, *ends[-1:]]))
    return ends
