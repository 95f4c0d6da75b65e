"""A server without a socket: tiny base, real engine, real catalog; a client in-process, and one that can go away at any moment."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from tests.store.common import stirred
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.http.app import create_app
from trimtab.http.assemble import Asked, services_of
from trimtab.http.services import Services
from trimtab.methods import IA3Config, LoraConfig
from trimtab.model import Base
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.store import Adapter

BASE = "tiny"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
TEXT = {"model": BASE, "prompt": "hello", "max_tokens": 6, "temperature": 0}


def base_of() -> Base:
    return Base(tiny_model("llama"), tiny_tokenizer(), name=BASE, fingerprint="sha256:" + "ab" * 32)


def adapter_folders(folder: Path, base: Base) -> dict[str, str]:
    """Two adapters that clearly do something, as folders: name -> path."""
    made: dict[str, Adapter] = {"lora": stirred(base, LoraConfig(r=4), seed=1), "ia3": stirred(base, IA3Config(), seed=2)}
    return {name: str(adapter.save(folder / name)) for name, adapter in made.items()}


@dataclass
class Site:
    """One server. asked: see `Asked`. change: of the services, before the app is made."""

    engine: Engine
    services: Services
    app: FastAPI = field(init=False)
    ends: list[str] = field(default_factory=list)
    """How each request ended at the engine."""

    def __post_init__(self) -> None:
        self.app = create_app(self.services)
        observe = self.engine.on_finish
        self.engine.on_finish = lambda request, usage, finish, *times: (self.ends.append(finish), observe(request, usage, finish, *times))

    async def settled(self, seconds: float = 10.0) -> None:
        """Until the engine has said its last word of every request, on the loop where it is heard."""
        async with asyncio.timeout(seconds):
            while self.services.admission.open or self.services.life.open:
                await asyncio.sleep(0.002)

    def idle(self) -> None:
        """AssertionError where anything is held although nobody asks any more."""
        self.engine.idle_check()
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.loading, stats.kv_blocks_used, stats.adapter_leases) == (0, 0, 0, 0, 0), stats
        assert self.services.admission.open == 0
        assert self.services.life.open == 0
        places = self.services.admission._places
        work = [self.services.words_work, self.services.load_work, self.services.store_work]
        assert not self.services.life.held and not places._computed and not places._waiting
        deadline = time.monotonic() + 5.0
        while any(w._waiting or w._busy for w in work):  # a thread lets go just after its result is there
            assert time.monotonic() < deadline
            time.sleep(0.001)


@contextmanager
def site(
    asked: Asked | None = None, *, change: Callable[[Services], Services] = lambda s: s, base: Base | None = None, **config: Any
) -> Iterator[Site]:
    """A server whose engine runs. config: EngineConfig's."""
    engine = Engine(base or base_of(), EngineConfig(**{"kv_bytes": 8 << 20, "adapter_bytes": 64 << 20, **config}))
    try:
        made = Site(engine, change(services_of(engine, asked or Asked())))
        engine.start()
        yield made
    finally:
        engine.close()


def limited(**limits: Any) -> Callable[[Services], Services]:
    """A change of the services' limits."""
    return lambda s: replace(s, limits=replace(s.limits, **limits))


@asynccontextmanager
async def client(app: FastAPI, headers: Mapping[str, str] | None = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as c:
        yield c


def call(app: FastAPI, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """One request. body: JSON, or bytes as they are."""

    async def one() -> httpx.Response:
        async with client(app, headers) as c:
            if isinstance(body, bytes):
                return await c.request(method, path, content=body, headers={"content-type": "application/json"})
            return await c.request(method, path, json=body)

    return asyncio.run(one())


def post(app: FastAPI, path: str, body: Any, **headers: str) -> httpx.Response:
    return call(app, "POST", path, body, headers=headers)


def events(text: str) -> list[Any]:
    """The data of server-sent events; the last is "[DONE]"."""
    lines = [e.removeprefix("data: ") for e in text.split("\n\n") if e]
    return [e if e == "[DONE]" else json.loads(e) for e in lines]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in OpenAI's shape, checked."""
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"] and error["message"] and error["type"], error
    return error


class Caller:
    """A client of the app itself, which sees each message as it is sent and can go away at any moment."""

    def __init__(self, app: FastAPI, path: str, body: Any, headers: Mapping[str, str] | None = None):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {"host": "test", "content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in told.items()],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        self.app, self._raw, self._left = app, raw, asyncio.Event()
        self.sent: list[Any] = []
        self.sending = False
        self.more = asyncio.Event()
        self.blocked = asyncio.Event()
        self.blocked.set()  # cleared: the client does not read

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.app(self.scope, self._receive, self._send))

    async def run(self) -> None:
        await self.start()

    @property
    def was_read(self) -> bool:
        return self._raw is None

    def leave(self) -> None:
        self._left.set()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    async def _receive(self) -> Any:
        if self._raw is not None:
            raw, self._raw = self._raw, None
            return {"type": "http.request", "body": raw, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sending = True
        await self.blocked.wait()
        self.sending = False
        self.sent.append(message)
        self.more.set()
