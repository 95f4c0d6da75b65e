"""OpenAI's shapes of answers: whole ones, the chunks of a stream, log-probabilities; for chat and for completions.

A chunk is written several hundred times a second, so what all chunks of an answer share is written once.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trimtab.http.ask import Plan
from trimtab.http.services import Words
from trimtab.serve.request import Delta, Token, Usage

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""
DONE = b"data: [DONE]\n\n"


@dataclass
class _Logprobs:
    """Writes the log-probabilities of one choice. offset: characters of its text so far."""

    chat: bool
    words: Words
    offset: int = 0
    _decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def __call__(self, tokens: tuple[Token, ...]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._entry(t) for t in tokens], "refusal": None}
        pieces = [self.words.piece(t.id) for t in tokens]
        offsets = []
        for piece in pieces:
            offsets.append(self.offset)
            self.offset += len(self._decoder.decode(piece))
        return {
            "tokens": [self._spelt(t.id) for t in tokens],
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": [{self._spelt(i): _finite(lp) for i, lp in (*t.top, (t.id, t.logprob))} for t in tokens],
            "text_offset": offsets,
        }

    def _spelt(self, token_id: int) -> str:
        """As OpenAI's completions spell what is no text by itself (bytes:\\xe2\\x80), so that no two tokens share a key."""
        piece = self.words.piece(token_id)
        try:
            return piece.decode() or f"id:{token_id}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)

    def _entry(self, token: Token) -> dict[str, Any]:
        return self._one(token.id, token.logprob) | {"top_logprobs": [self._one(i, lp) for i, lp in token.top]}

    def _one(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        piece = self.words.piece(token_id)
        return {"token": _shown(piece), "logprob": _finite(logprob), "bytes": list(piece)}


class Writer:
    """Writes one answer. The plan says which shape; model: the name that the client used."""

    def __init__(self, plan: Plan, words: Words, fingerprint: str):
        self.plan, self.chat, self.wants = plan, plan.chat, bool(plan.body.logprobs) or (plan.body.logprobs == 0 and not plan.chat)
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

    def whole(self, choices: list[Delta], usage: Usage) -> dict[str, Any]:
        """The answer in one piece; choices: each one's deltas, merged."""
        written = []
        for i, d in enumerate(choices):
            logprobs = self._logprobs[i](d.tokens) if self.wants else None
            content = {"message": {"role": "assistant", "content": d.text, "refusal": None}} if self.chat else {"text": d.text}
            written.append({"index": i, **content, "logprobs": logprobs, "finish_reason": d.finish})
        return self.head | {"choices": written, "usage": usage_of(usage)}

    def chunks(self, index: int, delta: Delta) -> Iterator[bytes]:
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

    def _event(self, index: int, content: Any, logprobs: dict[str, Any] | None, finish: str | None) -> bytes:
        choice = {"index": index, "delta" if self.chat else "text": content, "logprobs": logprobs, "finish_reason": finish}
        return self._start + json.dumps(choice).encode() + self._end


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


def _shown(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
