"""Waits for what a lazy grammar begins with: until then an answer is free, and no process follows it."""

from __future__ import annotations

from trimtab.decode.text import TextStream, overlap
from trimtab.serve.request import Trigger


class Watch:
    """Called with each token of one answer. Empty until the trigger has come; then the tokens that the grammar is to follow: the trigger's
    own token, or those in which its text stands, with the white space before it where it begins the answer. None of them begins within a
    character: a grammar could not follow that. stream: of the answer's text, control tokens shown."""

    def __init__(self, trigger: Trigger, stream: TextStream):
        self._trigger, self._stream = trigger, stream
        self._text, self._tokens, self._over = "", list[int](), False

    def __call__(self, token: int) -> list[int]:
        trigger = self._trigger
        if trigger.token is not None:
            return [token] if token == trigger.token else []
        if self._over:
            return []
        said = self._stream.push(token)
        self._text += said
        self._tokens.append(token)
        if trigger.at_start:
            self._text = self._text.lstrip()
            self._over = len(self._text) >= len(trigger.text)
            return self._tokens if self._text.startswith(trigger.text) else []
        if trigger.text in self._text:
            return self._tokens
        kept = overlap(self._text, trigger.text)
        self._text = self._text[len(self._text) - kept :]
        if said and not kept:
            self._tokens.clear()
        return []
