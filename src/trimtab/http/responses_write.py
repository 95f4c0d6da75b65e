"""Writes answers of /v1/responses: a list of items (reasoning, message, calls), or the events that tell of them as they come.

An item's events stand together: it is added, its part is added, deltas, and then text, part and item are done. `_Open` is the item that is
being written.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.decode.answers import Piece
from trimtab.http.errors import Fault
from trimtab.http.responses_schema import ResponsesBody
from trimtab.http.write import CHARS, Writer
from trimtab.serve.request import Delta, Token, Usage

NAMES = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}
PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


@dataclass
class _Open:
    """kind: the item's type. text: its text so far, or its arguments. call: (call_id, name) of a call."""

    kind: str
    index: int
    call: tuple[str, str] | None = None
    id: str = ""
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{PREFIXES[self.kind]}_{uuid.uuid4().hex}"

    def part(self, text: str, logprobs: list[Any]) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def item(self, status: str) -> dict[str, Any]:
        """As it stands: empty while it is in progress."""
        done = status != "in_progress"
        head = {"id": self.id, "type": self.kind, "status": status}
        if self.call is not None:
            return head | {"call_id": self.call[0], "name": self.call[1], "arguments": self.text if done else ""}
        content = [self.part(self.text, self.logprobs)] if done else []
        more: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        return {**head, "content": content, **more}


class ResponseWriter(Writer):
    """Writes one answer. asked_for: the body that the client sent."""

    def __init__(self, asked_for: ResponsesBody, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.asked_for, self.id, self.created = asked_for, f"resp_{uuid.uuid4().hex}", int(time.time())
        self._items, self._serial = list[dict[str, Any]](), 0
        self._open: _Open | None = None
        self._unsaid = list[Any]()  # log-probabilities of tokens that have added no text yet
        self._finish_reason: str | None = None

    def _whole(self, choices: list[Delta], usage: Usage) -> bytes:
        self._events(choices[0])
        return json.dumps(self._response(usage)).encode()

    async def chunks(self, news: Mapping[int, Delta]) -> bytes:
        delta = news.get(0)
        return b"" if delta is None else await self._written(self._work(delta, 0), lambda: self._opening() + self._events(delta))

    async def end(self, usage: Usage) -> bytes:
        chars = sum(len(part["text"]) for item in self._items for part in item.get("content", ()))  # reasoning is tokenized
        return await self._written(chars // CHARS, lambda: self._ending(usage))

    def _ending(self, usage: Usage) -> bytes:
        response = self._response(usage)
        return self._say(f"response.{response['status']}", response=response)

    def failed(self, fault: Fault) -> bytes:
        error = fault.body["error"]
        told = {"code": "rate_limit_exceeded" if fault.http_status == 429 else "server_error", "message": error["message"]}
        return self._opening() + self._say("response.failed", response=self._response(None) | {"status": "failed", "error": told})

    def _opening(self) -> bytes:
        if self._serial:
            return b""
        return b"".join(self._say(f"response.{name}", response=self._response(None)) for name in ("created", "in_progress"))

    def _events(self, delta: Delta) -> bytes:
        """What a delta adds to the items, as events."""
        told, pieces = list[bytes](), self._pieces(0, delta)
        self._unsaid += self._entries(delta.tokens)
        for piece in pieces:
            told.append(self._add(piece))
        if delta.finish:
            self._finish_reason = delta.finish
            if self._open is None and not self._items:
                told.append(self._begin("message"))
            elif self._unsaid and self._open is not None and self._open.kind == "message":
                told.append(self._add(Piece("content", "")))
            told.append(self._end_item("completed" if delta.finish == "stop" else "incomplete"))
        return b"".join(told)

    def _entries(self, tokens: tuple[Token, ...]) -> list[Any]:
        return json.loads(self._logprobs[0](tokens))["content"] if self.wants and tokens else []

    def _add(self, piece: Piece) -> bytes:
        logprobs, self._unsaid = self._unsaid, []
        if piece.kind == "call":
            return self._begin("function_call", (f"call_{uuid.uuid4().hex[:24]}", piece.text))
        kind = {"content": "message", "reasoning": "reasoning", "arguments": "function_call"}[piece.kind]
        told = self._begin(kind) if self._open is None or self._open.kind != kind else b""
        item = self._open
        assert item is not None
        item.text += piece.text
        more: dict[str, Any] = {} if item.call else {"content_index": 0}
        if kind == "message":
            item.logprobs += logprobs
            more["logprobs"] = logprobs
        return told + self._say(f"response.{NAMES[kind]}.delta", **self._where(item), **more, delta=piece.text)

    def _begin(self, kind: str, call: tuple[str, str] | None = None) -> bytes:
        told = self._end_item("completed")
        item = self._open = _Open(kind, len(self._items), call)
        told += self._say("response.output_item.added", output_index=item.index, item=item.item("in_progress"))
        if call is None:
            told += self._say("response.content_part.added", **self._where(item), content_index=0, part=item.part("", []))
        return told

    def _end_item(self, status: str) -> bytes:
        """The end of the item that is open, if one is."""
        item, self._open = self._open, None
        if item is None:
            return b""
        whole, where, name = item.item(status), self._where(item), f"response.{NAMES[item.kind]}.done"
        self._items.append(whole)
        if item.call is not None:
            told = self._say(name, **where, name=item.call[1], arguments=item.text)
        else:
            more = {"logprobs": item.logprobs} if item.kind == "message" else {}
            told = self._say(name, **where, content_index=0, text=item.text, **more)
            told += self._say("response.content_part.done", **where, content_index=0, part=item.part(item.text, item.logprobs))
        return told + self._say("response.output_item.done", output_index=item.index, item=whole)

    def _where(self, item: _Open) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": item.index}

    def _say(self, kind: str, **content: Any) -> bytes:
        told = {"type": kind, "sequence_number": self._serial, **content}
        self._serial += 1
        return f"event: {kind}\ndata: {json.dumps(told)}\n\n".encode()

    def _response(self, usage: Usage | None) -> dict[str, Any]:
        """The answer as it stands; usage: None while it goes on."""
        body, cut = self.asked_for, self._finish_reason == "length"
        status = "in_progress" if usage is None else "incomplete" if cut else "completed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": body.model,
            "output": list(self._items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None if usage is None else self._usage(usage),
            **body.told_again,
        }

    def _usage(self, usage: Usage) -> dict[str, Any]:
        thought = "".join(part["text"] for item in self._items if item["type"] == "reasoning" for part in item["content"])
        reasoning = len(self._words.encode_text(thought, False, None)) if thought else 0
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }
