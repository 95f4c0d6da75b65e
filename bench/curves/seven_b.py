"""Bases in nf4 of the shapes of a 7B and a 1B: what `trimtab plan` says of memory beside the peak of a process that trains, or decodes.

Codes and scales are random, so no dense matrix is ever made. What the process has before the base is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from curves.curve import Curve, Point, bundled_tokenizer, cpu_seconds, peak_bytes, training_step

TOKENS, ANSWER = 512, 16
SEVEN_B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
ONE_B: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
"""Of Llama 2 7B and TinyLlama 1.1B."""
TINY: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def config(sizes: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    kv = {"num_key_value_heads": 4} if sizes is ONE_B else {}
    return LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **sizes, **kv)


def random_nf4(sizes: dict[str, Any]) -> Any:
    """A base whose layers are in nf4, made layer by layer."""
    import json

    import torch
    from torch import nn
    from transformers import LlamaForCausalLM

    from trimtab.bases.weights.four_bit import NF4, read
    from trimtab.model import Base

    random, dtype = torch.Generator().manual_seed(0), torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config(sizes)).to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            shape, n = (module.out_features, module.in_features), module.out_features * module.in_features
            state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
            stored = {
                "weight": torch.randint(256, (n // 2, 1), generator=random, dtype=torch.uint8),
                "weight.absmax": torch.full((n // 64,), 2.5 / shape[1] ** 0.5),
                "weight.quant_map": torch.tensor(NF4),
                "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
            }
            model.set_submodule(name, read(stored, shape, None, dtype))
    for module in model.modules():
        for own, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=dtype)
                made = made.fill_(1.0) if made.dim() == 1 else made.normal_(0, 0.02, generator=random)
                module._parameters[own] = nn.Parameter(made, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return Base(model.eval(), bundled_tokenizer())


def train(sizes: dict[str, Any]) -> float:
    """CPU seconds of the second of two steps of LoRA r16 on one row."""
    import numpy as np

    from trimtab.data import Example
    from trimtab.methods import LoraConfig

    draw = np.random.default_rng(0)
    rows = [Example(draw.integers(0, 32000, TOKENS).astype(np.int32), np.arange(TOKENS) > 0, "row", (0, 0))]
    step = training_step(random_nf4(sizes), [LoraConfig(r=16)], rows, TOKENS)
    step()
    return cpu_seconds(step)


def decode(sizes: dict[str, Any]) -> float:
    """CPU seconds of an answer to one prompt, under a LoRA."""
    from trimtab.decode.generate import Sampling
    from trimtab.methods import LoraConfig
    from trimtab.store import Adapter

    base = random_nf4(sizes)
    adapter = Adapter.create(base, LoraConfig(r=16))
    prompt = list(range(3, 3 + TOKENS - ANSWER))
    return cpu_seconds(lambda: base.generate_ids([prompt], [adapter], Sampling(ANSWER)))


def ours(point: tuple[str, dict[str, Any]]) -> list[float | str]:
    import tempfile

    import psutil

    from trimtab.bases.shapes import read_architecture
    from trimtab.cost.plan import plan
    from trimtab.methods import LoraConfig

    what, sizes = point
    run: Callable[[dict[str, Any]], float] = {"train": train, "decode": decode}[what]
    with tempfile.TemporaryDirectory() as folder:
        config(sizes).save_pretrained(folder)
        planned = plan(read_architecture(folder, "nf4"), LoraConfig(r=16), dtype="bfloat16", batch_tokens=TOKENS, sequence_length=TOKENS)
    run(TINY)  # what is imported and compiled once
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds = run(sizes)
    peak = peak_bytes()
    said = planned.train_peak_bytes if what == "train" else planned.serve_peak_bytes
    return [said / 1e9, (peak - before) / 1e9, said / (peak - before), peak / 1e9, seconds]


CURVE = Curve(
    what=f"random Llamas in nf4, LoRA r16 on all linear layers, one row of {TOKENS} tokens",
    grows="work",
    points=[
        Point("train a 7B", ("train", SEVEN_B), long=True),
        Point("train a 1B", ("train", ONE_B), long=True),
        Point("decode a 1B", ("decode", ONE_B), long=True),
    ],
    columns=["plan, GB", "measured, GB", "plan / measured", "whole process, GB", "CPU s"],
    ours=ours,
    limit=lambda point: "0.85 to 1.15; the 7B within 8 GB",
    threads=2,
    timeout_s=3600,
)
