"""/v1/responses through the official client, unchanged, on the app itself. What it answers is compared with /v1/chat/completions, and what
the client puts together from a stream with the whole answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.http.common import BASE, CHAT, Caller, Site, error_of, post
from tests.http.test_tools import saying, sites

__all__ = ["sites"]
PATH, ASK = "/v1/responses", {"model": BASE, "input": "hi", "temperature": 0, "max_output_tokens": 6}
SEED: dict[str, Any] = {"extra_body": {"seed": 3}}
PICK = {
    "type": "function",
    "name": "pick",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    },
}
MESSAGE = ["response.output_item.added", "response.content_part.added", "response.output_text.delta", "response.output_text.done",
           "response.content_part.done", "response.output_item.done"]  # fmt: skip
THOUGHT = [e.replace("output_text", "reasoning_text") for e in MESSAGE]
CALL = ["response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.output_item.done"]  # fmt: skip


def through(s: Site, use: Any) -> Any:
    """What `use` gives with an official client of this server."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app=s.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as http:
            return await use(openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0).responses)

    return asyncio.run(run())


def whole_and_streamed(s: Site, **body: Any) -> tuple[Any, list[Any]]:
    """(an answer as a whole, the events of the same in a stream), whose last one holds the same answer."""

    async def events(r: Any) -> list[Any]:
        return [e async for e in await r.create(**(ASK | body), stream=True)]

    whole, told = through(s, lambda r: r.create(**(ASK | body))), through(s, events)
    assert [e.sequence_number for e in told] == list(range(len(told)))
    assert bare(told[-1].response) == bare(whole)
    return whole, told


def bare(response: Any) -> dict[str, Any]:
    """An answer without what differs from one to the next of the same."""
    told = response.to_dict()
    items = without(told["output"], "id", "call_id", "logprob")
    usage = {k: v for k, v in told["usage"].items() if k != "input_tokens_details"}
    return told | {"output": items, "id": 0, "created_at": 0, "usage": usage}


def without(value: Any, *names: str) -> Any:
    """Fields of these names are left out, at any depth: numbers differ by rounding from one run to the next."""
    if isinstance(value, dict):
        return {k: without(v, *names) for k, v in value.items() if k not in names}
    return [without(v, *names) for v in value] if isinstance(value, list) else value


def once(told: list[Any]) -> list[str]:
    """The types of events, deltas that follow each other once."""
    kinds = [e.type for e in told]
    return [k for k, before in zip(kinds, [None, *kinds], strict=False) if not (k == before and k.endswith("delta"))]


def test_an_answer_is_that_of_the_chat_in_openais_events(served: Site):
    chat = post(served.app, "/v1/chat/completions", CHAT).json()
    whole, told = whole_and_streamed(served)
    assert whole.output_text == chat["choices"][0]["message"]["content"] and whole.object == "response"
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat["usage"]["prompt_tokens"], 6)
    assert once(told) == ["response.created", "response.in_progress", *MESSAGE, "response.incomplete"]
    assert "".join(e.delta for e in told if e.type.endswith("delta")) == whole.output_text
    assert told[0].response.status == "in_progress" and told[0].response.output == []
    raw = post(served.app, PATH, ASK | {"stream": True}).text
    assert raw.startswith("event: response.created\ndata: {") and "[DONE]" not in raw


def test_instructions_and_items_are_the_same_conversation(served: Site):
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]}
    items = [{"role": "user", "content": parts}, said, {"role": "user", "content": "d"}]
    more = {"input": items, "instructions": "be brief", "store": False, "metadata": {"k": "v"}}
    whole = through(served, lambda r: r.create(**(ASK | more)))
    turns = [("system", "be brief"), ("user", "a\nb"), ("assistant", "c"), ("user", "d")]
    chat = post(served.app, "/v1/chat/completions", CHAT | {"messages": [{"role": r, "content": c} for r, c in turns]}).json()
    assert whole.output_text == chat["choices"][0]["message"]["content"] and whole.metadata == {"k": "v"} and whole.store is False
    assert whole.usage.input_tokens == chat["usage"]["prompt_tokens"]


def test_log_probabilities(served: Site):
    whole, told = whole_and_streamed(served, include=["message.output_text.logprobs"], top_logprobs=2)
    chat = post(served.app, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}).json()["choices"][0]
    entries, content = [e.to_dict() for e in whole.output[0].content[0].logprobs], chat["logprobs"]["content"]
    assert without(entries, "logprob") == without(content, "logprob")
    assert [e["logprob"] for e in entries] == pytest.approx([c["logprob"] for c in content], abs=1e-4)
    assert [x.token for e in told if e.type.endswith("text.delta") for x in e.logprobs] == [c["token"] for c in chat["logprobs"]["content"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": "e"},
        {"logit_bias": {"70": 100}},
        {"repetition_penalty": 5.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"temperature": 5.0, "top_k": 1},
        {"temperature": 5.0, "min_p": 0.5, "seed": 3},
        {"ignore_eos": True, "min_tokens": 6},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ],
)
def test_tokens_are_chosen_as_in_a_chat(served: Site, fields: dict[str, Any]):
    chat = post(served.app, "/v1/chat/completions", CHAT | {"max_tokens": 6} | fields).json()
    told = post(served.app, PATH, {"model": CHAT["model"], "input": "hi", "temperature": 0, "max_output_tokens": 6} | fields)
    assert told.status_code == 200 and "x-trimtab-ignored" not in told.headers
    assert told.json()["output"][-1]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_a_schema_is_followed_and_parsed(served: Site):
    class Answer(BaseModel):
        kind: Literal["a", "b"]

    got = through(served, lambda r: r.parse(**(ASK | {"max_output_tokens": 300, "temperature": 1.0} | SEED), text_format=Answer))
    assert isinstance(got.output_parsed, Answer) and got.status == "completed"
    json_object = ASK | {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 3}
    assert post(served.app, PATH, json_object).json()["output"][0]["content"][0]["text"].lstrip().startswith("{")


def test_calls_and_their_results(sites: Any):
    s = sites("qwen2_5")
    body = {"tools": [PICK], "tool_choice": "required", "max_output_tokens": 200, "temperature": 1.0} | SEED
    whole, told = whole_and_streamed(s, **body, parallel_tool_calls=False)
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "pick" and set(json.loads(call.arguments)) == {"n"}
    assert once(told) == ["response.created", "response.in_progress", *CALL, "response.completed"]

    async def helped(r: Any) -> Any:
        async with r.stream(**(ASK | body)) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_response()

    assert through(s, helped).output[0].parsed_arguments == json.loads(call.arguments)
    items = [
        {"role": "user", "content": "hi"},
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    after = through(s, lambda r: r.create(**(ASK | {"input": items, "tools": [PICK], "tool_choice": "none"})))
    calls = [{"id": call.call_id, "type": "function", "function": {"name": "pick", "arguments": call.arguments}}]
    turns = [items[0], {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "sunny"}]
    chat = post(s.app, "/v1/chat/completions", CHAT | {"messages": turns}).json()
    assert after.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert after.output_text == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "pick"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "pick"}]},
    ],
)
def test_a_tool_is_chosen_by_name(sites: Any, choice: dict[str, Any]):
    body = {"tools": [PICK, PICK | {"name": "other"}], "tool_choice": choice, "max_output_tokens": 200, "temperature": 1.0} | SEED
    whole, _ = whole_and_streamed(sites("qwen2_5"), **body, parallel_tool_calls=False)
    assert [(item.type, item.name) for item in whole.output] == [("function_call", "pick")]
    assert whole.to_dict()["tool_choice"]["type"] == choice["type"]


def test_reasoning_that_an_answer_was_cut_off_in_is_no_later_turns(sites: Any):
    """An answer of reasoning alone comes back before the next question."""
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I look."}]}
    turns = [{"role": "user", "content": "hi"}, {"role": "user", "content": "well"}, {"role": "assistant", "content": "x"}]
    asked = [[*turns[:1], *cut, *turns[1:]] for cut in ([thought], [])]
    s = sites("qwen3")
    first, second = (through(s, lambda r, a=a: r.create(**(ASK | {"input": a}))) for a in asked)
    assert first.usage.input_tokens == second.usage.input_tokens


@pytest.mark.parametrize("field", ["metadata", "tools", "text"])
def test_a_number_that_json_lacks_is_not_told_again(served: Site, field: str):
    given = {
        "metadata": {"a": "@"},
        "tools": [{"type": "function", "name": "f", "parameters": {"a": "@"}}],
        "text": {"format": {"type": "text", "x": "@"}},
    }
    raw = json.dumps(ASK | {field: given[field], "tool_choice": "none"}).replace('"@"', "1e999").encode()
    assert "too large" in error_of(post(served.app, PATH, raw), 400)["message"]


def test_reasoning_is_an_item_and_comes_back(sites: Any):
    s = sites("qwen3")
    with saying(s, "<think>\nI look.\n</think>\n\nSunny."):
        whole, told = whole_and_streamed(s, max_output_tokens=60)
    assert [item.type for item in whole.output] == ["reasoning", "message"] and whole.output_text.strip() == "Sunny."
    assert whole.output[0].content[0].text.strip() == "I look." and whole.usage.output_tokens_details.reasoning_tokens > 3
    assert once(told) == ["response.created", "response.in_progress", *THOUGHT, *MESSAGE, "response.completed"]
    items = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in whole.output), {"role": "user", "content": "more"}]
    assert through(s, lambda r: r.create(**(ASK | {"input": items}))).status == "incomplete"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 4096, "instructions": "brief"}, "input"),
        ({"tool_choice": {"type": "function", "name": "none_such"}}, "tool"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": "x" * 100_000}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}}, "text.format"),
        ({"model": "nothing"}, "model"),
        ({"n": 2}, "n"),
    ],
)
def test_what_cannot_be_answered_is_named(served: Site, fields: dict[str, Any], param: str):
    response = post(served.app, PATH, ASK | fields)
    error = error_of(response, 404 if "model" in fields else 400)
    assert (error["param"] or "").startswith(param), error


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 5}, "max_tokens: is max_output_tokens here"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages: is input here"),
        ({"response_format": {"type": "json_object"}}, "response_format: is text.format here"),
        ({"min_tokens": 9, "max_output_tokens": 8}, "min_tokens: 9 is more than max_output_tokens"),
        ({"regex": "a", "text": {"format": {"type": "json_object"}}}, "text.format and regex: give one of them"),
    ],
)
def test_a_mistake_is_told_with_this_routes_names(served: Site, fields: dict[str, Any], told: str):
    assert error_of(post(served.app, PATH, ASK | fields), 400)["message"] == told


def test_input_tokens_are_those_that_an_answer_counts(sites: Any):
    """openai's `responses.input_tokens.count`, against the usage of the answer itself."""
    s = sites("qwen2_5")
    said = [{"role": "user", "content": "hi"}, {"type": "function_call", "call_id": "c", "name": "pick", "arguments": '{"n": 1}'},
            {"type": "function_call_output", "call_id": "c", "output": "7"}]  # fmt: skip
    counts = []
    for body in ({"input": "hi"}, {"input": "hi", "instructions": "Be brief"}, {"input": said, "tools": [PICK]},
                 {"input": "hi", "tools": [PICK], "tool_choice": "none"}):  # fmt: skip
        told = through(s, lambda r, body=body: r.input_tokens.count(model=BASE, **body))
        assert told.object == "response.input_tokens"
        counts.append(told.input_tokens)
        assert counts[-1] == through(s, lambda r, body=body: r.create(**(ASK | body))).usage.input_tokens, body
    assert counts[0] == counts[3] != counts[1] and counts[2] > counts[0], "tools that none may call are not told"
    assert s.engine.stats().running == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "x" * 100_000}, "input"),
        ({"model": "nothing"}, "model"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ],
)
def test_what_cannot_be_counted_is_named(served: Site, fields: dict[str, Any], param: str):
    error = error_of(post(served.app, PATH + "/input_tokens", {"model": BASE, "input": "hi"} | fields), 404 if "model" in fields else 400)
    assert error["param"] == param, error


def test_a_failure_within_a_stream_is_told(served: Site, monkeypatch: pytest.MonkeyPatch):
    run, steps = served.engine.runner.__class__.__call__, []

    def breaks(self: Any, feeds: Any) -> Any:
        steps.append(1)
        if len(steps) > 25:
            raise RuntimeError("planted")
        return run(self, feeds)

    monkeypatch.setattr(served.engine.runner.__class__, "__call__", breaks)

    async def events(r: Any) -> list[Any]:
        return [e async for e in await r.create(**(ASK | {"max_output_tokens": 40}), stream=True)]

    last = through(served, events)[-1]
    assert last.type == "response.failed" and last.response.status == "failed" and last.response.error.code == "server_error"


@pytest.mark.parametrize("path", [PATH, "/v1/embeddings"])
def test_a_client_that_leaves_holds_nothing(served: Site, path: str):
    long = ASK | {"input": ["x" * 200] * 60} if path != PATH else ASK | {"max_output_tokens": 400, "stream": True}
    body = {k: v for k, v in long.items() if path == PATH or k in ("model", "input")}

    async def run() -> None:
        c = Caller(served.app, path, body)
        task = c.start()
        async with asyncio.timeout(20):
            while not served.services.admission.open:
                await asyncio.sleep(0)
            c.leave()
            await task
            await served.settled()

    asyncio.run(run())
    served.idle()


@pytest.mark.parametrize("tool", [{"type": "web_search_preview"}, {"type": "mcp", "server_label": "x"}, {"type": "custom", "name": "f"}])
def test_a_tool_that_is_no_function_is_named_with_what_is_supported(served: Site, tool: dict[str, Any]):
    """langchain's `bind_tools` passes OpenAI's own tools on as they are."""
    for path, body in (("/v1/responses", {"model": BASE, "input": "hi"}), ("/v1/chat/completions", CHAT)):
        error = error_of(post(served.app, path, body | {"tools": [tool]}), 400)
        assert error["message"] == f"tools[0]: is of type {tool['type']}; only functions are supported", error
