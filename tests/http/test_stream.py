"""Streams: their events in order, what is merged, what happens when something goes wrong on the way, how little each token costs."""

import asyncio
import threading
from typing import Any

import pytest
from fastapi import FastAPI

from tests.http.common import BASE, CHAT, TEXT, Caller, Site, error_of, events, limited, post, site
from trimtab.errors import AdapterError, TrimtabError
from trimtab.http.answer import Mailbox, mailbox, merged
from trimtab.serve.request import Delta, Token, Usage
from trimtab.serve.sequence import ServingError


def test_a_chats_events_in_order(served: Site):
    r = post(served.app, "/v1/chat/completions", CHAT | {"stream": True, "logprobs": True, "top_logprobs": 1})
    assert r.headers["content-type"].startswith("text/event-stream") and r.headers["cache-control"] == "no-cache"
    assert "content-length" not in r.headers
    *chunks, done = events(r.text)
    assert done == "[DONE]"
    assert all(c["object"] == "chat.completion.chunk" and c["model"] == BASE for c in chunks)
    assert len({c["id"] for c in chunks}) == 1 and chunks[0]["id"].startswith("chatcmpl-")
    assert all("usage" not in c for c in chunks), "only where it was asked for"
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""} and choices[0]["finish_reason"] is None
    assert [set(c["delta"]) for c in choices[1:-1]] == [{"content"}] * len(choices[1:-1])
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "length"
    whole = post(served.app, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1}).json()["choices"][0]
    assert "".join(c["delta"].get("content", "") for c in choices) == whole["message"]["content"]
    assert [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]] == whole["logprobs"]["content"]


def test_a_completions_events(served: Site):
    *chunks, done = events(post(served.app, "/v1/completions", TEXT | {"stream": True, "logprobs": 1, "prompt": ["hello", "you"]}).text)
    assert done == "[DONE]" and all(c["object"] == "text_completion" for c in chunks)
    whole = post(served.app, "/v1/completions", TEXT | {"logprobs": 1, "prompt": ["hello", "you"]}).json()["choices"]
    for i in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["text"] for c in mine) == whole[i]["text"]
        assert [o for c in mine if c["logprobs"] for o in c["logprobs"]["text_offset"]] == whole[i]["logprobs"]["text_offset"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]


def test_usage_comes_last_where_it_was_asked_for(served: Site):
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    *chunks, last, done = events(post(served.app, "/v1/chat/completions", body).text)
    assert done == "[DONE]" and last["choices"] == [] and all(c["usage"] is None for c in chunks)
    assert last["usage"] == post(served.app, "/v1/chat/completions", CHAT | {"n": 2}).json()["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT | {"prompt": ["hello", "hello you"]})])
def test_usage_comes_with_each_event_where_it_was_asked_for(served: Site, path: str, body: dict[str, Any]):
    """vLLM's continuous_usage_stats: of each choice until then. It says nothing without include_usage."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, done = events(post(served.app, path, body | {"stream": True, "n": 2, "stream_options": options}).text)
    prompts = [post(served.app, path, body | {"prompt": p}).json()["usage"]["prompt_tokens"] for p in body.get("prompt", [None])]
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] == 6 * 2 * len(prompts)
    for i in range(2 * len(prompts)):
        mine = [c for c in chunks if c["choices"][0]["index"] == i]
        counts = [c["usage"]["completion_tokens"] for c in mine]
        assert counts == sorted(counts) and counts[-1] == 6 and (body is not CHAT or counts[0] == 0)
        assert all(c["usage"]["prompt_tokens"] == prompts[i // 2] for c in mine)
        assert all(c["usage"]["total_tokens"] == prompts[i // 2] + n for c, n in zip(mine, counts, strict=True))
    alone = post(served.app, path, body | {"stream": True, "stream_options": {"continuous_usage_stats": True}})
    assert all("usage" not in c for c in events(alone.text)[:-1]) and "x-trimtab-ignored" not in alone.headers


def test_a_reader_who_falls_behind_gets_larger_pieces(served: Site):
    async def read() -> tuple[int, str]:
        c = Caller(served.app, "/v1/completions", TEXT | {"stream": True, "max_tokens": 200, "ignore_eos": True})
        task = c.start()
        while len(c.sent) < 2:
            await asyncio.sleep(0.001)
        c.blocked.clear()
        while served.services.admission.open:  # the engine goes on, and gives the room back
            await asyncio.sleep(0.001)
        c.blocked.set()
        await task
        text = "".join(e["choices"][0]["text"] for e in events(c.body.decode())[:-1])
        return len(c.sent), text

    messages, text = asyncio.run(read())
    whole = post(served.app, "/v1/completions", TEXT | {"max_tokens": 200, "ignore_eos": True}).json()["choices"][0]["text"]
    assert text == whole
    assert messages < 100, "what had gathered came in one piece"


def test_a_client_that_never_reads_is_cut_off():
    with site(change=limited(write_s=0.1)) as s:

        async def read() -> Caller:
            c = Caller(s.app, "/v1/completions", TEXT | {"stream": True, "max_tokens": 100_000, "ignore_eos": True})
            task = c.start()
            while not c.sent:
                await asyncio.sleep(0.001)
            c.blocked.clear()
            await task
            await s.settled()
            return c

        c = asyncio.run(read())
        assert c.sent[-1].get("more_body", True), "it must not look complete"
        s.idle()


class Stops(Caller):
    """A client that takes so many messages and then reads no more."""

    reads = 0

    async def _send(self, message):
        if len(self.sent) >= self.reads:
            self.blocked.clear()
        await super()._send(message)


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_a_whole_answer_that_nobody_reads_is_held_against_its_tenant_and_then_dropped(reads: int):
    """reads: messages that are taken before the client stops; the first is the status."""
    with site(change=limited(write_s=0.2)) as s:

        async def read() -> tuple[Caller, int]:
            c = Stops(s.app, "/v1/completions", TEXT | {"max_tokens": 200, "ignore_eos": True, "logprobs": 20, "n": 8})
            c.reads, most, task = reads, 0, c.start()
            while not task.done():
                most = max(most, sum(s.services.life.held.values()))
                await asyncio.sleep(0.002)
            await s.settled()
            return c, most

        c, most = asyncio.run(asyncio.wait_for(read(), 30))
        assert len(c.sent) == reads and all(m.get("more_body", True) for m in c.sent), "it must not look complete"
        assert most > 100_000, "the answer, beyond the body"
        assert not s.services.life.held
        s.idle()


class Scripted:
    """An engine that says what a test wants."""

    def __init__(self, *script: Delta | Exception):
        self.script, self.cancelled = script, []

    def submit(self, request, sink):
        for delta in self.script:
            if isinstance(delta, Exception):
                raise delta
            sink(delta)

    def cancel(self, request_id):
        self.cancelled.append(request_id)


def scripted(*script: Delta | Exception):
    from dataclasses import replace

    return lambda s: replace(s, engine=Scripted(*script))


@pytest.mark.parametrize(
    ("last", "status", "code"),
    [
        (Delta(finish="error", error=AdapterError("x is refused")), 500, "adapter_refused"),
        (Delta(finish="error", error=TrimtabError("too long")), 400, None),
        (Delta(finish="error", error=ServingError("broken")), 500, None),
        (Delta(finish="deadline"), 504, "deadline"),
        (Delta(finish="cancelled"), 503, "shutting_down"),
    ],
)
def test_failures_have_a_status_before_the_first_token_and_an_event_after_it(last: Delta, status: int, code: str | None):
    for stream in (False, True):
        with site(change=scripted(last)) as s:
            error = error_of(post(s.app, "/v1/completions", TEXT | {"stream": stream}), status)
            assert error["code"] == code
            assert s.services.admission.open == 0
    with site(change=scripted(Delta("a", (Token(1),)), last)) as s:
        asyncio.run(_stream_fails_midway(s, status, code))


async def _stream_fails_midway(s: Site, status: int, code: str | None) -> None:
    engine = s.services.engine
    first, last = engine.script
    engine.script = (first,)
    sinks = []
    submit = engine.submit
    engine.submit = lambda request, sink: (sinks.append(sink), submit(request, sink))
    c = Caller(s.app, "/v1/completions", TEXT | {"stream": True})
    task = c.start()
    while len(c.sent) < 2:
        await asyncio.sleep(0.001)
    sinks[0](last)
    await task
    assert c.status == 200
    piece, error, done = events(c.body.decode())
    assert piece["choices"][0]["text"] == "a" and done == "[DONE]"
    assert error["error"]["code"] == code and error["error"]["message"] and error["error"]["type"]
    assert s.services.admission.open == 0


def test_what_submit_raises_has_its_status_and_frees_the_room():
    with site(change=scripted(TrimtabError("cannot be run"))) as s:
        assert "cannot be run" in error_of(post(s.app, "/v1/completions", TEXT | {"n": 2}), 400)["message"]
        assert s.services.admission.open == 0
    with site(change=scripted(RuntimeError("a bug"))) as s:
        error = error_of(post(s.app, "/v1/completions", TEXT), 500)
        assert "a bug" not in error["message"] and error["code"] == "internal_error"
        assert s.services.admission.open == 0


def test_where_the_second_of_two_is_refused_the_first_is_cancelled():
    class Second(Scripted):
        def submit(self, request, sink):
            if request.id.endswith("-1"):
                raise TrimtabError("no more")
            self.sink = sink

        def cancel(self, request_id):
            super().cancel(request_id)
            self.sink(Delta(finish="cancelled", usage=Usage(5, 0)))

    from dataclasses import replace

    engine = Second()
    with site(change=lambda s: replace(s, engine=engine)) as s:

        async def go() -> None:
            c = Caller(s.app, "/v1/completions", TEXT | {"n": 2})
            await c.start()
            assert c.status == 400
            await asyncio.sleep(0)
            assert s.services.admission.open == 0

        asyncio.run(go())
    assert len(engine.cancelled) == 1 and engine.cancelled[0].endswith("-0")


def test_an_answer_too_late_is_a_504():
    with site(change=limited(request_s=0.05)) as s:
        body = TEXT | {"max_tokens": 100_000, "ignore_eos": True}
        s.engine.forward_lock.acquire()
        threading.Timer(0.3, s.engine.forward_lock.release).start()
        error = error_of(post(s.app, "/v1/completions", body), 504)
        assert error["code"] == "deadline"
        s.idle()


def test_one_wake_up_carries_all_that_has_gathered():
    class Loop:
        def __init__(self):
            self.calls = []

        def is_closed(self):
            return False

        def call_soon_threadsafe(self, what):
            self.calls.append(what)

    class Taken(list):
        def take(self, index, delta):
            self.append((index, delta.text))

    loop, answer = Loop(), Taken()
    box = Mailbox(loop)
    for i in range(100):
        box.post(answer, i, Delta(str(i)))
    assert len(loop.calls) == 1
    loop.calls.pop()()
    assert answer == [(i, str(i)) for i in range(100)]
    box.post(answer, 0, Delta("later"))
    assert len(loop.calls) == 1, "woken anew"


def test_merging_keeps_order_and_the_last_word():
    a, b = Delta("a", (Token(1),)), Delta("b", (Token(2),), "stop", Usage(1, 2))
    assert merged(a, b) == Delta("ab", (Token(1), Token(2)), "stop", Usage(1, 2))


def test_a_last_word_after_the_loops_end_still_gives_the_room_back():
    with site() as s:

        async def go() -> None:
            c = Caller(s.app, "/v1/completions", TEXT | {"max_tokens": 100_000, "ignore_eos": True})
            task = c.start()
            while not s.engine.stats().running:
                await asyncio.sleep(0.001)
            task.cancel()

        asyncio.run(go())
        s.engine.drain(5)
        s.app.state.mailbox.deliver()  # the last word may have come between the loop's last round and its end
        assert s.services.admission.open == 0


def test_what_was_posted_as_a_loop_ended_is_delivered_before_the_next():
    took = []

    class Taken:
        def take(self, index, delta):
            took.append(delta.text)

    app = FastAPI()

    async def post_and_end() -> None:
        box = mailbox(app)
        box.loop.call_soon_threadsafe = lambda what: None  # the loop ends before it runs what was handed over
        box.post(Taken(), 0, Delta("last"))

    asyncio.run(post_and_end())
    assert not took

    async def next_one() -> None:
        mailbox(app)

    asyncio.run(next_one())
    assert took == ["last"]
