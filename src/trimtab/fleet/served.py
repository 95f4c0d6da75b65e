"""What a server adds to the steps of its engine: HTTP, the event loop, and threads of server and client that share the cores.

`measured.py` times an engine that nobody listens to. Here `trimtab serve` runs as a process of its own, and a client of the same machine
reads its streams. How long a token takes with few and with many streams, less what the engine's step takes, is what the server adds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit
from urllib.request import urlopen

from trimtab.errors import TrimtabError
from trimtab.fleet.replica import Shape
from trimtab.fleet.speed import Speed, Step

STREAMS = (1, 2, 4, 8, 16)
PROMPT, ANSWER, ROUNDS = 16, 48, 3
"""Tokens of a prompt and of an answer, and how often each number of streams is tried."""
END_S = 60.0


def with_server(speed: Speed, shape: Shape, options: Sequence[str], status: Callable[[str], None] = lambda text: None) -> Speed:
    """The speed of an engine, as measured, within a server with clients. options: of `trimtab serve`, which say what the base is.

    Takes as long as the server takes to start, and some seconds. TrimtabError where it does not start.
    """
    status("starting a server")
    command = [sys.executable, "-m", "trimtab", "serve", "--local", "--port", "0", "--json", "--no-speculate", *options]
    server = subprocess.Popen([*command, "--max-running", str(shape.max_running)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        if not line:
            said = server.stderr.read().decode(errors="replace")[-1000:]
            raise TrimtabError(f"the server to be measured did not start: {said}", fix="see what `trimtab serve --local` says")
        url = json.loads(line)["url"]
        model = json.loads(urlopen(f"{url}/v1/models").read())["data"][0]["id"]
        status("reading the server's streams")
        return asyncio.run(_measured(speed, shape, urlsplit(url).netloc, model))
    finally:
        server.terminate()
        try:
            server.wait(END_S)
        except subprocess.TimeoutExpired:
            server.kill()
        for pipe in (server.stdout, server.stderr):
            assert pipe is not None
            pipe.close()


async def _measured(speed: Speed, shape: Shape, netloc: str, model: str) -> Speed:
    streams = [n for n in STREAMS if n <= shape.max_running]
    await asyncio.gather(*(_stream(netloc, model, i) for i in range(streams[-1])))  # what is made once is made here
    token_s: dict[int, list[float]] = {n: [] for n in streams}
    first_s, asked = list[float](), 1000
    for _ in range(ROUNDS):
        for n in streams:
            found = await asyncio.gather(*(_stream(netloc, model, asked + i) for i in range(n)))
            asked += n
            quarter = ANSWER // 4  # until all of them decode
            token_s[n] += [(times[-1] - times[quarter]) / (len(times) - 1 - quarter) for times in found]
            first_s += [times[0] for times in found] if n == 1 else []
    alone = {n: speed(Step(n, n, 1, n * (PROMPT + ANSWER // 2))) for n in streams}
    more = [(n, statistics.fmean(token_s[n]) - alone[n]) for n in streams]
    added = added_by_server(more)
    seconds = tuple(max(s + added[0], s / 4) for s in speed.seconds)
    source = f"{speed.source}, in a server whose client is on this machine"
    found_speed = replace(speed, seconds=seconds, sequence_s=speed.sequence_s + added[1], source=source)
    way_s = max(0.0, statistics.fmean(first_s) - found_speed(Step(PROMPT, 1, 1, 0)))
    return replace(found_speed, before_s=way_s / 2, after_s=way_s / 2)


def added_by_server(more: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(seconds of each step, seconds of each of its sequences) by least squares of what steps of so many sequences took more. No sequence
    takes less than nothing."""
    mean_n, mean_s = (statistics.fmean(x) for x in zip(*more, strict=True))
    spread = sum((n - mean_n) ** 2 for n, _ in more)
    each = max(0.0, sum((n - mean_n) * s for n, s in more) / spread) if spread else 0.0
    return mean_s - each * mean_n, each


async def _stream(netloc: str, model: str, number: int) -> list[float]:
    """When each token of an answer came, in seconds since the request."""
    ids = [4 + (number * 31 + 7 * j) % 200 for j in range(PROMPT)]
    body = {"model": model, "prompt": ids, "max_tokens": ANSWER, "ignore_eos": True, "stream": True, "temperature": 0}
    data = json.dumps(body | {"return_token_ids": True}).encode()
    host, _, port = netloc.partition(":")
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    times, got = list[float](), b""
    while chunk := await reader.read(65536):
        got += chunk
        there = min(ANSWER, got.count(b"data: {"))
        times += [time.perf_counter() - began] * (there - len(times))
    writer.close()
    if not got.startswith(b"HTTP/1.1 200") or len(times) < ANSWER // 2:
        raise TrimtabError(f"the server to be measured answered {got[:300]!r}", fix="see what `trimtab serve --local` says")
    return times
