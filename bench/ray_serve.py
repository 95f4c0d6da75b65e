"""Ray Serve: how often a request meets its adapter in a replica's memory, with multiplexing by adapter and without.

    python bench/ray_serve.py                          # two replicas of a tiny random base, 64 adapters, 16 in each one's memory

Both ways see the same requests: adapters drawn by Zipf's law (exponent --zipf), --clients at a time, greedy, a few tokens. A hit is a
request for whose adapter nothing had to be loaded: 1 - loads / requests, by the replicas' own counters. Without multiplexing Serve sends a
request to the shorter of two queues, which at an even load is a throw of a coin. Beside it, what LRU lists of the same sizes would give.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
sys.path.insert(0, str(Path(__file__).parent.parent))
import httpx
import torch

from tests.tiny import tiny_folder
from trimtab.methods import LoraConfig
from trimtab.model import load_base
from trimtab.store import Adapter
from trimtab.store.registry import Store


def publish(folder: Path, count: int) -> tuple[Path, Path, int]:
    """(a base's folder, a store with so many adapters of it, bytes of one in memory)."""
    base = load_base(str(tiny_folder(folder / "base")), dtype="float32", device="cpu")
    store = Store(folder / "store", create=True)
    for i in range(count):
        made = Adapter.create(base, LoraConfig(r=8, target_modules="all-linear"), seed=i)
        for tensor in made.params.values():
            tensor += 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
        store.publish(made, f"bench/a{i}", base=base)
    return folder / "base", folder / "store", sum(4 * t.numel() for t in made.params.values())


def lru(ranks: Sequence[int], size: int) -> float:
    """The hit rate of a list of `size` that keeps what was used last."""
    kept, hits = OrderedDict[int, None](), 0
    for rank in ranks:
        hits += rank in kept
        kept[rank] = None
        kept.move_to_end(rank)
        if len(kept) > size:
            kept.popitem(last=False)
    return hits / len(ranks)


def counters(url: str, replicas: int) -> dict[str, float]:
    """Sums over the replicas of what each says at /metrics; Serve decides who answers, so all are asked until each has."""
    found: dict[str, dict[str, float]] = {}
    while len(found) < replicas:
        answer = httpx.get(f"{url}/metrics", timeout=60)
        lines = [line.split() for line in answer.text.splitlines() if line.startswith("trimtab_adapter")]
        found[answer.headers["x-trimtab-replica"]] = {name.partition("{")[0]: float(value) for name, value in lines}
    return {key: sum(f[key] for f in found.values()) for key in ("trimtab_adapter_loads_total", "trimtab_adapters_resident")}


def measure(args: argparse.Namespace, base: Path, store: Path, size: int, ranks: Sequence[int], multiplex: bool) -> dict[str, Any]:
    """One way, from a start with nothing in memory."""
    from ray import serve

    from trimtab.cluster.arguments import Args
    from trimtab.cluster.serve import app

    asked = Args(
        base=str(base),
        store=store,
        local=True,
        dtype="float32",
        replicas=args.replicas,
        multiplex=multiplex,
        adapters_per_replica=args.resident,
        adapters_gb=1.02 * args.resident * size / 1e9,
        kv_gb=0.02,
        max_running=16,
    )
    serve.run(app(asked))
    url = f"http://127.0.0.1:{args.port}"
    before = counters(url, args.replicas)
    took, homes = list[float](), dict[str, int]()

    def ask(rank: int) -> None:
        body = {"model": f"bench/a{rank}", "prompt": "n 1", "max_tokens": args.tokens, "temperature": 0}
        start = time.perf_counter()
        answer = client.post(f"{url}/v1/completions", json=body)
        answer.raise_for_status()
        took.append(time.perf_counter() - start)
        home = answer.headers["x-trimtab-replica"]
        homes[home] = homes.get(home, 0) + 1

    start = time.perf_counter()
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(args.clients) as clients:
        list(clients.map(ask, ranks))
    seconds = time.perf_counter() - start
    after = counters(url, args.replicas)
    serve.delete("default")
    loads = after["trimtab_adapter_loads_total"] - before["trimtab_adapter_loads_total"]
    return {
        "hit_rate": round(1 - loads / len(ranks), 4),
        "loads": int(loads),
        "resident": int(after["trimtab_adapters_resident"]),
        "requests_by_replica": sorted(homes.values()),
        "requests_per_s": round(len(ranks) / seconds, 1),
        "p50_ms": round(1e3 * statistics.median(took), 1),
        "p95_ms": round(1e3 * statistics.quantiles(took, n=20)[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--resident", type=int, default=16, help="adapters in a replica's memory")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    args = parser.parse_args()
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", args.port)) as free:
        args.port = free.getsockname()[1]
    weights = [(i + 1) ** -args.zipf for i in range(args.adapters)]
    ranks = random.Random(0).choices(range(args.adapters), weights=weights, k=args.requests)
    ray.init(address="local", num_cpus=args.replicas + 1, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    try:
        with tempfile.TemporaryDirectory() as folder:
            base, store, size = publish(Path(folder), args.adapters)
            found: dict[str, Any] = {
                "setting": vars(args),
                "lru": {f"{n} adapters": round(lru(ranks, n), 4) for n in (args.resident, args.replicas * args.resident)},
            }
            for name, multiplex in (("without", False), ("multiplexed", True)):
                found[name] = measure(args, base, store, size, ranks, multiplex)
        print(json.dumps(found, indent=1))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
