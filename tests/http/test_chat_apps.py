"""Requests as Open WebUI (read in its source) and LibreChat (as langchain, which it asks with, writes them) send them, without these
applications: each is answered as the plain request with the same meaning."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.common import BASE, CHAT, Site, events, post
from tests.http.test_tools import sites

__all__ = ["sites"]
PATH = "/v1/chat/completions"
PLAIN = CHAT | {"messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN["messages"]]
SAMPLING = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 6, "frequency_penalty": 0.0, "presence_penalty": 0.0}
OPEN_WEBUI = [
    STREAM | SAMPLING | {"seed": 0, "stop": ["zzz\n"], "logit_bias": {"5": 0}, "response_format": {"type": "text"}},
    STREAM | {"user": {"name": "Ann", "id": "1", "email": "ann@example.com", "role": "user"}, "metadata": {"chat_id": "c"}},
    {"max_tokens": None, "max_completion_tokens": 6, "stream": False},
    STREAM | {"messages": [PLAIN["messages"][0], PARTS[1]]},
]
LIBRECHAT = [
    STREAM | SAMPLING | {"user": "65f0", "n": 1, "messages": PARTS},
    {"stream": False, "user": "65f0", "logprobs": False, "tools": [], "messages": [PLAIN["messages"][0], PARTS[1] | {"name": "ann"}]},
]
TIME = {"type": "object", "properties": {"zone": {"type": "string", "description": "zone"}}, "required": ["zone"]}
TOOL = {"type": "function", "function": {"name": "get_time", "description": "The time", "parameters": TIME}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
]
AGAIN = [
    {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"index": 0, **CALLED}]}, TURNS[2]]},
    {"messages": [*TURNS[:2], TURNS[2] | {"name": "get_time", "content": [{"type": "text", "text": "12:00"}]}]},
    {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": False}}]},
]


def text_of(answer: Any) -> tuple[str, int]:
    """(the text, tokens of the answer), of a stream or of a whole one."""
    assert answer.status_code == 200 and "x-trimtab-ignored" not in answer.headers, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        told = answer.json()
        return told["choices"][0]["message"]["content"] or "", told["usage"]["completion_tokens"]
    *chunks, end = events(answer.text)
    assert end == "[DONE]" and chunks[-1]["choices"] == []
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks[:-1]), chunks[-1]["usage"]["completion_tokens"]


@pytest.mark.parametrize("fields", OPEN_WEBUI + LIBRECHAT)
def test_a_chat_is_answered_as_the_plain_one(served: Site, fields: dict[str, Any]):
    assert text_of(post(served.app, PATH, PLAIN | fields)) == text_of(post(served.app, PATH, PLAIN))


@pytest.mark.parametrize("fields", AGAIN)
def test_results_that_are_sent_back_read_as_the_plain_ones(sites: Any, fields: dict[str, Any]):
    """Their prompts have the same tokens, and so has the answer."""
    body = {"model": BASE, "messages": TURNS, "tools": [TOOL], "temperature": 0, "max_tokens": 6}
    s = sites("qwen2_5")
    plain, sent = (post(s.app, "/tokenize", b).json()["tokens"] for b in (body, body | fields))
    if "tools" not in fields:  # the template writes what it is given of a tool
        assert plain == sent
    assert post(s.app, PATH, body | fields).json()["usage"]["prompt_tokens"] == len(sent)
    assert text_of(post(s.app, PATH, body | fields | STREAM)) == text_of(post(s.app, PATH, body | fields))
