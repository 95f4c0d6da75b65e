"""Writes answers in OpenAI's shapes: whole ones and chunks of a stream, for chat and for completions.

Several hundred chunks are written a second, so the part that all chunks of an answer share is written once. Large answers are written on
another thread, token by token: one call of json.dumps over a large answer would block all other threads.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from trimtab.decode.answers import Piece, Reader, fed, joined
from trimtab.http.ask import AnswerPlan, prompt_top_of, prompts_of, top_of, wants_logprobs
from trimtab.http.errors import Fault
from trimtab.http.logprobs import Logprobs, prompt_logprobs
from trimtab.http.prompts import text_of
from trimtab.http.schema import ChatBody
from trimtab.http.services import Words
from trimtab.serve.request import Delta, Request, Token, Usage

SMALL = 2000
"""Log-probabilities that are written on the event loop: a thread costs more than they do."""
CHARS = 100
"""Characters of a text that cost what a log-probability does, at least."""
DONE = b"data: [DONE]\n\n"
NO_IDS: Mapping[str, Any] = {}


class Writer:
    """Writes one answer. The plan says which shape. aside: runs on another thread what would hold up the event loop. asked: the engine's
    requests."""

    def __init__(
        self,
        plan: AnswerPlan,
        words: Words,
        fingerprint: str,
        aside: Callable[[Callable[[], bytes]], Awaitable[bytes]],
        readers: Sequence[Reader | None] = (),
        asked: Sequence[Request] = (),
    ):
        self._readers, self._called = list(readers) or [None] * plan.choices, set[int]()
        self._aside, self._each, self._words = aside, 1 + top_of(plan.body), words
        self._older = isinstance(plan.body, ChatBody) and bool(plan.body.functions)
        self._asked, self._prompts = asked, [list[Token]() for _ in range(plan.choices)]
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
        self._made = [0] * plan.choices
        told_as_ids = bool(plan.body.return_tokens_as_token_ids)
        self._logprobs = [Logprobs(plan.chat, words, top_of(plan.body), told_as_ids) for _ in range(plan.choices)]
        self._opened: set[int] = set()

    async def whole(self, choices: list[Delta], usage: Usage) -> bytes:
        """The answer in one piece; choices: each one's deltas, merged."""
        work = sum(self._work(d, len(d.prompt)) for d in choices)
        return await self._written(work, lambda: self._whole(choices, usage))

    async def chunks(self, news: Mapping[int, Delta]) -> bytes:
        """The events that tell of what has come of each choice; a slow reader's have gathered."""
        for i, delta in news.items():
            self._prompts[self._prompt(i)] += delta.prompt
        opening = {i: len(self._prompts[self._prompt(i)]) for i in news if i not in self._opened}
        work = sum(self._work(d, opening.get(i, 0)) for i, d in news.items())
        return await self._written(work, lambda: b"".join(c for i, d in news.items() for c in self._chunks(i, d)))

    async def _written(self, work: int, write: Callable[[], bytes]) -> bytes:
        return write() if work <= SMALL else await self._aside(write)

    def _work(self, delta: Delta, prompt: int) -> int:
        """What a delta costs to write, in log-probabilities; with so many tokens of its prompt."""
        chars = CHARS // 10 if any(self._readers) else CHARS  # a reader looks at each one
        asked = prompt_top_of(self.plan.body)
        return len(delta.tokens) * self._each * self.wants + len(delta.text) // chars + prompt * (0 if asked is None else 1 + asked)

    def _whole(self, choices: list[Delta], usage: Usage) -> bytes:
        written = []
        for i, d in enumerate(choices):
            content = {"message": self._message(i, d)} if self.chat else {"text": self._echoed(i) + d.text}
            choice = {"index": i, **content, "finish_reason": self._finish(i, d)} | self._ids(i, d.tokens)
            more = "" if self.chat else self._of_prompt(i, d)
            written.append(_with_logprobs(choice, self._told(i, d.tokens, d.prompt), more))
        more = self._of_prompt(0, choices[0]) if self.chat else ""
        head = self.head | {"usage": usage_of(usage)}
        return f"{json.dumps(head)[:-1]}{more}".encode() + b', "choices": [' + b", ".join(written) + b"]}"

    def _prompt(self, choice: int) -> int:
        """The number of the engine's request that computes the prompt of a choice which is told."""
        return choice // self.plan.told * self.plan.n

    def _echoed(self, choice: int) -> str:
        """What the text of a choice begins with: its prompt, where that is wanted."""
        body = self.plan.body
        if not body.echo:
            return ""
        if isinstance(body, ChatBody):
            last = body.messages[-1]
            return text_of(last) if last.role == "assistant" else ""
        given = prompts_of(body)[choice // self.plan.told]
        if body.truncate_prompt_tokens is not None:  # what was read of it
            given = list(self._asked[self._prompt(choice)].prompt)
        return given if isinstance(given, str) else b"".join(map(self._words.piece, given)).decode("utf-8", "replace")

    def _told(self, choice: int, tokens: Sequence[Token], prompt: Sequence[Token] = ()) -> str | None:
        """The log-probabilities of a choice's tokens, behind those of the prompt that it begins with; None where none are wanted."""
        if not self.wants:
            return None
        write = self._logprobs[choice]
        if self.chat or not self.plan.body.echo:
            return write(tokens)
        if prompt:  # a start token is no part of the text
            write.offset = len(self._echoed(choice)) - write.length(prompt)
        return write([*prompt, *tokens])

    def _of_prompt(self, choice: int, delta: Delta) -> str:
        """What vLLM's fields tell of a choice's prompt, as more fields."""
        body, told = self.plan.body, ""
        if body.prompt_logprobs is not None:
            told += f', "prompt_logprobs": {prompt_logprobs(delta.prompt, body.prompt_logprobs, self._words)}'
        if body.return_token_ids:
            told += f', "prompt_token_ids": {list(self._asked[self._prompt(choice)].prompt)}'
        return told

    def _ids(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"token_ids": [t.id for t in tokens]} if self.plan.body.return_token_ids else {}

    def _message(self, index: int, delta: Delta) -> dict[str, Any]:
        """A whole answer as a message: content is null where there are calls alone."""
        pieces, calls = self._pieces(index, delta), list[dict[str, Any]]()
        for piece in pieces:
            if piece.kind == "call":
                calls.append(_call() | {"function": {"name": piece.text, "arguments": ""}})
            elif piece.kind == "arguments":
                calls[piece.index]["function"]["arguments"] += piece.text
        if echoed := self._echoed(index):
            pieces = [Piece("content", echoed), *pieces]
        content, reasoning = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("content", "reasoning"))
        message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        message |= {"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {}
        if calls and self._older:
            return message | {"function_call": calls[0]["function"]}
        return message | ({"tool_calls": calls} if calls else {})

    def _pieces(self, index: int, delta: Delta) -> list[Piece]:
        """What a delta's text says."""
        reader = self._readers[index]
        if reader is None:
            return [Piece("content", delta.text)] if delta.text else []
        pieces = joined(fed(reader, delta.text) + (reader.finish(delta.finish != "stop") if delta.finish else []))
        if any(piece.kind == "call" for piece in pieces):
            self._called.add(index)
        return pieces

    def _finish(self, index: int, delta: Delta) -> str | None:
        called = "function_call" if self._older else "tool_calls"
        return called if delta.finish == "stop" and index in self._called else delta.finish

    def _chunks(self, index: int, delta: Delta) -> Iterator[bytes]:
        """The events that tell of a choice's delta; none where it has nothing to tell."""
        if not (delta.text or delta.tokens or delta.finish):
            return
        echoed, prompt, more = "", list[Token](), ""
        if opens := index not in self._opened:
            self._opened.add(index)
            echoed, prompt, more = self._echoed(index), self._prompts[self._prompt(index)], self._of_prompt(index, delta)
        if self.chat and opens:
            yield self._event(index, {"role": "assistant", "content": echoed}, None, None, more=more)
        self._made[index] += len(delta.tokens)
        wanted = self.wants and (delta.tokens or prompt)
        logprobs = self._told(index, delta.tokens, prompt) if wanted else None
        ids = self._ids(index, delta.tokens)
        if not (echoed or delta.text or logprobs or delta.finish or ids):
            return
        if not self.chat:
            yield self._event(index, echoed + delta.text, logprobs, delta.finish, ids, more)
            return
        told = [_told(piece, self._older) for piece in self._pieces(index, delta)] or (
            [{"content": ""}] if logprobs or (ids and delta.tokens) else []
        )
        for i, content in enumerate(told):
            yield self._event(index, content, None if i else logprobs, None, {} if i else ids)
        if delta.finish:
            yield self._event(index, {}, None, self._finish(index, delta))

    async def end(self, usage: Usage) -> bytes:
        """The last events; one tells the usage where stream_options.include_usage asks for it."""
        told = self._start + b'], "usage": ' + json.dumps(usage_of(usage)).encode() + b"}\n\n" if self.plan.usage_in_stream else b""
        return told + DONE

    def failed(self, fault: Fault) -> bytes:
        """The last events of an answer that fails after its stream has begun: the official client raises the error."""
        return b"data: " + json.dumps(fault.body).encode() + b"\n\n" + DONE

    def _event(
        self, index: int, content: Any, logprobs: str | None, finish: str | None, ids: Mapping[str, Any] = NO_IDS, more: str = ""
    ) -> bytes:
        choice = {"index": index, "delta" if self.chat else "text": content, "finish_reason": finish, **ids}
        return self._start + _with_logprobs(choice, logprobs, more) + (self._so_far(index) if self.plan.usage_so_far else self._end)

    def _so_far(self, index: int) -> bytes:
        """The end of an event that tells the usage of its choice until then."""
        usage = Usage(len(self._asked[self._prompt(index)].prompt), self._made[index])
        return b'], "usage": ' + json.dumps(usage_of(usage)).encode() + b"}\n\n"


def _call() -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}


def _told(piece: Piece, older: bool) -> dict[str, Any]:
    """The part of a stream's message that a piece is. older: a call is a function_call."""
    if older and piece.kind in ("call", "arguments"):
        return {"function_call": {"name": piece.text, "arguments": ""} if piece.kind == "call" else {"arguments": piece.text}}
    if piece.kind == "call":
        return {"tool_calls": [{"index": piece.index, **_call(), "function": {"name": piece.text, "arguments": ""}}]}
    if piece.kind == "arguments":
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    return {"reasoning_content": piece.text, "reasoning": piece.text} if piece.kind == "reasoning" else {"content": piece.text}


def _with_logprobs(choice: dict[str, Any], logprobs: str | None, more: str = "") -> bytes:
    return f'{json.dumps(choice)[:-1]}, "logprobs": {logprobs or "null"}{more}}}'.encode()


def usage_of(u: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": u.prompt,
        "completion_tokens": u.completion,
        "total_tokens": u.prompt + u.completion,
        "prompt_tokens_details": {"cached_tokens": u.cached},
    }
