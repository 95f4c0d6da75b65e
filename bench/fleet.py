"""The simulator beside real servers: the same trace through `trimtab simulate`'s code and through `trimtab serve`, then at a large size.

    python bench/fleet.py                    # 1 and 2 servers on a random base of 25M parameters, hit rates and latencies of both
    python bench/fleet.py --large            # 10⁵ adapters of 10³ tenants on 16 servers, simulated alone, with its time and memory

More adapters are asked for than fit into a server's memory. Requests come over HTTP at the moments of the trace, whatever becomes of those
before; first and last token are taken as the client sees them. Each server has one thread and writes down its steps and loads.

Speeds are fitted to the steps of the servers themselves, and so is the way between client and engine: on a machine that others use, a
measurement a minute earlier is of another machine. --apart takes speeds as `trimtab simulate` measures them, before the servers run.
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
from collections.abc import Sequence
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
from trimtab.fleet.speed import Speed, Step, fit
from trimtab.fleet.traffic import Trace, Traffic

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
RANK, WARM_UP, LITTLE = 16, 0.2, 240


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


def serve_logged(log: Path, args: list[str]) -> None:
    """`trimtab serve`, which writes down its steps, loads and requests when it ends."""
    from trimtab.__main__ import run
    from trimtab.serve.engine import Engine
    from trimtab.serve.residency import Residency
    from trimtab.serve.step import Step as EngineStep

    steps: list[tuple[int, int, int, int, bool, bool, float]] = []
    times: list[tuple[float | None, float]] = []
    shape: list[tuple[int, int, int, int, bool]] = []
    loads: list[float] = []
    handed: dict[str, float] = {}
    step, run_work, close, start = EngineStep.__call__, EngineStep._run, Engine.close, Engine.start
    load, read = Residency.load, Residency._run

    def load_logged(self: Residency, adapter: Any) -> None:
        handed.setdefault(adapter.digest, time.perf_counter())
        load(self, adapter)

    def read_logged(self: Residency, digest: str) -> None:
        read(self, digest)
        loads.append(time.perf_counter() - handed.pop(digest))

    def run_logged(self: EngineStep, work: Any) -> Any:
        lives = [w.live for w in work]
        seen = (sum(w.rows for w in work), len(work), len({x.digest for x in lives}), sum(x.past for x in lives))
        mix = self.runner._mix
        found = run_work(self, work)
        shape.append((*seen, self.runner._mix is not mix))
        return found

    def step_logged(self: EngineStep) -> bool:
        shape.clear()
        loading, began = self.scheduler.residency.busy, time.perf_counter()
        ran = step(self)
        if shape:
            steps.append((*shape[0], loading or self.scheduler.residency.busy, time.perf_counter() - began))
        return ran

    def start_logged(self: Engine) -> None:
        finished = self.on_finish

        def finish_logged(*facts: Any) -> None:
            times.append((facts[4], facts[5]))
            finished(*facts)

        self.on_finish = finish_logged
        start(self)

    def close_logged(self: Engine) -> None:
        log.write_text(json.dumps({"steps": steps, "loads": loads, "times": times}))
        close(self)

    for owner, name, logged in (
        (EngineStep, "__call__", step_logged),
        (EngineStep, "_run", run_logged),
        (Engine, "close", close_logged),
        (Engine, "start", start_logged),
        (Residency, "load", load_logged),
        (Residency, "_run", read_logged),
    ):
        setattr(owner, name, logged)
    sys.argv = ["trimtab", "serve", *args]
    run()


def _step(numbers: Sequence[float]) -> Step:
    """Rows, sequences, adapters, tokens in the cache, and whether a mix is put together, of one step or as a mean of several."""
    rows, sequences, adapters = (max(1, round(x)) for x in numbers[:3])
    return Step(rows, sequences, adapters, round(numbers[3]), bool(numbers[4]))


def of_run(logs: list[dict[str, Any]]) -> Speed:
    """The speed of servers by their own steps. Steps that are alike count together, as their mean: fitted one by one, long ones beside
    other programs would be taken for errors."""
    alike: dict[tuple[int, int, int, bool], list[list[float]]] = {}
    slow, free = list[list[float]](), list[list[float]]()
    for log in logs:
        for *numbers, loading, seconds in log["steps"]:
            (slow if loading else free).append([*numbers, seconds])
            if not loading:
                alike.setdefault((int(4 * np.log2(numbers[0])), numbers[1], numbers[2], numbers[4]), []).append([*numbers, seconds])
    means = [(np.mean(found, axis=0), len(found)) for found in alike.values()]
    steps = [(_step(m), float(m[5])) for m, count in means for _ in range(min(count, 50))]
    speed = fit(steps, "the servers' own steps")

    def longer(found: list[list[float]]) -> float:
        """What these steps took in all, as a part of what they are taken to take."""
        return sum(m[5] for m in found) / sum(speed(_step(m)) for m in found) if found else 1.0

    factor = longer(free)
    more = {name: getattr(speed, name) * factor for name in ("sequence_s", "adapter_s", "context_s", "mix_s")}
    speed = replace(speed, seconds=tuple(s * factor for s in speed.seconds), **more)
    slowed = longer(slow) - 1
    load_s = statistics.fmean(seconds for log in logs for seconds in log["loads"])
    return replace(speed, slowed=max(0.0, slowed), load_s=load_s)


def speed_of(content: dict[str, Any]) -> Speed:
    return Speed(**content | {"rows": tuple(content["rows"]), "seconds": tuple(content["seconds"])})


def mean(speeds: list[Speed]) -> Speed:
    rows = sorted({n for s in speeds for n in s.rows})
    more = ("sequence_s", "adapter_s", "context_s", "mix_s", "load_s", "busy_load_s", "slowed", "before_s", "after_s")
    seconds = tuple(statistics.fmean(s.of_rows(n) for s in speeds) for n in rows)
    return Speed(tuple(rows), seconds, speeds[0].source, **{name: statistics.fmean(getattr(s, name) for s in speeds) for name in more})


class Server:
    """A `trimtab serve` of this machine. open, requests: as a router sees it."""

    def __init__(self, number: int, base: Path, adapters: list[Path], shape: Shape, size: int, kv_bytes: int, log: Path):
        self.log = log.parent / f"steps-{number}.json"
        command = [sys.executable, __file__, "--serve", str(self.log), "--local", "--port", "0", "--json", "--no-speculate"]
        command += ["--base", str(base), "--dtype", "bfloat16", "--device", "cpu", "--max-running", str(shape.max_running)]
        command += ["--max-queued", str(shape.max_queued), "--adapters-gb", str((shape.resident + 0.5) * size / 1e9)]
        command += ["--kv-gb", str(kv_bytes / 1e9)]
        command += [arg for path in adapters for arg in ("--adapter", f"{path.name}={path}")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("a"))
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


def compare(folder: Path, args: argparse.Namespace, replicas: int, routing: str, base: Path, paths: list[Path], size: int) -> None:
    shape = Shape(resident=args.resident, kv_tokens=16384, max_running=args.running)
    requests, rate = args.requests * replicas, args.rate * replicas
    traffic = Traffic(args.adapters, zipf=args.zipf, rate=rate, requests=requests, prompt_tokens=48, answer_tokens=args.answer)
    trace, skipped = traffic.trace(), int(WARM_UP * requests)
    layers, width = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"] * SIZES["hidden_size"] // SIZES["num_attention_heads"]
    kv_bytes = 2 * 2 * layers * width * shape.kv_tokens
    apart = measured(base, shape, replicas) if args.apart else None
    servers = [Server(i, base, paths, shape, size, kv_bytes, folder / "log") for i in range(replicas)]
    try:
        for server in servers:
            server.ready()
        seen = np.array(asyncio.run(play(trace, servers, routing)))
        load_average, loads = os.getloadavg()[0], sum(server.loads() for server in servers)
    finally:
        for server in servers:
            server.process.terminate()
        for server in servers:
            server.process.wait(60)
    logs = [json.loads(server.log.read_text()) for server in servers]
    inside = np.array([times for log in logs for times in log["times"]])
    way_s = max(0.0, float(seen[:, 1].mean() - inside[:, 1].mean()))
    speed = apart or replace(of_run(logs), before_s=way_s / 2, after_s=way_s / 2)
    found = simulate(trace, shape, speed, replicas=replicas, routing=routing, warm_up=0.0)
    late = simulate(trace, shape, speed, replicas=replicas, routing=routing, warm_up=WARM_UP)
    line: dict[str, Any] = {"hit_rate": [1 - loads / len(trace), found.hit_rate]}
    for name, column in (("first", 0), ("total", 1)):
        for q, s in quantiles(seen[skipped:, column]).items():
            line[f"{name}_p{q * 100:.0f}_ms"] = [1e3 * s, 1e3 * getattr(late, f"{name}_s")[q]]
    steps = [sum(len(log["steps"]) for log in logs), sum(r.steps for r in found.replicas)]
    engine = simulate(trace, replace(shape), replace(speed, before_s=0.0, after_s=0.0), replicas=replicas, routing=routing, warm_up=0.0)
    for name, column, times in (("first", 0, engine.first_s), ("total", 1, engine.total_s)):
        line[f"{name}_in_engine_p50_ms"] = [1e3 * quantiles(inside[:, column])[0.5], 1e3 * times[0.5]]
    beside = {"steps": steps, "load_average": round(load_average, 1), "busy": [round(r.busy, 2) for r in late.replicas]}
    beside |= {"way_ms": round(1e3 * way_s, 2), "speed": {k: v for k, v in asdict(speed).items() if k != "source"}}
    print(json.dumps({"replicas": replicas, "routing": routing, "requests": len(trace), "speeds": "apart" if apart else "of the run"}))
    print(json.dumps({"real, simulated": {k: [round(x, 3) for x in pair] for k, pair in line.items()}}))
    print(json.dumps({"simulated/real": {k: round(pair[1] / pair[0], 3) for k, pair in line.items()}} | beside), flush=True)


def large(speed: Speed, shape: Shape, traffic: Traffic, replicas: int) -> None:
    trace = traffic.trace()
    for routing in ("hash", "affinity", "round-robin", "least-loaded"):
        found: Simulated = simulate(trace, shape, speed, replicas=replicas, routing=routing, warm_up=0.2)
        line = asdict(found) | {"replicas": None}
        busy, waiting = ([round(getattr(r, name), 3) for r in found.replicas] for name in ("busy", "waiting"))
        line |= {"busy": [min(busy), max(busy)], "waiting": [min(waiting), max(waiting)], "steps": sum(r.steps for r in found.replicas)}
        print(json.dumps({k: v for k, v in line.items() if v is not None}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--routing", nargs="+", default=["round-robin", "hash"], choices=["round-robin", "hash", "least-loaded"])
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--resident", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second for each server")
    parser.add_argument("--zipf", type=float, default=0.8)
    parser.add_argument("--requests", type=int, default=LITTLE, help="for each server")
    parser.add_argument("--answer", type=float, default=24)
    parser.add_argument("--apart", action="store_true", help="speeds as `trimtab simulate` measures them")
    if sys.argv[1:2] == ["--serve"]:
        serve_logged(Path(sys.argv[2]), sys.argv[3:])
        return
    args = parser.parse_args()
    if args.measure:
        shape = Shape(max_running=args.running)
        from trimtab.fleet.measured import measure
        from trimtab.model import load_base

        base = load_base(args.measure, dtype="bfloat16", device="cpu")
        speed = measure(base, shape)[0]
        if not args.alone:
            from trimtab.fleet.served import with_server

            speed = with_server(base, speed, shape, ["--base", args.measure, "--dtype", "bfloat16", "--device", "cpu"])
        print(json.dumps(asdict(speed)))
        return
    if args.large:
        speed = Speed.given(0.020, 30e-6, 100e-6, 0.030)
        requests = args.requests if args.requests != LITTLE else 100_000
        traffic = Traffic(100_000, tenants=1000, zipf=1.0, rate=100, requests=requests, prompt_tokens=200, answer_tokens=64)
        large(speed, Shape(resident=512, kv_tokens=100_000), traffic, 16)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, paths, size = make(folder, args.adapters)
        for replicas in args.replicas:
            for routing in args.routing if replicas > 1 else args.routing[:1]:
                compare(folder, args, replicas, routing, base, paths, size)


if __name__ == "__main__":
    main()
