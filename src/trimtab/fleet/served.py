"""What a server adds to the steps of its engine: HTTP, the event loop, and threads of server and client that share the cores.

`measured.py` times an engine that nobody listens to. Here `trimtab serve` runs as a process of its own, and a client of the same machine
reads its streams. How long a token takes with few and with many streams, less what the engine's step takes, is what the server adds.
Adapters are read there after a pause each, as requests for them come, and beside streams.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from trimtab.errors import TrimtabError
from trimtab.fleet.replica import Shape
from trimtab.fleet.speed import Speed, Step
from trimtab.methods import LoraConfig, Method
from trimtab.model import Base
from trimtab.store import Adapter

STREAMS = (1, 2, 4, 8, 16)
PROMPT, ANSWER, ROUNDS = 16, 48, 3
"""Tokens of a prompt and of an answer, and how often each number of streams is tried."""
PROMPTS, TRIES = (PROMPT, 64, 128), 9
"""Lengths of prompts that come alone, the shortest first, and how often each comes. Medians count: beside other programs some first tokens
take many times as long."""
LOADS, BESIDE = 8, 4
"""Adapters that are read while nothing else runs, as many beside streams, and how many streams these are."""
PAUSE_S = 0.15
"""Before a request that comes alone. After a pause a processor's caches hold other things, so that the first step takes longer."""
END_S = 60.0
TOKENS = re.compile(rb'"token_ids": ?\[([^\]]*)\]')

Streams = Sequence[tuple[float, int]]
"""When each piece of an answer came, in seconds since the request, and how many tokens had come by then."""


def with_server(
    base: Base,
    speed: Speed,
    shape: Shape,
    options: Sequence[str],
    *,
    method: Method | None = None,
    status: Callable[[str], None] = lambda text: None,
) -> Speed:
    """The speed of an engine, as measured, within a server with clients. options: of `trimtab serve`, which say what the base is. method:
    of the adapters that are read, by default LoRA of rank 16.

    Takes as long as the server takes to start, and some seconds. TrimtabError where it does not start.
    """
    command = [sys.executable, "-m", "trimtab", "serve", "--local", "--port", "0", "--json", "--no-speculate", *options]
    command += ["--max-running", str(shape.max_running), "--max-queued", "64"]
    with ExitStack() as entered:
        folder = Path(entered.enter_context(tempfile.TemporaryDirectory(prefix="trimtab-measure-")))
        for i in range(2 * LOADS + 1):
            Adapter.create(base, method or LoraConfig(r=16, target_modules="all-linear"), seed=i).save(folder / f"measured-{i}")
            command += ["--adapter", f"measured-{i}={folder / f'measured-{i}'}"]
        status("starting a server")
        said = entered.enter_context(tempfile.TemporaryFile())  # a pipe that nobody reads would fill up
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        entered.callback(_end, server)
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            server.wait(END_S)
            said.seek(0)
            text = said.read().decode(errors="replace")[-1000:]
            raise TrimtabError(f"the server to be measured did not start: {text}", fix="see what `trimtab serve --local` says")
        client = _Client(json.loads(line)["url"], f"measured-{2 * LOADS}")
        status("reading the server's streams")
        return asyncio.run(_measured(speed, shape, base.spec.max_positions, client))


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(END_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    assert server.stdout is not None
    server.stdout.close()


async def _measured(speed: Speed, shape: Shape, longest: int, client: _Client) -> Speed:
    streams = [n for n in STREAMS if n <= shape.max_running]
    await client.together(streams[-1])  # what is made once is made here
    token_s = {n: list[float]() for n in streams}
    for _ in range(ROUNDS):
        for n in streams:
            token_s[n].append(token_seconds(await client.together(n)))
    alone = {n: speed(Step(n, n, 1, n * (PROMPT + ANSWER // 2))) for n in streams}
    each, more = added_by_server([(n, statistics.fmean(token_s[n]) - alone[n]) for n in streams])
    seconds = tuple(max(s + each, s / 4) for s in speed.seconds)
    source = f"{speed.source}, in a server whose client is on this machine"
    found = replace(speed, seconds=seconds, sequence_s=speed.sequence_s + more, source=source)
    short, *long = [p for p in PROMPTS if p < min(longest, shape.max_step_rows + 1)]
    first_s = {p: [(await client.alone(p)) for _ in range(TRIES)] for p in (short, *long)}
    way_s, longer = way_and_rows({p: statistics.median(times) for p, times in first_s.items()}, found)
    found = replace(found, seconds=longer, before_s=way_s / 2, after_s=way_s / 2)
    load_s, more_s = await client.loading(range(LOADS))
    beside = asyncio.create_task(client.busy(min(BESIDE, max(1, shape.max_running - 1)), min(4 * ANSWER, longest - PROMPT)))
    await asyncio.sleep(PAUSE_S)
    busy_load_s, _ = await client.loading(range(LOADS, 2 * LOADS))
    if beside.done():  # it goes on until it is cancelled: raises what has ended it
        await beside
    beside.cancel()
    await asyncio.gather(beside, return_exceptions=True)
    handed_s = max(0.0, more_s - load_s - found.mix_s)  # to a thread, and back to the steps; beside steps the end of one is awaited as well
    return replace(found, load_s=load_s + handed_s, busy_load_s=busy_load_s + handed_s)


def way_and_rows(first_s: Mapping[int, float], speed: Speed) -> tuple[float, tuple[float, ...]]:
    """(seconds between client and engine, there and back; `speed.seconds` as prompts have them that come after a pause). first_s: of the
    first token, by the prompt's length, the shortest one first. What the shortest takes more than its step is the way; what the others
    take more than the shortest are their rows."""
    (short, least_s), *others = first_s.items()
    way_s = max(0.0, least_s - speed(Step(short, 1, 1, 0)))
    if not others:
        return way_s, speed.seconds
    rows_s = sum(speed.of_rows(p) - speed.of_rows(short) for p, _ in others)
    factor = max(0.0, sum(s - least_s for _, s in others) / rows_s) if rows_s else 1.0
    start = speed.of_rows(short)
    return way_s, tuple(start + factor * (s - start) if n > short else s for n, s in zip(speed.rows, speed.seconds, strict=True))


def token_seconds(streams: Iterable[Streams]) -> float:
    """Seconds of a token while all of these answers are decoded: from when each has begun until the first has ended, on average."""
    found = list(streams)
    begun, ended = max(pieces[0][0] for pieces in found), min(pieces[-1][0] for pieces in found)
    each = list[float]()
    for pieces in found:
        times = [at for at, _ in pieces]
        first, last = (max(0, bisect_right(times, at) - 1) for at in (begun, ended))
        if pieces[last][1] > pieces[first][1]:
            each.append((times[last] - times[first]) / (pieces[last][1] - pieces[first][1]))
    if not each:
        raise TrimtabError("no two answers of the server to be measured were under way together", fix="try again on a quieter machine")
    return statistics.fmean(each)


def added_by_server(more: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(seconds of each step, seconds of each of its sequences) by least squares of what steps of so many sequences took more. No sequence
    takes less than nothing."""
    mean_n, mean_s = (statistics.fmean(x) for x in zip(*more, strict=True))
    spread = sum((n - mean_n) ** 2 for n, _ in more)
    each = max(0.0, sum((n - mean_n) * s for n, s in more) / spread) if spread else 0.0
    return mean_s - each * mean_n, each


class _Client:
    """Asks a server. model: an adapter, in memory once it was asked. asked: how many requests so far; no two have the same prompt."""

    def __init__(self, url: str, model: str):
        self.url, self.netloc, self.model, self.asked = url, urlsplit(url).netloc, model, 0

    async def together(self, n: int, answer: int = ANSWER) -> list[Streams]:
        """The streams of so many answers of one adapter."""
        return await asyncio.gather(*(self.ask(self.model, answer) for _ in range(n)))

    async def busy(self, n: int, answer: int) -> None:
        """So many streams at any time, until this is cancelled."""
        while True:
            await self.together(n, answer)

    async def alone(self, prompt: int, model: str | None = None) -> float:
        """Seconds to the first token of a request that comes after a pause."""
        await asyncio.sleep(PAUSE_S)
        return (await self.ask(model or self.model, 2, prompt))[0][0]

    async def loading(self, numbers: Iterable[int]) -> tuple[float, float]:
        """(mean seconds of reading an adapter by the server's own clock, how much later the first token comes for it)."""
        loads, seconds = await self._loaded()
        more = list[float]()
        for i in numbers:
            read_s = await self.alone(PROMPT, f"measured-{i}")
            more.append(read_s - await self.alone(PROMPT, f"measured-{i}"))
        loads_then, seconds_then = await self._loaded()
        if loads_then == loads:
            raise TrimtabError("the server to be measured has read no adapter", fix="see what `trimtab serve --local` says")
        return (seconds_then - seconds) / (loads_then - loads), statistics.median(more)

    async def _loaded(self) -> tuple[int, float]:
        """(adapters read so far, seconds that this took)."""
        text = (await asyncio.to_thread(lambda: urlopen(f"{self.url}/metrics").read())).decode()
        found = [re.search(rf"^trimtab_adapter_{name}_total(?:{{[^}}]*}})? (\S+)$", text, re.M) for name in ("loads", "load_seconds")]
        loads, seconds = (float(m[1]) for m in found if m)
        return round(loads), seconds

    async def ask(self, model: str, answer: int, prompt: int = PROMPT) -> Streams:
        self.asked += 1
        ids = [4 + (self.asked * 31 + 7 * j) % 200 for j in range(prompt)]
        body = {"model": model, "prompt": ids, "max_tokens": answer, "ignore_eos": True, "stream": True, "temperature": 0}
        data = json.dumps(body | {"return_token_ids": True}).encode()
        host, _, port = self.netloc.partition(":")
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            came, got = list[tuple[float, int]](), b""
            while chunk := await reader.read(65536):
                got += chunk
                came.append((time.perf_counter() - began, len(got)))
        finally:
            writer.close()
        pieces = tokens_of(got, came)
        if not got.startswith(b"HTTP/1.1 200") or not pieces or pieces[-1][1] != answer:
            raise TrimtabError(f"the server to be measured answered {got[:300]!r}", fix="see what `trimtab serve --local` says")
        return pieces


def tokens_of(got: bytes, came: Sequence[tuple[float, int]]) -> Streams:
    """How many tokens there were when. came: (when, bytes so far). One event has several tokens where the server's loop lags behind the
    steps, so events must not be counted for tokens."""
    found, tokens, events = list[tuple[float, int]](), 0, list(TOKENS.finditer(got))
    at = 0
    for when, size in came:
        before = tokens
        while at < len(events) and events[at].end() <= size:
            tokens += len(events[at][1].split(b",")) if events[at][1].strip() else 0
            at += 1
        if tokens > before:
            found.append((when, tokens))
    return found
