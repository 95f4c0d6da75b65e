"""What answers are made of: the JSON that is put together by hand is what a dict would give, and large answers hold up nobody."""

import asyncio
import json
import math
import threading
from functools import partial
from typing import Any

import pytest

from tests.http.common import CHAT, TEXT, error_of, limited, post, site
from trimtab.http.ask import AnswerPlan
from trimtab.http.logprobs import LEAST_LOGPROB, Logprobs
from trimtab.http.schema import ChatBody, CompletionBody
from trimtab.http.services import Words
from trimtab.http.write import SMALL, Writer
from trimtab.serve.request import Delta, Token, Usage

PIECES = [b"a", b' "q\\', b"\xe2\x82", b"\xac\n", "é".encode(), b"", b"\x00", b"x" * 300]
TOKENS = tuple(
    Token(i, lp, ((i, lp), ((i + 1) % len(PIECES), -1.5e-7), (5, None)))
    for i, lp in enumerate([-0.25, -math.inf, None, 0.0, -1 / 3, -2e20, math.nan, -7.0])
)


def finite(lp: float | None) -> float | None:
    return None if lp is None else LEAST_LOGPROB if math.isnan(lp) else max(lp, LEAST_LOGPROB)


def chat_one(i: int, lp: float | None) -> dict[str, Any]:
    return {"token": PIECES[i].decode("utf-8", "replace"), "logprob": finite(lp), "bytes": list(PIECES[i])}


def spelt(i: int) -> str:
    return {2: "bytes:\\xe2\\x82", 3: "bytes:\\xac\\x0a", 5: "id:5"}.get(i) or PIECES[i].decode()


def writer(body: ChatBody | CompletionBody) -> Writer:
    async def here(write):
        return write()

    words = Words(lambda m, v: [], lambda t: [], PIECES.__getitem__, frozenset(), len(PIECES), 64, 64)
    return Writer(AnswerPlan("id", body, None, 1, 1, 1), words, "fp", here)


WANT = {
    "chat": {
        "content": [chat_one(t.id, t.logprob) | {"top_logprobs": [chat_one(i, lp) for i, lp in t.top]} for t in TOKENS],
        "refusal": None,
    },
    "text": {
        "tokens": [spelt(t.id) for t in TOKENS],
        "token_logprobs": [finite(t.logprob) for t in TOKENS],
        "top_logprobs": [None if t.logprob is None else {spelt(i): finite(lp) for i, lp in (*t.top, (t.id, t.logprob))} for t in TOKENS],
        "text_offset": [0, 1, 5, 5, 7, 8, 8, 9],
    },
}
BODY = {
    "chat": ChatBody(model="m", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3),
    "text": CompletionBody(model="m", prompt="x", logprobs=3),
}


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_logprobs_are_the_json_of_what_they_say(kind: str):
    delta = Delta("é €", TOKENS, "stop", Usage(1, 8))
    whole = json.loads(asyncio.run(writer(BODY[kind]).whole([delta], delta.usage)))["choices"][0]
    assert whole["logprobs"] == WANT[kind] and whole["finish_reason"] == "stop"
    assert (whole["message"]["content"] if kind == "chat" else whole["text"]) == "é €"
    events = asyncio.run(writer(BODY[kind]).chunks({0: delta})).decode().split("\n\n")[:-1]
    told = [json.loads(e.removeprefix("data: "))["choices"][0]["logprobs"] for e in events]
    assert [t for t in told if t] == [WANT[kind]]


@pytest.mark.parametrize(("tokens", "thread"), [(2, "MainThread"), (40, "trimtab-words")])
def test_a_large_answer_is_written_on_the_threads_for_words(monkeypatch: pytest.MonkeyPatch, tokens: int, thread: str):
    seen: set[str] = set()
    real = Logprobs.__call__
    monkeypatch.setattr(Logprobs, "__call__", lambda *a: (seen.add(threading.current_thread().name.partition("_")[0]), real(*a))[1])
    with site() as s:
        body = CHAT | {"n": 4, "max_tokens": tokens, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
        told = post(s.app, "/v1/chat/completions", body).json()
        assert [len(c["logprobs"]["content"]) for c in told["choices"]] == [tokens] * 4
        assert seen == {thread} and (tokens * 4 * 21 > SMALL) == (thread != "MainThread")
        seen.clear()
        plan = AnswerPlan("id", ChatBody(**CHAT, logprobs=True, top_logprobs=20), None, 4, 4, 4)
        gathered = {i: Delta("", tuple(Token(1, -1.0, ((2, -2.0),) * 20) for _ in range(tokens))) for i in range(4)}
        aside = partial(s.services.words_work.run, "a")
        asyncio.run(Writer(plan, s.services.words, "fp", aside).chunks(gathered))
        assert seen == {thread}, "events that a slow reader has let gather"
        s.idle()


def test_a_token_counts_by_itself_beside_its_alternatives():
    with site(change=limited(logprobs=100)) as s:
        chat = CHAT | {"logprobs": True, "n": 2}
        assert error_of(post(s.app, "/v1/chat/completions", chat | {"max_tokens": 51}), 400)["param"] == "logprobs"
        assert error_of(post(s.app, "/v1/chat/completions", chat | {"max_tokens": 26, "top_logprobs": 1}), 400)["param"] == "top_logprobs"
        assert error_of(post(s.app, "/v1/completions", TEXT | {"max_tokens": 101, "logprobs": 0}), 400)["param"] == "logprobs"
        assert post(s.app, "/v1/chat/completions", chat | {"max_tokens": 50}).status_code == 200
        assert post(s.app, "/v1/chat/completions", CHAT | {"max_tokens": 200}).status_code == 200, "none are asked for"
        s.idle()
