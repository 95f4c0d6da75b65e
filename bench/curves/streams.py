"""Many streams of one engine, with 32 adapters among them or none: tokens a CPU second, adapters resident, or loaded while others run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curves.curve import Curve, Point

NEW = 16
"""Tokens of each answer."""
ADAPTERS = 32


@contextmanager
def published(base: Any, count: int) -> Iterator[list[Any]]:
    """LoRA adapters of rank 16 at every linear layer, in a store as a server reads them."""
    import torch

    from trimtab import LoraConfig
    from trimtab.serve.served import StoredAdapter
    from trimtab.store import Adapter
    from trimtab.store.registry import Store

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store", create=True)
        for i in range(count):
            adapter = Adapter.create(base, LoraConfig(r=16, lora_alpha=32), seed=i)
            generator = torch.Generator().manual_seed(i)
            for t in adapter.params.values():
                t += 0.01 * torch.randn(t.shape, generator=generator)
            adapter.save(Path(folder) / "one")
            store.publish(Path(folder) / "one", f"acme/a{i}", base=base)
        yield [StoredAdapter(store.resolve(f"acme/a{i}"), store, base) for i in range(count)]


def ours(value: tuple[int, int, bool]) -> list[float | str]:
    """(tokens a CPU second; those of decoding alone, from the moment when all have their first token; CPU seconds to the median first
    token)."""
    import trimtab
    from trimtab.serve.engine import Engine, EngineConfig
    from trimtab.serve.request import Request, SamplingParams

    streams, count, cold = value
    base = trimtab.load_base("smollm2-135m-instruct", dtype="bfloat16")
    prompts = [tuple(base.encode_prompt(f"Tell me about topic number {i} in the history of sailing.")) for i in range(streams)]

    def answers(engine: Engine, name: str, adapters: list[Any]) -> list[float]:
        """When tokens came, from the start on, in CPU seconds of all threads."""
        began, came = time.process_time(), list[tuple[str, float]]()
        for i, prompt in enumerate(prompts):
            adapter = adapters[i % len(adapters)] if adapters else None
            sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
            heard = lambda delta, i=i: came.extend((f"{i}", time.process_time() - began) for _ in delta.tokens)  # noqa: E731
            engine.submit(Request(f"{name}{i}", prompt, sampling, adapter, tenant=name), heard)
        while engine.requests:
            if not engine.step():
                time.sleep(0.001)
        first = dict(reversed(came))
        ends, starts = max(at for _, at in came), sorted(first.values())
        decoded = sum(at > starts[-1] for _, at in came)
        return [len(came) / ends, decoded / (ends - starts[-1]), starts[len(starts) // 2]]

    with published(base, count) as adapters:
        engine = Engine(base, EngineConfig(kv_bytes=2 * 10**9, adapter_bytes=10**9, max_running=streams))
        if cold:
            answers(engine, "warm", [])
            return list(answers(engine, "cold", adapters))
        found = [answers(engine, f"run{i}-", adapters) for i in range(3)][1:]
        return [max(speeds) for speeds in zip(*(f[:2] for f in found), strict=True)] + [min(f[2] for f in found)]


CURVE = Curve(
    what="smollm2-135m in bf16, prompts of 43 tokens, 16 new ones each, one tenant; adapters: LoRA of rank 16 at every linear layer",
    grows="streams x adapters",
    points=[
        Point(f"{n} x {adapters}{', cold' if cold else ''}", (n, adapters, cold), long=n > 128)
        for n in (16, 64, 128, 256, 512)
        for adapters, cold in ((0, False), (ADAPTERS, False), (ADAPTERS, True))
    ],
    columns=["tokens a CPU s", "decoding alone", "first token, CPU s"],
    ours=ours,
    limit=lambda point: "resident" if point.value[2] else "not below fewer streams",
)
