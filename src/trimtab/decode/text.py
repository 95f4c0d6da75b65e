"""Text as it appears: ids in, text out, nothing of which changes later.

Held back is what may still change: half a character, and the start of what may become a stop text. All that comes out, joined, is what the
tokenizer makes of all ids, special tokens skipped, cut before the first stop text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

LONG, SHORT = 32, 8
"""A window of so many tokens is decoded at each token; a longer one begins anew with the last SHORT tokens."""
HALF = "\ufffd"
"""What an incomplete character decodes to."""


class Decoder:
    """A base's tokenizer, as far as text needs it. special: ids that are no text, with what they spell. held: ids of single bytes that the
    tokenizer joins only once a run of them has ended."""

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
            self.decode: Callable[[Sequence[int]], str] = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
        else:  # the same without three layers of Python
            self.decode = lambda ids: backend.decode(ids, skip_special_tokens=True)
        self.special: Mapping[int, str] = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        vocabulary = tokenizer.get_vocab()
        self.held = frozenset(i for token, i in vocabulary.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", token))

    def stream(self, stop: Sequence[str] = (), min_tokens: int = 0, shown: Collection[int] = (), with_stop: bool = False) -> TextStream:
        """The text of one answer. stop: texts that end it, none before min_tokens. shown: special tokens that are text. with_stop: the stop
        text that ends it is part of it."""
        return TextStream(self, stop, min_tokens, shown, with_stop)


class TextStream:
    """The text of one sequence. stopped: a stop text has appeared, and everything from it on is cut off."""

    def __init__(self, decoder: Decoder, stop: Sequence[str], min_tokens: int, shown: Collection[int] = (), with_stop: bool = False):
        self.stopped = False
        self._decoder, self._stop, self._min_tokens, self._shown = decoder, tuple(stop), min_tokens, shown
        self._with_stop = with_stop
        self._window: list[int] = []  # the last tokens; what they decode to begins where a character does
        self._given = 0  # characters of the window's text that have left it
        self._pending = ""  # text that may begin a stop text
        self._count = 0

    def push(self, token: int) -> str:
        """What this token adds to the text that is certain."""
        self._count += 1
        if token in self._decoder.special:
            if token not in self._shown:
                return ""
            fresh = self._decoder.decode(self._window)[self._given :] + self._decoder.special[token]
            self._window, self._given = [], 0
            return self._pass(fresh)
        self._window.append(token)
        if token in self._decoder.held:
            return ""
        text = self._decoder.decode(self._window)
        half = text.endswith(HALF)
        fresh, self._given = text[self._given : len(text) - half], max(self._given, len(text) - half)
        if len(self._window) > LONG:
            self._shorten()
        return self._pass(fresh)

    def finish(self) -> str:
        """What was held back, half characters included; nothing after a stop text."""
        if self.stopped:
            return ""
        text = self._decoder.decode(self._window)[self._given :]
        self._given += len(text)
        out = self._pass(text)
        out, self._pending = out + ("" if self.stopped else self._pending), ""
        return out

    def _pass(self, fresh: str) -> str:
        """Text through the search for stop texts: what is certainly before any."""
        if not self._stop or not fresh:
            return fresh
        if self._count < self._min_tokens:
            return fresh
        text = self._pending + fresh
        found = [(i, i + len(s) if self._with_stop else i) for s in self._stop if (i := text.find(s)) >= 0]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)[1]]
        kept = max(overlap(text, s) for s in self._stop)
        self._pending = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _shorten(self) -> None:
        """Begin the window with its last tokens: all that they decode to has been given but for half a character at the end, of which at
        most three bytes are there, fewer than SHORT tokens hold."""
        window = self._window[-SHORT:]
        if window[0] not in self._decoder.held:
            text = self._decoder.decode(window)
            self._window, self._given = window, len(text) - text.endswith(HALF)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, less than the whole of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
