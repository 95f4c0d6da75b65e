"""Tools through the chat route: who may be called, what is forced, what is read, whole and streamed, with templates of several families.

The weights are random, so a forced call follows its grammar and nothing else. What a model that knows tools would write is given to the
engine's sampler as tokens (`saying`).
"""

from __future__ import annotations

import json
import random
from contextlib import contextmanager

import jsonschema
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.bases.test_tool_turns import WEATHER, named
from tests.decode.test_answers import CALLS, TOOLS, as_calls, rendered
from tests.http.common import BASE, error_of, events, post, site
from tests.tiny import FAMILIES
from trimtab.model import Base
from trimtab.serve.request import Token

CHAT = "/v1/chat/completions"
ASK = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 700, "temperature": 1.0, "seed": 1}
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
PICK = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "b"]}},
            "required": ["n", "kind"],
            "additionalProperties": False,
        },
    },
}


def base_with(template):
    """A tiny Llama with room for long prompts, and a template of TRL's wheel."""
    config = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"max_position_embeddings": 8192})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    return Base(model, named(template) if isinstance(template, str) else template, name=BASE, fingerprint="sha256:" + "ab" * 32)


@pytest.fixture(scope="module")
def sites():
    """Servers by template, started when they are first asked for."""
    open_, made = [], {}

    def of(template):
        if template not in made:
            open_.append(site(base=base_with(template), kv_bytes=64 << 20))
            made[template] = open_[-1].__enter__()
        return made[template]

    yield of
    for one in open_:
        one.__exit__(None, None, None)


@contextmanager
def saying(s, text):
    """Answers say this, and then end: in the place of what a model would choose. A grammar that binds must allow each token."""
    tokenizer = s.engine.base.tokenizer
    wanted = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    sampler = type(s.engine.sampler).__call__

    def chosen(self, logits, draws):
        tokens = sampler(self, logits, draws)
        for i, draw in enumerate(draws):
            token = wanted[min(draw.new, len(wanted)) - 1]
            if draw.matcher is not None and not draw.matcher.mask[token // 8] >> token % 8 & 1:
                tokens[i] = Token(tokenizer.eos_token_id)
                refused.append(draw.new - 1)
            else:
                tokens[i] = Token(token)
        return tokens

    refused = []
    type(s.engine.sampler).__call__ = chosen
    try:
        yield refused
    finally:
        type(s.engine.sampler).__call__ = sampler


def ask(s, **body):
    response = post(s.app, CHAT, ASK | body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def streamed(s, **body):
    """(the deltas, the finish reason) of a stream."""
    response = post(s.app, CHAT, ASK | body | {"stream": True})
    assert response.status_code == 200, response.text
    told = events(response.text)
    assert told[-1] == "[DONE]"
    choices = [c for e in told[:-1] for c in e["choices"]]
    return [c["delta"] for c in choices], choices[-1]["finish_reason"]


def joined(deltas):
    """A message, put together as OpenAI's documentation has it."""
    message, calls = {"content": "", "reasoning_content": ""}, []
    for delta in deltas:
        for key in message:
            message[key] += delta.get(key) or ""
        for piece in delta.get("tool_calls") or []:
            if piece["index"] == len(calls):
                assert piece["id"] and piece["type"] == "function"
                calls.append([piece["function"]["name"], ""])
            calls[piece["index"]][1] += piece["function"]["arguments"]
    return message["reasoning_content"], message["content"], [tuple(c) for c in calls]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_5_nothink", "llama3_1", "gptoss", pytest.param("glm4moe", marks=pytest.mark.slow)])
def test_a_forced_call_is_valid_whatever_the_weights(sites, template):
    s = sites(template)
    called = 0
    for seed in range(2):
        choice = ask(s, tools=[WEATHER, PICK], tool_choice={"type": "function", "function": {"name": "pick"}}, seed=seed)
        if template == "glm4moe" and choice["finish_reason"] == "length":  # it may think before, and thinks without end
            assert choice["message"]["reasoning_content"] and "tool_calls" not in choice["message"]
            continue
        called += 1
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function" and call["function"]["name"] == "pick" and call["id"].startswith("call_")
        jsonschema.validate(json.loads(call["function"]["arguments"]), PICK["function"]["parameters"])
        same = streamed(s, tools=[WEATHER, PICK], tool_choice={"type": "function", "name": "pick"}, seed=seed)
        assert joined(same[0]) == ("", "", [("pick", call["function"]["arguments"])]) and same[1] == "tool_calls"
    assert called


@pytest.mark.parametrize("template", ["qwen2_5", pytest.param("qwen3_5_nothink", marks=pytest.mark.slow)])
def test_required_makes_calls_of_any_tool_that_is_allowed(sites, template):
    s, other = sites(template), {"type": "function", "function": {"name": "nothing", "parameters": NONE}}
    names, counts = set(), set()
    for seed in range(8):
        choice = ask(
            s,
            tools=[PICK, other, WEATHER],
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": n}} for n in ("pick", "nothing")],
                },
            },
            seed=seed,
        )
        for call in choice["message"]["tool_calls"]:
            names.add(call["function"]["name"])
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
        counts.add(len(choice["message"]["tool_calls"]))
        assert len({call["id"] for call in choice["message"]["tool_calls"]}) == len(choice["message"]["tool_calls"])
        single = ask(s, tools=[PICK, other], tool_choice="required", parallel_tool_calls=False, seed=seed)
        assert len(single["message"]["tool_calls"]) == 1
    assert names <= {"pick", "nothing"} and max(counts) > 1


@pytest.mark.parametrize(
    "template",
    ["qwen2_5", "qwen3_5_nothink", "llama3_1", "gptoss", *(pytest.param(t, marks=pytest.mark.slow) for t in ("qwen3", "glm4moe"))],
)
def test_auto_reads_the_calls_that_the_model_writes(sites, template):
    """What the template itself writes of these calls, under the lazy grammar, which allows each token of it."""
    s = sites(template)
    tokenizer = s.engine.base.tokenizer
    calls = CALLS[:1] if template in ("llama3_1", "gptoss") else CALLS[:3]
    _, answer = rendered(tokenizer, {"role": "assistant", "content": "", "tool_calls": as_calls(calls)})
    with saying(s, answer) as refused:
        choice = ask(s, tools=TOOLS)
        deltas, finish = streamed(s, tools=TOOLS, parallel_tool_calls=True)
    assert refused == [] and finish == choice["finish_reason"] == "tool_calls"
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in choice["message"]["tool_calls"]]
    assert found == calls and not (choice["message"]["content"] or "").strip()
    assert [(name, json.loads(arguments)) for name, arguments in joined(deltas)[2]] == calls


def test_a_lazy_grammar_binds_from_the_opening_on(sites):
    """Before it everything is free; behind it a tool that there is not, and arguments that its schema has not, cannot be said."""
    s = sites("qwen2_5")
    with saying(s, 'Text with {"name": "rm"} is free.\n<tool_call>\n{"name": "rm", "arguments": {}}') as refused:
        choice = ask(s, tools=[PICK])
    assert len(refused) == 1 and choice["message"]["content"].startswith('Text with {"name": "rm"} is free.')
    with saying(s, '<tool_call>\n{"name": "pick", "arguments": {"n": 7, "kind": "c"') as refused:
        ask(s, tools=[PICK])
    assert len(refused) == 1
    with saying(s, "No call at all.") as refused:
        choice = ask(s, tools=[PICK])
    assert (refused, choice["message"]["content"], choice["finish_reason"]) == ([], "No call at all.", "stop")
    assert "tool_calls" not in choice["message"]


def test_content_comes_before_calls_in_a_stream(sites):
    s = sites("qwen2_5")
    with saying(s, 'I pick.\n<tool_call>\n{"name": "pick", "arguments": {"n": 7, "kind": "a"}}\n</tool_call>'):
        deltas, finish = streamed(s, tools=[PICK])
    kinds = [next(iter(d), None) for d in deltas if d]
    assert kinds[0] == "role" and finish == "tool_calls" and deltas[-1] == {}
    first = kinds.index("tool_calls")
    assert set(kinds[1:first]) == {"content"} and set(kinds[first:]) == {"tool_calls"}
    assert joined(deltas) == ("", "I pick.", [("pick", '{"n": 7, "kind": "a"}')])
    assert len([d for d in deltas if "tool_calls" in d]) > 2  # arguments come as they are written


def test_reasoning_is_told_apart_whole_and_streamed(sites):
    s = sites("qwen3_5_think")
    with saying(s, "Let me see.\n</think>\n\nIt is 7."):
        choice = ask(s)
        deltas, finish = streamed(s)
    assert choice["message"]["reasoning_content"] == "Let me see." and choice["message"]["content"] == "It is 7."
    assert joined(deltas) == ("Let me see.", "It is 7.", []) and finish == choice["finish_reason"] == "stop"
    forced = ask(s, tools=[PICK], tool_choice="required", max_tokens=60)  # it may think for as long as it likes first
    assert forced["finish_reason"] in ("length", "tool_calls")
    constrained = ask(s, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}})
    assert constrained["message"]["content"] in ('"yes"', '"no"') and "reasoning_content" not in constrained["message"]


def test_gpt_oss_channels_are_told_apart(sites):
    s = sites("gptoss")
    with saying(s, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."):
        assert joined(streamed(s)[0]) == ("Hm.", "Yes.", [])
    with saying(s, '<|channel|>commentary to=functions.pick <|constrain|>json<|message|>{"n": 7, "kind": "a"}') as refused:
        choice = ask(s, tools=[PICK])
    assert refused == [] and choice["message"]["tool_calls"][0]["function"] == {"name": "pick", "arguments": '{"n": 7, "kind": "a"}'}
    with saying(s, '<|channel|>commentary to=functions.pick <|constrain|>json<|message|>{"n": 7, "kind": "c"}') as refused:
        ask(s, tools=[PICK])
    assert len(refused) == 1, "the grammar holds, although control tokens came before the call"


def test_history_with_calls_is_rendered_as_transformers_renders_it(sites):
    s = sites("qwen2_5")
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": as_calls([("get_weather", json.dumps({"city": "Bern"}))])},
        {"role": "tool", "tool_call_id": "call_00000", "content": [{"type": "text", "text": "sunny"}]},
    ]
    seen = []
    submit = s.engine.submit
    s.engine.submit = lambda request, sink: (seen.append(request), submit(request, sink))
    try:
        ask(s, messages=messages, tools=[{"type": "function", "function": WEATHER["function"] | {"strict": False}}], max_tokens=1)
        ask(s, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=1)
    finally:
        s.engine.submit = submit
    plain = [m | {"content": m["content"] or ""} for m in messages[:2]] + [{"role": "tool", "content": "sunny"}]
    plain[1]["tool_calls"] = as_calls([("get_weather", {"city": "Bern"})])
    for request, tools in zip(seen, ([WEATHER], None), strict=True):
        expected = s.engine.base.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=True)
        assert s.engine.base.tokenizer.decode(request.prompt) == expected


@pytest.mark.parametrize("template", ["phi3", "gemma"])
def test_tools_on_a_base_whose_template_knows_none(sites, template):
    """They are told in messages; gemma's template has no system's turn."""
    s = sites(template)
    choice = ask(s, tools=[PICK], tool_choice="required")
    assert choice["finish_reason"] == "tool_calls"
    jsonschema.validate(json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]), PICK["function"]["parameters"])
    with saying(s, '<tool_call>\n{"name": "pick", "arguments": {"n": 7, "kind": "a"}}\n</tool_call>') as refused:
        told = ask(s, tools=[PICK])["message"]
    assert refused == [] and told["tool_calls"][0]["function"] == {"name": "pick", "arguments": '{"n": 7, "kind": "a"}'}
    talk = [*ASK["messages"], told, {"role": "tool", "tool_call_id": told["tool_calls"][0]["id"], "content": "42"}]
    for more in ({"tools": [PICK]}, {"tools": []}, {"tools": [PICK], "tool_choice": "none"}, {"parallel_tool_calls": True}):
        ask(s, messages=talk, **more, max_tokens=2)


def test_functions_are_the_older_form_of_tools(sites):
    s = sites("qwen2_5")
    function = PICK["function"]
    with saying(s, '<tool_call>\n{"name": "pick", "arguments": {"n": 7, "kind": "a"}}\n</tool_call>') as refused:
        choice = ask(s, functions=[function], function_call={"name": "pick"})
        deltas, finish = streamed(s, functions=[function])
    called = {"name": "pick", "arguments": '{"n": 7, "kind": "a"}'}
    assert refused == [] and choice["finish_reason"] == finish == "function_call"
    assert choice["message"]["function_call"] == called and "tool_calls" not in choice["message"]
    parts = [d["function_call"] for d in deltas if "function_call" in d]
    assert parts[0]["name"] == "pick" and "".join(p["arguments"] for p in parts) == called["arguments"]
    talk = [*ASK["messages"], choice["message"], {"role": "function", "name": "pick", "content": "42"}]
    today = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": as_calls([("pick", called["arguments"])])}]
    today += [{"role": "tool", "tool_call_id": "call_00000", "content": "42"}]
    ids = [
        post(s.app, CHAT, ASK | {"max_tokens": 0, "return_token_ids": True} | body).json()["prompt_token_ids"]
        for body in ({"messages": talk, "functions": [function]}, {"messages": today, "tools": [PICK]})
    ]
    assert ids[0] == ids[1]
    assert "older" in error_of(post(s.app, CHAT, ASK | {"functions": [function], "tools": [PICK]}), 400)["message"]
    assert "no functions" in error_of(post(s.app, CHAT, ASK | {"function_call": {"name": "pick"}}), 400)["message"]


def test_forcing_a_call_of_unknown_form_is_refused_by_name(sites):
    s = sites("lfm2_2_5")
    error = error_of(post(s.app, CHAT, ASK | {"tools": [PICK], "tool_choice": "required"}), 400)
    assert error["param"] == "tool_choice" and "cannot be forced" in error["message"].replace("none can be forced", "cannot be forced")
    strict = {"type": "function", "function": PICK["function"] | {"strict": True}}
    error = error_of(post(s.app, CHAT, ASK | {"tools": [strict]}), 400)
    assert error["param"] == "tools" and "none can be strict" in error["message"]
    ask(s, tools=[PICK], max_tokens=2)


SENT_BACK = {
    '{"city": "Ber': {"city": "Ber"},
    '{"city": "Bern", "days": ': {"city": "Bern"},
    "{": {},
    '{"a": }': {"arguments": '{"a": }'},
    "[1]": {"arguments": "[1]"},
}


@pytest.mark.parametrize("arguments", SENT_BACK)
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3_5_nothink", "gptoss"])
def test_a_call_that_was_cut_off_may_be_sent_back(sites, template, arguments):
    """An answer that ended for want of room has half a call, which clients put into the history as it is."""
    s, seen = sites(template), []
    submit = s.engine.submit
    s.engine.submit = lambda request, sink: (seen.append(request.prompt), submit(request, sink))
    try:
        for given in (arguments, json.dumps(SENT_BACK[arguments])):
            turn = {"role": "assistant", "content": None, "tool_calls": as_calls([("get_weather", given)])}
            ask(s, messages=[{"role": "user", "content": "weather?"}, turn], tools=[WEATHER], max_tokens=1)
    finally:
        s.engine.submit = submit
    assert seen[0] == seen[1]


def test_tools_whose_grammar_would_be_too_large_are_free_under_auto(sites, monkeypatch):
    monkeypatch.setattr("trimtab.http.tools.MAX_CALL_CHARS", 100)
    s = sites("qwen2_5")
    with saying(s, '<tool_call>\n{"name": "pick", "arguments": {"n": 7, "kind": "c"}}\n</tool_call>') as refused:
        choice = ask(s, tools=[PICK])
    assert refused == [] and choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"n": 7, "kind": "c"}'
    strict = {"type": "function", "function": PICK["function"] | {"strict": True}}
    for more in ({"tools": [strict]}, {"tools": [PICK], "tool_choice": "required"}):
        error = error_of(post(s.app, CHAT, ASK | more), 400)
        assert error["param"] == "tools" and "more than 100 characters" in error["message"]


def test_a_lazy_grammar_that_is_lost_before_it_binds_ends_no_answer(sites):
    s = sites("qwen2_5")

    def lose(facts):  # of those that run: the next request may have come already, and waits for its grammar before it begins
        for live in s.engine.requests:
            if live.matcher is not None and live.where == "running":
                live.matcher.give_up("gone")

    s.engine.on_step = lose
    try:
        for strict in (False, True):
            tool = {"type": "function", "function": PICK["function"] | {"strict": strict}}
            with saying(s, "No call at all."):
                assert ask(s, tools=[tool])["message"]["content"] == "No call at all."
        with saying(s, 'A call: <tool_call>\n{"name": "pick", "arguments": {"n": 7, "kind": "c"}}\n</tool_call>'):
            assert ask(s, tools=[PICK])["message"]["tool_calls"][0]["function"]["name"] == "pick"
    finally:
        s.engine.on_step = lambda facts: None


def test_patterns_of_tagged_arguments_are_followed(sites):
    parameters = {"type": "object", "properties": {"p": {"type": "string", "pattern": r"^[ab]\/[cd]$"}}, "required": ["p"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    choice = ask(sites("qwen3_5_nothink"), tools=[tool], tool_choice="required", parallel_tool_calls=False)
    jsonschema.validate(json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]), parameters)


@pytest.mark.parametrize(
    ("more", "param", "says"),
    [
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [PICK], "tool_choice": {"type": "function", "function": {"name": "pik"}}}, "tool_choice", "no tool is called 'pik'"),
        ({"tools": [PICK, PICK]}, "tools", "two functions have one name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "only functions are supported"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", ""),
        ({"tools": [PICK], "guided_regex": "a+"}, "tools", "does not follow a regex"),
        ({"tools": [PICK], "tool_choice": "sometimes"}, "tool_choice", ""),
        ({"tools": [PICK], "tool_choice": "required", "guided_regex": "a+"}, "tools", "does not follow a regex"),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0].content", "is required"),
    ],
)
def test_mistakes_are_named(sites, more, param, says):
    error = error_of(post(sites("qwen2_5").app, CHAT, ASK | more), 400)
    assert error["param"] == param and says in error["message"], error


STRANGE = {"type": "object", "properties": {"a": {"type": "string", "not": {"enum": ["b"]}, "contentMediaType": "x", "if": {}}}}


def test_a_schema_that_cannot_be_followed_is_refused_unless_the_call_is_free(sites):
    """not and if are beyond the grammar: forced and strict say so, auto goes on without it."""
    s, tool = sites("qwen2_5"), {"type": "function", "function": {"name": "odd", "parameters": STRANGE}}
    strict = {"type": "function", "function": tool["function"] | {"strict": True}}
    for more in ({"tools": [tool], "tool_choice": "required"}, {"tools": [strict]}):
        error = error_of(post(s.app, CHAT, ASK | more), 400)
        assert error["param"] == "tools" and "cannot be followed" in error["message"]
    with saying(s, '<tool_call>\n{"name": "odd", "arguments": {"a": "b"}}\n</tool_call>'):
        choice = ask(s, tools=[tool])
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "b"}'


@pytest.mark.parametrize("template", ["qwen3_5_nothink", "gptoss"])
def test_parameters_that_are_no_schema_are_the_clients_mistake(sites, template):
    s = sites(template)
    odd = [
        {"required": 5},
        {"properties": 5},
        {"properties": {"a": 5, "b": {"enum": 5}}},
        {"type": 7},
        {"properties": {"a": {"type": "string", "pattern": "^($"}}},
    ]
    for parameters in odd:
        tool = {"type": "function", "function": {"name": "odd", "description": "d", "parameters": parameters}}
        for choice in ("auto", "required"):
            response = post(s.app, CHAT, ASK | {"tools": [tool], "tool_choice": choice, "max_tokens": 20})
            assert response.status_code in (200, 400), response.text


def test_content_follows_a_schema_beside_tools(sites):
    s, seen = sites("qwen2_5"), set()
    for seed in range(6):
        choice = ask(
            s, tools=[PICK], response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2]}}}, seed=seed
        )
        seen.add(choice["finish_reason"])
        if choice["message"].get("tool_calls"):
            jsonschema.validate(json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]), PICK["function"]["parameters"])
        else:
            assert json.loads(choice["message"]["content"]) in (1, 2)


def test_a_schema_beside_json_object_is_followed(sites):
    """instructor's JSON_SCHEMA mode, and Together's way."""
    choice = ask(sites("qwen2_5"), response_format={"type": "json_object", "schema": {"enum": ["yes"]}})
    assert choice["message"]["content"] == '"yes"'


@pytest.mark.slow
def test_several_answers_have_calls_of_their_own(sites):
    response = post(sites("qwen2_5").app, CHAT, ASK | {"tools": [PICK], "tool_choice": "required", "n": 3, "parallel_tool_calls": False})
    ids = [c["message"]["tool_calls"][0]["id"] for c in response.json()["choices"]]
    assert len(set(ids)) == 3


def drawn(rng, depth=2):
    """A random schema whose values are short."""
    kinds = ["integer", "boolean", "enum", "string", "null", "number"] + (["array", "object", "anyOf", "ref"] if depth else [])
    kind = rng.choice(kinds)
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-9, 0), "maximum": rng.randint(1, 99)}
    if kind == "enum":
        return {"enum": rng.sample(["a", 'b"c', "ü", 3, True, None, ""], rng.randint(1, 4))}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 6)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 2}
    if kind == "array":
        return {"type": "array", "items": drawn(rng, depth - 1), "minItems": rng.randint(0, 1), "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [drawn(rng, depth - 1), drawn(rng, depth - 1)]}
    if kind == "ref":
        return {"$ref": "#/$defs/thing"}
    if kind == "object":
        return shape(rng, depth - 1)
    return {"type": kind}


def shape(rng, depth=2):
    keys = rng.sample(["city", "n", "my key", "ß", "a_b", 'q"t'], rng.randint(0, 3))
    required = [key for key in keys if rng.random() < 0.7]
    return {"type": "object", "properties": {key: drawn(rng, depth) for key in keys}, "required": required, "additionalProperties": False}


@pytest.mark.slow
@pytest.mark.parametrize("template", ["qwen2_5", "llama3_1"])
def test_calls_of_200_random_schemas_are_valid(sites, template):
    s, rng, done = sites(template), random.Random(7), 0
    for i in range(200):
        schema = shape(rng) | {"$defs": {"thing": {"type": "integer", "minimum": 0, "maximum": 9}}}
        tool = {"type": "function", "function": {"name": f"f{i}", "parameters": schema}}
        choice = ask(s, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=i, max_tokens=1500, temperature=1.0)
        if choice["finish_reason"] == "length":
            continue
        done += 1
        (call,) = choice["message"]["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    assert done >= 190
