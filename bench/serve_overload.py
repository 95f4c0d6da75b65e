"""Overload over HTTP: requests arrive at ten times the rate that the server can answer.

    python bench/serve_overload.py            # a server of its own on 127.0.0.1, the bundled base

First as many clients as answers are computed at a time, each asking again as soon as it is answered: that gives the rate which the server
can do, and the latency of a full server. Then requests arrive at random (Poisson) at that rate and at ten times that rate, whatever becomes
of those before. Reported, as the clients see it: latency of the answers that were accepted, and of the refusals, which must be quick and
carry Retry-After. The clients share the cores with the server, so they are written to cost little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

ASKED = {"model": "smollm2-135m-instruct", "prompt": "Tell me about the history of sailing.", "max_tokens": 16, "ignore_eos": True}


@dataclass
class Seen:
    """What the clients of one phase saw; seconds."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def take(self, status: int, head: bytes, seconds: float) -> None:
        if status == 200:
            self.accepted.append(seconds)
        elif status == 503 and b"retry-after: " in head:
            self.refused.append(seconds)
        else:
            self.wrong.append(head[:200].decode("latin-1"))


class Connection(asyncio.Protocol):
    """Answers one request at a time; a protocol costs half of what streams do, and the clients' time is taken from the server."""

    transport: asyncio.Transport
    answer: asyncio.Future[bytes]
    got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, end, body = self.got.partition(b"\r\n\r\n")
        at = head.find(b"content-length: ") + 16
        if end and len(body) == int(head[at:].partition(b"\r\n")[0]):
            self.got = b""
            self.answer.set_result(head)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answer.done():
            self.answer.set_result(b"HTTP/1.1 000 the connection was closed")


class Clients:
    """Connections that are kept open and used again."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        body = json.dumps(ASKED).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self.request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.idle: list[Connection] = []

    async def ask(self, seen: Seen) -> None:
        start, loop = time.perf_counter(), asyncio.get_running_loop()
        connection = self.idle.pop() if self.idle else (await loop.create_connection(Connection, self.host, self.port))[1]
        connection.answer = loop.create_future()
        connection.transport.write(self.request)
        head = await connection.answer
        seen.take(int(head[9:12]), head, time.perf_counter() - start)
        self.idle.append(connection)

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.close()


async def closed_loop(url: str, clients: int, seconds: float) -> tuple[Seen, float]:
    """What `clients` see that ask one after the other, and answers a second."""
    asking, seen, start = Clients(url), Seen(), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            await asking.ask(seen)

    await asyncio.gather(*(client() for _ in range(clients)))
    asking.close()
    return seen, len(seen.accepted) / (time.perf_counter() - start)


async def open_loop(url: str, rate: float, seconds: float) -> Seen:
    """What requests see that arrive at `rate` a second."""
    asking, seen, chance = Clients(url), Seen(), random.Random(0)
    start = at = time.perf_counter()
    under_way: set[asyncio.Task[None]] = set()
    while at - start < seconds:
        at += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        task = asyncio.create_task(asking.ask(seen))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    asking.close()
    return seen


def summary(what: str, seen: Seen) -> dict[str, Any]:
    def at(values: list[float], share: float) -> float | None:
        return round(1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1) if values else None

    table = {"load": what, "wrong": seen.wrong[:3]}
    for name, values in (("accepted", seen.accepted), ("refused", seen.refused)):
        table |= {name: len(values), f"{name}_p50_ms": at(values, 0.5), f"{name}_p99_ms": at(values, 0.99)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=16, help="answers that are computed at a time")
    parser.add_argument("--queued", type=int, default=16, help="answers that may wait")
    parser.add_argument("--wait", type=float, default=0.1, help="seconds that one may have to wait")
    parser.add_argument("--seconds", type=float, default=15, help="of each phase")
    parser.add_argument("--times", type=float, nargs="+", default=[1, 10], help="multiples of the rate that the server can do")
    args = parser.parse_args()
    command = [sys.executable, "-m", "trimtab", "serve", "--local", "--port", "0", "--json"]
    command += ["--max-running", str(args.places), "--max-queued", str(args.queued), "--max-wait", str(args.wait)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as server,
    ):
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            asyncio.run(closed_loop(url, args.places, 3))  # warms up
            seen, rate = asyncio.run(closed_loop(url, args.places, args.seconds))
            print(json.dumps(summary(f"{args.places} clients", seen) | {"answers_a_second": round(rate, 1)}), flush=True)
            for times in args.times:
                seen = asyncio.run(open_loop(url, times * rate, args.seconds))
                print(json.dumps(summary(f"{times:g} times that rate", seen)), flush=True)
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
