"""Writes answers in OpenAI's shapes: whole ones, chunks of a stream, log-probabilities, for chat and for completions.

Several hundred chunks are written a second, so the part that all chunks of an answer share is written once. Large answers are written on
another thread, token by token: one call of json.dumps over a large answer would block all other threads.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from trimtab.http.ask import AnswerPlan, top_of, wants_logprobs
from trimtab.http.services import Words
from trimtab.serve.request import Delta, Token, Usage

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""
SPELLINGS = 1 << 15
"""Tokens whose spelling is kept as JSON, of all answers together: some 10 MB."""
SMALL = 2000
"""Log-probabilities that are written on the event loop: a thread costs more than they do."""
CHARS = 100
"""Characters of a text that cost what a log-probability does, at least."""
DONE = b"data: [DONE]\n\n"


@dataclass
class _Logprobs:
    """Writes the log-probabilities of one choice, as JSON. offset: characters of its text so far."""

    chat: bool
    words: Words
    offset: int = 0
    _decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def __call__(self, tokens: tuple[Token, ...]) -> str:
        if self.chat:
            return f'{{"content":[{",".join(map(self._entry, tokens))}],"refusal":null}}'
        offsets = []
        for t in tokens:
            offsets.append(self.offset)
            self.offset += len(self._decoder.decode(self.words.piece(t.id)))
        spelt = ",".join(self._spelt(t.id) for t in tokens)
        logprobs = ",".join(_number(t.logprob) for t in tokens)
        top = ",".join(map(self._top, tokens))
        return f'{{"tokens":[{spelt}],"token_logprobs":[{logprobs}],"top_logprobs":[{top}],"text_offset":{offsets}}}'

    def _spelt(self, token_id: int) -> str:
        return _text(self.words.piece(token_id)) or f'"id:{token_id}"'

    def _top(self, token: Token) -> str:
        told = {self._spelt(i): lp for i, lp in (*token.top, (token.id, token.logprob))}
        return "{" + ",".join(f"{spelt}:{_number(lp)}" for spelt, lp in told.items()) + "}"

    def _entry(self, token: Token) -> str:
        top = ",".join(self._one(i, lp) for i, lp in token.top)
        return f'{self._one(token.id, token.logprob)[:-1]},"top_logprobs":[{top}]}}'

    def _one(self, token_id: int, logprob: float | None) -> str:
        before, after = _around(self.words.piece(token_id))
        return f"{before}{_number(logprob)}{after}"


@lru_cache(SPELLINGS)
def _around(piece: bytes) -> tuple[str, str]:
    """An alternative of a chat, as JSON: what stands before its logprob, and after it."""
    token = json.dumps(piece.decode("utf-8", "replace"))
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


class Writer:
    """Writes one answer. The plan says which shape. aside: runs on another thread what would hold up the event loop."""

    def __init__(self, plan: AnswerPlan, words: Words, fingerprint: str, aside: Callable[[Callable[[], bytes]], Awaitable[bytes]]):
        self._aside, self._each = aside, 1 + top_of(plan.body)
        self.plan, self.chat, self.wants = plan, plan.chat, wants_logprobs(plan.body)
        self.head = {
            "id": plan.id,
            "object": "chat.completion" if plan.chat else "text_completion",
            "created": int(time.time()),
            "model": plan.body.model,
            "system_fingerprint": fingerprint,
        }
        chunk = self.head | ({"object": "chat.completion.chunk"} if plan.chat else {})
        self._start = b"data: " + json.dumps(chunk)[:-1].encode() + b', "choices": ['
        self._end = b'], "usage": null}\n\n' if plan.usage_in_stream else b"]}\n\n"
        self._logprobs = [_Logprobs(plan.chat, words) for _ in range(plan.choices)]
        self._opened: set[int] = set()

    async def whole(self, choices: list[Delta], usage: Usage) -> bytes:
        """The answer in one piece; choices: each one's deltas, merged."""
        return await self._written(choices, lambda: self._whole(choices, usage))

    async def chunks(self, news: Mapping[int, Delta]) -> bytes:
        """The events that tell of what has come of each choice; a slow reader's have gathered."""
        return await self._written(news.values(), lambda: b"".join(c for i, d in news.items() for c in self._chunks(i, d)))

    async def _written(self, deltas: Iterable[Delta], write: Callable[[], bytes]) -> bytes:
        work = sum(len(d.tokens) * self._each * self.wants + len(d.text) // CHARS for d in deltas)
        return write() if work <= SMALL else await self._aside(write)

    def _whole(self, choices: list[Delta], usage: Usage) -> bytes:
        written = []
        for i, d in enumerate(choices):
            content = {"message": {"role": "assistant", "content": d.text, "refusal": None}} if self.chat else {"text": d.text}
            choice = {"index": i, **content, "finish_reason": d.finish}
            written.append(_with_logprobs(choice, self._logprobs[i](d.tokens) if self.wants else None))
        return json.dumps(self.head | {"usage": usage_of(usage)})[:-1].encode() + b', "choices": [' + b", ".join(written) + b"]}"

    def _chunks(self, index: int, delta: Delta) -> Iterator[bytes]:
        """The events that tell of a choice's delta; none where it has nothing to tell."""
        if self.chat and index not in self._opened:
            self._opened.add(index)
            yield self._event(index, {"role": "assistant", "content": ""}, None, None)
        logprobs = self._logprobs[index](delta.tokens) if self.wants and delta.tokens else None
        if not (delta.text or logprobs or delta.finish):
            return
        if not self.chat:
            yield self._event(index, delta.text, logprobs, delta.finish)
            return
        if delta.text or logprobs:
            yield self._event(index, {"content": delta.text}, logprobs, None)
        if delta.finish:
            yield self._event(index, {}, None, delta.finish)

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event before the end that stream_options.include_usage asks for."""
        return self._start + b'], "usage": ' + json.dumps(usage_of(usage)).encode() + b"}\n\n"

    def _event(self, index: int, content: Any, logprobs: str | None, finish: str | None) -> bytes:
        choice = {"index": index, "delta" if self.chat else "text": content, "finish_reason": finish}
        return self._start + _with_logprobs(choice, logprobs) + self._end


def _with_logprobs(choice: dict[str, Any], logprobs: str | None) -> bytes:
    return f'{json.dumps(choice)[:-1]}, "logprobs": {logprobs or "null"}}}'.encode()


def error_chunk(body: dict[str, Any]) -> bytes:
    """An error that comes after the stream has begun: the official client raises it."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage_of(u: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": u.prompt,
        "completion_tokens": u.completion,
        "total_tokens": u.prompt + u.completion,
        "prompt_tokens_details": {"cached_tokens": u.cached},
    }
