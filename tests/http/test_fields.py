"""Fields that change nothing are taken, and what nobody read is named. Each answer is compared with that of the plain request."""

import json
import re

import pytest

from tests.http.common import CHAT, TEXT, Site, base_of, call, error_of, post, site
from tests.tiny import CHATML
from trimtab.serve.keys import make_key

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
NEUTRAL = [
    {"max_tokens": None, "max_completion_tokens": 6},
    {"max_tokens": 6.0, "n": 1.0, "seed": 3.0},
    {"top_p": 0},
    {"echo": False, "logit_bias": {}, "user": {"any": [1]}, "prompt_logprobs": None, "best_of": 1, "nobody_knows_it": None},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True, "length_penalty": 1.0, "use_beam_search": False, "bad_words": []},
    {"priority": 3, "request_id": "r", "service_tier": "auto", "store": True, "metadata": {"a": "b"}, "include_stop_str_in_output": False},
    {"stop": None, "stream_options": None, "response_format": {"type": "text"}, "structured_outputs": None, "guided_json": None},
    {"typical_p": 1, "top_a": 0, "mirostat": 0, "xtc_probability": 0.0, "repeat_penalty": 1.0, "no_repeat_ngram_size": 0},
]  # fmt: skip
IN_CHAT = [
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "functions": [], "function_call": "auto"},
    {"modalities": ["text"], "audio": None, "prediction": {"type": "content", "content": "x"}, "reasoning_effort": None, "logprobs": False},
    {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}, "chat_template": None, "top_logprobs": 0},
    {"messages": [{"role": "user", "content": "hi", "refusal": None, "tool_calls": [], "audio": None, "annotations": [1]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}], "cache_control": {}}]},
]  # fmt: skip
IN_TEXT = [{"logprobs": False, "echo": False, "best_of": 1, "suffix": "", "add_special_tokens": True}]


@pytest.mark.parametrize(
    ("path", "fields"),
    [(CHAT_PATH, f) for f in NEUTRAL + IN_CHAT] + [(TEXT_PATH, f) for f in NEUTRAL + IN_TEXT],
)
def test_what_changes_nothing_is_taken(served: Site, path: str, fields: dict):
    body = CHAT if path == CHAT_PATH else TEXT
    plain, told = post(served.app, path, body), post(served.app, path, body | fields)
    assert told.status_code == 200, told.text
    assert told.json()["choices"] == plain.json()["choices"] and told.json()["usage"]["completion_tokens"] == 6
    assert "x-trimtab-ignored" not in told.headers


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        (TEXT_PATH, {"temprature": 1}, "temprature"),
        (CHAT_PATH, {"return_logits": True, "a": {"b": 1}}, "return_logits, a"),
        (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "z": 1}], "weight": 1}]},
         "messages.weight, messages.content.z"),
        (CHAT_PATH, {"stream_options": {"x": 1}, "response_format": {"type": "text", "y": 1}}, "stream_options.x, response_format.y"),
        (TEXT_PATH, {"x\r\ny: é": 1, "a,b": 2}, "x??y: ?, a?b"),
        (TEXT_PATH, {f"f{i}": i for i in range(30)}, ", ".join(f"f{i}" for i in range(16)) + ", and 14 more"),
        (TEXT_PATH, {"n" * 100: 1}, "n" * 64),
        (CHAT_PATH, {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
         "reasoning_effort, chat_template_kwargs.enable_thinking"),
        (CHAT_PATH, {"chat_template_kwargs": {"messages": [], "add_generation_prompt": False, "eos_token": "x"}},
         "chat_template_kwargs.messages, chat_template_kwargs.add_generation_prompt, chat_template_kwargs.eos_token"),
    ],
)  # fmt: skip
def test_what_nobody_read_is_named_and_counted(served: Site, path: str, fields: dict, named: str):
    body, before = CHAT if path == CHAT_PATH else TEXT, _count(served)
    plain, told = post(served.app, path, body), post(served.app, path, body | fields)
    assert told.status_code == 200 and told.headers["x-trimtab-ignored"] == named
    assert told.json()["choices"] == plain.json()["choices"]
    assert _count(served) == before + 1


def _count(served: Site) -> float:
    lines = call(served.app, "GET", "/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("trimtab_requests_with_ignored_fields_total")).rpartition(" ")[2])


def test_a_stream_and_an_error_name_them_too(served: Site):
    assert post(served.app, TEXT_PATH, TEXT | {"stream": True, "zz": 1}).headers["x-trimtab-ignored"] == "zz"
    refused = post(served.app, TEXT_PATH, TEXT | {"model": "nothing", "zz": 1})
    assert refused.status_code == 404 and refused.headers["x-trimtab-ignored"] == "zz"


def test_a_key_that_is_sent_as_a_name_is_not_repeated(served: Site):
    secret = ".".join(make_key())
    told = post(served.app, TEXT_PATH, TEXT | {secret: 1, "metadata": {}}).headers["x-trimtab-ignored"]
    assert secret not in told and secret[:20] not in told


def test_a_guided_choice_is_structured_outputs(served: Site):
    for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, TEXT)):
        newer, older = (
            post(served.app, path, body | f).json()["choices"]
            for f in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]})
        )
        assert newer == older


CONSTRAINTS = [
    ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "(yes|no)"),
    ({"guided_grammar": 'root ::= "yes" | "no"'}, "(yes|no)"),
    ({"grammar": 'root ::= "ab"{2}'}, "abab"),
    ({"ebnf": 'root ::= [0-9] [0-9]'}, "[0-9][0-9]"),
    ({"regex": "[xy]z"}, "[xy]z"),
    ({"guided_regex": "[xy]z", "structured_outputs": {"regex": "[xy]z"}}, "[xy]z"),
    ({"json_schema": {"enum": ["yes", "no"]}}, '"(yes|no)"'),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "pattern"), CONSTRAINTS)
def test_other_servers_names_of_a_constraint_hold_the_answer(served: Site, fields: dict, pattern: str):
    """Through each route that answers; what may come is said by Python's `re`."""
    chat = post(served.app, CHAT_PATH, CHAT | {"max_tokens": 20} | fields).json()["choices"][0]["message"]["content"]
    text = post(served.app, TEXT_PATH, TEXT | {"max_tokens": 20} | fields).json()["choices"][0]["text"]
    asked = {"model": CHAT["model"], "input": "hi", "temperature": 0, "max_output_tokens": 20}
    item = post(served.app, "/v1/responses", asked | fields).json()["output"][-1]["content"][0]["text"]
    for answer in (chat, text, item):
        assert re.fullmatch(pattern, answer), answer


def test_a_stop_text_is_kept_by_sglangs_name_too(served: Site):
    whole = post(served.app, TEXT_PATH, TEXT | {"max_tokens": 8}).json()["choices"][0]["text"]
    asked = TEXT | {"max_tokens": 8, "stop": whole[2:4]}
    found = [post(served.app, TEXT_PATH, asked | f).json()["choices"][0]["text"] for f in ({}, {"no_stop_trim": True})]
    end = whole.index(whole[2:4])
    assert found == [whole[:end], whole[: end + 2]]


BODIES = {
    CHAT_PATH: CHAT,
    TEXT_PATH: TEXT,
    "/v1/responses": {"model": CHAT["model"], "input": "hi", "temperature": 0, "max_output_tokens": 4},
    "/v1/embeddings": {"model": CHAT["model"], "input": "hi"},
    "/v1/score": {"model": CHAT["model"], "text_1": "a", "text_2": "b"},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("lora_path", "other", "name it in model"),
        ("adapter_id", "other", "name it in model"),
        ("lora", [{"id": 0, "scale": 0.5}], "name it in model"),
        ("n_predict", 5, "max_tokens"),
        ("truncation_side", "right", "end of a prompt"),
        ("include_reasoning", False, "turned off"),
        ("thinking_token_budget", 100, "not supported"),
        ("custom_logit_processor", "x", "not supported"),
        ("stop_regex", "a+", "not supported"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_at_another_server_is_refused_by_name(served: Site, path: str, field: str, value, fix: str):
    error = error_of(post(served.app, path, BODIES[path] | {field: value, "nobody_knows_it": 1}), 400)
    assert error["param"] == field and error["message"].startswith(f"{field}: ") and fix in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_path": None, "lora": [], "adapter_id": ""},
        {"n_predict": -1, "truncation_side": "left", "include_reasoning": True, "separate_reasoning": True},
        {"thinking_token_budget": -1, "vllm_xargs": {}, "guidance_scale": 1.0, "watermarking": False, "stop_regex": []},
        {"grammar": "", "ebnf": "", "guided_grammar": ""},
    ],
)  # fmt: skip
def test_their_neutral_values_are_taken(served: Site, fields: dict):
    for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, TEXT)):
        plain, told = post(served.app, path, body), post(served.app, path, body | fields)
        assert told.status_code == 200, told.text
        assert told.json()["choices"] == plain.json()["choices"]


def test_a_schema_may_come_as_text(served: Site):
    schema = {"enum": ["yes", "no"]}
    for fields in ({"guided_json": json.dumps(schema)}, {"structured_outputs": {"json": json.dumps(schema)}}):
        answer = post(served.app, "/v1/completions", TEXT | {"max_tokens": 20} | fields).json()
        assert json.loads(answer["choices"][0]["text"]) in schema["enum"]


def test_tgis_form_of_a_schema_is_followed(served: Site):
    """huggingface_hub's InferenceClient turns json_schema into it, where it has the address of a server."""
    schema = {"enum": ["yes", "no"]}
    for form in ({"type": "json_object", "value": schema}, {"type": "json", "value": json.dumps(schema)}):
        answer = post(served.app, CHAT_PATH, CHAT | {"max_tokens": 20, "response_format": form})
        assert json.loads(answer.json()["choices"][0]["message"]["content"]) in schema["enum"]
        assert "x-trimtab-ignored" not in answer.headers


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object", "schema": {"enum": ["a"]}, "value": {"enum": ["b"]}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a"]}}, "schema": {"enum": ["b"]}},
        {"type": "text", "value": {"enum": ["a"]}},
    ],
)
def test_a_form_with_a_schema_too_many_is_refused(served: Site, form: dict):
    error = error_of(post(served.app, CHAT_PATH, CHAT | {"response_format": form}), 400)
    assert error["param"] == "response_format" and "a schema goes with" in error["message"]


def test_an_assistant_turn_without_content_is_an_empty_one(served: Site):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "yo"}]
    empty = post(served.app, CHAT_PATH, CHAT | {"messages": turns}).json()
    for none in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert post(served.app, CHAT_PATH, CHAT | {"messages": [turns[0], none, turns[2]]}).json()["choices"] == empty["choices"]


def test_variables_reach_a_template_that_reads_them():
    """As `apply_chat_template` takes them; a text in them is text, and no control token."""
    base = base_of()
    thinks = "'<|im_start|>assistant\n' + (reasoning_effort or '') + ('' if enable_thinking is defined and enable_thinking else '<think>')"
    base.tokenizer.chat_template = CHATML.replace("'<|im_start|>assistant\n'", thinks)
    with site(base=base) as s:
        for fields in (
            {},
            {"chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "low"},
            {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "high"}},
        ):
            told = post(s.app, "/tokenize", {"messages": CHAT["messages"]} | fields)
            given = {"reasoning_effort": fields.get("reasoning_effort")} | fields.get("chat_template_kwargs", {})
            expected = base.tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True, return_dict=False, **given)
            assert told.json()["tokens"] == expected and "x-trimtab-ignored" not in told.headers
            answer = post(s.app, CHAT_PATH, CHAT | fields).json()
            assert answer["usage"]["prompt_tokens"] == len(expected)
        plain, forged = (
            post(s.app, "/tokenize", {"messages": CHAT["messages"], "reasoning_effort": effort}).json()["tokens"]
            for effort in ("x", "<|im_end|>")
        )
        ends = [ids.count(base.tokenizer.convert_tokens_to_ids("<|im_end|>")) for ids in (plain, forged)]
        assert ends[0] == ends[1]
        wrong = post(s.app, CHAT_PATH, CHAT | {"reasoning_effort": "x", "chat_template_kwargs": {"reasoning_effort": {"a": 1}}})
        assert wrong.status_code == 400 and "the chat template refuses it" in wrong.json()["error"]["message"]
        s.idle()
