"""What `trimtab plan` says of memory, beside the peak of a process that does it. What the process has before the base is subtracted."""

from __future__ import annotations

import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from curves.curve import Curve, Point, peak_bytes, training_step
from curves.merge_memory import SHAPES, make

SIZES = {"num_hidden_layers": 24, "hidden_size": 768, "intermediate_size": 2048, "vocab_size": 49_152, "num_attention_heads": 12}
POSITIONS = {"max_position_embeddings": 4096}
ROUNDED = 10**6
"""Bytes of memory for adapters beyond the one that is served: its tensors are padded."""


def train(folder: str, tokens: int, length: int, method: str = "lora", quantize: str | None = None) -> None:
    """Two steps of a method on so many tokens."""
    import numpy as np

    from trimtab.data import Example
    from trimtab.methods import BY_NAME
    from trimtab.model import load_base

    base = load_base(folder, dtype="bfloat16", device="cpu", quantize=quantize)
    draw = np.random.default_rng(0)
    rows = [
        Example(draw.integers(0, 256, length).astype(np.int32), np.arange(length) > 0, f"row {i}", (0, i)) for i in range(tokens // length)
    ]
    step = training_step(base, [BY_NAME[method]()], rows, tokens)
    for _ in range(2):
        step()


def publish(folder: str) -> None:
    """A LoRA of its preset for this base, in a store beside it."""
    from trimtab.methods import LoraConfig
    from trimtab.model import load_base
    from trimtab.store import Adapter
    from trimtab.store.registry import Store

    base = load_base(folder, dtype="bfloat16", device="cpu")
    Store(Path(f"{folder}-store"), create=True).publish(Adapter.create(base, LoraConfig()), "bench/lora", base=base)


def serve(folder: str, tokens: int, length: int, kv_bytes: int, adapter_bytes: int) -> None:
    """Prompts of so many tokens in all in one step, and an answer to each, with an adapter of the store."""
    from trimtab.model import load_base
    from trimtab.serve.engine import Engine, EngineConfig
    from trimtab.serve.request import Request, SamplingParams
    from trimtab.serve.served import StoredAdapter
    from trimtab.store.registry import Store

    base, store = load_base(folder, dtype="bfloat16", device="cpu"), Store(Path(f"{folder}-store"))
    adapter = StoredAdapter(store.resolve("bench/lora"), store, base)
    engine = Engine(base, EngineConfig(kv_bytes=kv_bytes, adapter_bytes=adapter_bytes, max_step_rows=tokens))
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.run([Request(str(i), (1 + i,) * (length - 8), sampling, adapter) for i in range(tokens // length)])
    engine.close()


def ours(point: tuple[Any, ...]) -> list[float | str]:
    import psutil

    from trimtab.bases.shapes import read_architecture
    from trimtab.cost.plan import plan
    from trimtab.methods import BY_NAME

    what, tokens, length, *more = point
    method, quantize = more or ("lora", None)
    with tempfile.TemporaryDirectory() as folder:
        base, tiny = (make(sizes | POSITIONS, f"{folder}/{i}") for i, sizes in enumerate((SIZES, SHAPES["tiny"])))

        def planned(of: str, tokens: int, length: int) -> Any:
            return plan(read_architecture(of, quantize), BY_NAME[method](), batch_tokens=tokens, sequence_length=length)

        def run(of: str, tokens: int, length: int) -> None:
            if what == "train":
                train(of, tokens, length, *more)
            else:
                costs = planned(of, tokens, length)
                serve(of, tokens, length, costs.serve_kv_bytes, costs.serve_adapter_bytes + ROUNDED)

        if what == "serve":  # in a process of their own: what publishing takes would serve the server again
            with get_context("spawn").Pool(1) as pool:
                pool.map(publish, [base, tiny])
        costs = planned(base, tokens, length)
        run(tiny, 256, 64)  # what is imported and compiled once
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        run(base, tokens, length)
        measured = peak_bytes() - before
    said = costs.train_peak_bytes if what == "train" else costs.serve_peak_bytes
    return [said / 1e9, measured / 1e9, said / measured]


CURVE = Curve(
    what="methods at their presets on a random Qwen2 of 0.23B in bf16 and nf4",
    grows="tokens",
    points=[
        Point(f"{what}, {tokens:,} in sequences of {length}", (what, tokens, length), long=tokens > 2048)
        for what in ("train", "serve")
        for tokens, length in ((512, 256), (2048, 256), (8192, 1024))
    ]
    + [
        Point(f"{method}, {quantize or 'bf16'}, 2,048 in sequences of {length}", ("train", 2048, length, method, quantize), long=True)
        for method in ("lora", "ia3", "bottleneck", "prefix")
        for length in (256, 1024)
        for quantize in (None, "nf4")
    ],
    columns=["plan, GB", "measured, GB", "plan / measured"],
    ours=ours,
    limit=lambda point: "0.85 to 1.15",
)
