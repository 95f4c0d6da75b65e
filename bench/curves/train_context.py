"""A training step of LoRA as its one row grows: our step, and transformers with SDPA and peft, which computes the same loss."""

from __future__ import annotations

from typing import Any

from curves.curve import Curve, Point, cpu_seconds


def model() -> Any:
    """Six layers of the bundled base's shapes, random, in bf16; few words, so that a long row's logits fit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=16384, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def ours(tokens: int) -> list[float | str]:
    import numpy as np

    from trimtab.data import Example
    from trimtab.methods import LoraConfig
    from trimtab.model import Base
    from trimtab.store import Adapter
    from trimtab.train.options import TrainOptions, VariantConfig
    from trimtab.train.step import run_step
    from trimtab.train.variant import Variant

    base, method = Base(model().eval(), None), LoraConfig(r=16)
    rows = [Example(np.arange(tokens, dtype=np.int32) % 1000, np.arange(tokens) > 0, "row", (0, 0))]
    config = VariantConfig(name="lora", data="rows", method=method, options=TrainOptions(batch_size=1, max_steps=9, warmup_steps=0))
    fresh = Adapter.create(base, method)
    variant = Variant(config, base.attached, fresh.sites, fresh.params, rows, seed=0, max_tokens=16384)

    def step() -> None:
        batch = variant.next_batch()
        outcome = run_step({variant: batch}, max_tokens=16384)[variant]
        variant.step(outcome.loss, batch, 1.0)

    step()
    return [tokens / cpu_seconds(step)]


def peft(tokens: int) -> list[float | str]:
    import torch
    from peft import LoraConfig, get_peft_model

    plain = model()
    plain.set_attn_implementation("sdpa")
    trained: Any = get_peft_model(plain, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(tokens)[None] % 1000
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return [tokens / cpu_seconds(step)]


CURVE = Curve(
    what="a step of LoRA r16 on one row, six layers of the bundled base's shapes in bf16",
    grows="tokens of the row",
    points=[Point(f"{n:,}", n, long=n > 2048) for n in (512, 2048, 8000)],
    columns=["tokens a CPU s"],
    ours=ours,
    peers={"transformers, SDPA and peft": peft},
    limit=lambda point: "0.7 of the speed at 2,048" if point.value > 2048 else "",
)
