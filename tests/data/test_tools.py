"""Tools, calls, results, reasoning and settings of the chat template in rows are rendered as transformers renders them. Calls are
supervised, results never. The templates are those that TRL ships; what a row means was written down from the formats' own documents.
"""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from tests.data.common import learnt, write_jsonl
from tests.laws.test_law13_published import published_tokenizer
from trimtab.data import Dropped, Example, Row, Source, encode_row, prompt_and_reference, read_source, rows
from trimtab.data.calls import canonical

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ARGUMENTS = {"city": "Ulm", "days": 2}
RESULT = '{"rain": true}'
OPENAI = {
    "messages": [
        {"role": "user", "content": "Rain in Ulm?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "get_weather", "content": RESULT},
        {"role": "assistant", "content": "Yes, it rains."},
    ],
    "tools": [WEATHER],
    "parallel_tool_calls": False,
}
ASKED, SAID = {"from": "human", "value": "Rain in Ulm?"}, {"from": "gpt", "value": "Yes, it rains."}
SHAREGPT_CALL = {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": ARGUMENTS})}
SAME: dict[str, dict[str, Any]] = {
    "arguments as an object, tools as text": {
        "messages": [
            OPENAI["messages"][0],
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}]},
            {"role": "tool", "name": "get_weather", "content": {"rain": True}},
            OPENAI["messages"][3],
        ],
        "tools": json.dumps([WEATHER]),
    },
    "OpenAI's older functions": {
        "messages": [
            OPENAI["messages"][0],
            {"role": "assistant", "content": "", "function_call": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}},
            {"role": "function", "name": "get_weather", "content": RESULT},
            OPENAI["messages"][3],
        ],
        "functions": [WEATHER["function"]],
    },
    "ShareGPT, as LLaMA-Factory's glaive_toolcall has it": {
        "conversations": [ASKED, SHAREGPT_CALL, {"from": "observation", "value": RESULT}, SAID],
        "tools": json.dumps([WEATHER["function"]]),
    },
    "a list of calls in a ShareGPT turn": {
        "conversations": [
            ASKED,
            {"from": "function_call", "value": json.dumps([json.loads(SHAREGPT_CALL["value"])])},
            {"from": "observation", "value": RESULT},
            SAID,
        ],
        "tools": [WEATHER],
    },
    "prompt and completion": {"prompt": OPENAI["messages"][:1], "completion": OPENAI["messages"][1:], "tools": [WEATHER]},
    "columns of nulls, as Arrow has them": {
        "messages": [{"tool_calls": None, "name": None, "tool_call_id": None, "function_call": None, **m} for m in OPENAI["messages"]],
        "tools": [WEATHER | {"extra": None}],
        "functions": None,
    },
    "bare functions among tools that have a type": {
        "messages": OPENAI["messages"],
        "tools": [{"type": None, "function": None, **WEATHER["function"]}],
    },
}
ASK = OPENAI["messages"][0]
TEMPLATES = ("qwen3", "qwen2_5", "qwen3_8", "llama3_1", "glm4moe", "gptoss", "qwen3_5_think")


def to_row(record: dict[str, Any]) -> Row | str:
    row = rows.to_row(json.loads(json.dumps(record)), "t.jsonl:1", {}, None)
    return row if isinstance(row, Row) else row.reason


def example_of(record: dict[str, Any], template: str) -> tuple[Example, Any]:
    tokenizer = published_tokenizer(template)
    row = to_row(record)
    assert isinstance(row, Row), row
    example = encode_row(row, tokenizer, 100_000)
    assert isinstance(example, Example), example
    return example, tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_calls_are_learnt_as_they_are_served(template: str) -> None:
    example, tokenizer = example_of(OPENAI, template)
    talk = OPENAI["messages"]
    loaded = [{**m, "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}]} if i == 1 else m
              for i, m in enumerate(talk)]  # fmt: skip
    loaded[1]["content"] = ""
    text = "".join(str(learnt(s, tokenizer)) for s in example.segments)
    assert "get_weather" in text and "Ulm" in text and "Yes, it rains." in text
    assert 'rain"' not in text and "Of a city" not in text, "results and tools are never supervised"
    first, last = example.segments[0], example.segments[-1]
    for segment, n in ((first, 1), (last, 3)):
        prompt = tokenizer.apply_chat_template(loaded[:n], tools=[WEATHER], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert segment.ids[: len(ids)].tolist() == ids
        assert segment.supervised[len(ids)] and not segment.supervised[len(ids) - 1]


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("template", ["qwen3", "llama3_1"])
def test_all_formats_mean_the_same(form: str, template: str) -> None:
    (a, tokenizer), (b, _) = example_of(OPENAI, template), example_of(SAME[form], template)
    for s, t in zip(a.segments, b.segments, strict=True):
        assert tokenizer.decode(s.ids) == tokenizer.decode(t.ids) and (s.supervised == t.supervised).all()


def test_tools_decide_the_prompt_and_the_cache() -> None:
    with_tools, _ = example_of(OPENAI, "qwen3")
    other = OPENAI | {"tools": [WEATHER | {"function": WEATHER["function"] | {"description": "Another"}}]}
    assert with_tools.ids.tolist() != example_of(other, "qwen3")[0].ids.tolist()
    a, b = to_row(OPENAI), to_row(other)
    assert isinstance(a, Row) and isinstance(b, Row) and a.content_key != b.content_key


def test_a_call_is_what_evaluation_asks_for() -> None:
    tokenizer = published_tokenizer("qwen2_5")
    row = to_row({"messages": OPENAI["messages"][:2], "tools": [WEATHER]})
    assert isinstance(row, Row)
    prompt, reference = prompt_and_reference(row, tokenizer)
    assert "get_weather" in tokenizer.decode(prompt) and reference.startswith("<tool_call>") and '"Ulm"' in reference


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "not JSON"}, "tools: text that is not JSON"),
        ({"tools": [{"type": "retrieval"}]}, "tools: tools[0] is no function"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "has no name"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "no JSON",
        ),
        ({"messages": [ASK, {"role": "function_call", "content": "free text"}]}, "text that is not JSON"),
        (
            {"messages": [ASK, OPENAI["messages"][1] | {"function_call": {"name": "f", "arguments": "{}"}}]},
            "has both tool_calls and function_call",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "content": "a", "reasoning": "one", "thinking": "other"}]},
            "has reasoning and thinking, and they differ",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": OPENAI["messages"][1]["tool_calls"]}, OPENAI["messages"][3]]},
            "tool calls",
        ),
    ],
)
def test_what_is_no_call_is_dropped(change: dict[str, Any], reason: str) -> None:
    assert reason in str(to_row(OPENAI | change))


def nested(levels: int) -> dict[str, Any]:
    return {"a": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("\ud800", "not Unicode: lone surrogate"),
        ("\0", "control character"),
        ({"\ud800": 1}, "not Unicode"),
        (nested(200), "nested too deeply"),
        (nested(480), "nested too deeply"),
        (float("nan"), "not JSON: "),
        (b"x", "not JSON: "),
        (date(2026, 1, 2), "not JSON: "),
    ],
)
@pytest.mark.parametrize("place", ["arguments", "tools", "result", "settings"])
def test_what_is_not_json_is_dropped_and_ends_no_run(value: Any, reason: str, place: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": value}}}]}
    tool = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"default": value}}}}
    changes: dict[str, dict[str, Any]] = {
        "arguments": {"messages": [ASK, call]},
        "tools": {"tools": [tool]},
        "result": {"messages": [ASK, {"role": "tool", "content": {"rain": value}}, {"role": "assistant", "content": "a"}]},
        "settings": {"chat_template_kwargs": {"enable_thinking": [value]}},
    }
    found = rows.to_row(OPENAI | changes[place], "t.jsonl:1", {}, None)
    assert isinstance(found, Dropped) and found.reason.startswith(reason), found


def test_a_base_without_tools_says_so() -> None:
    row = to_row(OPENAI)
    assert isinstance(row, Row)
    found = encode_row(row, published_tokenizer("phi3"), 100_000)
    assert isinstance(found, Dropped) and found.kind in ("tools", "tool calls"), found


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", ["qwen3", "gptoss", "deepseek_r1_distill"])
def test_reasoning_beside_the_content(key: str, template: str) -> None:
    record = {"messages": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42", key: "six times seven: 42"}]}
    example, tokenizer = example_of(record, template)
    text = str(learnt(example, tokenizer))
    assert text.index("six times seven: 42") < text.rindex("42") > text.index(": 42") + 2


def test_settings_of_the_template() -> None:
    talk = {"messages": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42"}]}
    tokenizer = published_tokenizer("qwen3")
    of_csv: dict[str, Any] = {"enable_thinking": "false"}  # its cells are text
    for setting in ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}, of_csv):
        example, _ = example_of(talk | setting, "qwen3")
        want = tokenizer.apply_chat_template(talk["messages"][:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert tokenizer.decode(example.ids[: int(example.supervised.argmax())]) == want
    assert "neither true nor false" in str(to_row(talk | {"enable_thinking": "maybe"}))
    row = to_row(talk | {"chat_template_kwargs": {"no_such": 1}})
    assert isinstance(row, Row)
    found = encode_row(row, tokenizer, 1000)
    assert isinstance(found, Dropped) and "does not read no_such" in found.reason


def test_a_mapped_column_of_tools(tmp_path: Any) -> None:
    write_jsonl(tmp_path / "t.jsonl", [{"talk": OPENAI["messages"], "functions_there_are": json.dumps([WEATHER]), "id": 1}])
    notes: list[str] = []
    source = Source("t.jsonl", columns={"messages": "talk", "tools": "functions_there_are"})
    (row,), _ = read_source(source, tmp_path, 0, notes.append)
    assert [t["function"]["name"] for t in row.tools] == ["get_weather"] and notes == ["t.jsonl: not used: id (1 row)"]


def test_calls_are_compared_by_what_they_say() -> None:
    def call(name: str, **arguments: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    assert canonical([call("f", a=1, b=[2.0]), call("g")]) == canonical([call("g"), call("f", b=[2], a=1.0)])
    assert canonical([call("f", a=1)]) != canonical([call("f", a="1")]) != canonical([call("f", a=1), call("f", a=1)])
