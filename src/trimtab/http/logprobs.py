"""Writes log-probabilities in OpenAI's two shapes and in vLLM's of a prompt, as JSON, token by token."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from trimtab.http.services import Words
from trimtab.serve.request import Token

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""
SPELLINGS = 1 << 15
"""Tokens whose spelling is kept as JSON, of all answers together: some 10 MB."""


@dataclass
class Logprobs:
    """Writes the log-probabilities of one choice. top: alternatives of each token. as_ids: tokens are told as "token_id:5". offset:
    characters of its text so far."""

    chat: bool
    words: Words
    top: int
    as_ids: bool = False
    offset: int = 0
    _decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def __call__(self, tokens: Sequence[Token]) -> str:
        if self.chat:
            return f'{{"content":[{",".join(map(self._entry, tokens))}],"refusal":null}}'
        offsets = []
        for t in tokens:
            offsets.append(max(0, self.offset))
            self.offset += len(self._decoder.decode(self.words.piece(t.id)))
        spelt = ",".join(self._spelt(t.id) for t in tokens)
        logprobs = ",".join(_number(t.logprob) for t in tokens)
        top = ",".join(map(self._top, tokens))
        return f'{{"tokens":[{spelt}],"token_logprobs":[{logprobs}],"top_logprobs":[{top}],"text_offset":{offsets}}}'

    def length(self, tokens: Sequence[Token]) -> int:
        """Characters of what these tokens spell."""
        return len(b"".join(self.words.piece(t.id) for t in tokens).decode("utf-8", "replace"))

    def _spelt(self, token_id: int) -> str:
        if self.as_ids:
            return f'"token_id:{token_id}"'
        return _text(self.words.piece(token_id)) or f'"id:{token_id}"'

    def _top(self, token: Token) -> str:
        if token.logprob is None:  # the first of a prompt
            return "null"
        told = {self._spelt(i): lp for i, lp in (*token.top[: self.top], (token.id, token.logprob))}
        return "{" + ",".join(f"{spelt}:{_number(lp)}" for spelt, lp in told.items()) + "}"

    def _entry(self, token: Token) -> str:
        top = ",".join(self._one(i, lp) for i, lp in token.top[: self.top])
        return f'{self._one(token.id, token.logprob)[:-1]},"top_logprobs":[{top}]}}'

    def _one(self, token_id: int, logprob: float | None) -> str:
        before, after = _around(self.words.piece(token_id), token_id if self.as_ids else None)
        return f"{before}{_number(logprob)}{after}"


def prompt_logprobs(tokens: Sequence[Token], most: int, words: Words) -> str:
    """Of a prompt, as vLLM tells them: for each token but the first the `most` likeliest and itself, by their ids."""
    told = []
    for t in tokens:
        ranked = {i: (rank, lp) for rank, (i, lp) in enumerate(t.top[:most], 1)}
        if t.logprob is not None:
            ranked.setdefault(t.id, (t.rank, t.logprob))
        each = (
            f'"{i}":{{"logprob":{_number(lp)},"rank":{rank},"decoded_token":{_plain(words.piece(i))}}}' for i, (rank, lp) in ranked.items()
        )
        told.append("null" if t.logprob is None else "{" + ",".join(each) + "}")
    return "[" + ",".join(told) + "]"


@lru_cache(SPELLINGS)
def _plain(piece: bytes) -> str:
    """A token's text as JSON; halves of characters are replaced."""
    return json.dumps(piece.decode("utf-8", "replace"))


@lru_cache(SPELLINGS)
def _around(piece: bytes, token_id: int | None) -> tuple[str, str]:
    """An alternative of a chat, as JSON: what stands before its logprob, and after it. token_id: told in place of its text."""
    token = _plain(piece) if token_id is None else f'"token_id:{token_id}"'
    return f'{{"token":{token},"logprob":', f',"bytes":{list(piece)}}}'


@lru_cache(SPELLINGS)
def _text(piece: bytes) -> str:
    """As OpenAI's completions spell what is no text by itself (bytes:\\xe2\\x80), so that no two tokens share a key; as JSON. Empty for
    what has no bytes."""
    try:
        return json.dumps(piece.decode()) if piece else ""
    except UnicodeDecodeError:
        return json.dumps("bytes:" + "".join(f"\\x{b:02x}" for b in piece))


def _number(logprob: float | None) -> str:
    return "null" if logprob is None else float.__repr__(max(LEAST_LOGPROB, logprob))
