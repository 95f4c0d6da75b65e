"""The simulator beside real servers: the same trace through `trimtab simulate`'s code and through `trimtab serve`, then at a large size.

    python bench/fleet.py                    # 1 and 2 servers on a random base of 25M parameters, hit rates and latencies of both
    python bench/fleet.py --large            # 10⁵ adapters of 10³ tenants on 16 servers, simulated alone, with its time and memory

More adapters are asked for than fit into a server's memory. Speeds are measured in as many processes at once as there are servers, before
and after the servers run, and averaged: machines that others use change meanwhile. Each process has one thread. Requests come over HTTP at
the moments of the trace, whatever becomes of those before; first and last token are taken as the client sees them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from trimtab.fleet.replica import Shape
from trimtab.fleet.routing import ROUTERS
from trimtab.fleet.simulate import Simulated, quantiles, simulate
from trimtab.fleet.speed import Speed
from trimtab.fleet.traffic import Trace, Traffic

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
RANK = 16


def make(folder: Path, adapters: int) -> tuple[Path, list[Path], int]:
    """(a random base's folder, adapters' folders, bytes of a packed adapter)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer
    from trimtab.methods import LoraConfig
    from trimtab.model import load_base
    from trimtab.serve.residency import packed_bytes
    from trimtab.store import Adapter

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None, **SIZES)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = load_base(str(folder / "base"), dtype="bfloat16", device="cpu")
    method = LoraConfig(r=RANK, target_modules="all-linear")
    paths = [folder / f"a{i}" for i in range(adapters)]
    for i, path in enumerate(paths):
        Adapter.create(base, method, seed=i).save(path)
    return folder / "base", paths, packed_bytes(base.pack(Adapter.load(paths[0], base)))


def measured(base: Path, shape: Shape, processes: int) -> Speed:
    """The mean speed of so many engines that are measured at once."""
    command = [sys.executable, __file__, "--measure", str(base), "--running", str(shape.max_running)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return mean([speed_of(json.loads(process.communicate()[0].splitlines()[-1])) for process in running])


def speed_of(content: dict[str, Any]) -> Speed:
    return Speed(**content | {"rows": tuple(content["rows"]), "seconds": tuple(content["seconds"])})


def mean(speeds: list[Speed]) -> Speed:
    rows = sorted({n for s in speeds for n in s.rows})
    more = ("sequence_s", "adapter_s", "context_s", "load_s", "busy_load_s", "slowed", "before_s", "after_s")
    seconds = tuple(statistics.fmean(s.of_rows(n) for s in speeds) for n in rows)
    return Speed(tuple(rows), seconds, speeds[0].source, **{name: statistics.fmean(getattr(s, name) for s in speeds) for name in more})


class Server:
    """A `trimtab serve` of this machine. open, requests: as a router sees it."""

    def __init__(self, number: int, base: Path, adapters: list[Path], shape: Shape, size: int, kv_bytes: int, log: Any):
        command = [sys.executable, "-m", "trimtab", "serve", "--local", "--port", "0", "--json", "--no-speculate"]
        command += ["--base", str(base), "--dtype", "bfloat16", "--device", "cpu", "--max-running", str(shape.max_running)]
        command += ["--max-queued", str(shape.max_queued), "--adapters-gb", str((shape.resident + 0.5) * size / 1e9)]
        command += ["--kv-gb", str(kv_bytes / 1e9)]
        command += [arg for path in adapters for arg in ("--adapter", f"{path.name}={path}")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        self.number, self.open, self.requests = number, 0, 0

    def ready(self) -> None:
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"]
        self.netloc = urlsplit(self.url).netloc

    def holds(self, digest: str) -> bool:
        raise AssertionError("what a server holds is not asked here")

    def loads(self) -> int:
        text = urlopen(f"{self.url}/metrics").read().decode()
        found = re.search(r"^trimtab_adapter_loads_total(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
        assert found, "there is no such metric"
        return int(float(found[1]))

    async def ask(self, adapter: int, prompt: list[int], answer: int) -> tuple[float, float]:
        """(seconds to the first token, to the last), streamed."""
        body = {"model": f"a{adapter}", "prompt": prompt, "max_tokens": answer, "ignore_eos": True, "stream": True, "temperature": 0}
        data = json.dumps(body | {"return_token_ids": True}).encode()
        began = time.perf_counter()
        host, _, port = self.netloc.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        first, got = 0.0, b""
        while chunk := await reader.read(65536):
            got += chunk
            if not first and b"data: " in got:
                first = time.perf_counter() - began
        writer.close()
        assert got.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in got, got[:300]
        return first, time.perf_counter() - began


async def play(trace: Trace, servers: list[Server], routing: str) -> list[tuple[float, float]]:
    choose, draw, under_way = ROUTERS[routing](servers), random.Random(0), list[asyncio.Task[tuple[float, float]]]()
    began = time.perf_counter()

    async def one(server: Server, adapter: int, prompt: list[int], answer: int) -> tuple[float, float]:
        server.open += 1
        server.requests += 1
        try:
            return await server.ask(adapter, prompt, answer)
        finally:
            server.open -= 1

    for asked in trace:
        await asyncio.sleep(max(0.0, began + asked.at - time.perf_counter()))
        prompt = [draw.randrange(4, 250) for _ in range(asked.prompt)]
        under_way.append(asyncio.create_task(one(servers[choose(str(asked.adapter))], asked.adapter, prompt, asked.answer)))
    return await asyncio.gather(*under_way)


async def _way(server: Server) -> tuple[float, float]:
    """Seconds of a request of one token and one step on an idle server, and how many more a last token takes: medians."""
    took = [await server.ask(0, [5 + i], 1) for i in range(12)]
    first, last = (statistics.median(t[i] for t in took[2:]) for i in (0, 1))
    return first, last


def compare(folder: Path, traffic: Traffic, shape: Shape, replicas: int, routing: str, base: Path, paths: list[Path], size: int) -> None:
    trace, skipped = traffic.trace(), int(0.2 * traffic.requests)
    layers, width = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"] * SIZES["hidden_size"] // SIZES["num_attention_heads"]
    kv_bytes = 2 * 2 * layers * width * shape.kv_tokens
    speeds = [measured(base, shape, replicas)]
    with ExitStack() as stack, (folder / "log").open("w") as log:
        servers = [Server(i, base, paths, shape, size, kv_bytes, log) for i in range(replicas)]
        for server in servers:
            stack.callback(server.process.wait, 60)
            stack.callback(server.process.terminate)
        for server in servers:
            server.ready()
        ways = [asyncio.run(_way(server)) for server in servers]
        loads = [server.loads() for server in servers]
        for server in servers:
            server.open = server.requests = 0
        cpu, began = os.times(), time.perf_counter()
        seen = asyncio.run(play(trace, servers, routing))
        wall, load_average = time.perf_counter() - began, os.getloadavg()[0]
        client = (os.times().user + os.times().system - cpu.user - cpu.system) / wall
        loads = [server.loads() - before for server, before in zip(servers, loads, strict=True)]
    speeds.append(measured(base, shape, replicas))
    speed = mean(speeds)
    first = statistics.fmean(way[0] for way in ways) - speed.of_rows(1) - speed.sequence_s - speed.adapter_s
    more = statistics.fmean(way[1] - way[0] for way in ways)
    speed = replace(speed, before_s=max(0.0, first / 2), after_s=max(0.0, first / 2))
    found = simulate(trace, shape, speed, replicas=replicas, routing=routing, warm_up=0.0)
    real_hits = 1 - sum(loads) / len(trace)
    counted = np.array(seen[skipped:])
    simulated = simulate(trace, shape, speed, replicas=replicas, routing=routing, warm_up=0.2)
    real = {"first_s": quantiles(counted[:, 0]), "total_s": quantiles(counted[:, 1])}
    line: dict[str, Any] = {"replicas": replicas, "routing": routing, "requests": len(trace), "hit_rate": [real_hits, found.hit_rate]}
    for name, times in real.items():
        line |= {f"{name.removesuffix('_s')}_p{q * 100:.0f}_ms": [1e3 * s, 1e3 * getattr(simulated, name)[q]] for q, s in times.items()}
    ratios = {name: round(pair[1] / pair[0], 3) for name, pair in line.items() if isinstance(pair, list)}
    beside = {
        "load_average": load_average,
        "client_cpu": round(client, 2),
        "busy": [round(r.busy, 2) for r in simulated.replicas],
        "speeds_ms_of_8_rows": [round(1e3 * s.of_rows(8), 2) for s in speeds],
        "way_ms": [round(1e3 * first, 2), round(1e3 * more, 2)],
    }
    print(json.dumps({k: [round(x, 3) for x in v] if isinstance(v, list) else v for k, v in line.items()}))
    print(json.dumps({"simulated/real": ratios} | beside), flush=True)


def large(speed: Speed, shape: Shape, traffic: Traffic, replicas: int) -> None:
    trace = traffic.trace()
    for routing in ROUTERS:
        found: Simulated = simulate(trace, shape, speed, replicas=replicas, routing=routing, warm_up=0.2)
        line = asdict(found) | {"replicas": None}
        busy, waiting = ([round(getattr(r, name), 3) for r in found.replicas] for name in ("busy", "waiting"))
        line |= {"busy": [min(busy), max(busy)], "waiting": [min(waiting), max(waiting)], "steps": sum(r.steps for r in found.replicas)}
        print(json.dumps({k: v for k, v in line.items() if v is not None}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--routing", nargs="+", default=["round-robin", "hash"], choices=["round-robin", "hash", "least-loaded"])
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--resident", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second for each server")
    parser.add_argument("--requests", type=int, default=240, help="for each server")
    parser.add_argument("--answer", type=float, default=24)
    args = parser.parse_args()
    shape = Shape(resident=args.resident, kv_tokens=16384, max_running=args.running)
    if args.measure:
        from trimtab.fleet.measured import measure
        from trimtab.model import load_base

        print(json.dumps(asdict(measure(load_base(args.measure, dtype="bfloat16", device="cpu"), shape)[0])))
        return
    if args.large:
        speed = Speed.given(0.020, 30e-6, 100e-6, 0.030)
        traffic = Traffic(100_000, tenants=1000, zipf=1.0, rate=100, requests=100_000, prompt_tokens=200, answer_tokens=64)
        large(speed, Shape(resident=512, kv_tokens=100_000), traffic, 16)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, paths, size = make(folder, args.adapters)
        for replicas in args.replicas:
            for routing in args.routing if replicas > 1 else args.routing[:1]:
                requests, rate = args.requests * replicas, args.rate * replicas
                traffic = Traffic(args.adapters, zipf=0.8, rate=rate, requests=requests, prompt_tokens=48, answer_tokens=args.answer)
                compare(folder, traffic, shape, replicas, routing, base, paths, size)


if __name__ == "__main__":
    main()
