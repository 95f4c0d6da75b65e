"""Two servers over one database of tenants, as processes: keys, usage and limits across them, and what is left when one is killed."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.http.common import TEXT, post, site
from tests.http.namespaces import Namespace, namespaces
from tests.http.process import Served, serving
from tests.serve.databases import KINDS, PORT, postgres
from trimtab.http.assemble import Asked
from trimtab.serve.exchange import LEASE_SECONDS
from trimtab.serve.leases import Leases
from trimtab.serve.opening import open_database
from trimtab.serve.tenants import Tenants

LONG = TEXT | {"max_tokens": 200, "ignore_eos": True, "stream": True}
MOST = 5
ROUTE = "/v1/completions"


@dataclass
class Shared:
    """where: the database, as this process reaches it. servers: as each server does, and the network namespace that the server is in."""

    where: str | Path
    servers: list[tuple[str | Path, Namespace | None]]


@pytest.fixture(params=[*KINDS, "namespaces"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shared]:
    with ExitStack() as stack:
        if request.param == "namespaces":
            spaces = stack.enter_context(namespaces(2))
            where = stack.enter_context(postgres([s.outside for s in spaces])).database()
            name = urlsplit(where).path
            yield Shared(where, [(f"postgresql://trimtab@{s.outside}:{PORT}{name}", s) for s in spaces])
        else:
            path = tmp_path / "t.db" if request.param == "sqlite" else stack.enter_context(postgres()).database()
            yield Shared(path, [(path, None)] * 2)


def key_of(tenants: Tenants, name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {tenants.create_key(name)[1]}"}


def until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@dataclass
class Seen:
    """What clients met. answers: (first byte, last byte) of whole ones; others: status or error of each request that got none."""

    answers: list[tuple[float, float]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


async def client(urls: list[str], key: dict[str, str], seen: Seen, goes_on: Callable[[], bool]) -> None:
    """Asks one server after the other; every request ends within 30 s, or httpx.ReadTimeout ends the test."""
    async with httpx.AsyncClient(timeout=30, headers=key) as c:
        while goes_on():
            urls.append(urls.pop(0))
            try:
                async with c.stream("POST", urls[0] + ROUTE, json=LONG) as r:
                    first, text = 0.0, ""
                    async for piece in r.aiter_text():
                        first, text = first or time.monotonic(), text + piece
                if r.status_code == 200:
                    assert text.rstrip().endswith("[DONE]")
                    seen.answers.append((first, time.monotonic()))
                else:
                    assert "error" in text and int(r.headers["retry-after"]) >= 0
                    seen.others.append(str(r.status_code))
                    await asyncio.sleep(0.05)
            except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError) as error:
                seen.others.append(type(error).__name__)
                await asyncio.sleep(0.05)


def at_once(answers: list[tuple[float, float]]) -> float:
    """How many answers were under way together, on average. A client sees each byte late, so at one moment it may see some that have
    ended already."""
    return sum(b - a for a, b in answers) / (max(b for _, b in answers) - min(a for a, _ in answers)) if answers else 0.0


@contextmanager
def shared_out(where: str | Path) -> Iterator[list[tuple[int, int]]]:
    """(servers, answers that all of them together may have under way), read from their database again and again."""
    seen, ended = list[tuple[int, int]](), threading.Event()

    def watch() -> None:
        database = open_database(where)
        handle = database.handle()
        while not ended.wait(0.01):
            with database.reading(handle) as db:
                servers, slots = db.execute("SELECT count(*), sum(slots) FROM leases").fetchone()
                seen.append((int(servers), int(slots or 0)))
        database.close(handle)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


async def load(
    servers: list[Served], key: dict[str, str], seen: Seen, seconds: float, kill: Served | None = None, answers: int = 0
) -> None:
    """For so many seconds; where a busy machine has not given so many answers by then, for a minute more at most."""
    end = time.monotonic() + seconds

    def goes_on() -> bool:
        return time.monotonic() < end + (60 if len(seen.answers) < answers else 0)

    tasks = [asyncio.create_task(client([s.url for s in servers], key, seen, goes_on)) for _ in range(3 * MOST)]
    await asyncio.sleep(seconds / 2)
    if kill is not None:
        kill.process.send_signal(signal.SIGKILL)
    await asyncio.gather(*tasks)


def test_a_request_waits_for_its_part_and_is_refused_what_another_server_holds(tmp_path: Path) -> None:
    with Tenants(tmp_path / "t.db", create=True) as tenants:
        two, key = tenants.add("acme", max_concurrent=2), key_of(tenants, "acme")
        tenants.share_limits()
        other = Leases(open_database(tmp_path / "t.db"))
        with site(Asked(tenants=tenants)) as s:

            def status(prompts: int = 1) -> int:
                """Of a request with so many answers. It may have nothing to begin with: it waits then."""
                other.sync()
                return post(s.app, ROUTE, TEXT | {"prompt": ["a"] * prompts, "max_tokens": 1}, **key).status_code

            assert status(2) == 200
            assert other.short(two, 2)
            until(lambda: other.sync() or not other.short(two, 2), 20)
            other.take(two, 2, 0)
            assert status() == 429 and s.services.admission.open == 0
            other.give(two, 2, 0)
            until(lambda: status(2) == 200, 20)
        other.close()


@pytest.mark.slow
@pytest.mark.alone
def test_two_servers_are_one_to_their_tenants(shared: Shared, tiny_llama_folder: Path, tmp_path: Path) -> None:
    where = shared.where
    with Tenants(where, create=True) as tenants, ExitStack() as stack:
        tenants.add("acme", max_concurrent=MOST)
        tenants.add("root", admin=True)
        acme, root = key_of(tenants, "acme"), key_of(tenants, "root")
        a, b = (stack.enter_context(serving(tiny_llama_folder, tmp_path, "--tenants", at, inside=space)) for at, space in shared.servers)
        for s in (a, b):
            for _ in range(2):
                assert httpx.post(s.url + ROUTE, json=TEXT, headers=acme, timeout=30).status_code == 200

        def counted() -> bool:
            return sum(row["requests"] for row in httpx.get(f"{b.url}/admin/usage", headers=root).json()) == 4

        until(counted, 10)
        made = httpx.post(f"{a.url}/admin/tenants/acme/keys", json={}, headers=root).json()
        short = {"Authorization": f"Bearer {made['key']}"}
        until(lambda: httpx.get(f"{b.url}/v1/models", headers=short).status_code == 200, 5)
        assert httpx.delete(f"{b.url}/admin/keys/{made['id']}", headers=root).status_code == 200
        assert httpx.get(f"{b.url}/v1/models", headers=short).status_code == 401
        until(lambda: httpx.get(f"{a.url}/v1/models", headers=short).status_code == 401, 2)

        with shared_out(where) as held:
            seen = Seen()
            asyncio.run(load([a, b], acme, seen, 6, answers=MOST + 1))
            assert set(seen.others) <= {"429"}, seen.others
            assert len(seen.answers) > MOST and at_once(seen.answers) < 1.5 * MOST  # two that share nothing have twice MOST
            seen = Seen()
            asyncio.run(load([a, b], acme, seen, 6, kill=a))
            assert set(seen.others) <= {"429", "ConnectError", "ReadError", "RemoteProtocolError", "WriteError"}, seen.others
            assert at_once(seen.answers) < 1.5 * MOST
        assert max(slots for _, slots in held) == MOST and max(held)[0] == 2

        def all_at_b() -> bool:
            with shared_out(where) as held:
                asyncio.run(load([b], acme, Seen(), 1))
            assert max(slots for _, slots in held) <= MOST
            return (1, MOST) in held

        until(all_at_b, LEASE_SECONDS + 10)
        assert b.stop() == 0


@pytest.mark.slow
@pytest.mark.alone
def test_metrics_on_a_port_of_their_own_need_no_key(tiny_llama_folder: Path, tmp_path: Path) -> None:
    from trimtab.http.server import bind

    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with Tenants(tmp_path / "t.db", create=True) as tenants:
        tenants.add("acme")
    options = ("--tenants", tmp_path / "t.db", "--metrics", "vllm", "--metrics-port", str(port))
    with serving(tiny_llama_folder, tmp_path, *options) as served:
        told = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert "vllm:lora_requests_info{" in told and 'vllm:cache_config_info{block_size="16"' in told and "trimtab_servers{" in told
        assert httpx.get(f"{served.url}/metrics").status_code == 401
        assert served.stop() == 0
