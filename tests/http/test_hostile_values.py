"""Values that parsers disagree about, in the fields of all routes, as bytes on the wire: each is a 400 that names the field, or an answer
equal to that of the plain value. Never a 500, and never a number that JSON does not have in an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.common import BASE, CHAT, TEXT, Site, adapter_folders, base_of, call, error_of, site
from tests.store.test_heads import stirred
from trimtab.http.assemble import Asked
from trimtab.methods import Head, LoraConfig

MESSAGES = CHAT["messages"]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | {"max_tokens": 2},
    "/v1/completions": TEXT | {"max_tokens": 2},
    "/v1/responses": {"model": BASE, "input": "hi", "temperature": 0, "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"model": BASE, "input": "hi"},
    "/v1/embeddings": {"model": BASE, "input": "hi"},
    "/classify": {"model": "judge", "input": "hi"},
    "/v1/score": {"model": "judge", "text_1": "a", "text_2": "b"},
    "/v1/rerank": {"model": "judge", "query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [7]},
    "/v1/load_lora_adapter": {"lora_name": "new", "lora_path": "nowhere"},
    "/v1/unload_lora_adapter": {"lora_name": "new"},
}
FIELDS: dict[str, str] = {
    "/v1/chat/completions": "temperature top_p min_p max_tokens min_tokens n seed top_k presence_penalty repetition_penalty top_logprobs"
    " prompt_logprobs logit_bias stop stop_token_ids messages tools tool_choice response_format guided_json chat_template_kwargs"
    " reasoning_effort adapters model stream best_of length_penalty truncate_prompt_tokens user nobody",
    "/v1/completions": "prompt logprobs best_of echo suffix guided_regex guided_choice n seed nobody",
    "/v1/responses": "input instructions temperature max_output_tokens seed metadata text tools reasoning top_logprobs nobody",
    "/v1/responses/input_tokens": "input instructions tools tool_choice metadata nobody",
    "/v1/embeddings": "input dimensions encoding_format truncate_prompt_tokens pooling normalize",
    "/classify": "input model use_activation",
    "/v1/score": "text_1 text_2 model truncate_prompt_tokens",
    "/v1/rerank": "query documents model top_n return_documents rank_fields truncate_prompt_tokens",
    "/tokenize": "prompt messages add_special_tokens",
    "/detokenize": "tokens",
    "/v1/load_lora_adapter": "lora_name lora_path load_inplace",
    "/v1/unload_lora_adapter": "lora_name",
}
NO_JSON = ["NaN", "-NaN", "Infinity", "-Infinity", "01", "+1", ".5", "1.", "0x1", "1_000", r'"\ud800"', r'"\udc00\ud83d"', '"\x01"', "'x'"]
"""What RFC 8259 has not, and halves of characters, which UTF-8 has not."""
HUGE = ["1e400", "-1e400", "9" * 400, "-" + "9" * 400, str(1 << 63), str(-(1 << 63) - 1), "[1e400]", '{"a": -1e400}', "[" + "9" * 400 + "]"]
ODD = ["-0", "-0.0", "1e-400", "1.5", "true", "[]", "{}", "[null]", "[[[[1]]]]", r'"\u0000"', r'"\ufeff"', r'"\ud83d\ude00"', '"1e400"']
ALIKE = [("temperature", "-0", 0.0), ("temperature", "-0.0", 0.0), ("temperature", "0e400", 0.0), ("max_tokens", "2.0", 2), ("n", "1e0", 1),
         ("seed", "3.0", 3), ("seed", str((1 << 63) - 1), (1 << 63) - 1), ("top_p", "1E0", 1.0), ("max_tokens", "2.00e0", 2)]  # fmt: skip


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, base = tmp_path_factory.mktemp("adapters"), base_of()
    judge = str(stirred(base, LoraConfig(r=2), head=Head(("good",))).save(folder / "judge"))
    with site(Asked(adapters={**adapter_folders(Path(folder), base), "judge": judge})) as s:
        yield s
        s.idle()


def raw(body: dict[str, Any], field: str, value: str) -> bytes:
    """A body with this text as a field's value."""
    rest = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in body.items() if k != field]
    return ("{" + ", ".join([*rest, f"{json.dumps(field)}: {value}"]) + "}").encode()


def no_number(text: str) -> Any:
    raise AssertionError(f"{text} is no number of JSON")


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
def test_a_value_is_refused_by_name_or_answered(heads: Site, path: str):
    for field in FIELDS[path].split():
        for value in (*HUGE, *ODD):
            answer = call(heads.app, "POST", path, raw(BODIES[path], field, value))
            assert answer.status_code in (200, 400, 404), (field, value, answer.status_code, answer.text)
            if answer.status_code != 200:
                error = error_of(answer, answer.status_code)
                param, said = re.split(r"[.\[]", error["param"] or "")[0], error["message"]
                of_name = path.endswith("_adapter") and ("adapter" in said or "does not exist" in said)  # of the name itself
                assert param in (field, *BODIES[path]) or f"{field} holds" in said or of_name, (field, value, error)
            elif answer.headers["content-type"] == "application/json":
                json.loads(answer.text, parse_constant=no_number)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_no_json_is_refused_wherever_it_stands(heads: Site, path: str):
    for field in (FIELDS[path].split()[0], "nobody"):
        for value in NO_JSON:
            error = error_of(call(heads.app, "POST", path, raw(BODIES[path], field, value)), 400)
            assert error["code"] == "invalid_json", (field, value, error)


@pytest.mark.parametrize("path", BODIES)
def test_bytes_around_and_within_a_body(heads: Site, path: str):
    whole = json.dumps(BODIES[path])
    deep = [(whole[:-1] + f', "z": {a * 100_000}1{b * 100_000}}}').encode() for a, b in (("[", "]"), ('{"a":', "}"))]
    wrong = [
        b"\xef\xbb\xbf" + whole.encode(),
        whole.encode("utf-16"),
        whole.encode() + b"\0",
        whole.encode() + b" {}",
        b"",
        b"[]",
        b"1e400",
        b'"a"',
        b"[" * 100_000,
        *deep,
    ]
    wrong += [whole.encode().replace(b'"', b'"' + x, 1) for x in (b"\xed\xa0\x80", b"\xc0\xaf", b"\xff", b"\xf8\x88\x80\x80\x80")]
    for body in wrong:
        assert error_of(call(heads.app, "POST", path, body), 400)["code"] in ("invalid_json", "too_deep"), body[:80]


@pytest.mark.parametrize(("field", "value", "plain"), ALIKE)
def test_a_number_in_another_form_is_the_same_number(heads: Site, field: str, value: str, plain: float):
    base = TEXT | {"max_tokens": 2}
    odd, even = (call(heads.app, "POST", "/v1/completions", body) for body in (raw(base, field, value), base | {field: plain}))
    assert odd.status_code == even.status_code == 200 and odd.json()["choices"] == even.json()["choices"]


def test_of_two_fields_with_one_name_the_last_counts_everywhere(heads: Site):
    """The name is looked up for the same model that answers."""
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"):
        text = json.dumps({k: v for k, v in BODIES[path].items() if k != "model"})[:-1]
        status = {m: call(heads.app, "POST", path, f'{text}, "model": "{a}", "model": "{b}"}}'.encode()).status_code
                  for m, a, b in ((1, "nothing", BASE), (2, BASE, "nothing"))}  # fmt: skip
        assert status == {1: 200, 2: 404}
