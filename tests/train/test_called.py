"""Calls in answers are compared by what they say: the answer that a row trains on is right, in every format, and another one is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.data.test_tools import ARGUMENTS, OPENAI, WEATHER
from tests.laws.test_law13_published import published_tokenizer
from trimtab.data import Example, Row, encode_row, rows
from trimtab.data.calls import canonical
from trimtab.train.called import Called, Caller

TEMPLATES = ("qwen3", "qwen2_5", "qwen3_8", "llama3_1", "glm4moe", "gptoss", "qwen3_5_think")


def _row(arguments: dict[str, Any], *more: dict[str, Any]) -> Row:
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": a}} for a in (arguments, *more)]
    talk = [OPENAI["messages"][0], {"role": "assistant", "content": "", "tool_calls": calls}]
    row = rows.to_row({"messages": talk, "tools": [WEATHER]}, "t.jsonl:1", {}, None)
    assert isinstance(row, Row)
    return row


def _answer(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(the prompt, the supervised answer) of the row."""
    example = encode_row(row, tokenizer, 100_000)
    assert isinstance(example, Example), example
    start = int(example.supervised.argmax())
    return example.ids[:start].tolist(), example.ids[example.supervised].tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_calls_are_read_from_what_is_trained(template: str) -> None:
    tokenizer = published_tokenizer(template)
    called, caller = Called.of(_row(ARGUMENTS)), Caller(tokenizer)
    assert called is not None
    turned = dict(reversed(ARGUMENTS.items()))
    for arguments, right in ((ARGUMENTS, True), (turned, True), (ARGUMENTS | {"city": "Bonn"}, False), ({"city": "Ulm"}, False)):
        prompt, answer = _answer(_row(arguments), tokenizer)
        assert caller.is_right(called, prompt, answer) is right, tokenizer.decode(answer)
    prompt, _ = _answer(_row(ARGUMENTS), tokenizer)
    for said in ("It rains.", "", '{"name": "get_weather"'):
        assert not caller.is_right(called, prompt, tokenizer(said, add_special_tokens=False)["input_ids"])


def test_several_calls_in_any_order() -> None:
    tokenizer, other = published_tokenizer("qwen2_5"), {"city": "Bonn"}
    called = Called.of(_row(ARGUMENTS, other))
    assert called is not None and len(called.wanted) == 2
    caller = Caller(tokenizer)
    assert caller.is_right(called, *_answer(_row(other, ARGUMENTS), tokenizer))
    assert not caller.is_right(called, *_answer(_row(other), tokenizer))
    assert not caller.is_right(called, *_answer(_row(other, ARGUMENTS, other), tokenizer))


def test_a_row_that_makes_no_call_wants_none() -> None:
    tokenizer = published_tokenizer("qwen2_5")
    plain = rows.to_row({"messages": [OPENAI["messages"][0], OPENAI["messages"][3]], "tools": [WEATHER]}, "t.jsonl:1", {}, None)
    without = rows.to_row({"messages": [OPENAI["messages"][0], OPENAI["messages"][3]]}, "t.jsonl:1", {}, None)
    assert isinstance(plain, Row) and isinstance(without, Row) and Called.of(without) is None
    called = Called.of(plain)
    assert called is not None and list(called.wanted) == []
    assert Caller(tokenizer).is_right(called, *_answer(plain, tokenizer))
    assert not Caller(tokenizer).is_right(called, *_answer(_row(ARGUMENTS), tokenizer))


def test_canonical_calls_by_hand() -> None:
    call = {"function": {"name": "f", "arguments": json.dumps({"b": 1.0, "a": [True, None]})}}
    assert canonical([call]) == ['["f", {"a": [true, null], "b": 1}]']
