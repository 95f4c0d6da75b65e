"""What `trimtab plan` says of memory, beside the peak of a process that does it. What the process has before the base is subtracted."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from curves.curve import Curve, Point
from curves.merge_memory import MAKE

SIZES = {"num_hidden_layers": 24, "hidden_size": 768, "intermediate_size": 2048, "vocab_size": 49_152, "num_attention_heads": 12}
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 300, "num_attention_heads": 2}


def make(sizes: dict[str, int], folder: str) -> str:
    subprocess.run([sys.executable, "-c", MAKE, json.dumps(sizes | {"max_position_embeddings": 4096}), folder], check=True)
    return folder


def train(folder: str, tokens: int, length: int) -> None:
    """Two steps of a LoRA on so many tokens."""
    import numpy as np

    from trimtab.data import Example
    from trimtab.methods import LoraConfig
    from trimtab.model import load_base
    from trimtab.store import Adapter
    from trimtab.train.options import TrainOptions, VariantConfig
    from trimtab.train.step import run_step
    from trimtab.train.variant import Variant

    base = load_base(folder, dtype="bfloat16", device="cpu")
    draw = np.random.default_rng(0)
    rows = [
        Example(draw.integers(0, 256, length).astype(np.int32), np.arange(length) > 0, f"row {i}", (0, i)) for i in range(tokens // length)
    ]
    config = VariantConfig(name="v", data="d", method=LoraConfig(), options=TrainOptions(batch_size=len(rows), max_steps=2))
    fresh = Adapter.create(base, config.method)
    variant = Variant(config, base.attached, fresh.sites, fresh.params, rows, seed=0, max_tokens=tokens)
    for _ in range(2):
        batch = variant.next_batch()
        variant.step(run_step({variant: batch}, max_tokens=tokens)[variant].loss, batch, 1.0)


def serve(folder: str, tokens: int, length: int) -> None:
    """Prompts of so many tokens in all, and an answer to each."""
    from trimtab.decode.generate import Sampling
    from trimtab.methods import LoraConfig
    from trimtab.model import load_base
    from trimtab.store import Adapter

    base = load_base(folder, dtype="bfloat16", device="cpu")
    adapter = Adapter.create(base, LoraConfig())
    prompts = [[1 + i] * (length - 8) for i in range(tokens // length)]
    base.generate_ids(prompts, [adapter] * len(prompts), Sampling(8))


def ours(point: tuple[str, int, int]) -> list[float | str]:
    import psutil

    from trimtab.bases.shapes import read_architecture
    from trimtab.cost.plan import plan
    from trimtab.methods import LoraConfig

    what, tokens, length = point
    run: Any = {"train": train, "serve": serve}[what]
    with tempfile.TemporaryDirectory() as folder:
        base, tiny = make(SIZES, str(Path(folder, "base"))), make(TINY, str(Path(folder, "tiny")))
        planned = plan(read_architecture(base), LoraConfig(), batch_tokens=tokens, sequence_length=length)
        run(tiny, 256, 64)  # what is imported and compiled once
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        run(base, tokens, length)
        peak = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    said, measured = planned.train_peak_bytes if what == "train" else planned.serve_peak_bytes, peak - before
    return [said / 1e9, measured / 1e9, said / measured]


CURVE = Curve(
    what="a LoRA at its presets on a random Qwen2 of 0.23B in bf16",
    grows="tokens",
    points=[
        Point(f"{what}, {tokens:,} in sequences of {length}", (what, tokens, length), long=tokens > 2048)
        for what in ("train", "serve")
        for tokens, length in ((512, 256), (2048, 256), (8192, 1024))
    ],
    columns=["plan, GB", "measured, GB", "plan / measured"],
    ours=ours,
    limit=lambda point: "0.85 to 1.15",
)
