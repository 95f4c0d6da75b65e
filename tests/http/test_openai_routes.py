"""OpenAI's routes with a real engine on a tiny base: what comes back, and that it is what the engine alone would say."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.common import BASE, CHAT, TEXT, Site, adapter_folders, base_of, call, client, error_of, events, post, site
from tests.tiny import EOS_ID
from trimtab.http.assemble import Asked
from trimtab.http.schema import MAX_N
from trimtab.serve.grammars import Grammars
from trimtab.serve.request import Request, SamplingParams


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    base = base_of()
    folder = tmp_path_factory.mktemp("adapters")
    with site(Asked(adapters=adapter_folders(folder, base), folders=[folder], base_names=[BASE, "base"]), base=base) as s:
        yield s
        s.idle()


def alone(s: Site, prompt: list[int], model: str = BASE, **sampling):
    adapter = s.services.catalog.find(model, _local())
    return s.engine.run([Request("alone", tuple(prompt), SamplingParams(**sampling), adapter)])[0]


def _local():
    from trimtab.serve.tenants import LOCAL

    return LOCAL


@pytest.mark.parametrize("model", ["tiny", "lora", "ia3"])
def test_chat_answers_what_the_engine_says_through_the_bases_template(served: Site, model: str):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    r = post(served.app, "/v1/chat/completions", CHAT | {"model": model, "messages": messages, "max_tokens": 8})
    assert r.status_code == 200, r.text
    ids = served.engine.base.encode_messages(messages)
    want = alone(served, ids, model, max_tokens=8)
    body = r.json()
    assert body["object"] == "chat.completion" and body["model"] == model
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": want.text, "refusal": None},
            "logprobs": None,
            "finish_reason": want.finish,
        }
    ]
    assert body["usage"]["prompt_tokens"] == len(ids) and body["usage"]["completion_tokens"] == len(want.token_ids)
    assert body["usage"]["total_tokens"] == len(ids) + len(want.token_ids)
    assert body["system_fingerprint"] == "fp_" + "ab" * 6


def test_adapters_differ_and_the_answer_says_which_it_was(served: Site):
    answers = {m: post(served.app, "/v1/completions", TEXT | {"model": m, "max_tokens": 12}) for m in ("tiny", "base", "lora", "ia3")}
    texts = {m: r.json()["choices"][0]["text"] for m, r in answers.items()}
    assert texts["tiny"] == texts["base"] and len({texts["tiny"], texts["lora"], texts["ia3"]}) == 3
    served_lora = served.services.catalog.find("lora", _local())
    assert served_lora is not None
    assert answers["lora"].headers["x-trimtab-adapter"] == f"{served_lora.ref} {served_lora.digest}"
    assert "x-trimtab-adapter" not in answers["tiny"].headers and answers["tiny"].headers["x-trimtab-base"] == "tiny"


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hello", [list(b"hello")]),
        (["hello", "you"], [list(b"hello"), list(b"you")]),
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8, 9], [1]], [[7, 8, 9], [1]]),
    ],
)
def test_completions_take_texts_and_ids(served: Site, prompt, ids):
    letters = served.services.words.encode_text
    want_ids = [letters(bytes(i).decode()) if isinstance(prompt, str) or isinstance(prompt[0], str) else i for i in ids]
    r = post(served.app, "/v1/completions", TEXT | {"prompt": prompt, "n": 2})
    choices = r.json()["choices"]
    assert [c["index"] for c in choices] == list(range(2 * len(ids)))
    assert [c["text"] for c in choices] == [alone(served, i, max_tokens=6).text for i in want_ids for _ in range(2)]
    assert r.json()["usage"]["prompt_tokens"] == sum(map(len, want_ids)), "a prompt counts once, however many answers it gets"


def test_a_seed_fixes_the_answers_and_each_has_its_own(served: Site):
    body = TEXT | {"temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 12}
    first, again = (post(served.app, "/v1/completions", body).json()["choices"] for _ in range(2))
    assert [c["text"] for c in first] == [c["text"] for c in again]
    assert len({c["text"] for c in first}) == 3
    second = post(served.app, "/v1/completions", body | {"seed": 8, "n": 1}).json()["choices"][0]
    assert second["text"] == first[1]["text"], "the i-th answer has seed + i"
    negative = post(served.app, "/v1/completions", body | {"seed": -1})
    assert negative.status_code == 200


def test_temperature_is_1_by_default_as_openais(served: Site):
    body = {k: v for k, v in TEXT.items() if k != "temperature"} | {"max_tokens": 16, "seed": 3}
    default, one, null = (
        post(served.app, "/v1/completions", body | more).json() for more in ({}, {"temperature": 1.0}, {"temperature": None})
    )
    assert default["choices"] == one["choices"] == null["choices"]
    assert default["choices"] != post(served.app, "/v1/completions", body | {"temperature": 0}).json()["choices"]


def test_chat_logprobs(served: Site):
    r = post(served.app, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2})
    content = r.json()["choices"][0]["logprobs"]["content"]
    want = alone(served, served.engine.base.encode_messages(CHAT["messages"]), max_tokens=6, logprobs=2).logprobs
    assert [c["logprob"] for c in content] == [t.logprob for t in want]
    assert [[a["logprob"] for a in c["top_logprobs"]] for c in content] == [[lp for _, lp in t.top] for t in want]
    assert bytes(b for c in content for b in c["bytes"]).decode("utf-8", "replace") == r.json()["choices"][0]["message"]["content"]
    none = post(served.app, "/v1/chat/completions", CHAT | {"logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert [c["top_logprobs"] for c in none] == [[]] * 6


def test_completion_logprobs(served: Site):
    r = post(served.app, "/v1/completions", TEXT | {"logprobs": 3})
    told = r.json()["choices"][0]["logprobs"]
    want = alone(served, served.services.words.encode_text("hello"), max_tokens=6, logprobs=3).logprobs
    assert told["token_logprobs"] == [t.logprob for t in want]
    assert [sorted(t.values(), reverse=True) for t in told["top_logprobs"]] == [[lp for _, lp in t.top] for t in want], "no two share a key"
    assert told["text_offset"][0] == 0 and told["text_offset"] == sorted(told["text_offset"])
    assert post(served.app, "/v1/completions", TEXT | {"logprobs": 0}).json()["choices"][0]["logprobs"]["tokens"] == told["tokens"]
    sampled = post(served.app, "/v1/completions", TEXT | {"logprobs": 1, "temperature": 5, "seed": 1, "max_tokens": 20}).json()
    told = sampled["choices"][0]["logprobs"]
    assert all(tok in top for tok, top in zip(told["tokens"], told["top_logprobs"], strict=True)), "the chosen one is always there"
    assert max(map(len, told["top_logprobs"])) == 2


def test_stop_texts_end_tokens_and_lengths(served: Site):
    whole = post(served.app, "/v1/completions", TEXT | {"max_tokens": 20}).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    mark = whole["text"][3]
    cut = post(served.app, "/v1/completions", TEXT | {"max_tokens": 20, "stop": mark}).json()["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["text"] == whole["text"][: whole["text"].index(mark)]
    same = post(served.app, "/v1/completions", TEXT | {"max_tokens": 20, "stop": [mark, "nowhere"]}).json()["choices"][0]
    assert same == cut
    first = alone(served, served.services.words.encode_text("hello"), max_tokens=3).token_ids
    by_id = post(served.app, "/v1/completions", TEXT | {"max_tokens": 20, "stop_token_ids": [first[2]]}).json()
    assert by_id["choices"][0]["finish_reason"] == "stop" and by_id["usage"]["completion_tokens"] == 3
    later = post(served.app, "/v1/completions", TEXT | {"max_tokens": 20, "stop_token_ids": [first[2]], "min_tokens": 4}).json()
    assert later["usage"]["completion_tokens"] > 3


def test_ignore_eos_goes_on_after_an_end_token(served: Site):
    body = TEXT | {"temperature": 20, "max_tokens": 400, "seed": 5}
    ended = post(served.app, "/v1/completions", body).json()
    on = post(served.app, "/v1/completions", body | {"ignore_eos": True}).json()
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] < 400, f"no {EOS_ID} was drawn"
    assert on["choices"][0]["finish_reason"] == "length" and on["usage"]["completion_tokens"] == 400


def test_without_max_tokens_a_chat_goes_on_to_the_bases_end(served: Site):
    body = {k: v for k, v in CHAT.items() if k != "max_tokens"} | {"ignore_eos": True}
    usage = post(served.app, "/v1/chat/completions", body).json()["usage"]
    assert usage["total_tokens"] == 512
    newer = post(served.app, "/v1/chat/completions", body | {"max_completion_tokens": 3}).json()["usage"]
    assert newer["completion_tokens"] == 3
    text = {k: v for k, v in TEXT.items() if k != "max_tokens"} | {"ignore_eos": True}
    assert post(served.app, "/v1/completions", text).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 1),
        ("top_p", 1e-9),
        ("min_p", 0.999999),
    ],
)
def test_cuts_leave_the_likeliest_token(served: Site, field: str, value: float):
    hot = TEXT | {"temperature": 1.0, "seed": 1, "max_tokens": 12}
    cold = post(served.app, "/v1/completions", TEXT | {"max_tokens": 12}).json()["choices"]
    assert post(served.app, "/v1/completions", hot | {field: value}).json()["choices"] == cold
    assert post(served.app, "/v1/completions", hot).json()["choices"] != cold
    if field == "top_k":
        off = post(served.app, "/v1/completions", hot | {"top_k": -1}).json()["choices"]
        assert off == post(served.app, "/v1/completions", hot | {"top_k": 0}).json()["choices"], "-1 is off, as in vLLM"


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_reach_the_engine(served: Site, field: str):
    r = post(served.app, "/v1/completions", TEXT | {"max_tokens": 40, field: 2.0}).json()["choices"][0]["text"]
    assert r == alone(served, served.services.words.encode_text("hello"), max_tokens=40, **{field: 2.0}).text
    assert r != post(served.app, "/v1/completions", TEXT | {"max_tokens": 40}).json()["choices"][0]["text"]


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("constraint", "good"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            lambda t: json.loads(t)["a"] in (1, 2),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, lambda t: json.loads(t)["a"] in (1, 2)),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, lambda t: len(t) == 3 and set(t) <= {"a", "b"}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda t: t in ("yes", "no")),
        ({"response_format": {"type": "text"}}, lambda t: True),
    ],
)
def test_answers_keep_to_a_grammar(served: Site, constraint, good):
    for seed in range(3):
        body = CHAT | {"temperature": 1.0, "seed": seed, "max_tokens": 200} | constraint
        choice = post(served.app, "/v1/chat/completions", body).json()["choices"][0]
        assert good(choice["message"]["content"]), choice


def test_a_grammar_that_takes_too_long_is_its_askers_trouble(monkeypatch: pytest.MonkeyPatch):
    """Several of them, and another tenant's plain request beside them: the engine's step never waits for a grammar. Between the end of a
    grammar's process and what is said of it lies some time, in which no token may be asked of it."""
    monkeypatch.setattr("trimtab.serve.grammars.OPEN_S", 0.2)
    blame, wait = Grammars._blame, Grammars.wait

    def blame_slowly(*args: Any) -> str:
        time.sleep(0.3)
        return blame(*args)

    def wait_and_rest(*args: Any) -> Any:
        found = wait(*args)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(Grammars, "_blame", blame_slowly)
    monkeypatch.setattr(Grammars, "wait", wait_and_rest)
    slow = {"type": "object", "patternProperties": {f"^a{i}.*b{i}$": {"type": "string"} for i in range(300)}}
    with site() as s:
        for body, param in (
            (CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": slow}}}, "response_format"),
            (CHAT | {"structured_outputs": {"json": slow}, "stream": True}, "structured_outputs"),
            (CHAT | {"structured_outputs": {"regex": "a(b"}}, "structured_outputs"),
        ):

            async def several(body: dict[str, object] = body) -> list[httpx.Response]:
                async with client(s.app) as c:
                    bad = [asyncio.create_task(c.post("/v1/chat/completions", json=body)) for _ in range(3)]
                    await asyncio.sleep(0.02)
                    plain = await c.post("/v1/chat/completions", json=CHAT)
                    assert plain.status_code == 200
                    return await asyncio.gather(*bad)

            for response in asyncio.run(several()):
                error = error_of(response, 400)
                assert (error["param"], error["code"]) == (param, "invalid_value"), error
                assert "processor time" in error["message"] or "cannot be followed" in error["message"]
        s.idle()


def test_json_object_is_json_as_far_as_it_goes(served: Site):
    body = CHAT | {"response_format": {"type": "json_object"}, "max_tokens": 5}
    assert post(served.app, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"].startswith("{")


def test_text_parts_are_joined_and_developer_is_system(served: Site):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    split = CHAT | {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]}
    plain = CHAT | {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "one\ntwo"}]}
    a, b = (post(served.app, "/v1/chat/completions", x).json() for x in (split, plain))
    assert a["choices"] == b["choices"] and a["usage"]["prompt_tokens"] == b["usage"]["prompt_tokens"]


def test_harmless_fields_are_ignored_and_neutral_values_accepted(served: Site):
    more = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "stream_options": None, "logit_bias": {}, "tools": [],
        "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "n": None, "stop": None, "seed": None, "top_p": None,
        "audio": None, "safety_identifier": "x", "prompt_cache_key": "y",
    }  # fmt: skip
    answered = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    messages = [CHAT["messages"][0], answered, CHAT["messages"][0]]
    with_all = post(served.app, "/v1/chat/completions", CHAT | more | {"messages": messages})
    assert with_all.status_code == 200, with_all.text
    bare = post(served.app, "/v1/chat/completions", CHAT | {"messages": [{k: m[k] for k in ("role", "content")} for m in messages]})
    assert with_all.json()["choices"] == bare.json()["choices"]
    assert post(served.app, "/v1/completions", TEXT | {"echo": False, "best_of": 1, "suffix": ""}).status_code == 200


def test_models_are_listed_and_found(served: Site):
    listed = call(served.app, "GET", "/v1/models").json()["data"]
    assert [m["id"] for m in listed] == ["tiny", "base", "ia3", "lora"]
    assert all(m["object"] == "model" and m["max_model_len"] == 512 for m in listed)
    lora = call(served.app, "GET", "/v1/models/lora").json()
    assert lora["parent"] == "tiny" and lora["digest"].startswith("sha256:") and lora["digest"] == listed[3]["digest"]
    assert call(served.app, "GET", "/v1/models/tiny").json()["parent"] is None
    error = error_of(call(served.app, "GET", "/v1/models/acme/nothing@3"), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"


def test_models_are_listed_in_pages(served: Site):
    whole = call(served.app, "GET", "/v1/models").json()
    assert (whole["first_id"], whole["last_id"], whole["has_more"]) == ("tiny", "lora", False)
    pages, after = [], ""
    while not pages or pages[-1]["has_more"]:
        pages.append(call(served.app, "GET", f"/v1/models?limit=3&after={after}").json())
        after = pages[-1]["last_id"]
    assert [m for page in pages for m in page["data"]] == whole["data"] and [len(p["data"]) for p in pages] == [3, 1]
    behind = call(served.app, "GET", "/v1/models?after=lora").json()
    assert behind == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for wrong in ("limit=0", "limit=1001", "limit=x"):
        assert error_of(call(served.app, "GET", f"/v1/models?{wrong}"), 400)["param"] == "limit"


def test_vllms_routes_load_and_unload(served: Site, tmp_path: Path):
    path = served.services.catalog.folders[0] / "lora"
    assert error_of(post(served.app, "/v1/completions", TEXT | {"model": "extra"}), 404)["code"] == "model_not_found"
    loaded = post(served.app, "/v1/load_lora_adapter", {"lora_name": "extra", "lora_path": str(path)})
    assert loaded.status_code == 200 and "extra" in loaded.text, loaded.text
    a, b = (post(served.app, "/v1/completions", TEXT | {"model": m}).json()["choices"] for m in ("extra", "lora"))
    assert a == b
    assert "already" in error_of(post(served.app, "/v1/load_lora_adapter", {"lora_name": "extra", "lora_path": str(path)}), 400)["message"]
    for outside in (str(tmp_path), str(path.parent / ".." / "x"), "lora", "/etc"):
        error_of(post(served.app, "/v1/load_lora_adapter", {"lora_name": "more", "lora_path": outside}), 404)
    assert post(served.app, "/v1/unload_lora_adapter", {"lora_name": "extra"}).status_code == 200
    assert error_of(post(served.app, "/v1/completions", TEXT | {"model": "extra"}), 404)["param"] == "model"
    error_of(post(served.app, "/v1/unload_lora_adapter", {"lora_name": "extra"}), 404)
    named = {"lora_name": "My-Org/My-Adapter_V1", "lora_path": str(path), "base_model_name": BASE}
    assert post(served.app, "/v1/load_lora_adapter", named).status_code == 200
    other = named | {"lora_path": str(path.parent / "ia3")}
    error_of(post(served.app, "/v1/load_lora_adapter", other), 400)
    assert post(served.app, "/v1/load_lora_adapter", other | {"load_inplace": True}).status_code == 200
    a, b = (post(served.app, "/v1/completions", TEXT | {"model": m}).json()["choices"] for m in ("My-Org/My-Adapter_V1", "ia3"))
    assert a == b
    assert time.time() - call(served.app, "GET", "/v1/models/My-Org/My-Adapter_V1").json()["created"] < 600
    ids = [m["id"] for m in call(served.app, "GET", "/v1/models").json()["data"]]
    pages = [call(served.app, "GET", f"/v1/models?after={i}&limit=1").json()["data"] for i in ids]
    assert [p[0]["id"] for p in pages[:-1]] == ids[1:] and not pages[-1]
    assert post(served.app, "/v1/unload_lora_adapter", {"lora_name": "My-Org/My-Adapter_V1", "lora_int_id": 3}).status_code == 200
    for name in ("a/b/c", "/a", "a b", "a@1", "-a", "é"):
        assert "is no name" in error_of(post(served.app, "/v1/load_lora_adapter", named | {"lora_name": name}), 400)["message"]
    wrong = post(served.app, "/v1/load_lora_adapter", named | {"base_model_name": "another"})
    assert error_of(wrong, 400)["param"] == "base_model_name"


def test_a_folders_name_adds_no_header(served: Site):
    folder = served.services.catalog.folders[0]
    odd = folder / "odd\r\nx-more: 1é"
    shutil.copytree(folder / "lora", odd)
    try:
        assert post(served.app, "/v1/load_lora_adapter", {"lora_name": "odd", "lora_path": str(odd)}).status_code == 200
        answer = post(served.app, "/v1/completions", TEXT | {"model": "odd"})
        assert answer.headers["x-trimtab-adapter"].startswith(f"{folder}/odd??x-more: 1? sha256:"), answer.headers
        assert post(served.app, "/v1/unload_lora_adapter", {"lora_name": "odd"}).status_code == 200
    finally:
        shutil.rmtree(odd)


def test_one_stream_and_one_whole_answer_say_the_same(served: Site):
    whole = post(served.app, "/v1/chat/completions", CHAT | {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 20}).json()
    stream = post(served.app, "/v1/chat/completions", CHAT | {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 20, "stream": True})
    texts = ["", "", ""]
    for event in events(stream.text)[:-1]:
        for c in event["choices"]:
            texts[c["index"]] += c["delta"].get("content", "")
    assert texts == [c["message"]["content"] for c in whole["choices"]]


def test_n_is_bounded(served: Site):
    assert MAX_N == 16
    assert post(served.app, "/v1/completions", TEXT | {"n": 16, "max_tokens": 1}).status_code == 200
    assert error_of(post(served.app, "/v1/completions", TEXT | {"n": 17}), 400)["param"] == "n"
    many = error_of(post(served.app, "/v1/completions", TEXT | {"n": 16, "prompt": ["a"] * 5}), 400)
    assert many["param"] == "n" and "80 answers" in many["message"]


def test_a_request_may_compose_adapters(served: Site):
    """By name or as a list, streamed or whole, it is what the engine says of that sum; usage of the scale is no matter."""
    named = post(served.app, "/v1/completions", TEXT | {"model": "lora+0.5*lora"})
    listed = post(served.app, "/v1/completions", TEXT | {"adapters": [{"name": "lora"}, {"name": "lora", "scale": 0.5}]})
    want = alone(served, served.engine.base.encode("hello"), "1.5*lora", max_tokens=6)
    for r in (named, listed):
        assert r.status_code == 200, r.text
        assert r.json()["choices"][0]["text"] == want.text
        ref, digest = r.headers["x-trimtab-adapter"].split(" ")
        assert ref.startswith("1.5*") and ref.endswith("/lora") and digest.startswith("1.5*sha256:")
    plain = post(served.app, "/v1/completions", TEXT | {"adapters": [{"name": "lora", "scale": 0}]})
    assert plain.json()["choices"] == post(served.app, "/v1/completions", TEXT).json()["choices"] and "x-trimtab-base" in plain.headers
    assert post(served.app, "/v1/completions", TEXT | {"adapters": []}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"model": "lora", "adapters": [{"name": "ia3"}]}, 400, "adapters", "one place"),
        ({"adapters": [{"name": "lora"}, {"name": "nobody"}]}, 404, "adapters", "'nobody' does not exist"),
        ({"adapters": [{"name": BASE}]}, 400, "adapters", "is the base"),
        ({"adapters": [{"name": "lora", "scale": 1e9}]}, 400, "adapters[0].scale", "less than or equal"),
        ({"adapters": [{"name": "lora"}] * 9}, 400, "adapters", "at most 8"),
        ({"model": "lora+nobody"}, 404, "model", "'nobody' does not exist"),
        ({"model": "lora+"}, 404, "model", "'lora+' does not exist"),
        ({"model": "lora+ia3"}, 400, None, "different methods"),
    ],
)
def test_what_cannot_be_composed_is_named(served: Site, body: dict[str, Any], status: int, param: str | None, words: str):
    error = error_of(post(served.app, "/v1/completions", TEXT | body), status)
    assert error["param"] == param and words in error["message"], error
