"""Sizes, times and hosts, checked while bytes arrive; with a real socket where it is about connections."""

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.http.common import TEXT, Caller, client, error_of, limited, post, site
from trimtab.http import server
from trimtab.http.assemble import Asked
from trimtab.http.services import Services
from trimtab.serve.tenant import Tenant


@pytest.fixture(scope="module")
def small() -> Iterator:
    with site(change=limited(body_bytes=2000, body_s=0.3)) as s:
        yield s
        s.idle()


class Pieces(Caller):
    """A client that sends its body in pieces, and perhaps not to the end."""

    def __init__(self, app, pieces: list[bytes], *, end: bool = True, headers=None):
        super().__init__(app, "/v1/completions", b"", headers)
        self.scope["headers"] = [(k, v) for k, v in self.scope["headers"] if k != b"content-length"]
        self.pieces, self.end, self.taken = pieces, end, 0

    async def _receive(self):
        if self.taken < len(self.pieces):
            self.taken += 1
            return {"type": "http.request", "body": self.pieces[self.taken - 1], "more_body": self.taken < len(self.pieces) or not self.end}
        await self._left.wait()
        return {"type": "http.disconnect"}


def test_a_body_is_refused_by_its_length(small):
    """One that is a little too large is read away first, so that the client gets to read why; a huge one is not read at all."""
    raw = json.dumps(TEXT | {"prompt": "x" * 3000}).encode()
    for length, read in ((len(raw), True), (8000, True), (8001, False)):
        c = Caller(small.app, "/v1/completions", raw, headers={"content-length": str(length)})
        asyncio.run(c.run())
        assert c.status == 413 and c.was_read == read, length
    c = Pieces(small.app, [b" " * 500] * 1000)
    c.scope["headers"].append((b"content-length", b"3000"))
    asyncio.run(c.run())
    assert c.status == 413 and c.taken == 17, "it sends more than it said, and is not read for ever"
    r = post(small.app, "/v1/completions", raw)
    assert error_of(r, 413)["code"] == "body_too_large" and r.headers["connection"] == "close"
    assert error_of(post(small.app, "/v1/completions", TEXT, **{"content-length": "9" * 30}), 413)


def test_a_body_without_a_length_is_counted(small):
    c = Pieces(small.app, [b" " * 500] * 1000)
    asyncio.run(c.run())
    assert c.status == 413 and c.taken == 5, "it stopped reading as soon as it was too much"
    assert json.loads(c.body)["error"]["code"] == "body_too_large"


def test_a_length_that_lies_does_not_help(small):
    c = Pieces(small.app, [b" " * 500] * 10, headers={"content-length": "5"})
    c.scope["headers"].append((b"content-length", b"5"))
    asyncio.run(c.run())
    assert c.status == 413


def test_a_body_in_pieces_is_read(small):
    raw = json.dumps(TEXT).encode()
    c = Pieces(small.app, [raw[i : i + 7] for i in range(0, len(raw), 7)])
    asyncio.run(c.run())
    assert c.status == 200, c.body


def test_a_body_that_does_not_come_is_not_waited_for(small):
    c = Pieces(small.app, [b'{"model":'], end=False)
    began = time.monotonic()
    asyncio.run(c.run())
    assert c.status == 408 and 0.25 < time.monotonic() - began < 3
    assert json.loads(c.body)["error"]["code"] == "body_timeout"
    small.idle()


def test_a_client_that_leaves_while_it_sends_is_let_go(small):
    async def go() -> Pieces:
        c = Pieces(small.app, [b'{"model":'], end=False)
        task = c.start()
        await asyncio.sleep(0.01)
        c.leave()
        await task
        return c

    assert asyncio.run(go()).status == 499
    small.idle()


def test_a_full_server_says_so_in_no_time():
    from trimtab.http.assemble import Asked

    with site(Asked(max_open=2)) as s:

        async def go() -> tuple[list[Caller], float]:
            body = TEXT | {"max_tokens": 100_000, "ignore_eos": True}
            running = [Caller(s.app, "/v1/completions", body) for _ in range(2)]
            tasks = [c.start() for c in running]
            while s.services.admission.open < 2:
                await asyncio.sleep(0.001)
            refused = [Caller(s.app, "/v1/completions", TEXT | {"prompt": "x" * 400}) for _ in range(50)]
            began = time.perf_counter()
            await asyncio.gather(*(c.start() for c in refused))
            spent = time.perf_counter() - began
            for c in running:
                c.leave()
            await asyncio.gather(*tasks)
            await s.settled()
            return refused, spent / len(refused)

        refused, each = asyncio.run(go())
        assert {c.status for c in refused} == {503}
        assert all(int(dict(c.sent[0]["headers"])[b"retry-after"]) >= 1 for c in refused)
        assert {json.loads(c.body)["error"]["type"] for c in refused} == {"overloaded_error"}
        assert not any(c.was_read for c in refused), "a refusal costs next to nothing: the body is not even read"
        assert s.services.admission.rejects["full"] == len(refused)
        assert each < 0.05
        s.idle()


@contextmanager
def listening(services: Services, app, *, drain_s: float = 5.0) -> Iterator[tuple[str, int]]:
    """The app behind a real socket, in a thread."""
    sock = server.bind("127.0.0.1", 0)
    ready = threading.Event()
    made = server.make(app, services, drain_s=drain_s, ready=ready.set, stop=lambda: None)
    thread = threading.Thread(target=made.run, args=([sock],))
    thread.start()
    try:
        assert ready.wait(10)
        yield sock.getsockname()
    finally:
        made.handle_exit(15, None)
        thread.join(10)
    assert not thread.is_alive()


def test_what_is_there_at_the_start_is_not_looked_at_by_collections():
    """Some 400,000 objects of torch and transformers: a full collection would stop everything for 0.2 s."""
    with site() as s:
        with listening(s.services, s.app):
            assert gc.get_freeze_count() > 100_000
        assert gc.get_freeze_count() == 0


def answer(sock: socket.socket) -> bytes:
    """All of /livez' answer, in however many segments it comes."""
    got = b""
    while not got.endswith(b'{"status":"ok"}'):
        got += sock.recv(4096)
    return got


def test_a_connection_that_sends_no_head_is_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    with site() as s, listening(s.services, s.app) as address:
        with (
            socket.create_connection(address) as silent,
            socket.create_connection(address) as slow,
            socket.create_connection(address) as good,
        ):
            good.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answer(good).startswith(b"HTTP/1.1 200")
            slow.sendall(b"GET /livez HTTP/1.1\r\nhost")
            for sock in (silent, slow):
                sock.settimeout(3)
                assert sock.recv(4096) in (b"",), "closed"
            time.sleep(0.2)
            good.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answer(good).startswith(b"HTTP/1.1 200"), "an idle connection that has sent a request is kept"


ENDLESS = {
    "one header": b"GET /livez HTTP/1.1\r\nhost: x\r\nx: ",
    "many headers": b"GET /livez HTTP/1.1\r\nhost: x\r\n",
    "a path": b"GET /",
    "trailers": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    b"2\r\n{}\r\n0\r\n",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_head_without_an_end_is_refused_before_it_takes_memory(what: str):
    """Before any key is looked at. What the server takes of it is what fits into the system's own buffers besides."""
    piece = b"x-header: " + b"a" * 4000 + b"\r\n" if what in ("many headers", "trailers") else b"a" * 4000
    with site() as s, listening(s.services, s.app) as address, socket.create_connection(address) as bad:
        bad.settimeout(5)
        bad.sendall(ENDLESS[what])
        sent = 0
        with suppress(ConnectionError):
            while sent < 64 << 20:
                bad.sendall(piece)
                sent += len(piece)
        assert sent < 32 << 20, "it goes on reading"
        with socket.create_connection(address) as good:
            good.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answer(good).startswith(b"HTTP/1.1 200")


def test_a_head_that_is_too_large_is_told_so_and_a_large_one_is_read():
    with site() as s, listening(s.services, s.app) as address:
        for size, end, status in ((server.MAX_HEAD - 200, b"\r\n\r\n", b"200"), (server.MAX_HEAD + 1, b"", b"431")):
            with socket.create_connection(address) as client:
                client.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"a" * size + end)
                got = client.recv(4096)
            assert got.startswith(b"HTTP/1.1 " + status), got
        assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "head_too_large"


def test_a_body_in_many_small_pieces_is_no_head():
    raw = json.dumps(TEXT).encode()
    with site() as s, listening(s.services, s.app) as address, socket.create_connection(address) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
            + b"".join(b"1;%s\r\n%c\r\n" % (b"e" * 3000, byte) for byte in raw)  # more than a head's bytes besides
            + b"0\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_small_packets_are_sent_at_once(monkeypatch: pytest.MonkeyPatch):
    """Nagle's algorithm would hold an answer's body until the client acknowledges its head, which takes 40 ms."""
    delays: list[int] = []
    made = server.Protocol.connection_made

    def observed(self, transport: asyncio.Transport) -> None:
        made(self, transport)
        delays.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(server.Protocol, "connection_made", observed)
    with site() as s, listening(s.services, s.app) as address, socket.create_connection(address) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200")
    assert delays == [1]


def test_a_port_that_is_taken_is_a_users_mistake():
    from trimtab.errors import ConfigError

    with server.bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot listen on"):
        server.bind("127.0.0.1", taken.getsockname()[1])


def test_bodies_under_way_are_bounded_for_each_tenant():
    with site(change=limited(body_bytes=2000, held_bytes=3000, body_s=5)) as s:

        async def several() -> None:
            raw = json.dumps(TEXT | {"prompt": "x" * 1500}).encode()
            open_ones = [Pieces(s.app, [raw], end=False) for _ in range(2)]
            tasks = [c.start() for c in open_ones]
            async with asyncio.timeout(5):
                while open_ones[1].status is None:
                    await asyncio.sleep(0.005)
            assert open_ones[1].status == 429 and open_ones[0].status is None
            assert json.loads(open_ones[1].body)["error"]["code"] == "rate_limit_exceeded"
            open_ones[0].leave()
            await asyncio.gather(*tasks)

        asyncio.run(several())
        assert not s.services.life.held
        assert post(s.app, "/v1/completions", TEXT).status_code == 200


def test_a_prompt_that_cannot_fit_is_refused_by_its_characters():
    def blind(services: Services) -> Services:
        refuse = lambda text: pytest.fail("it was tokenized")  # noqa: E731
        return replace(services, words=replace(services.words, encode_chat=refuse, encode_text=refuse))

    with site(change=blind) as s:
        text = "x" * (s.services.words.max_chars + 1)
        chat = {"model": "tiny", "messages": [{"role": "user", "content": text[:4000]}] * (len(text) // 4000 + 1)}
        for path, body, where in (
            ("/v1/completions", TEXT | {"prompt": text}, "prompt"),
            ("/v1/completions", TEXT | {"prompt": ["a", text]}, "prompt[1]"),
            ("/v1/chat/completions", chat, "messages"),
        ):
            error = error_of(post(s.app, path, body), 400)
            assert (error["code"], error["param"]) == ("context_length_exceeded", where) and "512 tokens" in error["message"]
        s.idle()


def test_who_loads_adapters_leaves_threads_to_others(tmp_path: Path):
    """Fifty loads of one tenant that hang (a slow disk, a huge file) stop neither another's load nor a prompt."""
    with site(Asked(folders=[tmp_path])) as s:
        hang = threading.Event()

        async def both() -> None:
            def load(name: str, path: str, tenant: Tenant, *, inplace: bool = False) -> None:
                assert tenant.name != "slow" or hang.wait(20)

            s.services.catalog.load = load  # type: ignore[method-assign]
            slow, other = Tenant("slow", "slow"), Tenant("other", "other")
            hung = [asyncio.create_task(s.services.load_work.run(slow.name, lambda: load("x", "x", slow))) for _ in range(50)]
            await asyncio.sleep(0.02)
            await asyncio.wait_for(s.services.load_work.run(other.name, lambda: load("x", "x", other)), 5)
            async with client(s.app) as c:
                r = await asyncio.wait_for(c.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": str(tmp_path)}), 5)
                assert r.status_code == 200
                r = await asyncio.wait_for(c.post("/v1/completions", json=TEXT | {"prompt": "word " * 100}), 10)
                assert r.status_code == 200
            hang.set()
            await asyncio.gather(*hung)

        asyncio.run(both())


def test_logprobs_that_would_fill_memory_are_refused():
    """64 answers of full length with 20 alternatives a token are over a gigabyte."""
    with site(change=limited(logprobs=1000)) as s:
        many = TEXT | {"prompt": ["a", "b"], "n": 2, "max_tokens": 20, "logprobs": 20}
        assert error_of(post(s.app, "/v1/completions", many), 400)["param"] == "logprobs"
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20}
        assert error_of(post(s.app, "/v1/chat/completions", chat), 400)["param"] == "top_logprobs", "no max_tokens: as many as fit"
        assert post(s.app, "/v1/completions", many | {"max_tokens": 10}).status_code == 200
        s.idle()


def test_a_schema_is_measured_with_the_body():
    vast = {"type": "object", "description": "x" * 70_000}
    with site() as s:
        for grammar, param in (
            ({"structured_outputs": {"json": vast}}, "structured_outputs.json"),
            ({"response_format": {"type": "json_schema", "json_schema": {"schema": vast}}}, "response_format.json_schema.schema"),
        ):
            error = error_of(post(s.app, "/v1/completions", TEXT | grammar), 400)
            assert error["param"] == param and "at most 65536" in error["message"], error
