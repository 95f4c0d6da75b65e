"""The end of a server: SIGTERM drops nobody, newcomers are told to go elsewhere, the process ends with 0."""

import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.http.common import TEXT, call, error_of, events, post, site
from tests.http.process import Served, serving

LONG = TEXT | {"max_tokens": 400, "ignore_eos": True}


def test_a_draining_server_says_so_and_takes_nobody():
    with site() as s:
        assert call(s.app, "GET", "/readyz").json() == {"status": "ready"}
        s.services.life.draining = True
        ready = call(s.app, "GET", "/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert call(s.app, "GET", "/livez").status_code == 200, "it must not be killed for it"
        r = post(s.app, "/v1/completions", TEXT)
        assert error_of(r, 503)["code"] == "shutting_down" and int(r.headers["retry-after"]) >= 1
        assert r.headers["connection"] == "close"


def test_a_dead_engine_is_told():
    with site() as s:
        s.engine.close()
        assert call(s.app, "GET", "/livez").status_code == 503
        assert call(s.app, "GET", "/readyz").json() == {"status": "the engine has stopped"}


async def ask(c: httpx.AsyncClient, stream: bool, begun: asyncio.Event) -> tuple[int, str]:
    """(status, body) of a long request; begun: set once its first bytes are there, or it is sent."""
    async with c.stream("POST", "/v1/completions", json=LONG | {"stream": stream}) as r:
        text = ""
        async for piece in r.aiter_text():
            begun.set()
            text += piece
        return r.status_code, text


async def under_way(served: Served, c: httpx.AsyncClient, streams: int, whole: int) -> list[asyncio.Task[tuple[int, str]]]:
    """Requests that run: each stream has had its first bytes, and the engine has all of them."""
    begun = [asyncio.Event() for _ in range(streams)]
    tasks = [asyncio.create_task(ask(c, False, asyncio.Event())) for _ in range(whole)]
    tasks += [asyncio.create_task(ask(c, True, b)) for b in begun]
    await asyncio.wait_for(asyncio.gather(*(b.wait() for b in begun)), 30)
    while True:
        text = (await c.get("/metrics")).text
        if any(line.startswith("trimtab_open_answers{") and float(line.split()[-1]) == streams + whole for line in text.splitlines()):
            return tasks
        await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.alone
def test_sigterm_drops_no_running_request(tiny_llama_folder: Path, tmp_path: Path):
    with serving(tiny_llama_folder, tmp_path, "--local") as served:
        expected = httpx.post(f"{served.url}/v1/completions", json=LONG).json()["choices"][0]["text"]

        async def go() -> None:
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as c:
                tasks = await under_way(served, c, 8, 4)
                assert not any(t.done() for t in tasks), "they are to be in the middle"
                served.process.send_signal(signal.SIGTERM)
                while (await c.get("/readyz")).status_code != 503:
                    await asyncio.sleep(0.01)
                late = await c.post("/v1/completions", json=TEXT)
                assert late.status_code == 503 and int(late.headers["retry-after"]) >= 1
                assert not all(t.done() for t in tasks)
                for status, text in await asyncio.gather(*tasks[4:]):
                    *chunks, done = events(text)
                    assert status == 200 and done == "[DONE]"
                    assert "".join(e["choices"][0]["text"] for e in chunks) == expected
                for status, text in await asyncio.gather(*tasks[:4]):
                    assert status == 200 and expected in httpx.Response(200, text=text).json()["choices"][0]["text"]

        asyncio.run(go())
        assert served.process.wait(20) == 0
        answered = [x for x in served.lines() if x.get("path") == "/v1/completions"]
        assert sum(x["status"] == 200 for x in answered) == 13 and sum(x["status"] == 503 for x in answered) == 1


@pytest.mark.slow
@pytest.mark.alone
def test_what_takes_longer_than_the_drain_is_told_so(tiny_llama_folder: Path, tmp_path: Path):
    with serving(tiny_llama_folder, tmp_path, "--local", "--drain-seconds", "0.1") as served:

        async def go() -> None:
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as c:
                tasks = await under_way(served, c, 12, 4)
                served.process.send_signal(signal.SIGTERM)
                answers = await asyncio.gather(*tasks)
            assert all(status == 503 and "shutting down" in text for status, text in answers[:4]), answers[:4]
            for status, text in answers[4:]:
                *_, error, done = events(text)
                assert status == 200 and done == "[DONE]" and error["error"]["code"] == "shutting_down"

        asyncio.run(go())
        assert served.process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.alone
def test_an_idle_server_ends_at_once(tiny_llama_folder: Path, tmp_path: Path):
    with serving(tiny_llama_folder, tmp_path, "--local") as served, httpx.Client(base_url=served.url) as c:
        assert c.get("/v1/models").status_code == 200  # and the connection stays open
        began = time.monotonic()
        assert served.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 8
        assert {x["event"] for x in served.lines()} == {"memory", "request"}, "a clean end has nothing to report"
