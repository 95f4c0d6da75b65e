"""Training: joint steps of LoRAs of rank 16 on all linear layers, beside the bound that the products of the base set, and trl + peft."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from on_gpu.common import Setting, gemm_flops, random_base, random_ids, random_model, run_points, tell, tokenizer

RANK, ROW = 16, 1024
"""ROW: tokens of a row; where a variant has fewer in a step, it has one shorter row."""
STEPS = 4


def grid(setting: Setting) -> list[tuple[int, int]]:
    """(tokens of a joint step, variants that share them)."""
    tokens, variants = ((256, 512), (1, 4)) if setting.tiny else ((4096, 8192, 16_384), (1, 8, 32))
    return [(t, v) for t in tokens for v in variants]


def training(setting: Setting, size: str) -> None:
    base, rate = random_base(setting, size), gemm_flops(setting)
    points = {
        f"{tokens} tokens, {variants} variants": partial(_joint, setting, base, size, tokens, variants, rate)
        for tokens, variants in grid(setting)
    }
    run_points(setting, f"training {size}", points)


def _joint(setting: Setting, base: Any, size: str, tokens: int, variants: int, rate: float) -> Mapping[str, float]:
    import numpy as np

    from trimtab import LoraConfig
    from trimtab.data import Example
    from trimtab.store import Adapter
    from trimtab.train.options import TrainOptions, VariantConfig
    from trimtab.train.step import run_step
    from trimtab.train.variant import Variant

    length = min(ROW, tokens // variants)
    rows = tokens // variants // length
    method = LoraConfig(r=RANK, target_modules="all-linear")
    options = TrainOptions(batch_size=rows, max_steps=STEPS, warmup_steps=0)
    ids = np.array(random_ids(setting, size, rows, length), dtype=np.int32)
    examples = [Example(row, np.arange(length) > 0, f"row {i}", (0, i)) for i, row in enumerate(ids)]
    fresh = Adapter.create(base, method)
    running = [
        Variant(
            VariantConfig(name=f"v{i}", data="rows", method=method, options=options),
            base.attached, fresh.sites, {k: p.clone() for k, p in fresh.params.items()}, examples, seed=i, max_tokens=tokens,
        )
        for i in range(variants)
    ]  # fmt: skip
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        batches = {v: v.next_batch() for v in running}
        found = run_step(batches, tokens)
        for v, f in found.items():
            v.step(f.loss, f.grad_norm, batches[v], 1.0)
        setting.wait()
        times.append(time.perf_counter() - began)
    took = min(times[1:])
    bound = step_flops(base, fresh, tokens, length) / rate
    return {"step_ms": 1e3 * took, "tokens_per_s": tokens / took, "share_of_gemm": bound / took, "loss": found[running[0]].loss}


def step_flops(base: Any, adapter: Any, tokens: int, length: int) -> float:
    """Of a step's products: two passes over the base's matrices (none forms their gradients), three over the factors, and causal attention,
    whose backward is twice its forward."""
    s = base.spec
    matrices = sum(
        base.matrix(name).shape[0] * base.matrix(name).shape[1]
        for name, m in s.modules.items()
        if m.kind != "embedding" and name in base.attached.weights.of
    )
    factors = sum(p.numel() for p in adapter.params.values())
    attention = 6 * length * sum(layer.num_heads for layer in s.layers) * s.layers[0].head_dim
    return float(tokens * (4 * matrices + 6 * factors + attention))


def trl(setting: Setting, size: str) -> None:
    """One adapter, rows of the same lengths, without checkpointing of activations."""
    if not (find_spec("trl") and find_spec("peft")):
        tell(item=f"trl {size}", skipped="trl or peft is not installed")
        return
    points = {f"{tokens} tokens, 1 variants": partial(_trl, setting, size, tokens) for tokens, variants in grid(setting) if variants == 1}
    run_points(setting, f"trl {size}", points)


def _trl(setting: Setting, size: str, tokens: int) -> Mapping[str, float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            setting.wait()
            self.marks.append(time.perf_counter())

    length = min(ROW, tokens)
    rows = Dataset.from_dict({"input_ids": random_ids(setting, size, STEPS * tokens // length, length)})
    model, clock = random_model(setting, size), Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=tokens // length, bf16=setting.on_gpu, use_cpu=not setting.on_gpu,
            gradient_checkpointing=False, max_length=None, report_to=[], save_strategy="no", logging_steps=STEPS, disable_tqdm=True,
        )  # fmt: skip
        lora = LoraConfig(r=RANK, target_modules="all-linear")
        with redirect_stdout(sys.stderr):  # where results are alone on stdout
            SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer(), peft_config=lora, callbacks=[clock]).train()
    took = min(b - a for a, b in pairwise(clock.marks))
    return {"step_ms": 1e3 * took, "tokens_per_s": tokens / took}
