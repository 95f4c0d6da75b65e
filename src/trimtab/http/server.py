"""The process: a socket, uvicorn in it, and an orderly end.

On SIGTERM or SIGINT, /readyz answers 503, new requests get 503 with Retry-After, running ones finish, and the process ends with 0. Requests
that have not finished after `drain_s` are cancelled, and their clients are told. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, start_http_server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trimtab.errors import ConfigError
from trimtab.http.errors import Fault
from trimtab.http.services import Services

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEAD_S = 20.0
"""Seconds within which a connection must have sent the head of a request."""
MAX_HEAD = 64 << 10
"""Bytes of a request's head, and of what stands between and behind the pieces of its body. The parser keeps them, whoever sends them."""
KEEP_ALIVE_S = 75
"""Of a connection without a request: longer than clients keep theirs, so that none sends into one that is being closed."""
LAST_S = 5
"""For connections to take what was sent to them, after the last answer."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything slow begins; port 0 takes a free one. ConfigError if there is none to be had."""
    # asyncio sends small packets at once (TCP_NODELAY) only on sockets that name their protocol; else an answer's body waits 40 ms for the
    # client to acknowledge its head, and a stream's tokens for each other
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(2048)
        return sock
    except (OSError, OverflowError) as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}", fix="choose another --port (0: any free one) or --host") from None


def scraped(host: str, port: int, registry: CollectorRegistry) -> Callable[[], None]:
    """Serves metrics alone, on a thread; what is returned ends that. ConfigError if the port is not to be had."""
    try:
        httpd, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error}", fix="choose another --metrics-port") from None

    def end() -> None:
        httpd.shutdown()
        httpd.server_close()
        thread.join()

    return end


def local_hosts(port: int) -> frozenset[str]:
    """The Host headers of clients that mean this machine. A web page whose name was pointed to this machine sends that name instead."""
    names = ("127.0.0.1", "localhost", "[::1]")
    return frozenset(f"{n}:{port}" for n in names) | (frozenset(names) if port == 80 else frozenset())


def make(app: FastAPI, services: Services, *, drain_s: float, ready: Callable[[], None], stop: Callable[[], None]) -> Server:
    """A server, to be run with a socket: `.run([sock])` serves until a signal. ready: called once requests are answered. stop: ends the
    engine, cancelling what still runs."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        loop="auto",  # uvloop where it is installed
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_S,
    )
    return Server(config, services, drain_s, ready, stop)


class Protocol(HttpToolsProtocol):
    """uvicorn's, with an end for connections that never send a whole head, or one without an end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unfinished = 0  # bytes since the last whole head, or the last piece of a body
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD:
            self._refuse_head()
        self._watch_head()

    def on_headers_complete(self) -> None:
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unfinished = 0
        super().on_body(body)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _refuse_head(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else another answer is being written
            fault = Fault(f"the request's head is larger than {MAX_HEAD:,} bytes", status=431, code="head_too_large")
            body = json.dumps(fault.body).encode()
            head = f"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _watch_head(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if self._head_timer is not None and not waiting:
            self._head_timer.cancel()
            self._head_timer = None
        elif self._head_timer is None and waiting:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn's, with a drain: it keeps listening while requests run, so that new clients are told to go elsewhere."""

    def __init__(self, config: uvicorn.Config, services: Services, drain_s: float, ready: Callable[[], None], stop: Callable[[], None]):
        super().__init__(config)
        self.life, self.drain_s, self.ready, self.stop = services.life, drain_s, ready, stop
        self._deadline = float("inf")
        self._stopping: asyncio.Future[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Replaces uvicorn's, which stops listening at once and then ends by the signal."""
        if self.life.draining:
            self.should_exit = self.force_exit = True
        self.life.draining = True
        self._deadline = time.monotonic() + self.drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # The objects that are there now stay: 400,000 of torch and transformers. A collection that looks at all of them takes 0.2 s, in
        # which no other thread runs.
        gc.collect()
        gc.freeze()
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        gc.unfreeze()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to go."""
        if self.life.draining and self.life.open == 0:
            self.should_exit = True
        if time.monotonic() > self._deadline and self._stopping is None:
            self._stopping = asyncio.get_running_loop().run_in_executor(None, self.stop)
            self._deadline = time.monotonic() + LAST_S
        elif time.monotonic() > self._deadline:
            self.should_exit = True  # somebody does not take even the news of the end
        return await super().on_tick(counter)
