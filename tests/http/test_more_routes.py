"""Routes that clients of vLLM ask for, and the forms in which requests come: HEAD, OPTIONS, slashes, other origins."""

import re

import pytest
from jinja2 import Environment

from tests.http.common import CHAT, TEXT, Site, call, error_of, post
from trimtab import __version__
from trimtab.http.app import create_app


def test_tokenize_gives_the_ids_that_the_other_routes_use(served: Site):
    tokenizer = served.engine.base.tokenizer
    text = post(served.app, "/tokenize", {"model": "tiny", "prompt": "hello wörld"}).json()
    assert text["tokens"] == tokenizer("hello wörld")["input_ids"] and text["max_model_len"] == 512 and text["token_strs"] is None
    talk = post(served.app, "/tokenize", {"messages": CHAT["messages"], "return_token_strs": True}).json()
    expected = tokenizer.apply_chat_template(CHAT["messages"], add_generation_prompt=True, return_dict=False)
    assert talk["tokens"] == list(expected) and talk["count"] == len(expected) == len(talk["token_strs"])
    answer = post(served.app, "/v1/chat/completions", CHAT).json()
    assert answer["usage"]["prompt_tokens"] == talk["count"]


def test_detokenize_gives_the_text_back(served: Site):
    for text in ("hello wörld", "a\n\tb 😀", ""):
        ids = served.engine.base.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert post(served.app, "/detokenize", {"model": "tiny", "tokens": ids}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "not both"),
        ("/tokenize", {"prompt": "x" * 600}, "maximum context length is 512"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images are not supported"),
        ("/detokenize", {"tokens": [300]}, "not in 0..299"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_tokenized_is_told(served: Site, path: str, body: dict, words: str):
    assert words in error_of(post(served.app, path, body), 400)["message"]


def test_health_and_version(served: Site):
    assert call(served.app, "GET", "/version").json() == {"version": __version__}
    for path in ("/health", "/ping"):
        assert call(served.app, "GET", path).status_code == 200
    assert call(served.app, "POST", "/ping").status_code == 200, "as vLLM takes it"
    served.services.life.draining = True
    try:
        assert [call(served.app, "GET", path).status_code for path in ("/health", "/ping", "/readyz", "/livez")] == [503, 503, 503, 200]
    finally:
        served.services.life.draining = False


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_a_page_for_people_lists_the_routes_and_loads_nothing(served: Site, path: str):
    page = call(served.app, "GET", path)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    paths = call(served.app, "GET", "/openapi.json").json()["paths"]
    assert len(paths) > 10 and all(f" {p}</code>" in page.text for p in paths)
    assert "src=" not in page.text and re.findall('href="(.*?)"', page.text) == ["openapi.json"]
    assert call(served.app, "HEAD", path).status_code == 200


def test_a_slash_at_the_end_says_nothing(served: Site):
    assert call(served.app, "GET", "/v1/models/").json() == call(served.app, "GET", "/v1/models").json()
    whole, slash = (post(served.app, path, TEXT).json() for path in ("/v1/completions", "/v1/completions/"))
    assert whole["choices"] == slash["choices"]


def test_head_is_a_get(served: Site):
    for path in ("/v1/models", "/readyz", "/v1/models/tiny"):
        head, get = call(served.app, "HEAD", path), call(served.app, "GET", path)
        assert (head.status_code, head.headers["content-length"]) == (200, get.headers["content-length"])
    assert call(served.app, "HEAD", "/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("/v1/models", "GET, HEAD"), ("/v1/completions", "POST"), ("/ping", "GET, HEAD, POST"), ("/v1/models/tiny", "GET, HEAD")],
)
def test_what_a_path_takes_is_what_it_says(served: Site, path: str, allowed: str):
    """Of a refusal, and of OPTIONS. Each method that is named is tried: none of them is a 405, and all others are."""
    assert call(served.app, "DELETE", path).headers["allow"] == call(served.app, "OPTIONS", path).headers["allow"] == allowed
    methods = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
    assert [m for m in methods if call(served.app, m, path).status_code != 405] == allowed.split(", ")


def test_a_client_can_write_prompts_with_what_the_server_tells_of_its_tokenizer(served: Site):
    """As lm-eval's remote tokenizer does: the template, rendered by the client, and the ids of the end's text."""
    tokenizer = served.engine.base.tokenizer
    told = call(served.app, "GET", "/tokenizer_info").json()
    assert (told["eos_token"], told["bos_token"], told["model_max_length"]) == (tokenizer.eos_token, tokenizer.bos_token, 512)
    rendered = Environment().from_string(told["chat_template"]).render(messages=CHAT["messages"], add_generation_prompt=True)
    ids = post(served.app, "/tokenize", {"prompt": rendered, "add_special_tokens": False}).json()["tokens"]
    assert ids == post(served.app, "/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    end = post(served.app, "/tokenize", {"prompt": told["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert end == [tokenizer.eos_token_id]


def test_a_cut_that_cuts_nothing_is_taken(served: Site):
    """`vllm bench serve` sends it with every text that it wants embedded."""
    body = {"model": "tiny", "input": ["hello you"]}
    plain, cut = (post(served.app, "/v1/embeddings", body | more) for more in ({}, {"truncate_prompt_tokens": -1}))
    assert cut.status_code == 200 and cut.json()["data"] == plain.json()["data"] and "x-trimtab-ignored" not in cut.headers
    assert post(served.app, "/v1/completions", TEXT | {"truncate_prompt_tokens": -1}).status_code == 200
    for wrong in (0, -2, 1.5, "4", True):
        asked = TEXT | {"truncate_prompt_tokens": wrong}
        assert error_of(post(served.app, "/v1/completions", asked), 400)["param"] == "truncate_prompt_tokens", wrong


def test_of_a_prompt_that_is_cut_the_end_is_read(served: Site):
    """Against the same ids, cut by hand: of a text, of ids, of conversations, of texts to embed; also of those that would not fit."""
    path, chat = "/v1/completions", "/v1/chat/completions"
    text = "The quick brown fox jumps over the lazy dog"
    ids = post(served.app, "/tokenize", {"prompt": text}).json()["tokens"]
    want = post(served.app, path, TEXT | {"prompt": ids[-5:]}).json()
    for prompt in (text, ids, [text, "Now " + text], "x" * 100_000 + text):
        told = post(served.app, path, TEXT | {"prompt": prompt, "truncate_prompt_tokens": 5.0, "return_token_ids": True}).json()
        assert all(c["text"] == want["choices"][0]["text"] and c["prompt_token_ids"] == ids[-5:] for c in told["choices"])
        assert told["usage"]["prompt_tokens"] == 5 * len(told["choices"])
    whole = CHAT["messages"], [{"role": "user", "content": "y" * 900}]
    for messages in whole:
        all_of_it = post(served.app, "/tokenize", {"messages": messages, "model": "tiny"}).json().get("tokens")
        told = post(served.app, chat, CHAT | {"messages": messages, "truncate_prompt_tokens": 7, "return_token_ids": True}).json()
        assert told["usage"]["prompt_tokens"] == len(told["prompt_token_ids"]) == 7
        assert all_of_it is None or told["prompt_token_ids"] == all_of_it[-7:]
    fits = post(served.app, path, TEXT | {"prompt": "z" * 9000, "truncate_prompt_tokens": -1, "max_tokens": 12}).json()["usage"]
    assert (fits["prompt_tokens"], fits["completion_tokens"]) == (500, 12)
    by_hand, cut = (
        post(served.app, "/v1/embeddings", {"model": "tiny", "input": given, "truncate_prompt_tokens": k}).json()
        for given, k in (([ids[-4:]], None), ([text], 4))
    )
    assert cut["data"] == by_hand["data"] and cut["usage"]["prompt_tokens"] == 4
    assert (
        post(served.app, "/v1/embeddings", {"model": "tiny", "input": "x" * 600, "truncate_prompt_tokens": -1}).json()["usage"][
            "prompt_tokens"
        ]
        == 511
    )
    error_of(post(served.app, path, TEXT | {"prompt": "x" * 900, "truncate_prompt_tokens": 600}), 400)


def test_an_echo_of_a_cut_prompt_is_what_was_read(served: Site):
    ids = post(served.app, "/tokenize", {"prompt": "hello you"}).json()["tokens"]
    asked = {"echo": True, "logprobs": 1, "max_tokens": 0}
    want, told = (
        post(served.app, "/v1/completions", TEXT | asked | more).json()["choices"]
        for more in ({"prompt": ids[-3:]}, {"prompt": "hello you", "truncate_prompt_tokens": 3})
    )
    assert told == want and told[0]["text"] == "you"


def test_a_web_page_may_call_only_where_its_origin_is_named(served: Site):
    ask = {"origin": "https://a.example", "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    closed, named, every = (create_app(served.services, origins) for origins in ((), ("https://a.example",), ("*",)))
    assert "access-control-allow-origin" not in call(closed, "OPTIONS", "/v1/completions", headers=ask).headers
    for app, origin in ((named, "https://a.example"), (every, "*")):
        preflight = call(app, "OPTIONS", "/v1/completions", headers=ask)
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == origin
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        answer = post(app, "/v1/completions", TEXT | {"zz": 1}, origin="https://a.example")
        assert (
            answer.headers["access-control-allow-origin"] == origin
            and "x-trimtab-ignored" in answer.headers["access-control-expose-headers"]
        )
    other = post(named, "/v1/completions", TEXT, origin="https://b.example")
    assert "access-control-allow-origin" not in other.headers
