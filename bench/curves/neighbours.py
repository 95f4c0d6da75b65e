"""A training and a decode with two threads beside processes that never rest: speed against the fair share of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from curves.curve import Curve, Point, bundled_tokenizer, random_llama

SECONDS = 8.0
SETTLE_S = 2
"""So long the neighbours run before trimtab is imported. It looks at what is runnable all the time (ops/cpp/crowd.cpp)."""
GOAL = 0.8


def random_base() -> Any:
    """135M's width, 8 layers, random weights in bf16."""
    from trimtab.model import Base

    return Base(random_llama(layers=8, vocab_size=4096), bundled_tokenizer(), name="random")


def training(base: Any) -> Callable[[], object]:
    """A step of LoRA on 4 rows of 128 tokens."""
    import torch

    from trimtab import LoraConfig
    from trimtab.store import Adapter

    adapter = Adapter.create(base, LoraConfig(r=8), seed=0)
    rows = [torch.randint(0, 4096, (128,)).tolist() for _ in range(4)]
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in adapter.params.values()], fused=True)

    def step() -> None:
        loss = torch.stack([x.float().logsumexp(-1).mean() for x in base.logits(rows, [adapter] * 4, grad=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def decoding(base: Any) -> Callable[[], object]:
    """16 tokens of 4 streams."""
    import torch

    from trimtab.decode.generate import Sampling

    prompts = [torch.randint(5, 4096, (16,)).tolist() for _ in range(4)]
    return lambda: base.generate_ids(prompts, None, Sampling(16))


def ours(neighbours: int) -> list[float]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        time.sleep(SETTLE_S if neighbours else 0)
        base = random_base()
        return [speed(made(base)) for made in (training, decoding)]
    finally:
        for process in busy:
            process.kill()


def speed(step: Callable[[], object]) -> float:
    """Steps a second of wall time."""
    step()
    began, steps = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        step()
        steps += 1
    return steps / (time.monotonic() - began)


CURVE = Curve(
    what="two threads beside busy processes; steps a second of wall time (training 4 × 128 tokens, decode 4 × 16)",
    grows="neighbours",
    points=[Point(str(n), n) for n in (0, 1, 4, 8)],
    columns=["training", "decode"],
    ours=ours,
    limit=lambda point: f"{GOAL * min(1.0, (os.cpu_count() or 1) / (2 + point.value)):.2f} of the first row" if point.value else "",
    threads=2,
)
