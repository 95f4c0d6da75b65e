"""What one tenant can do to another: requests that cost much, and a plain one of somebody else beside them.

    python bench/serve_attacks.py             # a server of its own on 127.0.0.1, two tenants, the bundled base

The attacker sends, one attack after the other: prompts of 3.9 MB; regular expressions and schemas that are hard to compile; loads of a
sparse file of 1 TB as an adapter; bodies of very many small values; tools with hostile schemas; echoes of long prompts; very many biases;
nested parts; sums of adapters; counts of long inputs; references that go round; thousands of tools, stop texts and prompts; grammars of
its own; floods of HEAD and OPTIONS; headers without an end, bodies that drip, streams that nobody reads; and, without any limit of its own,
as many long answers as it gets.
Meanwhile the victim asks for eight tokens, again and again. Reported for each: what the victim waited (idle, then p50 and maximum during
the attack), the memory of the server with the processes that it has started (above idle: the highest, and a second after the attack), the
CPU seconds of both, and what the attacker was told. Each attack is bounded in number and time; requests go to 127.0.0.1 only.

A real attacker has a machine of its own. Here its process shares the cores, so it runs at nice 19 and makes its requests' bodies before the
clock starts. All attacks meet one server, one after the other, so what one leaves behind counts for the next.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import psutil

from trimtab.serve.tenants import Tenants

MB = 1e6
PLAIN = {"prompt": "The harbour at dawn", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
JSON = {"content-type": "application/json"}
Ask = tuple[str, dict[str, Any] | bytes]
"""A path and a body to POST; or "METHOD path"; or a manner of `talk`."""


def attacks(base: str, folder: Path) -> Iterator[tuple[str, list[Ask]]]:
    """(name, requests that are sent at the same time)."""
    complete, chat = "/v1/completions", "/v1/chat/completions"
    words = "word " * 780_000
    yield "six prompts of 3.9 MB", [(complete, {"model": base, "prompt": words})] * 6
    said = [{"role": "user", "content": words[:3_900_000]}]
    yield "six conversations of 3.9 MB", [(chat, {"model": base, "messages": said})] * 6
    fits = "ab" * 300_000  # few enough characters to look at, far too many tokens
    yield "six prompts of 0.6 MB", [(complete, {"model": base, "prompt": fits})] * 6
    regex = {"model": base, "prompt": "x", "max_tokens": 64, "structured_outputs": {"regex": "(a{1000}){1000}"}}
    yield "ten regular expressions", [(complete, regex)] * 10
    slow = [regex | {"structured_outputs": {"regex": f"(a{{{1000 - i}}}){{1000}}"}} for i in range(100)]
    yield "a hundred regular expressions", [(complete, body) for body in slow]
    schema = {"type": "object", "patternProperties": {f"^a{i}.*b{i}$": {"type": "string"} for i in range(300)}}
    yield "ten schemas", [(complete, {"model": base, "prompt": "x", "max_tokens": 64, "structured_outputs": {"json": schema}})] * 10
    load = {"lora_name": "vast", "lora_path": str(folder / "attacker" / "vast")}
    yield "ten loads of a sparse 1 TB", [("/v1/load_lora_adapter", load)] * 10
    lists = b'{"model": "m", "prompt": [' + b"[]," * 1_300_000 + b"[1]]}"
    yield "six bodies of a million lists", [(complete, lists)] * 6
    messages = [{"role": "user", "content": ""}] * 100_000
    yield "six bodies of 100,000 messages", [(chat, {"model": base, "messages": messages})] * 6
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    tools = [tool | {"function": tool["function"] | {"name": f"f{i}"}} for i in range(16)]
    called = {"model": base, "messages": [{"role": "user", "content": "go"}], "tools": tools, "max_tokens": 64}
    yield "ten calls of tools with hostile schemas", [(chat, called | {"tool_choice": "required"})] * 10
    deep: dict[str, Any] = {"type": "string"}
    while len(json.dumps(deep)) < 50_000:
        deep = {"type": "object", "properties": {"a": deep, "b": {"anyOf": [deep, {"type": "array", "items": {"type": "integer"}}]}}}
    called["tools"] = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    yield "ten calls of a tool with a branching schema", [(chat, called | {"tool_choice": "auto"})] * 10
    echoed = {"model": base, "echo": True, "logprobs": 20, "max_tokens": 1}
    yield "six echoes of 100,000 tokens", [(complete, echoed | {"prompt": [7] * 100_000})] * 6
    yield "six echoes of 8,000 tokens", [(complete, echoed | {"prompt": [7 + i] * 8_000}) for i in range(6)]
    biased = {"model": base, "prompt": "x", "max_tokens": 64, "ignore_eos": True}
    yield "six biases of 300,000 tokens", [(complete, biased | {"logit_bias": {str(i): 1 for i in range(300_000)}})] * 6
    yield "six biases of 300 tokens", [(complete, biased | {"logit_bias": {str(i): 1 for i in range(300)}})] * 6
    nested = b'{"model": "m", "messages": [{"role": "user", "content": ' + b'[{"type": "text", "text": "x", "cache_control": ' * 100_000
    yield "six bodies of nested parts", [(chat, nested)] * 6
    parts = [{"type": "text", "text": "x"}] * 1024
    yield (
        "six bodies of 100,000 parts",
        [(chat, {"model": base, "messages": [{"role": "user", "content": parts}] * 100, "max_tokens": 1})] * 6,
    )
    sums = [{"model": base, "prompt": "x", "adapters": [{"name": "none", "scale": i / 64}] * 8} for i in range(64)]
    yield "64 sums of adapters that are not there", [(complete, body) for body in sums]
    yield "six bodies of 1,000 texts to embed", [("/v1/embeddings", {"model": base, "input": ["word " * 40] * 1000})] * 6
    items = [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 1024}] * 90
    yield "six responses of 90,000 parts", [("/v1/responses", {"model": base, "input": items})] * 6
    counts = [{"model": base, "input": f"{i} " + "word " * 7_000} for i in range(60)]
    yield "60 counts of 7,000 tokens", [("/v1/responses/input_tokens", body) for body in counts]
    yield from of_many_things(base)
    yield from of_connections(base)
    long = {"model": base, "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}
    yield "places: 400 long answers", [(complete, long)] * 400


def of_many_things(base: str) -> Iterator[tuple[str, list[Ask]]]:
    """Attacks whose bodies say one thing very often, or in a circle."""
    complete, chat = "/v1/completions", "/v1/chat/completions"
    go = {"model": base, "messages": [{"role": "user", "content": "go"}], "max_tokens": 64}
    names = [f"n{i}" for i in range(60)]
    round_ = {"$ref": "#/$defs/n0", "$defs": {a: {"$ref": f"#/$defs/{b}"} for a, b in zip(names, [*names[1:], names[0]], strict=True)}}
    both = {"anyOf": [{"$ref": f"#/$defs/n{i}"} for i in range(16)]}
    crossed = {"$ref": "#/$defs/n0", "$defs": {f"n{i}": {"type": "object", "properties": {"a": both, "b": both}} for i in range(16)}}
    for name, schema in (("ten tools whose references go round", round_), ("ten tools whose references cross", crossed)):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        yield name, [(chat, go | {"tools": [tool], "tool_choice": "required"})] * 10
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}} for i in range(10_000)]
    yield "six bodies of 10,000 tools", [(chat, go | {"tools": tools})] * 6
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}] * 20_000}
    yield "six choices of 20,000 allowed tools", [(chat, go | {"tools": tools[:1], "tool_choice": allowed})] * 6
    yield "six bodies of 100,000 stop texts", [(complete, {"model": base, "prompt": "x", "stop": [f"s{i}" for i in range(100_000)]})] * 6
    stops = [f"{i % 10}" + "ab" * 100 for i in range(16)]
    yield "twenty answers with long stop texts", [(complete, {"model": base, "prompt": "ab" * 500, "max_tokens": 200, "stop": stops})] * 20
    yield "six bodies of 40,000 prompts", [(complete, {"model": base, "prompt": [[7]] * 40_000, "max_tokens": 1})] * 6
    sums = {"model": base, "prompt": "x", "adapters": [{"name": f"none{i}", "scale": 0.5} for i in range(1000)]}
    yield "64 sums of 1,000 adapters", [(complete, sums)] * 64
    yield "64 sums of 60 adapters by name", [(complete, {"model": "+".join(f"x{i}" for i in range(60)), "prompt": "x"})] * 64
    lark = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1} | a{i + 1}" for i in range(2000)) + '\na2000: "a"'
    again = "start: (((((A{1000}){1000}){1000}){1000}){1000})\nA: /a{1000}/"
    gbnf = "root ::= " + "(" * 400 + '"a"' + ")*" * 400
    wide = "root ::= " + " | ".join(f'"{i}" root' for i in range(4000))
    grammars = [{"model": base, "prompt": "x", "max_tokens": 64, "structured_outputs": {"grammar": g}} for g in (lark, again, gbnf, wide)]
    yield "forty grammars of one's own", [(complete, body) for body in grammars * 10]


def of_connections(base: str) -> Iterator[tuple[str, list[Ask]]]:
    """Attacks that need no long body."""
    yield "400 HEADs and OPTIONS", [("HEAD /v1/models", b""), ("OPTIONS /v1/chat/completions", b"")] * 200
    yield "400 requests for routes that are not there", [("GET /" + "a/" * 200, b"")] * 400
    yield "200 headers without an end", [("headers", b"")] * 200
    yield "200 bodies that drip", [("drip", json.dumps(PLAIN | {"model": base}).encode())] * 200
    long = json.dumps({"model": base, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 5, "n": 4})
    yield "fifty streams that nobody reads", [("deaf", long.encode())] * 50


class Memory:
    """Of the server and the processes that it has started."""

    def __init__(self, pid: int):
        self._server, self.most = psutil.Process(pid), 0.0

    def now(self) -> float:
        """Bytes; pages that its processes share with others count once, as the server's or not at all."""
        total = float(self._server.memory_info().rss)
        for process in self._server.children(recursive=True):
            try:
                if process.cmdline() != self._server.cmdline():  # else it has just been forked, and shares all
                    total += process.memory_full_info().uss
            except psutil.Error:
                pass
        self.most = max(self.most, total)
        return total

    def cpu(self) -> tuple[float, float]:
        """Seconds so far of the server, and of processes that have ended and been waited for, or still run."""
        own = self._server.cpu_times()
        rest = own.children_user + own.children_system
        for process in self._server.children(recursive=True):
            with suppress(psutil.Error):
                rest += sum(process.cpu_times()[:4])
        return own.user + own.system, rest

    async def watch(self) -> None:
        while True:
            self.now()
            await asyncio.sleep(0.1)


async def victim(client: httpx.AsyncClient, base: str, until: asyncio.Event, most: float) -> list[float]:
    """Seconds of one plain request after the other, until the event and for three at least."""
    seconds: list[float] = []
    began = time.perf_counter()
    while (not until.is_set() or len(seconds) < 3) and time.perf_counter() - began < most:
        start = time.perf_counter()
        answer = await client.post("/v1/completions", json=PLAIN | {"model": base})
        assert answer.status_code == 200, answer.text
        seconds.append(time.perf_counter() - start)
    return seconds


_prepared: list[list[tuple[str, bytes]]] = []
"""The attacks' requests, in the attacker's process."""


def prepare(base: str, folder: Path, only: str) -> None:
    """Once in the attacker's process."""
    os.nice(19)
    for name, asks in attacks(base, folder):
        made: dict[int, bytes] = {}  # most requests of an attack are one object
        for _, body in asks if only in name else ():
            made.setdefault(id(body), body if isinstance(body, bytes) else json.dumps(body).encode())
        _prepared.append([(path, made[id(body)]) for path, body in asks if only in name])


def ready() -> int:
    return len(_prepared)


def attack(url: str, key: str, number: int, most: float) -> Counter[str]:
    """What became of the requests of an attack within so many seconds. Runs in the attacker's process."""
    return asyncio.run(send(url, key, _prepared[number], most))


async def send(url: str, key: str, asks: list[tuple[str, bytes]], most: float) -> Counter[str]:
    told: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=500)
    attacker = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=None, limits=limits)

    async def one(path: str, raw: bytes) -> None:
        try:
            async with asyncio.timeout(most):
                if not (method := path.rpartition(" ")[0]) and not path.startswith("/"):
                    told[await talk(url, key, path, raw, most)] += 1
                    return
                answer = await attacker.request(method or "POST", path.removeprefix(f"{method} "), content=raw, headers=JSON)
            code = (answer.json().get("error") or {}).get("code") if answer.content else ""
            told[f"{answer.status_code} {code or ''}".strip()] += 1
        except (TimeoutError, OSError, httpx.HTTPError) as error:
            told[type(error).__name__] += 1

    await asyncio.gather(*(one(*ask) for ask in asks))
    return told


async def talk(url: str, key: str, manner: str, raw: bytes, most: float) -> str:
    """A request on a connection of its own, in a manner that no client has. What the server said, if anything: its status."""
    parts, loop = httpx.URL(url), asyncio.get_running_loop()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.host}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    with socket.socket() as line:
        line.setblocking(False)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(line, (parts.host, parts.port))
        until = loop.time() + 0.6 * most
        with suppress(ConnectionError):
            if manner == "deaf":
                await loop.sock_sendall(line, f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
                await asyncio.sleep(0.6 * most)
            else:
                await loop.sock_sendall(line, head.encode() + (b"transfer-encoding: chunked\r\n\r\n" if manner == "drip" else b""))
            pieces = (f"x-{i}: {'a' * 500}\r\n".encode() for i in range(100_000)) if manner == "headers" else iter(())
            pieces = (b"1\r\n%c\r\n" % byte for byte in raw) if manner == "drip" else pieces
            for piece in pieces:
                if loop.time() > until:
                    break
                await loop.sock_sendall(line, piece)
                await asyncio.sleep(0.02)
        try:
            async with asyncio.timeout(1):
                said = await loop.sock_recv(line, 64)
        except TimeoutError:
            return "nothing yet"
        except ConnectionError:
            return "closed"
        return said.decode("latin-1").partition("\r\n")[0].removeprefix("HTTP/1.1 ") or "closed"


async def measure(url: str, pid: int, keys: dict[str, str], base: str, folder: Path, seconds: float, only: str) -> None:
    never, memory, names = asyncio.Event(), Memory(pid), [name for name, _ in attacks(base, folder)]
    watching = asyncio.create_task(memory.watch())
    plain = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {keys['victim']}"}, timeout=None)
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare, initargs=(base, folder, only)) as pool:
        await loop.run_in_executor(pool, ready)
        await victim(plain, base, never, 3)
        idle = sorted(await victim(plain, base, never, 5))
        start = memory.now()
        print(f"idle: p50 {1e3 * idle[len(idle) // 2]:.0f} ms, max {1e3 * idle[-1]:.0f} ms, {start / MB:.0f} MB")
        print("| attack | victim p50 | victim max | requests | memory above idle | left | CPU, s: server, processes | attacker was told |")
        print("|---|---|---|---|---|---|---|---|")
        for number, name in enumerate(names):
            if only not in name:
                continue
            memory.most, over, cpu = 0.0, asyncio.Event(), memory.cpu()
            asking = asyncio.create_task(victim(plain, base, over, 2 * seconds))
            told = await loop.run_in_executor(pool, attack, url, keys["attacker"], number, seconds)
            over.set()
            seen = sorted(await asking)
            used = [after - before for before, after in zip(cpu, memory.cpu(), strict=True)]
            most = memory.most - start
            await asyncio.sleep(1)
            words = ", ".join(f"{n} × {what}" for what, n in told.items())
            row = f"| {name} | {1e3 * seen[len(seen) // 2]:.0f} ms | {1e3 * seen[-1]:.0f} ms | {len(seen)} | {most / MB:.0f} MB "
            print(f"{row}| {(memory.now() - start) / MB:.0f} MB | {used[0]:.1f}, {used[1]:.1f} | {words} |", flush=True)
    watching.cancel()


def sparse_adapter(folder: Path) -> None:
    """A folder whose weights claim to be one tensor of 1 TB, which takes no room on the disk."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}))
    size = 10**12
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [8, size // 32], "data_offsets": [0, size]}}).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=30, help="of each attack, at most")
    parser.add_argument("--only", default="", help="attacks whose names hold this")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile("w+") as log:
        folder, keys = Path(name), {}
        sparse_adapter(folder / "folders" / "attacker" / "vast")
        with Tenants(folder / "tenants.db", create=True) as tenants:
            for who in ("victim", "attacker"):
                tenants.add(who, max_concurrent=None)
                keys[who] = tenants.create_key(who)[1]
        command = [sys.executable, "-m", "trimtab", "serve", "--base", args.base, "--port", "0", "--json"]
        command += ["--tenants", str(folder / "tenants.db"), "--adapters-from", str(folder / "folders")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as server:
            try:
                assert server.stdout is not None
                told = json.loads(server.stdout.readline())
                asyncio.run(measure(told["url"], server.pid, keys, told["base"], folder / "folders", args.seconds, args.only))
            finally:
                server.terminate()
                server.wait(60)


if __name__ == "__main__":
    main()
