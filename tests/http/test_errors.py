"""Every mistake is an answer in OpenAI's shape that names the field, and never says what the prompt was."""

import json
import random

import pytest

from tests.http.common import CHAT, TEXT, Site, call, error_of, post
from trimtab.http import limits
from trimtab.http.limits import MAX_CONTAINERS, MAX_KEYS, MAX_VALUES, shape_of

SECRET = "the secret of the prompt"
ASK = [{"role": "user", "content": SECRET}]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("messages", [], "at least 1 item"),
        ("messages", "hi", "valid list"),
        ("messages", None, "valid list"),
        ("messages[0].role", [{"role": "robot", "content": SECRET}], "'user'"),
        ("messages[0].content", [{"role": "user"}], "required"),
        ("messages[0].content", [{"role": "user", "content": 5}], "valid string"),
        ("messages[0].content", [{"role": "user", "content": []}], "at least 1 item"),
        ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
         "messages[0].content[0]: images are not supported"),
        ("messages[0].content", [{"role": "user", "content": [{"type": "text"}]}], "type text and no text"),
        ("messages[0].content", [{"role": "user", "content": None}], "only an assistant turn may have none"),
        ("messages[0].name", [{"role": "user", "content": SECRET, "name": 5}], "valid string"),
        ("messages[0].tool_calls[0].function", [{"role": "assistant", "content": None, "tool_calls": [{}]}], "field required"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", 1e9, "less than or equal to 100"),
        ("temperature", "1", "valid number"),
        ("temperature", True, "valid number"),
        ("top_p", -0.1, "greater than or equal to 0"),
        ("top_p", 1.5, "less than or equal to 1"),
        ("top_k", -2, "greater than or equal to -1"),
        ("min_p", 1, "less than 1"),
        ("n", 0, "greater than or equal to 1"),
        ("n", 10**6, "less than or equal to 16"),
        ("n", 10**30, "less than or equal to 16"),
        ("n", 1.5, "valid integer"),
        ("n", True, "valid integer"),
        ("max_tokens", -1, "greater than or equal to 0"),
        ("max_tokens", "many", "valid integer"),
        ("seed", 2**63, "less than"),
        ("seed", "x", "valid integer"),
        ("stop", 3, "valid string"),
        ("stop", [""], "at least 1 character"),
        ("stop", ["x"] * 17, "at most 16 items"),
        ("stop", "x" * 257, "at most 256 characters"),
        ("presence_penalty", 2.1, "less than or equal to 2"),
        ("frequency_penalty", -2.1, "greater than or equal to -2"),
        ("repetition_penalty", 1e-300, "greater than or equal to 0.01"),
        ("logprobs", 3, "valid boolean"),
        ("top_logprobs", 21, "less than or equal to 20"),
        ("top_logprobs", 3, "needs logprobs: true"),
        ("min_tokens", 100, "more than max_tokens"),
        ("max_tokens", 7, ""),
        ("stream", "yes", "valid boolean"),
        ("stream_options", {"include_usage": 1}, "valid boolean"),
        ("logit_bias", {"5": 101}, "less than or equal to 100"),
        ("logit_bias", {"x": 1}, "should match pattern"),
        ("logit_bias", {"300": 1}, "token id 300 is not in 0..299"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "at most 1024"),
        ("prompt_logprobs", 21, "less than or equal to 20"),
        ("best_of", 2, "not supported"),
        ("tools[0].function", [{"type": "function"}], "field required"),
        ("tool_choice", "required", "there are no tools"),
        ("functions", [{}], "functions[0].name"),
        ("audio", {"voice": "x"}, "not supported"),
        ("modalities", ["audio"], "not supported"),
        ("prompt", "x", "not supported"),
        ("continue_final_message", True, "the last message must be an assistant's"),
        ("chat_template_kwargs", {"a": "x" * 5000}, "at most 4096"),
        ("chat_template", "{{ x }}", "not supported"),
        ("guided_grammar", "start: (", "grammar"),
        ("grammar", "root ::= missing-rule", "grammar"),
        ("ebnf", "root ::= (", "grammar"),
        ("regex", "(", "regex"),
        ("json_schema", {"type": "nonsense"}, ""),
        ("model", 5, "valid string"),
        ("model", "", "at least 1 character"),
        ("model", "x" * 257, "at most 256 characters"),
        ("response_format", {"type": "json_schema"}, "json_schema goes with"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}, "json_schema"),
        ("response_format", {"type": "grammar"}, "'json_object'"),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "exactly one"),
        ("structured_outputs", {"regex": "("}, "regex"),
        ("structured_outputs", {"choice": []}, "at least 1 item"),
        ("structured_outputs", {"json": {"const": 1e999}}, ""),
        ("structured_outputs", {"grammar": "root ::= ("}, "grammar"),
        ("structured_outputs", {"grammar": "start: \"a\"", "regex": "a"}, "exactly one"),
        ("structured_outputs", {"structural_tag": "x"}, "structural_tag: is not supported"),
        ("structured_outputs", {}, "exactly one"),
        ("guided_regex", "(", "regex"),
        ("guided_json", {"type": "nonsense"}, ""),
        ("guided_json", "{", "is no JSON"),
        ("guided_json", "[1]", "valid dictionary"),
        ("guided_json", {"const": 1e999}, "too large"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(served: Site, field: str, value, words: str):
    top = field.partition("[")[0]
    body = CHAT | {"messages": ASK} | ({"max_completion_tokens": 8} if (field, value) == ("max_tokens", 7) else {}) | {top: value}
    raw = json.dumps(body).replace("Infinity", "1e999").encode()
    error = error_of(post(served.app, "/v1/chat/completions", raw), 400)
    assert error["type"] == "invalid_request_error"
    named = error["param"] or ""
    assert named.startswith(top) and (field in (named, error["message"][: len(field)]) or field in error["message"]), error
    assert words in error["message"], error
    assert SECRET not in json.dumps(error), "a prompt must not come back in an error"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "at least 1 character"),
        ([], "at least 1 item"),
        ([""], "at least 1 character"),
        ([[]], "at least 1 item"),
        ([1, "a"], "valid"),
        ([1, -1], "greater than or equal to 0"),
        ([1, 300], "not in 0..299"),
        ([[1], [2**40]], "less than"),
        ([True], "valid"),
        (5, "valid"),
        ({"a": 1}, "valid"),
        (None, "valid"),
        (["a"] * 65, "at most 64 items"),
        ("x" * 600, "600 tokens. This model's maximum context length is 512 tokens"),
        ([1] * 512, "512 tokens. This model's maximum context length is 512 tokens"),
        (["a", "x" * 600], "prompt[1]: 600 tokens"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_is_named(served: Site, prompt, words: str):
    error = error_of(post(served.app, "/v1/completions", TEXT | {"prompt": prompt}), 400)
    assert error["param"].startswith("prompt") and words in error["message"], error
    if "context length" in words:
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("field", "value"),
    [("echo", 0), ("best_of", 17), ("best_of", True), ("suffix", "x"), ("messages", ASK), ("logprobs", 21)],
)
def test_completions_refuse_what_would_change_the_answer(served: Site, field: str, value):
    assert error_of(post(served.app, "/v1/completions", TEXT | {field: value}), 400)["param"] == field


def test_all_mistakes_are_told_at_once(served: Site):
    error = error_of(post(served.app, "/v1/completions", {"n": 0, "temperature": -1, "tools": [1], "bad_words": ["a"]}), 400)
    assert all(f"{f}: " in error["message"] for f in ("model", "prompt", "n", "temperature", "bad_words")), error


def test_contradictions_are_told(served: Site):
    for fields, param in (
        ({"top_p": 0, "temperature": 0.5}, "top_p"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "structured_outputs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ):
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
            assert error_of(post(served.app, path, body | fields), 400)["param"] == param


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "tiny",}', "not JSON"),
        (b"{'model': 'tiny'}", "not JSON"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "not JSON"),
        (b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', "not JSON"),
        (b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}', "not JSON"),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', "finite"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "not JSON"),
        (b'{"model": "tiny", "prompt": "\\udc00 x"}', "not JSON"),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', "not JSON"),
        (b'\xef\xbb\xbf{"model": "tiny", "prompt": "x"}', "not JSON"),
        (b'{"model": "tiny", "prompt": "x"} {}', "not JSON"),
        (b'{"model": "tiny", "prompt": ' + b"[" * 40 + b"1" + b"]" * 40 + b"}", "41 deep"),
        (b"[" * 100_000, "100000 deep"),
        (b'{"a":' * 50_000, "50000 deep"),
        (b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"{" + b",".join(b'"f%d": 1' % i for i in range(200)) + b"}", "200 fields"),
    ],
)
def test_what_is_no_body_is_a_400(served: Site, raw: bytes, words: str):
    assert words in error_of(post(served.app, "/v1/completions", raw), 400)["message"]


def test_depth_is_counted_outside_of_strings():
    assert shape_of(b'{"a": [[1], "[[[[", {"b\\"[[": "\\\\"}]}') == (3, 6, 4, 2)
    assert shape_of(b'{"a": "\\\\\\"[", "b\\\\": [[1, 2], []]}') == (3, 7, 4, 2), "backslashes count in pairs"
    assert shape_of(b"") == (0, 0, 0, 0)
    deep = b'{"model": "tiny", "prompt": "' + b"[," * 300 + b'"}'
    assert shape_of(deep) == (1, 2, 1, 2)


def counted_one_by_one(text: str) -> tuple[int, int, int, int]:
    depth = deepest = commas = opened = fields = 0
    inside = escaped = False
    for c in text:
        if escaped and c in '\\"':
            escaped = False
            continue
        escaped = c == "\\"
        if c == '"':
            inside = not inside
        elif not inside:
            depth += (c in "[{") - (c in "]}")
            deepest, opened = max(deepest, depth), opened + (c in "[{")
            commas, fields = commas + (c == ","), fields + (c == ":")
    return deepest, commas + opened, opened, fields


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_a_body_that_is_looked_at_in_pieces_counts_as_one(monkeypatch, piece: int):
    monkeypatch.setattr("trimtab.http.limits.PIECE", piece)
    rng = random.Random(piece)
    for _ in range(200):
        text = "".join(rng.choices('[]{},:"\\ax', k=rng.randrange(1, 40)))
        assert shape_of(text.encode()) == counted_one_by_one(text), text


@pytest.mark.parametrize("field", ["metadata", "logit_bias", "user"])
def test_a_body_of_very_many_fields_is_refused_before_it_is_parsed(served: Site, monkeypatch, field: str):
    monkeypatch.setattr("trimtab.http.limits.from_json", lambda *a, **k: pytest.fail("it was parsed"))
    raw = json.dumps(TEXT | {field: {str(i): 1 for i in range(MAX_KEYS)}}).encode()
    assert error_of(post(served.app, "/v1/completions", raw), 400)["code"] == "too_many_values"


@pytest.mark.parametrize("item", [b"[],", b"{},", b'"",', b"1,"])
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(served: Site, monkeypatch, item: bytes):
    monkeypatch.setattr("trimtab.http.limits.from_json", lambda *a, **k: pytest.fail("it was parsed"))
    count = (MAX_VALUES if item in (b'"",', b"1,") else MAX_CONTAINERS) + 1
    error = error_of(post(served.app, "/v1/completions", b'{"model": "tiny", "prompt": [' + item * count + b"1]}"), 400)
    assert error["code"] == "too_many_values" and "lists and objects" in error["message"]


def test_many_wrong_items_cost_one_message(served: Site):
    raw = json.dumps(TEXT | {"prompt": ["a"] * 200_000}).encode()
    assert len(error_of(post(served.app, "/v1/completions", raw), 400)["message"]) < 2000
    turns = [{"role": "user", "content": "x"}] + [{"role": "robot", "content": "x"}] * 90
    message = error_of(post(served.app, "/v1/chat/completions", json.dumps(CHAT | {"messages": turns}).encode()), 400)["message"]
    assert len(message) < 2000


MANY = {f"f{i}": 1 for i in range(40_000)}


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        (None, MANY),
        ("messages[0]", {"messages": [{"role": "user", "content": ""} | MANY]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""} | MANY]}]}),
        ("stream_options", {"stream_options": MANY}),
        ("response_format", {"response_format": {"type": "text"} | MANY}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema", "json_schema": MANY}}),
        ("structured_outputs", {"structured_outputs": MANY}),
    ],
)
def test_an_object_of_very_many_fields_is_one_finding(served: Site, monkeypatch, param: str | None, fields: dict):
    """pydantic makes a finding of each unknown field, before anybody can cut them off."""
    counts, real = [], limits.fault_of_body
    monkeypatch.setattr(limits, "fault_of_body", lambda e, *a: (counts.append(e.error_count()), real(e, *a))[1])
    error = error_of(post(served.app, "/v1/chat/completions", json.dumps(CHAT | fields).encode()), 400)
    assert (error["param"], error["code"]) == (param, "invalid_value") and "fields; at most 100" in error["message"]
    assert counts and counts[0] <= 2, counts


def test_schemas_and_ignored_objects_may_have_many_fields(served: Site):
    wide = {"properties": {f"p{i}": {} for i in range(300)}}
    for fields in ({"metadata": MANY}, {"structured_outputs": {"json": wide}}):
        assert post(served.app, "/v1/completions", json.dumps(TEXT | fields).encode()).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1", 404, "unknown_route"),
        ("GET", "/v1/chat/completions", 405, "unknown_route"),
        ("DELETE", "/v1/models", 405, "unknown_route"),
        ("POST", "/v1/audio/speech", 404, "unknown_route"),
        ("GET", "/v1/models//x", 404, "model_not_found"),
        ("GET", "/redoc", 404, "unknown_route"),
        ("GET", "/admin/tenants", 404, "unknown_route"),
        ("POST", "//v1/completions", 404, "unknown_route"),
    ],
)
def test_routes_that_are_not_there(served: Site, method: str, path: str, status: int, code: str):
    assert error_of(call(served.app, method, path), status)["code"] == code


def test_a_405_says_what_is_allowed(served: Site):
    assert call(served.app, "PUT", "/v1/models").headers["allow"] == "GET, HEAD"
    assert {call(served.app, m, "/ping").headers["allow"] for m in ("OPTIONS", "PUT")} == {"GET, HEAD, POST"}, "of both routes"
    options = call(served.app, "OPTIONS", "/v1/completions")
    assert (options.status_code, options.headers["allow"]) == (204, "POST") and "access-control-allow-origin" not in options.headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_only_json_is_read(served: Site, kind: str):
    """A page of another site can send forms and text to any server, but JSON only where it is allowed to."""
    r = call(served.app, "POST", "/v1/completions", None, headers={"content-type": kind})
    assert error_of(r, 415)["code"] == "unsupported_media_type"


def test_a_request_keeps_the_id_that_it_was_given_if_it_is_one(served: Site):
    assert call(served.app, "GET", "/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 65, "a\tb", '"}{'):
        made = call(served.app, "GET", "/v1/models", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made != bad and len(made) == 32


def test_an_unknown_model_is_a_404_and_never_the_base(served: Site):
    for model in ("nothing", "acme/nothing", "acme/nothing@3", "tiny@1", "Tiny", "../tiny", "a" * 256, "\u202e", "x\u0000y"):
        error = error_of(post(served.app, "/v1/completions", TEXT | {"model": model}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_bug_is_a_500_that_says_nothing(served: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fails(*a):
        raise RuntimeError(SECRET)

    monkeypatch.setattr(served.services.catalog, "find", fails)
    r = post(served.app, "/v1/completions", TEXT)
    error = error_of(r, 500)
    assert SECRET not in r.text and r.headers["x-request-id"] in error["message"] and error["code"] == "internal_error"
    monkeypatch.undo()
    assert post(served.app, "/v1/completions", TEXT).status_code == 200
