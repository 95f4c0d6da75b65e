"""Clients that go away, at every moment a request has: nothing of theirs stays behind."""

import asyncio
import random
import time

import pytest

from tests.http.common import CHAT, TEXT, Caller, Site, adapter_folders, base_of, site
from trimtab.http.assemble import Asked

LONG = TEXT | {"max_tokens": 100_000, "ignore_eos": True}


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_decoding(stream: bool):
    with site() as s:

        async def go() -> None:
            c = Caller(s.app, "/v1/completions", LONG | {"stream": stream, "n": 3})
            task = c.start()
            await until(lambda: s.engine.stats().running == 3 and len(c.sent) >= (2 if stream else 0))
            c.leave()
            await asyncio.wait_for(task, 5)
            await s.settled()
            await until(lambda: len(s.ends) == 3)
            assert c.status == (200 if stream else 499)

        asyncio.run(go())
        s.idle()
        assert s.ends == ["cancelled"] * 3


def test_hundreds_that_leave_at_once_end_one_at_a_time():
    """Each end takes about a millisecond of the event loop, in which the engine's step hardly gets on."""
    with site() as s:

        async def go() -> None:
            taken, gate, done = s.services.turns.take, asyncio.Event(), []
            gate.set()

            async def take(tenant: str) -> None:
                await gate.wait()
                await taken(tenant)

            s.services.turns.take = take  # type: ignore[method-assign]
            callers = [Caller(s.app, "/v1/completions", LONG) for _ in range(20)]
            tasks = [c.start() for c in callers]
            await until(lambda: s.engine.stats().running == 20)
            gate.clear()
            for i, c in enumerate(callers):
                tasks[i].add_done_callback(lambda t, i=i: done.append(i))
                c.leave()
            await until(lambda: len(s.ends) == 20)
            await asyncio.sleep(0.05)
            assert not done, "the engine has let go of all; the requests wait for their turns"
            gate.set()
            await asyncio.wait_for(asyncio.gather(*tasks), 5)
            await s.settled()
            assert {c.status for c in callers} == {499}

        asyncio.run(go())
        s.idle()


def test_leaving_while_nothing_is_read():
    """The stream is stuck in sending: the engine is told nevertheless."""
    with site() as s:

        async def go() -> None:
            c = Caller(s.app, "/v1/completions", LONG | {"stream": True})
            task = c.start()
            await until(lambda: len(c.sent) >= 2)
            c.blocked.clear()
            await until(lambda: c.sending)
            c.leave()
            await until(lambda: s.ends)
            assert not task.done()
            c.blocked.set()
            await task
            await s.settled()

        asyncio.run(go())
        s.idle()
        assert s.ends == ["cancelled"]


def test_leaving_while_a_grammar_is_compiled():
    with site() as s:

        async def go() -> None:
            c = Caller(s.app, "/v1/completions", LONG | {"structured_outputs": {"regex": "[a-z]{400}"}})
            task = c.start()
            await until(lambda: len(s.engine.requests) == 1)
            c.leave()
            await task
            await s.settled()

        asyncio.run(go())
        s.idle()
        assert s.ends == ["cancelled"]


def test_leaving_while_queued():
    with site(max_running=1) as s:

        async def go() -> None:
            first, second = Caller(s.app, "/v1/completions", LONG), Caller(s.app, "/v1/completions", LONG | {"stream": True})
            tasks = [first.start()]
            await until(lambda: s.engine.stats().running == 1)
            tasks.append(second.start())
            await until(lambda: s.engine.stats().waiting == 1)
            second.leave()
            await asyncio.wait_for(tasks[1], 5)
            await until(lambda: s.engine.stats().waiting == 0)
            assert s.engine.stats().running == 1 and second.status == 499
            first.leave()
            await asyncio.wait_for(tasks[0], 5)
            await s.settled()

        asyncio.run(go())
        s.idle()
        assert s.ends == ["cancelled"] * 2


def test_leaving_during_a_long_prefill_and_while_an_adapter_loads(tmp_path):
    base = base_of()
    with site(Asked(adapters=adapter_folders(tmp_path, base)), base=base, max_step_rows=64) as s:

        async def go() -> None:
            s.engine.forward_lock.acquire()  # the engine stands still with the request in its first chunk
            try:
                prefill = Caller(s.app, "/v1/completions", LONG | {"prompt": "x" * 400})
                loading = Caller(s.app, "/v1/completions", LONG | {"model": "lora", "stream": True})
                tasks = [prefill.start(), loading.start()]
                # both have reached the engine, and a step that stands still has one of them
                await until(lambda: (e := s.engine.stats()).running == 1 and e.running + e.waiting + e.loading == 2)
                for c in (prefill, loading):
                    c.leave()
                await asyncio.wait_for(asyncio.gather(*tasks), 5)
                assert s.services.admission.open >= 1, "room is given back when the engine has let go, not before"
            finally:
                s.engine.forward_lock.release()
            await s.settled()

        asyncio.run(go())
        s.idle()
        assert s.ends == ["cancelled"] * 2


def test_leaving_before_the_engine_has_heard_of_it():
    """The prompt is being tokenized in a thread; the client leaves meanwhile."""
    from dataclasses import replace

    def slow(text: str, start: bool, last: int | None) -> list[int]:
        time.sleep(0.05)
        return [1, 2, 3]

    with site(change=lambda s: replace(s, words=replace(s.words, encode_text=slow))) as s:
        submitted = []
        submit = s.engine.submit
        s.engine.submit = lambda r, sink: (submitted.append(r), submit(r, sink))

        async def go() -> None:
            c = Caller(s.app, "/v1/completions", LONG | {"prompt": "x" * 5000})
            task = c.start()
            await until(lambda: s.services.admission.open == 1)
            c.leave()
            await task
            await s.settled()
            assert c.status == 499

        asyncio.run(go())
        assert not submitted
        s.idle()


def swarm(s: Site, count: int, models: list[str], seed: int) -> dict[int | None, int]:
    """`count` requests of all kinds; each client leaves after a random while, some before, some after the end."""
    r = random.Random(seed)
    seen: dict[int | None, int] = {}

    async def one(i: int) -> None:
        body = r.choice([CHAT, TEXT | {"prompt": "y" * r.randrange(1, 300)}])
        grammar = {"structured_outputs": {"regex": "[a-z]{50}"}} if r.random() < 0.1 else {}
        more = {"model": r.choice(models), "stream": r.random() < 0.5, "n": r.choice([1, 1, 1, 3]), "max_tokens": r.choice([1, 5, 60])}
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        c = Caller(s.app, path, body | more | grammar)
        await asyncio.sleep(r.random() * count * 0.002)
        task = c.start()
        if r.random() < 0.75:
            await asyncio.sleep(r.choice([0, 0.001, 0.005, 0.02, 0.05, 0.2, 1.0]) * r.random())
            c.leave()
        await asyncio.wait_for(task, 60)
        seen[c.status] = seen.get(c.status, 0) + 1

    async def go() -> None:
        await asyncio.gather(*(one(i) for i in range(count)))
        await s.settled(30)

    asyncio.run(go())
    return seen


@pytest.mark.parametrize("count", [60, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.alone])])
def test_a_crowd_that_comes_and_goes_leaves_nothing(tmp_path, count: int):
    base = base_of()
    adapters = adapter_folders(tmp_path, base)
    asked = Asked(adapters=adapters, max_open=4 * count)
    with site(asked, base=base, max_running=8, kv_bytes=1 << 20, adapter_bytes=40_000) as s:
        seen = swarm(s, count, ["tiny", *adapters], seed=count)
        assert set(seen) <= {200, 499}, seen
        assert seen.get(499, 0) > count // 10 and seen.get(200, 0) > count // 10, seen
        s.idle()
        assert s.engine.stats().waiting == 0
        assert s.ends.count("cancelled") > count // 20 and set(s.ends) <= {"cancelled", "length", "stop"}, s.ends
