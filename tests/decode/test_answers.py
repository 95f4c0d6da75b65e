"""What a template writes of an assistant turn is read back as the same turn, in whatever pieces it comes.

The templates are TRL's; the turn itself is what is compared with.
"""

from __future__ import annotations

import json
import random
import time

import jsonschema
import pytest

from tests.bases.test_tool_turns import WEATHER, named
from trimtab.bases.calls import AnswerFormat, answer_format
from trimtab.bases.template import Template
from trimtab.bases.written import common_start
from trimtab.decode.answers import fed, reader_of

OTHER = {
    "type": "function",
    "function": {
        "name": "other.tool-2",
        "description": "Something else.",
        "parameters": {
            "type": "object",
            "properties": {
                "flag": {"type": "boolean"},
                "ratio": {"type": "number"},
                "text": {"type": "string"},
                "list": {"type": "array", "items": {"type": "integer"}},
                "deep": {"type": "object"},
                "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            },
        },
    },
}
NOTHING = {
    "type": "function",
    "function": {"name": "nothing", "description": "Takes nothing.", "parameters": {"type": "object", "properties": {}}},
}
TOOLS = [WEATHER, OTHER, NOTHING]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
CALLS = [
    ("get_weather", {"city": 'Zürich\'s "old" town', "days": 3}),
    ("other.tool-2", {"flag": True, "ratio": 0.5, "text": "7", "list": [1, 2], "deep": {"a": ["}", {"b": '\\"{'}]}, "maybe": None}),
    ("nothing", {}),
    ("other.tool-2", {"text": "two\nlines <b> & </p>"}),
]
FAMILIES = {
    "qwen2_5": "",
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3_instruct_2507": "",
    "qwen3_vl": "",
    "qwen3_5_nothink": "",
    "qwen3_5_think": "",
    "qwen3_8": "",
    "glm4moe": "",
    "nemotron_3_nano": "",
    "llama3_1": "",
    "gptoss": "",
}
SINGLE = ("llama3_1", "gptoss")


def rendered(tokenizer, message):
    """(the prompt, the answer that the template writes of this turn, without what ends the turn)"""
    template, question = Template(tokenizer), [{"role": "user", "content": "Zq0qZ"}]
    told = {"tools": TOOLS}
    prompt, whole = template.prompt(question, told), template.render([*question, message], generate=False, variables=told)
    answer = whole[common_start(prompt, whole) :].rstrip()
    for end in ("<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>"):
        answer = answer.removesuffix(end)
    return prompt, answer


def read(form, prompt, answer, *, eager, cut=False, tools=SCHEMAS, rng=None):
    """What a reader makes of an answer: (reasoning, content, [(name, arguments)], the kinds of pieces in order)."""
    reader = reader_of(form, tools, prompt=prompt, eager=eager)
    if reader is None:
        return "", answer, [], ["content"]
    pieces, i = [], 0
    while i < len(answer):
        n = rng.choice((1, 2, 3, 7, 40)) if rng else len(answer)
        pieces += reader.feed(answer[i : i + n])
        i += n
    pieces += reader.finish(cut)
    calls = []
    for piece in pieces:
        if piece.kind == "call":
            assert piece.index == len(calls)
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            calls[piece.index][1] += piece.text
    said = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")}
    return said["reasoning"], said["content"], [tuple(c) for c in calls], [p.kind for p in pieces]


def as_calls(pairs):
    return [{"id": f"call_{i:05}", "type": "function", "function": {"name": n, "arguments": a}} for i, (n, a) in enumerate(pairs)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_is_read_back_from_what_the_template_writes(family):
    tokenizer, rng = named(family), random.Random(0)
    form = answer_format(Template(tokenizer))
    turns = [[call] for call in CALLS] + ([] if family in SINGLE else [CALLS, CALLS[2:], CALLS[:2]])
    for calls in turns:
        for content in ("", "I look it up: <b>now</b> {"):
            if content and (family == "gptoss" or (family == "llama3_1")):
                continue  # the one writes it as analysis, the other leaves it out
            prompt, answer = rendered(tokenizer, {"role": "assistant", "content": content, "tool_calls": as_calls(calls)})
            for eager in (False, True):
                for _ in range(4):
                    reasoning, told, found, _ = read(form, prompt, answer, eager=eager, rng=rng)
                    assert (reasoning.strip(), told.strip()) == ("", content)
                    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "nemotron_3_nano", "glm4moe"])
def test_reasoning_is_read_back(family):
    tokenizer, rng = named(family), random.Random(1)
    form = answer_format(Template(tokenizer))
    for calls in ([], CALLS[:1]):
        message = {"role": "assistant", "content": "It is so.", "reasoning_content": "First a thought.\n\nThen </b> another."}
        prompt, answer = rendered(tokenizer, message | ({"tool_calls": as_calls(calls)} if calls else {}))
        for _ in range(6):
            reasoning, content, found, kinds = read(form, prompt, answer, eager=True, rng=rng)
            assert reasoning.strip() == "First a thought.\n\nThen </b> another."
            assert content == "It is so." and len(found) == len(calls)
            assert kinds == sorted(kinds, key=["reasoning", "content", "call", "arguments"].index)


def test_harmony_is_read_as_the_model_writes_it():
    form, rng = answer_format(Template(named("gptoss"))), random.Random(2)
    answer = (
        "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Bern"}'
    )
    for _ in range(5):
        assert read(form, "", answer, eager=True, rng=rng)[:3] == ("Let me see.", "I look.", [("get_weather", '{"city": "Bern"}')])
    plain = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    assert read(form, "", plain, eager=False, tools={}, rng=rng)[:3] == ("Hm.", "Yes.", [])


BROKEN = {
    "no such tool": '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>',
    "no JSON": '<tool_call>\n{"name": "nothing", "arguments": {"a": }}\n</tool_call>',
    "a text": '<tool_call>\n{"name": "nothing", "arguments": "a"}\n</tool_call>',
    "a list": '<tool_call>\n{"name": "nothing", "arguments": [1]}\n</tool_call>',
    "the tag alone": "one writes <tool_call> before a call",
    "half": '<tool_call>\n{"name": "nothing", "arguments": {"a": 1',
    "another key": '<tool_call>\n{"nome": "nothing"}\n</tool_call>',
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_valid_call_stays_content(case):
    form = answer_format(Template(named("qwen2_5")))
    for rng in (None, random.Random(3)):
        _, content, calls, _ = read(form, "", "Well: " + BROKEN[case], eager=False, rng=rng)
        assert calls == [] and content.split() == ("Well: " + BROKEN[case]).split()


@pytest.mark.parametrize("case", BROKEN)
def test_a_call_behind_what_is_none_is_read(case):
    form, answer = answer_format(Template(named("qwen2_5"))), f"{BROKEN[case]}\n" * 2
    answer += '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    for rng in (None, random.Random(6)):
        _, content, calls, _ = read(form, "", answer, eager=False, rng=rng)
        assert calls == [("get_weather", '{"city": "Bern"}')] and content.split() == (f"{BROKEN[case]}\n" * 2).split()


SPELT = {
    "a digit among texts": ({"enum": ["7", "x"]}, "7", "7"),
    "a digit among numbers": ({"enum": [7, 8]}, "7", 7),
    "the text true": ({"const": "true"}, "true", "true"),
    "a text": ({"type": "string"}, "null", "null"),
    "a text or nothing": ({"type": ["string", "null"]}, "None", None),
    "a text or a number": ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "7.5", 7.5),
    "a reference to a text": ({"$ref": "#/$defs/t"}, "[1]", "[1]"),
    "Python's True": ({"type": "boolean"}, "True", True),
}


@pytest.mark.parametrize("case", SPELT)
def test_a_tagged_argument_is_what_its_schema_takes(case):
    """jsonschema says so too."""
    schema, text, want = SPELT[case]
    whole = {"type": "object", "properties": {"a": schema}, "$defs": {"t": {"type": "string"}}}
    answer = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
    for eager in (False, True):
        ((_, arguments),) = read(answer_format(Template(named("qwen3_5_nothink"))), "", answer, eager=eager, tools={"f": whole})[2]
        jsonschema.validate(found := json.loads(arguments), whole)
        assert found == {"a": want} and type(found["a"]) is type(want)


def test_an_answer_that_is_cut_off_within_a_call_has_what_there_is():
    form = answer_format(Template(named("qwen2_5")))
    for eager in (False, True):
        assert read(form, "", BROKEN["half"], eager=eager, cut=True)[2] == [("nothing", '{"a": 1')]


def test_other_white_space_and_the_other_key_are_read():
    form = answer_format(Template(named("llama3_1")))
    for answer in ('{"name":"nothing","arguments":{}}', '\n{ "name" : "nothing", "parameters" : {} }\n'):
        assert read(form, "", answer, eager=True, rng=random.Random(4))[1:3] == ("", [("nothing", "{}")])
    assert read(form, "", 'See {"name": "nothing", "parameters": {}}', eager=True)[2] == []  # not at the beginning
    assert read(form, "", '{"answer": 1}', eager=True, rng=random.Random(4))[1:3] == ('{"answer": 1}', [])


def test_text_behind_calls_and_calls_behind_text_are_read():
    form = answer_format(Template(named("qwen2_5")))
    call = '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'
    _, content, calls, kinds = read(form, "", f"a {call}\nb {call} c", eager=True)
    assert len(calls) == 2 and content.split() == ["a", "b", "c"] and kinds[0] == "content"


def test_without_tools_and_without_reasoning_nothing_is_read():
    assert reader_of(answer_format(Template(named("qwen2_5"))), {}, prompt="", eager=True) is None
    assert reader_of(AnswerFormat(), SCHEMAS, prompt="", eager=True) is None


def test_pieces_come_as_the_text_comes():
    """Content goes out at once, but for white space and what may begin a tag; arguments as they come."""
    form = answer_format(Template(named("qwen2_5")))
    reader = reader_of(form, SCHEMAS, prompt="", eager=True)
    assert [p.text for p in reader.feed("Hello the")] == ["Hello the"]
    assert reader.feed("\n<tool") == []
    assert [p.text for p in reader.feed("s>")] == ["\n<tools>"]
    assert reader.feed('<tool_call>\n{"name": "get_wea') == []
    assert [(p.kind, p.text) for p in reader.feed('ther", "arguments": {"ci')] == [("call", "get_weather"), ("arguments", '{"ci')]
    assert [p.text for p in reader.feed('ty": "Bern"}}')] == ['ty": "Bern"}']
    assert reader.feed("\n</tool_call>") + reader.finish(False) == []


def test_the_response_template_of_a_tokenizer_says_how_its_answers_are_read():
    """transformers' own parser says what is right."""
    tokenizer = named("qwen2_5")
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {},
            "reasoning_content": {"open": "<hm>", "close": "</hm>"},
            "tool_calls": {
                "open": "<call>",
                "close": "</call>",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": {"name": "{content.n}", "arguments": "{content.a}"}},
            },
        },
    }
    form = answer_format(Template(tokenizer))
    prompt = "<|im_start|>assistant\n"
    answer = '<hm>thought</hm>said<call>{"n": "get_weather", "a": {"city": "Bern"}}</call><call>{"n": "nothing", "a": {}}</call>'
    expected = tokenizer.parse_response(answer, prefix=prompt)
    for rng in (None, random.Random(5)):
        reasoning, content, calls, _ = read(form, prompt, answer, eager=True, rng=rng)
        assert (reasoning, content) == (expected["reasoning_content"], expected["content"])
        assert [(n, json.loads(a)) for n, a in calls] == [
            (c["function"]["name"], c["function"]["arguments"]) for c in expected["tool_calls"]
        ]
    assert read(form, prompt, "x <call>{broken</call> y", eager=True)[1:3] == ("x <call>{broken</call> y", [])


LONG = 200_000
ENDLESS = {
    "a name's end again and again": ("qwen3_5_nothink", "<tool_call>\n<function=get_weather>\n<parameter=city>\n" + ">\n" * (LONG // 2)),
    "no name's end": ("qwen3_5_nothink", "<tool_call>\n<function=get_weather>\n<parameter=" + "city=" * (LONG // 5)),
    "openings": ("qwen2_5", "<tool_call>" * (LONG // 11)),
    "calls in calls": ("qwen2_5", '<tool_call>\n{"name": "nothing", "arguments": {"a": ' * (LONG // 44)),
    "blanks behind a call": ("qwen2_5", '<tool_call>\n{"name": "nothing", "arguments": {}}' + "\n" * LONG),
    "blanks at the beginning": ("llama3_1", "{" + " " * LONG),
    "messages": ("gptoss", "<|channel|>final<|message|>a<|end|>" * (LONG // 35)),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_the_longest_answers_are_read_in_a_moment(case):
    family, answer = ENDLESS[case]
    form, began = answer_format(Template(named(family))), time.process_time()
    for eager in (False, True):
        reader = reader_of(form, SCHEMAS, prompt="", eager=eager)
        assert reader is not None
        pieces = [*fed(reader, answer), *reader.finish(False)]
        assert eager or "".join(p.text for p in pieces if p.kind == "content").strip() or case == "blanks behind a call"
    assert time.process_time() - began < 5


def test_a_parser_that_fails_in_any_way_leaves_the_text():
    reader = reader_of(AnswerFormat(response={"start_anchor": "a", "fields": {"content": {}}}), SCHEMAS, prompt="", eager=True)

    class Broken:
        def feed(self, text):
            raise AttributeError("'str' object has no attribute 'get'")

    reader._parser = Broken()
    assert [p.text for p in [*reader.feed("as it is"), *reader.finish(False)]] == ["as it is"]


def test_a_response_template_that_transformers_refuses_is_none():
    tokenizer = named("qwen2_5")
    tokenizer.response_template = {"fields": {"content": {}}}
    form = answer_format(Template(tokenizer))
    assert form.response is None and form.calls is not None
