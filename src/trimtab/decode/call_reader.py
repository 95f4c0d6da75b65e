"""Reads reasoning between tags, content, and calls behind their opening. The states are in the order in which an answer passes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import regex  # type: ignore[import-untyped]

from trimtab.bases.call_grammar import Schemas
from trimtab.bases.calls import CallFormat
from trimtab.decode.pieces import NAME, Piece, joined
from trimtab.decode.spelling import JsonScan, flexible, lines, once, value_of

LONGEST_MARK = 1024
"""Characters between calls, or before a name, that are waited for: more are no part of a call."""

MOST_BROKEN = 16
"""Calls whose arguments turn out to be none, after which all is content: each is looked through to the end of the answer."""


class CallReader:
    """Reasoning between tags at the beginning, then content, then calls behind their opening."""

    def __init__(self, form: CallFormat | None, tools: Schemas, reasoning: tuple[str, str] | None, *, opened: bool, eager: bool):
        self._form, self._tools, self._tags, self._eager = form, tools, reasoning, eager
        self._rest, self._out, self._last, self._cut = "", list[Piece](), False, False
        # gap: white space before the content that comes next, if any does. trim: there is none before the first content.
        self._index, self._gap, self._trim, self._said = -1, "", reasoning is not None, False
        self._told, self._broken = "", 0
        self._state: Callable[[], bool] = self._content if reasoning is None else self._reasoning if opened else self._begin
        self._raw, self._name, self._arguments, self._scan, self._first, self._tried = "", "", "", JsonScan(), True, 0
        if form is not None:
            self._begins, again = (once(flexible(t) + NAME + flexible(form.middle)) for t in (form.before.lstrip(), form.between or ""))
            self._again = once(r"\s*" + again) if form.between is not None else ""
            self._pattern, self._after = self._begins, once(r"\s*" + flexible(form.after))
            if (tags := form.tagged) is not None:  # a name ends at the first mark: other ways to divide the text are not tried
                self._tag = rf"\s*{lines(tags.key)}(?>(?P<key>.+?){lines(tags.value)})(?P<value>.*?){lines(tags.close)}"

    def feed(self, text: str) -> list[Piece]:
        self._rest += text
        while self._state():
            pass
        out, self._out = self._out, []
        return joined(out)

    def finish(self, cut: bool) -> list[Piece]:
        self._last, self._cut = True, cut
        return self.feed("")

    # Each state takes what it can from the rest. True: the next state goes on.

    def _begin(self) -> bool:
        assert self._tags is not None
        bare = self._rest.lstrip()
        if bare.startswith(self._tags[0]):
            self._rest, self._state = bare[len(self._tags[0]) :], self._reasoning
            return True
        if self._tags[0].startswith(bare) and not self._last:
            return False
        self._state = self._content
        return True

    def _reasoning(self) -> bool:
        assert self._tags is not None
        found = self._rest.find(self._tags[1])
        if found >= 0:
            self._tell("reasoning", self._rest[:found].rstrip())
            self._rest, self._gap, self._state = self._rest[found + len(self._tags[1]) :], "", self._content
            return True
        self._take("reasoning", self._tags[1])
        return False

    def _content(self) -> bool:
        form = self._form
        if form is None or (self._said and not form.anywhere):
            self._take("content", "")
            return False
        if not form.anywhere:
            bare = self._rest.lstrip()
            found = regex.match(self._begins, bare, partial=not self._last and len(bare) <= LONGEST_MARK)
            if found is not None and not found.partial:
                return self._open(0)
            if found is None or self._last:
                self._said = True
                return True
            return False
        at = self._rest.find(form.opening)
        if at >= 0:
            return self._open(at)
        self._take("content", form.opening)
        return False

    def _open(self, at: int) -> bool:
        before, text = self._rest[:at].rstrip(), self._rest[at:].lstrip()
        self._tell("content", before)
        self._gap += self._rest[len(before) : len(self._rest) - len(text)]
        self._rest, self._pattern, self._state = text, self._begins, self._call
        return True

    def _match(self, pattern: str) -> Any:
        """A match at the beginning of the rest, or a part of one if more may come."""
        return regex.match(pattern, self._rest, partial=not self._last and len(self._rest) <= LONGEST_MARK) if pattern else None

    def _call(self) -> bool:
        found = self._match(self._pattern)
        if found is not None and found.partial:
            return False
        if found is None or found["name"] not in self._tools:
            return self._not_a_call()
        self._raw += found[0]
        self._name, self._rest = found["name"], self._rest[found.end() :]
        self._arguments, self._scan, self._first, self._tried = "", JsonScan(), True, 0
        if self._eager:
            self._index += 1
            self._out.append(Piece("call", self._name, self._index))
        assert self._form is not None
        self._state = self._json if self._form.tagged is None else self._tagged
        return True

    def _json(self) -> bool:
        if not self._arguments:
            self._rest = self._rest.lstrip()
        used, done = self._scan(self._rest)
        if used is None:
            return self._not_a_call()
        self._argue(self._rest[:used])
        self._rest = self._rest[used:]
        return self._complete() if done else self._cut_off()

    def _tagged(self) -> bool:
        assert self._form is not None and self._form.tagged is not None
        if self._tried and not self._last and self._form.tagged.close.strip() not in self._rest[max(0, self._tried - LONGEST_MARK) :]:
            self._tried = len(self._rest)
            return False
        found = regex.match(self._tag, self._rest, regex.DOTALL, partial=not self._last)
        self._tried = len(self._rest) if len(self._rest) > LONGEST_MARK else 0
        if found is not None and not found.partial:
            value = value_of(found["value"], found["key"], self._tools[self._name])
            self._argue(("{" if self._first else ", ") + f"{json.dumps(found['key'])}: {value}", found[0])
            self._first, self._tried, self._rest = False, 0, self._rest[found.end() :]
            return True
        ends = [self._match(pattern) for pattern in (self._after, self._again)]
        if any(end is not None and not end.partial for end in ends) or (found is None and not any(ends)):
            whole = any(ends)
            if not whole and not self._last:
                return self._not_a_call()
            if whole or not self._cut:
                self._argue("{}" if self._first else "}", "")
                return self._complete()
            return self._cut_off()
        return False

    def _argue(self, text: str, raw: str | None = None) -> None:
        self._raw += text if raw is None else raw
        self._arguments += text
        if self._eager and text:
            self._out.append(Piece("arguments", text, self._index))

    def _complete(self) -> bool:
        """The arguments of a call are there."""
        if not self._eager:
            try:
                valid = isinstance(json.loads(self._arguments), dict)
            except (ValueError, RecursionError):
                valid = False
            if not valid:
                return self._not_a_call()
            self._tell_call()
        self._raw, self._state = "", self._behind
        return True

    def _cut_off(self) -> bool:
        """An answer that ends within a call."""
        if self._last and not self._eager:
            if not self._cut:
                return self._not_a_call()
            self._tell_call()
        return False

    def _tell_call(self) -> None:
        self._index += 1
        self._out += [Piece("call", self._name, self._index), Piece("arguments", self._arguments, self._index)]

    def _behind(self) -> bool:
        """Another call, or the end of them."""
        assert self._form is not None
        again, end = self._match(self._again), self._match(self._after)
        if again is not None and not again.partial:
            self._pattern, self._state = self._again, self._call
            return True
        if any(found is not None and found.partial for found in (again, end)):
            return False
        self._rest = self._rest[end.end() :] if end is not None else self._rest
        self._raw, self._trim, self._state = "", True, self._content
        return True

    def _not_a_call(self) -> bool:
        """What looked like one is content, from its opening on."""
        assert self._form is not None
        if self._eager and self._raw.strip():  # its name has been told; what follows belongs to nobody
            self._raw, self._rest = "", ""
            return False
        if not self._rest and not self._raw:
            return False
        self._broken += bool(self._raw)
        text = self._raw.lstrip() + self._rest
        if self._pattern != self._begins:  # the end of the call before is no content
            text = text[max(0, text.find(self._form.opening)) :]
        skip = len(self._form.opening) if self._form.anywhere else len(text)
        self._tell("content", text[:skip])
        self._rest, self._raw, self._said, self._state = text[skip:], "", True, self._content
        if self._broken >= MOST_BROKEN:
            self._form = None
        return True

    def _take(self, kind: Literal["content", "reasoning"], mark: str) -> None:
        """All of the rest but its end, if that may begin a mark, and the white space before that, which is left out then."""
        if self._last or not mark:
            kept = 0
        else:
            kept = max((n for n in range(1, len(mark)) if self._rest.endswith(mark[:n])), default=0)
            bare = self._rest[: len(self._rest) - kept]
            kept += len(bare) - len(bare.rstrip())
        text = self._rest[: len(self._rest) - kept]
        self._tell(kind, text.rstrip() if self._last and kind == "reasoning" else text)
        self._rest = self._rest[len(self._rest) - kept :]
        if self._last and self._gap and not self._trim:
            self._out.append(Piece("content", self._gap))

    def _tell(self, kind: Literal["content", "reasoning"], text: str) -> None:
        bare, text = text.lstrip(), self._gap + text
        if not bare:
            self._gap = text
            return
        first = not self._said if kind == "content" else kind != self._told
        self._out.append(Piece(kind, bare if first and (self._trim or kind == "reasoning") else text))
        self._gap, self._told, self._said = "", kind, self._said or kind == "content"
