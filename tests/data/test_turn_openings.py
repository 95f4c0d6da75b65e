"""Where an answer begins if its prompt opens, or closes, reasoning that the finished text does not have, or if an earlier turn changes once
it is answered. The prompt is transformers' own; the answers were written by hand.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.common import learnt
from tests.laws.test_law13_published import published_tokenizer
from tests.tiny import tiny_tokenizer
from trimtab.data import Dropped, Example, Row, encode_row

CALL = {"type": "function", "function": {"name": "rain", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "rain", "description": "", "parameters": {"type": "object", "properties": {}}}}
ASKED = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "n"}  # both stand in the tags of reasoning, too
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "rain", "content": "1"}
THOUGHT = {"role": "assistant", "content": "Dry.", "reasoning_content": "it said one"}


def template(asks: str, begins: str) -> str:
    """asks: what stands behind the header of the turn that is asked for. begins: before a finished answer."""
    return (
        "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant' }}" + begins + "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '[' + c.function.name + ' ' + (c.function.arguments | tojson) + ']' }}{% endfor %}{{ '<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}" + asks + "{% endif %}"
    )


WAYS = {
    "opened, and closed by an answer without reasoning": (template("<think>", "</think>"), "</think>"),
    "opened, and left out": (template("<think>\n", "\n"), ""),
    "opened and closed, and left out": (template("<think></think>\n", ""), ""),
    "closed by a token, and left out": (template("<|pad|>", ""), ""),
}


def prompts_and_answers(messages: list[dict[str, Any]], tokenizer: Any, tools: list[dict[str, Any]]) -> list[tuple[str, str]]:
    example = encode_row(Row("r:1", messages=tuple(messages), tools=tuple(tools)), tokenizer, 10_000)
    assert isinstance(example, Example), example
    return [(tokenizer.decode(s.ids[: s.supervised.argmax()].tolist()), str(learnt(s, tokenizer))) for s in example.segments]


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_begins_where_its_turn_does(way: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, begins = WAYS[way]
    talk, tools = [ASKED, SAID, ASKED, CALLED, RESULT, SAID], [TOOL]
    found = prompts_and_answers(talk, tokenizer, tools)
    asked = [tokenizer.apply_chat_template(talk[:i], tools=tools, tokenize=False, add_generation_prompt=True) for i in (1, 3, 5)]
    said = [f"{begins}{x}<|im_end|>" for x in ("n", '[rain {"city": "Ulm"}]', "n")]
    assert found == list(zip(asked, said, strict=True))


def test_another_header_is_no_opening() -> None:
    """What is asked for under one name and finished under another is no answer that can be told."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template("<|pad|>", "").replace("'<|im_start|>assistant' }}<|pad|>", "'<|im_start|>model' }}<|pad|>")
    found = encode_row(Row("r:1", messages=(ASKED, CALLED), tools=(TOOL,)), tokenizer, 10_000)
    assert isinstance(found, Dropped) and "rewrites earlier turns" in found.reason


def test_reasoning_of_an_earlier_call_may_vanish() -> None:
    """gpt-oss writes the reasoning before a call as long as there is no final answer."""
    tokenizer = published_tokenizer("gptoss")
    talk = [ASKED, CALLED | {"reasoning_content": "ask the tool"}, RESULT, THOUGHT]
    (_, first), (prompt, last) = prompts_and_answers(talk, tokenizer, [TOOL])
    named = [{"thinking" if k == "reasoning_content" else k: v for k, v in m.items()} for m in talk]
    assert prompt == tokenizer.apply_chat_template(named[:3], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert "ask the tool" in prompt and first.startswith("<|channel|>analysis<|message|>ask the tool<|end|>")
    assert last == "<|channel|>analysis<|message|>it said one<|end|><|start|>assistant<|channel|>final<|message|>Dry.<|return|>"


def test_what_is_left_out_is_named() -> None:
    tokenizer = published_tokenizer("llama3_1")
    found = encode_row(Row("r:1", messages=(ASKED, CALLED | {"content": "I look."}), tools=(TOOL,)), tokenizer, 10_000)
    assert isinstance(found, Dropped) and "does not render what is said beside them" in found.reason
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% set a = [] %}" + template("", "").replace("{{ '[' +", "{% set _ = a.append(1) %}{{ '[' +")
    found = encode_row(Row("r:1", messages=(ASKED, CALLED), tools=(TOOL,)), tokenizer, 10_000)
    assert isinstance(found, Dropped) and "the chat template refuses it" in found.reason
